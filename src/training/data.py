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
    """The triplets and caption variants in each batch of an epoch, determined only by the seed and the epoch.

    Attributes:
        triplets: number of training triplets.
        variants: number of caption variants of a triplet; one is drawn for each triplet in each epoch.
        batch_size: global batch size, over all processes.
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
                f"--batch-size {self.batch_size} cannot be divided evenly among {distributed.world_size()} processes: "
                f"choose a multiple of {distributed.world_size()}"
            )

    @property
    def steps(self) -> int:
        """Return the number of full batches in an epoch; the remaining shuffled triplets are dropped."""
        return self.triplets // self.batch_size

    def batches(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the triplet rows and caption variants of this process's equal share of each batch, (steps, b) each."""
        rows, variants = self.whole_batches(epoch)
        return self.own(rows), self.own(variants)

    def own(self, table: Tensor) -> Tensor:
        """Return this process's share of a table of global batches, (steps, batch size, ...) -> (steps, b, ...)."""
        return table.unflatten(1, (distributed.world_size(), -1))[:, distributed.rank()]

    def whole_batches(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the triplet rows and caption variants of the global batches, (steps, batch size) each."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        rows = torch.randperm(self.triplets, generator=generator)
        variants = torch.randint(self.variants, (self.triplets,), generator=generator)
        full = self.steps * self.batch_size
        return rows[:full].view(self.steps, -1), variants[:full].view(self.steps, -1)

    def generator(self, epoch: int, use: str) -> torch.Generator:
        """Return a random generator for an epoch's other random numbers, seeded separately for each use."""
        key = hashlib.sha256(f"{self.seed} {epoch} {use}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(key[:8], "big"))


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """A benchmark's data for a training run.

    Attributes:
        benchmark: provides captions and metrics.
        texts: the V caption variants of each training triplet.
        verify: whether to compare all bytes of the images with a resumed run, and not only a sample of each file.
    """

    benchmark: Benchmark
    train: Split
    val: list[Split]
    texts: list[list[str]]
    order: Order
    verify: bool = False

    @property
    def splits(self) -> list[Split]:
        """Return all splits that a training run reads."""
        return [self.train, *self.val]

    def with_seed(self, seed: int) -> "TrainingData":
        """Return these data with the batch order of another seed."""
        return replace(self, order=replace(self.order, seed=seed))

    def describe(self) -> dict[str, Any]:
        """Describe the data for the hyper-parameters. A resumed run must have the same data."""
        digests = [split_digest(split) for split in self.splits]
        return {
            **self.benchmark.hyper_parameters,
            "data_sha256": hashlib.sha256(" ".join(digests).encode()).hexdigest(),
            "excluded": excluded(self.splits),
            "images": self._images(),
        }

    def _images(self) -> str:
        """Return a digest of the names and contents of all images, which only the first process computes."""
        found = []
        if distributed.is_main():
            found = [images_digest(split, sampled=not self.verify) for split in self.splits]
        return distributed.same_object(hashlib.sha256(" ".join(found).encode()).hexdigest())


def read_training_data(benchmark: Benchmark, flags: Any) -> TrainingData:
    """Read a benchmark's splits, and check before training that all files exist and the batches are possible.

    Args:
        flags: flags of stage 1 or stage 2.

    Raises:
        UserError: a file is missing or malformed, or the batch size does not suit the data or the number of processes.
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
    micro_batch_size = getattr(flags, "micro_batch_size", None)  # only stage 1 has this flag
    if micro_batch_size is not None and micro_batch_size > share:
        raise UserError(
            f"--micro-batch-size {micro_batch_size} is larger than the batch size per process, {share}: lower it"
        )
    check_learning(train, order, flags)
    announce(benchmark.excluded, [train, *val])
    check_images_exist([train, *val])
    benchmark.note_certain(val, benchmark.protocols[:1])
    return TrainingData(
        benchmark=benchmark, train=train, val=val, texts=texts, order=order, verify=flags.verify
    )


def with_noise(train: Split, share: float, seed: int) -> Split:
    """Permute the targets of a random fraction of the triplets so that each of these triplets gets a different target.

    The chosen triplets are grouped by target, and the groups are concatenated in random order. Each triplet gets the
    target of the triplet n positions ahead, if the largest group has n triplets.

    Raises:
        UserError: more than half of the chosen triplets have the same target, so some would keep it.
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
            f"--noise {share:g}: {ahead} of {len(noisy)} triplets have the same target, so they cannot all get a "
            "different one: choose another value, or another --noise-seed"
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
    """Reject a training run in which no query has a negative; warn about single steps without negatives.

    Also warn if the warm-up is longer than the run.

    Raises:
        UserError: no query has a negative; the message contains a remedy.
    """
    steps = flags.num_epochs * order.steps
    if flags.warmup_steps > steps:
        logger.warning(
            "warning: --warmup-steps %d exceeds the run's %d steps: the learning rate never reaches its full value",
            flags.warmup_steps,
            steps,
        )
    repeats = Counter(triplet.target for triplet in train.triplets)
    if len(repeats) == 1:
        raise UserError(
            "all training triplets have the same target, so no query has a negative: add "
            "triplets with other targets"
        )
    bank = getattr(flags, "negatives", "batch") == "bank"  # only stage 2 has this flag
    if bank or flags.hard_negatives:
        return  # these negatives do not depend on the batch
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
            f"in {lost} of {steps} steps of seed {seed} all triplets have the same target, so they train nothing "
            "with --mask-duplicate-targets: raise --batch-size, or remove --mask-duplicate-targets"
        )
        if lost == steps:
            raise UserError(told)
        if lost:
            logger.warning("warning: %s", told)
