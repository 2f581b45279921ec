"""Run the whole system on OpenMoji's pictures, in minutes on a CPU: train both stages, validate, export, search.

python src/demo.py            # or make demo
python src/demo.py --seeds 0 1 2
"""

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import os
import runpy
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# Waiting threads sleep: on few or shared cores, spinning would take CPU time from working threads. The setting changes
# no results, and is read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks import BENCHMARKS
from benchmarks.metrics import shown
from benchmarks.triplets import KIND_PLACES, OF_KIND
from cli.parsers import ScriptParser
from openmoji.pictures import check_packages
from reports.tables import text_table
from settings.flag_types import Several, seed_int, usable_path
from utils import PROJECT_ROOT, UserError, command

Word = str | Path
Words = Sequence[Word]

# Modules that take seconds to import. If processes can be forked safely, they are imported once for all commands.
PRELOADED = (
    "evaluation.retrieval", "matplotlib.figure", "models.pair", "training.stage1", "training.stage2",
    "training.trainer",
)  # fmt: skip
CAN_FORK = sys.platform == "linux"
DATASET = "Triplets"  # layout for training, with kinds of queries and several targets per query
SUBMITTED = "CIRR"  # layout for which submission files are written
SHOWN = (
    "recall_at1",
    "recall_at5",
    "recall_at10",
    "recall_at50",
    "group_recall_at1",
    "average_recall",
)
COMBINERS = {"plain Combiner": "clip4cir", "MoE Combiner": "moe"}
# Queries composed with stage 1's CLIP but without a Combiner: image only, text only, and their sum.
STAGE_1_METHODS = {
    "stage-1 image alone": "image",
    "stage-1 text alone": "text",
    "stage-1 sum": "sum",
}
STAGE_1 = (
    "--num-epochs 3 --learning-rate 1e-3 --batch-size 128 --validation-frequency 1 --mask-duplicate-targets "
    "--save-training --save-best"
)
STAGE_2 = (
    "--num-epochs 5 --combiner-lr 1e-3 --batch-size 512 --validation-frequency 2 --mask-duplicate-targets "
    "--save-training --save-best --projection-dim 256 --hidden-dim 512"
)
NEXT = """
Next, with real data: put FashionIQ and CIRR where fashionIQ_dataset/README.md and cirr_dataset/README.md say, then
  python src/clip_fine_tune.py --dataset FashionIQ --clip-model-name RN50x4 --num-epochs 100 --batch-size 128 \\
      --save-training --save-best
  python src/combiner_train.py --dataset FashionIQ --clip-model-path models/THE_RUN --num-epochs 300 \\
      --batch-size 2048 --save-training --save-best
  python src/validate.py --dataset FashionIQ --combining-function combiner --clip-model-path models/THE_RUN \\
      --combiner-path models/THE_OTHER_RUN"""


