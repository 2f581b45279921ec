"""Arithmetic on hits and metrics: recall, means, seeds together."""

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from utils import two_decimals

if TYPE_CHECKING:
    import numpy as np


def percentage(hits: "np.ndarray") -> float:
    """Percentage of the queries that are hits, (Q,) bool: the recall at k of the hits `ranks < k`."""
    return 100 * int(hits.sum()) / len(hits)


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
        two_decimals(mean)
        if deviation is None
        else f"{two_decimals(mean)} ± {two_decimals(deviation)}"
    )
