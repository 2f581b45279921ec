"""Time the mixture of experts against loops over experts and over rows, and against only its matrix multiplications."""

from collections.abc import Iterator

import torch
from torch import nn

from combiner import SparseMoE
from timing import Row, Setting, in_turns
from twins import ExpertLoopMoE, RowLoopMoE

EXPERTS, TOP_K = 4, 2


class Products(nn.Module):
    """Dense layers without routing, each applied to a given number of rows."""

    def __init__(self, in_dim: int, hidden_dim: int, *, layers: int, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.layers = nn.ModuleList(nn.Linear(in_dim, hidden_dim) for _ in range(layers))

    def forward(self, x):
        """Apply all layers to a batch, and sum the results so that one backward pass reaches each layer."""
        return sum(layer(x[: self.rows]).sum() for layer in self.layers)


def step(module: nn.Module, x: torch.Tensor, dtype: torch.dtype | None):
    """Return a function that runs one forward and backward pass."""

    def run() -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None
        with torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None):
            out = module(x).sum()
        out.backward()

    return run


def against_products(
    moe: SparseMoE, x: torch.Tensor, dtype: torch.dtype | None, what: str
) -> Iterator[Row]:
    """Time the MoE against only its matrix multiplications."""
    batch, columns = x.shape
    hidden = moe.experts[0][0].out_features
    share = batch * TOP_K // EXPERTS
    for layers, rows, name in (
        (EXPERTS, share, f"its own products ({EXPERTS} experts, k B / E rows each)"),
        (TOP_K, batch, f"k dense products ({TOP_K} layers, B rows each)"),
    ):
        dense = Products(columns, hidden, layers=layers, rows=rows).to(x.device)
        ours, twin = in_turns(
            step(moe, x, dtype), step(dense, x, dtype), x.device, rounds=9, twin_rounds=9
        )
        yield {
            "figure": f"{what} / {name}",
            "ours": ours,
            "twin": twin,
            "ours / twin": ours / twin,
            "must": "at most 1.15" if layers == TOP_K else "",
        }


def figures(setting: Setting) -> Iterator[Row]:
    """Yield the rows of the results table.

    On a GPU, the MoE runs in fp16, with one matrix multiplication per expert, and in bf16, grouped if possible.
    """
    torch.manual_seed(0)
    device = setting.device
    batch = setting.choose(gpu=4096, cpu=256, tiny=16)
    p, h = setting.choose(gpu=(2560, 5120), cpu=(2560, 5120), tiny=(8, 16))
    dtype = torch.float16 if setting.on_gpu else None
    moe = SparseMoE(2 * p, h, EXPERTS, TOP_K).to(device)
    x = torch.randn(batch, 2 * p, device=device, requires_grad=True)
    what = f"MoE forward + backward, P {p}, H {h}, E {EXPERTS}, k {TOP_K}, batch {batch}"
    yield from against_products(moe, x, dtype, what)
    if setting.on_gpu or setting.rehearses:
        yield from against_products(moe, x, torch.bfloat16, f"{what}, bf16")
    for name, kind, rounds, must in (
        ("a loop over experts", ExpertLoopMoE, 5, ""),
        ("row loop", RowLoopMoE, 1, "10 x"),
    ):
        loop = kind(2 * p, h, EXPERTS, TOP_K).to(device)
        ours, twin = in_turns(
            step(moe, x, dtype), step(loop, x, dtype), device, rounds=5, twin_rounds=rounds
        )
        yield {"figure": f"{what} / {name}", "ours": ours, "twin": twin, "must": must}
