"""Run one stage-1 step and a validation of full-size CLIPs with random weights on the CPU, to check that they work.

    python bench/full_size.py            (about 20 minutes on 2 cores, 12 GiB; writes bench/results/full_size.json)

The data are two triplets in micro-batches of one, and a gallery of one group. Each model runs in a process of its own,
whose peak memory is reported.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))
sys.path.append(str(Path(__file__).parent.parent / "tests"))

import open_clip
import torch

import shapes_dataset
from backbone_study import write_tokenizer
from models.encoder import versions
from utils import PROJECT_ROOT

# Architecture -> encoders that are trained. Gradients and AdamW's state need three times the bytes of their weights.
CASES = {"ViT-L-14": "both", "EVA02-L-14": "both", "ViT-SO400M-14-SigLIP2-378": "image"}
GIB = 2**30


def draw_few(folder: Path) -> None:
    """Write a synthetic benchmark of two training triplets and one validation triplet."""
    flags = "--train-triplets 1 --val-triplets 1 --train-groups 1 --val-groups 1"
    shapes_dataset.main(["--output-dir", str(folder), *flags.split()])
    for split, triplets in (("train", 2), ("val", 1)):
        file = folder / "cirr_dataset" / "cirr" / "captions" / f"cap.rc2.{split}.json"
        file.write_text(json.dumps(json.loads(file.read_text())[:triplets]))


def write_model(place: Path, architecture: str, data: Path) -> None:
    """Write a published architecture with random weights, and a tokenizer of few words if it needs a tokenizer."""
    config = open_clip.get_model_config(architecture)
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    known = open_clip.get_pretrained_cfg(architecture, tags[0])
    names = ("mean", "std", "interpolation", "resize_mode")
    preprocess = {name: known[name] for name in names if name in known}
    content = {"model_cfg": config, "preprocess_cfg": preprocess}
    (place / "open_clip_config.json").write_text(json.dumps(content))
    if "hf_tokenizer_name" in config["text_cfg"]:
        write_tokenizer(place, data)
    torch.manual_seed(0)
    model = open_clip.create_model(architecture, pretrained_text=False)
    torch.save(model.state_dict(), place / "open_clip_pytorch_model.bin")


def measure(folder: Path, architecture: str, trained: str) -> dict[str, object]:
    """Run one step and a validation in a process of its own, and return its peak memory and metrics."""
    with tempfile.TemporaryDirectory() as place:
        make = [sys.executable, __file__, "--write", place, architecture, str(folder)]
        subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
        flags = (
            f"--dataset CIRR --batch-size 2 --micro-batch-size 1 --num-epochs 1 --encoder {trained}"
        )
        words = [sys.executable, "src/clip_fine_tune.py", *flags.split(), "--device", "cpu"]
        words += ["--data-root", str(folder), "--num-workers", "0"]
        words += ["--clip-model-name", f"local-dir:{place}", "--output-dir", f"{place}/runs"]
        began = time.perf_counter()
        peak = subprocess.run(
            [sys.executable, __file__, "--peak-of", *words],
            check=True,
            cwd=PROJECT_ROOT,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout.splitlines()[-1]
        seconds = time.perf_counter() - began
        (run,) = Path(place, "runs").iterdir()
        metrics = (run / "train_metrics.csv").read_text().splitlines()
    return {
        "architecture": architecture,
        "trained": trained,
        "peak GiB": round(int(peak) / GIB, 2),
        "seconds": round(seconds),
        "train_metrics": metrics,
    }


def main() -> None:
    """Measure all architectures, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--write", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--peak-of", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        place, architecture, data = args.write
        write_model(Path(place), architecture, Path(data))
        return
    if args.peak_of:
        subprocess.run(args.peak_of, check=True)
        print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
        return
    rows = []
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        draw_few(folder)
        for architecture in args.only:
            rows.append(measure(folder, architecture, CASES[architecture]))
            print(json.dumps(rows[-1]), flush=True)
    content = {"versions": versions(), "rows": rows}
    output = Path(__file__).parent / "results" / "full_size.json"
    output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
