"""Rank queries: the ranks of their targets by counting, the k nearest images, and a record of both for a split."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from benchmarks.metrics import NO_RANK, Ranks
from benchmarks.protocols import Protocol
from benchmarks.splits import NO_ROW, Split

COMPARED_COLUMNS = 2048  # number of columns compared at a time on a CPU


class NotFiniteError(ValueError):
    """A similarity is NaN or infinite. Comparisons with NaN are false, so it would read as rank 0, a recall of 100."""


def _check(similarity: Tensor) -> None:
    """Raise NotFiniteError on NaN and +inf; -inf marks images that must not be retrieved.

    The check computes one sum per row, which is NaN or infinite if a term is, and costs a fraction of checking each
    term.
    """
    if not (similarity.sum(1) < float("inf")).all():
        raise NotFiniteError("similarities that are not finite")


def _count(
    similarity: Tensor, compare: Callable[[Tensor, Tensor], Tensor], bound: Tensor
) -> Tensor:
    """Count the similarities (Q, N) of each row that pass a comparison with the row's bound (Q, 1), as (Q,) int32.

    On a CPU, columns are compared in parts, so that the outcome stays in the cache. Counting in 32 bits is twice as
    fast as in 64.
    """
    width = COMPARED_COLUMNS if similarity.device.type == "cpu" else max(similarity.shape[1], 1)
    counts = torch.zeros(len(similarity), dtype=torch.int32, device=similarity.device)
    for part in similarity.split(width, dim=1):
        counts += compare(part, bound).sum(1, dtype=torch.int32)
    return counts


def target_ranks(similarity: Tensor, targets: Tensor) -> Tensor:
    """Return the rank of each query's target, by counting the images before it; no sorting.

    Equal similarities keep the order of the columns, as in a stable sort, so ranks do not depend on the machine.

    Args:
        similarity: (Q, N), larger is nearer; -inf for images that must not be retrieved.
        targets: (Q,) column of each query's target.

    Returns:
        (Q,) ranks, from 0.

    Raises:
        NotFiniteError: a similarity is NaN or +inf.
        ValueError: a target was excluded.

    Example:
        >>> target_ranks(torch.tensor([[0.1, 0.9, 0.5]]), torch.tensor([2]))
        tensor([1])
    """
    _check(similarity)
    of_target = similarity.gather(1, targets.unsqueeze(1))  # (Q, 1)
    if torch.isinf(of_target).any():
        raise ValueError("a target that was excluded has no rank")
    before = _count(similarity, torch.gt, of_target)
    tied = (_count(similarity, torch.eq, of_target) > 1).nonzero().flatten()
    for row in tied.tolist():  # ties are rare, so check them one by one
        before[row] += (similarity[row, : targets[row]] == of_target[row]).sum()
    return before.long()


def other_target_ranks(similarity: Tensor, targets: Tensor) -> Tensor:
    """Return the ranks of several targets of each query, see `target_ranks`.

    Args:
        similarity: (Q, N).
        targets: (Q, T) columns, padded with NO_ROW.

    Returns:
        (Q, T) ranks, padded with NO_RANK.
    """
    ranks = torch.full_like(targets, NO_RANK)
    for place, column in enumerate(targets.unbind(1)):
        there = (column != NO_ROW).nonzero().flatten()
        ranks[there, place] = target_ranks(similarity[there], column[there])
    return ranks


def nearest(similarity: Tensor, k: int) -> Tensor:
    """Return the columns of each row's k largest similarities, largest first; ties keep the order of the columns.

    Args:
        similarity: (Q, N), larger is nearer.

    Returns:
        (Q, k) columns.
    """
    if k == 0:
        return torch.empty(len(similarity), 0, dtype=torch.long, device=similarity.device)
    _check(similarity)
    values, columns = similarity.topk(min(k + 1, similarity.shape[1]), dim=1)
    # topk breaks ties arbitrarily, so rows with a tie across the cut are sorted completely.
    torn = (values[:, k - 1 : k] == values[:, k:]).any(1).nonzero().flatten()
    columns = columns[:, :k]
    if len(torn):
        columns[torn] = similarity[torn].argsort(dim=1, descending=True, stable=True)[:, :k]
    columns = columns.sort(dim=1).values
    order = similarity.gather(1, columns).argsort(dim=1, descending=True, stable=True)
    return columns.gather(1, order)


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """A split's queries ranked under one protocol. Ranks and gallery rows count from 0.

    Attributes:
        nearest: (Q, k) gallery rows, the nearest first.
        similarities: (Q, k) similarities of these rows; -inf marks an image that may not be retrieved, and is not a
            result.
        ranks: (Q,) ranks of the annotated targets; None if targets are not public.
        other_ranks: (Q, T - 1) ranks of the other targets, padded with NO_RANK; None if no query has any.
        group_ranks: (Q,) ranks of the annotated targets in their groups; None without groups or public targets.
        nearest_in_group: (Q, g) gallery rows of the nearest images in the group; None without groups.
        group_similarities: (Q, g) similarities of these rows.
    """

    nearest: Tensor
    similarities: Tensor
    ranks: Tensor | None = None
    other_ranks: Tensor | None = None
    group_ranks: Tensor | None = None
    nearest_in_group: Tensor | None = None
    group_similarities: Tensor | None = None

    @property
    def known_ranks(self) -> Tensor:
        """Return the ranks of the annotated targets. Raises ValueError if targets are not public."""
        if self.ranks is None:
            raise ValueError("the targets are secret: nothing has a rank")
        return self.ranks

    @property
    def known_other_ranks(self) -> list[list[int]]:
        """Return the ranks of each query's other targets, without padding."""
        if self.other_ranks is None:
            return [[] for _ in self.nearest]
        ranks = []
        for row in self.other_ranks.tolist():
            ranks.append([rank for rank in row if rank != NO_RANK])
        return ranks

    def ranks_in(self, split: Split) -> Ranks:
        """Return the ranks in a ranked split, to compute metrics. Raises ValueError if targets are not public."""
        return Ranks(
            self.known_ranks.numpy(),
            others=None if self.other_ranks is None else self.other_ranks.numpy(),
            in_group=None if self.group_ranks is None else self.group_ranks.numpy(),
            kinds=split.queries_of_kinds,
        )

    def part(self, rows: slice) -> "Ranking":
        """Return the ranking of some of the queries."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        taken = {name: column[rows] for name, column in columns.items() if column is not None}
        return Ranking(**taken)

    def results(self, names: Sequence[str]) -> list[list[tuple[str, float]]]:
        """Return the name and similarity of each image that each query retrieved, given the names of the gallery."""
        return _named(names, self.nearest, self.similarities)

    def answers_in_group(self, names: Sequence[str]) -> list[list[tuple[str, float]]] | None:
        """Return the names and similarities of each query's group, see `results`; None without groups."""
        if self.nearest_in_group is None or self.group_similarities is None:
            return None
        return _named(names, self.nearest_in_group, self.group_similarities)


Rankings = Mapping[Protocol, Mapping[str, Ranking]]  # protocol -> split's name -> its ranking


def joined(parts: Sequence[Ranking]) -> Ranking:
    """Join the rankings of consecutive blocks of queries, on the CPU."""
    columns = {}
    for field in fields(Ranking):
        column = [getattr(part, field.name) for part in parts]
        if column[0] is not None:
            columns[field.name] = torch.cat(column).cpu()
    return Ranking(**columns)


def _named(
    names: Sequence[str], rows: Tensor, similarities: Tensor
) -> list[list[tuple[str, float]]]:
    """Return names and similarities of each query's results, without images that may not be retrieved."""
    results = []
    for own_rows, own_similarities in zip(rows.tolist(), similarities.tolist(), strict=True):
        found = zip(own_rows, own_similarities, strict=True)
        results.append(
            [(names[row], similarity) for row, similarity in found if similarity > float("-inf")]
        )
    return results
