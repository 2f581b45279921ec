"""Evaluation protocols: which images of a split a query may retrieve, and which text the query has.

Published tables of FashionIQ mix four protocols, and tables of CIRCO three.
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

    The recalls of one model differ by several points between protocols, so compare numbers only within one protocol.

    Attributes:
        gallery: "original" (all images of the split's list) or "VAL" (the references and targets of its triplets).
        reference: "kept" or "removed".
        text: "" for the caption alone, or the name of another query text of a benchmark, such as "concept".
    """

    gallery: str
    reference: str
    text: str = ""

    @property
    def name(self) -> str:
        """Return the name of the protocol in `--protocol` and in results."""
        return "-".join(filter(None, (self.gallery, self.reference, self.text)))

    def gallery_size(self, split: Split) -> int:
        """Return the number of images that a query searches, including its own reference."""
        if self.gallery == "original":
            return split.gallery_size
        return len(split.members - split.only_asked)

    def most_answers(self, split: Split) -> int:
        """Return the maximum number of images that a query can retrieve."""
        removed = 1 if self.reference == "removed" and not split.only_asked else 0
        return self.gallery_size(split) - removed

    def restrict(
        self, similarity: "Tensor", references: "Tensor", outside: "Tensor | None"
    ) -> "Tensor":
        """Set the similarities of images that may not be retrieved to -inf, in place.

        Args:
            similarity: (b, N).
            references: (b,) columns of the queries' own references.
            outside: (N,) whether an image is not in the protocol's gallery; None if all images are in it.
        """
        if outside is not None:
            similarity.masked_fill_(outside, float("-inf"))
        if self.reference == "removed":
            similarity.scatter_(1, references[:, None], float("-inf"))
        return similarity


# Used on FashionIQ by the start kit, CLIP4Cir, SPRC, CaLa, SEARLE, LinCIR and Pic2Word; on CIRCO by SEARLE and LinCIR.
ORIGINAL_KEPT = Protocol("original", "kept")
# Used on FashionIQ by SPN4CIR, CoVR, HABIT, INTENT and ARTEMIS; on CIRR by its authors; on CIRCO by CoVR.
ORIGINAL_REMOVED = Protocol("original", "removed")
# Used on FashionIQ by TG-CIR, COMBINER, DQU-CIR, ENCODER and OFFSET by default.
VAL_REMOVED = Protocol("VAL", "removed")
# Used on FashionIQ by CoSMo.
VAL_KEPT = Protocol("VAL", "kept")
# Used on CIRCO by ConText-CIR, MagicLens and BGE-VL. The text includes the concept that reference and targets share.
CONCEPT_KEPT = Protocol("original", "kept", "concept")
# Not used on CIRCO in any paper that we know of; the counterpart of ORIGINAL_REMOVED.
CONCEPT_REMOVED = Protocol("original", "removed", "concept")
_ALL = (ORIGINAL_KEPT, ORIGINAL_REMOVED, VAL_REMOVED, VAL_KEPT, CONCEPT_KEPT, CONCEPT_REMOVED)
PROTOCOLS = {protocol.name: protocol for protocol in _ALL}


def choose_protocols(
    names: Sequence[str] | None, known: Sequence[Protocol], dataset: str
) -> list[Protocol]:
    """Return the requested protocols, in a benchmark's order, or all of its protocols if none are requested.

    Args:
        known: the benchmark's protocols.
        dataset: the benchmark's name.
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
