"""Measure the effect of `--encode-precision` on ranks and recalls, by emulating a GPU's tensor cores on a CPU.

    make demo                                                 (pictures, and models that were trained on them)
    OMP_NUM_THREADS=1 python bench/encode_precision.py        (trains on synthetic shapes too)

Each operand of a matrix multiplication or convolution is rounded, and the products are summed in float32.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))
sys.path.append(str(Path(__file__).parent.parent / "tests"))

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import combiner_train
import models.encoder
import shapes_dataset
from benchmarks import BENCHMARKS
from benchmarks.triplets import OF_KIND
from combiner import UNLEARNED
from demo import best_weights
from encoding import encoding_in
from evaluation.retrieval import rank_all
from models.encoder import versions
from models.features import FeatureCache, freeze_queries
from models.pair import load_pair
from moe_study import tuned_clip
from runs import SHAPES_STAGE_2
from runtime.precision import encoding
from settings.groups import PairChoice

CPU = torch.device("cpu")
DRAWN = "--train-triplets 400 --val-triplets 200 --train-groups 1 --val-groups 1 --own-groups 1"
aten = torch.ops.aten
# Operation -> position of its first factor among the arguments; the second factor follows it.
PRODUCTS = {aten.mm: 0, aten.bmm: 0, aten.convolution: 0, aten.addmm: 1, aten.baddbmm: 1}
HEAD = (
    "| data, composed by | precision | ranks that change | by at most | mean recall | a recall moves by at most "
    "| 1 - cosine, mean |\n|---|---|---|---|---|---|---|"
)


def to_tf32(x: Tensor, added: int = 0x1000) -> Tensor:
    """Round float32 to 10 bits of mantissa, to nearest with ties away from zero, as PTX's cvt.rna.tf32 does.

    Args:
        added: number that is added before the other 13 bits are cut off; with 0, numbers are truncated.
    """
    return (x.view(torch.int32) + added & ~0x1FFF).view(torch.float32)


# Name in the table -> `--encode-precision`, and function that rounds a factor.
ROUNDINGS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "tf32": ("tf32", to_tf32),
    "tf32, cut off": ("tf32", lambda x: to_tf32(x, added=0)),
    "fp16": ("fp16", lambda x: x.half().float()),
    "bf16": ("bf16", lambda x: x.bfloat16().float()),
}


class TensorCores(TorchDispatchMode):
    """Context in which factors of multiplications are rounded and sums are float32; results have the factors' type."""

    def __init__(self, rounded: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._rounded = rounded

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        first = PRODUCTS.get(func.overloadpacket)
        if first is None:
            return func(*args, **(kwargs or {}))
        exact = [arg.float() if isinstance(arg, Tensor) else arg for arg in args]
        for place in (first, first + 1):
            exact[place] = self._rounded(exact[place])
        return func(*exact, **(kwargs or {})).to(args[first].dtype)


@contextlib.contextmanager
def rounding(name: str) -> Iterator[None]:
    """Make encoders use one of ROUNDINGS within a context."""
    _, rounded = ROUNDINGS[name]

    @contextlib.contextmanager
    def encoding_rounded(precision: str, device: torch.device) -> Iterator[None]:
        with encoding(precision, device), sdpa_kernel(SDPBackend.MATH), TensorCores(rounded):
            yield

    with mock.patch.object(models.encoder, "encoding", encoding_rounded):
        yield


def measured(dataset: str, root: Path, clip: Path, combiner: Path) -> Iterator[dict]:
    """Yield a row for each composition and each rounding, compared with float32.

    Args:
        clip, combiner: weights of stages 1 and 2.
    """
    benchmark = BENCHMARKS[dataset](root)
    val = benchmark.val()
    pair = load_pair(
        PairChoice(combining_function="combiner", clip_path=clip, combiner_path=combiner),
        CPU,
        benchmark.background,
    )
    ways = {"sum": UNLEARNED["sum"](), "Combiner": pair.compose}

    def frozen_in(precision: str) -> list:
        cache = FeatureCache(None, encoding_in(precision, pair.encoder))
        return freeze_queries(cache, val, benchmark, benchmark.run_name)

    frozen = {"fp32": frozen_in("fp32")}
    for name, (precision, _) in ROUNDINGS.items():
        with rounding(name):
            frozen[name] = frozen_in(precision)
    protocol = benchmark.protocols[0]
    for way, compose in ways.items():
        found = {}
        for name, splits in frozen.items():
            rankings = rank_all(splits, compose, [protocol], k=0, block=None)
            ranks = torch.cat([own.known_ranks for own in rankings[protocol].values()])
            found[name] = ranks, benchmark.metrics(val, rankings[protocol])
        exact, metrics = found["fp32"]
        recalls = [
            key
            for key in benchmark.titled(metrics)
            if "recall" in key and not key.startswith(OF_KIND)
        ]
        for name, (ranks, own) in found.items():
            pairs = zip(frozen[name], frozen["fp32"], strict=True)
            cosines = [F.cosine_similarity(a.images, b.images) for a, b in pairs]
            yield {
                "dataset": dataset,
                "way": way,
                "precision": name,
                "queries": len(ranks),
                "changed": int((ranks != exact).sum()),
                "largest change": int((ranks - exact).abs().max()),
                "recalls": {key: own[key] for key in recalls},
                "largest move": max(abs(own[key] - metrics[key]) for key in recalls),
                "1 - cosine": 1 - float(torch.cat(cosines).double().mean()),
            }


def line(row: dict) -> str:
    """Return a row of the table, in Markdown."""
    cells = [
        f"{row['dataset']}, {row['way']}",
        row["precision"],
        f"{row['changed']} of {row['queries']:,}",
        f"{row['largest change']}",
        f"{row['recalls']['average_recall']:.2f}",
        f"{row['largest move']:.2f}",
        f"{row['1 - cosine']:.1e}",
    ]
    return "| " + " | ".join(cells) + " |"


def of_demo(folder: Path) -> tuple[str, Path, Path, Path]:
    """Return the arguments of `measured` for the folder that `make demo` wrote."""
    triplets = BENCHMARKS["Triplets"]
    (clip_run,) = (folder / "models" / "Triplets_clip").iterdir()
    (run,) = (folder / "models" / "Triplets_moe").iterdir()
    clip = best_weights(clip_run, triplets.best_clips())
    combiner = best_weights(min(run.glob("seed_*")), triplets.best_combiners())
    return "Triplets", folder / "data", clip, combiner


def of_shapes(folder: Path) -> tuple[str, Path, Path, Path]:
    """Train both stages on synthetic shapes; return the arguments of `measured` for them."""
    fashioniq = BENCHMARKS["FashionIQ"]
    shapes_dataset.main(["--output-dir", str(folder), *DRAWN.split()])
    clip = tuned_clip(folder, "FashionIQ")
    words = ["--dataset", "FashionIQ", "--data-root", str(folder), "--clip-model-path", str(clip)]
    output = folder / "combiner"
    combiner_train.main([*words, *SHAPES_STAGE_2.split(), "--output-dir", str(output)])
    (run,) = output.iterdir()
    return "FashionIQ", folder, clip, best_weights(run, fashioniq.best_combiners())


def main() -> None:
    """Measure both datasets, print a table, and write bench/results/encode_precision.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="what `make demo` left")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for place in (of_demo(args.demo), of_shapes(Path(name))):
            rows += measured(*place)
    print(HEAD, *map(line, rows), sep="\n")
    file = Path(__file__).parent / "results" / "encode_precision.json"
    file.write_text(json.dumps({"versions": versions(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
