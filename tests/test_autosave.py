"""When a training saves: the best weights with its state, and votes of several processes once in a while."""

import dataclasses
import itertools
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD

from runtime import distributed, files
from runtime.interruption import StopRequest
from runtime.tensors import load_tensors
from trainers import stage_1_flags, trainer_in
from training import saving, trainer
from training.losses import ContrastiveLoss
from training.saving import Autosave, CheckpointNames, Checkpoints
from training.step import Stepper, Task
from training.trainer import Trainer
from utils import DiskError, UserError

CPU = torch.device("cpu")
NAMES = {"recall": "best_recall", "mean": "best_mean", "ratio": "best_ratio"}


class Turned(nn.Module):
    """Queries are rows times a matrix, targets the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.2, 1.0], [1.0, 0.3]]))

    def forward(self, rows):
        return nn.functional.normalize(rows @ self.weight, dim=-1), rows


BEST = ("--save-training", "--save-best")


def kept_of(folder: Path, kept: tuple[str, ...] = BEST) -> Checkpoints:
    names = CheckpointNames(key="C", prefix="c", best=NAMES)
    return Checkpoints(folder, names, {"seed": 1}, stage_1_flags(*kept))


def files_of(folder: Path) -> dict[str, dict]:
    """What the files of weights hold."""
    found = sorted((folder / "saved_models").glob("*"))
    return {file.stem: load_tensors(file) for file in found}


FIRST = {"recall": 1.0, "mean": 1.0, "ratio": 1.0}


# The best weights


def test_held_weights_are_those_of_their_validation(tmp_path):
    """Two epochs' bests at once, while steps go on and the module's own weights change."""
    model = Turned()
    kept = kept_of(tmp_path)
    seen = []
    for epoch, metrics in enumerate([FIRST, FIRST | {"mean": 2.0}, FIRST | {"ratio": 0.5}]):
        kept.hold()
        with torch.no_grad():
            model.weight += 1
        kept.update(epoch, metrics, model)
        seen.append(model.weight.detach().clone())
    kept.hold()
    with torch.no_grad():
        model.weight += 1
    assert files_of(tmp_path) == {}
    kept.write()
    written = files_of(tmp_path)
    assert {name: content["epoch"] for name, content in written.items()} == {
        "best_mean": 1, "best_ratio": 0, "best_recall": 0,
    }  # fmt: skip
    for content in written.values():
        assert torch.equal(content["C"]["weight"], seen[content["epoch"]])


def test_weights_are_copied_only_if_a_step_comes_before_they_are_written(tmp_path, monkeypatch):
    copied = []
    real = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to", lambda *args, **more: copied.append(args) or real(*args, **more)
    )
    model = Turned()
    kept = kept_of(tmp_path)
    kept.update(0, FIRST, model)
    kept.write()
    kept.hold()
    kept.update(1, FIRST, model)  # no better
    kept.hold()
    assert copied == []
    kept.update(2, FIRST | {"mean": 2.0}, model)
    kept.hold()
    kept.hold()
    assert len(copied) == 1


def test_an_epoch_is_written_once_under_all_its_names(tmp_path):
    model = Turned()
    kept = kept_of(tmp_path)
    kept.update(0, FIRST, model)
    kept.write()
    folder = tmp_path / "saved_models"
    paths = [folder / f"{name}.pt" for name in NAMES.values()]
    assert all(path.samefile(paths[0]) for path in paths)
    kept.update(1, FIRST | {"mean": 2.0, "ratio": 2.0}, model)
    kept.write()
    assert {name: content["epoch"] for name, content in files_of(tmp_path).items()} == {
        "best_mean": 1, "best_ratio": 1, "best_recall": 0,
    }  # fmt: skip
    assert paths[1].samefile(paths[2])
    kept.update(2, dict.fromkeys(NAMES, 3.0), model)  # from two names of one file to another
    kept.write()
    assert all(path.samefile(paths[0]) for path in paths)
    assert len(list(folder.iterdir())) == 3


def test_where_there_are_no_links_names_are_copies(tmp_path, monkeypatch):
    def refuse(path, original):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    model = Turned()
    kept = kept_of(tmp_path)
    kept.update(0, FIRST, model)
    kept.write()
    paths = [tmp_path / "saved_models" / f"{name}.pt" for name in NAMES.values()]
    assert len({path.stat().st_ino for path in paths}) == 3
    assert len({path.read_bytes() for path in paths}) == 1
    assert len(list((tmp_path / "saved_models").iterdir())) == 3


def improving(epochs_before_failure: int = 1000) -> Task:
    """A training whose validations get better by one metric in turns, and whose loss is no number at last."""
    model = Turned()
    validations = iter(range(1000))
    names = list(NAMES)

    def validate(measured: nn.Module) -> dict[str, float]:
        number = next(validations)
        better = {names[number % 3]: float(number)}
        return dict.fromkeys(names, 0.0) | better

    def batches(epoch, first):
        scale = float("nan") if epoch >= epochs_before_failure else 1.0
        return [([torch.eye(2) * scale], torch.arange(2))] * 2

    return Task(
        batches=batches,
        steps=2,
        model=model,
        module=model,
        loss=ContrastiveLoss(),
        optimizer=SGD(model.parameters(), 0.1),
        validate=validate,
    )


def trainer_of(folder: Path, task: Task, *flags: object, kept: tuple[str, ...] = BEST) -> Trainer:
    return trainer_in(folder, task, stage_1_flags(*kept, "--num-epochs", 9, *flags), best=NAMES)


def train(folder: Path, task: Task, *flags: object, kept: tuple[str, ...] = BEST) -> None:
    trainer_of(folder, task, *flags, kept=kept).fit()


class Clock:
    """Time as a test lets it pass."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(saving.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def slow_disk(monkeypatch, clock) -> list[str]:
    """Each file and each step takes a second; returns the names of the files in order."""
    written = []

    def slowly(real):
        def write(file: Path, *args) -> None:
            written.append(file.name)
            clock.now += 1.0
            real(file, *args)

        return write

    monkeypatch.setattr(saving, "save_tensors", slowly(saving.save_tensors))
    step = Stepper.step

    def timed(*args):
        clock.now += 1.0
        return step(*args)

    monkeypatch.setattr(Stepper, "step", timed)
    return written


