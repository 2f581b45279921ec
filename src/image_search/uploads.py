"""Check and decode uploaded images in memory; files that are too large or not images are rejected.

Workers run these functions, see workers.py.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from image_search.stores.base import QueryError
from runtime.image_files import FORMATS, LONGEST_SIDE, image_size, thumbnail
from utils import UserError, first_line

MOST_BYTES = 10 * 2**20
UPLOAD_PIXELS = 40_000_000
LONGEST_NAME = 100  # maximum number of characters of a file name in a message


@dataclass(frozen=True)
class File:
    """An uploaded file."""

    name: str
    content: bytes


class Upload(io.BytesIO):
    """An in-memory file that appears in messages under its name."""

    def __init__(self, name: str, content: bytes) -> None:
        super().__init__(content)
        self.name = name

    def __repr__(self) -> str:
        return self.name


def read_pixels(image: Upload | Path, read: Callable[[Any], Any]) -> np.ndarray:
    """Read an image with the encoder's loader, to bytes (3, R, R). Raises QueryError if it is invalid."""
    try:
        return read(image).numpy()
    except UserError as error:  # its message contains the name of the image
        raise QueryError(error) from None


def read_upload(file: File, read: Callable[[Any], Any]) -> np.ndarray:
    """Read an upload, see `read_pixels`. Raises QueryError if it is invalid."""
    return read_pixels(checked_upload(file.name, file.content), read)


def preview(
    file: File, read: Callable[[Any], Any], side: int, background: str
) -> tuple[np.ndarray, bytes]:
    """Read an upload with the encoder's loader, to bytes (3, R, R), and make a JPEG of it, see `thumbnail`.

    Raises:
        QueryError: the image is invalid.
    """
    upload = checked_upload(file.name, file.content)
    return read_pixels(upload, read), thumbnail(upload, side, background)


def checked_upload(name: str, content: bytes) -> Upload:
    """Return an upload that is safe to decode: its format and size are read from its header.

    Raises:
        QueryError: it is too large, of an unsupported type, or not an image.
    """
    name = PurePath(name.replace("\\", "/")).name[-LONGEST_NAME:] or "the image"
    if len(content) > MOST_BYTES:
        raise QueryError(f"{name} is larger than {MOST_BYTES // 2**20} MiB: upload a smaller copy")
    upload = Upload(name, content)
    limits = f"{UPLOAD_PIXELS // 10**6} million pixels, or a side of more than {LONGEST_SIDE:,}"
    too_large = QueryError(f"{name} has more than {limits}: upload a smaller copy")
    try:
        width, height = image_size(upload, FORMATS)
    except Image.DecompressionBombError:
        raise too_large from None
    except UnidentifiedImageError:
        raise QueryError(
            f"{name} is not an image of a known kind: upload one of {', '.join(FORMATS)}"
        ) from None
    except OSError as error:
        raise QueryError(
            f"{name} cannot be decoded ({first_line(error)}): upload a complete image"
        ) from None
    if width * height > UPLOAD_PIXELS or max(width, height) > LONGEST_SIDE:
        raise too_large
    return upload
