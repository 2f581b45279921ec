"""Describe a CLIP model, apart from its weights, in the same form for every package."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_utils import normalise
from models.adapters import add_adapters
from runtime import distributed
from settings.groups import Lora
from utils import UserError

logger = logging.getLogger(__name__)

# Parameters that are never trained, because the loss uses a scale of its own instead.
NEVER_TRAINED = ("logit_scale", "logit_bias")
# Packages besides torch that compute features: for OpenAI's models (the package has two names), and for other models.
OPENAI_PACKAGES = ("clip", "clip-anytorch")
OTHER_PACKAGES = ("open_clip_torch", "timm", "transformers", "tokenizers")


COLUMN_MULTIPLE = 8  # the number of token columns is rounded up to a multiple, which is faster
AROUND = 4  # maximum number of special tokens before and after a caption's own tokens


@dataclass(frozen=True)
class Tokenizer:
    """Converts captions to the tokens of one text encoder.

    Attributes:
        encode: function (captions, columns) -> tokens (len(captions), columns); a caption that is
            too long is cut.
        context: maximum number of token columns of the text encoder.
        pad: token that fills the columns after a caption.
        vocabulary: number of tokens in the text encoder's vocabulary.
        is_trimmed: whether the text encoder also accepts fewer columns, and columns after a
            caption's end do not change its features. This requires causal attention, and features
            that are read at the end token.
    """

    encode: Callable[[list[str], int], Tensor]
    context: int
    pad: int = 0
    vocabulary: int = 49408
    is_trimmed: bool = False
    _told: list[int] = field(default_factory=list, repr=False, compare=False)

    def __call__(self, captions: list[str]) -> Tensor:
        """Return the captions' tokens (len(captions), context). Only this method cuts long captions.

        Raises:
            UserError: a token is outside the text encoder's vocabulary.
        """
        tokens = self.encode(captions, self.context)
        if len(tokens) and tokens.max() >= self.vocabulary:
            raise UserError(
                f"--clip-model-name: its tokenizer produces token {tokens.max()}, but its text encoder has only "
                f"{self.vocabulary} tokens: put the model's own tokenizer next to its weights"
            )
        return tokens

    def columns(self, batches: Tensor) -> list[int]:
        """Return the number of columns to encode for each batch, from tokens (batches, n, context) on the CPU."""
        if not self.is_trimmed:
            return [self.context] * len(batches)
        used = torch.where(batches != self.pad, torch.arange(1, self.context + 1), 1).amax((1, 2))
        needed = -(-used // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
        return needed.clamp(max=self.context).tolist()

    def cuts(self, caption: str) -> bool:
        """Check whether a caption has more tokens than the text encoder reads."""
        # An ASCII caption has at most one token per character, so a short one need not be tokenized.
        if caption.isascii() and len(caption) <= self.context - AROUND:
            return False
        # With one more column, a caption that fits has one more pad; a caption that was cut has another token there.
        fitted = self.encode([caption], self.context)
        wider = self.encode([caption], self.context + 1)
        return int((wider == self.pad).sum()) != int((fitted == self.pad).sum()) + 1

    def warn_of_cuts(self, captions: list[str], tokens: Tensor) -> None:
        """Log how many captions are cut, at most once per command.

        Args:
            tokens: the captions' tokens, (len(captions), context).
        """
        if self._told or not distributed.is_main():
            return
        # A caption that fits ends in padding, apart from an end token that some tokenizers put in the last column.
        full = (tokens[:, -2] != self.pad).nonzero().flatten().tolist()
        cut = sum(self.cuts(captions[row]) for row in full)
        if cut:
            self._told.append(cut)
            logger.warning(
                "warning: %d of %d captions have more than the %d tokens that this CLIP reads, and are truncated",
                cut,
                len(captions),
                self.context,
            )


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """Description of a CLIP model without its weights.

    The model has `encode_image` and `encode_text`, which return unnormalised features. Weights
    named `visual.*` belong to the image encoder, all others to the text encoder.

    Attributes:
        dim: dimension D of features.
        resolution: side R of the input images, in pixels.
        mean, std: mean and standard deviation of each colour channel, for colours in [0, 1].
        interpolation: one of INTERPOLATIONS.
        resize_mode: one of RESIZE_MODES: how the model's own evaluations make an image square.
        architecture: digest of what determines the features apart from the weights: the computation
            and the tokenizer. Empty for OpenAI's CLIPs, whose weights determine both.
        checkpoint_gradients: function that makes a model recompute activations in the backward
            pass.
        write: function that writes to a folder all files from which the model is built, except its
            weights. None for OpenAI's CLIPs, which are built from their sizes.
    """

    dim: int
    resolution: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    resize_mode: str
    tokenizer: Tokenizer
    checkpoint_gradients: Callable[[nn.Module], None]
    architecture: str = ""
    write: Callable[[Path], None] | None = None

    @property
    def packages(self) -> tuple[str, ...]:
        """Return the packages that compute the model's features; not all of them need to be installed."""
        return OTHER_PACKAGES if self.architecture else OPENAI_PACKAGES

    def normalise(self, pixels: Tensor) -> Tensor:
        """Normalise bytes to the model's input, (..., 3, R, R) uint8 -> float32."""
        return normalise(pixels, self.mean, self.std)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Return the values that stored settings, keys and results record; for OpenAI's CLIPs, only the resolution."""
        known: dict[str, Any] = {"resolution": self.resolution}
        if self.architecture:
            known["interpolation"] = self.interpolation
            known["resize_mode"] = self.resize_mode
            known["mean"] = list(self.mean)
            known["std"] = list(self.std)
            known["context"] = self.tokenizer.context
            known["architecture"] = self.architecture
        return known


def choose_trained(model: nn.Module, encoder: str, lora: Lora | None = None) -> list[nn.Parameter]:
    """Freeze all parameters but those of the encoders chosen by `--encoder`, and return the trainable parameters.

    `image` trains `visual.*`, `text` everything else, and `both` everything. CLIP's own logit scale
    and bias are never trained, because the loss does not use them. If `lora` has a rank, adapters
    are added and trained instead.
    """
    for name, parameter in model.named_parameters():
        encoder_of_parameter = "image" if name.startswith("visual.") else "text"
        learns = encoder in ("both", encoder_of_parameter) and name not in NEVER_TRAINED
        parameter.requires_grad_(learns)
    if lora and lora.lora_rank:
        add_adapters(model, lora)
    return [p for p in model.parameters() if p.requires_grad]
