"""Read the bytes of image files. Another source, such as a tar file, overrides the methods of Folder."""

import stat
from pathlib import Path
from typing import BinaryIO

from runtime.files import Identity, file_digest, file_identities, file_size, sample_digest


class Folder:
    """Source of images that are files in folders."""

    def open(self, path: Path) -> BinaryIO:
        """Open an image, to be read from any position. Raises OSError if it is missing or cannot be read.

        A pipe, a device or a socket is not opened, because that may block for ever or have side
        effects.
        """
        kind = path.stat().st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # `open` itself rejects a folder
            raise OSError("it is a pipe, a device or a socket, not a file")
        return open(path, "rb")

    def size(self, path: Path) -> int | None:
        """Return the size of an image in bytes; None if it is missing."""
        return file_size(path)

    def identities(self, paths: list[Path], told_by: str = "sample") -> list[Identity]:
        """Return the identity of each image, which changes when the image changes. Raises OSError if one is missing.

        Args:
            told_by: how a change is detected, see `runtime.files.stamp`.
        """
        return file_identities(paths, told_by)

    def digest(self, path: Path, *, sampled: bool) -> str:
        """Return a digest of an image's bytes, or of a sample of them. Raises OSError if the image is missing."""
        return sample_digest(path) if sampled else file_digest(path)


IMAGES = Folder()
