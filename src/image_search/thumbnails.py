"""Small pictures of an index's images, made once and kept in memory."""

import threading
from collections import OrderedDict
from pathlib import Path

from image_search.photos import small_image
from runtime.files import file_size
from runtime.image_files import jpeg

SIDES = {"small": 320, "large": 1280}  # pixels of the longer side
MOST_KEPT = 64 * 2**20  # bytes


class Thumbnails:
    """JPEGs of image files, those that were asked for last."""

    def __init__(self, most: int = MOST_KEPT) -> None:
        self._most = most
        self._kept: OrderedDict[tuple[Path, str], bytes] = OrderedDict()
        self._taken = 0
        self._lock = threading.Lock()

    def get(self, file: Path, size: str) -> bytes:
        """A JPEG of a file; a grey square where it is gone or damaged, which is not kept.

        Args:
            size: one of SIDES.
        """
        key = (file, size)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        is_there = file_size(file) is not None
        picture = jpeg(small_image(file, SIDES[size]), SIDES[size])
        if is_there:
            self._keep(key, picture)
        return picture

    def _keep(self, key: tuple[Path, str], picture: bytes) -> None:
        """Keep a picture, and drop the oldest ones while all of them take too much."""
        with self._lock:
            if key not in self._kept:
                self._kept[key] = picture
                self._taken += len(picture)
            while self._taken > self._most:
                _, oldest = self._kept.popitem(last=False)
                self._taken -= len(oldest)
