"""The epoch loop: step, log, validate, keep the best, and be able to go on after any interruption."""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from runtime import distributed
from runtime.interruption import StopRequest
from training import contrastive
from training.autosave import Keeper, Stateful
from training.checkpoints import Checkpoints
from training.run import Run
from training.schedule import Precision, Regime
from utils import DiskError, Stopped, UserError

logger = logging.getLogger(__name__)

READ_EVERY = 10  # steps between two looks at the losses: each look waits for the device


@dataclass(frozen=True)
class Task:
    """What a stage learns.

    Attributes:
        batches: epoch, first step -> the epoch's batches from there on: the model's inputs (b, ...) and the targets'
            ids (b,).
        steps: batches in an epoch.
        model: inputs -> normalised queries (b, D), targets (b, D), and whatever `penalty` takes.
        optimizer: of the parameters that learn.
        validate: metrics of the weights as they are.
        module: the weights that learn.
        averaged: their exponential moving average; None without averaging.
        penalty: what is added to the loss; None for nothing.
        router: statistics of the mixture's router; None without a mixture.
    """

    batches: Callable[[int, int], Iterable[tuple[list[Tensor], Tensor]]]
    steps: int
    model: nn.Module
    optimizer: Optimizer
    validate: Callable[[], dict[str, float]]
    module: nn.Module
    averaged: AveragedModel | None = None
    penalty: Callable[[Tensor], Tensor] | None = None
    router: Callable[[], dict[str, float]] | None = None


def trainable(model: nn.Module, device: torch.device, compiled: bool, some_unused: bool = False) -> nn.Module:
    """The model, compiled if asked for, and parallel if there are several processes (see `distributed.parallel`)."""
    return distributed.parallel(torch.compile(model) if compiled else model, device, some_unused)


def average(module: nn.Module, decay: float | None) -> AveragedModel | None:
    """A copy of the module that will follow it as an exponential moving average; None without a decay."""
    return None if decay is None else AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay))


class Stepper:
    """One optimizer step after another, with all that surrounds it."""

    def __init__(self, task: Task, regime: Regime, precision: Precision) -> None:
        self.task, self.regime, self.precision = task, regime, precision
        self.scaler = precision.scaler()
        steps = task.steps * regime.num_epochs
        self.learning_rate = LambdaLR(task.optimizer, lambda step: regime.factor(step, steps))

    @property
    def parts(self) -> dict[str, Stateful]:
        """All that steps change."""
        task = self.task
        parts = {"module": task.module, "optimizer": task.optimizer, "schedule": self.learning_rate}
        parts |= {"scaler": self.scaler} if self.scaler.is_enabled() else {}
        return parts | ({"average": task.averaged} if task.averaged else {})

    def step(self, inputs: list[Tensor], target_ids: Tensor) -> Tensor:
        """Learn from a batch; returns its loss without the penalty, still on the device."""
        optimizer = self.task.optimizer
        optimizer.zero_grad(set_to_none=True)
        ids = target_ids if self.regime.mask_duplicate_targets else None
        mixed = self.precision.autocast, self.scaler.scale
        loss = contrastive.backward(
            self.task.model, inputs, ids, self.regime.micro_batch_size, *mixed, self.task.penalty
        )
        if self.regime.clip_grad_norm is not None:
            self.scaler.unscale_(optimizer)
            learned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(learned, self.regime.clip_grad_norm)
        self.scaler.step(optimizer)
        self.scaler.update()
        self.learning_rate.step()
        if self.task.averaged is not None:
            self.task.averaged.update_parameters(self.task.module)
        return loss


def fit(
    task: Task,
    regime: Regime,
    precision: Precision,
    run: Run,
    checkpoints: Checkpoints,
    stop: StopRequest,
    minutes: float,
) -> None:
    """Train, validate, and at the end say where the files are and what was best.

    A run whose folder has a state goes on from there; with the same machine and packages it ends as if it had never
    been interrupted.

    Raises:
        UserError: the loss or a similarity is not finite, or the disk is full.
        Stopped: a signal asked for it; the state is saved.
    """
    stepper = Stepper(task, regime, precision)
    keeper = Keeper(run, checkpoints, stepper.parts, precision.device, stop, minutes)
    try:
        with run.locked():
            progress = keeper.resume()
            while progress.epoch < regime.num_epochs:
                run_epoch(task, stepper, keeper, regime)
            keeper.finish()
    except DiskError as error:
        raise UserError(f"{error}; the last good state is {keeper.saved}; go on with: {run.resume_command}") from None
    except KeyboardInterrupt:
        logger.warning("the last saved state is %s; go on with: %s", keeper.saved, run.resume_command)
        raise


def run_epoch(task: Task, stepper: Stepper, keeper: Keeper, regime: Regime) -> None:
    """One epoch with its records, or what is left of it."""
    start, run, progress = time.monotonic(), keeper.run, keeper.progress
    epoch = progress.epoch
    loss = train_one_epoch(task, stepper, keeper)
    run.record("train", epoch, {"train_epoch_loss": loss})
    if task.router:
        run.record("router", epoch, task.router())
    if epoch % regime.validation_frequency == 0:
        metrics = _validate(task, keeper)
        run.record("validation", epoch, metrics)
        keeper.checkpoints.update(epoch, metrics)
        run.draw()
        logger.info(_line(epoch, loss, metrics, keeper.checkpoints.best, time.monotonic() - start))
    progress.epoch, progress.losses = epoch + 1, []
    keeper.look(epoch_ends=True)


def train_one_epoch(task: Task, stepper: Stepper, keeper: Keeper) -> float:
    """What is left of one pass over an epoch's batches; returns the mean loss of all triplets seen.

    Raises:
        UserError: a loss that is not finite; the message names epoch and step.
    """
    task.model.train()
    epoch, done = keeper.progress.epoch, len(keeper.progress.losses)
    shown = None if distributed.is_main() else True
    batches = task.batches(epoch, done)
    with tqdm(batches, f"epoch {epoch}", task.steps, initial=done, leave=False, disable=shown) as bar:
        for step, (inputs, target_ids) in enumerate(bar, start=done + 1):
            keeper.unread.append(stepper.step(inputs, target_ids))
            if step % READ_EVERY == 0:
                bar.set_postfix(loss=f"{keeper.read_losses():.4f}")
            keeper.look()
    return keeper.read_losses()


def _validate(task: Task, keeper: Keeper) -> dict[str, float]:
    """Metrics after an epoch; an error names it, and a stop needs not wait for them."""
    if distributed.world_size() > 1:
        keeper.look(epoch_ends=True)  # they cannot stop in a validation, and torchrun waits for half a minute
    try:
        return task.validate()
    except Stopped:
        keeper.look()  # the state before the validation
        raise
    except UserError as error:
        raise UserError(f"validation after epoch {keeper.progress.epoch}: {error}") from None


def _line(epoch: int, loss: float, metrics: dict[str, float], best: dict[str, float], seconds: float) -> str:
    """One line for a validation: the metrics that choose checkpoints, with their best so far."""
    chosen = ", ".join(f"{name} {metrics[name]:.2f} (best {value:.2f})" for name, value in best.items())
    return f"epoch {epoch}: loss {loss:.4f}, {chosen}, {seconds:.1f} s"
