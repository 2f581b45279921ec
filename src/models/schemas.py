"""Schemas of settings on disk, except for the flags of training runs, which `settings.groups` declares."""

import re
from typing import Annotated, Any, Generic, TypeVar

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from runtime import choices
from runtime.schema import Schema
from settings.declaring import OneOf, Typed
from settings.groups import BothStages, Count, Experts, Number, SideRatio, Width

Stage = TypeVar("Stage", bound=BothStages)
ABSENT: Any = None  # default that makes a field optional; its value is never read

EXPERTS = "experts.json"  # typical queries of each expert, next to a Combiner's weights or in the run folder
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Transform = Annotated[str, OneOf(choices.TRANSFORMS)]
PathText = Annotated[str, Typed(str)]
Layers = Annotated[int, Field(ge=1, le=1000)]
Deviation = Annotated[float, Field(gt=0)]
ColourValues = Annotated[list[float], Field(min_length=3, max_length=3)]


Background = Annotated[str, OneOf(choices.BACKGROUNDS)]


class Preprocessing(Schema):
    """Preprocessing of images and features; for CLIPs other than OpenAI's, also the fields of `models.backbone`."""

    clip_model_name: PathText = ABSENT
    transform: Transform = ABSENT
    target_ratio: SideRatio = ABSENT
    decode: Annotated[str, OneOf(choices.DECODINGS)] = ABSENT
    background: Background = ABSENT
    encode_precision: Annotated[str, OneOf(choices.ENCODE_PRECISIONS)] = ABSENT
    resolution: Count = ABSENT
    clip_dim: Count = ABSENT
    interpolation: Annotated[str, OneOf(choices.INTERPOLATIONS)] = ABSENT
    resize_mode: Annotated[str, OneOf(choices.RESIZE_MODES)] = ABSENT
    mean: ColourValues = ABSENT
    std: ColourValues = ABSENT
    context: Count = ABSENT
    architecture: Digest = ABSENT


class ClipSizes(Schema):
    """Sizes of OpenAI's CLIP, see `architectures.SIZES`."""

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
    """Sizes of a Combiner, see `combiner.build_combiner`."""

    combiner_type: Annotated[str, OneOf(choices.COMBINER_TYPES)]
    clip_dim: Width
    projection_dim: Width
    hidden_dim: Width
    num_experts: Experts | None
    top_k: Experts | None
    shared_expert: bool = ABSENT
    router_norm: bool = ABSENT
    router_bias: bool = ABSENT


class ExportedWeights(Schema):
    """Digests of one part of an exported pair, of the loaded weights and of their file."""

    weights_sha256: Digest
    file_sha256: Digest


class ExportedClip(ExportedWeights):
    """The CLIP of an exported pair: sizes for OpenAI's CLIP, digests of the files that another CLIP is built from."""

    sizes: ClipSizes | None
    files: dict[Annotated[str, Field(pattern=r"^\w[\w.-]*$")], Digest] = ABSENT

    @model_validator(mode="after")
    def _can_be_built(self) -> "ExportedClip":
        if bool(self.files) == bool(self.sizes):
            raise PydanticCustomError("built", "it should have either sizes or files")
        return self


class ExportedCombiner(ExportedWeights):
    """The Combiner of an exported pair."""

    sizes: CombinerSizes


class Exported(Schema):
    """Content of an exported pair's config.json."""

    form: Count
    recipe: Preprocessing
    clip: ExportedClip
    combiner: ExportedCombiner | None
    half: bool
    versions: dict[str, str]
    sha256: Digest


def published(form: str) -> AfterValidator:
    """Return a validator for optional published names that match a pattern, unlike paths of folders and files."""

    def check(name: str | None) -> str | None:
        if name and not re.fullmatch(form, name):
            raise PydanticCustomError(
                "name",
                "it should be a published name, because a configuration may not refer to a folder or file",
            )
        return name

    return AfterValidator(check)


Repository = Annotated[str | None, published(r"\w[\w.-]*(/\w[\w.-]*)?")]
Architecture = Annotated[str | None, published(r"\w[\w.-]*")]


class TokenizerArguments(Schema, extra="forbid"):
    """Allowed arguments of a tokenizer. Others would be passed to transformers and might make it run code."""

    clean: str = ABSENT
    strip_sep_token: bool = ABSENT
    language: str = ABSENT
    reduction_mask: str = ABSENT


class TextTower(Schema):
    """text_cfg of an open_clip model."""

    hf_model_name: Repository = ABSENT
    hf_tokenizer_name: Repository = ABSENT
    tokenizer_kwargs: TokenizerArguments = ABSENT


class ImageTower(Schema):
    """vision_cfg of an open_clip model."""

    timm_model_name: Architecture = ABSENT


class Towers(Schema):
    """model_cfg of an open_clip model, whose other fields the package itself checks."""

    vision_cfg: ImageTower
    text_cfg: TextTower


class OpenClipPreprocessing(Schema):
    """preprocess_cfg of an open_clip model; a single number applies to all three colour channels."""

    mean: float | ColourValues = ABSENT
    std: Deviation | Annotated[list[Deviation], Field(min_length=3, max_length=3)] = ABSENT
    interpolation: Annotated[str, OneOf((*choices.INTERPOLATIONS, "random"))] = ABSENT
    resize_mode: Annotated[str, OneOf(choices.RESIZE_MODES)] = ABSENT
    fill_color: Any = ABSENT

    @model_validator(mode="after")
    def _is_padded_with_black(self) -> "OpenClipPreprocessing":
        if self.resize_mode == "longest" and self.fill_color not in (None, 0):
            raise PydanticCustomError("colour", "only fill_color 0 is supported")
        return self


class OpenClipConfig(Schema):
    """Content of open_clip_config.json."""

    model_cfg: Towers
    preprocess_cfg: OpenClipPreprocessing = ABSENT


class DataDigests(Schema):
    """Digests of the files that were read, and the excluded images."""

    data_sha256: Digest = ABSENT
    clip_weights: Digest = ABSENT
    excluded: dict[str, Any] | None = ABSENT
    images: Digest = ABSENT


class StoredSettings(Schema, Generic[Stage]):
    """Settings as a training stage writes them."""

    flags: Stage
    recipe: Preprocessing
    data: DataDigests
    versions: dict[str, str]


class Beside(Schema):
    """Fields of a checkpoint besides its weights."""

    epoch: Number = ABSENT
    metrics: dict[str, float] = ABSENT
    config: dict[str, Any] = ABSENT


class Expert(Schema):
    """Queries that an expert receives more often than the others do, see `reports.expert_report.expert_names`."""

    takes: list[str] = Field(description="Kinds of queries, or frequent words of their captions.")
    is_idle: bool = Field(description="Whether the router sent it no query.")


class ExpertReport(Schema):
    """Contents of the EXPERTS file, which visualize.py writes.

    Attributes:
        of_weights: digest of the Combiner's weights.
    """

    of_weights: Digest
    experts: list[Expert]
