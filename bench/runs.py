"""Trainings on drawn data, each in a fork of this process, and what their runs recorded."""

import csv
import os
import signal
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist

import shapes_dataset
from isolated import FORK, SHOWN, write_to
from timing import Setting
from training.trainer import Trainer

SKIPPED = "skipped steps: "
# What the studies train with on the drawn benchmarks.
SHAPES_STAGE_1 = (
    "--num-epochs 7 --learning-rate 1e-3 --batch-size 128 --validation-frequency 3 "
    "--save-training --save-best"
)
SHAPES_STAGE_2 = (
    "--num-epochs 41 --combiner-lr 1e-3 --batch-size 512 --validation-frequency 10 --save-training --save-best "
    "--projection-dim 256 --hidden-dim 512"
)


def columns(file: Path) -> dict[str, list[float]]:
    """Columns of a CSV file."""
    with open(file, newline="") as stream:
        rows = list(csv.DictReader(stream))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def draw(folder: Path, setting: Setting) -> None:
    """A data root with the drawn benchmarks: 600 triplets of CIRR to learn, 300 queries."""
    train, val = setting.choose(gpu=(60, 30), tiny=(4, 3))
    sizes = f"--train-groups {train} --val-groups {val} --train-triplets 4 --val-triplets 2 --own-groups 1"
    shapes_dataset.main(["--output-dir", str(folder), *sizes.split()])


@dataclass
class Script:
    """A script in a fork of this process, which must not have used a GPU so far."""

    process: BaseProcess
    log: Path

    def wait(self, code: int = 0) -> str:
        """What it said until its end. Raises RuntimeError where that is not the one expected."""
        self.process.join()
        said = self.log.read_text(errors="replace")
        if self.process.exitcode != code:
            last = "\n".join(said.strip().splitlines()[-SHOWN:])
            raise RuntimeError(f"exit code {self.process.exitcode}: {last}")
        return said


def start(
    main: Callable[[list[str]], None],
    *flags: object,
    environment: Mapping[str, str] | None = None,
    dies_in: int | None = None,
) -> Script:
    """Start a script.

    Args:
        main: the script's.
        environment: of one of several processes, which speak by Gloo.
        dies_in: the epoch within which it kills itself, after a step that was saved.
    """
    handle, name = tempfile.mkstemp()
    os.close(handle)
    words = list(map(str, flags))
    process = FORK.Process(target=_work, args=(main, words, environment, dies_in, Path(name)))
    process.start()
    return Script(process, Path(name))


def _work(
    main: Callable[[list[str]], None],
    words: list[str],
    environment: Mapping[str, str] | None,
    dies_in: int | None,
    log: Path,
) -> None:
    """The script's process."""
    write_to(log)
    if torch.cuda._is_in_bad_fork():
        raise RuntimeError("what forked this process has used a GPU: this one could not any more")
    torch.set_num_threads(1)  # with tensors so small, two would wait for each other
    if environment:
        os.environ.update(environment)
        dist.init_process_group("gloo")
    if dies_in is not None:
        die_in(dies_in)
    skipped = count_skipped_steps()
    main(words)
    print(f"{SKIPPED}{len(skipped)}")


def die_in(epoch: int) -> None:
    """Let this process kill itself after a step of an epoch."""
    real = Trainer.save_if_due

    def save_if_due(trainer: Trainer, **kwargs: bool) -> None:
        real(trainer, **kwargs)
        if trainer.progress.epoch >= epoch and trainer.progress.losses:
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer.save_if_due = save_if_due


def count_skipped_steps() -> list[float]:
    """A list that grows with every step that loss scaling skips in this process from now on."""
    skipped: list[float] = []
    real = torch.amp.GradScaler.update

    def update(scaler: torch.amp.GradScaler, *args: object) -> None:
        before = scaler.get_scale()
        real(scaler, *args)
        if scaler.get_scale() < before:
            skipped.append(before)

    torch.amp.GradScaler.update = update
    return skipped