class Demo:
    """Commands of one demo, which write all their files to one folder.

    Args:
        folder: folder for data, runs, features, metrics and submissions.
        seeds: random seeds of stage 2; the tables show means over them.
    """

    def __init__(self, folder: Path, seeds: Sequence[int]) -> None:
        self.folder = folder
        self.seeds = seeds
        # Decoding such small images takes less time than starting data-loader workers.
        self.on_data: Words = ("--data-root", folder / "data", "--num-workers", "0")

    def run(self, script: str, *flags: Word) -> None:
        """Print a command as a user would type it, and run it."""
        words = [f"src/{script}", *map(str, flags)]
        print(f"\n$ python {shlex.join(words)}", flush=True)
        if start(words):
            raise UserError(f"{script} failed: see its message above")

    def train(self, script: str, name: str, *flags: Word) -> Path:
        """Run a training script, and return its run folder."""
        runs = self.folder / "models" / name
        self.run(script, *flags, *self.on_data, "--output-dir", runs)
        return max(runs.iterdir(), key=lambda run: run.stat().st_mtime)

    def validate(self, name: str, *flags: Word) -> Path:
        """Run a validation, and return its result file."""
        file = self.folder / "metrics" / f"{name}.json"
        self.run("validate.py", "--dataset", DATASET, *flags, *self.on_data, "--metrics-json", file)
        return file

    def benchmark(self) -> tuple[dict[str, list[Path]], Words]:
        """Train and validate all methods; return the result files of each, and the flags of the last MoE pair."""
        clip_name: Words = ("--clip-model-name", self.folder / "data" / "tiny_clip_vit.pt")
        clip = self.fine_tune(clip_name)
        by = "--combining-function"
        results = {"zero-shot sum": [self.validate("zero-shot", by, "sum", *clip_name)]}
        for method, function in STAGE_1_METHODS.items():
            results[method] = [self.validate(f"stage-1_{function}", by, function, *clip)]
        for method, kind in COMBINERS.items():
            pairs = self.train_combiners(kind, clip)
            results[method] = []
            for seed, pair in zip(self.seeds, pairs, strict=True):
                results[method].append(self.validate(f"{kind}_{seed}", *pair))
        self.run("compare.py", *results["plain Combiner"], *results["MoE Combiner"])
        return results, pairs[-1]

    def fine_tune(self, clip_name: Words) -> Words:
        """Train stage 1, and return the flags that choose its weights."""
        pixels: Words = ("--image-cache", self.folder / "pixels")
        flags = ["--dataset", DATASET, *clip_name, *STAGE_1.split(), *pixels]
        run = self.train("clip_fine_tune.py", f"{DATASET}_clip", *flags)
        return "--clip-model-path", best_weights(run, BENCHMARKS[DATASET].best_clips())

    def train_combiners(self, kind: str, clip: Words) -> list[Words]:
        """Train stage 2 with each seed, and return the flags that choose each trained pair."""
        flags = ["--dataset", DATASET, *clip, "--combiner-type", kind, *STAGE_2.split()]
        flags += ["--feature-cache", self.folder / "features", "--seeds", *map(str, self.seeds)]
        run = self.train("combiner_train.py", f"{DATASET}_{kind}", *flags)
        pairs: list[Words] = []
        for seed in self.seeds:
            weights = best_weights(run / f"seed_{seed}", BENCHMARKS[DATASET].best_combiners())
            pairs.append(("--combining-function", "combiner", *clip, "--combiner-path", weights))
        return pairs

    def submit(self, pair: Words) -> dict[str, float]:
        """Write a CIRR submission, and return its recalls, computed with the targets in `test1_answers.json`."""
        folder = self.folder / "submission"
        data = self.folder / "data"
        flags: Words = ("--submission-name", "demo", *pair, *self.on_data, "--output-dir", folder)
        self.run("cirr_test_submission.py", *flags)
        self.run("check_submission.py", *sorted(folder.glob("*.json")), "--data-root", data)
        answers = json.loads((data / "test1_answers.json").read_text())
        full = json.loads((folder / "recall_submission_demo.json").read_text())
        subset = json.loads((folder / "recall_subset_submission_demo.json").read_text())
        recalls = {f"R@{k}": recall(full, answers, k) for k in (1, 5, 10, 50)}
        for k in (1, 2, 3):
            recalls[f"R_subset@{k}"] = recall(subset, answers, k)
        return recalls

    def hand_on(self, pair: Words) -> None:
        """Export a pair with its result; if FAISS is installed, build an index with it and run a query."""
        run = Path(pair[-1]).parents[2]
        folder = self.folder / "exported" / run.name
        weights = [word for word in pair if word not in ("--combining-function", "combiner")]
        result = self.folder / "metrics" / f"moe_{self.seeds[-1]}.json"
        self.run("export.py", *weights, "--output", folder / "pair", "--results", result)
        if importlib.util.find_spec("faiss") is None:
            print("\nTo search with it: pip install -r requirements-app.txt")
            return
        exported: Words = ("--pair", folder / "pair")
        images = self.folder / "data" / "triplets_dataset" / "images"
        index: Words = (folder / "index", *exported)
        self.run("search.py", "index", "--images", images, "--num-workers", "0", "--output", *index)
        reference = images / "blue_heart.png"
        question = ("--image", reference, "--text", "change the color to red", "--k", "5")
        self.run("search.py", "query", *question, "--index", *index)


