"""What a training takes of a GPU that need not be at hand: memory and work by part, and ways to take less memory."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks import Benchmark
from combiner import Composer, build_combiner
from runtime.gpus import Gpu
from settings.groups import WantedCombiner
from training.counted_clip import CountedClip, Encoding, Way, Work
from training.counting import Counted, NoData, autocast_dtype, bytes_of, weights_bytes
from training.losses import BankLoss, ContrastiveLoss
from training.stage2 import ComposedFeatures
from utils import UserError

EFFICIENCY = 0.4  # of a GPU's rate of products is what a whole training reaches, by rule of thumb
USABLE = (
    0.9  # of its memory; the rest is for CUDA, the libraries' workspaces and gaps between tensors
)
FLOAT = 4  # bytes
SMALLEST_MICRO_BATCH = 16  # triplets; with fewer a GPU waits for its next kernel
MOST_SIMILARITIES = 2**28  # in memory at a time, see `evaluation/retrieval.py`


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much data there is.

    Attributes:
        triplets, variants: of training, and the texts that each has.
        images: of the training's list, of which stage 2 makes features.
        val: queries and gallery of each validation split.
    """

    name: str
    triplets: int
    variants: int
    images: int
    val: Sequence[tuple[int, int]]

    @property
    def queries(self) -> int:
        """Validation triplets."""
        return sum(queries for queries, _ in self.val)

    @property
    def gallery(self) -> int:
        """Validation images; one that is in two galleries is encoded twice and counts twice."""
        return sum(images for _, images in self.val)

    @property
    def similarities(self) -> int:
        """Bytes of the largest block of similarities, with a byte for each where they are compared."""
        most = max(queries * images for queries, images in self.val)
        return min(most, MOST_SIMILARITIES) * (FLOAT + 1)


def sizes_of(benchmark: Benchmark) -> Sizes:
    """Those of the official files. Raises UserError where there is nothing to train on, or no official size."""

    def counts(split: str) -> list[tuple[int, int]]:
        return [benchmark.official[f"{part}.{split}"] for part in benchmark.parts]

    train_split = benchmark.split_called("train")
    if not benchmark.official:
        raise UserError(
            f"--dataset {benchmark.name} has no size of its own: give --triplets and --images"
        )
    train = counts(train_split)
    return Sizes(
        name=benchmark.name,
        triplets=sum(triplets for triplets, _ in train),
        variants=len(benchmark.caption_variants(("", ""))),
        images=sum(images for _, images in train),
        val=counts(benchmark.val_split),
    )


def seconds(work: Iterable[Work], gpu: Gpu) -> float:
    """How long work takes."""
    return sum(part.operations / gpu.rates[part.precision] for part in work) / (EFFICIENCY * 1e12)


@dataclass(frozen=True, kw_only=True)
class Training(ABC):
    """A stage as flags want it: what it takes, and how it can take less memory.

    Attributes:
        precision: of its products, "fp16", "bf16" or "fp32".
        averaged: whether a moving average follows the weights.
        masked: whether rows of one target are not each other's negatives.
    """

    encoding: Encoding
    sizes: Sizes
    precision: str
    averaged: bool = False
    masked: bool = False

    @property
    @abstractmethod
    def weights(self) -> tuple[int, int]:
        """Bytes of the module's weights, and of those that learn."""

    @abstractmethod
    def passing(self, way: Way) -> dict[str, int]:
        """Bytes that a step takes beside what lasts, by part."""

    @abstractmethod
    def other_peaks(self) -> dict[str, int]:
        """Bytes that are taken in all at other times than in a step, by what is done then."""

    @abstractmethod
    def step(self, way: Way) -> list[Work]:
        """The work of a step."""

    @abstractmethod
    def validation(self) -> list[Work]:
        """The work of a validation."""

    @abstractmethod
    def once(self) -> list[Work]:
        """The work before the first epoch."""

    @abstractmethod
    def ways(self, asked: Way) -> Iterator[Way]:
        """Ways that take less memory than the one that was asked for, none faster than those before it."""

    def lasting(self) -> dict[str, int]:
        """Bytes that are taken all the time, by part. Adam keeps two numbers for each weight that learns."""
        weights, learned = self.weights
        return {
            "weights": weights,
            "gradients": learned,
            "optimizer": 2 * learned,
            "moving average": weights if self.averaged else 0,
        }

    def needed(self, way: Way) -> int:
        """Bytes at the highest peak."""
        step = sum(self.lasting().values()) + sum(self.passing(way).values())
        return max(step, *self.other_peaks().values())

    def first_that_fits(self, asked: Way, memory: float) -> Way | None:
        """The way that was asked for if it needs no more than some bytes, else the first that does not."""
        fitting = (way for way in (asked, *self.ways(asked)) if self.needed(way) <= memory)
        return next(fitting, None)

    def epoch(self, way: Way) -> list[Work]:
        """The work of an epoch without its validation."""
        steps = self.sizes.triplets // way.batch_size
        return [replace(part, operations=steps * part.operations) for part in self.step(way)]

    def loss(self, way: Way) -> tuple[int, list[Work]]:
        """Bytes and work of the loss from the features of a whole batch, with its gradients."""
        clip = self.encoding.clip
        forward = _loss(clip.gpu, way.batch_size, clip.dim, masked=self.masked)
        return 2 * forward.peak, [Work("loss", 3 * forward.operations, "fp32")]

    def comparing(self) -> Work:
        """Similarities of all validation queries to their galleries."""
        pairs = sum(queries * images for queries, images in self.sizes.val)
        return Work("similarities", 2 * pairs * self.encoding.clip.dim, "fp32")


