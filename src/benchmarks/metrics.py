"""Arithmetic on similarities and ranks: rank targets by counting, the k nearest, recall at k, means."""

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor


class NotFiniteError(ValueError):
    """A similarity is NaN or infinite: compared as a number, a NaN would read as rank 0, which is recall 100."""


def _check(similarity: Tensor) -> None:
    """Raise NotFiniteError on NaN and infinity; -inf is what must not be retrieved.

    One sum a row: it is NaN or infinite if a term is, and costs a fraction of a comparison of each.
    """
    if not (similarity.sum(1) < float("inf")).all():
        raise NotFiniteError("similarities that are not finite")


def target_ranks(similarity: Tensor, targets: Tensor) -> Tensor:
    """Rank of each query's target by counting what comes before it; no sorting.

    Equal similarities keep the order of the columns, as in a stable sort, so ranks do not depend on the machine.

    Args:
        similarity: (Q, N), larger is nearer; -inf for what must not be retrieved.
        targets: (Q,) column of each query's target.

    Returns:
        (Q,) ranks, 0 for the first place.

    Raises:
        NotFiniteError: a similarity is NaN or +inf.
        ValueError: a target was excluded.

    Example:
        >>> target_ranks(torch.tensor([[0.1, 0.9, 0.5]]), torch.tensor([2]))
        tensor([1])
    """
    _check(similarity)
    own = similarity.gather(1, targets.unsqueeze(1))  # (Q, 1)
    if torch.isinf(own).any():
        raise ValueError("a target that was excluded has no rank")
    before = (similarity > own).sum(1, dtype=torch.int32)  # counting in 32 bits is twice as fast as in 64
    for row in (
        ((similarity == own).sum(1, dtype=torch.int32) > 1).nonzero().flatten().tolist()
    ):  # ties are rare: looked at one by one
        before[row] += (similarity[row, : targets[row]] == own[row]).sum()
    return before.long()


def nearest(similarity: Tensor, k: int) -> Tensor:
    """Columns of the k largest similarities of each row, the largest first; equal ones in the order of the columns.

    Args:
        similarity: (Q, N), larger is nearer.

    Returns:
        (Q, k) columns.
    """
    if k == 0:
        return torch.empty(len(similarity), 0, dtype=torch.long, device=similarity.device)
    _check(similarity)
    values, columns = similarity.topk(k, dim=1)
    # topk takes any of equal values: rows that have more of the last one than it took are sorted out in full.
    torn = ((similarity >= values[:, -1:]).sum(1, dtype=torch.int32) > k).nonzero().flatten()
    if len(torn):
        columns[torn] = similarity[torn].argsort(dim=1, descending=True, stable=True)[:, :k]
    columns = columns.sort(dim=1).values
    order = similarity.gather(1, columns).argsort(dim=1, descending=True, stable=True)
    return columns.gather(1, order)


def percentage(hits: Tensor) -> float:
    """Percentage of the queries that are hits, (Q,) bool: the recall at k of the hits `ranks < k`."""
    return 100 * int(hits.sum()) / len(hits)


def means(values: Sequence[float]) -> dict[str, float]:
    """Arithmetic, harmonic and geometric mean; the latter two are 0 where a value is 0."""
    return {
        "arithmetic_mean": statistics.fmean(values),
        "harmonic_mean": float(statistics.harmonic_mean(values)),
        "geometric_mean": statistics.geometric_mean(values) if min(values) > 0 else 0.0,
    }


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over a sample (n - 1); a single value has no deviation, which reads as 0."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def shown(values: Sequence[float]) -> str:
    """A value with two digits, or mean ± standard deviation of several."""
    mean, deviation = mean_and_spread(values)
    return f"{mean:.2f}" + (f" ± {deviation:.2f}" if len(values) > 1 else "")
