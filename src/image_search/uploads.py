"""Images that visitors send: refused where they are too large or no images, and never written to the disk.

All of this is done by workers, see workers.py.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from image_search.forms import File
from image_search.photos import FORMATS, KINDS, small_image
from image_search.stores.base import QuestionError
from runtime.image_files import DECODING_ERRORS, LONGEST_SIDE, jpeg
from utils import UserError, first_line

MOST_BYTES = 10 * 2**20
MOST_PIXELS = 40_000_000
LONGEST_NAME = 100  # characters that are repeated of a name


@dataclass(frozen=True)
class Upload:
    """An image in memory, read as an image file is; a message calls it by its name."""

    name: str
    content: bytes

    def stream(self) -> io.BytesIO:
        """Its content, to be decoded."""
        return _Named(self.content, self.name)


class _Named(io.BytesIO):
    """Bytes that are called by a name where an error names what cannot be read."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.called = name

    def __repr__(self) -> str:
        return self.called


def read_upload(file: File, read: Callable[[io.BytesIO], Any]) -> np.ndarray:
    """An upload as the encoder's loader reads it, bytes (3, R, R).

    Raises:
        QuestionError: it cannot be asked with.
    """
    return _read(checked_upload(file.name, file.content), read)


def _read(upload: Upload, read: Callable[[io.BytesIO], Any]) -> np.ndarray:
    try:
        return read(upload.stream()).numpy()
    except UserError as error:  # which calls it by its name
        raise QuestionError(error) from None


def preview(file: File, read: Callable[[io.BytesIO], Any], side: int) -> tuple[np.ndarray, bytes]:
    """An upload as the encoder's loader reads it, and a JPEG of it, at most `side` pixels wide and high.

    Raises:
        QuestionError: it cannot be asked with.
    """
    upload = checked_upload(file.name, file.content)
    return _read(upload, read), jpeg(small_image(upload.stream(), side), side)


def checked_upload(name: str, content: bytes) -> Upload:
    """An upload that may be decoded. Its pixels are counted before.

    Raises:
        QuestionError: it is too large, of another kind, or no image.
    """
    name = PurePath(name.replace("\\", "/")).name[-LONGEST_NAME:]
    if Path(name).suffix.lower() not in KINDS:
        raise QuestionError(f"{name} is not an image: upload one of {' '.join(sorted(KINDS))}")
    if len(content) > MOST_BYTES:
        raise QuestionError(
            f"{name} is larger than {MOST_BYTES // 2**20} MiB: upload a smaller copy"
        )
    upload = Upload(name, content)
    limits = f"{MOST_PIXELS // 10**6} million pixels, or a side of more than {LONGEST_SIDE:,}"
    too_large = QuestionError(f"{name} has more than {limits}: upload a smaller copy")
    try:
        with Image.open(upload.stream(), formats=FORMATS) as image:
            size = image.size
    except Image.DecompressionBombError:
        raise too_large from None
    except DECODING_ERRORS as error:
        raise QuestionError(
            f"{name} cannot be decoded ({_reason(error)}): upload a whole image"
        ) from None
    if size[0] * size[1] > MOST_PIXELS or max(size) > LONGEST_SIDE:
        raise too_large
    return upload


def _reason(error: Exception) -> str:
    """Why a file cannot be decoded, without what Python and Pillow call it."""
    if isinstance(error, UnidentifiedImageError):
        return f"none of {', '.join(FORMATS)}"
    return first_line(error)
