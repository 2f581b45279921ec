"""Image files decoded by Pillow alone: one that is damaged or too large is an error that says so. And JPEGs made."""

import io
import os
import stat
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from utils import first_line

# What Pillow's decoders raise on damaged files.
DECODING_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, OverflowError, MemoryError, TypeError, LookupError, AttributeError,
    ArithmeticError, AssertionError, RuntimeError, struct.error, zlib.error,
)  # fmt: skip
LONGEST_SIDE = 18_000  # pixels of an image; squared it is about twice what Pillow decodes


def check_regular(file: Path | BinaryIO) -> None:
    """Raise OSError where a path is a pipe, a device or a socket: to open one may wait for ever, or do something."""
    if isinstance(file, str | os.PathLike):
        kind = Path(file).stat().st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # opening a folder fails by itself
            raise OSError("it is a pipe, a device or a socket, not a file")


def decoded(
    file: Path | BinaryIO, formats: tuple[str, ...] | None = None, side: int | None = None
) -> Image.Image:
    """An image with its pixels, as it was saved.

    Args:
        formats: those of Pillow that it may have; None for all.
        side: pixels that its shorter side needs at least, where that makes decoding faster.

    Raises:
        PIL.UnidentifiedImageError: it is none.
        PIL.Image.DecompressionBombError: it has too many pixels, or so long a side that padding takes gigabytes.
        OSError: it is damaged, or no file.
    """
    check_regular(file)
    try:
        with Image.open(file, formats=formats) as image:
            if max(image.size) > LONGEST_SIDE:
                raise Image.DecompressionBombError(
                    f"{image.width} x {image.height}, a side above {LONGEST_SIDE:,} pixels"
                )
            if side:
                image.draft("RGB", (side, side))
            image.load()
            return image
    except OSError:
        raise
    except DECODING_ERRORS as error:
        raise OSError(f"{type(error).__name__}: {first_line(error)}") from error


def has_more_bits(image: Image.Image) -> bool:
    """Whether an image has more than 8 bits a channel, of which Pillow's conversion to RGB makes white above 255."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def jpeg(image: Image.Image, side: int, quality: int = 80) -> bytes:
    """A JPEG of an image, at most `side` pixels wide and high: its pixels alone, without comments, place or profile."""
    copy = image.convert("RGB")
    copy.info.clear()  # Pillow would write what it says
    copy.thumbnail((side, side))
    buffer = io.BytesIO()
    copy.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
