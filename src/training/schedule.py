"""Set the mixed precision of a training run, and its learning rate over the steps."""

import contextlib
import math
from dataclasses import dataclass

import torch

from utils import UserError


@dataclass(frozen=True)
class Precision:
    """Mixed precision of a training run.

    Attributes:
        name: "fp16" with loss scaling, "bf16", "fp32", or "amp", which is fp16 on CUDA and fp32 on the CPU.
    """

    name: str
    device: torch.device

    def __post_init__(self) -> None:
        if (
            self.name == "bf16"
            and self.device.type == "cuda"
            and not torch.cuda.is_bf16_supported(False)
        ):
            raise UserError(
                "--precision bf16: this GPU does not support bfloat16: choose amp or fp32"
            )

    @property
    def dtype(self) -> torch.dtype | None:
        """Return the data type of matrix multiplications, None for float32."""
        amp = "fp16" if self.device.type == "cuda" else "fp32"
        name = amp if self.name == "amp" else self.name
        return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": None}[name]

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the autocast context of a forward pass."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def scaler(self) -> torch.amp.GradScaler:
        """Return a loss scaler if fp16 gradients could underflow, otherwise a scaler that does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)


def learning_rate_factor(step: int, steps: int, *, warmup_steps: int, cosine: bool) -> float:
    """Return the factor of the learning rate at a step of all `steps`.

    Args:
        warmup_steps: number of steps over which the factor rises linearly.
        cosine: after the warm-up, decay to 0 along half a cosine (Loshchilov and Hutter 2017, arXiv 1608.03983).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if not cosine:
        return 1.0
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))
