"""Images that visitors send: refused where they are too large or no images, and never written to the disk.

All of this is done by workers, see workers.py.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from image_search.stores.base import QueryError
from runtime.image_files import FORMATS, LONGEST_SIDE, image_size, thumbnail
from utils import UserError, first_line

MOST_BYTES = 10 * 2**20
UPLOAD_PIXELS = 40_000_000
LONGEST_NAME = 100  # characters that are repeated of a name


@dataclass(frozen=True)
class File:
    """A file as it was sent."""

    name: str
    content: bytes


class Upload(io.BytesIO):
    """An image in memory, read as an image file is; a message calls it by its name."""

    def __init__(self, name: str, content: bytes) -> None:
        super().__init__(content)
        self.name = name

    def __repr__(self) -> str:
        return self.name


def read_upload(file: File, read: Callable[[io.BytesIO], Any]) -> np.ndarray:
    """An upload as the encoder's loader reads it, bytes (3, R, R).

    Raises:
        QueryError: it cannot be asked with.
    """
    return _read(checked_upload(file.name, file.content), read)


def _read(upload: Upload, read: Callable[[io.BytesIO], Any]) -> np.ndarray:
    try:
        return read(upload).numpy()
    except UserError as error:  # which calls it by its name
        raise QueryError(error) from None


def preview(
    file: File, read: Callable[[io.BytesIO], Any], side: int, background: str
) -> tuple[np.ndarray, bytes]:
    """An upload as the encoder's loader reads it, and a JPEG of it, see `thumbnail`.

    Raises:
        QueryError: it cannot be asked with.
    """
    upload = checked_upload(file.name, file.content)
    return _read(upload, read), thumbnail(upload, side, background)


def checked_upload(name: str, content: bytes) -> Upload:
    """An upload that may be decoded. Its kind is told by its bytes, and its pixels are counted before.

    Raises:
        QueryError: it is too large, of another kind, or no image.
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
