"""Evaluation protocols: which images of a split a query may retrieve, and with which text it asks.

Published tables of FashionIQ mix four of them, those of CIRCO four others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.splits import Split
from utils import UserError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Protocol:
    """A gallery, and whether a query's own reference may be retrieved from it.

    The same model's recalls differ by several points between protocols: numbers compare within one only.

    Attributes:
        gallery: "original", all images of the split's list, or "VAL", the references and targets of its triplets.
        reference: "kept" or "removed".
        text: "" for the caption of the change alone, or what a benchmark asks with instead, as "concept".
    """

    gallery: str
    reference: str
    text: str = ""

    @property
    def name(self) -> str:
        """Return what `--protocol` and the results call it."""
        return "-".join(filter(None, (self.gallery, self.reference, self.text)))

    def gallery_size(self, split: Split) -> int:
        """Images that a query searches, its own reference counted in."""
        return (
            split.gallery_size
            if self.gallery == "original"
            else len(split.members - split.only_asked)
        )

    def most_answers(self, split: Split) -> int:
        """Images that a query can retrieve."""
        removed = 1 if self.reference == "removed" and not split.only_asked else 0
        return self.gallery_size(split) - removed

    def restrict(
        self, similarity: "Tensor", references: "Tensor", outside: "Tensor | None"
    ) -> "Tensor":
        """Set what may not be retrieved to -inf, in place.

        Args:
            similarity: (b, N).
            references: (b,) columns of the queries' own references.
            outside: (N,) whether an image is not in the protocol's gallery; None where all are.
        """
        if outside is not None:
            similarity.masked_fill_(outside, float("-inf"))
        if self.reference == "removed":
            similarity.scatter_(1, references[:, None], float("-inf"))
        return similarity


# FashionIQ: the start kit, CLIP4Cir, SPRC, CaLa, SEARLE, LinCIR, Pic2Word. CIRCO: SEARLE, LinCIR.
ORIGINAL_KEPT = Protocol("original", "kept")
# FashionIQ: SPN4CIR, CoVR, HABIT, INTENT, ARTEMIS. CIRR: its own. CIRCO: CoVR.
ORIGINAL_REMOVED = Protocol("original", "removed")
# TG-CIR, COMBINER, DQU-CIR, ENCODER and OFFSET by default.
VAL_REMOVED = Protocol("VAL", "removed")
# CoSMo.
VAL_KEPT = Protocol("VAL", "kept")
# CIRCO, with what reference and targets share in the text: ConText-CIR; MagicLens and BGE-VL ask so too.
CONCEPT_KEPT = Protocol("original", "kept", "concept")
# CIRCO: nobody that we know of; the counterpart of CoVR's.
CONCEPT_REMOVED = Protocol("original", "removed", "concept")
_ALL = (ORIGINAL_KEPT, ORIGINAL_REMOVED, VAL_REMOVED, VAL_KEPT, CONCEPT_KEPT, CONCEPT_REMOVED)
PROTOCOLS = {protocol.name: protocol for protocol in _ALL}


def choose_protocols(
    names: Sequence[str] | None, known: Sequence[Protocol], dataset: str
) -> list[Protocol]:
    """The protocols asked for, in a benchmark's order; all of them where nothing is asked for.

    Args:
        known: the benchmark's own.
        dataset: its name.
    """
    if names is None:
        return list(known)
    known_names = [protocol.name for protocol in known]
    for name in names:
        if name not in known_names:
            raise UserError(
                f"--protocol {name} does not exist for {dataset}: choose from {', '.join(known_names)}"
            )
    return [protocol for protocol in known if protocol.name in names]
