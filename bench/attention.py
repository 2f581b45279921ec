"""Time several implementations of attention over two tokens, for head dimensions too large for the fastest kernels."""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from timing import Row, Setting, Step, typical


def explicit(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute attention by its formula; all tensors are (B, heads, 2, E)."""
    weights = (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(-1)
    return weights @ value


def with_kernel(backend: SDPBackend, *inputs: Tensor) -> Tensor:
    """Compute torch's attention with one kind of kernel."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*inputs)


def ways(setting: Setting) -> dict[str, Callable[..., Tensor]]:
    """Return name -> implementation of attention, beginning with the one that this project uses."""
    found = {
        "as torch chooses": F.scaled_dot_product_attention,
        "MATH": functools.partial(with_kernel, SDPBackend.MATH),
        "the formula": explicit,
    }
    if setting.on_gpu:
        found["EFFICIENT"] = functools.partial(with_kernel, SDPBackend.EFFICIENT_ATTENTION)
    return found


def figures(setting: Setting) -> Iterator[Row]:
    """Time forward and backward pass of the other implementations against the one in use."""
    batch, length = setting.choose(gpu=(4096, 640), tiny=(4, 8))
    dtype = torch.float16 if setting.on_gpu else torch.float32
    shape = (batch, 4, 2, length)
    inputs = [
        torch.randn(shape, device=setting.device, dtype=dtype, requires_grad=True) for _ in range(3)
    ]

    def step(way: Callable[..., Tensor]) -> Step:
        return lambda: torch.autograd.grad(way(*inputs).sum(), inputs)

    taken = {}
    for name, way in ways(setting).items():
        taken[name] = typical(step(way), setting, rounds=20)
    for name, own in list(taken.items())[1:]:
        yield {
            "figure": f"attention over 2 tokens, 4 heads of {length}, batch {batch}, {name} / as torch chooses",
            "ours": own,
            "twin": taken["as torch chooses"],
        }
