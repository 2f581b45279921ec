"""Choices of flags, and the form in which they are recorded, in a module that is cheap to import."""

from collections.abc import Mapping
from typing import Any

HYPER_PARAMETERS = "training_hyperparameters.json"  # settings of a run, in its folder
ENCODERS = ("both", "text", "image")  # encoders that stage 1 trains
TRANSFORMS = ("clip", "squarepad", "targetpad")
INTERPOLATIONS = ("bicubic", "bilinear")
RESIZE_MODES = ("shortest", "longest", "squash")  # ways to make an image square
DECODINGS = ("full", "draft")  # draft: JPEG files are scaled down while they are decoded
ORIGINAL = "original"  # no background: images are read as by the original implementation
WHITE = "white"
BACKGROUNDS = (ORIGINAL, WHITE, "black", "grey")  # colours that replace transparent pixels
AUTO = "auto"  # flag value that lets the program decide by the expected gain
# Value of --combiner-type -> class in combiner.py; docs/new-combiner.md shows how to add a class.
COMBINER_TYPES = {
    "moe": "Combiner",
    "clip4cir": "PlainCombiner",
}
LORA_TARGETS = ("attention,mlp", "attention", "mlp")  # layers of CLIP that get adapters
LOSSES = ("contrastive", "symmetric")
NEGATIVES = ("batch", "bank")  # a query's stage-2 negatives: other targets of its batch, or all
MINED = "mined"
HARD_NEGATIVES = (MINED, "group", "column")  # sources of hard negatives
COMBINING_FUNCTIONS = ("sum", "combiner", "image", "text")
ENCODE_PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
PRECISIONS = ("amp", "fp16", "bf16", "fp32")
TOLD_BY = ("time", "sample", "content")  # ways to detect a changed image, see `files.stamp`
# Copy of `clip.available_models()`, because importing the clip package takes seconds.
OPENAI_CLIPS = (
    "RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px",
)  # fmt: skip


# Values that had no alternative in earlier versions, whose keys, results and indexes do not record them and stay valid.
UNNAMED = {
    "decode": "full",
    "encode_precision": "fp32",
    "negatives": "batch",
    "background": ORIGINAL,
}


def named(choices: Mapping[str, Any]) -> dict[str, Any]:
    """Return the choices that keys, results and indexes record, without the values in UNNAMED."""
    return {name: value for name, value in choices.items() if (name, value) not in UNNAMED.items()}
