"""Encoding images in each precision: how fast, how far from float32, and how long an index takes."""

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data_utils import load_image, make_preprocess
from models.encoder import Encoder
from stage1 import ARCHITECTURES, photos, random_batch, random_clip
from timing import Row, Setting, seconds, typical

PRECISIONS = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def allow_tf32(allowed: bool) -> None:
    """Let a GPU round the factors of float32 products to TF32 in this process, or not."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def encoding_in(precision: str, device: torch.device) -> Iterator[None]:
    """Let encoders encode in a precision."""
    allow_tf32(precision == "tf32")
    dtype = PRECISIONS[precision]

    def cast(encode: Callable[[Encoder, Tensor], Tensor]) -> Callable[[Encoder, Tensor], Tensor]:
        def encode_so(encoder: Encoder, inputs: Tensor) -> Tensor:
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                return encode(encoder, inputs)

        return encode_so

    own = Encoder._image_features, Encoder._text_features
    Encoder._image_features, Encoder._text_features = map(cast, own)
    try:
        yield
    finally:
        Encoder._image_features, Encoder._text_features = own


def random_encoder(name: str, setting: Setting, workers: int = 0) -> Encoder:
    """An encoder of a true architecture with random weights."""
    model = random_clip(name, setting)
    resolution = model.visual.input_resolution
    preprocess = make_preprocess("targetpad", 1.25, resolution)
    return Encoder(
        model=model,
        read=functools.partial(load_image, preprocess=preprocess),
        recipe={"resolution": resolution},
        device=setting.device,
        workers=workers,
    )


@torch.no_grad()
def figures(setting: Setting) -> Iterator[Row]:
    """Images a second in each precision, batches of 32, and the least cosine to the features in float32."""
    device = setting.device
    batch = setting.choose(gpu=32, tiny=2)
    for name in ARCHITECTURES:
        encoder = random_encoder(name, setting)
        pixels, *_ = random_batch(encoder.model, batch, device)
        exact = exact_seconds = None
        for precision in PRECISIONS:
            with encoding_in(precision, device):
                features = F.normalize(encoder._image_features(pixels), dim=-1)
                taken = typical(functools.partial(encoder._image_features, pixels), setting)
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
    """Photos to features as an index makes them, from files that workers decode."""
    files, copies, workers = setting.choose(gpu=(256, 16, 16), tiny=(4, 2, 0))
    with tempfile.TemporaryDirectory() as folder:
        paths = photos(Path(folder), files) * copies
        encoder = random_encoder("ViT-L/14", setting, workers)
        for precision in ("fp32", "fp16"):
            with encoding_in(precision, setting.device):
                taken = seconds(lambda: encoder.readable_images(paths, "photos"), setting.device)
            rate = len(paths) / taken
            yield {
                "figure": f"{len(paths):,} photos to features, ViT-L/14, {precision}, {workers} workers",
                "ours": taken,
                "note": f"{rate:.0f} images/s: 100,000 would take {100_000 / rate:.0f} s",
            }
