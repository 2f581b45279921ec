"""Find the image files of a list: below the data root or in a folder that is symlinked there, and nowhere else.

A dataset is downloaded, and its images are shown on sheets and pages: its text must not choose files of the machine.
"""

import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from runtime.image_source import IMAGES
from runtime.spelling import as_stored, nfc
from utils import UserError

# A part `..`, a beginning at the root or at a drive, half a string in C. On Windows backslashes part folders too.
_LEADS_AWAY = re.compile(r"(^|[/\\])\.\.([/\\]|$)|^([/\\]|[A-Za-z]:)|\0")


def image_name(path: str) -> str:
    """Return the name of an image that is called by its path, however that is spelled: `./a//b.jpg` is `a/b.jpg`."""
    return nfc(str(PurePosixPath(path.strip())))


def locate(
    places: Mapping[str, str], folders: list[Path], *, root: Path, listed_in: Path, remedy: str
) -> dict[str, Path]:
    """The file of each image: its place below the first folder where it is, or below the very first if it is nowhere.

    Args:
        places: image name -> path relative to a folder, or a full one below the root.
        root: the data root.
        listed_in: the file that says it.
        remedy: what to do with it where it is wrong.

    Raises:
        UserError: a name or a place leads out of the root, or a file there is a link that does.
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
    """Check whether a path stays below the root, be it relative or absolute."""
    if not _LEADS_AWAY.search(place):
        return True
    full = Path(place)
    if "\0" in place or ".." in re.split(r"[/\\]", place):
        return False
    return full.is_relative_to(root.absolute()) or full.is_relative_to(root.resolve())


def _check_links(paths: Mapping[str, Path], root: Path) -> None:
    """Reject files that are links to elsewhere. Whole folders may be links: whoever set them up chose what is in them.

    Raises:
        UserError: a link leads out of the root and out of the folders that the file is in.
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
