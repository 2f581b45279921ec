"""OpenAI's CLIP: load models, tokenize captions, write tiny models with random weights."""

import functools
import logging
import urllib.error
import urllib.request  # the clip package uses it without importing it
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.architectures import OTHER_CLIP, SIZES, sizes_of
from models.backbone import Backbone, Tokenizer
from models.clip_package import (
    CLIP,
    Bottleneck,
    ModifiedResNet,
    ResidualAttentionBlock,
    clip,
    convert_weights,
)
from models.lean_clip import make_lean
from models.names import find_clip
from models.weights_file import read_clip
from runtime import distributed
from runtime.tensors import save_tensors
from runtime.weights import Unfilled, differences, fitted
from utils import UserError, first_line, seed_everything

logger = logging.getLogger(__name__)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
OF_NO_KNOWN_FORM = "not a CLIP"
# Name prefixes of the first and last matrices of both encoders.
VITAL = (
    "visual.conv1",
    "visual.proj",
    "visual.attnpool.c_proj",
    "token_embedding",
    "text_projection",
    "text.token_embedding",
    "text.text_projection",
    "visual.head.proj",
)


def load_clip(name: str, device: torch.device) -> CLIP:
    """Build a CLIP model in eval mode with float32 weights.

    The weights are first rounded to fp16, as the clip package always does. Weights that
    `load_finetuned` loads later stay float32.

    Args:
        name: one of `clip.available_models()`, or the path of a checkpoint: a plain state dict or
            OpenAI's archive.

    Raises:
        UserError: the name is unknown, the download fails, or no CLIP can be built from the file.
    """
    path = find_clip(name) or _download(name)
    source = f"--clip-model-name {path}"
    found = read_clip(path)
    if found.activation == "gelu":
        raise UserError(
            f"{source} was trained with GELU, but OpenAI's CLIPs use QuickGELU: {OTHER_CLIP}"
        )
    if found.is_foreign and not found.activation:
        logger.warning(
            "warning: %s does not record its activation: assuming QuickGELU, as in OpenAI's CLIPs; if it is GELU, %s",
            source,
            OTHER_CLIP,
        )
    remedy = "pass a state dict of OpenAI's CLIP"
    sizes = sizes_of(found.state, source=source, remedy=remedy)
    model = _unfilled(sizes, f"{source} has weights of impossible sizes: {remedy}")
    convert_weights(model)
    weights = fitted(found.state, model.state_dict(), source=source, remedy=remedy, vital=VITAL)
    model.load_state_dict(weights)
    return ready(model, device)


def _unfilled(sizes: Sequence[Any], refusal: str) -> CLIP:
    """Build a CLIP of given sizes with uninitialised weights. Raises UserError if the sizes are impossible."""
    try:
        with Unfilled():
            return CLIP(*sizes)
    except (RuntimeError, ValueError, AssertionError, ZeroDivisionError):
        raise UserError(refusal) from None


def load_sized(
    sizes: Mapping[str, Any], state: Mapping[str, Any], path: Path, *, device: torch.device
) -> CLIP:
    """Build a float32 CLIP of given sizes from a state dict, without downloading anything or rounding weights.

    Args:
        sizes: see `architectures.SIZES`.
        path: file of the weights, for error messages.

    Raises:
        UserError: the sizes are impossible, or the weights do not fit them or are damaged, see
            `fitted`.
    """
    source = f"--pair {path}"
    remedy = "copy the folder again, or export it again"
    in_order = [sizes[name] for name in SIZES]
    model = _unfilled(in_order, f"{source}: its sizes are impossible: {remedy}")
    weights = fitted(state, model.state_dict(), source=source, remedy=remedy, vital=VITAL)
    model.load_state_dict(weights)
    return ready(model, device)


def sizes_by_name(model: CLIP) -> dict[str, Any]:
    """Return a model's sizes by name, as `load_sized` needs them."""
    sizes = sizes_of(model.state_dict(), source="the model", remedy="choose another")
    return dict(zip(SIZES, sizes, strict=True))


def ready(model: CLIP, device: torch.device) -> CLIP:
    """Prepare a built model for use: float32, eval mode, lean, and on the device in the fastest memory layout."""
    model = make_lean(model.float().eval()).to(device)
    if device.type == "cuda" and isinstance(model.visual, ModifiedResNet):
        # Convolutions on a GPU are faster with channels last.
        model.visual.to(memory_format=torch.channels_last)
    return model


