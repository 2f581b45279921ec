"""What an epoch is made of: a benchmark's triplets and caption variants, and the order of its batches."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import Benchmark, Split
from benchmarks.exclusions import announce, excluded
from benchmarks.splits import check_images_exist, images_digest, split_digest
from runtime import distributed
from utils import UserError


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
        return self._share(rows), self._share(variants)

    def _share(self, values: Tensor) -> Tensor:
        """This process's part of each full batch, (triplets,) -> (steps, b)."""
        full = values[: self.steps * self.batch_size]
        return full.view(self.steps, distributed.world_size(), -1)[:, distributed.rank()]


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

    def describe(self) -> dict[str, Any]:
        """What was read, for the hyper-parameters: a resumed run must find the same."""
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
        return distributed.same_text(hashlib.sha256(" ".join(found).encode()).hexdigest())


def read_training_data(
    benchmark: Benchmark,
    *,
    batch_size: int,
    seed: int,
    micro_batch_size: int | None = None,
    verify: bool = False,
) -> TrainingData:
    """Read a benchmark's splits, and check before anything is trained that all it takes is there.

    Raises:
        UserError: files missing or malformed, or batches that the data or the processes do not allow.
    """
    train = benchmark.train()
    val = benchmark.val()
    texts = [benchmark.caption_variants(triplet.captions) for triplet in train.triplets]
    order = Order(
        triplets=len(train.triplets), variants=len(texts[0]), batch_size=batch_size, seed=seed
    )
    share = batch_size // distributed.world_size()
    if micro_batch_size is not None and micro_batch_size > share:
        raise UserError(
            f"--micro-batch-size {micro_batch_size} is larger than a process's batch of {share}: lower it"
        )
    announce(benchmark.excluded, [train, *val])
    check_images_exist([train, *val])
    benchmark.note_certain(val, benchmark.protocols[:1])
    return TrainingData(
        benchmark=benchmark, train=train, val=val, texts=texts, order=order, verify=verify
    )
