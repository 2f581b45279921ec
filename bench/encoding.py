"""Encode images in each precision: speed, difference from float32, and the time to encode an index."""

import dataclasses
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from data_utils import ImageLoader, load_image, make_preprocess
from models.clip_model import backbone, ready
from models.encoder import Encoder
from runtime.choices import ENCODE_PRECISIONS
from stage1 import TIMED, photos, random_batch, random_clip
from timing import Row, Setting, seconds, typical


def encoding_in(precision: str, encoder: Encoder) -> Encoder:
    """Return a copy of the encoder with another precision."""
    return dataclasses.replace(
        encoder, preprocessing={**encoder.preprocessing, "encode_precision": precision}
    )


def random_encoder(name: str, setting: Setting, workers: int = 0) -> Encoder:
    """Return an encoder of a real architecture with random weights."""
    model = ready(random_clip(name, setting), setting.device)
    resolution = model.visual.input_resolution
    preprocess = make_preprocess("targetpad", 1.25, resolution)
    return Encoder(
        model=model,
        backbone=backbone(model),
        loader=ImageLoader(
            functools.partial(load_image, preprocess=preprocess), workers, setting.device
        ),
        preprocessing={"resolution": resolution},
        device=setting.device,
    )


@torch.no_grad()
def figures(setting: Setting) -> Iterator[Row]:
    """Measure images/s in each precision with batches of 32, and the minimum cosine to the float32 features."""
    device = setting.device
    batch = setting.choose(gpu=32, tiny=2)
    for name in TIMED:
        encoder = random_encoder(name, setting)
        pixels, *_ = random_batch(encoder.model, batch, device)
        exact = exact_seconds = None
        for precision in ENCODE_PRECISIONS:
            encode = encoding_in(precision, encoder)._image_features
            features = F.normalize(encode(pixels), dim=-1)
            taken = typical(functools.partial(encode, pixels), setting)
            if exact is None:
                exact, exact_seconds = features, taken
            least = (features * exact).sum(1).min().item()
            yield {
                "figure": f"encoding {batch} images, {name}, {precision} / fp32",
                "ours": taken,
                "twin": exact_seconds,
                "images/s": batch / taken,
                "note": f"{batch / taken:.0f} images/s, cosine to fp32 at least {least:.6f}",
            }


def index(setting: Setting) -> Iterator[Row]:
    """Time the encoding of photos as for an index, from files that data-loader workers decode."""
    files, copies, workers = setting.choose(gpu=(256, 16, 16), tiny=(4, 2, 0))
    with tempfile.TemporaryDirectory() as folder:
        paths = photos(Path(folder), files) * copies
        encoder = random_encoder("ViT-L/14", setting, workers)
        for precision in ("fp32", "fp16"):
            own = encoding_in(precision, encoder)
            taken = seconds(lambda own=own: list(own.readable_images([paths])), setting.device)
            rate = len(paths) / taken
            yield {
                "figure": f"{len(paths):,} photos to features, ViT-L/14, {precision}, {workers} workers",
                "ours": taken,
                "note": f"{rate:.0f} images/s: 100,000 would take {100_000 / rate:.0f} s",
            }
