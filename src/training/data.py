"""Prepare the data of an epoch: a benchmark's triplets and caption variants, and the order of its batches."""

import hashlib
import itertools
import logging
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import Benchmark, Split
from benchmarks.exclusions import announce, excluded
from benchmarks.splits import check_images_exist, images_digest, split_digest
from runtime import distributed
from utils import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
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
                f"choose at most {self.triplets}"
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
        rows, variants = self.whole_batches(epoch)
        return self.own(rows), self.own(variants)

    def own(self, table: Tensor) -> Tensor:
        """This process's share of each step of all processes, (steps, batch size, ...) -> (steps, b, ...)."""
        return table.unflatten(1, (distributed.world_size(), -1))[:, distributed.rank()]

    def whole_batches(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the batches of all processes together, (steps, batch size) each."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        rows = torch.randperm(self.triplets, generator=generator)
        variants = torch.randint(self.variants, (self.triplets,), generator=generator)
        full = self.steps * self.batch_size
        return rows[:full].view(self.steps, -1), variants[:full].view(self.steps, -1)

    def generator(self, epoch: int, use: str) -> torch.Generator:
        """Return the generator of further random numbers of an epoch, different for each use."""
        key = hashlib.sha256(f"{self.seed} {epoch} {use}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(key[:8], "big"))


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """A benchmark as a training needs it.

    Attributes:
        benchmark: its captions and metrics.
        texts: the V caption variants of each training triplet.
        verify: whether all bytes of the images are held against those of a resumed run, not a sample of each.
    """

    benchmark: Benchmark
    train: Split
    val: list[Split]
    texts: list[list[str]]
    order: Order
    verify: bool = False

    @property
    def splits(self) -> list[Split]:
        """All that a training reads."""
        return [self.train, *self.val]

    def with_seed(self, seed: int) -> "TrainingData":
        """Return the data in the order of another seed."""
        return replace(self, order=replace(self.order, seed=seed))

    def describe(self) -> dict[str, Any]:
        """Describe the data for the hyper-parameters; a resumed run must find equal data."""
        digests = [split_digest(split) for split in self.splits]
        return {
            **self.benchmark.hyper_parameters,
            "data_sha256": hashlib.sha256(" ".join(digests).encode()).hexdigest(),
            "excluded": excluded(self.splits),
            "images": self._images(),
        }

    def _images(self) -> str:
        """A digest of all images by their names, which the first process makes."""
        found = []
        if distributed.is_main():
            found = [images_digest(split, sampled=not self.verify) for split in self.splits]
        return distributed.same_object(hashlib.sha256(" ".join(found).encode()).hexdigest())


def read_training_data(benchmark: Benchmark, flags: Any) -> TrainingData:
    """Read a benchmark's splits, and check before anything is trained that all it takes is there.

    Args:
        flags: of either stage.

    Raises:
        UserError: files missing or malformed, or batches that the data or the processes do not allow.
    """
    train = benchmark.train()
    if flags.noise:
        train = with_noise(train, flags.noise, flags.noise_seed)
    val = benchmark.val()
    texts = [benchmark.caption_variants(triplet.captions) for triplet in train.triplets]
    order = Order(
        triplets=len(train.triplets),
        variants=len(texts[0]),
        batch_size=flags.batch_size,
        seed=flags.seed,
    )
    share = order.batch_size // distributed.world_size()
    micro_batch_size = getattr(flags, "micro_batch_size", None)  # stage 1 has it
    if micro_batch_size is not None and micro_batch_size > share:
        raise UserError(
            f"--micro-batch-size {micro_batch_size} is larger than the batch of a process, {share}: lower it"
        )
    check_learning(train, order, flags)
    announce(benchmark.excluded, [train, *val])
    check_images_exist([train, *val])
    benchmark.note_certain(val, benchmark.protocols[:1])
    return TrainingData(
        benchmark=benchmark, train=train, val=val, texts=texts, order=order, verify=flags.verify
    )


def with_noise(train: Split, share: float, seed: int) -> Split:
    """Permute the targets of a share of the triplets, so that none of them keeps its own.

    The triplets with one target stand in a row, the rows one after another in a random order, and each triplet takes
    the target that is as many places ahead as the longest row is long.

    Raises:
        UserError: one target has more than half of these triplets, so that some would keep it.
    """
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.randperm(len(train.triplets), generator=generator)
    noisy = noisy[: round(share * len(train.triplets))]
    rows: dict[str, list[int]] = {}
    for place in noisy.tolist():
        rows.setdefault(train.triplets[place].known_target, []).append(place)
    ahead = max(map(len, rows.values()), default=0)
    if 2 * ahead > len(noisy):
        raise UserError(
            f"--noise {share:g}: {ahead} of {len(noisy)} triplets have the same target, and cannot all get another "
            f"one: choose another value, or another --noise-seed"
        )
    places = list(itertools.chain.from_iterable(rows.values()))
    triplets = list(train.triplets)
    for place, other in zip(places, places[ahead:] + places[:ahead], strict=True):
        triplets[place] = replace(triplets[place], target=train.triplets[other].target)
    logger.info(
        "--noise: the targets of %d of %d triplets are shuffled", len(places), len(triplets)
    )
    return replace(train, triplets=triplets)


def check_learning(train: Split, order: Order, flags: Any) -> None:
    """Reject a training that learns nothing, for no query has a negative; warn where a part of it is lost.

    Raises:
        UserError: what is missing, and how to have it.
    """
    steps = flags.num_epochs * order.steps
    if flags.warmup_steps > steps:
        logger.warning(
            "warning: --warmup-steps %d is more than all %d steps: the learning rate never reaches its full value",
            flags.warmup_steps,
            steps,
        )
    repeats = Counter(triplet.target for triplet in train.triplets)
    if len(repeats) == 1:
        raise UserError(
            "all training triplets have the same target, so no query has a negative: add "
            "triplets with other targets"
        )
    bank = getattr(flags, "negatives", "batch") == "bank"  # stage 2 has it
    if bank or flags.hard_negatives:
        return  # there are negatives whatever the batch
    if order.batch_size == 1:
        raise UserError("--batch-size 1: no query has a negative in its batch: choose at least 2")
    if not flags.mask_duplicate_targets or max(repeats.values()) < order.batch_size:
        return
    targets = torch.tensor(train.target_rows)
    for seed in flags.seeds or [flags.seed]:
        lost = 0
        for epoch in range(flags.num_epochs):
            rows, _ = replace(order, seed=seed).whole_batches(epoch)
            lost += int((targets[rows] == targets[rows[:, :1]]).all(dim=1).sum())
        told = (
            f"in {lost} of {steps} steps of seed {seed} all rows have one target, which teaches nothing under "
            "--mask-duplicate-targets: raise --batch-size, or remove the flag"
        )
        if lost == steps:
            raise UserError(told)
        if lost:
            logger.warning("warning: %s", told)
