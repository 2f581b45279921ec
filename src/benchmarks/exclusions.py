"""Images left out on request, each with its reason: the file that check_dataset writes and the other commands read."""

import json
import logging
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.entries import Entry, ImageName
from benchmarks.splits import Split
from runtime.files import write_text
from runtime.schema import read_checked
from runtime.spelling import Spellings
from utils import UserError

logger = logging.getLogger(__name__)

CHECKER = "check_dataset.py --write-exclusions"
NAMED_IMAGES = 3  # names in a message


class Exclusions(Entry):
    """A file of `check_dataset.py --write-exclusions`: image id -> the reason to leave it out."""

    dataset: str
    images: dict[ImageName, str]


def write_exclusions(file: Path, dataset: str, reasons: Mapping[str, str]) -> None:
    """Write ids of images with the reason to leave each out."""
    write_text(file, json.dumps({"dataset": dataset, "images": dict(reasons)}, indent=1) + "\n")


def read_exclusions(file: Path | None, dataset: str) -> dict[str, str]:
    """Image id -> reason; nothing where there is no file.

    Raises:
        UserError: the file is no list of exclusions, or that of another dataset.
    """
    if file is None:
        return {}
    try:
        listed = read_checked(Exclusions, file, remedy=f"write it with {CHECKER}", writer=CHECKER)
    except UserError as error:
        raise UserError(f"--exclusions: {error}") from None
    if listed.dataset != dataset:
        raise UserError(
            f"--exclusions {file} is for {listed.dataset}, not {dataset}: choose the right file"
        )
    return listed.images


def excluded(splits: Iterable[Split]) -> dict[str, dict[str, Any]]:
    """Count the images and triplets that were left out of each split, for files that say how a result was made."""
    counts = {}
    for split in splits:
        counts[split.name] = {
            "images": len(split.excluded_images),
            "triplets": split.excluded_triplets,
        }
    return counts


def announce(wanted: Collection[str], splits: Iterable[Split]) -> None:
    """Log what was left out of each split, and how many of the images to leave out are in none of them."""
    left_out: set[str] = set()
    known: set[str] = set()
    for split in splits:
        left_out.update(split.excluded_images)
        known.update(split.names)
        if split.excluded_images:
            images = len(split.excluded_images)
            lost = f"{images} images and the {split.excluded_triplets} triplets that ask with or for them"
            logger.warning(
                "left out of %s: %s; %d triplets remain", split.name, lost, len(split.triplets)
            )
        if split.smaller_groups:
            logger.warning(
                "%d of them have a smaller subset, which raises their subset recalls",
                split.smaller_groups,
            )
    if others := [name for name in wanted if name not in left_out]:
        spellings = Spellings(known)
        named = [name + spellings.hint(name) for name in others[:NAMED_IMAGES]]
        shown = ", ".join([*named, "..."] if len(others) > NAMED_IMAGES else named)
        logger.warning("%d images of --exclusions are in no split in use: %s", len(others), shown)
