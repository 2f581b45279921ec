"""Provide hard negatives: images that a query is contrasted with in addition to the targets of its batch."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.splits import NO_ROW, Split
from runtime.choices import MINED

# Number of images to mine for each image that an epoch draws: the very nearest images are often correct results too.
POOL = 10
MOST_COSINES = 2**24  # maximum number in memory at a time: 64 MiB


class HardNegatives:
    """A pool of images for each triplet. Every epoch draws some, depending only on the seed and the epoch.

    Args:
        split: training split; its triplets list their negatives unless these are mined.
        flags: flags of a training run; `hard_negatives` is the number of images to draw.
        features: returns the current features of the gallery, (G, D); called only to mine.
        every: number of epochs between two minings.

    Attributes:
        pools: (Q, P) gallery rows, padded with NO_ROW.
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
        """Return the number of hard negatives per triplet: `--hard-negatives`, or fewer if all pools are smaller."""
        wanted = self.flags.hard_negatives
        return wanted if self._are_mined else min(wanted, self.pools.shape[1])

    @property
    def _are_mined(self) -> bool:
        return self.flags.hard_negatives_from == MINED

    def refresh(self, epoch: int) -> None:
        """Mine the negatives again if mining is due in this epoch."""
        if self._are_mined and epoch % self.every == 0:
            wanted = POOL * self.flags.hard_negatives
            self.pools = mined(
                self.features(), self.split, number=wanted, margin=self.flags.negatives_margin
            )

    def beside(self, target_rows: Tensor, epoch: int) -> Tensor:
        """Return gallery rows (Q, 1 + N): each triplet's target (Q,) followed by its negatives of an epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.rand(self.pools.shape, generator=generator)
        order[self.pools == NO_ROW] = 1  # sorts NO_ROW behind all images
        drawn = self.pools.gather(1, order.argsort(dim=1)[:, : self.number])
        return torch.cat([target_rows.unsqueeze(1), drawn.to(target_rows.device)], dim=1)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the pools, because mining with later weights would find other images."""
        return {"pools": self.pools}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Restore the pools from a state."""
        self.pools = state_dict["pools"]


def mined(features: Tensor, split: Split, *, number: int, margin: float) -> Tensor:
    """Find the images nearest to each triplet's target: gallery rows (Q, number), or fewer if the gallery is smaller.

    The reference, all targets of the same query and near copies of the target are excluded. If no other images are
    left, NO_ROW fills the row.

    Args:
        features: features of the gallery, (G, D).
        margin: an image whose cosine to the target is above 1 - margin counts as a copy of the target.
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
    """Return lists of different lengths as the rows of a tensor, padded with NO_ROW."""
    tensors = [torch.tensor(list(own), dtype=torch.long) for own in lists]
    return pad_sequence(tensors, batch_first=True, padding_value=NO_ROW)
