"""The epoch loop: step, log, validate, keep the best, and be able to go on after any interruption."""

import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import contrastive
import distributed
from checkpoints import Checkpoints
from experiment import Run
from interruption import StopRequest
from regime import Precision, Regime
from snapshot import Stateful, load_state, save_state
from utils import DiskError, Stopped, UserError

logger = logging.getLogger(__name__)

READ_EVERY = 10  # steps between two looks at the losses: each look waits for the device
SAVING_SHARE = 0.05  # of the time, which saving the state at the end of epochs may take


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
        parts = {"module": task.module, "optimizer": task.optimizer}
        parts |= {"scaler": self.scaler, "schedule": self.learning_rate}
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


@dataclass
class Progress:
    """How far a training is.

    Attributes:
        epoch: the one that is trained or, if `losses` has all of its steps, to be validated.
        losses: of the steps that the epoch has had.
        rows, best: see `Run` and `Checkpoints`.
    """

    epoch: int = 0
    losses: list[float] = field(default_factory=list)
    rows: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)


class Keeper:
    """Saves the state of a training when it is due, and when a stop was asked for.

    It is due after some minutes, between any two steps, and at the end of an epoch as long as saving takes no more than
    a small share of the time.

    Args:
        minutes: the longest time that a crash may cost.
    """

    def __init__(self, run: Run, stepper: Stepper, checkpoints: Checkpoints, stop: StopRequest, minutes: float) -> None:
        self.run, self.stepper, self.checkpoints, self.stop = run, stepper, checkpoints, stop
        self.seconds = 60 * minutes
        self.progress = Progress()
        self.unread: list[Tensor] = []  # losses that are still on the device
        self.saved_at, self.cost = time.monotonic(), 0.0
        self.saved = "the beginning: none was saved yet"

    def resume(self) -> Progress:
        """Put back the state that the run's folder has, if it has one; returns the progress that this keeper saves."""
        device = self.stepper.precision.device
        if self.run.state_file.exists():
            self.progress = Progress(**load_state(self.run.state_file, self.stepper.parts, device))
            self._name_saved()
            logger.info("going on after %s", self.saved)
        self.run.rewind(self.progress.rows)
        self.checkpoints.rewind(self.progress.best)
        return self.progress

    def look(self, epoch_ends: bool = False) -> None:
        """Save the state if it is due. If a stop was asked for, save it and raise Stopped."""
        since = time.monotonic() - self.saved_at
        due = since >= self.seconds or (epoch_ends and since * SAVING_SHARE >= self.cost)
        stopping, due = distributed.any_rank(bool(self.stop.requested), due and distributed.is_main())
        if stopping or due:
            self.save()
        if stopping:
            raise Stopped(self.stop.requested or "another process", f"go on with: {self.run.resume_command}")

    def save(self) -> None:
        """Save the state."""
        start = time.monotonic()
        self.read_losses()
        self.progress.rows, self.progress.best = self.run.rows, self.checkpoints.best
        if distributed.is_main():
            save_state(self.run.state_file, self.stepper.parts, asdict(self.progress), self.stepper.precision.device)
        self._name_saved()
        self.saved_at = time.monotonic()
        self.cost = self.saved_at - start

    def read_losses(self) -> float:
        """Take the losses off the device; returns their mean so far. One that is not finite stops the run."""
        losses = self.progress.losses
        for value in torch.stack(self.unread).tolist() if self.unread else []:
            if not math.isfinite(value):
                epoch, step = self.progress.epoch, len(losses)
                raise UserError(f"the loss is {value} at epoch {epoch}, step {step}: lower the learning rate")
            losses.append(value)
        self.unread.clear()
        return sum(losses) / max(1, len(losses))

    def finish(self) -> None:
        """Say where the files are and what was best; a complete run needs no state."""
        if distributed.is_main():
            self.run.complete(self.checkpoints.best)
        logger.info("\nrun: %s", self.run.folder)
        for path in self.checkpoints.saved:
            logger.info("saved: %s", path)
        for name, value in self.checkpoints.best.items():
            logger.info("best %s = %.2f", name, value)

    def _name_saved(self) -> None:
        self.saved = f"epoch {self.progress.epoch}, step {len(self.progress.losses)}"


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
    keeper = Keeper(run, stepper, checkpoints, stop, minutes)
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
