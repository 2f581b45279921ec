"""Image files decoded by Pillow alone: one that is damaged or too large is an error that says so. And JPEGs made."""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from runtime.image_source import IMAGES
from utils import first_line

# What Pillow's decoders raise on damaged files.
DECODING_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, OverflowError, MemoryError, TypeError, LookupError, AttributeError,
    ArithmeticError, AssertionError, RuntimeError, struct.error, zlib.error,
)  # fmt: skip
# Pixels. Padded to a square, an image of this side takes 1.3 GB in RGB, and 2.5 GB with transparency.
LONGEST_SIDE = 18_000


def decoded(
    file: Path | BinaryIO, formats: tuple[str, ...] | None = None, side: int | None = None
) -> Image.Image:
    """Decode an image, as it was saved.

    Args:
        formats: those of Pillow that it may have; None for all.
        side: pixels that its shorter side needs at least, where that makes decoding faster.

    Raises:
        PIL.UnidentifiedImageError: it is none.
        PIL.Image.DecompressionBombError: it has too many pixels, or so long a side that padding takes gigabytes.
        OSError: it is damaged, or no file.
    """
    if isinstance(file, str | os.PathLike):
        with IMAGES.open(Path(file)) as stream:
            return decoded(stream, formats, side)
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
    except UnidentifiedImageError:
        raise UnidentifiedImageError("not an image of a known format") from None
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
