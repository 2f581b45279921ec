"""Measure the effect of experts, k and the router's losses on load and recall, on synthetic data over several seeds.

    python bench/moe_study.py            (about 40 minutes on 2 cores; writes bench/results/moe_study.json)

Stage 1 is trained once on each layout, with settings for synthetic shapes, and each Combiner with each seed. Recalls
are from each seed's best validation; loads are from the last epoch.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))
sys.path.append(str(Path(__file__).parent.parent / "tests"))

import torch

import clip_fine_tune
import combiner_train
import shapes_dataset
from benchmarks import BENCHMARKS
from benchmarks.metrics import mean_and_deviation
from demo import best_weights
from equal_parameters import PLAIN, equal_hidden_dim, parameters
from models.encoder import versions
from runs import SHAPES_STAGE_1, SHAPES_STAGE_2, columns
from training.hyper_parameters import read_hyper_parameters

SHOWN = {
    "FashionIQ": ("average_recall", "mean recall"),
    "CIRR": ("mean(R@5+R_s@1)", "mean(R@5+R_s@1)"),
}
SIZES = {"clip_dim": 64, "projection_dim": 256, "hidden_dim": 512}


def moe(experts: int, top_k: int, *losses: str) -> list[str]:
    """Return the flags of a mixture."""
    return ["--num-experts", str(experts), "--top-k", str(top_k), *losses]


def methods() -> dict[str, list[str]]:
    """Return name -> flags of each Combiner that is compared."""
    sizes = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1), (8, 2)]
    found = {f"E {experts}, k {k}": moe(experts, k) for experts, k in sizes}
    for weight in ("0.01", "0.1", "1"):
        found[f"E 4, k 2, load balancing {weight}"] = moe(4, 2, "--load-balancing-weight", weight)
    for weight in ("0.001", "0.01", "0.1"):
        found[f"E 4, k 2, router z {weight}"] = moe(4, 2, "--router-z-weight", weight)
    plain = ["--combiner-type", "clip4cir"]
    found["plain, H 512"] = plain
    mixture = {**SIZES, "combiner_type": "moe", "num_experts": 4, "top_k": 2}
    equal = equal_hidden_dim(mixture, PLAIN)
    found["plain, equal parameters"] = [*plain, "--hidden-dim", str(equal)]
    return found


def tuned_clip(folder: Path, dataset: str) -> Path:
    """Train stage 1 on synthetic shapes, and return the file of its best weights."""
    flags = [
        "--dataset",
        dataset,
        "--data-root",
        str(folder),
        "--clip-model-name",
        str(folder / "tiny_clip_vit.pt"),
        "--image-cache",
        str(folder / "pixels"),
    ]
    clip_fine_tune.main(
        [*flags, *SHAPES_STAGE_1.split(), "--output-dir", str(folder / "clip" / dataset)]
    )
    (run,) = (folder / "clip" / dataset).iterdir()
    return best_weights(run, BENCHMARKS[dataset].best_clips())


def measure(
    folder: Path, dataset: str, clip: Path, name: str, flags: list[str], seeds: list[int]
) -> dict:
    """Train a Combiner on a layout; return its parameters, and mean and deviation over seeds of recall and load."""
    output = folder / "combiner" / dataset / name.replace(" ", "_")
    words = [
        "--dataset",
        dataset,
        "--data-root",
        str(folder),
        "--clip-model-path",
        str(clip),
        *SHAPES_STAGE_2.split(),
    ]
    words += ["--feature-cache", str(folder / "features"), "--output-dir", str(output), *flags]
    combiner_train.main([*words, "--seeds", *map(str, seeds)])
    (run,) = output.iterdir()
    metric = SHOWN[dataset][0]
    validations = json.loads((run / "best_metrics.json").read_text())["seeds"].values()
    settings = read_hyper_parameters(run).table
    row = {"dataset": dataset, "method": name, "parameters": parameters(settings)}
    row["recall"] = mean_and_deviation([validation[metric] for validation in validations])
    if settings["combiner_type"] == "moe":
        tables = [columns(run / f"seed_{seed}" / "router_metrics.csv") for seed in seeds]
        last = [{name: column[-1] for name, column in table.items()} for table in tables]
        experts = [f"expert{i}_share" for i in range(settings["num_experts"])]
        shares = [[table[expert] for expert in experts] for table in last]
        row["least share"] = mean_and_deviation([min(of_seed) for of_seed in shares])
        row["largest share"] = mean_and_deviation([max(of_seed) for of_seed in shares])
        for kind in ("load_entropy", "row_entropy"):
            row[kind.replace("_", " ")] = mean_and_deviation([table[kind] for table in last])
    return row


def spread(value: tuple[float, float | None]) -> str:
    """Format a mean, with its deviation if there is one."""
    mean, deviation = value
    return f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}"


def line(row: dict) -> str:
    """Return a row of the table, in Markdown."""
    cells = [row["method"], f"{row['parameters'] / 1e6:.2f} M", spread(row["recall"])]
    loads = [
        row.get(name) for name in ("least share", "largest share", "load entropy", "row entropy")
    ]
    cells += [spread(load) if load else "" for load in loads]
    return "| " + " | ".join(cells) + " |"


def main(argv: list[str] | None = None) -> None:
    """Train and measure all Combiners on all layouts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "moe_study.json"
    )
    args = parser.parse_args(argv)
    content = {
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "seeds": args.seeds,
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shapes_dataset.main(["--output-dir", name])
        for dataset, (_, title) in SHOWN.items():
            clip = tuned_clip(folder, dataset)
            heads = [
                f"{dataset} layout",
                "parameters",
                title,
                "least share",
                "largest",
                "load entropy",
                "row entropy",
            ]
            table = ["| " + " | ".join(heads) + " |", "|---" * 7 + "|"]
            for method, flags in methods().items():
                content["rows"].append(measure(folder, dataset, clip, method, flags, args.seeds))
                table.append(line(content["rows"][-1]))
                args.output.write_text(json.dumps(content, indent=1) + "\n")
            print("\n".join(table), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
