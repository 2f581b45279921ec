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
SUFFIX = re.compile(r"\.[a-z]\w*", re.IGNORECASE)  # any other text after a dot is not an extension


@dataclass
class FoundImages:
    """Image files found in some folders.

    Attributes:
        folders: folders that were searched.
        gone: folders of an index that no longer exist; their images must be among the files.
        files: identities of the image files, sorted, with symlinks resolved and without duplicates.
        left_out: unusable file -> reason.
        skipped: extension of an unsupported image type -> number of files.
    """

    folders: Sequence[Path]
    gone: Sequence[Path] = ()
    files: list[Identity] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)


def find_images(folders: Sequence[Path], told_by: str = "time") -> FoundImages:
    """Find all image files below some folders; symlinks are followed, and hidden folders are skipped.

    Args:
        told_by: method to detect changed images, see `runtime.files.stamp`.

    Raises:
        UserError: a folder cannot be read, or there is no image.
    """
    found = FoundImages(folders)
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
    """Yield all files below a folder; symlinks to folders are followed, but no folder is visited twice.

    Paths are strings, which are ten times as fast as `Path`. The links to folders are resolved here, once per folder.
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
        real_root = os.path.realpath(root).rstrip(os.sep)
        yield from (f"{real_root}{os.sep}{name}" for name in names)


def _is_image(file: str) -> bool:
    """Check whether a file is an image by its content; hidden files are not."""
    path = Path(file)
    if path.name.startswith("."):
        return False
    try:
        with IMAGES.open(path) as stream:
            image_size(stream, FORMATS)
    except Image.DecompressionBombError:
        return True  # the error is reported when the image is decoded
    except OSError:
        return False
    return True


def _identity(file: str, told_by: str) -> Identity:
    """Return the identity of a file, with its symlinks followed.

    Raises:
        ValueError: it is unusable, as far as can be checked without opening it.
    """
    try:
        there = os.lstat(file)
        if stat.S_ISLNK(there.st_mode):
            file = os.path.realpath(file)  # unlike `resolve`, it accepts a link to itself
            there = Path(file).stat()
        file.encode()
    except UnicodeEncodeError:
        raise ValueError("its name is not UTF-8: rename it") from None
    except OSError:
        raise ValueError("a broken symlink") from None
    if not stat.S_ISREG(there.st_mode):
        raise ValueError("a pipe, a device or a socket, not a file")
    try:
        return file, there.st_size, stamp(file, there, told_by)
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror})") from None
