"""Set the precision and the kernels of matrix multiplications, instead of relying on torch's defaults.

By default on a GPU, torch rounds the inputs of float32 convolutions to TF32 (10 bits of mantissa),
but not the inputs of matrix multiplications. Here float32 means float32, and TF32 is used only if
it is chosen.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from utils import UserError

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_kernels() -> None:
    """Make float32 multiplications exact, and disable cuDNN's attention kernels.

    On GPUs of compute capability 9, gradients of cuDNN's attention have been NaN (pytorch issues
    139298 and 196678), and torch would choose that kernel there. Torch's own kernels are as exact.
    """
    exact_float32()
    torch.backends.cuda.enable_cudnn_sdp(False)


def exact_float32(exact: bool = True) -> None:
    """Make float32 convolutions and matrix multiplications exact, or let them round their inputs to TF32."""
    torch.backends.cuda.matmul.allow_tf32 = not exact
    torch.backends.cudnn.allow_tf32 = not exact


def check_encode_precision(precision: str, device: torch.device) -> None:
    """Raise UserError if a device does not support a precision."""
    is_ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if precision == "tf32" and not is_ampere:
        raise UserError(
            f"--encode-precision tf32: {device.type} does not support TF32: choose fp32, or fp16 if half precision is "
            "enough"
        )
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise UserError(
            "--encode-precision bf16: this GPU does not support bfloat16: choose fp16 or fp32"
        )


@contextlib.contextmanager
def encoding(precision: str, device: torch.device) -> Iterator[None]:
    """Set the precision of a frozen model within a context; afterwards float32 is exact again.

    Args:
        precision: one of ENCODE_PRECISIONS.
    """
    dtype = HALF.get(precision)
    exact_float32(precision != "tf32")
    try:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            yield
    finally:
        exact_float32()


def product_type(x: Tensor) -> torch.dtype:
    """Return the data type of matrix multiplications with x: autocast's type if autocast is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
