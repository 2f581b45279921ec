"""Estimate the memory and work of a training run on a GPU that need not exist, counted by torch's own tools.

The true models run on tensors without data (`FakeTensorMode`): `MemTracker` sees how long each tensor lives, and
`FlopCounterMode` counts products. They run as on a CPU, whose attention keeps as much as a GPU's flash attention: a
backward pass on CUDA's tensors would ask for a driver.
"""

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
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
from runtime.gpus import Gpu
from settings.groups import Lora, WantedCombiner
from training.losses import BankLoss, ContrastiveLoss
from training.stage1 import SumFeatures
from training.stage2 import ComposedFeatures
from utils import UserError

EFFICIENCY = 0.4  # of a GPU's rate of products is what a whole training reaches, by rule of thumb
USABLE = 0.9  # of its memory; the rest is for CUDA, libraries' workspaces and gaps between tensors
FLOAT = 4  # bytes
SMALLEST_MICRO_BATCH = 16  # triplets; with fewer a GPU waits for its next kernel
MOST_SIMILARITIES = 2**28  # in memory at a time, see `evaluation/retrieval.py`
NO_DATA = FakeTensorMode(allow_non_fake_inputs=True)
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch counts the GPU's


@dataclass(frozen=True)
class Counted:
    """Memory and operations that some code needs.

    Attributes:
        peak: bytes that were alive at the same time, at the most, besides those that were there before.
        operations: floating-point operations of the forward pass's products, two for each multiplication and addition.
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
    """Run a forward pass, and if asked for the backward pass from its outputs, and count.

    Args:
        given: what is there before, without data.
        precision: of products; "bf16" stands for both halves, which take the same bytes.
        value_read: what a number is taken for that is read from a tensor.
    """
    memory = MemTracker()
    work = FlopCounterMode(display=False, custom_mapping={CPU_ATTENTION: _operations_of_attention})
    half = torch.autocast("cpu", torch.bfloat16, enabled=precision in ("fp16", "bf16"))
    with NO_DATA:
        memory.track_external(*given)
        before = _bytes_tracked(memory, "current")
        with memory, _ValueRead(value_read):
            # Its statistics by module take most of the time, and it fails to make them of frozen weights.
            memory._mod_tracker.__exit__()
            with work, half:
                outputs = forward()
            if backward:
                sum(output.sum() for output in outputs).backward()
    return Counted(_bytes_tracked(memory, "peak") - before, work.get_total_flops())


def _operations_of_attention(query: Any, key: Any, value: Any, *others: Any, **named: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _bytes_tracked(memory: MemTracker, when: str) -> int:
    return sum(of_device["Total"] for of_device in memory.get_tracker_snapshot(when).values())


class _ValueRead(TorchDispatchMode):
    """Gives a value to whoever reads a number from a tensor without data."""

    def __init__(self, value: int) -> None:
        super().__init__()
        self.value = value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return self.value
        return func(*args, **(kwargs or {}))


def without_data(module: nn.Module) -> nn.Module:
    """The module, whose weights have no data any more, and where they learn a gradient."""
    with NO_DATA:
        module.to_empty(device="cpu")
        for weight in module.parameters():
            weight.grad = torch.empty_like(weight) if weight.requires_grad else None
    return module


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without data."""
    with NO_DATA:
        return torch.empty(shape, dtype=dtype)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def weights_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's weights and buffers."""
    return bytes_of([*module.parameters(), *module.buffers()])


def learned_bytes(module: nn.Module) -> int:
    """Return the bytes of the trainable weights of a module."""
    return bytes_of(weight for weight in module.parameters() if weight.requires_grad)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Size of the data.

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
    """Settings of a step; the fields are named like their flags."""

    batch_size: int
    micro_batch_size: int | None = None
    gradient_checkpointing: bool = False

    @property
    def rows(self) -> int:
        """Triplets whose activations are in memory at a time."""
        return self.micro_batch_size or self.batch_size


