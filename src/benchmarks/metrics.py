"""Arithmetic on ranks and metrics: recall, average precision, means, seeds together."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from utils import format_metric

if TYPE_CHECKING:
    import numpy as np


NO_RANK = 2**31 - 1  # behind every gallery: of a target that a query does not have


# Makes one number of what each query adds to it, (Q,), with NaN of those that do not count; NaN where none does.
Statistic = Callable[["np.ndarray"], float]


@dataclass(frozen=True)
class Metric:
    """A number that a benchmark reports.

    Attributes:
        title: what tables and curves call it; "" of one that is in none.
        unit: "%", or what it is measured in instead, such as "rank".
        lower_is_better: as of a rank.
        checkpoint: suffix of the checkpoint that is kept for its best value; "" where none is.
    """

    title: str = ""
    unit: str = "%"
    lower_is_better: bool = False
    checkpoint: str = ""


@dataclass(frozen=True)
class Ranks:
    """Ranks of the targets of a split's queries, counted from 0. All metrics are computed from these.

    Attributes:
        named: (Q,) of each query's named target in the gallery.
        others: (Q, T - 1) of its other targets, NO_RANK where it has fewer; None where no query has any.
        in_group: (Q,) of the named target in the query's group; None without groups.
        kinds: kind of query -> the queries that are of it, by their numbers.
    """

    named: "np.ndarray"
    others: "np.ndarray | None" = None
    in_group: "np.ndarray | None" = None
    kinds: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def of_all(self) -> "np.ndarray":
        """(Q, T) of all targets, the named one first."""
        import numpy as np

        return np.column_stack([self.named] if self.others is None else [self.named, self.others])


def average_precision(ranks: "np.ndarray", k: int) -> "np.ndarray":
    """AP at k of each query, (Q,): sum of the precisions at its targets within k / min(number of targets, k).

    As the evaluation code of CIRCO (Baldrati et al., ICCV 2023) has it.

    Args:
        ranks: (Q, T) of the targets in any order, NO_RANK where a query has fewer.

    Example:
        >>> average_precision(np.array([[4, 0, NO_RANK]]), 10)  # precisions 1/1 and 2/5
        array([0.7])
    """
    import numpy as np

    places = np.sort(ranks, axis=1) + 1
    found = np.arange(1, ranks.shape[1] + 1)  # targets up to each place
    precisions = np.where(places <= k, found / places, 0)
    targets = (ranks < NO_RANK).sum(axis=1)
    return precisions.sum(axis=1) / np.minimum(targets, k)


def only(queries: Sequence[int], values: "np.ndarray") -> "np.ndarray":
    """Values (Q,) of some queries, NaN of the others, which do not count."""
    import numpy as np

    rows = np.array(queries, dtype=int)
    kept = np.full(len(values), np.nan)
    kept[rows] = values[rows]
    return kept


def percentage(values: "np.ndarray") -> float:
    """Mean over the queries in percent, from (Q,), 0 to 1 or NaN of a query that does not count; NaN where none does.

    The recall at k is that of `ranks < k`.
    """
    import numpy as np

    counted = values[~np.isnan(values)]
    return 100 * float(counted.sum()) / len(counted) if len(counted) else math.nan


def means(values: Sequence[float]) -> dict[str, float]:
    """Arithmetic, harmonic and geometric mean; the latter two are 0 where a value is 0."""
    return {
        "arithmetic_mean": statistics.fmean(values),
        "harmonic_mean": float(statistics.harmonic_mean(values)),
        "geometric_mean": statistics.geometric_mean(values) if min(values) > 0 else 0.0,
    }


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation over a sample (n - 1); a single value has no deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return statistics.fmean(values), deviation


def shown(values: Sequence[float]) -> str:
    """A value as tables show it, or mean ± standard deviation of several."""
    mean, deviation = mean_and_deviation(values)
    return (
        format_metric(mean)
        if deviation is None
        else f"{format_metric(mean)} ± {format_metric(deviation)}"
    )
