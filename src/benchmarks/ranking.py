"""The record of a split's queries ranked under one protocol."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ranking:
    """A split's queries ranked under one protocol. Ranks and gallery rows count from 0.

    Attributes:
        ranks: (Q,) of the targets; None where they are secret.
        group_ranks: (Q,) of the targets among the others of their group; None without groups or where secret.
        nearest: (Q, k) gallery rows, the nearest first.
        similarities: (Q, k) of those; -inf marks what could not be retrieved and is no answer.
        nearest_in_group: (Q, g) gallery rows of the nearest in the group; None without groups.
        group_similarities: (Q, g) of those.
    """

    ranks: Tensor | None
    group_ranks: Tensor | None
    nearest: Tensor
    similarities: Tensor
    nearest_in_group: Tensor | None
    group_similarities: Tensor | None


def joined(parts: list[Ranking]) -> Ranking:
    """The rankings of consecutive blocks of queries as one, on the CPU."""
    columns = {field.name: [getattr(part, field.name) for part in parts] for field in fields(Ranking)}
    return Ranking(**{name: None if c[0] is None else torch.cat(c).cpu() for name, c in columns.items()})


def answers(names: Sequence[str], rows: Tensor, similarities: Tensor) -> list[list[tuple[str, float]]]:
    """Names and similarities of each query's answers, from `nearest` or `nearest_in_group` and what belongs to it."""
    pairs = zip(rows.tolist(), similarities.tolist(), strict=True)
    return [[(names[i], s) for i, s in zip(*row, strict=True) if s > float("-inf")] for row in pairs]
