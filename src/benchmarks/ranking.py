"""Queries ranked: ranks of their targets by counting, the k nearest, and the record of both for a split."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from benchmarks.metrics import NO_RANK, Ranks
from benchmarks.protocols import Protocol
from benchmarks.splits import NO_ROW, Split

COMPARED_COLUMNS = 2048  # that are compared at once on a CPU


class NotFiniteError(ValueError):
    """A similarity is NaN or infinite: compared as a number, a NaN would read as rank 0, which is recall 100."""


def _check(similarity: Tensor) -> None:
    """Raise NotFiniteError on NaN and infinity; -inf is what must not be retrieved.

    One sum a row: it is NaN or infinite if a term is, and costs a fraction of a comparison of each.
    """
    if not (similarity.sum(1) < float("inf")).all():
        raise NotFiniteError("similarities that are not finite")


def _count(
    similarity: Tensor, compare: Callable[[Tensor, Tensor], Tensor], bound: Tensor
) -> Tensor:
    """Count the similarities (Q, N) of each row that compare so with the bound (Q, 1) of the row, as (Q,) int32.

    Columns are compared a part at a time on the CPU, in whose cache the outcome then stays. Counting in 32 bits is
    twice as fast as in 64.
    """
    width = COMPARED_COLUMNS if similarity.device.type == "cpu" else max(similarity.shape[1], 1)
    counts = torch.zeros(len(similarity), dtype=torch.int32, device=similarity.device)
    for part in similarity.split(width, dim=1):
        counts += compare(part, bound).sum(1, dtype=torch.int32)
    return counts


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
    of_target = similarity.gather(1, targets.unsqueeze(1))  # (Q, 1)
    if torch.isinf(of_target).any():
        raise ValueError("a target that was excluded has no rank")
    before = _count(similarity, torch.gt, of_target)
    tied = (_count(similarity, torch.eq, of_target) > 1).nonzero().flatten()
    for row in tied.tolist():  # ties are rare: looked at one by one
        before[row] += (similarity[row, : targets[row]] == of_target[row]).sum()
    return before.long()


def other_target_ranks(similarity: Tensor, targets: Tensor) -> Tensor:
    """Ranks of several targets of each query, see `target_ranks`.

    Args:
        similarity: (Q, N).
        targets: (Q, T) columns; NO_ROW where a query has fewer.

    Returns:
        (Q, T) ranks; NO_RANK where there is no target.
    """
    ranks = torch.full_like(targets, NO_RANK)
    for place, column in enumerate(targets.unbind(1)):
        there = (column != NO_ROW).nonzero().flatten()
        ranks[there, place] = target_ranks(similarity[there], column[there])
    return ranks


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
    values, columns = similarity.topk(min(k + 1, similarity.shape[1]), dim=1)
    # topk takes any of equal values: rows that have more of the last one than k are sorted out in full.
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
        similarities: (Q, k) of those; -inf marks what could not be retrieved and is no answer.
        ranks: (Q,) of the named targets; None where they are secret.
        other_ranks: (Q, T - 1) of the other targets, NO_RANK where a query has fewer; None where no query has any.
        group_ranks: (Q,) of the named targets among the others of their group; None without groups or where secret.
        nearest_in_group: (Q, g) gallery rows of the nearest in the group; None without groups.
        group_similarities: (Q, g) of those.
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
        """The ranks of the named targets. Raises ValueError where they are secret."""
        if self.ranks is None:
            raise ValueError("the targets are secret: nothing has a rank")
        return self.ranks

    @property
    def known_other_ranks(self) -> list[list[int]]:
        """The ranks of each query's other targets, as many as it has."""
        if self.other_ranks is None:
            return [[] for _ in self.nearest]
        ranks = []
        for row in self.other_ranks.tolist():
            ranks.append([rank for rank in row if rank != NO_RANK])
        return ranks

    def ranks_in(self, split: Split) -> Ranks:
        """Return what metrics are made of, of a split that was ranked. Raises ValueError where targets are secret."""
        return Ranks(
            self.known_ranks.numpy(),
            others=None if self.other_ranks is None else self.other_ranks.numpy(),
            in_group=None if self.group_ranks is None else self.group_ranks.numpy(),
            kinds=split.queries_of_kinds,
        )

    def part(self, rows: slice) -> "Ranking":
        """Return the rankings of some of the queries."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        taken = {name: column[rows] for name, column in columns.items() if column is not None}
        return Ranking(**taken)

    def answers(self, names: Sequence[str]) -> list[list[tuple[str, float]]]:
        """Names and similarities of what each query retrieved, from the names of the gallery."""
        return _named(names, self.nearest, self.similarities)

    def answers_in_group(self, names: Sequence[str]) -> list[list[tuple[str, float]]] | None:
        """Return the same as `answers` of each query's group; None without groups."""
        if self.nearest_in_group is None or self.group_similarities is None:
            return None
        return _named(names, self.nearest_in_group, self.group_similarities)


Rankings = Mapping[Protocol, Mapping[str, Ranking]]  # protocol -> split's name -> its ranking


def joined(parts: Sequence[Ranking]) -> Ranking:
    """The rankings of consecutive blocks of queries as one, on the CPU."""
    columns = {}
    for field in fields(Ranking):
        column = [getattr(part, field.name) for part in parts]
        if column[0] is not None:
            columns[field.name] = torch.cat(column).cpu()
    return Ranking(**columns)


def _named(
    names: Sequence[str], rows: Tensor, similarities: Tensor
) -> list[list[tuple[str, float]]]:
    """Names and similarities of each query's answers, without what could not be retrieved."""
    answers = []
    for own_rows, own_similarities in zip(rows.tolist(), similarities.tolist(), strict=True):
        found = zip(own_rows, own_similarities, strict=True)
        answers.append(
            [(names[row], similarity) for row, similarity in found if similarity > float("-inf")]
        )
    return answers
