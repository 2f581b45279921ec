"""Read the bytes of image files. Another source, such as a tar file, overrides the methods of Folder."""

import stat
from pathlib import Path
from typing import BinaryIO

from runtime.files import Identity, file_digest, file_identities, file_size, sample_digest


class Folder:
    """Find and open the images that have paths: files in folders."""

    def open(self, path: Path) -> BinaryIO:
        """Open an image, to be read from any position. Raises OSError if it is not there or cannot be read.

        A pipe, a device or a socket is not opened: that may wait for ever, or do something.
        """
        kind = path.stat().st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # opening a folder fails by itself
            raise OSError("it is a pipe, a device or a socket, not a file")
        return open(path, "rb")

    def size(self, path: Path) -> int | None:
        """Tell how many bytes an image has, None if it is not there."""
        return file_size(path)

    def identities(self, paths: list[Path], told_by: str = "sample") -> list[Identity]:
        """Tell images apart: one that has changed has another identity. Raises OSError if one is not there.

        Args:
            told_by: how a change is told, see `runtime.files.stamp`.
        """
        return file_identities(paths, told_by)

    def digest(self, path: Path, *, sampled: bool) -> str:
        """Return a digest of an image's bytes, or of a sample of them. Raises OSError if it is not there."""
        return sample_digest(path) if sampled else file_digest(path)


IMAGES = Folder()
