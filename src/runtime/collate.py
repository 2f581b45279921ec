"""Stack what worker processes read, and hand it over: in shared memory, or in a file if shared memory is too small."""

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

SHARED_MEMORY = Path("/dev/shm")  # on Linux; 64 MB in a container, unless it was started with more


def batch_room(workers: int) -> float:
    """Compute how many bytes of shared memory a batch may take, from what is free now.

    Args:
        workers: processes of this one that read; with 0, nothing is handed over.
    """
    if workers == 0 or sys.platform != "linux":
        return float("inf")
    if not os.access(SHARED_MEMORY, os.W_OK):
        return 0
    # Each worker prefetches two batches, the model works with one, and the next is sent to the GPU.
    batches = 2 * workers + 2
    half = shutil.disk_usage(SHARED_MEMORY).free / 2  # the rest is for others, such as NCCL
    return half / batches / torchrun.local_world_size()


class Collate:
    """Stack the tensors of bytes that were read, each of them alone or with a text.

    Args:
        room: bytes of a batch that is handed over in shared memory; a larger one goes in a file.
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
    """Send a tensor of bytes to another process, where it is unpickled as a tensor, in a temporary file.

    The file has no name: nothing is left of it when a process is killed. torch's sharing strategy "file_system" would
    not help, because its files are in shared memory too.
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
    """Map a file of bytes into memory as a tensor. What is changed in the tensor is not changed in the file."""
    with open(descriptor.detach(), "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return torch.frombuffer(content, dtype=torch.uint8).view(shape)
