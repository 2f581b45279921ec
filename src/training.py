"""The epoch loop: step, log, validate, keep the best."""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import contrastive
import distributed
from benchmarks import Benchmark
from data_utils import Split, check_images_exist
from experiment import Checkpoints, Run
from utils import UserError

logger = logging.getLogger(__name__)

READ_EVERY = 10  # steps between two looks at the losses: each look waits for the device


@dataclass(frozen=True)
class Order:
    """Which triplets and caption variants an epoch's batches are made of, by seed and epoch alone.

    Attributes:
        triplets: number of training triplets.
        variants: number of texts a triplet has; one is drawn for each triplet in each epoch.
        batch_size: of all processes together.
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
        if self.batch_size % distributed.world_size():
            raise UserError(
                f"--batch-size {self.batch_size} cannot be shared equally by {distributed.world_size()} processes: "
                "choose a multiple"
            )

    @property
    def steps(self) -> int:
        """Full batches in an epoch; what is left of the shuffled triplets is dropped."""
        return self.triplets // self.batch_size

    def batches(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Rows and caption variants of each step, (steps, b) each: this process's equal share of every batch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        rows = torch.randperm(self.triplets, generator=generator)
        variants = torch.randint(self.variants, (self.triplets,), generator=generator)
        shape = (self.steps, distributed.world_size(), -1)
        full = self.steps * self.batch_size
        return rows[:full].view(shape)[:, distributed.rank()], variants[:full].view(shape)[:, distributed.rank()]


@dataclass(frozen=True)
class Precision:
    """Mixed precision of a training: "amp" (fp16 with loss scaling on CUDA, fp32 on the CPU), "bf16" or "fp32"."""

    name: str
    device: torch.device

    def __post_init__(self) -> None:
        if self.name == "bf16" and self.device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
            raise UserError("--precision bf16: this GPU has no bfloat16; choose amp or fp32")

    @property
    def dtype(self) -> torch.dtype | None:
        """What matrix products are computed in, None for float32."""
        on_gpu = torch.float16 if self.device.type == "cuda" else None
        return {"amp": on_gpu, "bf16": torch.bfloat16, "fp32": None}[self.name]

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaling where fp16 gradients would vanish, else a scaler that does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)


@dataclass(frozen=True)
class Regime:
    """How a training goes on; the fields are named as their flags.

    Attributes:
        validation_frequency: epochs; validations follow the epochs 0, f, 2f, ...
        warmup_steps: steps over which the learning rate rises linearly.
        cosine: let it fall to 0 along half a cosine afterwards (Loshchilov and Hutter 2017, arXiv 1608.03983).
        micro_batch_size: rows in memory at a time, None for all.
        mask_duplicate_targets: rows of one target are not each other's negatives.
        clip_grad_norm: the largest norm of the gradient, None for any.
    """

    num_epochs: int
    validation_frequency: int
    warmup_steps: int = 0
    cosine: bool = False
    micro_batch_size: int | None = None
    mask_duplicate_targets: bool = False
    clip_grad_norm: float | None = None

    @classmethod
    def of(cls, flags: Mapping[str, Any]) -> "Regime":
        """The regime that a script's flags ask for."""
        return cls(**{field.name: flags[field.name] for field in dataclasses.fields(cls) if field.name in flags})

    def factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied with at a step of all `steps`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if not self.cosine:
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup_steps) / max(1, steps - self.warmup_steps)))


@dataclass(frozen=True)
class TrainingData:
    """A benchmark as a training needs it.

    Attributes:
        benchmark: its captions and metrics.
        texts: the V caption variants of each training triplet.
    """

    benchmark: Benchmark
    train: Split
    val: list[Split]
    texts: list[list[str]]
    order: Order


def read_training_data(benchmark: Benchmark, batch_size: int, micro_batch_size: int | None, seed: int) -> TrainingData:
    """Read a benchmark's splits, and check before anything is trained that all it takes is there.

    Raises:
        UserError: files missing or malformed, or batches that the data or the processes do not allow.
    """
    train, val = benchmark.train(), benchmark.val()
    texts = [benchmark.caption_variants(triplet.captions) for triplet in train.triplets]
    order = Order(len(train.triplets), len(texts[0]), batch_size, seed)
    share = batch_size // distributed.world_size()
    if micro_batch_size is not None and micro_batch_size > share:
        raise UserError(f"--micro-batch-size {micro_batch_size} is larger than a process's batch of {share}: lower it")
    check_images_exist([train, *val])
    return TrainingData(benchmark, train, val, texts, order)


