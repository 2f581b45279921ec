"""Images that are decoded once: preprocessed bytes in a memory-mapped file.

Its name has a digest of all that the bytes depend on.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data_utils import ImageLoader, Reader
from runtime import distributed
from runtime.files import file_identities, made_beside
from utils import DiskError, UserError

logger = logging.getLogger(__name__)

DECODED_AT_ONCE = 64  # images


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


def open_image_cache(
    folder: Path, paths: list[Path], read: Reader, *, recipe: Mapping[str, Any], workers: int
) -> CachedImages:
    """The cache of some images, which are decoded now unless it exists.

    Its size is announced before it is written. The key is made of the recipe (transform, ratio, resolution,
    versions) and of each file's path, size and modification time.

    Args:
        paths: files without repeats.
        read: decodes one, to (3, R, R) uint8.

    Raises:
        UserError: the disk lacks room, or the file is truncated or of another shape.
    """
    shape = (len(paths), *read(paths[0]).shape)
    key = hashlib.sha256(json.dumps([recipe, file_identities(paths)]).encode()).hexdigest()
    file = folder / f"images-{recipe['resolution']}px-{key[:16]}.npy"
    if distributed.is_main() and not file.exists():
        _fill(file, paths, read, shape=shape, workers=workers)
    distributed.wait_for_all()
    return CachedImages(file, paths, shape)


def _fill(
    file: Path, paths: list[Path], read: Reader, *, shape: tuple[int, ...], workers: int
) -> None:
    """Decode all images into a temporary file, which takes the place of `file` when it is whole."""
    starts = range(0, len(paths), DECODED_AT_ONCE)
    chunks = [paths[start : start + DECODED_AT_ONCE] for start in starts]
    batches = ImageLoader(read, workers, torch.device("cpu")).batches(chunks)
    try:
        with made_beside(file) as unfinished:
            _announce(file, shape)
            pixels = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.uint8, shape=shape)
            _reserve(unfinished)
            with _progress(len(paths)) as bar:
                for start, batch in zip(starts, batches, strict=True):
                    pixels[start : start + len(batch)] = batch.numpy()
                    bar.update(len(batch))
            pixels.flush()
    except DiskError as error:
        raise UserError(f"--image-cache {file.parent}: {error}") from None


def _progress(total: int) -> tqdm:
    """A progress bar, which hides itself where the output is no terminal."""
    return tqdm(total=total, desc="decoding images", unit="img", leave=False, disable=None)


def _reserve(file: Path) -> None:
    """Take a file's room on the disk now: a disk that fills up under a memory map kills the process."""
    if hasattr(os, "posix_fallocate"):
        with open(file, "r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)


def _announce(file: Path, shape: tuple[int, ...]) -> None:
    """Log the size of the cache. Raises UserError if the disk has less room."""
    size = int(np.prod(shape))
    free = shutil.disk_usage(file.parent).free
    logger.info("image cache: %d images, %.2f GiB, in %s", shape[0], size / 2**30, file)
    if size > free:
        raise UserError(
            f"--image-cache {file.parent}: {size / 2**30:.2f} GiB are needed and {free / 2**30:.2f} GiB are free: "
            "free space, choose another disk, or leave the flag out"
        )
