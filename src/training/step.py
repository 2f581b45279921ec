"""One exact step of learning: the global batch's gradient, in as little memory as asked for, and the move along it."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from models.lean_clip import folded, folded_to_learn
from runtime import distributed
from training.losses import Loss
from training.negatives import HardNegatives
from training.saving import Stateful
from training.schedule import Precision, learning_rate_factor

# The model's inputs (b, ...) each, and the targets' ids (b,), with N hard negatives (b, 1 + N).
Batch = tuple[list[Tensor], Tensor]
# Epoch, first step -> the epoch's batches from there on.
Batches = Callable[[int, int], Iterable[Batch]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Task of a stage for the trainer.

    Attributes:
        batches, steps: an epoch's batches, and how many.
        model: inputs -> normalised queries (b, D), targets (b, D) or with hard negatives (b, 1 + N, D), and whatever
            `penalty` takes.
        module: the weights that learn, a part of the model; they or their moving average are validated and kept.
        loss: of queries, targets and the targets' ids.
        optimizer: of the parameters that learn, those of the loss too.
        validate: metrics of such weights.
        micro_batch: rows in memory at a time, None for all.
        penalty: what is added to the loss; None for nothing.
        router: statistics of a mixture's router; None without a mixture.
        negatives: the hard negatives of its batches; None without any.
        images_each: images that a step reads for a triplet; 0 where it has their features.
    """

    batches: Batches
    steps: int
    model: nn.Module
    module: nn.Module
    loss: Loss
    optimizer: Optimizer
    validate: Callable[[Any], dict[str, float]]
    micro_batch: int | None = None
    penalty: Callable[[Tensor], Tensor] | None = None
    router: Callable[[Any], dict[str, float]] | None = None
    negatives: HardNegatives | None = None
    images_each: int = 0


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """Adds the gradient of the global batch's loss to the parameters of a model and of its loss.

    With a micro-batch the features' graph is never held for more rows than that: gradient caching (Gao et al. 2021,
    arXiv 2101.06983). Features are computed without graph, the loss gives its gradient with respect to them and to its
    own parameters, and each chunk is encoded again with graph to carry its part on. The sum of the parts is the plain
    step's gradient, if encoding is deterministic: no dropout, no batch statistics.

    Attributes:
        model: of a `Task`; `distributed.parallel` has wrapped it.
        scaler: scales the loss; that of `precision`.
        micro_batch: rows in memory at a time, None for all.
        penalty: what is added to the loss, from a third output of the model; not with micro-batches.
        folds: whether micro-batches share the weights that carry others, see `lean_clip`; False for a compiled model,
            which would be compiled with and without them.
    """

    model: nn.Module
    loss: Loss
    precision: Precision
    scaler: torch.amp.GradScaler
    micro_batch: int | None = None
    penalty: Callable[[Tensor], Tensor] | None = None
    folds: bool = True

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
        with torch.no_grad(), self.precision.autocast(), self._folded():
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
        *parts, last = zip(chunks, *gradients, strict=True)
        with self._unsynced(), self._folded_to_learn():
            for chunk, *chunk_gradients in parts:
                self._carry_on(chunk, chunk_gradients)
        # Makes what it needs of all weights, which a parallel module shares with the gradients of this chunk.
        chunk, *chunk_gradients = last
        self._carry_on(chunk, chunk_gradients)
        return loss.detach()

    def _carry_on(self, chunk: tuple[Tensor, ...], gradients: Sequence[Tensor]) -> None:
        """Encode a chunk with graph, and carry the loss's gradient with respect to its features on."""
        with self.precision.autocast():
            outputs = self.model(*chunk)
        _backward_from(outputs, gradients)

    def _folded(self) -> contextlib.AbstractContextManager[None]:
        if not self.folds:
            return contextlib.nullcontext()
        return folded(self.model, self.precision.dtype)

    def _folded_to_learn(self) -> contextlib.AbstractContextManager[None]:
        return folded_to_learn(self.model) if self.folds else contextlib.nullcontext()

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