def test_saving_the_best_takes_a_small_share_of_the_time(slow_disk, tmp_path):
    """Guards against epochs of a moment that are followed by files of a second."""
    train(tmp_path, improving(), "--num-epochs", 60)
    assert len(slow_disk) <= 10  # of 60 bests and as many states, in 120 seconds of steps
    assert {name: content["epoch"] for name, content in files_of(tmp_path).items()} == {
        "best_mean": 58, "best_ratio": 59, "best_recall": 57,
    }  # fmt: skip


def test_a_state_names_no_best_that_is_not_on_disk(tmp_path, monkeypatch):
    states = []
    real = saving.save_state

    def save_state(file, parts, progress, device):
        on_disk = files_of(tmp_path)
        for metric, value in progress.best.items():
            assert on_disk[NAMES[metric]]["metrics"][metric] == value
        states.append(len(progress.best))
        real(file, parts, progress, device)

    monkeypatch.setattr(trainer, "save_state", save_state)
    train(tmp_path, improving(), "--checkpoint-every-minutes", 1e-9)
    assert states[-1] == 3


def test_every_epoch_is_written_at_once(slow_disk, tmp_path):
    train(tmp_path, improving(), "--num-epochs", 5, kept=("--save-training",))
    weights = [name for name in slow_disk if name != "state.pt"]
    assert weights == [f"combiner_{epoch}.pt" for epoch in range(5)]


def test_the_best_of_a_run_that_fails_are_written(slow_disk, tmp_path):
    """Its last state may be old, and nobody wants to train again what led to a loss that is no number."""
    with pytest.raises(UserError, match="the loss is nan at epoch 8, step 0"):
        train(tmp_path, improving(epochs_before_failure=8))
    assert {content["epoch"] for content in files_of(tmp_path).values()} == {5, 6, 7}


