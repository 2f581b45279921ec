"""The mixture of experts: against a loop over rows, and against its matrix products alone."""

import torch
from torch import nn

from combiner import SparseMoE
from timing import in_turns
from twins import RowLoopMoE

P, H, EXPERTS, TOP_K = 2560, 5120, 4, 2


class Products(nn.Module):
    """Dense products without routing: each layer on a given number of rows."""

    def __init__(self, layers: int, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.layers = nn.ModuleList(nn.Linear(2 * P, H) for _ in range(layers))

    def forward(self, x):
        """All products of a batch, summed so that one backward pass reaches each."""
        return sum(layer(x[: self.rows]).sum() for layer in self.layers)


def step(module: nn.Module, x: torch.Tensor, dtype: torch.dtype | None):
    """A function that runs forward and backward."""

    def run() -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None
        with torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None):
            out = module(x).sum()
        out.backward()

    return run


def against_products(
    moe: SparseMoE, x: torch.Tensor, dtype: torch.dtype | None, what: str
) -> list[dict]:
    """The MoE beside its matrix products alone."""
    batch = len(x)
    rows = []
    for layers, share, name in (
        (
            EXPERTS,
            batch * TOP_K // EXPERTS,
            f"its own products ({EXPERTS} experts, k B / E rows each)",
        ),
        (TOP_K, batch, f"k dense products ({TOP_K} layers, B rows each)"),
    ):
        dense = Products(layers, share).to(x.device)
        ours, twin = in_turns(
            step(moe, x, dtype), step(dense, x, dtype), x.device, rounds=9, twin_rounds=9
        )
        row = {"figure": f"{what} / {name}", "ours": ours, "twin": twin, "ours / twin": ours / twin}
        rows.append(row | {"must": "at most 1.15" if layers == TOP_K else ""})
    return rows


def figures(device: torch.device) -> list[dict]:
    """Rows of the results table. On a GPU in fp16, one product an expert, and in bf16, grouped where it can be."""
    torch.manual_seed(0)
    on_gpu = device.type == "cuda"
    batch = 4096 if on_gpu else 256
    moe = SparseMoE(2 * P, H, EXPERTS, TOP_K).to(device)
    loop = RowLoopMoE(2 * P, H, EXPERTS, TOP_K).to(device)
    x = torch.randn(batch, 2 * P, device=device, requires_grad=True)
    what = f"MoE forward + backward, P {P}, H {H}, E {EXPERTS}, k {TOP_K}, batch {batch}"
    dtype = torch.float16 if on_gpu else None
    ours, twin = in_turns(
        step(moe, x, dtype), step(loop, x, dtype), device, rounds=3, twin_rounds=1
    )
    rows = [{"figure": f"{what} / row loop", "ours": ours, "twin": twin, "must": "10 x"}]
    del loop
    rows += against_products(moe, x, dtype, what)
    if on_gpu:
        rows += against_products(moe, x, torch.bfloat16, f"{what}, bf16")
    return rows