class MovingAverage(AveragedModel):
    """An exponential moving average of a module's parameters, which follows them without a wait for the device.

    `AveragedModel` copies its count of updates to the device at every one, and all buffers. Here buffers stay as they
    are: no training changes any (BatchNorm keeps its statistics).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__(module)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Go a step towards the module's parameters; the first time, take them over."""
        ours: list[Tensor] = list(self.module.parameters())
        theirs: list[Tensor] = list(model.parameters())
        if self.n_averaged:
            torch._foreach_lerp_(ours, theirs, 1 - self.decay)
        else:
            torch._foreach_copy_(ours, theirs)
        self.n_averaged += 1


class Stepper:
    """One optimizer step after another, with all that surrounds it: scaling, clipping, learning rate, moving average.

    Args:
        flags: of a training.

    Attributes:
        model: the task's, compiled if asked for, and parallel if there are several processes.
        measured: the weights to validate and keep: those that learn, or their moving average.
        skipped: whether the last step moved nothing, because its gradients overflowed under loss scaling.
    """

    def __init__(self, task: Task, flags: Any, precision: Precision) -> None:
        self.task = task
        self.flags = flags
        self.precision = precision
        self.averaged = None
        self.measured = task.module
        if flags.ema_decay is not None:
            self.averaged = MovingAverage(task.module, flags.ema_decay)
            self.measured = self.averaged.module
        # A module again, which its types do not say.
        model = cast(nn.Module, torch.compile(task.model)) if flags.compile else task.model
        # Experts without rows have no gradient.
        self.model = distributed.parallel(model, precision.device, task.router is not None)
        self.scaler = precision.scaler()
        # A function, of which a state holds nothing.
        self.learning_rate = LambdaLR(task.optimizer, lambda step: self._factor(step))
        self.skipped = False

    @property
    def parts(self) -> dict[str, Stateful]:
        """All that steps change."""
        parts: dict[str, Stateful] = {
            "module": self.task.module,
            "optimizer": self.task.optimizer,
            "schedule": self.learning_rate,
        }
        if self.scaler.is_enabled():
            parts["scaler"] = self.scaler
        if self.averaged is not None:
            parts["average"] = self.averaged
        if self.task.loss.state_dict():
            parts["loss"] = self.task.loss
        if self.task.negatives is not None:
            parts["negatives"] = self.task.negatives
        return parts

    def step(self, inputs: list[Tensor], target_ids: Tensor) -> Tensor:
        """Learn from a batch; return its loss without the penalty, still on the device."""
        optimizer = self.task.optimizer
        optimizer.zero_grad(set_to_none=True)
        gradient = Gradient(
            model=self.model,
            loss=self.task.loss,
            precision=self.precision,
            scaler=self.scaler,
            micro_batch=self.task.micro_batch,
            penalty=self.task.penalty,
            folds=not self.flags.compile,
        )
        loss = gradient.add(inputs, target_ids)
        if self.flags.clip_grad_norm is not None:
            self.scaler.unscale_(optimizer)
            groups = [group["params"] for group in optimizer.param_groups]
            learned = list(itertools.chain.from_iterable(groups))
            nn.utils.clip_grad_norm_(learned, self.flags.clip_grad_norm)
        self.skipped = not self._move()
        if not self.skipped:
            self.learning_rate.step()
            if self.averaged is not None:
                self.averaged.update_parameters(self.task.module)
        return loss

    def _factor(self, step: int) -> float:
        """Return the factor of the learning rate at a step."""
        return learning_rate_factor(
            step,
            self.task.steps * self.flags.num_epochs,
            warmup_steps=self.flags.warmup_steps,
            cosine=self.flags.cosine,
        )

    def _move(self) -> bool:
        """Move the weights; False if loss scaling skipped that, which costs a wait for the device to know.

        All processes have the same gradients by now, so they skip the same steps.
        """
        scaler = self.scaler
        if not scaler.is_enabled():
            self.task.optimizer.step()
            return True
        one = torch.ones((), device=self.precision.device)
        before = scaler.scale(one)
        scaler.step(self.task.optimizer)
        scaler.update()
        # A skipped step halves the scale, or leaves it 0.
        return bool(scaler.scale(one) > before / 2)
