"""Communicate between processes: ranks, shards, and gathering in order. With a single process, nothing is sent."""

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from runtime import torchrun


def local_device() -> str:
    """Return the device of this process: the GPU with its local rank, or the CPU."""
    return f"cuda:{torchrun.local_rank()}" if torch.cuda.is_available() else "cpu"


def start(device: torch.device) -> None:
    """Join the other processes that torchrun started, by NCCL on GPUs and Gloo on CPUs."""
    if torchrun.launched() and not dist.is_initialized():
        # With NCCL, tensors on CPUs still use Gloo, so that asking whether to stop does not wait for a GPU.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2)
        )


def stop() -> None:
    """Leave the process group, at the end of a script."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Return the rank of this process, 0 .. world_size() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Check whether this is the main process, which alone writes files."""
    return rank() == 0


def wait_for_all() -> None:
    """Wait until every process has called this function."""
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def first_on_machine() -> Iterator[None]:
    """Let one process per machine run the context first, for example to download files for the others."""
    first = torchrun.local_rank() == 0
    if not first:
        wait_for_all()
    yield
    if first:
        wait_for_all()


def gather_rows(local: Tensor) -> Tensor:
    """Gather the rows of all ranks in order, (b, ...) -> (world_size * b, ...).

    Only this rank's own rows have a gradient.
    """
    if world_size() == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(parts, local.detach().contiguous())
    parts[rank()] = local
    return torch.cat(parts)


def in_equal_parts(value: Tensor | float) -> Tensor | float:
    """Return the value; its gradient is divided by the number of ranks, because each rank computes the whole of it."""
    if isinstance(value, Tensor) and value.requires_grad:
        value.register_hook(lambda gradient: gradient / world_size())
    return value


def average_gradients(module: nn.Module) -> None:
    """Average the gradients over the ranks, for a module that `parallel` does not wrap."""
    if world_size() == 1:
        return
    for parameter in module.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= world_size()


def shard(items: list) -> list:
    """Return this rank's contiguous part of a list. Parts are equal, but the last ranks may get fewer items or none."""
    each = -(-len(items) // world_size())
    return items[rank() * each : (rank() + 1) * each]


def gather_shards(local: Tensor) -> Tensor:
    """Gather the rows of all ranks in the order of the ranks, which may have different numbers of rows.

    Args:
        local: this rank's rows. Every rank must call this function.
    """
    if world_size() == 1:
        return local
    lengths = [torch.zeros(1, dtype=torch.long, device=local.device) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor([len(local)], device=local.device))
    longest = max(int(n) for n in lengths)
    padded = local.new_zeros(longest, *local.shape[1:])
    padded[: len(local)] = local
    parts = gather_rows(padded).split(longest)
    return torch.cat([part[: int(n)] for part, n in zip(parts, lengths, strict=True)])


def from_main(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """Return the main rank's tensor, or None, on the device of every rank."""
    if world_size() == 1:
        return tensor if tensor is None else tensor.to(device)
    kind = same_object(None if tensor is None else (tensor.shape, tensor.dtype))
    if kind is None:
        return None
    shape, dtype = kind
    received = (
        torch.empty(shape, dtype=dtype, device=device) if tensor is None else tensor.to(device)
    )
    dist.broadcast(received, 0)
    return received


def same_object(value: Any) -> Any:
    """Return the main rank's plain object on every rank; it is sent between CPUs, so that no rank waits for a GPU."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]


def gathered_lines(lines: list[str]) -> list[str]:
    """Gather the texts of all ranks in order, between CPUs. Texts must not be empty or contain line breaks."""
    if world_size() == 1:
        return lines
    local = "".join(f"{line}\n" for line in ["", *lines])  # `frombuffer` rejects an empty buffer
    sent = torch.frombuffer(bytearray(local.encode()), dtype=torch.uint8)
    text = gather_shards(sent).numpy().tobytes().decode()
    return [line for line in text.split("\n") if line]


def highest(*numbers: int) -> tuple[int, ...]:
    """Return the maximum over the ranks of each number."""
    if world_size() == 1:
        return numbers
    shared = torch.tensor(numbers, dtype=torch.int32)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return tuple(shared.tolist())


def parallel(module: nn.Module, device: torch.device, some_unused: bool = False) -> nn.Module:
    """Wrap a module so that its gradients are averaged over the ranks; return the module itself for a single process.

    Args:
        some_unused: whether a step may leave parameters without a gradient, such as those of
            experts without rows.
    """
    if world_size() == 1:
        return module
    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(
        module, device_ids=devices, broadcast_buffers=False, find_unused_parameters=some_unused
    )
