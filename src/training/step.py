"""One exact step of learning: the gradient of the global batch's loss, in as little memory as asked for."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from runtime import distributed
from training.losses import Loss
from training.schedule import Precision


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """Adds the gradient of the global batch's loss to the parameters of a model and of its loss.

    With a micro-batch the features' graph is never held for more rows than that: gradient caching (Gao et al. 2021,
    arXiv 2101.06983). Features are computed without graph, the loss gives its gradient with respect to them and to its
    own parameters, and each chunk is encoded again with graph to carry its part on. The sum of the parts is the plain
    step's gradient, if encoding is deterministic: no dropout, no batch statistics.

    Attributes:
        model: inputs -> normalised queries (b, D) and targets (b, D); `distributed.parallel` has wrapped it.
        scaler: scales the loss; that of `precision`.
        micro_batch: rows in memory at a time, None for all.
        penalty: what is added to the loss, from a third output of the model; not with micro-batches.
    """

    model: nn.Module
    loss: Loss
    precision: Precision
    scaler: torch.amp.GradScaler
    micro_batch: int | None = None
    penalty: Callable[[Tensor], Tensor] | None = None

    def add(self, inputs: list[Tensor], target_ids: Tensor) -> Tensor:
        """Return the loss of this rank's rows (b, ...) and all others, without penalty and graph."""
        if self.micro_batch is None or self.micro_batch >= len(inputs[0]):
            loss = self._of_all_rows(inputs, target_ids)
        else:
            loss = self._of_micro_batches(inputs, target_ids, self.micro_batch)
        distributed.average_gradients(self.loss)
        return loss

    def _of_all_rows(self, inputs: list[Tensor], target_ids: Tensor) -> Tensor:
        with self.precision.autocast():
            queries, targets, *others = self.model(*inputs)
            loss = self.loss(queries, targets, target_ids)
            whole = loss if self.penalty is None else loss + self.penalty(*others)
        self._scaled(whole).backward()
        return loss.detach()

    def _of_micro_batches(
        self, inputs: list[Tensor], target_ids: Tensor, micro_batch: int
    ) -> Tensor:
        chunks = list(zip(*(tensor.split(micro_batch) for tensor in inputs), strict=True))
        with torch.no_grad(), self.precision.autocast():
            encoded = [self.model(*chunk) for chunk in chunks]
        features = [torch.cat(parts).requires_grad_() for parts in zip(*encoded, strict=True)]
        with self.precision.autocast():
            loss = self.loss(*features, target_ids)
        self._scaled(loss).backward()
        gradients = []
        for feature in features:
            # A bank's loss does not depend on the batch's targets.
            gradient = torch.zeros_like(feature) if feature.grad is None else feature.grad
            gradients.append(gradient.split(micro_batch))
        parts = list(zip(chunks, *gradients, strict=True))
        for number, (chunk, *chunk_gradients) in enumerate(parts, start=1):
            is_last = number == len(parts)
            with contextlib.nullcontext() if is_last else self._unsynced():
                with self.precision.autocast():
                    outputs = self.model(*chunk)
                _backward_from(outputs, chunk_gradients)
        return loss.detach()

    def _scaled(self, loss: Tensor) -> Tensor:
        """The loss as its gradient is taken: parallel modules average over ranks what has to be summed."""
        return self.scaler.scale(loss * distributed.world_size())

    def _unsynced(self) -> contextlib.AbstractContextManager:
        """Let a parallel module keep its gradients to itself; the last chunk shares the sum of all."""
        if isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()


def _backward_from(features: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Carry the loss's gradient with respect to features on to the parameters that they were made with."""
    learned = []
    learned_gradients = []
    for feature, gradient in zip(features, gradients, strict=True):
        if feature.requires_grad:
            learned.append(feature)
            learned_gradients.append(gradient)
    torch.autograd.backward(learned, learned_gradients)
