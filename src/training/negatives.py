"""Hard negatives: images besides the targets of its batch that a query is told apart from."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.splits import NO_ROW, Split
from runtime.choices import MINED

# Times as many are mined as an epoch draws: the very nearest often answer the query too.
POOL = 10
MOST_COSINES = 2**24  # in memory at a time: 64 MiB


class HardNegatives:
    """A pool of images for each triplet, of which every epoch draws some, by seed and epoch alone.

    Args:
        split: of training; its triplets name their negatives unless these are mined.
        flags: of a training: `hard_negatives` are drawn.
        features: the gallery's as they are now, (G, D); asked for where negatives are mined.
        every: epochs from one mining to the next.

    Attributes:
        pools: (Q, P) gallery rows; NO_ROW fills up those that have fewer.
    """

    def __init__(
        self,
        split: Split,
        flags: Any,
        *,
        seed: int,
        features: Callable[[], Tensor],
        every: int,
    ) -> None:
        self.split = split
        self.flags = flags
        self.seed = seed
        self.features = features
        self.every = every
        self.pools = _rows([split.row_of[name] for name in t.negatives] for t in split.triplets)

    @property
    def number(self) -> int:
        """Return the hard negatives per triplet of a step: `--hard-negatives`, or fewer if all pools are smaller."""
        wanted = self.flags.hard_negatives
        return wanted if self._are_mined else min(wanted, self.pools.shape[1])

    @property
    def _are_mined(self) -> bool:
        return self.flags.hard_negatives_from == MINED

    def refresh(self, epoch: int) -> None:
        """Mine again where an epoch begins with that."""
        if self._are_mined and epoch % self.every == 0:
            wanted = POOL * self.flags.hard_negatives
            self.pools = mined(
                self.features(), self.split, number=wanted, margin=self.flags.negatives_margin
            )

    def beside(self, target_rows: Tensor, epoch: int) -> Tensor:
        """Gallery rows (Q, 1 + N) of each triplet's target (Q,) and, behind it, of its negatives in an epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.rand(self.pools.shape, generator=generator)
        order[self.pools == NO_ROW] = 1  # after all others
        drawn = self.pools.gather(1, order.argsort(dim=1)[:, : self.number])
        return torch.cat([target_rows.unsqueeze(1), drawn.to(target_rows.device)], dim=1)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the pools: what was mined cannot be mined again from later weights."""
        return {"pools": self.pools}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Take the pools of a state."""
        self.pools = state_dict["pools"]


def mined(features: Tensor, split: Split, *, number: int, margin: float) -> Tensor:
    """Find the images nearest to each triplet's target, (Q, number) gallery rows or as many as there are images.

    Neither the reference nor any target of the same query is among them, nor a near copy of the target; NO_ROW stands
    where nothing is left.

    Args:
        features: of the gallery, (G, D).
        margin: an image whose cosine to the target is above 1 - margin counts as a copy of it.
    """
    features = F.normalize(features, dim=-1)
    answers: dict[object, list[int]] = {}
    for triplet, target in zip(split.triplets, split.target_rows, strict=True):
        query = triplet.reference, triplet.captions
        answers.setdefault(query, [split.row_of[triplet.reference]]).append(target)
    barred = _rows(answers[t.reference, t.captions] for t in split.triplets).to(features.device)
    barred = barred.where(barred != NO_ROW, barred[:, :1])
    targets = torch.tensor(split.target_rows, device=features.device)
    rows = max(1, MOST_COSINES // len(features))
    pools = []
    for own_targets, own_barred in zip(targets.split(rows), barred.split(rows), strict=True):
        cosines = features[own_targets] @ features.T
        cosines.masked_fill_(cosines > 1 - margin, float("-inf"))
        cosines.scatter_(1, own_barred, float("-inf"))
        nearest = cosines.topk(min(number, len(features)))
        pools.append(nearest.indices.masked_fill(nearest.values == float("-inf"), NO_ROW))
    return torch.cat(pools).cpu()


def _rows(lists: Iterable[Iterable[int]]) -> Tensor:
    """Rows of lists of different lengths, which NO_ROW fills up."""
    tensors = [torch.tensor(list(own), dtype=torch.long) for own in lists]
    return pad_sequence(tensors, batch_first=True, padding_value=NO_ROW)
