"""Find the image files of a list: below the data root or in a folder that is symlinked there, and nowhere else.

Datasets are downloaded, and their images are shown on sheets and pages, so a list must not reach other files of the
machine.
"""

import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from runtime.image_source import IMAGES
from runtime.spelling import as_stored, nfc
from utils import UserError

# Matches a part `..`, a path from the root or from a drive, and NUL, which would end the path in C. On Windows,
# backslashes also separate folders.
_LEADS_AWAY = re.compile(r"(^|[/\\])\.\.([/\\]|$)|^([/\\]|[A-Za-z]:)|\0")


def image_name(path: str) -> str:
    """Return the name of an image: its path, normalised so that `./a//b.jpg` becomes `a/b.jpg`."""
    return nfc(str(PurePosixPath(path.strip())))


def locate(
    places: Mapping[str, str], folders: list[Path], *, root: Path, listed_in: Path, remedy: str
) -> dict[str, Path]:
    """Return the file of each image, in the first folder that contains it, or in the very first folder if none does.

    Args:
        places: image name -> path relative to a folder, or an absolute path below the root.
        root: the data root.
        listed_in: file that lists the images, for messages.
        remedy: remedy for errors in this file.

    Raises:
        UserError: a name or a path leads out of the root, or a file is a link that does.
    """
    for name, place in places.items():
        if _LEADS_AWAY.search(name) or not _is_below(root, place):
            raise UserError(
                f"{listed_in}: the image {name!r} at {place!r} points outside the dataset: {remedy}"
            )
    first, *others = folders
    others = [folder for folder in others if folder.is_dir()]

    def file(place: str) -> Path:
        official = as_stored(first / place)
        if not others or IMAGES.size(official) is not None:
            return official
        elsewhere = [as_stored(folder / place) for folder in others]
        return next((path for path in elsewhere if IMAGES.size(path) is not None), official)

    paths = {name: file(place) for name, place in places.items()}
    _check_links(paths, root)
    return paths


def _is_below(root: Path, place: str) -> bool:
    """Check whether a path, relative or absolute, stays below the root."""
    if not _LEADS_AWAY.search(place):
        return True
    full = Path(place)
    if "\0" in place or ".." in re.split(r"[/\\]", place):
        return False
    return full.is_relative_to(root.absolute()) or full.is_relative_to(root.resolve())


def _check_links(paths: Mapping[str, Path], root: Path) -> None:
    """Reject files that are links to elsewhere. Links of whole folders are allowed, because the user set them up.

    Raises:
        UserError: a link leads out of the root and out of the folders that contain it.
    """
    real = functools.cache(os.path.realpath)
    for path in paths.values():
        if not path.is_symlink():
            continue
        target = Path(os.path.realpath(path))
        folders = [root, *(parent for parent in path.parents if parent.is_relative_to(root))]
        if not any(target.is_relative_to(real(folder)) for folder in folders):
            raise UserError(
                f"{path} is a symlink to {target}, outside the dataset: copy the file, or symlink its whole folder"
            )