def start(words: Sequence[str]) -> int | None:
    """Run `python words` in a process, and return its exit code; a forked process has packages already imported."""
    if not CAN_FORK:
        return subprocess.run([sys.executable, *words]).returncode
    for package in PRELOADED:
        importlib.import_module(package)
    process = multiprocessing.get_context("fork").Process(target=interpret, args=(words,))
    process.start()
    process.join()
    return process.exitcode


def interpret(words: Sequence[str]) -> None:
    """Run `python words` in this process."""
    sys.argv = list(words)
    runpy.run_path(words[0], run_name="__main__")


def best_weights(run: Path, names: Mapping[str, str]) -> Path:
    """Return the weights with a run's best value of the first metric.

    Args:
        names: metric -> name of the best weights by this metric.
    """
    return run / "saved_models" / f"{next(iter(names.values()))}.pt"


def recall(submission: Mapping[str, list[str]], answers: Mapping[str, str], k: int) -> float:
    """Return the percentage of queries whose answer is among the first k names of a submission."""
    return 100 * statistics.fmean(
        answer in submission[pair_id][:k] for pair_id, answer in answers.items()
    )


def table(results: Mapping[str, Sequence[Mapping[str, float]]], titles: Mapping[str, str]) -> str:
    """Format a table of methods and metrics: a value, or the mean and standard deviation over seeds."""
    rows: dict[str, dict[str, str]] = {}
    for method, of_seeds in results.items():
        rows[method] = {}
        for name, title in titles.items():
            rows[method][title] = shown([metrics[name] for metrics in of_seeds])
    return text_table(rows)


def by_kind(results: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Format a table of the recalls on each kind of query, with one column per method."""
    rows: dict[str, dict[str, str]] = {}
    measured = next(iter(results.values()))[0]
    kinds = sorted(name.removeprefix(OF_KIND) for name in measured if name.startswith(OF_KIND))
    for kind in kinds:
        rows[kind] = {}
        for method, of_seeds in results.items():
            rows[kind][method] = shown([metrics[OF_KIND + kind] for metrics in of_seeds])
    return text_table(rows)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags of the demo."""
    parser = ScriptParser(__doc__)
    parser.add_argument(
        "--output-dir",
        type=usable_path,
        default=Path("demo"),
        metavar="DIR",
        help="folder for all files of the demo",
    )
    parser.add_argument(
        "--seeds",
        type=seed_int,
        nargs="+",
        action=Several,
        default=[0],
        help="random seeds for stage 2, one training run each",
    )
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    """Run the demo and print its tables."""
    args = parse(argv)
    check_packages()
    folder = Path(os.path.relpath(args.output_dir, PROJECT_ROOT))
    os.chdir(PROJECT_ROOT)  # the commands are printed with paths relative to it
    demo = Demo(folder, args.seeds)
    demo.run("emoji_dataset.py", "--output-dir", folder / "data", "--layouts", DATASET, SUBMITTED)
    demo.run("check_dataset.py", "--dataset", DATASET, "--unofficial", *demo.on_data)
    results, pair = demo.benchmark()
    recalls = demo.submit(pair)
    metrics = {}
    for method, files in results.items():
        metrics[method] = [json.loads(file.read_text())["metrics"] for file in files]
    print(f"\nval\n{table(metrics, {name: BENCHMARKS[DATASET].titles[name] for name in SHOWN})}")
    print(f"\nval, R@{KIND_PLACES} by kind of query\n{by_kind(metrics)}")
    print(f"\n{SUBMITTED} test1: the MoE Combiner's submission, scored locally")
    print(table({"MoE Combiner": [recalls]}, {name: name for name in recalls}))
    demo.hand_on(pair)
    print(
        f"\nPages of the training runs: {folder}/models/*/*/index.html. To search in a browser: make app"
    )
    print(NEXT)


if __name__ == "__main__":
    main()
