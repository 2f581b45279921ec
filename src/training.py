"""The epoch loop: step, log, validate, keep the best."""

import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from experiment import Checkpoints, Run
from utils import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Order:
    """Which triplets and caption variants an epoch's batches are made of, by seed and epoch alone.

    Attributes:
        triplets: number of training triplets.
        variants: number of texts a triplet has; one is drawn for each triplet in each epoch.
    """

    triplets: int
    variants: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.batch_size > self.triplets:
            raise UserError(
                f"--batch-size {self.batch_size} is larger than the training set of {self.triplets} triplets: "
                f"nothing would be trained; choose at most {self.triplets}"
            )

    def batches(self, epoch: int) -> list[tuple[Tensor, Tensor]]:
        """(rows (B,), variants (B,)) of each full batch; what is left of the shuffled triplets is dropped."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        rows = torch.randperm(self.triplets, generator=generator)
        variants = torch.randint(self.variants, (self.triplets,), generator=generator)
        full = self.triplets - self.triplets % self.batch_size
        return list(zip(rows[:full].split(self.batch_size), variants[:full].split(self.batch_size), strict=True))


@dataclass(frozen=True)
class Task:
    """What a stage learns.

    Attributes:
        batches: epoch -> number of batches, and the batches, all of one size.
        loss_of: a batch -> its mean loss.
        optimizer: of the parameters that learn.
        validate: metrics of the weights as they are.
    """

    batches: Callable[[int], tuple[int, Iterable[Any]]]
    loss_of: Callable[[Any], Tensor]
    optimizer: Optimizer
    validate: Callable[[], dict[str, float]]


def fit(
    task: Task, run: Run, checkpoints: Checkpoints, device: torch.device, num_epochs: int, validation_frequency: int
) -> None:
    """Train, and validate after the epochs 0, f, 2f, ... with f = validation_frequency."""
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
    for epoch in range(num_epochs):
        start = time.monotonic()
        loss = train_one_epoch(task, epoch, scaler, device)
        run.record("train", epoch, {"train_epoch_loss": loss})
        if epoch % validation_frequency == 0:
            metrics = _validate(task, epoch)
            run.record("validation", epoch, metrics)
            checkpoints.update(epoch, metrics)
            logger.info(_line(epoch, loss, metrics, checkpoints.best, time.monotonic() - start))
    logger.info("\nrun: %s", run.folder)
    for path in checkpoints.saved:
        logger.info("saved: %s", path)
    for name, value in checkpoints.best.items():
        logger.info("best %s = %.2f", name, value)


def _validate(task: Task, epoch: int) -> dict[str, float]:
    """Metrics after an epoch; an error names it."""
    try:
        return task.validate()
    except UserError as error:
        raise UserError(f"validation after epoch {epoch}: {error}") from None


def _line(epoch: int, loss: float, metrics: dict[str, float], best: dict[str, float], seconds: float) -> str:
    """One line for a validation: the metrics that choose checkpoints, with their best so far."""
    chosen = ", ".join(f"{name} {metrics[name]:.2f} (best {value:.2f})" for name, value in best.items())
    return f"epoch {epoch}: loss {loss:.4f}, {chosen}, {seconds:.1f} s"


def train_one_epoch(task: Task, epoch: int, scaler: torch.amp.GradScaler, device: torch.device) -> float:
    """One pass over an epoch's batches, in fp16 autocast on CUDA; returns the mean loss of the triplets seen.

    Raises:
        UserError: a loss that is not finite; the message names epoch and step.
    """
    total = 0.0
    count, batches = task.batches(epoch)
    with tqdm(batches, total=count, desc=f"epoch {epoch}", leave=False, disable=None) as bar:
        for step, batch in enumerate(bar):
            task.optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, dtype=torch.float16, enabled=device.type == "cuda"):
                loss = task.loss_of(batch)
            value = loss.item()
            if not math.isfinite(value):
                raise UserError(f"the loss is {value} at epoch {epoch}, step {step}: lower the learning rate")
            scaler.scale(loss).backward()
            scaler.step(task.optimizer)
            scaler.update()
            total += value
            bar.set_postfix(loss=f"{total / (step + 1):.4f}")
    return total / count
