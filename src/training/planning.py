"""Estimate the memory and operations of a training run on a GPU that need not be present, with torch's own tools.

The real models run on tensors without data (`FakeTensorMode`): `MemTracker` tracks the lifetime of each tensor, and
`FlopCounterMode` counts matrix multiplications. The tensors are CPU tensors, because a backward pass on CUDA tensors
would need a driver; attention on the CPU keeps as much memory as flash attention on a GPU.
"""

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks import Benchmark
from combiner import Composer, build_combiner
from models.architectures import ARCHITECTURES
from models.backbone import Backbone, choose_trained
from models.clip_model import CLIP, load_clip, ready
from models.clip_model import backbone as openai_backbone
from models.lean_clip import Folding
from models.names import find_clip, open_clip_name
from runtime.gpus import Work
from settings.groups import Lora, WantedCombiner
from training.losses import BankLoss, ContrastiveLoss
from training.stage1 import SumFeatures
from training.stage2 import ComposedFeatures
from utils import UserError

FLOAT = 4  # bytes of a number
SMALLEST_MICRO_BATCH = 16  # triplets; with fewer, a GPU waits for kernel launches
MOST_SIMILARITIES = 2**28  # maximum number in memory at a time, see `evaluation/retrieval.py`
NO_DATA = FakeTensorMode(allow_non_fake_inputs=True)
# The operator for which torch's counter has no formula, unlike for attention on a GPU.
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True)
class Counted:
    """Memory and operations that a computation needs.

    Attributes:
        peak: maximum number of bytes alive at the same time, not counting the tensors that existed before.
        operations: floating-point operations of the matrix multiplications in the forward pass, two for each
            multiply-add.
    """

    peak: int
    operations: int


def count(
    forward: Callable[[], Any],
    *,
    given: Sequence[nn.Module | Tensor],
    precision: str = "fp32",
    backward: bool = False,
    value_read: int = 0,
) -> Counted:
    """Run a forward pass, and the backward pass from its outputs if requested, and count memory and operations.

    Args:
        given: modules and tensors that exist before, without data.
        precision: precision of matrix multiplications; fp16 is counted as bf16, which needs the same memory.
        value_read: value returned when code reads a number from a tensor.
    """
    memory = MemTracker()
    counted = {
        CPU_ATTENTION: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
    }
    work = FlopCounterMode(display=False, custom_mapping=counted)
    half = torch.autocast("cpu", torch.bfloat16, enabled=precision in ("fp16", "bf16"))
    with NO_DATA:
        memory.track_external(*given)
        before = _bytes_tracked(memory, "current")
        with memory, _ValueRead(value_read):
            # Disable its statistics by module: they take most of the time, and fail for frozen weights.
            memory._mod_tracker.__exit__()
            with work, half:
                outputs = forward()
            if backward:
                sum(output.sum() for output in outputs).backward()
    return Counted(_bytes_tracked(memory, "peak") - before, work.get_total_flops())


def _bytes_tracked(memory: MemTracker, when: str) -> int:
    return sum(of_device["Total"] for of_device in memory.get_tracker_snapshot(when).values())


class _ValueRead(TorchDispatchMode):
    """A mode in which reading a number from a tensor without data returns a given value."""

    def __init__(self, value: int) -> None:
        super().__init__()
        self.value = value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return self.value
        return func(*args, **(kwargs or {}))


def without_data(module: nn.Module) -> nn.Module:
    """Remove the data from a module's weights, allocate gradients for the trainable ones, and return the module."""
    with NO_DATA:
        module.to_empty(device="cpu")
        for weight in module.parameters():
            weight.grad = torch.empty_like(weight) if weight.requires_grad else None
    return module


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor of this shape without data."""
    with NO_DATA:
        return torch.empty(shape, dtype=dtype)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the total size of tensors in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def weights_bytes(module: nn.Module) -> int:
    """Return the size of a module's weights and buffers in bytes."""
    return bytes_of([*module.parameters(), *module.buffers()])


