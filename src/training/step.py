"""Take an exact training step: the gradient of the global batch, in little memory if requested, and the update."""

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

# Model inputs, each (b, ...), and target ids: (b,), or (b, 1 + N) with N hard negatives.
Batch = tuple[list[Tensor], Tensor]
# Epoch, first step -> the batches of the epoch from that step on.
Batches = Callable[[int, int], Iterable[Batch]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A stage as the trainer needs it.

    Attributes:
        batches, steps: the batches of an epoch, and their number.
        model: inputs -> normalised queries (b, D), targets (b, D) or with hard negatives (b, 1 + N, D), and any inputs
            of `penalty`.
        module: the part of the model with the trainable weights; these or their moving average are validated and saved.
        loss: loss of queries, targets and target ids.
        optimizer: optimizer of all trainable parameters, including the loss's parameters.
        validate: computes the metrics of such weights.
        micro_batch: number of rows in memory at a time, None for all.
        penalty: computes an addition to the loss; None for no addition.
        router: computes the statistics of a mixture's router; None without a mixture.
        negatives: hard negatives in the batches; None without any.
        images_each: number of images that a step reads for each triplet; 0 if it reads features.
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

    With micro-batches, the computation graph never covers more than one micro-batch: gradient caching (Gao et al. 2021,
    arXiv 2101.06983). All features are first computed without a graph, and the loss gives its gradient with respect to
    them and to its own parameters. Each micro-batch is then encoded again with a graph, to backpropagate its part of
    the gradient. The sum is the gradient of a plain step if encoding is deterministic: no dropout, no batch statistics.

    Attributes:
        model: model of a `Task`, wrapped by `distributed.parallel`.
        scaler: loss scaler of `precision`.
        micro_batch: number of rows in memory at a time, None for all.
        penalty: computes an addition to the loss from the third output of the model; not supported with micro-batches.
        folds: whether micro-batches share derived weights, see `lean_clip`; False for a compiled model, which would be
            compiled with and without them.
    """

    model: nn.Module
    loss: Loss
    precision: Precision
    scaler: torch.amp.GradScaler
    micro_batch: int | None = None
    penalty: Callable[[Tensor], Tensor] | None = None
    folds: bool = True

    def add(self, inputs: list[Tensor], target_ids: Tensor) -> Tensor:
        """Add the gradient of a batch, given as this process's rows (b, ...); return its loss without the penalty."""
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
        nothing = contextlib.nullcontext()
        shared = folded(self.model, self.precision.dtype) if self.folds else nothing
        with torch.no_grad(), self.precision.autocast(), shared:
            encoded = [self.model(*chunk) for chunk in chunks]
        features = [torch.cat(parts).requires_grad_() for parts in zip(*encoded, strict=True)]
        with self.precision.autocast():
            loss = self.loss(*features, target_ids)
        self._scaled(loss).backward()
        gradients = []
        for feature in features:
            # The loss of a bank does not depend on the batch's targets.
            gradient = torch.zeros_like(feature) if feature.grad is None else feature.grad
            gradients.append(gradient.split(micro_batch))
        *parts, last = zip(chunks, *gradients, strict=True)
        model = self.model
        # The last chunk synchronises the sum of all chunks' gradients.
        unsynced = model.no_sync() if isinstance(model, DistributedDataParallel) else nothing
        with unsynced, folded_to_learn(model) if self.folds else nothing:
            for chunk, *chunk_gradients in parts:
                self._carry_on(chunk, chunk_gradients)
        # The last chunk folds nothing, so all weights take part, and a parallel module synchronises all gradients.
        chunk, *chunk_gradients = last
        self._carry_on(chunk, chunk_gradients)
        return loss.detach()

    def _carry_on(self, chunk: tuple[Tensor, ...], gradients: Sequence[Tensor]) -> None:
        """Encode a chunk with a graph, and backpropagate the loss's gradient with respect to its features."""
        with self.precision.autocast():
            outputs = self.model(*chunk)
        learned = []
        learned_gradients = []
        for feature, gradient in zip(outputs, gradients, strict=True):
            if feature.requires_grad:
                learned.append(feature)
                learned_gradients.append(gradient)
        torch.autograd.backward(learned, learned_gradients)

    def _scaled(self, loss: Tensor) -> Tensor:
        """Return the loss, scaled for the backward pass.

        The number of processes is one factor, because parallel modules average gradients that should be summed.
        """
        return self.scaler.scale(loss * distributed.world_size())


class MovingAverage(AveragedModel):
    """Exponential moving average of a module's parameters, updated without waiting for the device.

    At each update, `AveragedModel` copies its update counter to the device, and all buffers. Here buffers stay as they
    are, because training changes none (BatchNorm keeps its statistics).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__(module)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average towards the module's parameters; the first update copies them."""
        ours: list[Tensor] = list(self.module.parameters())
        theirs: list[Tensor] = list(model.parameters())
        if self.n_averaged:
            torch._foreach_lerp_(ours, theirs, 1 - self.decay)
        else:
            torch._foreach_copy_(ours, theirs)
        self.n_averaged += 1


class Stepper:
    """Takes optimizer steps, with loss scaling, gradient clipping, learning-rate schedule and moving average.

    Args:
        flags: flags of a training run.

    Attributes:
        model: the task's model, compiled if requested, and parallel if there are several processes.
        measured: the weights to validate and save: the trained weights or their moving average.
        skipped: whether the last step changed nothing, because its gradients overflowed under loss scaling.
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
        # The result is a module, but torch.compile's annotation does not promise it.
        model = cast(nn.Module, torch.compile(task.model)) if flags.compile else task.model
        # With a mixture, experts without rows have no gradient.
        self.model = distributed.parallel(model, precision.device, task.router is not None)
        self.scaler = precision.scaler()
        # LambdaLR saves callable objects in its state, but not functions.
        self.learning_rate = LambdaLR(
            task.optimizer,
            lambda step: learning_rate_factor(
                step,
                task.steps * flags.num_epochs,
                warmup_steps=flags.warmup_steps,
                cosine=flags.cosine,
            ),
        )
        self.skipped = False

    @property
    def parts(self) -> dict[str, Stateful]:
        """Return all objects that steps change, by name."""
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
        """Train on a batch; return its loss without the penalty, still on the device."""
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

    def _move(self) -> bool:
        """Update the weights. Return False if loss scaling skipped the update, which waits for the device.

        All processes have the same gradients at this point, so they skip the same steps.
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
