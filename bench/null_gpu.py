"""Estimate the cost of a training step on an H100 by counting operations, on a machine without a GPU.

    python bench/null_gpu.py                              (a minute; `make count`)
    python bench/null_gpu.py --tree ../before             (the code of another checkout)
    python bench/null_gpu.py --only stage1:RN50x16 --operations 12

`nullgpu.c` replaces the CUDA libraries: torch dispatches, casts, allocates memory and launches kernels as on an H100,
but nothing is computed. Launches, waits and peak memory are the same as in a real run. The time is estimated: each
operation counts as one kernel, which takes as long as its arithmetic or its memory traffic, whichever takes longer.
"""

# ruff: noqa: E402  (torch must be imported in the process that has the null GPU)
import argparse
import ctypes
import gc
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).parent
LIBRARY = "NULL_GPU_LIBRARY"
# Words in CUDA's headers that mean nothing to a C compiler. The header that defines them is not in the wheels.
NO_WORDS = [
    "CUDARTAPI", "CUDARTAPI_CDECL", "__cdecl", "__host__", "__device__", "__global__", "__shared__", "__constant__",
    "__managed__", "__device_builtin__", "__cudart_builtin__", "__device_builtin_texture_type__",
    "__device_builtin_surface_type__", "__forceinline__", "__noinline__",
]  # fmt: skip
ALIGNED = ("__align__(n)", "__builtin_align__(n)")


def start_again_with_it() -> None:
    """Build the null GPU, and restart this process with it in place of CUDA's libraries."""
    found = [Path(place, "nvidia/cu13/include") for place in sys.path]
    headers = next((folder for folder in found if (folder / "driver_types.h").exists()), None)
    if not (sys.platform == "linux" and shutil.which("gcc") and headers):
        sys.exit("bench/null_gpu.py needs Linux, gcc, and torch with the wheels of CUDA 13")
    folder = Path(tempfile.mkdtemp(prefix="null_gpu"))
    (folder / "crt").mkdir()
    lines = [f"#define {word}" for word in NO_WORDS]
    lines += [f"#define {word} __attribute__((aligned(n)))" for word in ALIGNED]
    (folder / "crt" / "host_defines.h").write_text("\n".join(lines) + "\n")
    library = folder / "libcuda.so.1"
    words = ["gcc", "-O1", "-w", "-shared", "-fPIC", f"-I{folder}", f"-I{headers}"]
    words += [str(HERE / "nullgpu.c"), "-o", str(library), "-Wl,-soname,libcuda.so.1"]
    subprocess.run(words, check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), LIBRARY: str(library)}
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def parse() -> argparse.Namespace:
    """Parse the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tree", type=Path, default=HERE.parent, help="checkout whose code is counted"
    )
    parser.add_argument(
        "--only", nargs="+", default=DEFAULT, metavar="CASE", help=f"of {' '.join(DEFAULT)}"
    )
    parser.add_argument("--operations", type=int, default=0, help="show so many of the costliest")
    return parser.parse_args()


# Case, architecture or feature dimension, and then the micro-batch of stage 1 or the precision of encoding.
DEFAULT = (
    "stage1:RN50x16", "stage1:RN50x16:16", "stage1:ViT-L/14", "stage1:ViT-L/14:16", "stage1:ViT-B/32",
    "stage2:640", "stage2:768", "encode:RN50x16:fp32", "encode:RN50x16:tf32", "encode:RN50x16:fp16",
    "encode:ViT-L/14:fp32", "encode:ViT-L/14:tf32", "encode:ViT-L/14:fp16",
)  # fmt: skip
ARGS = parse()
if LIBRARY not in os.environ:
    start_again_with_it()
sys.path[:0] = [str(ARGS.tree / "src"), str(ARGS.tree / "bench")]
sys.path.append(str(ARGS.tree / "tests"))

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import benchmarks.ranking
import stage1 as stage1_bench
import stage2 as stage2_bench
from combiner import Combiner, SparseMoE
from models.architectures import ARCHITECTURES
from models.clip_model import CLIP, backbone, ready
from ranking import random_cirr
from runtime.precision import encoding, exact_float32
from training.data import Order

GPU = torch.device("cuda:0")
# Operations and bytes per second that large matrix multiplications and copies reach on an H100.
HALF, TF32, FLOAT32 = 600e12, 300e12, 52e12
BANDWIDTH = 2.8e12
BATCH = 128  # batch size of stage 1
aten = torch.ops.aten
# Operations that cost nothing: views, and allocations of memory that is not written.
VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "detach", "alias", "unsqueeze",
    "squeeze", "split", "unbind", "as_strided", "reshape", "split_with_sizes", "empty", "empty_like", "new_empty",
    "empty_strided", "new_empty_strided", "lift_fresh", "_reshape_alias", "unflatten", "chunk", "record_stream",
    "is_same_size", "set_", "unfold", "diagonal", "movedim",
}  # fmt: skip
WRITES_ALONE = {
    "fill_",
    "zero_",
    "zeros",
    "zeros_like",
    "ones",
    "ones_like",
    "full",
    "new_zeros",
    "arange",
}
READS_WHAT_IT_TAKES = {"index", "embedding", "gather"}


def _fused_convolution(x: Tensor, weight: Tensor, *rest: Any, out_val: Tensor) -> int:
    return 2 * out_val.numel() * math.prod(weight.shape[1:])


def _added_product(into: Tensor, left: Tensor, right: Tensor, **more: Any) -> int:
    return 2 * left.shape[0] * left.shape[1] * right.shape[1]


def _attention(query: Tensor, key: Any, value: Any, width: int, *rest: Any, **more: Any) -> int:
    """Count nn.MultiheadAttention's fast path in eval mode: four projections and two multiplications of tokens."""
    b, length, _ = query.shape
    return 8 * b * length * width**2 + 4 * b * length**2 * width


