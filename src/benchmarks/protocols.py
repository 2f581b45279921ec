"""Evaluation protocols: which images of a split a query may retrieve. Published tables mix four of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.ranking import Ranking
from benchmarks.splits import Split


@dataclass(frozen=True)
class Protocol:
    """A gallery, and whether a query's own reference may be retrieved from it.

    The same model's recalls differ by several points between protocols: numbers compare within one only.

    Attributes:
        gallery: "original", all images of the split's list, or "VAL", the references and targets of its triplets.
        reference: "kept" or "removed".
    """

    gallery: str
    reference: str

    @property
    def name(self) -> str:
        """What `--protocol` and the results call it."""
        return f"{self.gallery}-{self.reference}"

    def gallery_size(self, split: Split) -> int:
        """Images that a query searches, its own reference counted in."""
        return len(split.names) if self.gallery == "original" else len(members(split))

    def restrict(self, similarity: Tensor, references: Tensor, outside: Tensor) -> Tensor:
        """Set what may not be retrieved to -inf, in place.

        Args:
            similarity: (b, N).
            references: (b,) columns of the queries' own references.
            outside: (N,) whether an image is neither reference nor target of any triplet.
        """
        if self.gallery == "VAL":
            similarity.masked_fill_(outside, float("-inf"))
        if self.reference == "removed":
            similarity.scatter_(1, references[:, None], float("-inf"))
        return similarity


def members(split: Split) -> set[str]:
    """The references and targets of a split's triplets."""
    return {name for t in split.triplets for name in (t.reference, t.target) if name is not None}


def outside(split: Split) -> Tensor:
    """Whether a gallery image is neither reference nor target of any triplet, (N,) bool."""
    inside = members(split)
    return torch.tensor([name not in inside for name in split.image_paths], dtype=torch.bool)


Rankings = dict[Protocol, dict[str, Ranking]]  # protocol -> split's name -> its ranking

ORIGINAL_KEPT = Protocol("original", "kept")  # the start kit, CLIP4Cir, SPRC, CaLa, SEARLE, LinCIR, Pic2Word
ORIGINAL_REMOVED = Protocol("original", "removed")  # SPN4CIR, CoVR, HABIT, INTENT, ARTEMIS; CIRR's own
VAL_REMOVED = Protocol("VAL", "removed")  # TG-CIR, COMBINER, DQU-CIR, ENCODER and OFFSET by default
VAL_KEPT = Protocol("VAL", "kept")  # CoSMo
PROTOCOLS = {protocol.name: protocol for protocol in (ORIGINAL_KEPT, ORIGINAL_REMOVED, VAL_REMOVED, VAL_KEPT)}