def learned_bytes(module: nn.Module) -> int:
    """Return the size of a module's trainable weights in bytes."""
    return bytes_of(weight for weight in module.parameters() if weight.requires_grad)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the training and validation data.

    Attributes:
        triplets, variants: number of training triplets, and of caption variants of each.
        images: number of images in the training list, whose features stage 2 computes.
        val: number of queries and of gallery images of each validation split.
    """

    name: str
    triplets: int
    variants: int
    images: int
    val: Sequence[tuple[int, int]]

    @property
    def queries(self) -> int:
        """Return the number of validation queries."""
        return sum(queries for queries, _ in self.val)

    @property
    def gallery(self) -> int:
        """Return the number of validation images; an image in two galleries is encoded twice and counts twice."""
        return sum(images for _, images in self.val)

    @property
    def similarities(self) -> int:
        """Return the bytes of the largest block of similarities, with one more byte each for a comparison."""
        most = max(queries * images for queries, images in self.val)
        return min(most, MOST_SIMILARITIES) * (FLOAT + 1)


def sizes_of(benchmark: Benchmark) -> Sizes:
    """Return the sizes of the official files. Raises UserError if there are no training data or no official size."""

    def counts(split: str) -> list[tuple[int, int]]:
        return [benchmark.official[f"{part}.{split}"] for part in benchmark.parts]

    train_split = benchmark.split_called("train")
    if not benchmark.official:
        raise UserError(
            f"--dataset {benchmark.name} has no official size: pass --triplets and --images"
        )
    train = counts(train_split)
    return Sizes(
        name=benchmark.name,
        triplets=sum(triplets for triplets, _ in train),
        variants=len(benchmark.caption_variants(("", ""))),
        images=sum(images for _, images in train),
        val=counts(benchmark.val_split),
    )


@dataclass(frozen=True, kw_only=True)
class Way:
    """Settings of a step, named like their flags."""

    batch_size: int
    micro_batch_size: int | None = None
    gradient_checkpointing: bool = False

    @property
    def rows(self) -> int:
        """Return the number of triplets whose activations are in memory at a time."""
        return self.micro_batch_size or self.batch_size


@dataclass(eq=False)
class CountedClip:
    """A CLIP without data, which counts the memory and operations of training and encoding.

    Attributes:
        name: value of `--clip-model-name`; published weights are not downloaded.
        trained: encoder to train, one of ENCODERS; None to train nothing.
        batch_size, precision: settings of encoding images and captions.
        lora: adapters; if they have a rank, they alone are trained.
    """

    name: str
    trained: str | None
    _: KW_ONLY
    batch_size: int = 32
    precision: str = "fp32"
    lora: Lora | None = None

    def __post_init__(self) -> None:
        self.model, self.backbone = self._made()
        self.dim = self.backbone.dim

    def _made(self) -> tuple[Any, Backbone]:
        clip, backbone = _unloaded(self.name)
        if self.trained:
            choose_trained(clip, self.trained, self.lora)
        backbone.normalise(torch.zeros(3, 1, 1))  # caches the constants while tensors have data
        return without_data(clip), backbone

    @functools.cached_property
    def checkpointed(self) -> nn.Module:
        """Return the CLIP with `--gradient-checkpointing`."""
        clip, backbone = self._made()
        backbone.checkpoint_gradients(clip)
        return clip

    def inputs(self, rows: int, negatives: int = 0) -> list[Tensor]:
        """Return the inputs of some triplets: references, targets with any hard negatives, and tokens."""
        side, context = self.backbone.resolution, self.backbone.tokenizer.context
        references = empty(rows, 3, side, side, dtype=torch.uint8)
        targets = empty(rows, 1 + negatives, 3, side, side, dtype=torch.uint8)
        return [references, targets, empty(rows, context, dtype=torch.long)]

    def activations(self, way: Way, precision: str, negatives: int = 0) -> int:
        """Return the peak memory of one micro-batch in bytes, in a training precision.

        The peak of a part of the batch is interpolated linearly between 2 rows and the full batch. The true peak is not
        higher: it is the largest of several sums that each grow linearly with the rows.
        """
        few = 2
        many = max(way.batch_size, few + 1)
        step = functools.partial(_step, self, precision, way.gradient_checkpointing, negatives)
        most = step(many).peak
        if way.rows == many:
            return most
        least = step(few).peak
        return round(least + (most - least) * (way.rows - few) / (many - few))

    @functools.cached_property
    def shared(self) -> int:
        """Return the bytes of the derived weights that micro-batches share, see `lean_clip`.

        The gradients of these weights exist before the other gradients, and use their memory as far as it suffices:
        with adapters, the other gradients are small.
        """
        modules = [module for module in self.model.modules() if isinstance(module, Folding)]
        made = list(itertools.chain.from_iterable(module.fold() for module in modules))
        gradients = bytes_of(weight for weight in made if weight.requires_grad)
        return bytes_of(made) + max(0, gradients - learned_bytes(self.model))

    @functools.cached_property
    def _encoded(self) -> tuple[Counted, Counted]:
        """Count the encoding of a batch of images and of a batch of captions, without gradients."""
        clip, normalise = self.model, self.backbone.normalise
        images, _, tokens = inputs = self.inputs(self.batch_size)
        taken = functools.partial(count, given=[clip, *inputs], precision=self.precision)
        with torch.no_grad():
            return (
                taken(lambda: clip.encode_image(normalise(images))),
                taken(lambda: clip.encode_text(tokens)),
            )

    @property
    def encoding_memory(self) -> int:
        """Return the peak memory of encoding in bytes."""
        return max(part.peak for part in self._encoded) + bytes_of(self.inputs(self.batch_size))

    def encoding(self, images: int, captions: int) -> list[Work]:
        """Return the work of encoding images and captions."""
        image, caption = (part.operations / self.batch_size for part in self._encoded)
        return [
            Work(f"encoding {images:,} images", images * image, self.precision),
            Work(f"encoding {captions:,} captions", captions * caption, self.precision),
        ]


def _unloaded(name: str) -> tuple[nn.Module, Backbone]:
    """Return a CLIP and its `Backbone`. Weights that are not on this machine are not downloaded."""
    other = open_clip_name(name)
    if other is not None:
        from models import open_clip_package

        return open_clip_package.without_weights(other, name)
    if find_clip(name) is not None:
        clip = load_clip(name, torch.device("cpu"))
    else:
        with torch.device("meta") as meta:
            clip = ready(CLIP(*ARCHITECTURES[name]), meta)
    return clip, openai_backbone(clip)


@functools.cache
def _step(
    clip: CountedClip, precision: str, checkpointed: bool, negatives: int, rows: int
) -> Counted:
    """Count a step of stage 1 without its loss.

    Memory peaks at the end of the forward pass, unless the backward pass recomputes activations.
    """
    model = SumFeatures(clip.checkpointed if checkpointed else clip.model, clip.backbone)
    inputs = clip.inputs(rows, negatives)
    return count(
        lambda: model(*inputs), given=[model, *inputs], precision=precision, backward=checkpointed
    )


@functools.cache
def _composed(
    combiner: Composer, rows: int, dim: int, experts: int, precision: str | None
) -> Counted:
    """Count a Combiner's forward pass in a training precision, or in evaluation mode if it is None.

    All experts get equally many rows.
    """
    experts = max(1, experts)
    rows = -(-rows // experts) * experts
    training = precision is not None
    model = ComposedFeatures(combiner, with_router=False).train(training)
    features = [empty(rows, dim) for _ in range(3)]
    with torch.set_grad_enabled(training):
        return count(
            lambda: model(*features),
            given=[model, *features],
            precision=precision or "fp32",
            value_read=rows * combiner.top_k // experts,
        )


@functools.cache
def _lost(
    rows: int, dim: int, *, masked: bool, bank: int, negatives: int, precision: str
) -> Counted:
    """Count a loss and its gradients with respect to features, over the batch or over a bank of `bank` targets."""
    of_targets = (rows, 1 + negatives) if negatives else (rows,)
    features = [empty(*shape, dim).requires_grad_() for shape in ((rows,), of_targets)]
    ids = empty(*of_targets, dtype=torch.long)
    targets = empty(bank, dim)
    loss = BankLoss(targets) if bank else ContrastiveLoss(mask_duplicate_targets=masked)
    return count(
        lambda: [loss(*features, ids)],
        given=[*features, ids, targets],
        precision=precision,
        backward=True,
    )


@dataclass(frozen=True, kw_only=True)
class PlannedTraining(ABC):
    """A stage with its settings: the memory and work it needs, and settings that need less memory.

    Attributes:
        precision: precision of matrix multiplications, "fp16", "bf16" or "fp32".
        averaged: whether a moving average of the weights is kept.
        masked: whether rows with the same target are excluded from each other's negatives.
        hard_negatives: number of hard negatives per triplet; mining them is not counted.
    """

    clip: CountedClip
    sizes: Sizes
    precision: str
    averaged: bool = False
    masked: bool = False
    hard_negatives: int = 0

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """Return the trained module, on tensors without data."""

    @abstractmethod
    def passing(self, way: Way) -> dict[str, int]:
        """Return the bytes that a step needs in addition to `lasting`, by part."""

    @abstractmethod
    def other_peaks(self) -> dict[str, int]:
        """Return the total bytes needed at other times than in a step, by activity."""

    @abstractmethod
    def step(self, way: Way) -> list[Work]:
        """Return the work of a step."""

    @abstractmethod
    def validation(self) -> list[Work]:
        """Return the work of a validation."""

    @abstractmethod
    def once(self) -> list[Work]:
        """Return the work before the first epoch."""

    @abstractmethod
    def ways(self, asked: Way) -> Iterator[Way]:
        """Yield settings that need less memory than the requested ones, in order of decreasing speed."""

    def lasting(self) -> dict[str, int]:
        """Return the bytes in use all the time, by part. Adam keeps two numbers for each trainable weight."""
        weights = weights_bytes(self.module)
        learned = learned_bytes(self.module)
        return {
            "weights": weights,
            "gradients": learned,
            "optimizer": 2 * learned,
            "moving average": weights if self.averaged else 0,
        }

    def needed(self, way: Way) -> int:
        """Return the bytes at the highest peak."""
        step = sum(self.lasting().values()) + sum(self.passing(way).values())
        return max(step, *self.other_peaks().values())

    def first_that_fits(self, asked: Way, memory: float) -> Way | None:
        """Return the requested settings if `memory` bytes suffice for them, otherwise the first of `ways` that fits."""
        fitting = (way for way in (asked, *self.ways(asked)) if self.needed(way) <= memory)
        return next(fitting, None)

    def epoch(self, way: Way) -> list[Work]:
        """Return the work of an epoch without its validation."""
        steps = self.sizes.triplets // way.batch_size
        return [replace(part, operations=steps * part.operations) for part in self.step(way)]

    def loss(self, way: Way) -> tuple[int, list[Work]]:
        """Return the bytes and work of the loss on the features of a full batch, including its gradients."""
        counted = self._lost(way)
        return counted.peak, [Work("loss", 3 * counted.operations, "fp32")]

    def _lost(self, way: Way, bank: int = 0) -> Counted:
        return _lost(
            way.batch_size,
            self.clip.dim,
            masked=self.masked,
            bank=bank,
            negatives=self.hard_negatives,
            precision=self.precision,
        )

    def comparing(self) -> Work:
        """Return the work of comparing all validation queries with their galleries."""
        pairs = sum(queries * images for queries, images in self.sizes.val)
        return Work("similarities", 2 * pairs * self.clip.dim, "fp32")


@dataclass(frozen=True, kw_only=True)
class PlannedFineTuning(PlannedTraining):
    """Stage 1: fine-tuning CLIP."""

    @property
    def module(self) -> nn.Module:
        return self.clip.model

    def passing(self, way: Way) -> dict[str, int]:
        inputs = self.clip.inputs(way.batch_size, self.hard_negatives)
        return {
            "this batch and the next": 2 * bytes_of(inputs),
            f"activations of {way.rows:,} triplets": self.clip.activations(
                way, self.precision, self.hard_negatives
            ),
            "weights that micro-batches share": self.clip.shared
            if way.rows < way.batch_size
            else 0,
            "loss and its gradients": self.loss(way)[0],
        }

    def other_peaks(self) -> dict[str, int]:
        vectors = self.sizes.gallery + self.sizes.queries
        most = max(self.clip.encoding_memory, self.sizes.similarities)
        features = vectors * self.clip.dim * FLOAT
        return {"validation": sum(self.lasting().values()) + features + most}

    def step(self, way: Way) -> list[Work]:
        images = (2 + self.hard_negatives) * way.batch_size
        encoding = self.clip.encoding(images, way.batch_size)
        parts = dict(zip(("image", "text"), (work.operations for work in encoding), strict=True))
        learned = sum(parts[part] for part in parts if self.clip.trained in (part, "both"))
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
        images = 0 if self.clip.trained == "text" else self.sizes.gallery
        return [*self.clip.encoding(images, self.sizes.queries), self.comparing()]

    def once(self) -> list[Work]:
        """Return the work of encoding the galleries, if the image encoder is frozen."""
        frozen = self.clip.trained == "text"
        return self.clip.encoding(self.sizes.gallery, 0) if frozen else []

    def ways(self, asked: Way) -> Iterator[Way]:
        if not asked.gradient_checkpointing:
            for rows in _halves(asked.rows, SMALLEST_MICRO_BATCH):
                yield replace(asked, micro_batch_size=rows)
        checkpointed = replace(asked, gradient_checkpointing=True)
        yield checkpointed
        for rows in _halves(asked.rows, 1):
            yield replace(checkpointed, micro_batch_size=rows)


@dataclass(frozen=True, kw_only=True)
class PlannedCombinerTraining(PlannedTraining):
    """Stage 2: training a Combiner on features of a frozen CLIP.

    Attributes:
        combiner: a Combiner without data, see `combiner_to_count`.
        experts: number of experts; 0 without a mixture.
        negatives: negatives of a query, one of NEGATIVES.
    """

    combiner: Composer
    experts: int
    negatives: str = "batch"

    @property
    def module(self) -> nn.Module:
        return self.combiner

    def passing(self, way: Way) -> dict[str, int]:
        forward = self._composed(way.batch_size, self.precision)
        vectors = (3 + self.hard_negatives) * way.batch_size
        return {
            "frozen features": self._features(),
            "this batch and the next": 2 * vectors * self.clip.dim * FLOAT,
            f"activations of {way.batch_size:,} triplets": forward.peak,
            "attention's workspace": self._workspace(way.batch_size),
            "loss and its gradients": self.loss(way)[0],
        }

    def other_peaks(self) -> dict[str, int]:
        queries = max(queries for queries, _ in self.sizes.val)
        composing = self._composed(queries).peak + self.sizes.similarities
        making = weights_bytes(self.clip.model) + self.clip.encoding_memory
        return {
            "making features": making + self._features(),
            "validation": sum(self.lasting().values()) + self._features() + composing,
        }

    def step(self, way: Way) -> list[Work]:
        forward = self._composed(way.batch_size, self.precision).operations
        return [
            Work("forward", forward, self.precision),
            Work("backward", 2 * forward, self.precision),
            *self.loss(way)[1],
        ]

    def loss(self, way: Way) -> tuple[int, list[Work]]:
        """Return the bytes and work of the loss.

        The loss of a bank also computes its gradient, which needs a second matrix multiplication of equal size.
        """
        if self.negatives == "batch":
            return super().loss(way)
        counted = self._lost(way, bank=self._targets)
        product = counted.operations / 2
        return counted.peak, [
            Work("loss", product, "fp32"),
            Work("loss's gradients", product, self.precision),
        ]

    def epoch(self, way: Way) -> list[Work]:
        """Return the work of an epoch, including the router's report on all validation queries."""
        report = [replace(self._composing(), part="the router's report")] if self.experts else []
        return [*super().epoch(way), *report]

    def validation(self) -> list[Work]:
        return [self._composing(), self.comparing()]

    def once(self) -> list[Work]:
        captions = self.sizes.triplets * self.sizes.variants + self.sizes.queries
        return self.clip.encoding(self.sizes.images + self.sizes.gallery, captions)

    def ways(self, asked: Way) -> Iterator[Way]:
        least = 1 if self.negatives == "bank" else 2  # a bank has negatives even for a batch of 1
        for batch_size in _halves(asked.batch_size, least):
            yield replace(asked, batch_size=batch_size)

    @property
    def _targets(self) -> int:
        """Return the maximum number of images that are targets of training triplets."""
        return min(self.sizes.triplets, self.sizes.images)

    def _features(self) -> int:
        """Return the bytes of the frozen training and validation features and of the normalised target features."""
        captions = self.sizes.variants * self.sizes.triplets
        compared = self.sizes.images if self.hard_negatives else self._targets
        training = self.sizes.images + compared + captions
        validation = self.sizes.gallery + self.sizes.queries
        return (training + validation) * self.clip.dim * FLOAT

    def _workspace(self, rows: int) -> int:
        """Return the bytes of the workspace that attention's backward pass allocates.

        In half precision, the memory-efficient kernel accumulates the gradients of heads with a dimension above 128 in
        float32: 256 rows of a head for each head of each sequence (torch's mem_eff_attention/kernel_backward.h).
        """
        attention = [m for m in self.combiner.modules() if isinstance(m, nn.MultiheadAttention)]
        widths = [m.num_heads * m.head_dim for m in attention if m.head_dim > 128]
        return 0 if self.precision == "fp32" else rows * 256 * max(widths, default=0) * FLOAT

    def _composing(self) -> Work:
        """Return the work of composing all validation queries.

        It is counted in training mode, because torch has no formula for attention in evaluation mode.
        """
        queries = self.sizes.queries
        operations = self._composed(queries, self.precision).operations
        return Work(f"composing {queries:,} queries", operations, "fp32")

    def _composed(self, rows: int, precision: str | None = None) -> Counted:
        return _composed(self.combiner, rows, self.clip.dim, self.experts, precision)


def combiner_to_count(clip: CountedClip, choice: WantedCombiner) -> Composer:
    """Build a Combiner without data for features of a CLIP."""
    with torch.device("meta"):
        combiner = build_combiner({"clip_dim": clip.dim, **choice.model_dump()})
    without_data(combiner)
    return combiner


def _halves(rows: int, least: int) -> Iterator[int]:
    """Halve a number of rows again and again; yield each result that is at least `least`."""
    while (rows := rows // 2) >= least:
        yield rows
