"""Start training runs on synthetic data, each in a fork of this process, and read their metrics."""

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
# Flags with which the studies train on the synthetic benchmarks.
SHAPES_STAGE_1 = (
    "--num-epochs 7 --learning-rate 1e-3 --batch-size 128 --validation-frequency 3 "
    "--save-training --save-best"
)
SHAPES_STAGE_2 = (
    "--num-epochs 41 --combiner-lr 1e-3 --batch-size 512 --validation-frequency 10 --save-training --save-best "
    "--projection-dim 256 --hidden-dim 512"
)


def columns(file: Path) -> dict[str, list[float]]:
    """Return the columns of a CSV file by name."""
    with open(file, newline="") as stream:
        rows = list(csv.DictReader(stream))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def draw(folder: Path, setting: Setting) -> None:
    """Write a data root with the synthetic benchmarks, including CIRR with 600 training triplets and 300 queries."""
    train, val = setting.choose(gpu=(60, 30), tiny=(4, 3))
    sizes = f"--train-groups {train} --val-groups {val} --train-triplets 4 --val-triplets 2 --own-groups 1"
    shapes_dataset.main(["--output-dir", str(folder), *sizes.split()])


@dataclass
class Script:
    """A script in a fork of this process, which must not have used a GPU so far."""

    process: BaseProcess
    log: Path

    def wait(self, code: int = 0) -> str:
        """Wait for the end and return all output. Raises RuntimeError if the exit code is not the expected one."""
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
    """Start a script in a fork of this process.

    Args:
        main: main function of the script.
        environment: environment variables of one of several processes, which communicate by Gloo.
        dies_in: epoch in which the process kills itself, after a step that was saved.
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
    """Run a script in its own process."""
    write_to(log)
    if torch.cuda._is_in_bad_fork():
        raise RuntimeError("what forked this process has used a GPU: this one could not any more")
    torch.set_num_threads(1)  # for such small tensors, more threads would only wait for each other
    if environment:
        os.environ.update(environment)
        dist.init_process_group("gloo")
    if dies_in is not None:
        die_in(dies_in)
    skipped = count_skipped_steps()
    main(words)
    print(f"{SKIPPED}{len(skipped)}")


def die_in(epoch: int) -> None:
    """Make this process kill itself after the first saved step of an epoch."""
    real = Trainer.save_if_due

    def save_if_due(trainer: Trainer, **kwargs: bool) -> None:
        real(trainer, **kwargs)
        if trainer.progress.epoch >= epoch and trainer.progress.losses:
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer.save_if_due = save_if_due


def count_skipped_steps() -> list[float]:
    """Return a list that gets an entry, the loss scale, for each step that loss scaling skips from now on."""
    skipped: list[float] = []
    real = torch.amp.GradScaler.update

    def update(scaler: torch.amp.GradScaler, *args: object) -> None:
        before = scaler.get_scale()
        real(scaler, *args)
        if scaler.get_scale() < before:
            skipped.append(before)

    torch.amp.GradScaler.update = update
    return skipped
