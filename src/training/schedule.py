"""How a training goes on, apart from what it learns: mixed precision, epochs, and the learning rate over the steps."""

import contextlib
import math
from dataclasses import dataclass

import torch

from utils import UserError


@dataclass(frozen=True)
class Precision:
    """Mixed precision of a training.

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
            raise UserError("--precision bf16: this GPU has no bfloat16; choose amp or fp32")

    @property
    def dtype(self) -> torch.dtype | None:
        """What matrix products are computed in, None for float32."""
        amp = "fp16" if self.device.type == "cuda" else "fp32"
        name = amp if self.name == "amp" else self.name
        return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": None}[name]

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaling where fp16 gradients would vanish, else a scaler that does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast a training learns; the fields are named as their flags.

    Attributes:
        validation_frequency: epochs; validations follow the epochs 0, f, 2f, ...
        warmup_steps: steps over which the learning rate rises linearly.
        cosine: let it fall to 0 along half a cosine afterwards (Loshchilov and Hutter 2017, arXiv 1608.03983).
        micro_batch_size: rows in memory at a time, None for all.
        clip_grad_norm: the largest norm of the gradient, None for any.
    """

    num_epochs: int
    validation_frequency: int
    warmup_steps: int = 0
    cosine: bool = False
    micro_batch_size: int | None = None
    clip_grad_norm: float | None = None

    @property
    def last_validation(self) -> int:
        """The last epoch that is validated."""
        return (self.num_epochs - 1) // self.validation_frequency * self.validation_frequency

    def factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied with at a step of all `steps`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if not self.cosine:
            return 1.0
        progress = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * progress))
