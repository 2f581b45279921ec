"""Measure the effect of a bank of negatives on recall at several batch sizes, on synthetic data over several seeds.

    OMP_NUM_THREADS=1 python bench/negatives_study.py

Stage 1 is trained once on each layout, and a plain Combiner with each kind of negatives, batch size and seed, all for
the same number of epochs. Recalls are from each seed's best validation.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))
sys.path.append(str(Path(__file__).parent.parent / "tests"))

import torch

import combiner_train
import shapes_dataset
from benchmarks.metrics import mean_and_deviation
from models.encoder import versions
from moe_study import SHOWN, spread, tuned_clip
from runtime.choices import NEGATIVES

DRAWN = "--train-triplets 1400 --train-groups 420 --val-triplets 400 --val-groups 120"
STAGE_2 = "--combiner-type clip4cir --projection-dim 128 --hidden-dim 256 --num-epochs 25 --validation-frequency 4"
BATCHES = (64, 512, 4096)
# For batches of 512, as in the demo; for other batches, in proportion to the square root of their size.
LEARNING_RATE = 1e-3
# Student's t: 0.975 quantile by degrees of freedom.
QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262}


def flags_of(negatives: str, batch_size: int) -> list[str]:
    """Return the flags of a Combiner's training, besides the data and the seed."""
    rate = LEARNING_RATE * math.sqrt(batch_size / 512)
    words = ["--negatives", negatives, "--batch-size", str(batch_size)]
    return [*words, "--combiner-lr", f"{rate:.2g}", *STAGE_2.split()]


def train(
    folder: Path, dataset: str, clip: Path, *, flags: Sequence[str], seeds: Sequence[int]
) -> list[float]:
    """Train a Combiner with each seed, and return their recalls."""
    output = Path(tempfile.mkdtemp(dir=folder))
    words = ["--dataset", dataset, "--data-root", str(folder), "--clip-model-path", str(clip)]
    words += ["--feature-cache", str(folder / "features"), "--output-dir", str(output), *flags]
    combiner_train.main([*words, "--seeds", *map(str, seeds)])
    (run,) = output.iterdir()
    validations = json.loads((run / "best_metrics.json").read_text())["seeds"].values()
    return [validation[SHOWN[dataset][0]] for validation in validations]


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % confidence interval of the mean of paired differences, by Student's t."""
    mean, deviation = mean_and_deviation(differences)
    width = QUANTILES[len(differences) - 1] * (deviation or 0) / math.sqrt(len(differences))
    return mean - width, mean + width


def line(batch_size: int, batch: Sequence[float], bank: Sequence[float]) -> str:
    """Return a row of the table, in Markdown: recalls of both kinds of negatives, and their paired difference."""
    differences = [new - old for old, new in zip(batch, bank, strict=True)]
    low, high = interval(differences)
    mean, _ = mean_and_deviation(differences)
    cells = [f"{batch_size:,}", spread(mean_and_deviation(batch)), spread(mean_and_deviation(bank))]
    return f"| {' | '.join([*cells, f'{mean:+.2f} [{low:+.2f}, {high:+.2f}]'])} |"


def main(argv: list[str] | None = None) -> None:
    """Train and measure all Combiners on all layouts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "negatives_study.json"
    )
    args = parser.parse_args(argv)
    rows: list[dict] = []
    content = {"versions": versions(), "threads": torch.get_num_threads(), "seeds": args.seeds}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shapes_dataset.main(["--output-dir", name, *DRAWN.split()])
        for dataset, (_, title) in SHOWN.items():
            clip = tuned_clip(folder, dataset)
            print(f"| {dataset} layout, batch | batch | bank | difference |\n{'|---' * 4}|")
            for batch_size in BATCHES:
                recalls = []
                for negatives in NEGATIVES:
                    started = time.process_time()
                    flags = flags_of(negatives, batch_size)
                    recalls.append(train(folder, dataset, clip, flags=flags, seeds=args.seeds))
                    row = {"dataset": dataset, "batch size": batch_size, "negatives": negatives}
                    row |= {title: recalls[-1], "seconds": time.process_time() - started}
                    rows.append(row)
                print(line(batch_size, *recalls), flush=True)
                args.output.write_text(json.dumps({**content, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