@dataclass(frozen=True)
class Work:
    """Operations of one kind, and the type of numbers that they are done in, one of a `Gpu`'s rates."""

    part: str
    operations: float
    precision: str


def seconds(work: Iterable[Work], gpu: Gpu) -> float:
    """Estimate the seconds that work takes."""
    return sum(part.operations / gpu.rates[part.precision] for part in work) / (EFFICIENCY * 1e12)


class CountedClip:
    """A CLIP without data: what it takes to learn and to encode.

    Args:
        name: what `--clip-model-name` says; published weights are not fetched for it.
        trained: one of ENCODERS; None where nothing learns.
        batch_size, precision: with which it encodes images and captions.
        lora: adapters that learn alone, where it has a rank.
    """

    def __init__(
        self,
        name: str,
        trained: str | None,
        *,
        batch_size: int = 32,
        precision: str = "fp32",
        lora: Lora | None = None,
    ) -> None:
        self.name = name
        self.trained = trained
        self.batch_size = batch_size
        self.precision = precision
        self.lora = lora
        self.model, self.backbone = self._made()
        self.dim = self.backbone.dim

    def _made(self) -> tuple[Any, Backbone]:
        clip, backbone = _unloaded(self.name)
        if self.trained:
            choose_trained(clip, self.trained, self.lora)
        backbone.normalise(torch.zeros(3, 1, 1))  # its constants, which it remembers, have data
        return without_data(clip), backbone

    @functools.cached_property
    def checkpointed(self) -> nn.Module:
        """Return the CLIP with `--gradient-checkpointing`."""
        clip, backbone = self._made()
        backbone.checkpoint_gradients(clip)
        return clip

    def inputs(self, rows: int, negatives: int = 0) -> list[Tensor]:
        """References, targets, if any with hard negatives, and tokens of some triplets."""
        side, context = self.backbone.resolution, self.backbone.tokenizer.context
        references = empty(rows, 3, side, side, dtype=torch.uint8)
        targets = empty(rows, 1 + negatives, 3, side, side, dtype=torch.uint8)
        return [references, targets, empty(rows, context, dtype=torch.long)]

    def activations(self, way: Way, precision: str, negatives: int = 0) -> int:
        """Bytes of one micro-batch at the peak, in a training in some precision.

        Those of a part of the batch are on a line between two rows and all, or below it: a peak is the largest of sums
        that each grow with the rows.
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
        """Bytes of the weights that micro-batches share, see `lean_clip`.

        Their gradients come before the others', and take their place as far as it goes: adapters have little.
        """
        modules = [module for module in self.model.modules() if isinstance(module, Folding)]
        made = list(itertools.chain.from_iterable(module.fold() for module in modules))
        gradients = bytes_of(weight for weight in made if weight.requires_grad)
        return bytes_of(made) + max(0, gradients - learned_bytes(self.model))

    @functools.cached_property
    def _encoded(self) -> tuple[Counted, Counted]:
        """A batch of images, and one of captions, without gradient."""
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
        """Bytes at the peak of encoding."""
        return max(part.peak for part in self._encoded) + bytes_of(self.inputs(self.batch_size))

    def encoding(self, images: int, captions: int) -> list[Work]:
        """The work of encoding images and captions."""
        image, caption = (part.operations / self.batch_size for part in self._encoded)
        return [
            Work(f"encoding {images:,} images", images * image, self.precision),
            Work(f"encoding {captions:,} captions", captions * caption, self.precision),
        ]


def _unloaded(name: str) -> tuple[nn.Module, Backbone]:
    """A CLIP and what it is, without weights where they are not at hand."""
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
    """A step of stage 1 without its loss.

    Activations are most when the forward pass ends, unless a backward pass makes some of them again.
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
    """A Combiner's forward pass in a precision of training, or in evaluation; each expert gets as many rows."""
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
    """A loss and its gradients with respect to features: over a batch, or over a bank of some targets."""
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
class Training(ABC):
    """A stage as flags want it: what it takes, and how it can take less memory.

    Attributes:
        precision: of its products, "fp16", "bf16" or "fp32".
        averaged: whether a moving average follows the weights.
        masked: whether rows of one target are not each other's negatives.
        hard_negatives: images besides its target that a triplet brings; that they are mined is not counted.
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
        """Bytes that a step needs besides what lasts, by part."""

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
        weights = weights_bytes(self.module)
        learned = learned_bytes(self.module)
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
        """Similarities of all validation queries to their galleries."""
        pairs = sum(queries * images for queries, images in self.sizes.val)
        return Work("similarities", 2 * pairs * self.clip.dim, "fp32")


@dataclass(frozen=True, kw_only=True)
class FineTuning(Training):
    """Stage 1: the CLIP learns."""

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
        """Galleries that no epoch changes are encoded once."""
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
class CombinerTraining(Training):
    """Stage 2: a Combiner learns on features that the CLIP made.

    Attributes:
        combiner: without data, see `combiner_to_count`.
        experts: how many it has; 0 without a mixture.
        negatives: of a query, one of NEGATIVES.
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
        """Count the loss; a bank's loss also computes its gradient, by a second, equal matrix multiplication."""
        if self.negatives == "batch":
            return super().loss(way)
        counted = self._lost(way, bank=self._targets)
        product = counted.operations / 2
        return counted.peak, [
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
        return self.clip.encoding(self.sizes.images + self.sizes.gallery, captions)

    def ways(self, asked: Way) -> Iterator[Way]:
        least = 1 if self.negatives == "bank" else 2  # without a negative nothing is learned
        for batch_size in _halves(asked.batch_size, least):
            yield replace(asked, batch_size=batch_size)

    @property
    def _targets(self) -> int:
        """Images that are a target of some training triplet, at the most."""
        return min(self.sizes.triplets, self.sizes.images)

    def _features(self) -> int:
        """Bytes of the frozen features of training and validation, and of the targets' normalised ones."""
        captions = self.sizes.variants * self.sizes.triplets
        compared = self.sizes.images if self.hard_negatives else self._targets
        training = self.sizes.images + compared + captions
        validation = self.sizes.gallery + self.sizes.queries
        return (training + validation) * self.clip.dim * FLOAT

    def _workspace(self, rows: int) -> int:
        """Bytes that attention's backward pass takes for itself.

        In half precision the memory-efficient kernel adds up the gradients of heads longer than 128 in float32, 256
        rows of a head for each head of each sequence (torch's mem_eff_attention/kernel_backward.h).
        """
        most = 0
        for module in self.combiner.modules():
            if isinstance(module, nn.MultiheadAttention) and module.head_dim > 128:
                most = max(most, module.num_heads * module.head_dim)
        return 0 if self.precision == "fp32" else rows * 256 * most * FLOAT

    def _composing(self) -> Work:
        """All validation queries composed, as in training: torch knows no operations of evaluation's attention."""
        queries = self.sizes.queries
        operations = self._composed(queries, self.precision).operations
        return Work(f"composing {queries:,} queries", operations, "fp32")

    def _composed(self, rows: int, precision: str | None = None) -> Counted:
        return _composed(self.combiner, rows, self.clip.dim, self.experts, precision)


def combiner_to_count(clip: CountedClip, choice: WantedCombiner) -> Composer:
    """A Combiner without data for features of a CLIP."""
    with torch.device("meta"):
        combiner = build_combiner({"clip_dim": clip.dim, **choice.model_dump()})
    without_data(combiner)
    return combiner


def _halves(rows: int, least: int) -> Iterator[int]:
    """Half of some rows, half of that, and so on, but no fewer than `least`."""
    while (rows := rows // 2) >= least:
        yield rows
