"""Log a training run: its settings at the start, then its speed and the remaining time."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.splits import all_paths
from runtime import distributed
from runtime.gpus import GIB
from runtime.progress import Clock, duration, rate
from training.data import TrainingData
from training.run_folder import Place
from training.schedule import Precision
from training.step import Task

logger = logging.getLogger(__name__)

# bench/null_gpu.py estimates, for 32 images of RN50x16 and ViT-L/14: 107 ms each in float32, 12.5 and 13.6 in fp16.
FASTER = "encode in float32; --encode-precision fp16 takes about an eighth of that on a GPU: docs/precision.md"


def log_opening(
    data: TrainingData, task: Task, flags: Any, *, precision: Precision, place: Place
) -> None:
    """Log a four-line summary of a training run, and a hint if its validations could be faster."""
    order = data.order
    triplets = len(data.train.triplets)
    images = len(all_paths(data.splits))
    queries = sum(len(split.triplets) for split in data.val)
    weights = list(task.module.parameters())
    learning = sum(weight.numel() for weight in weights if weight.requires_grad)
    there = sum(weight.numel() for weight in weights)
    steps = f"{flags.num_epochs:,} x {order.steps:,} steps of {order.batch_size:,} triplets"
    learning_rate = task.optimizer.defaults["lr"]
    lines = {
        data.benchmark.name: f"{triplets:,} triplets to train, {queries:,} to validate, {images:,} images",
        "learning": f"{learning:,} of {there:,} parameters, rate {learning_rate:g}, {steps}",
        "on": f"{_machine(precision.device)}, {_arithmetic(precision)}",
        "run": str(place.folder),
    }
    encodes_in = place.settings.preprocessing["encode_precision"]
    if task.images_each and wastes_a_gpu(precision, encodes_in):
        lines["validations"] = FASTER
    for name, words in lines.items():
        logger.info("%s: %s", name, words)


def wastes_a_gpu(precision: Precision, encodes_in: str) -> bool:
    """Check whether a run trains in half precision on a GPU, but encodes in float32 for its validations."""
    return precision.device.type == "cuda" and precision.dtype is not None and encodes_in == "fp32"


def _machine(device: torch.device) -> str:
    name = "the CPU"
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)} ({device})"
    processes = distributed.world_size()
    return name if processes == 1 else f"{processes} processes, the first on {name}"


def _arithmetic(precision: Precision) -> str:
    computed_in = str(precision.dtype or torch.float32).removeprefix("torch.")
    return f"precision {precision.name} ({computed_in})"


class Pace:
    """Speed of a training run, measured in this process.

    The first step is not counted, because it loads kernels and compiles.

    Args:
        flags: flags of the training run.

    Attributes:
        clock: decides when the next line of progress is due if the output goes to a file.
    """

    def __init__(self, task: Task, flags: Any, device: torch.device) -> None:
        self.task = task
        self.flags = flags
        self.device = device
        self.clock = Clock()
        self.warm = False  # whether the first step is done
        self.since = 0.0  # time up to which seconds are counted
        self.steps = 0
        self.triplets = 0
        self.seconds = 0.0
        self.validations = 0
        self.validation_seconds = 0.0

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """Measure the time of the steps in this context, including the wait for the device at its end."""
        self.since = time.monotonic()
        yield
        self._count_seconds()

    def count_step(self, triplets: int) -> None:
        """Count a completed step.

        Args:
            triplets: number of triplets of this process.
        """
        self._count_seconds()
        if self.warm:
            self.steps += 1
            self.triplets += triplets * distributed.world_size()
        self.warm = True

    def _count_seconds(self) -> None:
        now = time.monotonic()
        if self.warm:
            self.seconds += now - self.since
        self.since = now

    @contextlib.contextmanager
    def validating(self) -> Iterator[None]:
        """Measure the time of a validation in this context."""
        start = time.monotonic()
        yield
        self.validations += 1
        self.validation_seconds += time.monotonic() - start

    def status(self, learning_rate: float, *, epoch: int, done: int) -> str:
        """Return images per second, learning rate, peak memory so far and remaining time of the run, as text.

        Args:
            epoch, done: number of completed epochs, and of completed steps in the next epoch.
        """
        parts = [f"learning rate {learning_rate:.3g}"]
        memory = most_memory(self.device)
        if memory is not None:
            parts.append(f"{memory / GIB:.1f} GiB")
        speed = self.speed(epoch, done)
        return ", ".join([*speed[:1], *parts, *speed[1:]])

    def speed(self, epoch: int, done: int) -> list[str]:
        """Return images per second and the remaining time of the run, as texts; empty before the second step."""
        if not self.steps:
            return []
        unit = "images/s" if self.task.images_each else "triplets/s"
        speed = self.triplets * (self.task.images_each or 1) / self.seconds
        return [f"{rate(speed)} {unit}", f"{duration(self.seconds_left(epoch, done))} left"]

    def seconds_left(self, epoch: int, done: int) -> float:
        """Estimate the remaining seconds of the run, with the remaining validations once one has been measured."""
        flags = self.flags
        steps = self.task.steps * (flags.num_epochs - epoch) - done
        validations = sum(validated >= epoch for validated in flags.validated_epochs)
        each_step = self.seconds / self.steps
        each_validation = self.validation_seconds / max(self.validations, 1)
        return steps * each_step + validations * each_validation


def most_memory(device: torch.device) -> int | None:
    """Return the peak memory of this process in bytes, on the GPU or else in RAM; None if it cannot be measured."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # Linux counts in KiB
