"""What settings on disk may hold, beside the flags of a training, which `settings.groups` declares."""

from typing import Annotated, Any, Generic, TypeVar

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from runtime import choices
from runtime.schema import Schema
from settings.declaring import AnyText, OneOf, Typed
from settings.groups import BothStages, Count, Experts, Number, SideRatio, Width

Stage = TypeVar("Stage", bound=BothStages)
ABSENT: Any = None  # where a field may be missing; it is never read from here

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
Transform = Annotated[str, OneOf(choices.TRANSFORMS)]
Decode = Annotated[str, OneOf(choices.DECODINGS)]
Background = Annotated[str, OneOf(choices.BACKGROUNDS)]
EncodePrecision = Annotated[str, OneOf(choices.ENCODE_PRECISIONS)]
CombinerType = Annotated[str, OneOf(choices.COMBINER_TYPES)]
PathText = Annotated[str, Typed(str)]
Text = AnyText
Layers = Annotated[int, Field(ge=1, le=1000)]
Metrics = dict[str, float]
Colour = Annotated[list[float], Field(min_length=3, max_length=3)]


class Model(Schema):
    """What a CLIP is that is none of OpenAI's, see `models.backbone.Backbone`."""

    interpolation: Annotated[str, OneOf(choices.INTERPOLATIONS)] = ABSENT
    resize_mode: Annotated[str, OneOf(choices.RESIZE_MODES)] = ABSENT
    mean: Colour = ABSENT
    std: Colour = ABSENT
    context: Count = ABSENT
    architecture: Digest = ABSENT


class Measured(Model):
    """What was found of a CLIP."""

    resolution: Count = ABSENT
    clip_dim: Count = ABSENT


class Preprocessing(Measured):
    """What images and features are made with."""

    clip_model_name: PathText = ABSENT
    transform: Transform = ABSENT
    target_ratio: SideRatio = ABSENT
    decode: Decode = ABSENT
    background: Background = ABSENT
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
    recipe: Preprocessing
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


class Parts(Schema, Generic[Stage]):
    """Settings as a stage writes them."""

    flags: Stage
    recipe: Preprocessing
    data: Data
    versions: dict[str, str]


class Beside(Schema):
    """What a checkpoint holds beside its weights."""

    epoch: Number = ABSENT
    metrics: Metrics = ABSENT
    config: dict[str, Any] = ABSENT
