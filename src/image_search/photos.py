"""A user's own image files: found in folders, and opened as a viewer shows them."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from runtime.files import file_size
from runtime.image_files import DECODING_ERRORS, decoded
from utils import UserError

KINDS = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # others' decoders are old, or start programs
OTHER_KINDS = {".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".psd"}
OTHER_KINDS |= {".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw"}  # of cameras
FULL = (1, 255, 65_535)  # what white may be in images of more than 8 bits


@dataclass
class FoundImages:
    """What there is in some folders.

    Attributes:
        paths: the image files, sorted, each once.
        left_out: files that cannot be taken, and why.
        skipped: endings of images of other kinds -> how many there are.
    """

    paths: list[Path] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)


def find_images(folders: Sequence[Path]) -> FoundImages:
    """All image files below some folders; links are followed, hidden folders are left alone.

    Raises:
        UserError: a folder is none or cannot be read, or there is no image.
    """
    found, paths = FoundImages(), set()
    for folder in folders:
        for file in _files(folder):
            kind = file.suffix.lower()
            if kind in OTHER_KINDS:
                found.skipped[kind] += 1
            elif kind in KINDS:
                real = Path(os.path.realpath(file))  # unlike `resolve`, it takes a link to itself
                reason = _reason(real)
                if reason:
                    found.left_out[ascii(str(file))[1:-1]] = reason
                else:
                    paths.add(real)
    if not paths:
        where = ", ".join(map(str, folders))
        raise UserError(f"--images {where}: no images there ({' '.join(sorted(KINDS))}): name another folder")
    found.paths = sorted(paths)
    return found


def _files(folder: Path) -> list[Path]:
    """All files below a folder; a folder that links lead back to is looked at once."""

    def fail(error: OSError) -> None:
        raise UserError(f"--images {folder}: {error.filename} cannot be read ({error.strerror}): allow it, or wait")

    if not folder.is_dir():
        raise UserError(
            f"--images {folder} is no folder: name one that holds images, or drop it from the index with --forget"
        )
    files, seen = [], {folder.resolve()}
    for root, inner, names in os.walk(folder, onerror=fail, followlinks=True):
        inner[:] = [name for name in inner if not name.startswith(".") and (Path(root) / name).resolve() not in seen]
        seen |= {(Path(root) / name).resolve() for name in inner}
        files += [Path(root) / name for name in names]
    return files


def _reason(file: Path) -> str:
    """Why a file, its links followed, cannot be taken, before it is opened; "" where it can."""
    try:
        str(file).encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8: rename it"
    return "" if file_size(file) is not None else "a link that leads nowhere"


def opened(file: Path, side: int | None = None) -> Image.Image:
    """An image as a viewer shows it: turned as its EXIF data says, with 8 bits.

    Benchmarks are read without that, as the original reads them.

    Args:
        side: how large it must be at least, where that makes decoding faster.

    Raises:
        OSError: it is none of FORMATS, or damaged.
        PIL.Image.DecompressionBombError: it has too many pixels.
    """
    image = decoded(file, FORMATS, side)
    try:
        return _eight_bits(ImageOps.exif_transpose(image))
    except DECODING_ERRORS as error:  # of damaged EXIF data
        raise OSError(f"{type(error).__name__}: {error}") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Images of more than 8 bits, of which Pillow would make white ones, in their own range."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    largest = max(values.max(), 0)
    white = next((full for full in FULL if largest <= full), largest)
    return Image.fromarray((values.clip(0) * 255 / white).round().astype(np.uint8))


def thumbnail(file: Path, side: int) -> Image.Image:
    """A small RGB image of a file, grey where the file is gone or damaged."""
    try:
        small = opened(file, side).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return Image.new("RGB", (side, side), "lightgrey")
    small.thumbnail((side, side))
    return small
