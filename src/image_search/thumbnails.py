"""Small pictures of an index's images."""

from pathlib import Path

from image_search.photos import small_image
from runtime.files import file_size
from runtime.image_files import jpeg

SIDES = {"small": 320, "large": 1280}  # pixels of the longer side


def thumbnail(file: Path, size: str) -> tuple[bytes, bool]:
    """A JPEG of a file, a grey square where it is gone or damaged; and whether it is there.

    Args:
        size: one of SIDES.
    """
    is_there = file_size(file) is not None
    return jpeg(small_image(file, SIDES[size]), SIDES[size]), is_there
