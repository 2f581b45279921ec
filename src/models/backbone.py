"""Describe a CLIP besides its weights to other modules, whichever package it is from."""

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

# What the loss does not contain, and so never learns: the loss has a scale of its own.
NEVER_TRAINED = ("logit_scale", "logit_bias")
# What the features of models are computed by, besides torch: of OpenAI's, by either name of its package, and of others.
OPENAI_PACKAGES = ("clip", "clip-anytorch")
OTHER_PACKAGES = ("open_clip_torch", "timm", "transformers", "tokenizers")


COLUMN_MULTIPLE = 8  # of tokens come together: kernels are made for multiples
AROUND = 4  # tokens at most that stand before and after those of a caption


@dataclass(frozen=True)
class Tokenizer:
    """Captions to the tokens of one text encoder.

    Attributes:
        encode: (captions, columns) -> (len(captions), columns); a caption that is too long is cut.
        context: columns that the text encoder takes.
        pad: fills the columns that a caption leaves.
        vocabulary: tokens that the text encoder knows.
        is_trimmed: whether the text encoder takes fewer columns, and those behind a caption's end change nothing of its
            features: its attention is causal, and its features are those of the end.
    """

    encode: Callable[[list[str], int], Tensor]
    context: int
    pad: int = 0
    vocabulary: int = 49408
    is_trimmed: bool = False
    _told: list[int] = field(default_factory=list, repr=False, compare=False)

    def __call__(self, captions: list[str]) -> Tensor:
        """Tokens (len(captions), context). Longer captions are cut here and nowhere else.

        Raises:
            UserError: a token is beyond the text encoder's vocabulary.
        """
        tokens = self.encode(captions, self.context)
        if len(tokens) and tokens.max() >= self.vocabulary:
            raise UserError(
                f"--clip-model-name: its tokenizer gives token {tokens.max()}, but its text encoder has "
                f"{self.vocabulary}: put the tokenizer of the model next to its weights"
            )
        return tokens

    def columns(self, batches: Tensor) -> list[int]:
        """Return the number of columns to encode of each batch of tokens (batches, n, context) on the CPU."""
        if not self.is_trimmed:
            return [self.context] * len(batches)
        used = torch.where(batches != self.pad, torch.arange(1, self.context + 1), 1).amax((1, 2))
        needed = -(-used // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
        return needed.clamp(max=self.context).tolist()

    def cuts(self, caption: str) -> bool:
        """Tell whether a caption has more tokens than the text encoder takes."""
        # A token takes a letter at least, and few stand around them: most captions need no look.
        if caption.isascii() and len(caption) <= self.context - AROUND:
            return False
        # One column more is one pad more, unless there was something to put there.
        fitted = self.encode([caption], self.context)
        wider = self.encode([caption], self.context + 1)
        return int((wider == self.pad).sum()) != int((fitted == self.pad).sum()) + 1

    def warn_of_cuts(self, captions: list[str], tokens: Tensor) -> None:
        """Say how many captions are cut, once in a command.

        Args:
            tokens: theirs, (len(captions), context).
        """
        if self._told or not distributed.is_main():
            return
        # What fits ends in pads, but for an end that tokenizers put in the last column whatever the caption is.
        full = (tokens[:, -2] != self.pad).nonzero().flatten().tolist()
        cut = sum(self.cuts(captions[row]) for row in full)
        if cut:
            self._told.append(cut)
            logger.warning(
                "warning: %d of %d captions have more than the %d tokens that this CLIP reads: the rest is cut off",
                cut,
                len(captions),
                self.context,
            )


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A CLIP, but for its weights.

    Its model has `encode_image` and `encode_text`, whose features are unnormalised; the weights of the image encoder
    are `visual.*`, all others are the text encoder's.

    Attributes:
        dim: length D of features.
        resolution: side R of the input images, in pixels.
        mean, std: of the colours, in 0 to 1.
        interpolation: one of INTERPOLATIONS.
        resize_mode: one of RESIZE_MODES: how its own evaluations make a square of an image.
        architecture: digest of all else that features depend on besides weights: what is computed, and the tokenizer.
            Empty for OpenAI's CLIPs, whose weights tell all.
        checkpoint_gradients: have a model recompute activations in the backward pass.
        write: put into a folder the files that it is built from, beside its weights. None for OpenAI's CLIPs.
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
        """The packages, as they are installed, that compute its features; not all need be there."""
        return OTHER_PACKAGES if self.architecture else OPENAI_PACKAGES

    def normalise(self, pixels: Tensor) -> Tensor:
        """The model's input from bytes, (..., 3, R, R) uint8 -> float32."""
        return normalise(pixels, self.mean, self.std)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Return what stored settings, keys and results say of it: of OpenAI's CLIPs the resolution alone."""
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
    """Freeze the parameters that `--encoder` does not name, and return those that learn.

    `image` trains `visual.*`; `text` all but `visual.*`; `both` everything. CLIP's own logit scale and bias are never
    trained, because the loss does not contain them. With a rank of `lora` adapters of these are added and learn alone.
    """
    for name, parameter in model.named_parameters():
        encoder_of_parameter = "image" if name.startswith("visual.") else "text"
        learns = encoder in ("both", encoder_of_parameter) and name not in NEVER_TRAINED
        parameter.requires_grad_(learns)
    if lora and lora.lora_rank:
        add_adapters(model, lora)
    return [p for p in model.parameters() if p.requires_grad]
