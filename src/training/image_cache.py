"""Cache decoded images: preprocessed bytes in a memory-mapped file.

The name of the file contains a digest of everything that the bytes depend on. The file is a NumPy array followed by a
digest of each block of images, and a training run verifies these digests when it opens the file.
"""

import functools
import hashlib
import io
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from data_utils import ImageLoader, Reader
from runtime import distributed
from runtime.files import file_size, free_bytes, made_beside, sweep
from runtime.gpus import GIB
from runtime.image_source import IMAGES
from runtime.progress import Counter
from utils import PROJECT_ROOT, DiskError, UserError, first_line

logger = logging.getLogger(__name__)

PIXELS = PROJECT_ROOT / "pixels"  # folder of the caches that are created automatically
DECODED_AT_ONCE = 64  # number of images
REPAYS = 20_000  # least number of decodings that an automatic cache must save: minutes of one core
FORM = 2  # version of the file format, part of the digest in the file's name
BLOCK = DECODED_AT_ONCE  # number of images that share a digest
DIGEST = 32  # length of a SHA-256 digest in bytes
READ_AT_ONCE = 2**20  # number of bytes
MOST_THREADS = 8  # maximum number of threads that compute digests


class CachedImages:
    """Reader of cached images: image file -> its preprocessed bytes (3, R, R).

    Raises:
        UserError: the file's header or size does not fit a complete cache of this shape.
    """

    def __init__(self, file: Path, paths: list[Path], shape: tuple[int, ...]) -> None:
        self.arguments = (file, paths, shape)
        self.row_of = {path: row for row, path in enumerate(paths)}
        header = _header(shape)
        self.end = len(header) + math.prod(shape)
        size = self.end + DIGEST * len(_blocks(shape))
        found = file_size(file)
        if found != size:
            raise _damaged(file, f"{found or 0:,} bytes instead of {size:,}")
        try:
            with open(file, "rb") as stream:
                if stream.read(len(header)) != header:
                    raise _damaged(file, f"its header does not match the shape {shape}")
            self.pixels = np.memmap(file, np.uint8, mode="r", offset=len(header), shape=shape)
        except OSError as error:
            raise _damaged(file, first_line(error)) from None

    def __reduce__(self) -> tuple:
        """Let worker processes reopen the file, because pickling a memory map copies all of its data."""
        return CachedImages, self.arguments

    def __call__(self, path: Path) -> Tensor:
        return torch.from_numpy(self.pixels[self.row_of[path]].copy())

    def check(self, key: str) -> Iterator[int]:
        """Compare the images of a cache with their digests, and yield the number of images of each block compared.

        Raises:
            UserError: some images are not the images written under this key, or cannot be read.
        """
        file, _, shape = self.arguments
        blocks = _blocks(shape)
        offset = self.end - math.prod(shape)
        digest = functools.partial(_digest_on_disk, file, offset, math.prod(shape[1:]), key)
        threads = ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1))
        try:
            with open(file, "rb") as stream:
                stream.seek(self.end)
                written = [stream.read(DIGEST) for _ in blocks]
            for block, now, then in zip(blocks, threads.map(digest, blocks), written, strict=True):
                if now != then:
                    images = f"images {block.start:,} to {block.stop - 1:,}"
                    raise _damaged(file, f"{images} have changed since they were written")
                yield len(block)
        except OSError as error:
            raise _damaged(file, first_line(error)) from None
        finally:
            threads.shutdown(cancel_futures=True)


def _blocks(shape: tuple[int, ...]) -> list[range]:
    """Return the ranges of array rows that share a digest."""
    count = shape[0]
    return [range(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]


def _digest(key: str, parts: Iterable[bytes | memoryview]) -> bytes:
    """Return the SHA-256 of a cache's key and some of its images. The key reveals a file renamed from another cache."""
    digest = hashlib.sha256(key.encode())
    for part in parts:
        digest.update(part)
    return digest.digest()


def _digest_on_disk(file: Path, offset: int, each: int, key: str, block: range) -> bytes:
    """Return the digest of a block of images in a file.

    Args:
        offset: position of the file's first image, in bytes.
        each: size of an image, in bytes.
    """
    with open(file, "rb") as stream:
        stream.seek(offset + each * block.start)
        size = each * len(block)
        sizes = [min(READ_AT_ONCE, size - done) for done in range(0, size, READ_AT_ONCE)]
        return _digest(key, map(stream.read, sizes))


def _header(shape: tuple[int, ...]) -> bytes:
    """Return the header of a NumPy file for an array of bytes of this shape."""
    stream = io.BytesIO()
    about = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, about)
    return stream.getvalue()


def _damaged(file: Path, reason: str) -> UserError:
    return UserError(f"--image-cache: {file} is truncated or damaged ({reason}): delete it")


