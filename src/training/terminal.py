"""Log a training run: its settings at the start, then its speed and the time that is left."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.splits import all_paths
from runtime import distributed
from runtime.progress import Clock, duration, rate
from training.data import TrainingData
from training.run_folder import Place
from training.schedule import Precision
from training.step import Task

logger = logging.getLogger(__name__)

GIB = 2**30
# Counted by bench/null_gpu.py, 32 images of RN50x16 and ViT-L/14: 107 ms in float32, 12.5 and 13.6 in fp16.
FASTER = "encode in float32; --encode-precision fp16 takes about an eighth of that on a GPU: docs/precision.md"


def log_opening(
    data: TrainingData, task: Task, flags: Any, *, precision: Precision, place: Place
) -> None:
    """Log what a training is, in four lines, and what would make its validations faster."""
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
    """Tell whether a training multiplies in half precision on a GPU, and its validations encode in float32."""
    return precision.device.type == "cuda" and precision.dtype is not None and encodes_in == "fp32"


def _machine(device: torch.device) -> str:
    """Describe the device."""
    name = "the CPU"
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)} ({device})"
    processes = distributed.world_size()
    return name if processes == 1 else f"{processes} processes, the first on {name}"


def _arithmetic(precision: Precision) -> str:
    """Describe the precision of matrix multiplications."""
    computed_in = str(precision.dtype or torch.float32).removeprefix("torch.")
    return f"precision {precision.name} ({computed_in})"


class Pace:
    """Speed of a training run, measured in this process.

    The first step is left out: it loads kernels and compiles.

    Args:
        flags: of the training.

    Attributes:
        clock: says when a file that the output goes to gets its next line.
    """

    def __init__(self, task: Task, flags: Any, device: torch.device) -> None:
        self.task = task
        self.flags = flags
        self.device = device
        self.clock = Clock()
        self.warm = False  # whether the first step is done
        self.since = 0.0  # where the seconds end that are counted
        self.steps = 0
        self.triplets = 0
        self.seconds = 0.0
        self.validations = 0
        self.validation_seconds = 0.0

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """The context in which steps are taken, and their end is waited for."""
        self.since = time.monotonic()
        yield
        self._count_seconds()

    def count_step(self, triplets: int) -> None:
        """Count a step that is done.

        Args:
            triplets: of this process.
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
        """The context of a validation."""
        start = time.monotonic()
        yield
        self.validations += 1
        self.validation_seconds += time.monotonic() - start

    def status(self, learning_rate: float, *, epoch: int, done: int) -> str:
        """Images a second, learning rate, the most memory so far, and the time that is left of the run.

        Args:
            epoch, done: how many epochs are over, and how many steps of the next one.
        """
        parts = [f"learning rate {learning_rate:.3g}"]
        memory = most_memory(self.device)
        if memory is not None:
            parts.append(f"{memory / GIB:.1f} GiB")
        speed = self.speed(epoch, done)
        return ", ".join([*speed[:1], *parts, *speed[1:]])

    def speed(self, epoch: int, done: int) -> list[str]:
        """Images a second and the time that is left of the run; nothing before the second step."""
        if not self.steps:
            return []
        unit = "images/s" if self.task.images_each else "triplets/s"
        speed = self.triplets * (self.task.images_each or 1) / self.seconds
        return [f"{rate(speed)} {unit}", f"{duration(self.seconds_left(epoch, done))} left"]

    def seconds_left(self, epoch: int, done: int) -> float:
        """Estimate the seconds that the rest of the run takes; validations count after the first one."""
        flags = self.flags
        steps = self.task.steps * (flags.num_epochs - epoch) - done
        validations = sum(validated >= epoch for validated in flags.validated_epochs)
        each_step = self.seconds / self.steps
        each_validation = self.validation_seconds / max(self.validations, 1)
        return steps * each_step + validations * each_validation


def most_memory(device: torch.device) -> int | None:
    """The most bytes that this process has held so far, of the GPU or else of the machine; None where none can tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # Linux counts in KiB