def _grouped_product(left: Tensor, right: Tensor, *rest: Any, **more: Any) -> int:
    """Count a multiplication of groups of rows by a matrix each, or in the backward pass by other groups of rows."""
    columns = right.shape[1] if right.dim() == 2 else right.shape[-1]
    return 2 * left.shape[-2] * left.shape[-1] * columns


FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten.cudnn_convolution_relu: _fused_convolution,
    aten.cudnn_convolution_add_relu: _fused_convolution,
    aten.addmm_: _added_product,
    aten._grouped_mm: _grouped_product,
    aten._native_multi_head_attention: _attention,
}


def _size(*tensors: Any) -> int:
    """Return the bytes of those tensors that are on the GPU."""
    return sum(
        tensor.numel() * tensor.element_size()
        for tensor in tensors
        if isinstance(tensor, Tensor) and tensor.is_cuda
    )


class Counting(TorchDispatchMode):
    """Adds up the estimated time of operations.

    Attributes:
        seconds: name and data type of an operation -> seconds.
        arithmetic: seconds of arithmetic only, without memory traffic.
    """

    def __init__(self, *, tf32: bool) -> None:
        super().__init__()
        self.float32 = TF32 if tf32 else FLOAT32
        self.seconds: Counter[str] = Counter()
        self.arithmetic = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._opname
        if name in VIEWS:
            return out
        flops = 0
        if func._overloadpacket in FLOPS:
            flops = FLOPS[func._overloadpacket](*args, **kwargs, out_val=out)
        given, made = tree_leaves((args, kwargs)), tree_leaves(out)
        first = next(
            (tensor for tensor in (*given, *made) if isinstance(tensor, Tensor)), torch.empty(0)
        )
        rate = self.float32 if first.dtype == torch.float32 else HALF
        self.arithmetic += flops / rate
        passes = [(flops, _size(*given, *made))]
        if name in WRITES_ALONE:
            passes = [(0, _size(*made))]
        elif name in READS_WHAT_IT_TAKES:
            passes = [(0, 2 * _size(*made))]
        elif name == "convolution_backward":
            passes = _passes_of_convolution(flops, args[:3], out)
        kind = str(first.dtype).removeprefix("torch.")
        for operations, moved in passes:
            self.seconds[f"{name} {kind}"] += max(operations / rate, moved / BANDWIDTH)
        return out


def _passes_of_convolution(flops: int, given: Any, made: Any) -> list[tuple[float, int]]:
    """Return operations and bytes of the kernels of a convolution's backward pass, one for each gradient."""
    gradient, x, weight = given
    of_x, of_weight, of_bias = made
    products = sum(part is not None for part in (of_x, of_weight))
    passes: list[tuple[float, int]] = []
    if of_x is not None:
        passes.append((flops / products, _size(gradient, weight, of_x)))
    if of_weight is not None:
        passes.append((flops / products, _size(gradient, x, of_weight)))
    if of_bias is not None:
        passes.append((0, _size(gradient, of_bias)))
    return passes


