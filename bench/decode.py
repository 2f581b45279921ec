"""Measure the cost of decoding photos in full and as drafts, and the effect of drafts on features and recalls.

python bench/decode.py            (about 90 seconds of CPU; photos and benchmark are synthetic)
"""

import json
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))
sys.path.append(str(Path(__file__).parent.parent / "tests"))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import clip_fine_tune
import shapes_dataset
import validate
from benchmarks import FashionIQ
from data_utils import load_image, make_preprocess
from models.configuration import read_checkpoint, resolve_clip_options
from models.encoder import load_encoder
from runtime.choices import DECODINGS
from runtime.image_files import decoded
from settings.groups import Clip

PHOTOS = ((400, 550), (1024, 768), (4000, 3000))  # width and height in pixels
RESOLUTIONS = (224, 288, 384)  # input sizes of ViT-L/14 and ViT-B/32, RN50x4, RN50x16
SECONDS = 1.5  # minimum CPU time that is measured for each figure
DRAWN_SIDE = (256, 512)  # range of image sides in pixels; for a model input of 32, drafts are 1/8
SIZES = "--train-triplets 200 --val-triplets 200 --train-groups 1 --val-groups 1 --own-groups 1"
TRAINING = "--num-epochs 13 --learning-rate 1e-3 --batch-size 64 --validation-frequency 12 --save-training --save-best"


def draw_photo(file: Path, width: int, height: int) -> None:
    """Write a JPEG of noise whose strength falls with frequency, as in photos: about 2 bits per pixel at quality 90."""
    rng = np.random.default_rng(0)
    pixels = np.full((height, width, 3), 128.0)
    for octave in range(9):
        size = (max(2, width >> octave), max(2, height >> octave))
        noise = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        enlarged = np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), dtype=float)
        pixels += (enlarged - 128) * 0.06 * 1.35**octave
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, quality=90)


def milliseconds(file: Path, resolution: int, side: int | None) -> float:
    """Return the minimum CPU-milliseconds from a file to bytes (3, R, R), which other processes hardly affect."""
    preprocess = make_preprocess("targetpad", 1.25, resolution)
    taken = []
    while sum(taken) < SECONDS:
        start = time.process_time()
        load_image(file, preprocess, lambda path: decoded(path, side=side))
        taken.append(time.process_time() - start)
    return 1000 * min(taken)


def costs(folder: Path) -> None:
    """Print CPU-milliseconds per image, with a row for each photo size."""
    torch.set_num_threads(1)
    print(
        "| photo | MB | " + " | ".join(f"to {side} px: full, draft" for side in RESOLUTIONS) + " |"
    )
    for width, height in PHOTOS:
        file = folder / f"{width}.jpg"
        draw_photo(file, width, height)
        cells = [f"{width} x {height}", f"{file.stat().st_size / 1e6:.2f}"]
        for side in RESOLUTIONS:
            cells.append(
                f"{milliseconds(file, side, None):.1f}, {milliseconds(file, side, side):.1f}"
            )
        print("| " + " | ".join(cells) + " |", flush=True)


def effect(folder: Path) -> None:
    """Print the effect of drafts on the recalls of weights that were trained without drafts, and on features."""
    shapes_dataset.IMAGE_SIDE = DRAWN_SIDE
    shapes_dataset.main(["--output-dir", str(folder), *SIZES.split()])
    words = ["--dataset", "FashionIQ", "--data-root", str(folder)]
    clip = ["--clip-model-name", str(folder / "tiny_clip_vit.pt")]
    output = ["--output-dir", str(folder / "runs"), "--image-cache", str(folder / "pixels")]
    clip_fine_tune.main([*words, *clip, *TRAINING.split(), *output])
    (tuned,) = (folder / "runs").glob("*/saved_models/*.pt")
    split = FashionIQ(folder).val()[0]
    features = []
    for decode in DECODINGS:
        file = folder / f"{decode}.json"
        pair = ["--combining-function", "sum", "--clip-model-path", str(tuned), "--decode", decode]
        validate.main([*words, *pair, "--metrics-json", str(file)])
        print(decode, json.loads(file.read_text())["metrics"])
        checkpoint = read_checkpoint("", tuned, "CLIP")
        choice = resolve_clip_options(Clip(decode=decode), [checkpoint])
        encoder = load_encoder(choice, checkpoint, torch.device("cpu"), workers=0)
        features.append(encoder.images(split.paths))
    cosines = F.cosine_similarity(*features)
    print(
        f"cosine of features, full and draft: mean {cosines.mean():.5f}, least {cosines.min():.5f}"
    )


def main() -> None:
    """Print both tables."""
    random.seed(0)
    with tempfile.TemporaryDirectory() as name:
        costs(Path(name))
        effect(Path(name))


if __name__ == "__main__":
    main()
