"""The epoch loop: step, log, validate, keep the best, and be able to go on after any interruption."""

import itertools
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from runtime import distributed
from runtime.interruption import StopRequest
from training.autosave import Autosave, Progress
from training.checkpoints import Checkpoints
from training.losses import Loss
from training.run import AnyRun
from training.schedule import Precision, Schedule
from training.state import REMEDY, Stateful
from training.step import Gradient
from training.terminal import Pace
from utils import DiskError, Stopped, UserError, two_decimals

logger = logging.getLogger(__name__)

READ_EVERY = 10  # steps between two looks at the losses: each look waits for the device

Weights = TypeVar("Weights", bound=nn.Module)
Batch = tuple[list[Tensor], Tensor]  # the model's inputs (b, ...) each, and the targets' ids (b,)
# Epoch, first step -> the epoch's batches from there on.
Batches = Callable[[int, int], Iterable[Batch]]


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


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a stage learns.

    Attributes:
        steps: batches in an epoch.
        model: inputs -> normalised queries (b, D), targets (b, D), and whatever `penalty` takes.
        optimizer: of the parameters that learn, those of the loss too.
        loss: of queries, targets and the targets' ids.
        validate: metrics of the weights as they are.
        module: the weights that learn.
        images_each: images that a step reads for a triplet; 0 where it has their features.
        averaged: their exponential moving average; None without averaging.
        penalty: what is added to the loss; None for nothing.
        router: statistics of the mixture's router; None without a mixture.
    """

    batches: Batches
    steps: int
    model: nn.Module
    loss: Loss
    optimizer: Optimizer
    validate: Callable[[], dict[str, float]]
    module: nn.Module
    images_each: int = 0
    averaged: MovingAverage | None = None
    penalty: Callable[[Tensor], Tensor] | None = None
    router: Callable[[], dict[str, float]] | None = None


def trainable(
    model: nn.Module, device: torch.device, *, compiled: bool, some_unused: bool = False
) -> nn.Module:
    """The model, compiled if asked for, and parallel if there are several processes (see `distributed.parallel`)."""
    if compiled:
        # A module again, which its types do not say.
        model = cast(nn.Module, torch.compile(model))
    return distributed.parallel(model, device, some_unused)


def average(module: nn.Module, decay: float | None) -> MovingAverage | None:
    """A copy of the module that will follow it as an exponential moving average; None without a decay."""
    return None if decay is None else MovingAverage(module, decay)


def measured_weights(module: Weights, averaged: MovingAverage | None) -> Weights:
    """What is measured and kept of a module that learns: itself, or its moving average."""
    return module if averaged is None else cast(Weights, averaged.module)


class Stepper:
    """One optimizer step after another, with all that surrounds it.

    Attributes:
        skipped: whether the last step moved nothing, because its gradients overflowed under loss scaling.
        pace: how fast steps follow each other.
    """

    def __init__(self, task: Task, schedule: Schedule, precision: Precision) -> None:
        self.task = task
        self.schedule = schedule
        self.precision = precision
        self.scaler = precision.scaler()
        self.skipped = False
        steps = task.steps * schedule.num_epochs
        self.learning_rate = LambdaLR(task.optimizer, lambda step: schedule.factor(step, steps))
        self.pace = Pace(schedule, precision.device, steps=task.steps, images_each=task.images_each)

    @property
    def parts(self) -> dict[str, Stateful]:
        """All that steps change."""
        task = self.task
        parts: dict[str, Stateful] = {
            "module": task.module,
            "optimizer": task.optimizer,
            "schedule": self.learning_rate,
        }
        if self.scaler.is_enabled():
            parts["scaler"] = self.scaler
        if task.averaged is not None:
            parts["average"] = task.averaged
        if task.loss.state_dict():
            parts["loss"] = task.loss
        return parts

    def step(self, inputs: list[Tensor], target_ids: Tensor) -> Tensor:
        """Learn from a batch; returns its loss without the penalty, still on the device."""
        optimizer = self.task.optimizer
        optimizer.zero_grad(set_to_none=True)
        gradient = Gradient(
            model=self.task.model,
            loss=self.task.loss,
            precision=self.precision,
            scaler=self.scaler,
            micro_batch=self.schedule.micro_batch_size,
            penalty=self.task.penalty,
        )
        loss = gradient.add(inputs, target_ids)
        if self.schedule.clip_grad_norm is not None:
            self.scaler.unscale_(optimizer)
            groups = [group["params"] for group in optimizer.param_groups]
            learned = list(itertools.chain.from_iterable(groups))
            nn.utils.clip_grad_norm_(learned, self.schedule.clip_grad_norm)
        self.skipped = not self._move()
        if not self.skipped:
            self.learning_rate.step()
            if self.task.averaged is not None:
                self.task.averaged.update_parameters(self.task.module)
        return loss

    def status(self, epoch: int, done: int) -> str:
        """How fast it goes, see `Pace.status`."""
        rate = float(self.learning_rate.get_last_lr()[0])
        return self.pace.status(rate, epoch=epoch, done=done)

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


def fit(
    task: Task,
    *,
    schedule: Schedule,
    precision: Precision,
    run: AnyRun,
    checkpoints: Checkpoints,
    stop: StopRequest,
    minutes: float,
) -> None:
    """Train, validate, and at the end say where the files are and what was best.

    A run whose folder has a state goes on from there; with the same machine and packages it ends as if it had never
    been interrupted.

    Args:
        minutes: the longest time that a crash may cost, see `Autosave`.

    Raises:
        UserError: the loss or a similarity is not finite, every step is skipped, or the disk is full.
        Stopped: a signal asked for it; the state is saved.
    """
    stepper = Stepper(task, schedule, precision)
    autosave = Autosave(
        run=run,
        checkpoints=checkpoints,
        parts=stepper.parts,
        device=precision.device,
        stop=stop,
        minutes=minutes,
    )
    try:
        with run.locked():
            progress = autosave.resume()
            _check_progress(progress, task, schedule)
            try:
                while progress.epoch < schedule.num_epochs:
                    run_epoch(task, stepper, autosave)
            finally:
                checkpoints.write()
            autosave.finish()
    except DiskError as error:
        raise UserError(
            f"{error}; the last good state is {autosave.saved}; go on with: {run.resume_command}"
        ) from None
    except KeyboardInterrupt:
        logger.warning(
            "the last saved state is %s; go on with: %s", autosave.saved, run.resume_command
        )
        raise


def _check_progress(progress: Progress, task: Task, schedule: Schedule) -> None:
    """Raise UserError where a state is further than the training goes."""
    limits = {"epoch": schedule.num_epochs, "losses": task.steps, "skipped": len(progress.losses)}
    steps = max(progress.skipped, default=-1) + 1
    reached = {"epoch": progress.epoch, "losses": len(progress.losses), "skipped": steps}
    for name, most in limits.items():
        if reached[name] > most:
            raise UserError(
                f"--resume: progress.{name} of state.pt is at {reached[name]}, beyond {most}: {REMEDY}"
            )


def run_epoch(task: Task, stepper: Stepper, autosave: Autosave) -> None:
    """One epoch with its records, or what is left of it."""
    start = time.monotonic()
    run = autosave.run
    progress = autosave.progress
    epoch = progress.epoch
    loss = train_one_epoch(task, stepper, autosave)
    run.record("train", epoch, {"train_epoch_loss": loss, **task.loss.report()})
    if stepper.scaler.is_enabled():
        scaling = {
            "loss_scale": stepper.scaler.get_scale(),
            "skipped_steps": len(progress.skipped),
        }
        run.record("loss_scaling", epoch, scaling)
    if task.router:
        run.record("router", epoch, task.router())
    if epoch % stepper.schedule.validation_frequency == 0:
        with stepper.pace.validating():
            metrics = _validate(task, autosave)
        run.record("validation", epoch, metrics)
        autosave.checkpoints.update(epoch, metrics)
        run.draw()
        best = _best_so_far(metrics, autosave.checkpoints.best)
        taken = f"{time.monotonic() - start:.1f} s"
        status = stepper.status(epoch + 1, 0)
        logger.info("epoch %d: %s", epoch, f"loss {loss:.4f}, {best}, {taken}; {status}")
        stepper.pace.clock.restart()
    progress.epoch = epoch + 1
    progress.losses = []
    progress.skipped = []
    autosave.save_if_due(epoch_ends=True)


def train_one_epoch(task: Task, stepper: Stepper, autosave: Autosave) -> float:
    """What is left of one pass over an epoch's batches; returns the mean loss of all triplets seen.

    Raises:
        UserError: a loss that is not finite, or too many skipped steps in a row; the message names epoch and step.
    """
    autosave.checkpoints.hold()
    task.model.train()
    epoch = autosave.progress.epoch
    done = len(autosave.progress.losses)
    hidden = None if distributed.is_main() else True
    batches = task.batches(epoch, done)
    pace = stepper.pace
    with (
        pace.stepping(),
        tqdm(
            batches, f"epoch {epoch}", task.steps, initial=done, leave=False, disable=hidden
        ) as bar,
    ):
        for step, (inputs, target_ids) in enumerate(bar, start=done + 1):
            loss = stepper.step(inputs, target_ids)
            autosave.count_step(loss, skipped=stepper.skipped)
            pace.count_step(len(target_ids))
            if step % READ_EVERY == 0 or pace.clock.is_due():
                status = f"loss {autosave.read_losses():.4f}, {stepper.status(epoch, step)}"
                bar.set_postfix_str(status)
                if pace.clock.is_due():
                    if bar.disable:
                        logger.info("epoch %d, step %d of %d: %s", epoch, step, task.steps, status)
                    pace.clock.restart()
            autosave.save_if_due()
        return autosave.read_losses()


def _validate(task: Task, autosave: Autosave) -> dict[str, float]:
    """Metrics after an epoch. An error says after which; one process alone can be stopped while it validates."""
    if distributed.world_size() > 1:
        # Several cannot, and torchrun waits for half a minute before it kills: the state is saved now.
        autosave.save_if_due(epoch_ends=True)
    try:
        return task.validate()
    except Stopped:
        autosave.save_if_due()  # the state before the validation
        raise
    except UserError as error:
        raise UserError(f"validation after epoch {autosave.progress.epoch}: {error}") from None


def _best_so_far(metrics: dict[str, float], best: dict[str, float]) -> str:
    """The metrics that select checkpoints, each with its best value so far."""
    parts = [
        f"{name} {two_decimals(metrics[name])} (best {two_decimals(value)})"
        for name, value in best.items()
    ]
    return ", ".join(parts)
