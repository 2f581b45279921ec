"""Sizes of OpenAI's CLIP models: a table by name, to build models without weights, and sizes derived from weights."""

from collections.abc import Mapping
from typing import Any

from runtime.weights import shape_of
from utils import UserError

# Arguments of the clip package's CLIP: feature dimension; the image encoder's pixels, layers, width and patch size
# (None for a ResNet); the text encoder's tokens, vocabulary size, width, heads and layers. From Radford et al. 2021
# (arXiv 2103.00020), tables 19 and 20.
ARCHITECTURES: dict[str, tuple[Any, ...]] = {
    "RN50": (1024, 224, (3, 4, 6, 3), 64, None, 77, 49408, 512, 8, 12),
    "RN101": (512, 224, (3, 4, 23, 3), 64, None, 77, 49408, 512, 8, 12),
    "RN50x4": (640, 288, (4, 6, 10, 6), 80, None, 77, 49408, 640, 10, 12),
    "RN50x16": (768, 384, (6, 8, 18, 8), 96, None, 77, 49408, 768, 12, 12),
    "RN50x64": (1024, 448, (3, 15, 36, 10), 128, None, 77, 49408, 1024, 16, 12),
    "ViT-B/32": (512, 224, 12, 768, 32, 77, 49408, 512, 8, 12),
    "ViT-B/16": (512, 224, 12, 768, 16, 77, 49408, 512, 8, 12),
    "ViT-L/14": (768, 224, 24, 1024, 14, 77, 49408, 768, 12, 12),
    "ViT-L/14@336px": (768, 336, 24, 1024, 14, 77, 49408, 768, 12, 12),
}

# The clip package's names of these arguments, in the same order.
SIZES = (
    "embed_dim", "image_resolution", "vision_layers", "vision_width", "vision_patch_size", "context_length",
    "vocab_size", "transformer_width", "transformer_heads", "transformer_layers",
)  # fmt: skip

# Largest width of an image encoder at which heads have dimension 64, as in all of OpenAI's models.
WIDEST = 1024
OTHER_CLIP = "pass open_clip:ARCH=FILE with its architecture"


def sizes_of(state: Mapping[str, Any], *, source: str, remedy: str) -> tuple[Any, ...]:
    """Return the sizes of the CLIP that a state dict belongs to, derived as in the clip package's `build_model`.

    Raises:
        UserError: the model is not OpenAI's, or a weight that determines a size is missing or
            misshapen.
    """

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        return shape_of(state, name, dimensions, source=source, remedy=remedy)

    if any(name.startswith(("text.", "visual.trunk.")) for name in state):
        raise UserError(f"{source} contains an open_clip model, not an OpenAI CLIP: {OTHER_CLIP}")
    if not any(name.startswith(("visual.layer", "visual.attnpool.")) for name in state):
        width, _, _, patch = shape("visual.conv1.weight", 4)
        cells = shape("visual.positional_embedding", 2)[0] - 1
        pixels = patch * round(cells**0.5)
        layers: Any = _blocks(state, "visual.transformer.resblocks.")
        if width > WIDEST:
            raise UserError(
                f"{source} has an image encoder of width {width}, wider than OpenAI's, so its number of heads is "
                f"unknown: {OTHER_CLIP}"
            )
    else:
        width = shape("visual.layer1.0.conv1.weight", 4)[0]
        cells = shape("visual.attnpool.positional_embedding", 2)[0] - 1
        pixels = 32 * round(cells**0.5)
        patch = None
        layers = tuple(_blocks(state, f"visual.layer{number}.") for number in (1, 2, 3, 4))
    (text_width,) = shape("ln_final.weight", 1)
    embedding = shape("text_projection", 2)[1]
    tokens = shape("positional_embedding", 2)[0]
    vocabulary = shape("token_embedding.weight", 2)[0]
    text_layers = _blocks(state, "transformer.resblocks.")
    image_sizes = (embedding, pixels, layers, width, patch)
    return *image_sizes, tokens, vocabulary, text_width, text_width // 64, text_layers


def _blocks(state: Mapping[str, Any], beginning: str) -> int:
    """Count the different block numbers that follow a prefix in the names of weights."""
    names = [name.removeprefix(beginning) for name in state if name.startswith(beginning)]
    return len({name.split(".")[0] for name in names})
