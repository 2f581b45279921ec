"""OpenAI's CLIP: load, tokenize, freeze, write a tiny one."""

import functools
import urllib.error
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.architectures import SIZES, sizes_of
from models.clip_package import (
    CLIP,
    Bottleneck,
    ModifiedResNet,
    ResidualAttentionBlock,
    build_model,
    clip,
    convert_weights,
)
from models.configuration import find_clip
from models.lean_clip import make_lean
from runtime import distributed
from runtime.tensors import load_tensors, save_tensors
from runtime.weights import differences, fitted, unwrapped
from utils import UserError, first_line, seed_everything

# What OpenAI's archives and safetensors files hold beside weights.
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "config")
# The first and the last matrices of both encoders.
VITAL = (
    "visual.conv1",
    "visual.proj",
    "visual.attnpool.c_proj",
    "token_embedding",
    "text_projection",
)


def load_clip(name: str, device: torch.device) -> CLIP:
    """Build a CLIP model in eval mode with float32 weights.

    Building rounds the weights to fp16, as the clip package always does. Weights that `load_finetuned` loads
    later stay float32.

    Args:
        name: one of `clip.available_models()`, or the path of a checkpoint, a plain state dict or OpenAI's
            archive.

    Raises:
        UserError: unknown name, failed download, or a file that no CLIP can be built from.
    """
    path = find_clip(name)
    if path is None:
        return ready(_download(name), device)
    source = f"--clip-model-name {path}"
    state = _archived_state(path) if _is_archive(path) else load_tensors(path)
    if "CLIP" in state:
        raise UserError(f"{source} holds fine-tuned weights: give it to --clip-model-path instead")
    weights = unwrapped(state, source)
    for name in NO_WEIGHTS:
        weights.pop(name, None)
    remedy = "name a state dict of OpenAI's CLIP"
    sizes = sizes_of(weights, source=source, remedy=remedy)
    model = _without_data(sizes, f"{source} has weights of impossible sizes: {remedy}")
    convert_weights(model)
    weights = fitted(weights, model.state_dict(), source=source, remedy=remedy, vital=VITAL)
    return ready(build_model(weights), device)


def _without_data(sizes: Sequence[Any], refusal: str) -> CLIP:
    """A CLIP of some sizes whose weights take no memory. Raises UserError where there can be none."""
    try:
        with torch.device("meta"):
            return CLIP(*sizes)
    except (RuntimeError, ValueError, AssertionError, ZeroDivisionError):
        raise UserError(refusal) from None


def load_sized(
    sizes: Mapping[str, Any], state: Mapping[str, Any], path: Path, device: torch.device
) -> CLIP:
    """A CLIP of some sizes with weights of its own, in float32: nothing is downloaded, and nothing rounded.

    Args:
        sizes: see `architectures.SIZES`.
        path: the weights' file, which errors name.

    Raises:
        UserError: the weights do not fit the sizes, or are damaged, see `fitted`.
    """
    source = f"--pair {path}"
    remedy = "copy the folder again, or export it again"
    in_order = [sizes[name] for name in SIZES]
    model = _without_data(in_order, f"{source}: its sizes are impossible: {remedy}")
    weights = fitted(state, model.state_dict(), source=source, remedy=remedy, vital=VITAL)
    model = CLIP(*in_order)
    model.load_state_dict(weights)
    return ready(model, device)


def sizes_by_name(model: CLIP) -> dict[str, Any]:
    """The sizes that `load_sized` builds a model of."""
    sizes = sizes_of(model.state_dict(), source="the model", remedy="name another")
    return dict(zip(SIZES, sizes, strict=True))


def ready(model: CLIP, device: torch.device) -> CLIP:
    """A built model as everything here uses it: float32, in eval mode, lean, on the device in its fastest layout."""
    model = make_lean(model.float().eval()).to(device)
    if device.type == "cuda" and isinstance(model.visual, ModifiedResNet):
        # Channels last, which convolutions want on a GPU.
        model.visual.to(memory_format=torch.channels_last)
    return model


def _download(name: str) -> CLIP:
    """A pretrained CLIP by name, from the clip package's cache or its download server."""
    url = clip.clip._MODELS[name]
    cached = Path("~/.cache/clip").expanduser() / Path(url).name
    try:
        with distributed.first_on_machine():
            return clip.load(name, device="cpu")[0]
    except (OSError, RuntimeError, urllib.error.URLError) as error:
        raise UserError(
            f"--clip-model-name {name} could not be downloaded ({first_line(error)}): fetch {url} elsewhere and put "
            f"it at {cached}"
        ) from None


def _is_archive(path: Path) -> bool:
    """Whether the file is a TorchScript archive, the form in which OpenAI publishes its weights."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _archived_state(path: Path) -> dict[str, Tensor]:
    try:
        return torch.jit.load(path, map_location="cpu").state_dict()
    except RuntimeError as error:
        raise UserError(
            f"{path} is not a readable TorchScript archive ({first_line(error)}): fetch it again"
        ) from None


def load_finetuned(model: CLIP, state: dict[str, Any], path: Path) -> None:
    """Copy stage-1 weights into the model, in float32.

    Raises:
        UserError: the weights are of another architecture, both are named; or some are missing, extra or damaged, see
            `fitted`.
    """
    built = model.state_dict()
    source = f"--clip-model-path {path}"
    if describe(state) != describe(built) and differences(state, built):
        source += f" ({describe(state)}; --clip-model-name builds a {describe(built)})"
    remedy = "name the model it was trained on"
    model.load_state_dict(fitted(state, built, source=source, remedy=remedy, vital=VITAL))


def describe(state: dict[str, Tensor]) -> str:
    """An architecture in words, from the shapes of its weights."""
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
        return "not a CLIP"


def choose_trained(model: CLIP, encoder: str) -> list[nn.Parameter]:
    """Freeze the parameters that `--encoder` does not name, and return those that learn.

    `image` trains `visual.*`; `text` all but `visual.*`; `both` everything. CLIP's own logit scale is never
    trained, because the loss does not contain it.
    """
    for name, parameter in model.named_parameters():
        encoder_of_parameter = "image" if name.startswith("visual.") else "text"
        parameter.requires_grad_(encoder in ("both", encoder_of_parameter))
    model.logit_scale.requires_grad_(False)
    return [p for p in model.parameters() if p.requires_grad]


def checkpoint_gradients(model: CLIP) -> None:
    """Recompute a block's activations in the backward pass, instead of keeping them (Chen et al. 2016)."""
    for block in model.modules():
        if isinstance(block, Bottleneck | ResidualAttentionBlock):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def resolution(model: CLIP) -> int:
    """Side of the input images, in pixels."""
    return model.visual.input_resolution


def feature_dim(model: CLIP) -> int:
    """Length D of image and text features."""
    return model.text_projection.shape[1]


def tokenize(captions: list[str]) -> Tensor:
    """Captions to CLIP tokens (len(captions), 77). Longer captions are truncated here and nowhere else."""
    return clip.tokenize(captions, truncate=True)


def fits(caption: str) -> bool:
    """Whether a caption has at most as many tokens as CLIP takes, so that it is not truncated."""
    try:
        clip.tokenize([caption])
    except RuntimeError:
        return False
    return True


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
        image_resolution: pixels; a multiple of 8 (vit) or 32 (resnet).
    """
    seed_everything(seed)
    model = CLIP(embed_dim=64, image_resolution=image_resolution, **TINY_VISION[kind], **TINY_TEXT)
    save_tensors(path, {name: weight.half() for name, weight in model.state_dict().items()})