def count(title: str, work: Callable[[], object], *, tf32: bool = False) -> None:
    """Print a row with the cost of a call, after an uncounted first call."""
    seen = (ctypes.c_long * 4).in_dll(ctypes.CDLL(os.environ[LIBRARY]), "counts")
    work()
    seen[:] = [0] * len(seen)
    torch.cuda.reset_peak_memory_stats()
    work()
    kernels, products, cudnn, waits = seen
    peak = torch.cuda.max_memory_allocated() / 2**30
    with Counting(tf32=tf32) as counting:
        work()
    taken = f"{1e3 * counting.seconds.total():.1f} | {1e3 * counting.arithmetic:.1f}"
    launches = f"{kernels + products + cudnn:,}"
    print(f"| {title} | {taken} | {peak:.1f} | {launches} | {waits} |", flush=True)
    for name, seconds in counting.seconds.most_common(ARGS.operations):
        print(f"    {1e3 * seconds:7.1f} ms  {name}")


def stage1(name: str, micro_batch: str = "") -> None:
    """Count a step of stage 1 in fp16."""
    with GPU:
        model = CLIP(*ARCHITECTURES[name]).float().eval()
    stepper = stage1_bench.make_stepper(model, GPU, int(micro_batch) if micro_batch else None)
    inputs = list(stage1_bench.random_batch(model, BATCH, GPU))
    ids = torch.arange(BATCH, device=GPU)
    by = f" by {micro_batch}" if micro_batch else ""
    count(f"stage-1 step, {name}, batch {BATCH}{by}, fp16", lambda: stepper.step(inputs, ids))


def stage2(dim: str) -> None:
    """Count an epoch of stage 2 at CIRR's size with its validation, in fp16."""
    d, batch, triplets = int(dim), 4096, 28_225
    epoch = stage2_bench.epoch(
        Combiner(d, 2560, 5120).to(GPU),
        random_cirr(triplets, 16_939, d, GPU, grouped=False),
        [random_cirr(4181, 2297, d, GPU, grouped=True)],
        Order(triplets=triplets, variants=1, batch_size=batch, seed=0),
        GPU,
    )
    count(f"stage-2 epoch with validation, D {d}, batch {batch:,}, fp16", epoch)


@torch.no_grad()
def encode(name: str, precision: str) -> None:
    """Count the encoding of 32 images in a precision."""
    with GPU:
        model = ready(CLIP(*ARCHITECTURES[name]), GPU)
    about = backbone(model)
    pixels = torch.zeros(32, 3, about.resolution, about.resolution, dtype=torch.uint8, device=GPU)

    def images() -> None:
        with encoding(precision, GPU):
            model.encode_image(about.normalise(pixels))

    count(f"32 images, {name}, {precision}", images, tf32=precision == "tf32")


CASES = {"stage1": stage1, "stage2": stage2, "encode": encode}


def run_experts(
    self: SparseMoE, rows: Tensor, experts: Tensor, own: Any = SparseMoE.run_experts
) -> Tensor:
    """Run the experts with equal numbers of rows, since the null GPU does not compute the real numbers."""
    each = len(rows) // len(self.experts)
    shares = [each] * (len(self.experts) - 1)

    def waited(counts: Tensor) -> list[int]:
        torch.cuda.synchronize()
        return [*shares, len(rows) - sum(shares)]

    with mock.patch.object(Tensor, "tolist", waited):
        return own(self, rows, experts)


def main() -> None:
    """Count all chosen cases."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    exact_float32()
    print("| counted | ms | arithmetic alone, ms | peak, GiB | launches | waits |")
    print("|---|---|---|---|---|---|")
    with (
        mock.patch.object(SparseMoE, "run_experts", run_experts),
        mock.patch.object(benchmarks.ranking, "_check"),
        mock.patch.object(torch.special, "entr", lambda x: -x * x.log()),  # compiled at run time
    ):
        for word in ARGS.only:
            case, *details = word.split(":")
            CASES[case](*details)
            gc.collect()


if __name__ == "__main__":
    main()
