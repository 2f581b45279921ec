"""Search for improvements of the original's training recipe on OpenMoji's pictures: single parts, then combinations.

    OMP_NUM_THREADS=1 python bench/recipe_study.py search     # learning rates and epochs of the original's recipe
    OMP_NUM_THREADS=1 python bench/recipe_study.py screen     # each part by itself, one seed per stage, one layout
    OMP_NUM_THREADS=1 python bench/recipe_study.py combine    # the useful parts together, one seed per stage
    OMP_NUM_THREADS=1 python bench/recipe_study.py final      # the best recipe, 3 x 3 seeds, all layouts
    OMP_NUM_THREADS=1 python bench/recipe_study.py test       # the same models on test, which is used once, at the end

`--folder` stores data, weights and the results of each training run. Finished runs are not repeated: a command resumes
after an interruption, and prints its table. Choices are made on val. Our results are in
bench/results/recipe_study.json.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

from benchmarks import BENCHMARKS
from benchmarks.metrics import shown
from demo import best_weights
from runtime.files import write_text
from utils import PROJECT_ROOT

SEEDS = ("0", "1", "2")
LAYOUTS = ("Triplets", "CIRR")
SCREENED = "Triplets"
KEPT = "--save-training --save-best"


@dataclass(frozen=True)
class Recipe:
    """Flags of both stages."""

    stage_1: str = ""
    stage_2: str = ""

    def __add__(self, other: "Recipe") -> "Recipe":
        return Recipe(f"{self.stage_1} {other.stage_1}", f"{self.stage_2} {other.stage_2}")


# The original's recipe, scaled down to these data; `search` found its learning rates and epochs to be the best.
ORIGINAL = Recipe(
    "--batch-size 128 --num-epochs 3 --learning-rate 1e-3",
    "--batch-size 512 --projection-dim 256 --hidden-dim 512 --num-epochs 6 --validation-frequency 1 --combiner-lr 1e-3",
)
SEARCHED = {
    "stage 1, rate 3e-4": Recipe("--learning-rate 3e-4"),
    "stage 1, rate 2e-3": Recipe("--learning-rate 2e-3"),
    "stage 1, 6 epochs": Recipe("--num-epochs 6"),
    "stage 2, rate 3e-4": Recipe(stage_2="--combiner-lr 3e-4"),
    "stage 2, rate 2e-3": Recipe(stage_2="--combiner-lr 2e-3"),
    "stage 2, 12 epochs": Recipe(stage_2="--num-epochs 12"),
}
STAGE_1 = {
    "masked duplicates": "--mask-duplicate-targets",
    "symmetric": "--loss symmetric",
    "learned temperature": "--learn-temperature",
    "label smoothing": "--label-smoothing 0.1",
    "hard negatives": "--hard-negatives 1",
    "warm-up and cosine": "--warmup-steps 50 --cosine",
    "clipped gradient": "--clip-grad-norm 1",
    "EMA": "--ema-decay 0.98",
    "caption dropout": "--drop-text 0.05",
    "image dropout": "--drop-image 0.1",
    "flips": "--flip 0.5",
    "crops": "--crop 0.7",
    "LoRA": "--lora-rank 16 --learning-rate 3e-3",
}
STAGE_2 = {
    "masked duplicates": "--mask-duplicate-targets",
    "symmetric": "--loss symmetric",
    "learned temperature": "--learn-temperature",
    "label smoothing": "--label-smoothing 0.1",
    "hard negatives": "--hard-negatives 2",
    "bank": "--negatives bank",
    "warm-up and cosine": "--warmup-steps 20 --cosine",
    "clipped gradient": "--clip-grad-norm 1",
    "EMA": "--ema-decay 0.98",
    "caption dropout": "--drop-text 0.05",
    "image dropout": "--drop-image 0.1",
    "feature noise": "--feature-noise 0.1",
    "mixed triplets": "--mix 0.2",
    "plain Combiner": "--combiner-type clip4cir",
    "one expert": "--num-experts 1 --top-k 1",
    "balanced load": "--load-balancing-weight 0.1",
    "bias for balance": "--router-bias 0.01",
    "shared expert": "--shared-expert --num-experts 3",
    "router norm": "--router-norm",
    "router noise": "--router-noise 0.5",
}
_HELD = "--clip-grad-norm 1 --mask-duplicate-targets --ema-decay 0.98"
_BANK = "--mask-duplicate-targets --negatives bank"
COMBINED = {
    "clipped, masked, EMA": Recipe(_HELD),
    "the same, and a bank": Recipe(_HELD, _BANK),
    "clipped at 0.3": Recipe(f"{_HELD} --clip-grad-norm 0.3", _BANK),
    "clipped at 0.1": Recipe(f"{_HELD} --clip-grad-norm 0.1", _BANK),
    "clipped at 0.3, hard negatives": Recipe(
        f"{_HELD} --clip-grad-norm 0.3 --hard-negatives 1", _BANK
    ),
    "rate 2e-3, warm-up, cosine": Recipe(
        "--clip-grad-norm 1 --mask-duplicate-targets --learning-rate 2e-3 --warmup-steps 50 --cosine",
        "--negatives bank",
    ),
    "rate 2e-3, warm-up, EMA": Recipe(
        "--clip-grad-norm 1 --mask-duplicate-targets --learning-rate 2e-3 --warmup-steps 50 --ema-decay 0.98",
        "--negatives bank",
    ),
}
PARTS = {f"1: {name}": Recipe(flags) for name, flags in STAGE_1.items()}
PARTS |= {f"2: {name}": Recipe(stage_2=flags) for name, flags in STAGE_2.items()}


# Recipes that `final` trains, each with 3 seeds of stage 1 x 3 seeds of stage 2.
MODERN = Recipe("--recipe modern", "--recipe modern")
PLAIN = Recipe(stage_2="--combiner-type clip4cir")
FINAL = {
    "original": ORIGINAL,
    "original, plain Combiner": ORIGINAL + PLAIN,
    "modern": ORIGINAL + MODERN,
    "modern, plain Combiner": ORIGINAL + MODERN + PLAIN,
}
COMPARED = [
    ("original", "modern"),
    ("original, plain Combiner", "original"),
    ("modern, plain Combiner", "modern"),
]


class Study:
    """Training runs, each of which is done only once.

    Args:
        folder: folder of data, features and runs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "recipe_study.json"
        self.done: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def draw(self) -> None:
        """Render the pictures, unless they exist."""
        if not (self.folder / "data").exists():
            execute("emoji_dataset.py", "--output-dir", self.folder / "data", "--layouts", *LAYOUTS)

    def train(self, script: str, layout: str, flags: str, *where: object) -> dict[str, Any]:
        """Train with one or more seeds, or look up an earlier run; return run folder, best metrics and CPU-seconds."""
        words = [script, "--dataset", layout, *flags.split(), *map(str, where)]
        key = " ".join(words).replace(f"{self.folder}/", "")
        if key not in self.done:
            self.draw()
            output = self.folder / "runs" / f"{len(self.done):03}"
            fixed = [
                "--data-root",
                self.folder / "data",
                "--output-dir",
                output,
                "--num-workers",
                0,
            ]
            seconds = execute(*words, *KEPT.split(), *fixed)
            run = max(output.iterdir(), key=lambda run: run.stat().st_mtime)
            best = json.loads((run / "best_metrics.json").read_text())
            self.done[key] = {
                "run": str(run.relative_to(self.folder)),
                "best": best,
                "seconds": seconds,
            }
            write_text(self.file, json.dumps(self.done, indent=1) + "\n")
        return self.done[key]

    def both_stages(
        self, layout: str, recipe: Recipe, *, seeds: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Train both stages; return, for each seed of stage 1, its result and the result of stage 2 with all seeds."""
        pairs = []
        for seed in seeds:
            clip_name = ("--clip-model-name", self.folder / "data" / "tiny_clip_vit.pt")
            cache = ("--image-cache", self.folder / "pixels")
            first = self.train(
                "clip_fine_tune.py", layout, recipe.stage_1, *clip_name, *cache, "--seed", seed
            )
            weights = best_weights(self.folder / first["run"], BENCHMARKS[layout].best_clips())
            cache = ("--feature-cache", self.folder / "features")
            second = self.train(
                "combiner_train.py",
                layout,
                recipe.stage_2,
                *("--clip-model-path", weights, *cache, "--seeds", *seeds),
            )
            pairs.append({"stage 1": first, "stage 2": second})
        return pairs


def execute(script: str, *words: object, prints: bool = False) -> float:
    """Run a script, and return its CPU-seconds."""
    print(f"$ {script} {' '.join(map(str, words))}", file=sys.stderr, flush=True)
    process = subprocess.Popen(
        [sys.executable, str(PROJECT_ROOT / "src" / script), *map(str, words)],
        stdout=None if prints else subprocess.DEVNULL,
    )
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{script} failed, see above")
    return round(used.ru_utime + used.ru_stime, 1)


def values(pairs: Sequence[Mapping[str, Any]], layout: str) -> dict[str, list[float]]:
    """Return a recipe's metric for each seed of stage 1 and each pair of seeds, and CPU-seconds per seed of stage 1."""
    metric = next(iter(BENCHMARKS[layout].selection))
    found: dict[str, list[float]] = {"sum": [], "Combiner": [], "CPU-s": []}
    for pair in pairs:
        found["sum"].append(pair["stage 1"]["best"][metric][metric])
        of_seeds = pair["stage 2"]["best"]["seeds"]
        found["Combiner"] += [best[metric] for best in of_seeds.values()]
        seconds = pair["stage 1"]["seconds"] + pair["stage 2"]["seconds"] / len(of_seeds)
        found["CPU-s"].append(seconds)
    return found


def table(
    study: Study, layout: str, recipes: Mapping[str, Recipe], *, seeds: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Train each recipe and print its row; the difference is a mean over runs with the same seeds.

    Returns:
        Recipe -> results of each seed of stage 1, see `Study.both_stages`.
    """
    print(f"\n| {layout} | sum | Combiner | difference | CPU-s |\n|---|---|---|---|---|")
    trained = {}
    base: list[float] = []
    for name, recipe in recipes.items():
        trained[name] = study.both_stages(layout, recipe, seeds=seeds)
        found = values(trained[name], layout)
        base = base or found["Combiner"]
        gains = [new - old for new, old in zip(found["Combiner"], base, strict=True)]
        cells = [
            shown(column) for column in (found["sum"], found["Combiner"], gains, found["CPU-s"])
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return trained


def compare(layout: str, columns: Sequence[Sequence[Path]]) -> None:
    """Print a comparison of two methods over all pairs of seeds; queries of one concept are resampled together."""
    files = itertools.chain.from_iterable(columns)
    by = ["--resample-by", "concept"] if layout == "Triplets" else []
    execute("compare.py", *files, *by, prints=True)


def open_test(folder: Path) -> Path:
    """Make a data root whose validation splits are the test splits with their targets."""
    data, opened = folder / "data", folder / "opened"
    if not opened.exists():
        shutil.copytree(data, opened, copy_function=os.link)
        triplets = opened / "triplets_dataset"
        answers = json.loads((data / "triplets_test_answers.json").read_text())
        lines = map(json.loads, (triplets / "test.jsonl").read_text().splitlines())
        asked = [{**line, "target": answers[str(line["id"])]} for line in lines]
        write_text(triplets / "val.jsonl", "".join(f"{json.dumps(line)}\n" for line in asked))
        cirr = opened / "cirr_dataset" / "cirr"
        answers = json.loads((data / "test1_answers.json").read_text())
        queries = json.loads((cirr / "captions" / "cap.rc2.test1.json").read_text())
        for query in queries:
            query["target_hard"] = answers[str(query["pairid"])]
            query["target_soft"] = {query["target_hard"]: 1.0}
        write_text(cirr / "captions" / "cap.rc2.val.json", json.dumps(queries))
    return opened


def measure_on_test(study: Study, layout: str, pairs: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Evaluate each pair of seeds on the opened test split, and return the result files."""
    root = open_test(study.folder)
    files = []
    for pair in pairs:
        clip, combiners = (study.folder / pair[stage]["run"] for stage in ("stage 1", "stage 2"))
        benchmark = BENCHMARKS[layout]
        for seed in SEEDS:
            weights = best_weights(combiners / f"seed_{seed}", benchmark.best_combiners())
            files.append(combiners / f"test_{seed}.json")
            given = ["--clip-model-path", best_weights(clip, benchmark.best_clips())]
            given += ["--combining-function", "combiner", "--combiner-path", weights]
            given += ["--metrics-json", files[-1], "--num-workers", 0]
            if not files[-1].exists():
                execute("validate.py", "--dataset", layout, "--data-root", root, *given)
    return files


def main(argv: list[str] | None = None) -> None:
    """Run a step of the study."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=["search", "screen", "combine", "final", "test"])
    parser.add_argument("--folder", type=Path, default=Path("recipe_study"))
    parser.add_argument("--only", nargs="+", help="parts by their names, or layouts")
    args = parser.parse_args(argv)
    study = Study(args.folder.absolute())
    one_seed = {"search": SEARCHED, "screen": PARTS, "combine": COMBINED}
    if args.step in one_seed:
        known = one_seed[args.step]
        chosen = {name: ORIGINAL + known[name] for name in args.only or known}
        table(study, SCREENED, {"original": ORIGINAL, **chosen}, seeds=SEEDS[:1])
        return
    for layout in args.only or LAYOUTS:
        trained = table(study, layout, FINAL, seeds=SEEDS)
        for one, other in COMPARED:
            columns = []
            for name in (one, other):
                if args.step == "test":
                    columns.append(measure_on_test(study, layout, trained[name]))
                else:
                    columns.append(
                        [study.folder / pair["stage 2"]["run"] for pair in trained[name]]
                    )
            compare(layout, columns)


if __name__ == "__main__":
    main()
