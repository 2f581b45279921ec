"""A CLIP that need not be at hand: what its steps and its encodings take of a GPU."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from models.architectures import ARCHITECTURES
from models.backbone import Backbone, choose_trained
from models.clip_model import CLIP, load_clip, ready
from models.clip_model import backbone as openai_backbone
from models.names import find_clip, open_clip_name
from training.counting import Counted, NoData, autocast_dtype, bytes_of, weights_bytes
from training.stage1 import SumFeatures
from utils import UserError

# What the packages call the blocks that they check gradients at.
BLOCKS = {"Block", "Bottleneck", "EvaBlock", "ResidualAttentionBlock"}


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a step is taken; the fields are named as their flags."""

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


class CountedClip:
    """A CLIP without data: what its activations take while it learns.

    Args:
        name: what `--clip-model-name` says; published weights are not fetched for it.
        trained: one of ENCODERS; None where nothing learns.
    """

    def __init__(self, name: str, trained: str | None = None) -> None:
        self.name = name
        self.trained = trained
        self.gpu = NoData()
        self.plain, self.backbone = self._without_data()
        self.dim = self.backbone.dim
        self.weights, self.learned = weights_bytes(self.plain)

    def _without_data(self) -> tuple[Any, Backbone]:
        clip, backbone = _unloaded(self.name)
        if self.trained:
            choose_trained(clip, self.trained)
        return self.gpu.holding(clip), backbone

    @functools.cached_property
    def blocks(self) -> tuple[type[nn.Module], ...]:
        """The kinds of its blocks, whose activations `--gradient-checkpointing` makes again; none where unknown."""
        kinds = {type(module) for module in self.plain.modules()}
        return tuple(kind for kind in kinds if BLOCKS & {base.__name__ for base in kind.__mro__})

    @functools.cached_property
    def checkpointed(self) -> nn.Module:
        """The same with `--gradient-checkpointing`."""
        clip, backbone = self._without_data()
        backbone.checkpoint_gradients(clip)
        return clip

    def inputs(self, rows: int) -> list[torch.Tensor]:
        """References, targets and tokens of some triplets."""
        images = (rows, 3, self.backbone.resolution, self.backbone.resolution)
        return [
            self.gpu.empty(images, torch.uint8),
            self.gpu.empty(images, torch.uint8),
            self.gpu.empty((rows, self.backbone.tokenizer.context), torch.long),
        ]

    def activations(self, way: Way, precision: str) -> int:
        """Bytes of the activations of one micro-batch at their peak.

        They are counted for two rows and for the whole batch. Between, they are on a line or below it: a peak is the
        largest of sums that each grow with the rows.
        """
        few = 2
        many = max(way.batch_size, few + 1)
        least = self._counted_activations(few, precision, way.gradient_checkpointing)
        most = self._counted_activations(many, precision, way.gradient_checkpointing)
        return round(least + (most - least) * (way.rows - few) / (many - few))

    def _counted_activations(self, rows: int, precision: str, checkpointed: bool) -> int:
        plain = _learning(self, rows, precision, checkpointed=False)
        if not checkpointed:
            return plain.peak
        if not self.blocks:
            raise UserError(
                f"--gradient-checkpointing cannot be planned for {self.name}: leave it out, and take a smaller "
                "--micro-batch-size"
            )
        again = _learning(self, rows, precision, checkpointed=True)
        # When a block's turn comes in the backward pass: what was kept before it, and its own activations once more.
        pairs = zip(again.blocks, plain.blocks, strict=True)
        return max(again.peak, *(kept + own for (kept, _), (_, own) in pairs))


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
def _learning(clip: CountedClip, rows: int, precision: str, *, checkpointed: bool) -> Counted:
    """The forward pass of a step of stage 1."""
    model = SumFeatures(clip.checkpointed if checkpointed else clip.plain, clip.backbone)
    inputs = clip.inputs(rows)
    return clip.gpu.count(
        lambda: model(*inputs), dtype=autocast_dtype(precision), watched=clip.blocks
    )


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How images and captions are encoded: a batch at a time, without gradient."""

    clip: CountedClip
    batch_size: int
    precision: str

    @property
    def memory(self) -> int:
        """Bytes at the peak."""
        counted = _encoded(self)
        return max(part.peak for part in counted) + bytes_of(self.clip.inputs(self.batch_size))

    @property
    def operations(self) -> tuple[float, float]:
        """Of one image and of one caption."""
        images, captions = _encoded(self)
        return images.operations / self.batch_size, captions.operations / self.batch_size

    def work(self, images: int, captions: int) -> list[Work]:
        """Images and captions encoded."""
        image, caption = self.operations
        return [
            Work(f"encoding {images:,} images", images * image, self.precision),
            Work(f"encoding {captions:,} captions", captions * caption, self.precision),
        ]


@functools.cache
def _encoded(encoding: Encoding) -> tuple[Counted, Counted]:
    """A batch of images encoded, and one of captions."""
    clip = encoding.clip
    images, _, tokens = clip.inputs(encoding.batch_size)
    dtype = autocast_dtype(encoding.precision)
    with torch.no_grad():
        return (
            clip.gpu.count(
                lambda: clip.plain.encode_image(clip.backbone.normalise(images)), dtype=dtype
            ),
            clip.gpu.count(lambda: clip.plain.encode_text(tokens), dtype=dtype),
        )