def test_the_best_of_an_interrupted_run_are_written(slow_disk, tmp_path):
    task = improving()
    real = task.validate

    def validate(measured):
        metrics = real(measured)
        if max(metrics.values()) == 8:
            raise KeyboardInterrupt
        return metrics

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, dataclasses.replace(task, validate=validate))
    assert {content["epoch"] for content in files_of(tmp_path).values()} == {5, 6, 7}


def test_a_disk_without_room_for_the_best(tmp_path, monkeypatch):
    """One line that says which state is whole."""
    task = improving()
    real = os.fsync

    def full(descriptor):
        file = Path(f"/proc/self/fd/{descriptor}").readlink().name
        if kept.best.get("recall", 0) >= 3 and "best" in file:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    full_one = trainer_of(tmp_path, task, "--checkpoint-every-minutes", 1e-9)
    kept = full_one.checkpoints
    with pytest.raises(UserError) as error:
        full_one.fit()
    assert not isinstance(error.value, DiskError)
    assert "best_recall.pt (No space left on device): free disk space" in str(error.value)
    assert "the last good state is epoch 3, step 2; resume with: python again" in str(error.value)
    assert not list(tmp_path.rglob("*.tmp"))


# Votes


class Ballot:
    """Several processes of which this one is the main: counts the votes, in which another may want to stop."""

    def __init__(self, monkeypatch, clock: Clock) -> None:
        self.clock = clock
        self.votes = []
        self.other_stops = 0
        self.stopping = False
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        monkeypatch.setattr(distributed, "highest", self.highest)
        self.autosave = Autosave(StopRequest(), minutes=1000)

    def highest(self, stopping: int, saving: int, next_vote: int) -> tuple[int, ...]:
        self.votes.append(self.clock.now)
        return max(stopping, self.other_stops), saving, next_vote

    def steps(self, number: int, seconds: float) -> list[float]:
        """Take steps of some length; returns the times from vote to vote."""
        before = len(self.votes)
        for _ in range(number):
            self.clock.now += seconds
            self.stopping |= self.autosave.vote()[0]
        times = self.votes[max(0, before - 1) :]
        return [later - earlier for earlier, later in itertools.pairwise(times)]


@pytest.fixture
def ballot(monkeypatch, clock) -> Ballot:
    return Ballot(monkeypatch, clock)


def test_fast_steps_vote_seldom(ballot):
    ballot.steps(1000, 0.002)
    assert len(ballot.votes) <= 1000 / saving.MOST_STEPS + 7


@pytest.mark.parametrize("seconds", [0.013, 0.3, 0.9, 5.0])
def test_a_stop_is_heard_within_a_second_or_a_step(ballot, seconds):
    assert max(ballot.steps(300, seconds)) <= max(1.0, seconds) + 1e-6


def test_steps_that_become_slower_are_noticed(ballot):
    ballot.steps(200, 0.05)
    waits = ballot.steps(60, 0.5)
    assert max(waits[2:]) <= 1.0 + 1e-6


def test_the_steps_that_a_gpu_takes_in_at_first_say_little(ballot):
    ballot.steps(5, 1e-6)
    assert len(ballot.votes) == 2  # after one step, and two more


def test_an_epochs_end_votes_and_changes_no_pace(ballot):
    ballot.steps(105, 0.1)
    pace = ballot.autosave.next_vote
    assert pace > 5
    ballot.autosave.vote(epoch_ends=True)
    ballot.clock.now += 30.0  # a validation
    ballot.autosave.vote(epoch_ends=True)
    assert ballot.votes[-1] - ballot.votes[-2] == 30
    ballot.steps(pace - 1, 0.1)
    assert ballot.votes[-1] - ballot.votes[-2] == 30
    ballot.steps(1, 0.1)
    assert ballot.votes[-1] - ballot.votes[-2] < 30


def test_another_process_that_stops_is_heard(ballot):
    ballot.steps(100, 0.1)
    assert not ballot.stopping
    ballot.other_stops = 1
    ballot.steps(10, 0.1)
    assert ballot.stopping


def test_one_process_alone_looks_at_every_step(monkeypatch, ballot):
    monkeypatch.setattr(distributed, "world_size", lambda: 1)
    ballot.steps(50, 0.001)
    assert len(ballot.votes) == 50
