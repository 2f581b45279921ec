"""Compute metrics from ranks: recall, average precision, means, and statistics over seeds."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from utils import format_metric

if TYPE_CHECKING:
    import numpy as np


NO_RANK = 2**31 - 1  # rank of a missing target, larger than any rank in a gallery


# Computes a score from each query's contribution (Q,). NaN marks queries that do not count; if none count, it returns
# NaN.
Statistic = Callable[["np.ndarray"], float]


@dataclass(frozen=True)
class Metric:
    """A number that a benchmark reports.

    Attributes:
        title: title in tables and curves; "" if they do not show the metric.
        unit: "%", or another unit, such as "rank".
        lower_is_better: whether lower values are better, as for a rank.
        checkpoint: suffix of the checkpoint that is kept for the best value; "" for no checkpoint.
    """

    title: str = ""
    unit: str = "%"
    lower_is_better: bool = False
    checkpoint: str = ""


@dataclass(frozen=True)
class Ranks:
    """Ranks of the targets of a split's queries, counted from 0. All metrics are computed from these.

    Attributes:
        named: (Q,) rank of each query's annotated target in the gallery.
        others: (Q, T - 1) ranks of its other targets, padded with NO_RANK; None if no query has any.
        in_group: (Q,) rank of the annotated target in the query's group; None without groups.
        kinds: kind of query -> indices of the queries of this kind.
    """

    named: "np.ndarray"
    others: "np.ndarray | None" = None
    in_group: "np.ndarray | None" = None
    kinds: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def of_all(self) -> "np.ndarray":
        """Return the ranks of all targets (Q, T), the annotated target first."""
        import numpy as np

        return np.column_stack([self.named] if self.others is None else [self.named, self.others])


def average_precision(ranks: "np.ndarray", k: int) -> "np.ndarray":
    """Return each query's AP at k, (Q,): sum of the precisions at its targets within k / min(number of targets, k).

    This follows the evaluation code of CIRCO (Baldrati et al., ICCV 2023).

    Args:
        ranks: (Q, T) ranks of the targets in any order, padded with NO_RANK.

    Example:
        >>> average_precision(np.array([[4, 0, NO_RANK]]), 10)  # precisions 1/1 and 2/5
        array([0.7])
    """
    import numpy as np

    places = np.sort(ranks, axis=1) + 1
    found = np.arange(1, ranks.shape[1] + 1)  # number of targets up to each place
    precisions = np.where(places <= k, found / places, 0)
    targets = (ranks < NO_RANK).sum(axis=1)
    return precisions.sum(axis=1) / np.minimum(targets, k)


def only(queries: Sequence[int], values: "np.ndarray") -> "np.ndarray":
    """Return values (Q,) of some queries, and NaN for other queries, which do not count."""
    import numpy as np

    rows = np.array(queries, dtype=int)
    kept = np.full(len(values), np.nan)
    kept[rows] = values[rows]
    return kept


def percentage(values: "np.ndarray") -> float:
    """Return the mean over queries, in percent, of values (Q,) from 0 to 1.

    NaN values are skipped; the mean is NaN if all values are. For the recall at k, pass `ranks < k`.
    """
    import numpy as np

    counted = values[~np.isnan(values)]
    return 100 * float(counted.sum()) / len(counted) if len(counted) else math.nan


def means(values: Sequence[float]) -> dict[str, float]:
    """Return arithmetic, harmonic and geometric means; the latter two are 0 if any value is 0."""
    return {
        "arithmetic_mean": statistics.fmean(values),
        "harmonic_mean": float(statistics.harmonic_mean(values)),
        "geometric_mean": statistics.geometric_mean(values) if min(values) > 0 else 0.0,
    }


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the sample standard deviation (n - 1), which is None for a single value."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return statistics.fmean(values), deviation


def shown(values: Sequence[float]) -> str:
    """Format a value as tables show it, or several values as mean ± standard deviation."""
    mean, deviation = mean_and_deviation(values)
    spread = "" if deviation is None else f" ± {format_metric(deviation)}"
    return format_metric(mean) + spread
