"""How far a training is, and when its state is saved."""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields

import torch
from torch import Tensor

from runtime import distributed
from runtime.interruption import StopRequest
from training.checkpoints import Checkpoints
from training.run import AnyRun
from training.state import Stateful, load_state, save_state
from utils import Stopped, UserError, two_decimals

logger = logging.getLogger(__name__)

SAVING_SHARE = 0.05  # of the time, which saving at the end of epochs may take
# Steps in a row, after which the scale of the loss is a millionth of what it was, and of no help.
MOST_SKIPPED = 20
# Of several processes, on whether to stop or to save: seconds from vote to vote, and steps at most.
VOTE_EVERY = 1.0
MOST_STEPS = 100


@dataclass
class Progress:
    """How far a training is.

    Attributes:
        epoch: the one that is trained or, if `losses` has all of its steps, to be validated.
        losses: of the steps that the epoch has had; only those of skipped steps may be infinite or NaN.
        skipped: the steps of the epoch that loss scaling skipped, from 0.
        skipped_in_a_row: how many were skipped since the last one that was not, earlier epochs included.
        rows, best: see `Run` and `Checkpoints`.
    """

    epoch: int = 0
    losses: list[float] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    skipped_in_a_row: int = 0
    rows: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)


class Autosave:
    """Saves the state of a training when it is due, and when a stop was asked for.

    It is due after some minutes, between any two steps, and at the end of an epoch as long as saving takes no more than
    a small share of the time.

    Args:
        parts: all that steps change.
        minutes: the longest time that a crash may cost.
    """

    def __init__(
        self,
        *,
        run: AnyRun,
        checkpoints: Checkpoints,
        parts: Mapping[str, Stateful],
        device: torch.device,
        stop: StopRequest,
        minutes: float,
    ) -> None:
        self.run = run
        self.checkpoints = checkpoints
        self.parts = parts
        self.device = device
        self.stop = stop
        self.seconds = 60 * minutes
        self.remedy = "lower the learning rate"
        if "scaler" in parts:
            self.remedy += " or choose --precision bf16"
        self.progress = Progress()
        self.unread: list[Tensor] = []  # losses that are still on the device
        self.voted_at = time.monotonic()
        self.steps = 0  # since the last vote
        self.next_vote = 1  # how many steps after the last vote, the same on all processes
        self.saved_at = time.monotonic()
        self.cost = 0.0  # seconds that the last saving took
        self.saved = "the beginning: none was saved yet"

    def resume(self) -> Progress:
        """Put back the state that the run's folder has, if it has one; returns the progress that is saved from now.

        Raises:
            UserError: it is damaged, or another training's.
        """
        if self.run.state_file.exists():
            stored = load_state(self.run.state_file, self.parts, self.device)
            known = {field.name for field in fields(Progress)}
            self.progress = Progress(**{name: stored[name] for name in known & stored.keys()})
            self._name_saved()
            logger.info("going on after %s", self.saved)
        self.run.rewind(self.progress.rows)
        self.checkpoints.rewind(self.progress.best)
        return self.progress

    def save_if_due(self, epoch_ends: bool = False) -> None:
        """Save the state if it is due. If a stop was asked for, save it and raise Stopped.

        Called after each step, and where an epoch ends. Several processes have to agree, which takes a wait for the
        slowest: at the end of epochs, and about once a second.
        """
        if not epoch_ends:
            self.steps += 1
            if distributed.world_size() > 1 and self.steps < self.next_vote:
                return
        stopping, due = self._vote(epoch_ends)
        if stopping or due:
            self.save()
        if stopping:
            raise Stopped(
                self.stop.requested or "another process", f"go on with: {self.run.resume_command}"
            )

    def _vote(self, epoch_ends: bool) -> tuple[bool, bool]:
        """Whether any process was told to stop, and whether the main one is to save; also sets the next vote."""
        now = time.monotonic()
        since = now - self.saved_at
        due = since >= self.seconds or (epoch_ends and since * SAVING_SHARE >= self.cost)
        next_vote = self.next_vote
        if self.steps:
            in_time = int(VOTE_EVERY * self.steps / max(now - self.voted_at, 1e-9))
            # A GPU is handed its first steps before it has taken the time for them: no more than twice as many.
            next_vote = max(1, min(in_time, 2 * next_vote, MOST_STEPS))
        is_main = distributed.is_main()
        stopping, saving, self.next_vote = distributed.highest(
            bool(self.stop.signal_name()), is_main and due, is_main and next_vote
        )
        self.voted_at = now
        self.steps = 0
        return bool(stopping), bool(saving)

    def save(self) -> None:
        """Save the best weights that are not on disk yet, then the state, which names them."""
        start = time.monotonic()
        self.read_losses()
        self.checkpoints.write()
        self.progress.rows = self.run.rows
        self.progress.best = self.checkpoints.best
        if distributed.is_main():
            save_state(self.run.state_file, self.parts, asdict(self.progress), self.device)
        self._name_saved()
        self.saved_at = time.monotonic()
        self.cost = self.saved_at - start

    def count_step(self, loss: Tensor, *, skipped: bool) -> None:
        """Count a step that is done. Its loss stays on the device until `read_losses`.

        Raises:
            UserError: loss scaling has skipped too many in a row.
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
                f"{MOST_SKIPPED} steps in a row were skipped because their gradients are not finite, the last at "
                f"epoch {progress.epoch}, step {step}: {self.remedy}"
            )

    def read_losses(self) -> float:
        """Take the losses off the device; returns the mean so far, NaN where there is none.

        A loss that is not finite is left out of the mean if its step was skipped.

        Raises:
            UserError: such a loss of another step.
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

    def finish(self) -> None:
        """Say where the files are and what was best; a complete run needs no state."""
        self.run.complete(self.checkpoints.best)
        logger.info("\nrun: %s", self.run.folder)
        for path in self.checkpoints.saved:
            logger.info("saved: %s", path)
        for name, value in self.checkpoints.best.items():
            logger.info("best %s = %s", name, two_decimals(value))

    def _name_saved(self) -> None:
        self.saved = f"epoch {self.progress.epoch}, step {len(self.progress.losses)}"