@functools.cache
def _loss(gpu: NoData, batch_size: int, dim: int, *, masked: bool) -> Counted:
    queries = gpu.empty((batch_size, dim)).requires_grad_()
    targets = gpu.empty((batch_size, dim)).requires_grad_()
    ids = gpu.empty((batch_size,), torch.long)
    loss = ContrastiveLoss(mask_duplicate_targets=masked)
    return gpu.count(lambda: loss(queries, targets, ids))


@functools.cache
def _bank_loss(gpu: NoData, batch_size: int, targets: int, *, dim: int, precision: str) -> Counted:
    queries = gpu.empty((batch_size, dim)).requires_grad_()
    bank = gpu.empty((targets, dim))
    columns = gpu.empty((batch_size,), torch.long)
    loss = BankLoss(bank)
    return gpu.count(lambda: loss(queries, queries, columns), dtype=autocast_dtype(precision))


@dataclass(frozen=True, kw_only=True)
class FineTuning(Training):
    """Stage 1: the CLIP of the encoding learns."""

    @property
    def weights(self) -> tuple[int, int]:
        return self.encoding.clip.weights, self.encoding.clip.learned

    def passing(self, way: Way) -> dict[str, int]:
        clip = self.encoding.clip
        return {
            "this batch and the next": 2 * bytes_of(clip.inputs(way.batch_size)),
            f"activations of {way.rows:,} triplets": clip.activations(way, self.precision),
            "loss and its gradients": self.loss(way)[0],
        }

    def other_peaks(self) -> dict[str, int]:
        vectors = self.sizes.gallery + self.sizes.queries
        most = max(self.encoding.memory, self.sizes.similarities)
        features = vectors * self.encoding.clip.dim * FLOAT
        return {"validation": sum(self.lasting().values()) + features + most}

    def step(self, way: Way) -> list[Work]:
        image, caption = self.encoding.operations
        parts = {"image": 2 * way.batch_size * image, "text": way.batch_size * caption}
        trained = self.encoding.clip.trained
        learned = sum(parts[part] for part in parts if trained in (part, "both"))
        forward = sum(parts.values())
        work = {"forward": forward, "backward": 2 * learned}
        if way.rows < way.batch_size:
            work["forward again, for micro-batches"] = forward
        if way.gradient_checkpointing:
            work["forward again, for checkpointing"] = learned
        return [
            *(Work(part, operations, self.precision) for part, operations in work.items()),
            *self.loss(way)[1],
        ]

    def validation(self) -> list[Work]:
        images = 0 if self.encoding.clip.trained == "text" else self.sizes.gallery
        return [*self.encoding.work(images, self.sizes.queries), self.comparing()]

    def once(self) -> list[Work]:
        """Galleries that no epoch changes are encoded once."""
        frozen = self.encoding.clip.trained == "text"
        return self.encoding.work(self.sizes.gallery, 0) if frozen else []

    def ways(self, asked: Way) -> Iterator[Way]:
        can_checkpoint = bool(self.encoding.clip.blocks)
        if not asked.gradient_checkpointing:
            for rows in _halves(asked.rows, SMALLEST_MICRO_BATCH if can_checkpoint else 1):
                yield replace(asked, micro_batch_size=rows)
        if not can_checkpoint:
            return
        checkpointed = replace(asked, gradient_checkpointing=True)
        yield checkpointed
        for rows in _halves(asked.rows, 1):
            yield replace(checkpointed, micro_batch_size=rows)