@dataclass(frozen=True, kw_only=True)
class ImageCache:
    """A cache of decoded images, and its folder.

    Attributes:
        paths: the N image files, without repeats.
        read: decodes a file to (3, R, R) uint8.
        preprocessing: settings that the bytes depend on besides the files: transform, ratio, resolution R, versions.
        workers: number of data-loader workers that decode.
        between: called between two batches; an exception that it raises ends the decoding, and no file is left.
        told_by: how a changed image is recognised, see `runtime.files.stamp`.
    """

    folder: Path
    paths: list[Path]
    read: Reader
    preprocessing: Mapping[str, Any]
    workers: int = 0
    between: Callable[[], None] = lambda: None
    told_by: str = "sample"

    @functools.cached_property
    def key(self) -> str:
        """Return a digest of everything that the bytes depend on: file format, preprocessing and images."""
        content = json.dumps(
            [FORM, self.preprocessing, IMAGES.identities(self.paths, self.told_by)]
        )
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def file(self) -> Path:
        """Return the file of these images, which is named after the key."""
        return self.folder / f"images-{self.preprocessing['resolution']}px-{self.key[:16]}.npy"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Return the shape of the array, (N, 3, R, R)."""
        side = self.preprocessing["resolution"]
        return len(self.paths), 3, side, side

    @property
    def size(self) -> int:
        """Return the size of the images in bytes."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{len(self.paths):,} images, {_gib(self.size)}, in {self.file}"

    def open(self) -> CachedImages:
        """Return the images in the file. If it does not exist, log its size and fill it first.

        Raises:
            UserError: the disk lacks room, or the file is truncated or damaged.
        """
        if distributed.is_main() and not self._is_kept():
            logger.info("image cache: %s", self)
            free = free_bytes(self.folder)
            if self.size > free:
                raise UserError(
                    f"--image-cache {self.folder}: {_gib(self.size)} are needed, but only {_gib(free)} are free: "
                    "free disk space, choose another disk, or remove --image-cache"
                )
            try:
                self._fill()
            except DiskError as error:
                raise UserError(f"--image-cache {self.folder}: {error}") from None
        distributed.wait_for_all()
        return CachedImages(self.file, self.paths, self.shape)

    def open_if_it_repays(self, decodings: int) -> CachedImages | None:
        """Return the images in the file if it exists or is worth filling, otherwise None; log the reason.

        Args:
            decodings: number of image decodings in a training run without a cache.

        Raises:
            UserError: the file is truncated or damaged.
        """
        if distributed.is_main():
            self._fill_if_it_repays(decodings)
        distributed.wait_for_all()
        if not self.file.exists():
            return None
        return CachedImages(self.file, self.paths, self.shape)

    def _fill_if_it_repays(self, decodings: int) -> None:
        if self._is_kept():
            logger.info("image cache: using existing %s; --no-image-cache decodes instead", self)
            return
        saved = max(0, decodings - len(self.paths))
        why_not = ""
        if saved < REPAYS:
            why_not = f"it would save only {saved:,} decodings, fewer than {REPAYS:,}"
        elif (free := free_bytes(self.folder)) < 2 * self.size:
            why_not = f"{_gib(free)} are free, less than twice its size"
        if why_not:
            logger.info("no image cache (%s): %s; see --image-cache", self, why_not)
            return
        why = f"saves {saved:,} of {decodings:,} decodings; --no-image-cache decodes instead"
        logger.info("image cache: %s, %s", self, why)
        try:
            self._fill()
        except DiskError as error:
            logger.warning("warning: no image cache: %s; images are decoded each time", error)

    def _fill(self) -> None:
        """Decode all images into a temporary file, and rename it to `file` when it is complete.

        Raises:
            DiskError: the file cannot be written; no part of it is left.
        """
        blocks = _blocks(self.shape)
        chunks = [self.paths[block.start : block.stop] for block in blocks]
        loader = ImageLoader(self.read, self.workers, torch.device("cpu"))
        digests = []
        with made_beside(self.file) as file:
            _reserve(file, self.size)
            file.write(_header(self.shape))
            with Counter(len(self.paths), "decoding images") as counter:
                for batch in loader.batches(chunks):
                    pixels = np.ascontiguousarray(batch.numpy()).data
                    file.write(pixels)
                    digests.append(_digest(self.key, [pixels]))
                    counter.update(len(batch))
                    self.between()
            file.write(b"".join(digests))

    def _is_kept(self) -> bool:
        """Check whether the file exists and is intact, and delete partial files of killed training runs next to it.

        Raises:
            UserError: the file is truncated or damaged.
        """
        sweep(self.folder, ".images-*.tmp")
        if not self.file.exists():
            return False
        with Counter(len(self.paths), "checking the image cache") as counter:
            for count in CachedImages(self.file, self.paths, self.shape).check(self.key):
                counter.update(count)
                self.between()
        return True


def _reserve(file: IO[bytes], size: int) -> None:
    """Reserve a file's space on the disk now, so that a full disk is reported before anything is decoded."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
