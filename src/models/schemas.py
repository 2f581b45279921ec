"""What settings on disk may hold: the parts of `Settings`, with an entry for each flag of a training.

A value is of the type and in the range that its flag takes. What an earlier version did not write may be missing, and
what a later one wrote beside may stay.
"""

from collections.abc import Collection
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    Field,
    PlainValidator,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from benchmarks import BENCHMARKS
from runtime import choices
from runtime.schema import Schema

ABSENT: Any = None  # in a file of a version that had no such field; it is never read from here


def _text(value: Any) -> str:
    """A text of any characters: pydantic's own has no place for the paths that are not UTF-8."""
    if not isinstance(value, str):
        raise PydanticCustomError("text", "it should be a text")
    return value


def _path(value: Any) -> str:
    if not _text(value) or "\0" in value:
        raise PydanticCustomError("path", "it should be a path")
    return value


def one_of(names: Collection[str]) -> AfterValidator:
    """One of some names."""

    def check(value: str) -> str:
        if value not in names:
            raise PydanticCustomError("name", f"it should be one of {', '.join(names)}")
        return value

    return AfterValidator(check)


Text = Annotated[str, PlainValidator(_text)]
PathText = Annotated[str, PlainValidator(_path)]
# Numbers, in the ranges of `cli.flag_types`.
Count = Annotated[int, Field(ge=1, le=10**6)]
Number = Annotated[int, Field(ge=0, le=10**6)]
Rows = Annotated[int, Field(ge=1, le=10**9)]
Workers = Annotated[int, Field(ge=0, le=256)]
Width = Annotated[int, Field(ge=1, le=100_000)]
Layers = Annotated[int, Field(ge=1, le=1000)]
Experts = Annotated[int, Field(ge=1, le=4096)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Positive = Annotated[float, Field(ge=1e-9, le=1e9)]
LearningRate = Annotated[float, Field(ge=1e-12, le=100)]
Weight = Annotated[float, Field(ge=0, le=10**6)]
Fraction = Annotated[float, Field(ge=1e-9, le=1 - 1e-9)]
SideRatio = Annotated[float, Field(ge=0.1, le=1000)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
Benchmark = Annotated[str, one_of(BENCHMARKS)]
Transform = Annotated[str, one_of(choices.TRANSFORMS)]
Decode = Annotated[str, one_of(choices.DECODINGS)]
EncodePrecision = Annotated[str, one_of(choices.ENCODE_PRECISIONS)]
Precision = Annotated[str, one_of(choices.PRECISIONS)]
Encoder = Annotated[str, one_of(choices.ENCODERS)]
Negatives = Annotated[str, one_of(choices.NEGATIVES)]
CombinerType = Annotated[str, one_of(choices.COMBINER_TYPES)]
Metrics = dict[str, float]
Colour = Annotated[list[float], Field(min_length=3, max_length=3)]


class Model(Schema):
    """What a CLIP is that is none of OpenAI's, see `models.backbone.Backbone`."""

    interpolation: Annotated[str, one_of(choices.INTERPOLATIONS)] = ABSENT
    resize_mode: Annotated[str, one_of(choices.RESIZE_MODES)] = ABSENT
    mean: Colour = ABSENT
    std: Colour = ABSENT
    context: Count = ABSENT
    architecture: Digest = ABSENT


class Measured(Model):
    """What was found of a CLIP."""

    resolution: Count = ABSENT
    clip_dim: Count = ABSENT


class Recipe(Measured):
    """What images and features are made with."""

    clip_model_name: PathText = ABSENT
    transform: Transform = ABSENT
    target_ratio: SideRatio = ABSENT
    decode: Decode = ABSENT
    encode_precision: EncodePrecision = ABSENT


class ClipSizes(Schema):
    """What OpenAI's CLIP is built of, see `architectures.SIZES`."""

    embed_dim: Width
    image_resolution: Width
    vision_layers: Layers | Annotated[list[Layers], Field(min_length=4, max_length=4)]
    vision_width: Width
    vision_patch_size: Width | None
    context_length: Width
    vocab_size: Count
    transformer_width: Width
    transformer_heads: Width
    transformer_layers: Layers


class CombinerSizes(Schema):
    """What a Combiner is built of, see `combiner.build_combiner`."""

    combiner_type: CombinerType
    clip_dim: Width
    projection_dim: Width
    hidden_dim: Width
    num_experts: Experts | None
    top_k: Experts | None


class ExportedWeights(Schema):
    """Digests of a part of an exported pair: of its weights as they are loaded, and of its file."""

    weights_sha256: Digest
    file_sha256: Digest


class ExportedClip(ExportedWeights):
    """The CLIP of an exported pair: OpenAI's has sizes, and open_clip's the digests of the files it is built from."""

    sizes: ClipSizes | None
    files: dict[FileName, Digest] = ABSENT

    @model_validator(mode="after")
    def _can_be_built(self) -> "ExportedClip":
        if bool(self.files) == bool(self.sizes):
            raise PydanticCustomError("built", "it should have either sizes or files")
        return self


class ExportedCombiner(ExportedWeights):
    """The Combiner of an exported pair."""

    sizes: CombinerSizes


class Exported(Schema):
    """config.json of an exported pair."""

    form: Count
    recipe: Recipe
    clip: ExportedClip
    combiner: ExportedCombiner | None
    half: bool
    versions: dict[str, str]
    sha256: Digest


class Data(Schema):
    """Digests of what was read, and what was left out of it."""

    data_sha256: Digest = ABSENT
    clip_weights: Digest = ABSENT
    excluded: dict[str, Any] | None = ABSENT
    images: Digest = ABSENT


class Flags(Schema):
    """The flags of both trainings. Those that may be silent are None then."""

    # What is trained on, and where.
    script: Text = ABSENT
    command: Text = ABSENT
    started_in: Text | None = ABSENT
    dataset: Benchmark = ABSENT
    data_root: PathText = ABSENT
    exclusions: PathText | None = ABSENT
    output_dir: PathText = ABSENT
    resume: PathText | None = ABSENT
    image_cache: PathText | None = ABSENT
    feature_cache: PathText | None = ABSENT
    device: Text | None = ABSENT
    num_workers: Workers = ABSENT
    similarity_block: Rows | None = ABSENT
    workspace: Text | None = ABSENT
    experiment_name: Text | None = ABSENT
    # CLIP.
    clip_model_name: PathText | None = ABSENT
    clip_model_path: PathText | None = ABSENT
    transform: Transform | None = ABSENT
    target_ratio: SideRatio | None = ABSENT
    decode: Decode | None = ABSENT
    encode_precision: EncodePrecision | None = ABSENT
    # Both trainings.
    num_epochs: Count = ABSENT
    batch_size: Count = ABSENT
    validation_frequency: Count = ABSENT
    save_training: bool = ABSENT
    save_best: bool = ABSENT
    seed: Seed = ABSENT
    checkpoint_every_minutes: Positive = ABSENT
    precision: Precision = ABSENT
    compile: bool = ABSENT
    verify: bool = ABSENT
    mask_duplicate_targets: bool = ABSENT
    warmup_steps: Number = ABSENT
    cosine: bool = ABSENT
    clip_grad_norm: Positive | None = ABSENT
    ema_decay: Fraction | None = ABSENT
    # Stage 1.
    encoder: Encoder = ABSENT
    learning_rate: LearningRate = ABSENT
    micro_batch_size: Count | None = ABSENT
    gradient_checkpointing: bool = ABSENT
    # Stage 2.
    combiner_type: CombinerType = ABSENT
    projection_dim: Width = ABSENT
    hidden_dim: Width = ABSENT
    num_experts: Experts = ABSENT
    top_k: Experts = ABSENT
    combiner_lr: LearningRate = ABSENT
    seeds: Annotated[list[Seed], Field(min_length=1)] | None = ABSENT
    negatives: Negatives = ABSENT
    load_balancing_weight: Weight = ABSENT
    router_z_weight: Weight = ABSENT
    clip_bs: Count = ABSENT

    @field_validator("top_k")
    @classmethod
    def no_more_than_experts(cls, top_k: int, info: ValidationInfo) -> int:
        """A query goes to at most all experts of a mixture."""
        experts = info.data.get("num_experts")
        if experts and top_k > experts and info.data.get("combiner_type") != "clip4cir":
            reason = f"it should be at most num_experts, {experts}"
            raise PydanticCustomError("top_k", reason)
        return top_k

    @field_validator("seeds")
    @classmethod
    def each_seed_once(cls, seeds: list[int] | None) -> list[int] | None:
        """Each seed has a folder."""
        if seeds and len(set(seeds)) < len(seeds):
            raise PydanticCustomError("seeds", "it should name each seed once")
        return seeds


class Parts(Schema):
    """Settings as they are written."""

    flags: Flags
    recipe: Recipe
    data: Data
    versions: dict[str, str]


class Table(Flags, Measured, Data):
    """Settings in one table, as earlier versions wrote them."""

    versions: dict[str, str] | None = ABSENT
    metrics: Metrics = ABSENT


class Beside(Schema):
    """What a checkpoint holds beside its weights."""

    epoch: Number = ABSENT
    metrics: Metrics = ABSENT
    config: dict[str, Any] = ABSENT
