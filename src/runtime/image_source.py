"""Where the bytes of image files come from. Another source, such as a tar file, is a class in place of Folder."""

from pathlib import Path
from typing import BinaryIO, Protocol

from runtime.files import Identity, file_identities, file_size


class ImageSource(Protocol):
    """Find and open the images that have paths."""

    def open(self, path: Path) -> BinaryIO:
        """Open an image, to be read from any position. Raises OSError if it is not there or cannot be read."""

    def size(self, path: Path) -> int | None:
        """Tell how many bytes an image has, None if it is not there."""

    def identities(self, paths: list[Path]) -> list[Identity]:
        """Tell images apart: one that has changed has another identity. Raises OSError if one is not there."""


class Folder:
    """Image files in folders."""

    def open(self, path: Path) -> BinaryIO:
        """Open a file."""
        return open(path, "rb")

    def size(self, path: Path) -> int | None:
        """Tell how many bytes a file has, None if it is not there."""
        return file_size(path)

    def identities(self, paths: list[Path]) -> list[Identity]:
        """Tell files apart by their paths, sizes and modification times."""
        return file_identities(paths)


IMAGES: ImageSource = Folder()
