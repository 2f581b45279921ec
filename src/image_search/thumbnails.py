"""Small pictures of an index's images, made once and kept in memory."""

from collections import OrderedDict
from pathlib import Path

from image_search.photos import small_image
from runtime.files import file_size
from runtime.image_files import jpeg

SIDES = {"small": 320, "large": 1280}  # pixels of the longer side
MOST_KEPT = 64 * 2**20  # bytes

Key = tuple[Path, str]  # an image file, one of SIDES


def thumbnail(file: Path, size: str) -> tuple[bytes, bool]:
    """A JPEG of a file, a grey square where it is gone or damaged; and whether it is there.

    Args:
        size: one of SIDES.
    """
    is_there = file_size(file) is not None
    return jpeg(small_image(file, SIDES[size]), SIDES[size]), is_there


class Thumbnails:
    """JPEGs of image files, those that were asked for last."""

    def __init__(self, most: int = MOST_KEPT) -> None:
        self._most = most
        self._kept: OrderedDict[Key, bytes] = OrderedDict()
        self._taken = 0

    def get(self, key: Key) -> bytes | None:
        """A JPEG that is kept, None where there is none."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def keep(self, key: Key, picture: bytes) -> None:
        """Keep a picture, and drop the oldest ones while all of them take too much."""
        if key not in self._kept:
            self._kept[key] = picture
            self._taken += len(picture)
        while self._taken > self._most:
            _, oldest = self._kept.popitem(last=False)
            self._taken -= len(oldest)
