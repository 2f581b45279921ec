"""What flags choose from, and what they chose: names and plain records that importing costs nothing for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENCODERS = ("both", "text", "image")  # what stage 1 trains
TRANSFORMS = ("clip", "squarepad", "targetpad")
INTERPOLATIONS = ("bicubic", "bilinear")
RESIZE_MODES = ("shortest", "longest", "squash")  # what makes a square of an image
DECODINGS = ("full", "draft")  # draft: JPEG files are scaled down while they are decoded
AUTO = "auto"  # the value of a flag that leaves a decision to what would be gained
COMBINER_TYPES = ("moe", "clip4cir")
NEGATIVES = ("batch", "bank")  # of a query in stage 2: the other targets of its batch, or all
COMBINING_FUNCTIONS = ("sum", "combiner", "image", "text")
ENCODE_PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
PRECISIONS = ("amp", "fp16", "bf16", "fp32")
TOLD_BY = ("time", "sample", "content")  # how a changed image is told, see `runtime.files.stamp`
INDEX_KINDS = ("flat", "hnsw", "ivfpq")  # of FAISS
MILVUS_KINDS = ("flat", "hnsw", "ivfflat")
# Those of `clip.available_models()`, which only the clip package tells, and importing that takes seconds.
OPENAI_CLIPS = (
    "RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ClipChoice:
    """Which CLIP, how its images are preprocessed and in what precision it encodes; None where the flags are silent."""

    clip_model_name: str | None = None
    transform: str | None = None
    target_ratio: float | None = None
    decode: str | None = None
    encode_precision: str | None = None


# What was the only way before there was a choice. Keys, results and indexes of then do not name it, and stay valid.
UNNAMED = {"decode": "full", "encode_precision": "fp32", "negatives": "batch"}


def named(choices: Mapping[str, Any]) -> dict[str, Any]:
    """Choices as keys, results and indexes say them."""
    return {name: value for name, value in choices.items() if (name, value) not in UNNAMED.items()}


@dataclass(frozen=True, kw_only=True)
class CombinerChoice:
    """What a Combiner is wanted to be; None where the flags are silent."""

    combiner_type: str | None = None
    projection_dim: int | None = None
    hidden_dim: int | None = None
    num_experts: int | None = None
    top_k: int | None = None


@dataclass(frozen=True, kw_only=True)
class PairChoice:
    """The trained pair that an evaluation asks for.

    Attributes:
        combining_function: one of COMBINING_FUNCTIONS; None for the combiner where its path is given, else the sum.
        clip_path: stage-1 weights, None for the model's own.
        combiner_path: stage-2 weights.
        exported: an exported pair, which stands for both paths: its folder, or "hf-hub:" and a repository.
        workers: processes that decode images.
        feature_cache: keeps the features of what is measured; None for none.
        told_by: how it tells a changed image, see `runtime.files.stamp`.
    """

    combining_function: str | None
    clip_path: Path | None
    combiner_path: Path | None
    exported: Path | str | None = None
    clip: ClipChoice = ClipChoice()
    combiner: CombinerChoice = CombinerChoice()
    workers: int = 0
    feature_cache: Path | None = None
    told_by: str = "sample"