@dataclass(frozen=True)
class Task:
    """What a stage learns.

    Attributes:
        batches: epoch -> its batches: the model's inputs (b, ...) and the targets' ids (b,).
        steps: batches in an epoch.
        model: inputs -> normalised queries (b, D) and targets (b, D).
        optimizer: of the parameters that learn.
        validate: metrics of the weights as they are.
        module: the weights to average; None without averaging.
        averaged: their exponential moving average.
    """

    batches: Callable[[int], Iterable[tuple[list[Tensor], Tensor]]]
    steps: int
    model: nn.Module
    optimizer: Optimizer
    validate: Callable[[], dict[str, float]]
    module: nn.Module | None = None
    averaged: AveragedModel | None = None


def trainable(model: nn.Module, device: torch.device, compiled: bool, some_unused: bool = False) -> nn.Module:
    """The model, compiled if asked for, and parallel if there are several processes (see `distributed.parallel`)."""
    return distributed.parallel(torch.compile(model) if compiled else model, device, some_unused)


def average(module: nn.Module, decay: float | None) -> AveragedModel | None:
    """A copy of the module that will follow it as an exponential moving average; None without a decay."""
    return None if decay is None else AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay))


class Stepper:
    """One optimizer step after another, with all that surrounds it."""

    def __init__(self, task: Task, regime: Regime, precision: Precision) -> None:
        self.task, self.regime, self.precision = task, regime, precision
        self.scaler = precision.scaler()
        steps = task.steps * regime.num_epochs
        self.learning_rate = LambdaLR(task.optimizer, lambda step: regime.factor(step, steps))

    def step(self, inputs: list[Tensor], target_ids: Tensor) -> Tensor:
        """Learn from a batch; returns its loss, still on the device."""
        optimizer = self.task.optimizer
        optimizer.zero_grad(set_to_none=True)
        ids = target_ids if self.regime.mask_duplicate_targets else None
        mixed = self.precision.autocast, self.scaler.scale
        loss = contrastive.backward(self.task.model, inputs, ids, self.regime.micro_batch_size, *mixed)
        if self.regime.clip_grad_norm is not None:
            self.scaler.unscale_(optimizer)
            learned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(learned, self.regime.clip_grad_norm)
        self.scaler.step(optimizer)
        self.scaler.update()
        self.learning_rate.step()
        if self.task.averaged is not None:
            self.task.averaged.update_parameters(self.task.module)
        return loss


def fit(task: Task, regime: Regime, precision: Precision, run: Run, checkpoints: Checkpoints) -> None:
    """Train, validate, and at the end say where the files are and what was best."""
    stepper = Stepper(task, regime, precision)
    for epoch in range(regime.num_epochs):
        start = time.monotonic()
        loss = train_one_epoch(task, stepper, epoch)
        run.record("train", epoch, {"train_epoch_loss": loss})
        if epoch % regime.validation_frequency == 0:
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


def train_one_epoch(task: Task, stepper: Stepper, epoch: int) -> float:
    """One pass over an epoch's batches; returns the mean loss of the triplets seen.

    Raises:
        UserError: a loss that is not finite; the message names epoch and step.
    """
    task.model.train()
    total, unread = 0.0, []
    shown = None if distributed.is_main() else True
    with tqdm(task.batches(epoch), total=task.steps, desc=f"epoch {epoch}", leave=False, disable=shown) as bar:
        for step, (inputs, target_ids) in enumerate(bar, start=1):
            unread.append(stepper.step(inputs, target_ids))
            if len(unread) == READ_EVERY or step == task.steps:
                total += _read(unread, epoch, step - len(unread))
                unread.clear()
                bar.set_postfix(loss=f"{total / step:.4f}")
    return total / task.steps


def _read(losses: list[Tensor], epoch: int, first_step: int) -> float:
    """The sum of losses that are still on the device; one that is not finite stops the run."""
    values = torch.stack(losses).tolist()
    for step, value in enumerate(values, start=first_step):
        if not math.isfinite(value):
            raise UserError(f"the loss is {value} at epoch {epoch}, step {step}: lower the learning rate")
    return sum(values)
