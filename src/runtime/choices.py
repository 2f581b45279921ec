"""Declare the choices of flags, and plain records of them, in a module that is cheap to import."""

from collections.abc import Mapping
from typing import Any

HYPER_PARAMETERS = "training_hyperparameters.json"  # of a run: how it was started
ENCODERS = ("both", "text", "image")  # what stage 1 trains
TRANSFORMS = ("clip", "squarepad", "targetpad")
INTERPOLATIONS = ("bicubic", "bilinear")
RESIZE_MODES = ("shortest", "longest", "squash")  # what makes a square of an image
DECODINGS = ("full", "draft")  # draft: JPEG files are scaled down while they are decoded
ORIGINAL = "original"  # no background: images are read as the original reads them
WHITE = "white"
BACKGROUNDS = (ORIGINAL, WHITE, "black", "grey")  # seen where a photo is transparent
AUTO = "auto"  # the value of a flag that leaves a decision to what would be gained
# Name of --combiner-type -> the class in combiner.py; docs/new-combiner.md adds one.
COMBINER_TYPES = {
    "moe": "Combiner",
    "clip4cir": "PlainCombiner",
}
LORA_TARGETS = ("attention,mlp", "attention", "mlp")  # which layers of CLIP have adapters
LOSSES = ("contrastive", "symmetric")
NEGATIVES = ("batch", "bank")  # of a query in stage 2: the other targets of its batch, or all
MINED = "mined"
HARD_NEGATIVES = (MINED, "group", "column")  # where they are from
COMBINING_FUNCTIONS = ("sum", "combiner", "image", "text")
ENCODE_PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
PRECISIONS = ("amp", "fp16", "bf16", "fp32")
TOLD_BY = ("time", "sample", "content")  # how a changed image is told, see `runtime.files.stamp`
# Those of `clip.available_models()`, which only the clip package tells, and importing that takes seconds.
OPENAI_CLIPS = (
    "RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px",
)  # fmt: skip


# What was the only way before there was a choice. Keys, results and indexes of then do not name it, and stay valid.
UNNAMED = {
    "decode": "full",
    "encode_precision": "fp32",
    "negatives": "batch",
    "background": ORIGINAL,
}


def named(choices: Mapping[str, Any]) -> dict[str, Any]:
    """Choices as keys, results and indexes say them."""
    return {name: value for name, value in choices.items() if (name, value) not in UNNAMED.items()}
