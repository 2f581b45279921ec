"""Save a training run: checkpoints of its weights, and the state from which it is resumed."""

import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from pydantic import AllowInfNan, ConfigDict, NonNegativeInt
from torch import Tensor, nn

from benchmarks import Benchmark, best_of
from models.adapters import merged_state
from runtime import distributed
from runtime.files import write_same
from runtime.interruption import StopRequest
from runtime.schema import Schema, checked
from runtime.tensors import load_tensors, save_tensors
from utils import UserError

SAVING_SHARE = 0.05  # maximum share of the run time spent on saving at the end of epochs
# Several processes vote on stopping and saving: seconds between two votes, and maximum number of steps.
VOTE_EVERY = 1.0
MOST_STEPS = 100
REMEDY = "delete it to restart the run"

AnyFloat = Annotated[float, AllowInfNan(True)]  # allows the losses of skipped steps
Metrics = dict[str, float]


# Checkpoints


@dataclass(frozen=True, kw_only=True)
class CheckpointNames:
    """Names of the checkpoints of a stage.

    Attributes:
        key: the key of the weights in a checkpoint, "CLIP" or "Combiner".
        prefix: prefix of the file names of epochs: `{prefix}_{epoch}.pt`.
        best: metric -> name of the checkpoint with its best value.
    """

    key: str
    prefix: str
    best: Mapping[str, str]

    @classmethod
    def of(cls, script: str, benchmark: Benchmark) -> "CheckpointNames":
        """Return the names of the stage that a script trains."""
        if script == "clip_fine_tune.py":
            return cls(key="CLIP", prefix="tuned_clip", best=benchmark.best_clips())
        return cls(key="Combiner", prefix="combiner", best=benchmark.best_combiners())


class Snapshot:
    """The weights of a validated epoch, shared with the module until `hold` copies them."""

    def __init__(self, epoch: int, weights: dict[str, Tensor], metrics: Metrics) -> None:
        self.epoch = epoch
        self.weights = weights
        self.metrics = metrics
        self.held = False

    def hold(self) -> None:
        """Copy the weights to the CPU, before a step changes them."""
        if not self.held:
            for name, weight in self.weights.items():
                self.weights[name] = weight.to("cpu", copy=True)
            self.held = True


class Validated(Schema):
    """A checkpoint with the metrics of its validation."""

    metrics: Metrics


