"""Copy batches to a device; a GPU receives the next batch while it works on the one before."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


def on_device(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """Move the tensors of batches to a device. A GPU receives the next batch while it works on the one before."""
    if device.type != "cuda":
        for batch in batches:
            yield _each_tensor(batch, lambda tensor: tensor.to(device))
        return
    sending = torch.cuda.Stream(device)
    working = torch.cuda.current_stream(device)

    def to_gpu(tensor: Tensor) -> Tensor:
        sent = tensor.to(device, non_blocking=True)
        # The sending stream owns the memory, and must not reuse it before the working stream has read it.
        sent.record_stream(working)
        return sent

    def send(batch: Any) -> tuple[Any, torch.cuda.Event]:
        with torch.cuda.stream(sending):
            return _each_tensor(batch, to_gpu), sending.record_event()

    for batch, arrival in one_ahead(map(send, batches)):
        working.wait_event(arrival)
        yield batch


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items in order, each after the next item has been read from the iterable."""
    taken: list[Item] = []
    for item in items:
        taken.append(item)
        if len(taken) > 1:
            yield taken.pop(0)
    yield from taken


def _each_tensor(batch: Any, change: Callable[[Tensor], Any]) -> Any:
    """Apply a function to the tensors of a batch, which is a tensor or a list of tensors and texts."""
    if isinstance(batch, Tensor):
        return change(batch)
    return [change(part) if isinstance(part, Tensor) else part for part in batch]