@dataclass(frozen=True, kw_only=True)
class CombinerTraining(Training):
    """Stage 2: a Combiner learns on features that the encoding made.

    Attributes:
        combiner: without data, see `combiner_to_count`.
        experts: how many it has; 0 without a mixture.
        negatives: of a query, one of NEGATIVES.
    """

    combiner: Composer
    experts: int
    negatives: str = "batch"

    @property
    def weights(self) -> tuple[int, int]:
        return weights_bytes(self.combiner)

    def passing(self, way: Way) -> dict[str, int]:
        forward = self._composed(way.batch_size, training=True)
        return {
            "frozen features": self._features(),
            "this batch and the next": 2 * 3 * way.batch_size * self.encoding.clip.dim * FLOAT,
            f"activations of {way.batch_size:,} triplets": forward.peak,
            "attention's workspace": forward.workspace,
            "loss and its gradients": self.loss(way)[0],
        }

    def other_peaks(self) -> dict[str, int]:
        queries = max(queries for queries, _ in self.sizes.val)
        composing = self._composed(queries, training=False).peak + self.sizes.similarities
        return {
            "making features": self.encoding.clip.weights + self.encoding.memory + self._features(),
            "validation": sum(self.lasting().values()) + self._features() + composing,
        }

    def step(self, way: Way) -> list[Work]:
        forward = self._composed(way.batch_size, training=True).operations
        return [
            Work("forward", forward, self.precision),
            Work("backward", 2 * forward, self.precision),
            *self.loss(way)[1],
        ]

    def loss(self, way: Way) -> tuple[int, list[Work]]:
        """That of a bank makes its gradients beside itself, by a product as large as the other."""
        if self.negatives == "batch":
            return super().loss(way)
        clip = self.encoding.clip
        whole = _bank_loss(
            clip.gpu, way.batch_size, self._targets, dim=clip.dim, precision=self.precision
        )
        product = whole.operations / 2
        return whole.peak, [
            Work("loss", product, "fp32"),
            Work("loss's gradients", product, self.precision),
        ]

    def epoch(self, way: Way) -> list[Work]:
        """With the report on the router, which sees all validation queries."""
        report = [replace(self._composing(), part="the router's report")] if self.experts else []
        return [*super().epoch(way), *report]

    def validation(self) -> list[Work]:
        return [self._composing(), self.comparing()]

    def once(self) -> list[Work]:
        captions = self.sizes.triplets * self.sizes.variants + self.sizes.queries
        return self.encoding.work(self.sizes.images + self.sizes.gallery, captions)

    def ways(self, asked: Way) -> Iterator[Way]:
        for batch_size in _halves(asked.batch_size, 1):
            yield replace(asked, batch_size=batch_size)

    @property
    def _targets(self) -> int:
        """Images that are a target of some training triplet, at the most."""
        return min(self.sizes.triplets, self.sizes.images)

    def _features(self) -> int:
        """Bytes of the frozen features of training and validation, and of the targets' normalised ones."""
        captions = self.sizes.variants * self.sizes.triplets
        training = self.sizes.images + self._targets + captions
        validation = self.sizes.gallery + self.sizes.queries
        return (training + validation) * self.encoding.clip.dim * FLOAT

    def _composing(self) -> Work:
        """All validation queries composed."""
        queries = self.sizes.queries
        operations = self._composed(queries, training=False).operations
        return Work(f"composing {queries:,} queries", operations, "fp32")

    def _composed(self, rows: int, *, training: bool) -> Counted:
        """The Combiner's forward pass. Rows are rounded up until each expert gets as many."""
        experts = max(1, self.experts)
        return _composed(
            self.encoding.clip,
            self.combiner,
            rows=-(-rows // experts) * experts,
            experts=experts,
            precision=self.precision if training else None,
        )


@functools.cache
def _composed(
    clip: CountedClip, combiner: Composer, *, rows: int, experts: int, precision: str | None
) -> Counted:
    """A Combiner's forward pass in a precision of training; None for evaluation."""
    training = precision is not None
    model = ComposedFeatures(combiner, with_router=False).train(training)
    features = [clip.gpu.empty((rows, clip.dim)) for _ in range(3)]
    with torch.set_grad_enabled(training):
        return clip.gpu.count(
            lambda: model(*features),
            dtype=autocast_dtype(precision),
            value_read=rows * combiner.top_k // experts,
        )


def combiner_to_count(clip: CountedClip, choice: WantedCombiner) -> Composer:
    """A Combiner without data for features of a CLIP."""
    settings = {"clip_dim": clip.dim, **choice.model_dump()}
    with torch.device("meta"):
        return clip.gpu.holding(build_combiner(settings))


def _halves(rows: int, least: int) -> Iterator[int]:
    """Half of some rows, half of that, and so on, but no fewer than `least`."""
    while (rows := rows // 2) >= least:
        yield rows
