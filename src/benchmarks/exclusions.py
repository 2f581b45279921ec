"""Exclude images, each for a recorded reason: write the file for check_dataset.py, and read it for other commands."""

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
NAMED_IMAGES = 3  # maximum number of names in a message


class Exclusions(Entry):
    """A file of `check_dataset.py --write-exclusions`: image id -> the reason to exclude it."""

    dataset: str
    images: dict[ImageName, str]


def write_exclusions(file: Path, dataset: str, reasons: Mapping[str, str]) -> None:
    """Write the ids of images with the reason to exclude each one."""
    write_text(file, json.dumps({"dataset": dataset, "images": dict(reasons)}, indent=1) + "\n")


def read_exclusions(file: Path | None, dataset: str) -> dict[str, str]:
    """Read image id -> reason; return {} if there is no file.

    Raises:
        UserError: the file is not a list of exclusions, or is for another dataset.
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
    """Count the images and triplets excluded from each split, for files that record how a result was made."""
    counts = {}
    for split in splits:
        counts[split.name] = {
            "images": len(split.excluded_images),
            "triplets": split.excluded_triplets,
        }
    return counts


def announce(wanted: Collection[str], splits: Iterable[Split]) -> None:
    """Log what was excluded from each split, and which of the images to exclude are in no split."""
    left_out: set[str] = set()
    known: set[str] = set()
    for split in splits:
        left_out.update(split.excluded_images)
        known.update(split.names)
        if split.excluded_images:
            images = len(split.excluded_images)
            lost = f"{images} images and the {split.excluded_triplets} triplets with one as reference or target"
            logger.warning(
                "left out of %s: %s; %d triplets remain", split.name, lost, len(split.triplets)
            )
        if split.smaller_groups:
            logger.warning(
                "%d of the remaining triplets have a smaller subset, which raises their subset recalls",
                split.smaller_groups,
            )
    if others := [name for name in wanted if name not in left_out]:
        spellings = Spellings(known)
        named = [name + spellings.hint(name) for name in others[:NAMED_IMAGES]]
        shown = ", ".join([*named, "..."] if len(others) > NAMED_IMAGES else named)
        logger.warning(
            "%d images in --exclusions are not in any split in use: %s", len(others), shown
        )
