"""Run the training loop: step, log, validate, keep the best, save, and resume after any interruption."""

import logging
import math
import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from runtime import distributed
from runtime.gpus import GIB
from runtime.interruption import StopRequest
from runtime.progress import duration
from training.data import TrainingData
from training.run_folder import Place, Run, open_run
from training.saving import (
    REMEDY,
    Autosave,
    CheckpointNames,
    Checkpoints,
    Progress,
    load_state,
    save_state,
)
from training.schedule import Precision
from training.step import Stepper, Task
from training.terminal import Pace, log_opening, most_memory
from utils import DiskError, Stopped, UserError, format_metric

logger = logging.getLogger(__name__)

# Only log files show learning rate and memory, because a bar of 80 columns has no room for them.
BAR_FORMAT = "{desc} |{bar}| {n_fmt}/{total_fmt}{postfix}"
READ_EVERY = 10  # steps between two reads of the losses, because each read waits for the device
# After this many skipped steps in a row, the scale of the loss is a millionth of its value before, and does not help.
MOST_SKIPPED = 20


def train_in(
    place: Place,
    task: Task,
    data: TrainingData,
    flags: Any,
    *,
    precision: Precision,
    stop: StopRequest,
) -> None:
    """Open the run in a `Place`, and train it for all epochs with a `Trainer`."""
    names = CheckpointNames.of(flags.script, data.benchmark)
    checkpoints = Checkpoints(place.folder, names, place.settings.on_disk(), flags)
    log_opening(data, task, flags, precision=precision, place=place)
    run = open_run(place, data, flags, weights=checkpoints.first_choice())
    Trainer(task, flags, run, checkpoints=checkpoints, precision=precision, stop=stop).fit()


