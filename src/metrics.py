"""Arithmetic on similarities and ranks: exclude, rank targets by counting, recall at k, means."""

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor


def check_finite(similarity: Tensor) -> None:
    """Raise ValueError on NaN or infinity: compared as a number, a NaN would read as rank 0, which is recall 100."""
    if not torch.isfinite(similarity).all():
        raise ValueError("similarities that are not finite")


def exclude(similarity: Tensor, columns: Tensor) -> Tensor:
    """A copy of similarity (Q, N) in which entry columns[i] of row i can no longer be retrieved."""
    return similarity.scatter(1, columns.unsqueeze(1), float("-inf"))


def target_ranks(similarity: Tensor, targets: Tensor) -> Tensor:
    """Rank of each query's target by counting what comes before it; no sorting.

    Equal similarities keep the order of the columns, as in a stable sort, so ranks do not depend on the machine.

    Args:
        similarity: (Q, N), larger is nearer; -inf for what must not be retrieved.
        targets: (Q,) column of each query's target.

    Returns:
        (Q,) ranks, 0 for the first place.

    Example:
        >>> target_ranks(torch.tensor([[0.1, 0.9, 0.5]]), torch.tensor([2]))
        tensor([1])
    """
    own = similarity.gather(1, targets.unsqueeze(1))  # (Q, 1)
    if torch.isnan(similarity).any() or torch.isinf(own).any():
        raise ValueError("similarities that are NaN, or a target that was excluded")
    columns = torch.arange(similarity.shape[1], device=similarity.device)
    earlier = columns < targets.unsqueeze(1)  # (Q, N)
    return ((similarity > own) | ((similarity == own) & earlier)).sum(1)


def recall_at(ranks: Tensor, k: int) -> float:
    """Percentage of the queries whose target has a rank below k."""
    return 100 * int((ranks < k).sum()) / len(ranks)


def means(values: Sequence[float]) -> dict[str, float]:
    """Arithmetic, harmonic and geometric mean; the latter two are 0 where a value is 0."""
    return {
        "arithmetic_mean": statistics.fmean(values),
        "harmonic_mean": float(statistics.harmonic_mean(values)),
        "geometric_mean": statistics.geometric_mean(values) if min(values) > 0 else 0.0,
    }
