"""A user's own image files: found in folders, and opened as a viewer shows them."""

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, features

from runtime.files import Identity, stamp
from runtime.image_files import DECODING_ERRORS, decoded, has_more_bits
from utils import UserError

try:
    import pi_heif
except ImportError:
    HEIF_KINDS: set[str] = set()
else:
    pi_heif.register_heif_opener()
    HEIF_KINDS = {".heic", ".heif"}
AVIF_KINDS = {".avif"} if features.check("avif") else set()

KINDS = {
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", *AVIF_KINDS, *HEIF_KINDS,
}  # fmt: skip
# Decoders of other formats are old, or start programs.
FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
if AVIF_KINDS:
    FORMATS += ("AVIF",)
if HEIF_KINDS:
    FORMATS += ("HEIF",)
CAMERA_KINDS = {".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw"}
OTHER_KINDS = {".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".psd", *CAMERA_KINDS} - KINDS
WHITES = (1, 255, 65_535)  # possible values of white in images of more than 8 bits

ROWS = 256  # of an image of more than 8 bits that are scaled at once


@dataclass
class FoundImages:
    """What there is in some folders.

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
            elif kind in KINDS:
                try:
                    files.add(_identity(file, told_by))
                except ValueError as error:
                    found.left_out[ascii(file)[1:-1]] = str(error)
    if not files:
        named = ", ".join(map(str, folders))
        kinds = " ".join(sorted(KINDS))
        raise UserError(f"--images {named}: no images there ({kinds}): name another folder")
    found.files = sorted(files)
    return found


def _files(folder: Path) -> Iterator[str]:
    """All files below a folder whose links are followed but for those that lead back to a folder above.

    Links of folders are followed here, so that a file needs one look at the disk. Texts are ten times as fast as paths.
    """

    def refuse(error: OSError) -> None:
        raise UserError(
            f"--images {folder}: {error.filename} cannot be read ({error.strerror}): allow it, or wait"
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


def _identity(file: str, told_by: str) -> Identity:
    """What a file is, its links followed.

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


def opened(file: Path | BinaryIO, side: int | None = None) -> Image.Image:
    """An image as a viewer shows it: turned as its EXIF data says, with 8 bits.

    Images of benchmarks are read as they are saved, as the original reads them.

    Args:
        side: pixels that the shorter side needs at least; a smaller image is decoded faster.

    Raises:
        OSError: it is none of FORMATS, or damaged.
        PIL.Image.DecompressionBombError: it has too many pixels.
    """
    image = decoded(file, FORMATS, side)
    try:
        return _eight_bits(ImageOps.exif_transpose(image))
    except DECODING_ERRORS as error:  # the EXIF data are damaged
        raise OSError(f"{type(error).__name__}: {error}") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """An image of more than 8 bits scaled to 8; Pillow's own conversion would make it white."""
    if not has_more_bits(image):
        return image
    values = np.asarray(image)
    # A part at a time: as float64 a large image has a gigabyte.
    parts = [slice(top, top + ROWS) for top in range(0, image.height, ROWS)]
    largest = max(_finite(values[part]).max() for part in parts)
    largest = max(largest, 0)
    white = next((value for value in WHITES if largest <= value), largest)
    eight = np.empty(values.shape, np.uint8)
    for part in parts:
        scaled = _finite(values[part]).clip(0) * 255 / white
        eight[part] = scaled.round()
    return Image.fromarray(eight)


def _finite(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(values.astype(np.float64))


def small_image(file: Path | BinaryIO, side: int) -> Image.Image:
    """An RGB image of a file, at most `side` pixels wide and high; a grey square where it is gone or damaged."""
    try:
        image = opened(file, side).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return Image.new("RGB", (side, side), "lightgrey")
    image.thumbnail((side, side))
    return image
