"""Several processes as one: ranks, shards, and features gathered in order. With one process all of it does nothing."""

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
    """The device of this process among those of its machine."""
    return f"cuda:{torchrun.local_rank()}" if torch.cuda.is_available() else "cpu"


def start(device: torch.device) -> None:
    """Join the other processes that torchrun started: NCCL on GPUs, Gloo on CPUs."""
    if torchrun.launched() and not dist.is_initialized():
        # Gloo for what lies on CPUs, beside NCCL too: asking each other whether to stop must not wait for a GPU.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2)
        )


def stop() -> None:
    """Leave the other processes, at the end of a script."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 .. world_size() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Tell whether this is the one process that writes."""
    return rank() == 0


def wait_for_all() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def first_on_machine() -> Iterator[None]:
    """Let one process of each machine go ahead, as to download what the others then find there."""
    first = torchrun.local_rank() == 0
    if not first:
        wait_for_all()
    yield
    if first:
        wait_for_all()


def gather_rows(local: Tensor) -> Tensor:
    """The rows of all ranks in order, (b, ...) -> (world_size * b, ...); this rank's own carry their gradient."""
    if world_size() == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(parts, local.detach().contiguous())
    parts[rank()] = local
    return torch.cat(parts)


def in_equal_parts(value: Tensor | float) -> Tensor | float:
    """The value; a gradient of it is divided by the number of ranks, each of which computes all that comes of it."""
    if isinstance(value, Tensor) and value.requires_grad:
        value.register_hook(lambda gradient: gradient / world_size())
    return value


def average_gradients(module: nn.Module) -> None:
    """Average the gradients of a module that is not wrapped by `parallel` over the ranks."""
    if world_size() == 1:
        return
    for parameter in module.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= world_size()


def shard(items: list) -> list:
    """This rank's contiguous part of a list; ranks take equal parts, the last ones one less or none."""
    each = -(-len(items) // world_size())
    return items[rank() * each : (rank() + 1) * each]


def gather_shards(local: Tensor) -> Tensor:
    """The rows of all ranks in order, from parts of different lengths. Runs on every rank.

    Args:
        local: this rank's rows; the parts follow one another in the order of the ranks.
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
    """The main rank's tensor, on every rank's device."""
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
    """The main rank's plain object, on every rank; sent between CPUs, so that none waits for a GPU."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]


def gathered_lines(lines: list[str]) -> list[str]:
    """The texts of all ranks in order, none of them empty or with line breaks; sent between CPUs."""
    if world_size() == 1:
        return lines
    local = "".join(f"{line}\n" for line in ["", *lines])  # of each rank something
    sent = torch.frombuffer(bytearray(local.encode()), dtype=torch.uint8)
    text = gather_shards(sent).numpy().tobytes().decode()
    return [line for line in text.split("\n") if line]


def highest(*numbers: int) -> tuple[int, ...]:
    """The highest that any rank has of each number."""
    if world_size() == 1:
        return numbers
    shared = torch.tensor(numbers, dtype=torch.int32)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return tuple(shared.tolist())


def parallel(module: nn.Module, device: torch.device, some_unused: bool = False) -> nn.Module:
    """The module with its gradients averaged over the ranks; the module itself where there is one process.

    Args:
        some_unused: whether a step may leave parameters without a gradient, as experts without rows are.
    """
    if world_size() == 1:
        return module
    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(
        module, device_ids=devices, broadcast_buffers=False, find_unused_parameters=some_unused
    )
