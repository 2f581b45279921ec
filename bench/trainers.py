"""Trainers without a script, for tests and benchmarks."""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch

import clip_fine_tune
import combiner_train
from reports.run_page import About
from runtime.interruption import StopRequest
from runtime.trackers import Account, Trackers
from training.run_folder import Run
from training.saving import CheckpointNames, Checkpoints
from training.schedule import Precision
from training.step import Task
from training.trainer import Trainer

CPU = torch.device("cpu")
NO_TRACKERS = Trackers([], Account(folder=Path(), name="none"))


def stage_1_flags(*words: object) -> argparse.Namespace:
    """Parse flags of stage 1; flags that are not given have their defaults."""
    return clip_fine_tune.parse(["--dataset", "CIRR", *map(str, words)])


def stage_2_flags(*words: object) -> argparse.Namespace:
    """Parse flags of stage 2; flags that are not given have their defaults."""
    return combiner_train.parse(["--dataset", "CIRR", *map(str, words)])


def run_in(folder: Path, trackers: Trackers = NO_TRACKERS, **hyper_parameters: object) -> Run:
    """Return a run of three epochs by default, with a minimal run page."""
    about = About(
        title="a run",
        titles={},
        chosen_by=(),
        hyper_parameters={"num_epochs": 3, **hyper_parameters},
        commands={"resume": "python again"},
    )
    return Run(folder, trackers, about)


def checkpoints_in(
    folder: Path, flags: argparse.Namespace, best: Mapping[str, str] | None = None
) -> Checkpoints:
    """Return the checkpoints of a Combiner in a folder.

    Args:
        best: metric -> file name of the checkpoint with its best value.
    """
    names = CheckpointNames(key="Combiner", prefix="combiner", best=best or {})
    return Checkpoints(folder, names, {"seed": 1}, flags)


def trainer_in(
    folder: Path,
    task: Task,
    flags: argparse.Namespace,
    *,
    best: Mapping[str, str] | None = None,
    precision: Precision = Precision("fp32", CPU),  # noqa: B008
) -> Trainer:
    """Return a trainer that writes to a folder."""
    return Trainer(
        task,
        flags,
        run_in(folder),
        checkpoints=checkpoints_in(folder, flags, best),
        precision=precision,
        stop=StopRequest(),
    )
