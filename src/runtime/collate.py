"""Stack images in data-loader workers and pass them on in shared memory, or in files if shared memory is too small."""

import mmap
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from runtime import torchrun

SHARED_MEMORY = Path("/dev/shm")  # on Linux; only 64 MB by default in a container


def batch_room(workers: int) -> float:
    """Return the bytes of shared memory that a batch may use, given the free shared memory.

    Args:
        workers: number of data-loader workers of this process; with 0, no batch is passed between
            processes.
    """
    if workers == 0 or sys.platform != "linux":
        return float("inf")
    if not os.access(SHARED_MEMORY, os.W_OK):
        return 0
    # Each worker prefetches two batches, the model works with one, and the next is sent to the GPU.
    batches = 2 * workers + 2
    half = shutil.disk_usage(SHARED_MEMORY).free / 2  # NCCL and others use shared memory too
    return half / batches / torchrun.local_world_size()


class Collate:
    """Collate function for image tensors, each alone or with a text.

    Args:
        room: maximum size in bytes of a batch in shared memory; a larger batch is passed on in a
            file.
    """

    def __init__(self, room: float) -> None:
        self.room = room

    def __call__(self, items: list[Any]) -> Any:
        if isinstance(items[0], Tensor):
            return self._stack(items)
        pixels, texts = zip(*items, strict=True)
        return [self._stack(pixels), list(texts)]

    def _stack(self, tensors: Sequence[Tensor]) -> Any:
        if len(tensors) * tensors[0].nbytes <= self.room:
            return default_collate(list(tensors))
        return TensorInFile(torch.stack(list(tensors)))


class TensorInFile:
    """A tensor of bytes in a temporary file; pickled to another process, it becomes a tensor again.

    The file has no name, so nothing of it is left when a process is killed. torch's sharing
    strategy "file_system" would not help, because its files are in shared memory too.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.shape = tensor.shape
        with tempfile.TemporaryFile() as file:
            file.write(tensor.contiguous().numpy().data)
            file.flush()
            self.descriptor = reduction.DupFd(file.fileno())

    def __reduce__(self) -> tuple:
        return _mapped, (self.descriptor, self.shape)


def _mapped(descriptor: Any, shape: torch.Size) -> Tensor:
    """Map a file of bytes into memory as a tensor. Changes of the tensor do not change the file."""
    with open(descriptor.detach(), "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return torch.frombuffer(content, dtype=torch.uint8).view(shape)