class Trainer:
    """Trains the task of a stage as its flags request.

    A run whose folder contains a state is resumed from it. With the same machine and packages, the result equals the
    result of an uninterrupted run.

    Args:
        flags: flags of the training run.
        run: the claimed run folder.
        stop: request to stop, obeyed between two steps.

    Attributes:
        progress: progress of the run, which a state contains.
    """

    def __init__(
        self,
        task: Task,
        flags: Any,
        run: Run,
        *,
        checkpoints: Checkpoints,
        precision: Precision,
        stop: StopRequest,
    ) -> None:
        self.task = task
        self.flags = flags
        self.run = run
        self.checkpoints = checkpoints
        self.stepper = Stepper(task, flags, precision)
        self.device = precision.device
        self.pace = Pace(task, flags, precision.device)
        self.autosave = Autosave(stop, flags.checkpoint_every_minutes)
        self.progress = Progress()
        self.counted_at = time.monotonic()  # time at which the run's duration was last updated
        self.unread: list[Tensor] = []  # losses still on the device
        self.saved = "the beginning: none was saved yet"

    def fit(self) -> None:
        """Train to the end, and log the saved files and the best values.

        Raises:
            UserError: the loss or a similarity is not finite, too many steps in a row are skipped, or the disk is full.
            Stopped: a signal requested it; the state is saved.
        """
        try:
            with self.run.locked():
                self.resume()
                try:
                    while self.progress.epoch < self.flags.num_epochs:
                        self.run_epoch()
                finally:
                    self.checkpoints.write()
                self.finish()
        except DiskError as error:
            raise UserError(
                f"{error}; the last good state is {self.saved}; resume with: {self.run.resume_command}"
            ) from None
        except KeyboardInterrupt:
            logger.warning(
                "the last saved state is %s; resume with: %s", self.saved, self.run.resume_command
            )
            raise

    def run_epoch(self) -> None:
        """Train an epoch, or the rest of it, validate if due, and record both."""
        start = time.monotonic()
        progress = self.progress
        epoch = progress.epoch
        loss = self.train_one_epoch()
        self.run.record("train", epoch, {"train_epoch_loss": loss, **self.task.loss.report()})
        if self.stepper.scaler.is_enabled():
            scale = self.stepper.scaler.get_scale()
            scaling = {"loss_scale": scale, "skipped_steps": len(progress.skipped)}
            self.run.record("loss_scaling", epoch, scaling)
        if self.task.router:
            self.run.record("router", epoch, self.task.router(self.stepper.measured))
        validated = epoch in self.flags.validated_epochs
        metrics = self.validate() if validated else {}
        self.checkpoints.update(epoch, metrics, self.stepper.measured)
        if validated:
            self.run.draw(self.spent())
            taken = f"{time.monotonic() - start:.1f} s; {self.status(epoch + 1, 0)}"
            logger.info(
                "epoch %d: loss %.4f, %s, %s", epoch, loss, self.best_so_far(metrics), taken
            )
            self.pace.clock.restart()
        progress.epoch = epoch + 1
        progress.losses = []
        progress.skipped = []
        self.save_if_due(epoch_ends=True)

    def train_one_epoch(self) -> float:
        """Take the remaining steps of an epoch; return the mean loss of all its steps.

        Raises:
            UserError: a loss is not finite, or too many steps in a row are skipped; the message contains epoch and
                step.
        """
        self.checkpoints.hold()
        self.stepper.model.train()
        epoch = self.progress.epoch
        done = len(self.progress.losses)
        steps = self.task.steps
        if not done:
            self.mine()
        batches = self.task.batches(epoch, done)
        pace = self.pace
        hidden = None if distributed.is_main() else True
        bar = tqdm(
            batches,
            f"epoch {epoch}",
            steps,
            initial=done,
            leave=False,
            disable=hidden,
            bar_format=BAR_FORMAT,
        )
        with pace.stepping(), bar:
            for step, (inputs, target_ids) in enumerate(bar, start=done + 1):
                of_step = self.stepper.step(inputs, target_ids)
                self.count_step(of_step, skipped=self.stepper.skipped)
                pace.count_step(len(target_ids))
                if step % READ_EVERY == 0 or pace.clock.is_due():
                    loss = f"loss {self.read_losses():.4f}"
                    bar.set_postfix_str(", ".join([loss, *pace.speed(epoch, step)]))
                    if pace.clock.is_due():
                        if bar.disable:
                            status = f"{loss}, {self.status(epoch, step)}"
                            logger.info("epoch %d, step %d of %d: %s", epoch, step, steps, status)
                        pace.clock.restart()
                self.save_if_due()
            return self.read_losses()

    def mine(self) -> None:
        """Refresh the hard negatives at the start of an epoch. Only a single process can be stopped during this."""
        if self.task.negatives is None:
            return
        try:
            self.task.negatives.refresh(self.progress.epoch)
        except Stopped:
            self.save_if_due()  # saves the state from before mining
            raise

    def validate(self) -> dict[str, float]:
        """Validate and record the metrics. An error message contains the epoch.

        Only a single process can be stopped during a validation.
        """
        epoch = self.progress.epoch
        if distributed.world_size() > 1:
            # torchrun kills its processes half a minute after a signal, so save a due state before the validation.
            self.save_if_due(epoch_ends=True)
        try:
            with self.pace.validating():
                metrics = self.task.validate(self.stepper.measured)
        except Stopped:
            self.save_if_due()  # saves the state from before the validation
            raise
        except UserError as error:
            raise UserError(f"validation after epoch {epoch}: {error}") from None
        self.run.record("validation", epoch, metrics)
        return metrics

    def count_step(self, loss: Tensor, *, skipped: bool) -> None:
        """Count a completed step. Its loss stays on the device until `read_losses`.

        Raises:
            UserError: loss scaling has skipped too many steps in a row.
        """
        progress = self.progress
        step = len(progress.losses) + len(self.unread)
        self.unread.append(loss)
        if not skipped:
            progress.skipped_in_a_row = 0
            return
        progress.skipped.append(step)
        progress.skipped_in_a_row += 1
        if progress.skipped_in_a_row == MOST_SKIPPED:
            raise UserError(
                f"{MOST_SKIPPED} steps in a row were skipped because of non-finite gradients, most recently at epoch "
                f"{progress.epoch}, step {step}: {self.remedy}"
            )

    def read_losses(self) -> float:
        """Read the losses from the device; return the mean so far, NaN if there are none.

        A loss that is not finite is left out of the mean if its step was skipped.

        Raises:
            UserError: a loss is not finite although its step was not skipped.
        """
        progress = self.progress
        for value in torch.stack(self.unread).tolist() if self.unread else []:
            step = len(progress.losses)
            if not math.isfinite(value) and step not in progress.skipped:
                raise UserError(
                    f"the loss is {value} at epoch {progress.epoch}, step {step}: {self.remedy}"
                )
            progress.losses.append(value)
        self.unread.clear()
        finite = [value for value in progress.losses if math.isfinite(value)]
        return sum(finite) / len(finite) if finite else math.nan

    @property
    def remedy(self) -> str:
        """Return the remedy for losses or gradients that are not finite."""
        scales = self.stepper.scaler.is_enabled()
        return "lower the learning rate" + (" or choose --precision bf16" if scales else "")

    def status(self, epoch: int, done: int) -> str:
        """Return the speed as text, see `Pace.status`."""
        rate = float(self.stepper.learning_rate.get_last_lr()[0])
        return self.pace.status(rate, epoch=epoch, done=done)

    def best_so_far(self, metrics: dict[str, float]) -> str:
        """Return as text the metrics that select checkpoints, each with its best value so far."""
        parts = []
        for name, value in self.checkpoints.best.items():
            parts.append(f"{name} {format_metric(metrics[name])} (best {format_metric(value)})")
        return ", ".join(parts)

    def spent(self) -> dict[str, str]:
        """Update the run's time and memory; return its start, training time and peak memory as text."""
        progress = self.progress
        now = time.monotonic()
        progress.seconds += now - self.counted_at
        self.counted_at = now
        progress.most_memory = max(progress.most_memory, most_memory(self.device) or 0)
        told = {}
        if progress.began:
            told["began"] = time.strftime("%Y-%m-%d %H:%M", time.localtime(progress.began))
        told["took"] = duration(progress.seconds)
        if progress.most_memory:
            told["most memory"] = f"{progress.most_memory / GIB:.1f} GiB"
        return told

    def save_if_due(self, *, epoch_ends: bool = False) -> None:
        """Save the state if it is due. If a stop was requested, save the state and raise Stopped."""
        stopping, due = self.autosave.vote(epoch_ends=epoch_ends)
        if stopping or due:
            self.save()
        if stopping:
            requested = self.autosave.stop.requested or "another process"
            raise Stopped(requested, f"resume with: {self.run.resume_command}")

    def save(self) -> None:
        """Save the best weights that are not on disk yet, then the state, which refers to them."""
        with self.autosave.saving():
            self.read_losses()
            self.checkpoints.write()
            self.progress.rows = self.run.rows
            self.progress.best = self.checkpoints.best
            self.spent()
            if distributed.is_main():
                save_state(self.run.state_file, self.stepper.parts, self.progress, self.device)
        self.saved = self.progress.words

    def resume(self) -> None:
        """Restore the state in the run's folder, if it exists.

        Raises:
            UserError: the state is damaged, or belongs to another training run.
        """
        file = self.run.state_file
        if file.exists():
            self.progress = load_state(file, self.stepper.parts, self.device)
            if (
                self.progress.epoch > self.flags.num_epochs
                or len(self.progress.losses) > self.task.steps
            ):
                raise UserError(f"--resume: {file} is from a longer training run: {REMEDY}")
            self.saved = self.progress.words
            logger.info("resuming after %s", self.saved)
        else:
            self.progress.began = time.time()
        self.run.rewind(self.progress.rows)
        self.checkpoints.rewind(self.progress.best)

    def finish(self) -> None:
        """Complete the run, and log its folder, files and best values."""
        self.run.complete(self.checkpoints.best, self.spent())
        logger.info("\nrun: %s", self.run.folder)
        for path in self.checkpoints.saved:
            logger.info("saved: %s", path)
        for name, value in self.checkpoints.best.items():
            logger.info("best %s = %s", name, format_metric(value))
