"""What beats the original's recipe, on OpenMoji's pictures: each part alone, then those that held together.

    OMP_NUM_THREADS=1 python bench/recipe_study.py search     # learning rates and epochs of the original's recipe
    OMP_NUM_THREADS=1 python bench/recipe_study.py screen     # the parts, one seed a stage, one layout
    OMP_NUM_THREADS=1 python bench/recipe_study.py final      # what held, 3 x 3 seeds, all layouts
    OMP_NUM_THREADS=1 python bench/recipe_study.py test       # the same pairs on test, which is opened once, at the end

A training that bench/results/recipe_study.json has is not done again, so each command goes on where it was stopped, and
prints its table. `--folder` keeps data and weights. Choices are made on val.
"""

import argparse
import json
import os
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

RESULTS = Path(__file__).parent / "results" / "recipe_study.json"
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


# The original's recipe at the size of these data; its learning rates and epochs are those that `search` found best.
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
PARTS = {f"1: {name}": Recipe(flags) for name, flags in STAGE_1.items()}
PARTS |= {f"2: {name}": Recipe(stage_2=flags) for name, flags in STAGE_2.items()}


class Study:
    """Trainings that are done once.

    Args:
        folder: keeps data, features and runs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}

    def draw(self) -> None:
        """Render the pictures, unless they are there."""
        if not (self.folder / "data").exists():
            execute("emoji_dataset.py", "--output-dir", self.folder / "data", "--layouts", *LAYOUTS)

    def train(self, script: str, layout: str, flags: str, *where: object) -> dict[str, Any]:
        """Train with several seeds or one, or look up what came of it: run folder, best metrics, CPU-seconds."""
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
            write_text(RESULTS, json.dumps(self.done, indent=1) + "\n")
        return self.done[key]

    def both_stages(
        self, layout: str, recipe: Recipe, *, seeds: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Train both stages: for each seed of stage 1, what came of it and of stage 2 with all seeds."""
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


def execute(script: str, *words: object) -> float:
    """Run a script; returns the CPU-seconds that it took."""
    print(f"$ {script} {' '.join(map(str, words))}", file=sys.stderr, flush=True)
    process = subprocess.Popen(
        [sys.executable, str(PROJECT_ROOT / "src" / script), *map(str, words)],
        stdout=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{script} failed, see above")
    return round(used.ru_utime + used.ru_stime, 1)


def values(pairs: Sequence[Mapping[str, Any]], layout: str) -> dict[str, list[float]]:
    """What a recipe reached in each pair of seeds, and the CPU-seconds of each seed of stage 1."""
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
) -> None:
    """Train each recipe and print its row; the difference is the mean over pairs of equal seeds."""
    print(f"\n| {layout} | sum | Combiner | difference | CPU-s |\n|---|---|---|---|---|")
    base: list[float] = []
    for name, recipe in recipes.items():
        found = values(study.both_stages(layout, recipe, seeds=seeds), layout)
        base = base or found["Combiner"]
        gains = [new - old for new, old in zip(found["Combiner"], base, strict=True)]
        cells = [shown(found["sum"]), shown(found["Combiner"]), shown(gains), shown(found["CPU-s"])]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Train and measure what a step of the study is made of."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=["search", "screen", "final", "test"])
    parser.add_argument("--folder", type=Path, default=Path("recipe_study"))
    parser.add_argument("--only", nargs="+", help="parts by their names")
    args = parser.parse_args(argv)
    study = Study(args.folder.absolute())
    known = {"search": SEARCHED, "screen": PARTS}[args.step]
    chosen = {name: ORIGINAL + part for name, part in known.items()}
    if args.only:
        chosen = {name: chosen[name] for name in args.only}
    table(study, SCREENED, {"original": ORIGINAL, **chosen}, seeds=SEEDS[:1])


if __name__ == "__main__":
    main()
