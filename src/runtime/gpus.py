"""Memory and arithmetic rates of GPUs from their datasheets, to plan training runs without a GPU."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

GIB = 2**30
EFFICIENCY = 0.4  # fraction of a GPU's matmul throughput that training reaches, by rule of thumb
USABLE = 0.9  # usable fraction of a GPU's memory; the rest is CUDA, workspaces and fragmentation


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Properties of a GPU for planning.

    Attributes:
        memory: GiB that torch can allocate, its "total capacity", which is less than the nominal
            size.
        rates: input type -> TFLOP/s of matrix multiplications with float32 sums, without sparsity.
            The GPU does not support types that are missing.
    """

    title: str
    memory: float
    rates: Mapping[str, float]


# Rates from NVIDIA's T4 datasheet, its whitepapers of Ampere GA102 (3090), Ada (4090), A100 and H100, and the H200
# datasheet. Consumer cards multiply fp16 at half rate if sums are float32; this half rate is given here.
GPUS = {
    "t4": Gpu(title="T4, 16 GB", memory=14.5, rates={"fp16": 65, "fp32": 8.1}),
    "rtx3090": Gpu(
        title="RTX 3090, 24 GB",
        memory=23.6,
        rates={"fp16": 71, "bf16": 71, "tf32": 35.6, "fp32": 35.6},
    ),
    "rtx4090": Gpu(
        title="RTX 4090, 24 GB",
        memory=23.6,
        rates={"fp16": 165, "bf16": 165, "tf32": 82.6, "fp32": 82.6},
    ),
    "a100-40": Gpu(
        title="A100, 40 GB",
        memory=39.4,
        rates={"fp16": 312, "bf16": 312, "tf32": 156, "fp32": 19.5},
    ),
    "a100-80": Gpu(
        title="A100, 80 GB",
        memory=79.1,
        rates={"fp16": 312, "bf16": 312, "tf32": 156, "fp32": 19.5},
    ),
    "h100": Gpu(
        title="H100 SXM, 80 GB",
        memory=79.1,
        rates={"fp16": 989, "bf16": 989, "tf32": 495, "fp32": 66.9},
    ),
    "h200": Gpu(
        title="H200, 141 GB",
        memory=139.7,
        rates={"fp16": 989, "bf16": 989, "tf32": 495, "fp32": 66.9},
    ),
}


@dataclass(frozen=True)
class Work:
    """Operations of one kind, and the precision that they are computed in, a key of `Gpu.rates`."""

    part: str
    operations: float
    precision: str


def seconds(work: Iterable[Work], gpu: Gpu) -> float:
    """Estimate the time of some work on a GPU, in seconds."""
    return sum(part.operations / gpu.rates[part.precision] for part in work) / (EFFICIENCY * 1e12)
