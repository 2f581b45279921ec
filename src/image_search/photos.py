"""A user's own image files, found in folders."""

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from runtime.files import Identity, stamp
from runtime.image_files import AVIF_KINDS, FORMATS, HEIF_KINDS, image_size
from runtime.image_source import IMAGES
from utils import UserError

TAKEN = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", *AVIF_KINDS,
    *HEIF_KINDS,
}  # fmt: skip
CAMERA_KINDS = {".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw"}
OTHER_KINDS = {".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".psd", *CAMERA_KINDS} - TAKEN
SUFFIX = re.compile(r"\.[a-z]\w*", re.IGNORECASE)  # what else follows a dot says nothing of a kind


@dataclass
class FoundImages:
    """Image files found in some folders.

    Attributes:
        files: the image files with their links followed, sorted, each once.
        left_out: files that cannot be taken, and why.
        skipped: endings of images of other kinds -> how many there are.
    """

    files: list[Identity] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)


def find_images(folders: Sequence[Path], told_by: str = "time") -> FoundImages:
    """All image files below some folders; links are followed, hidden folders are left alone.

    Args:
        told_by: how a changed image is told, see `runtime.files.stamp`.

    Raises:
        UserError: a folder is none or cannot be read, or there is no image.
    """
    found = FoundImages()
    files = set()
    for folder in folders:
        for file in _files(folder):
            stem, dot, ending = file.rpartition(os.sep)[2].rpartition(".")
            kind = dot + ending.lower() if stem else ""
            if kind in OTHER_KINDS:
                found.skipped[kind] += 1
            elif kind in TAKEN or (not SUFFIX.fullmatch(kind) and _is_image(file)):
                try:
                    files.add(_identity(file, told_by))
                except ValueError as error:
                    found.left_out[ascii(file)[1:-1]] = str(error)
    if not files:
        named = ", ".join(map(str, folders))
        kinds = " ".join(sorted(TAKEN))
        raise UserError(f"--images {named}: no images found ({kinds}): choose another folder")
    found.files = sorted(files)
    return found


def _files(folder: Path) -> Iterator[str]:
    """All files below a folder whose links are followed but for those that lead back to a folder above.

    Links of folders are followed here, so that a file needs one look at the disk. Texts are ten times as fast as paths.
    """

    def refuse(error: OSError) -> None:
        raise UserError(
            f"--images {folder}: {error.filename} cannot be read ({error.strerror}): change its permissions, or try "
            "again later"
        )

    visited = {folder.resolve()}
    for root, inner, names in os.walk(folder, onerror=refuse, followlinks=True):
        to_visit = {}
        for name in inner:
            if name.startswith("."):
                continue
            real = (Path(root) / name).resolve()
            if real not in visited:
                to_visit[name] = real
        inner[:] = to_visit  # os.walk enters only the folders that are left in the list
        visited.update(to_visit.values())
        place = os.path.realpath(root).rstrip(os.sep)
        yield from (f"{place}{os.sep}{name}" for name in names)


def _is_image(file: str) -> bool:
    """Check whether a visible file is an image, by its ending, or by its bytes if it has none."""
    path = Path(file)
    if path.name.startswith("."):
        return False
    try:
        with IMAGES.open(path) as stream:
            image_size(stream, FORMATS)
    except Image.DecompressionBombError:
        return True  # which is said where it is decoded
    except OSError:
        return False
    return True


def _identity(file: str, told_by: str) -> Identity:
    """Return the identity of a file, with its symlinks followed.

    Raises:
        ValueError: it cannot be an image, as far as is known before it is opened.
    """
    try:
        there = os.lstat(file)
        if stat.S_ISLNK(there.st_mode):
            file = os.path.realpath(file)  # unlike `resolve`, it takes a link to itself
            there = Path(file).stat()
        file.encode()
    except UnicodeEncodeError:
        raise ValueError("its name is not UTF-8: rename it") from None
    except OSError:
        raise ValueError("a link that leads nowhere") from None
    if not stat.S_ISREG(there.st_mode):
        raise ValueError("a pipe, a device or a socket, not a file")
    try:
        return file, there.st_size, stamp(file, there, told_by)
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror})") from None
