"""Example queries with known targets: triplets whose images are all in an index, for new users of the page."""

import logging
from dataclasses import dataclass
from pathlib import Path

from benchmarks.triplets import Triplets
from image_search.stores.base import ImageIndex
from utils import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """A triplet: the rows of its reference and target in an index, and its caption."""

    reference: int
    text: str
    target: int


def read_examples(file: Path, index: ImageIndex) -> list[Example]:
    """Read a file of your own triplets, and return those whose images are in an index.

    The images of the file are in the folder `images/` next to it.

    Raises:
        UserError: the file is invalid, or none of its triplets is in the index.
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
        raise UserError(
            f"--examples {file}: none of its triplets has all images in the index: index {folder}"
        )
    if lacking:
        logger.warning(
            "warning: %d triplets of %s are left out: their images are not in the index",
            lacking,
            file,
        )
    return examples