class Checkpoints:
    """Checkpoints of a run: the best by each of some metrics, chosen epochs, or none.

    Writing may take longer than an epoch, so the best weights are written only together with the state of the run, and
    before it: a state never refers to best weights that are not on disk. Until then, the writing process keeps them in
    CPU memory, with one copy of the weights for each epoch that is the best by some metric.

    Attributes:
        best: metric -> its best value, even if no weights are saved.

    Args:
        folder: the run folder.
        config: settings in plain types that record how the weights were made.
        flags: flags of the training run.
    """

    def __init__(
        self, folder: Path, names: CheckpointNames, config: dict[str, Any], flags: Any
    ) -> None:
        self.folder = folder / "saved_models"
        self.names = names
        self.config = config
        self.flags = flags
        self.best: Metrics = {}
        self._unwritten: dict[str, Snapshot] = {}  # metric -> best snapshot, not on disk yet

    @property
    def saved(self) -> list[Path]:
        """Return the existing files of weights."""
        return sorted(self.folder.glob("*.pt"))

    def first_choice(self, epoch: int | None = None) -> Path | None:
        """Return the weights to evaluate first when the run is complete; None if no weights are saved.

        Args:
            epoch: epoch to choose if no best weights are saved; None for the last saved epoch.
        """
        if self.flags.save_training and self.flags.save_best:
            return self._file(next(iter(self.names.best.values())))
        kept = [own for own in self.flags.saved_epochs if epoch in (None, own)]
        return self._file_of_epoch(kept[-1]) if kept else None

    def update(self, epoch: int, metrics: Metrics, module: nn.Module) -> None:
        """Update the best values and weights after a validation; metrics are {} after an epoch without one.

        Weights of epochs in `saved_epochs` are saved now, regardless of their metrics.
        """
        improved = []
        chosen_by = {metric: metrics[metric] for metric in self.names.best} if metrics else {}
        for metric, value in chosen_by.items():
            before = self.best.get(metric)
            if before is None or best_of(metric)(before, value) != before:
                self.best[metric] = value
                improved.append(metric)
        if not distributed.is_main():
            return
        snapshot = Snapshot(epoch, merged_state(module), chosen_by)
        if self.flags.save_training and self.flags.save_best:
            self._unwritten |= dict.fromkeys(improved, snapshot)
        if epoch in self.flags.saved_epochs:
            self._save(self._file_of_epoch(epoch), snapshot)

    def hold(self) -> None:
        """Copy the best weights that are not on disk yet, before a step changes them."""
        for snapshot in self._unwritten.values():
            snapshot.hold()

    def write(self) -> None:
        """Write the best weights that are not on disk yet, only once if an epoch is the best by several metrics.

        Raises:
            DiskError: a file could not be written.
        """
        files: dict[int, Path] = {}
        for metric, snapshot in self._unwritten.items():
            file = self._file(self.names.best[metric])
            if snapshot.epoch in files:
                write_same(file, files[snapshot.epoch])
            else:
                self._save(file, snapshot)
                files[snapshot.epoch] = file
        self._unwritten = {}

    def rewind(self, best: Metrics) -> None:
        """Restore the best values of a saved state.

        Best weights that were saved after that state remain the best: training reproduces them, bit for bit on a CPU
        and up to rounding on a GPU.

        Raises:
            UserError: the state or the best weights have other metrics.
        """
        for metric in best:
            if metric not in self.names.best:
                raise UserError(f"--resume: progress.best of state.pt has {metric}: {REMEDY}")
        self.best = dict(best)
        if not (self.flags.save_training and self.flags.save_best):
            return
        for metric, name in self.names.best.items():
            path = self._file(name)
            if path.exists():
                value = _metric(path, metric)
                self.best[metric] = best_of(metric)(value, best.get(metric, value))

    def _save(self, file: Path, snapshot: Snapshot) -> None:
        content = {
            "epoch": snapshot.epoch,
            self.names.key: snapshot.weights,
            "config": self.config,
            "metrics": snapshot.metrics,
        }
        save_tensors(file, content)

    def _file_of_epoch(self, epoch: int) -> Path:
        return self._file(f"{self.names.prefix}_{epoch}")

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.pt"


def _metric(path: Path, name: str) -> float:
    """Return a metric that a checkpoint was saved with. Raises UserError if it is missing or not a number."""
    remedy = "copy the run's folder again"
    content = load_tensors(path)
    metrics = checked(Validated, content, file=f"--resume: {path}", remedy=remedy).metrics
    if name not in metrics:
        raise UserError(f"--resume: {path}: metrics has no {name}: {remedy}")
    return metrics[name]


# The state


