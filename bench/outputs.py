# ruff: noqa: E501
"""Run every script on a small dataset, and compare all outputs, to verify that a code change has no effect on them.

python bench/outputs.py run DIR                       with the code beside this file
python bench/outputs.py run DIR --src OTHER/src       with the code of another checkout, such as an earlier commit
python bench/outputs.py compare DIR OTHER_DIR         lists the differences, apart from times and paths

The commands are the guides' commands at a small size. Run both sides on one machine and with the same packages, because
numbers are compared byte for byte, and weights bit by bit.
"""

import argparse
import filecmp
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch

SRC = Path(__file__).resolve().parents[1] / "src"
TESTS = SRC.parent / "tests"
CLIP = "--clip-model-name data/tiny_clip_vit.pt"
SHORT = "--num-epochs 2 --save-training --save-best"
SIZES = "--projection-dim 16 --hidden-dim 24"
ON_DATA = "--data-root data --device cpu --num-workers 0"
# {NAME} stands for the first weights in the only run folder in runs/NAME.
COMMANDS = f"""
shapes_dataset.py --output-dir data --train-triplets 24 --val-triplets 8 --train-groups 6 --val-groups 3
check_dataset.py --data-root data --unofficial --num-workers 0
clip_fine_tune.py --dataset FashionIQ {CLIP} {SHORT} --batch-size 16 --learning-rate 1e-4 {ON_DATA} --output-dir runs/fiq
clip_fine_tune.py --dataset CIRR {CLIP} {SHORT} --batch-size 16 --micro-batch-size 4 --ema-decay 0.9 {ON_DATA} --output-dir runs/cirr
combiner_train.py --dataset FashionIQ --clip-model-path {{fiq}} {SHORT} {SIZES} --batch-size 16 {ON_DATA} --feature-cache features --output-dir runs/moe
combiner_train.py --dataset CIRR --clip-model-path {{cirr}} {SHORT} {SIZES} --batch-size 16 --negatives bank {ON_DATA} --feature-cache features --output-dir runs/bank
combiner_train.py --dataset CIRR --combiner-type clip4cir {CLIP} {SHORT} {SIZES} --batch-size 16 --seeds 0 1 {ON_DATA} --no-feature-cache --output-dir runs/plain
validate.py --dataset FashionIQ --combining-function sum {CLIP} {ON_DATA} --metrics-json sum.json --rankings sum_rankings.json
validate.py --dataset FashionIQ --combining-function combiner --clip-model-path {{fiq}} --combiner-path {{moe}} {ON_DATA} --metrics-json moe.json --rankings moe_rankings.json
validate.py --dataset CIRR --combining-function combiner --clip-model-path {{cirr}} --combiner-path {{bank}} {ON_DATA} --metrics-json bank.json --rankings bank_rankings.json
validate.py --dataset CIRCO --combining-function sum {CLIP} {ON_DATA} --metrics-json circo.json
validate.py --dataset Triplets --combining-function image {CLIP} {ON_DATA} --metrics-json own.json
compare.py sum.json moe.json
audit.py --dataset FashionIQ --combining-function combiner --clip-model-path {{fiq}} --combiner-path {{moe}} {ON_DATA}
cirr_test_submission.py --submission-name ours --combining-function combiner --clip-model-path {{cirr}} --combiner-path {{bank}} {ON_DATA} --output-dir submission
circo_test_submission.py --submission-name ours --combining-function sum {CLIP} {ON_DATA} --output-dir submission
fashioniq_test_submission.py --submission-name ours --combining-function sum {CLIP} {ON_DATA} --output-dir submission
triplets_test_submission.py --submission-name ours --combining-function sum {CLIP} {ON_DATA} --output-dir submission
visualize.py --rankings moe_rankings.json --data-root data --output-dir sheets
export.py --clip-model-path {{fiq}} --combiner-path {{moe}} --results moe.json --output pair
validate.py --dataset FashionIQ --pair pair {ON_DATA} --metrics-json pair.json
convert.py --dataset CIRR --data-root data --output-dir converted
search.py index --images data/cirr_dataset/dev --output index {CLIP} --device cpu --num-workers 0
search.py query --index index --image data/cirr_dataset/dev/dev-0-0-img0.png --text "is red" --device cpu --json
plan.py stage1 --gpu h100 --triplets 18000 6016 --images 40000 15000 --clip-model-name RN50x4 --batch-size 128
plan.py stage2 --gpu h100 --triplets 18000 6016 --images 40000 15000 --clip-model-name RN50x4 --batch-size 4096
"""
# Pattern of text that differs between two runs of the same code -> its replacement.
PASSING = {
    r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d": "DATE",
    r", [\d.]+ s; [^\n]* left\b": ", PACE",
    r"\b\d+(?:\.\d+)? (?:s|min|h)\b": "TIME",
    r'"made_here": "\w+"': "SEAL",
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    run = actions.add_parser("run", help="run all commands in a new folder")
    run.add_argument("folder", type=Path)
    run.add_argument("--src", type=Path, default=SRC, help="of the code that is run")
    compare = actions.add_parser("compare", help="compare two folders")
    compare.add_argument("folders", type=Path, nargs=2)
    return parser.parse_args(argv)


def run_all(folder: Path, src: Path) -> None:
    """Run the commands in a folder; the printed output of each is written to a file in its subfolder `printed`."""
    (folder / "printed").mkdir(parents=True)
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    quiet["PYTHONPATH"] = str(src.resolve())  # for shapes_dataset.py, which is in tests/
    for number, line in enumerate(COMMANDS.strip().splitlines()):
        runs = {run.name: only(run) for run in (folder / "runs").glob("*")}
        script, *words = shlex.split(line.format(**runs))
        place = TESTS if script == "shapes_dataset.py" else src.resolve()
        command = [sys.executable, str(place / script), *words]
        done = subprocess.run(command, cwd=folder, env=quiet, capture_output=True, text=True)
        printed = folder / "printed" / f"{number:02}_{script.removesuffix('.py')}.txt"
        printed.write_text(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
        print(f"{done.returncode} {line}", flush=True)


def only(runs: Path) -> str:
    """Return the first weights of the only run in a folder, or the run itself, as a path relative to the data."""
    (run,) = runs.iterdir()
    weights = sorted(run.glob("saved_models/*.pt"))
    return str((weights[0] if weights else run).relative_to(runs.parent.parent))


def compare(one: Path, other: Path) -> list[str]:
    """Return the files that differ, and the files that only one of the folders has."""
    ours, theirs = contents(one), contents(other)
    differing = [f"{name}: in {one} alone" for name in sorted(ours.keys() - theirs.keys())]
    differing += [f"{name}: in {other} alone" for name in sorted(theirs.keys() - ours.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        if not alike(one, ours[name], other, theirs[name]):
            differing.append(f"{name}: {ours[name]} and {theirs[name]} differ")
    return differing


def contents(folder: Path) -> dict[str, Path]:
    """Return name without dates -> file, for all files in a folder."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {without_passing(str(file.relative_to(folder)), folder): file for file in files}


def alike(one: Path, ours: Path, other: Path, theirs: Path) -> bool:
    """Check whether two files are equal apart from times and paths; of checkpoints, only the tensors are compared."""
    if filecmp.cmp(ours, theirs, shallow=False):
        return True
    if ours.suffix == ".pt":
        contents = [tensors(torch.load(file, weights_only=True)) for file in (ours, theirs)]
        same_names = contents[0].keys() == contents[1].keys()
        return same_names and all(
            torch.equal(contents[0][name], contents[1][name]) for name in contents[0]
        )
    try:
        return without_passing(ours.read_text(), one) == without_passing(theirs.read_text(), other)
    except UnicodeDecodeError:
        return False


def tensors(content: object, name: str = "") -> dict[str, torch.Tensor]:
    """Return path in a checkpoint -> tensor, for all of its tensors."""
    if isinstance(content, torch.Tensor):
        return {name: content}
    found: dict[str, torch.Tensor] = {}
    for key, value in content.items() if isinstance(content, dict) else ():
        found.update(tensors(value, f"{name}.{key}"))
    return found


def without_passing(text: str, folder: Path) -> str:
    """Replace times, and paths of the folder and of the code, in a text."""
    text = text.replace(str(folder.resolve()), "FOLDER")
    text = re.sub(r"(?:/[\w.-]+)+/src/", "src/", text)
    for pattern, name in PASSING.items():
        text = re.sub(pattern, name, text)
    return text


def main(argv: list[str] | None = None) -> None:
    """Run the commands, or compare two folders and exit with code 1 if they differ."""
    args = parse(argv)
    if args.action == "run":
        run_all(args.folder, args.src)
        return
    differing = compare(*args.folders)
    print("\n".join(differing) or "all alike")
    raise SystemExit(bool(differing))


if __name__ == "__main__":
    main()
