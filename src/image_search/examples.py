"""Questions whose answers are known: triplets whose images an index holds, for visitors who want to see it work."""

import logging
from dataclasses import dataclass
from pathlib import Path

from benchmarks.triplets import Triplets
from image_search.stores.base import ImageIndex
from utils import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """A reference and its target, as rows of an index, and the text between them."""

    reference: int
    text: str
    target: int


def read_examples(file: Path, index: ImageIndex) -> list[Example]:
    """The triplets of a split of your own, whose images lie in `images/` beside it, as far as an index holds them.

    Raises:
        UserError: the file is no such split, or the index holds no triplet of it.
    """
    folder = file.parent / "images"
    examples = []
    lacking = 0
    for _, triplet in Triplets(file.parent.parent).queries(file, "val"):
        reference, target = (
            index.row(str((folder / name).resolve())) for name in triplet.images[:2]
        )
        if reference is None or target is None:
            lacking += 1
        else:
            examples.append(Example(reference, triplet.captions[0], target))
    if not examples:
        raise UserError(f"--examples {file}: the index contains no triplet of it: index {folder}")
    if lacking:
        logger.warning(
            "warning: %d of %s are left out because the index lacks their images", lacking, file
        )
    return examples