def _download(name: str) -> Path:
    """Return the archive of a pretrained CLIP, from the clip package's cache or its download server."""
    url = clip.clip._MODELS[name]
    cached = Path("~/.cache/clip").expanduser() / Path(url).name
    try:
        with distributed.first_on_machine():
            return Path(clip.clip._download(url, str(cached.parent)))
    except (OSError, RuntimeError, urllib.error.URLError) as error:
        raise UserError(
            f"--clip-model-name {name} could not be downloaded ({first_line(error)}): download {url} on another "
            f"machine and put it at {cached}"
        ) from None


def load_finetuned(model: CLIP, state: dict[str, Any], path: Path) -> None:
    """Copy stage-1 weights into the model, in float32.

    Raises:
        UserError: the weights belong to another architecture (the message describes both), or some
            are missing, extra or damaged, see `fitted`.
    """
    built = model.state_dict()
    source = f"--clip-model-path {path}"
    known = OF_NO_KNOWN_FORM not in (describe(state), describe(built))
    if known and describe(state) != describe(built) and differences(state, built):
        source += f" ({describe(state)}; --clip-model-name builds a {describe(built)})"
    remedy = "choose the --clip-model-name that it was trained from"
    model.load_state_dict(fitted(state, built, source=source, remedy=remedy, vital=VITAL))


def describe(state: dict[str, Tensor]) -> str:
    """Describe one of OpenAI's architectures in words, from the shapes of its weights."""
    try:
        if "visual.proj" in state:
            kind = "ViT"
            positions = state["visual.positional_embedding"]
        else:
            kind = "ResNet"
            positions = state["visual.attnpool.positional_embedding"]
        width = state["visual.conv1.weight"].shape[0]
        embedding = state["text_projection"].shape[1]
        return f"{kind} of width {width}, {len(positions) - 1} patches, embedding {embedding}"
    except (KeyError, AttributeError, IndexError, TypeError):
        return OF_NO_KNOWN_FORM


def checkpoint_gradients(model: nn.Module) -> None:
    """Make blocks recompute their activations in the backward pass instead of keeping them (Chen et al. 2016)."""
    checkpoint_blocks(model, Bottleneck, ResidualAttentionBlock)


def checkpoint_blocks(model: nn.Module, *kinds: type[nn.Module]) -> None:
    """Enable gradient checkpointing for all blocks of the given classes."""
    for block in model.modules():
        if isinstance(block, kinds):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def resolution(model: CLIP) -> int:
    """Return the side of the input images, in pixels."""
    return model.visual.input_resolution


WORDS_KEPT = 100_000  # maximum number of words whose tokens are cached; no benchmark has more


def tokenize(captions: list[str], columns: int = 77) -> Tensor:
    """Tokenize captions with the vocabulary of OpenAI's CLIPs, (len(captions), columns); longer captions are cut."""
    tokens = clip.tokenize(captions, columns, truncate=True)
    words = clip.clip._tokenizer.cache  # the clip package never removes a word from it
    while len(words) > WORDS_KEPT:
        words.popitem()
    return tokens


def backbone(model: CLIP) -> Backbone:
    """Return the backbone that describes one of OpenAI's CLIPs."""
    return Backbone(
        dim=model.text_projection.shape[1],
        resolution=resolution(model),
        mean=CLIP_MEAN,
        std=CLIP_STD,
        interpolation="bicubic",
        resize_mode="shortest",
        tokenizer=Tokenizer(
            tokenize, model.context_length, vocabulary=model.vocab_size, is_trimmed=True
        ),
        checkpoint_gradients=checkpoint_gradients,
    )


TINY_VISION: dict[str, dict[str, Any]] = {
    "vit": {"vision_layers": 4, "vision_patch_size": 8, "vision_width": 64},
    "resnet": {"vision_layers": (1, 1, 1, 1), "vision_patch_size": None, "vision_width": 16},
}
TINY_TEXT = {
    "context_length": 77,
    "vocab_size": 49408,
    "transformer_width": 64,
    "transformer_heads": 1,
    "transformer_layers": 2,
}


def write_tiny_clip(path: Path, kind: str, seed: int = 0, image_resolution: int = 32) -> None:
    """Write the state dict of a small CLIP with random weights, which `--clip-model-name PATH` loads.

    Args:
        kind: "vit" or "resnet".
        image_resolution: side of the images in pixels, a multiple of 8 (vit) or 32 (resnet).
    """
    seed_everything(seed)
    model = CLIP(embed_dim=64, image_resolution=image_resolution, **TINY_VISION[kind], **TINY_TEXT)
    save_tensors(path, {name: weight.half() for name, weight in model.state_dict().items()})
