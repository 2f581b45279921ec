"""Images that are decoded once: preprocessed bytes in a memory-mapped file.

Its name has a digest of all that the bytes depend on.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_utils import ImageLoader, Reader
from runtime import distributed
from runtime.files import free_bytes, made_beside
from runtime.image_source import IMAGES
from runtime.progress import Counter
from utils import PROJECT_ROOT, DiskError, UserError

logger = logging.getLogger(__name__)

PIXELS = PROJECT_ROOT / "pixels"  # holds the caches that are made unasked
DECODED_AT_ONCE = 64  # images
REPAYS = 20_000  # decodings saved, from which on a cache is made unasked: minutes of a core
ABANDONED = 86_400  # seconds since a half-made file was written to; filling one takes minutes


class CachedImages:
    """Reads from the cache what would be decoded: image file -> its preprocessed bytes (3, R, R)."""

    def __init__(self, file: Path, paths: list[Path], shape: tuple[int, ...]) -> None:
        self.arguments = (file, paths, shape)
        self.row_of = {path: row for row, path in enumerate(paths)}
        try:
            self.pixels = np.load(file, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(
                f"--image-cache: {file} is truncated or damaged ({error}): delete it"
            ) from None
        if self.pixels.shape != shape or self.pixels.dtype != np.uint8:
            raise UserError(
                f"--image-cache: {file} has shape {self.pixels.shape}, expected {shape}: delete it"
            )

    def __reduce__(self) -> tuple:
        """Let worker processes open the file again; pickled, a memory map is a copy of all of it."""
        return CachedImages, self.arguments

    def __call__(self, path: Path) -> Tensor:
        return torch.from_numpy(self.pixels[self.row_of[path]].copy())


@dataclass(frozen=True, kw_only=True)
class ImageCache:
    """Images that can be kept decoded, and where.

    Attributes:
        paths: files without repeats, N of them.
        read: decodes one, to (3, R, R) uint8.
        recipe: what the bytes depend on beside the files: transform, ratio, resolution R, versions.
        workers: processes that decode.
        between: called between two batches; what it raises ends the decoding, and nothing is left.
    """

    folder: Path
    paths: list[Path]
    read: Reader
    recipe: Mapping[str, Any]
    workers: int = 0
    between: Callable[[], None] = lambda: None

    @functools.cached_property
    def file(self) -> Path:
        """The file of these images: another recipe, file size or modification time, another name."""
        content = json.dumps([self.recipe, IMAGES.identities(self.paths)])
        key = hashlib.sha256(content.encode()).hexdigest()
        return self.folder / f"images-{self.recipe['resolution']}px-{key[:16]}.npy"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, 3, R, R)."""
        return len(self.paths), 3, self.recipe["resolution"], self.recipe["resolution"]

    @property
    def size(self) -> int:
        """Bytes of the images."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{len(self.paths):,} images, {_gib(self.size)}, in {self.file}"

    def open(self) -> CachedImages:
        """The images from the file, which is filled now unless it exists; its size is announced before.

        Raises:
            UserError: the disk lacks room, or the file is truncated or of another shape.
        """
        if distributed.is_main() and not self.file.exists():
            logger.info("image cache: %s", self)
            free = free_bytes(self.folder)
            if self.size > free:
                raise UserError(
                    f"--image-cache {self.folder}: {_gib(self.size)} are needed and {_gib(free)} are free: "
                    "free space, choose another disk, or leave the flag out"
                )
            try:
                self._fill()
            except DiskError as error:
                raise UserError(f"--image-cache {self.folder}: {error}") from None
        distributed.wait_for_all()
        return CachedImages(self.file, self.paths, self.shape)

    def open_if_it_repays(self, decodings: int) -> CachedImages | None:
        """The images from the file if it exists, or if filling it now is worth it; None otherwise. A line says why.

        Args:
            decodings: how often a training decodes an image if it has no cache.

        Raises:
            UserError: the file is truncated or of another shape.
        """
        if distributed.is_main():
            self._fill_if_it_repays(decodings)
        distributed.wait_for_all()
        if not self.file.exists():
            return None
        return CachedImages(self.file, self.paths, self.shape)

    def _fill_if_it_repays(self, decodings: int) -> None:
        if self.file.exists():
            logger.info("image cache: %s, from before; --no-image-cache decodes instead", self)
            return
        saved = max(0, decodings - len(self.paths))
        why_not = self._why_not(saved)
        if why_not:
            logger.info("no image cache (%s): %s; see --image-cache", self, why_not)
            return
        why = f"saves {saved:,} of {decodings:,} decodings; --no-image-cache decodes instead"
        logger.info("image cache: %s, %s", self, why)
        try:
            self._fill()
        except DiskError as error:
            logger.warning("warning: no image cache: %s; images are decoded each time", error)

    def _why_not(self, saved: int) -> str:
        """Why the file should not be filled unasked; "" if it should.

        Args:
            saved: decodings that it would save.
        """
        if saved < REPAYS:
            return f"it would save {saved:,} decodings, fewer than {REPAYS:,}"
        free = free_bytes(self.folder)
        if free < 2 * self.size:
            return f"{_gib(free)} are free, less than twice its size"
        return ""

    def _fill(self) -> None:
        """Decode all images into a temporary file, which takes the place of `file` when it is whole.

        Raises:
            DiskError: it cannot be written; nothing is left of it.
        """
        starts = range(0, len(self.paths), DECODED_AT_ONCE)
        chunks = [self.paths[start : start + DECODED_AT_ONCE] for start in starts]
        loader = ImageLoader(self.read, self.workers, torch.device("cpu"))
        with made_beside(self.file) as unfinished:
            _drop_abandoned(self.folder)
            pixels = np.lib.format.open_memmap(
                unfinished, mode="w+", dtype=np.uint8, shape=self.shape
            )
            _reserve(unfinished)
            with Counter(len(self.paths), "decoding images") as counter:
                for start, batch in zip(starts, loader.batches(chunks), strict=True):
                    pixels[start : start + len(batch)] = batch.numpy()
                    counter.update(len(batch))
                    self.between()
            pixels.flush()


def _reserve(file: Path) -> None:
    """Take a file's room on the disk now: a disk that fills up under a memory map kills the process."""
    if hasattr(os, "posix_fallocate"):
        with open(file, "r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)


def _drop_abandoned(folder: Path) -> None:
    """Delete what processes that were killed left half-made, gigabytes each."""
    for file in folder.glob(".images-*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # its process is alive, and has renamed it
            if time.time() - file.stat().st_mtime > ABANDONED:
                file.unlink()


def _gib(size: int) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.2f} GiB"
