"""Compare a device's results with the stored results of the original implementation in tests/golden."""

import functools
import gzip
import json
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import clip_fine_tune
import validate
from benchmarks import CIRR
from combiner import load_combiner
from data_utils import ImageLoader, load_image, make_preprocess
from models.clip_model import backbone, load_clip, load_finetuned
from models.encoder import Encoder
from report import held
from runs import columns
from runtime.precision import exact_float32
from runtime.tensors import load_tensors
from timing import Row, Setting

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"

Entry = Mapping[str, Any]  # one command in expected.json, with its arguments and results


def unpack(folder: Path) -> Path:
    """Unpack inputs and outputs of the original implementation to a folder, and return the folder."""
    for file in GOLDEN.iterdir():
        if file.name.endswith(".tar.gz"):
            with tarfile.open(file) as archive:
                archive.extractall(folder, filter="data")
        elif file.suffix == ".gz":
            (folder / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
        else:
            shutil.copy(file, folder)
    return folder


def expected(folder: Path) -> dict[str, list[Entry]]:
    """Read the commands that were run with the original implementation, and their results."""
    return json.loads((folder / "expected.json").read_text())


def arguments(entry: Entry, folder: Path) -> list[str]:
    """Return an entry's arguments; their paths are relative to the golden folder, and become paths in `folder`."""
    words = [word for word in entry["args"] if not word.startswith("(")]
    return [str(folder / word) if word.endswith(".pt") else word for word in words]


def csv_name(printed: str) -> str:
    """Return this project's name for a metric of the original implementation."""
    return printed.replace("recallat", "recall_at").replace("average recall", "average_recall_at")


def golden_encoder(folder: Path, device: torch.device) -> Encoder:
    """Load the fine-tuned tiny CLIP, with the preprocessing of the original implementation's features."""
    model = load_clip(str(folder / "clip_vit.pt"), device)
    tuned = folder / "tuned_clip_vit.pt"
    load_finetuned(model, load_tensors(tuned)["CLIP"], tuned)
    preprocess = make_preprocess("targetpad", 1.25, 64)
    read = functools.partial(load_image, preprocess=preprocess)
    return Encoder(
        model=model,
        backbone=backbone(model),
        loader=ImageLoader(read, 0, device),
        preprocessing={},
        device=device,
    )


def feature_differences(folder: Path, device: torch.device) -> dict[str, float]:
    """Return the largest differences from the original's image features, text features and Combiner queries."""
    features = np.load(folder / "features.npz")
    image_paths = CIRR(folder).val()[0].image_paths
    encoder = golden_encoder(folder, device)
    path = folder / "combiner_moe_cirr.pt"
    state = load_tensors(path)["Combiner"]
    combiner = load_combiner(state, {}, path, wanted={}, clip_dim=64).to(device)
    images = encoder.images([image_paths[name] for name in features["names"]])
    texts = encoder.captions(list(features["captions"]))
    with torch.no_grad():
        combined = combiner(images, texts)
    ours = {
        "image_features": images,
        "text_features": texts,
        "combined_moe_cirr": combined,
    }
    return {
        name: float(np.abs(value.cpu().numpy() - features[name]).max())
        for name, value in ours.items()
    }


def validation_difference(
    entry: Entry, folder: Path, device: torch.device, precision: str = "fp32"
) -> float:
    """Return the largest difference from the original's metrics of one validation, in percentage points."""
    file = folder / "metrics.json"
    flags = ["--data-root", folder, "--device", device, "--num-workers", 0, "--metrics-json", file]
    flags += ["--encode-precision", precision]
    validate.main([*arguments(entry, folder), *map(str, flags)])
    metrics = json.loads(file.read_text())["metrics"]
    return max(abs(metrics[csv_name(name)] - value) for name, value in entry["metrics"].items())


def validations(setting: Setting) -> Iterator[Row]:
    """Check features and recalls against the original's in float32 without TF32; in fp16, only report differences."""
    device = setting.device
    with tempfile.TemporaryDirectory() as name:
        folder = unpack(Path(name))
        entries = expected(folder)["validate"][setting.choose(gpu=slice(None), tiny=slice(5, 6))]
        exact_float32()
        for what, difference in feature_differences(folder, device).items():
            yield held(f"golden {what}, fp32", difference, 1e-4)
        worst = max(validation_difference(entry, folder, device) for entry in entries)
        yield held(f"{len(entries)} golden validations, fp32, points", worst, 1e-3)
        half = [validation_difference(entry, folder, device, "fp16") for entry in entries]
        moved = sum(difference > 1e-3 for difference in half)
        note = f"at most {max(half):.2f} points; {moved} of {len(half)} differ"
        yield {"figure": "golden validations, fp16", "note": note}


def full_batch_losses(setting: Setting) -> Iterator[Row]:
    """Check stage 1 on full batches in float32: equal losses, and recalls that differ by at most one query."""
    exact_float32()
    with tempfile.TemporaryDirectory() as name:
        folder = unpack(Path(name))
        for entry in expected(folder)["stage1_full_batch"][
            setting.choose(gpu=slice(None), tiny=slice(1, 2))
        ]:
            words = arguments(entry, folder)
            trained = words[words.index("--encoder") + 1]
            output = folder / f"runs_{trained}"
            flags = ["--data-root", folder, "--device", setting.device, "--num-workers", 0]
            flags += ["--precision", "fp32", "--output-dir", output]
            clip_fine_tune.main([*words, *map(str, flags)])
            (run,) = output.iterdir()
            losses = columns(run / "train_metrics.csv")["train_epoch_loss"]
            pairs = list(zip(losses, entry["train_epoch_loss"], strict=True))
            what = f"golden stage 1, --encoder {trained}"
            yield held(f"{what}, losses", max(abs(a / b - 1) for a, b in pairs), 1e-3)
            metrics = columns(run / "validation_metrics.csv")
            moved = []
            for metric, values in entry["validation"].items():
                moved += [abs(a - b) for a, b in zip(metrics[metric], values, strict=True)]
            yield held(f"{what}, recalls, points", max(moved), 1.3, "a query is 1.28")