class Stateful(Protocol):
    """Interface that modules, optimizers, schedules and scalers share."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> object: ...


class Progress(Schema):
    """Progress of a training run.

    Attributes:
        epoch: epoch that is being trained or, if `losses` is complete, is to be validated.
        losses: losses of the steps taken in the epoch; only skipped steps may have an infinite or NaN loss.
        skipped: indices of the epoch's steps that loss scaling skipped, from 0.
        skipped_in_a_row: number of steps skipped since the last step that was not, including earlier epochs.
        rows, best: see `Run` and `Checkpoints`.
        began: start of the run, in seconds since 1970; 0 in a state of earlier versions.
        seconds: run time over all sessions, without the time after the last saved state of each session.
        most_memory: peak memory over all sessions, in bytes.
    """

    model_config = ConfigDict(frozen=False)

    epoch: NonNegativeInt = 0
    losses: list[AnyFloat] = []
    skipped: list[NonNegativeInt] = []
    skipped_in_a_row: NonNegativeInt = 0
    rows: dict[str, list[dict[str, int | AnyFloat]]] = {}
    best: Metrics = {}
    began: AnyFloat = 0.0
    seconds: AnyFloat = 0.0
    most_memory: int = 0

    @property
    def words(self) -> str:
        """Return the progress as text, for messages."""
        return f"epoch {self.epoch}, step {len(self.losses)}"


def save_state(
    file: Path, parts: Mapping[str, Stateful], progress: Progress, device: torch.device
) -> None:
    """Write the state of some parts, all random states and the progress of the run, atomically."""
    states = {name: part.state_dict() for name, part in parts.items()}
    content = {
        "parts": states,
        "random": _random_states(device),
        "progress": progress.model_dump(),
    }
    save_tensors(file, content)


def load_state(file: Path, parts: Mapping[str, Stateful], device: torch.device) -> Progress:
    """Restore the parts and the random states from a file, and return the progress of the run.

    Raises:
        UserError: the file is damaged, or belongs to another training run.
    """
    try:
        content = load_tensors(file)
        stored = content["parts"]
        _set_random_states(content["random"], device)
        for name, part in parts.items():
            if name in stored or name != "scaler":  # a run that started on a CPU has no scaler
                part.load_state_dict(stored[name])
        return checked(Progress, content["progress"], file="progress", remedy="it is damaged")
    except (UserError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, KeyError):
            reason = f"{reason} is missing"
        raise UserError(
            f"--resume: {file} cannot be resumed from ({reason[:200]}): {REMEDY}"
        ) from None


def _random_states(device: torch.device) -> dict[str, Any]:
    """Return the random states of one process, since all processes draw the same numbers for the global batch."""
    states = {"python": random.getstate(), "cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_states(states: dict[str, Any], device: torch.device) -> None:
    random.setstate(states["python"])
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


# When to save


class Autosave:
    """Decides when to save the state of a training run, and whether to stop.

    The state is due after some minutes, between any two steps; at the end of an epoch, it is due if saving takes no
    more than a small share of the run time.

    Args:
        minutes: maximum training time that a crash may cost.
    """

    def __init__(self, stop: StopRequest, minutes: float) -> None:
        self.stop = stop
        self.seconds = 60 * minutes
        self.voted_at = time.monotonic()
        self.steps = 0  # number of steps since the last vote
        self.next_vote = 1  # number of steps from vote to vote, equal on all processes
        self.saved_at = time.monotonic()
        self.cost = 0.0  # seconds that the last saving took

    def vote(self, *, epoch_ends: bool = False) -> tuple[bool, bool]:
        """Return whether to stop and whether to save; all processes get the same values.

        It is called after each step and at the end of each epoch. As a vote of several processes waits for the slowest,
        they vote only at the end of epochs and about once per second.
        """
        if not epoch_ends:
            self.steps += 1
            if distributed.world_size() > 1 and self.steps < self.next_vote:
                return False, False
        now = time.monotonic()
        since = now - self.saved_at
        due = since >= self.seconds or (epoch_ends and since * SAVING_SHARE >= self.cost)
        next_vote = self.next_vote
        if self.steps:
            in_time = int(VOTE_EVERY * self.steps / max(now - self.voted_at, 1e-9))
            # A GPU queues the first steps faster than it computes them, so the interval may only double.
            next_vote = max(1, min(in_time, 2 * next_vote, MOST_STEPS))
        is_main = distributed.is_main()
        stopping, saving, self.next_vote = distributed.highest(
            bool(self.stop.signal_name()), is_main and due, is_main and next_vote
        )
        self.voted_at = now
        self.steps = 0
        return bool(stopping), bool(saving)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Measure the time that saving in this context takes."""
        start = time.monotonic()
        yield
        self.saved_at = time.monotonic()
        self.cost = self.saved_at - start
