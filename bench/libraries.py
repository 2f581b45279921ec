"""Compare with other libraries: FAISS and torch's `topk` for ranking, open_clip for the loss and for encoding.

All figures are CPU-seconds, so that other work on the machine hardly affects them.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.protocols import ORIGINAL_KEPT
from encoding import random_encoder
from evaluation.retrieval import rank
from ranking import compose, random_cirr
from stage1 import photos
from timing import Row, Setting, Step, processor_seconds
from training.losses import ContrastiveLoss
from twins import images_by_open_clip, nearest_by_faiss, nearest_by_topk


def rows_of(what: str, sides: dict[str, Step], rounds: int) -> Iterator[Row]:
    """Yield a row for each other side; the first side is ours."""
    taken = processor_seconds(sides, rounds)
    ours = next(iter(sides))
    for name in list(sides)[1:]:
        yield {
            "figure": f"{what}: {ours} / {name}",
            "ours": taken[ours],
            "twin": taken[name],
            "ours / twin": taken[ours] / taken[name],
            "note": "seconds of a core",
        }


def ranking(setting: Setting) -> Iterator[Row]:
    """Time each query's nearest 50 images and its target's rank, against libraries that do not compute ranks."""
    sizes = setting.choose(gpu=(10_000, 200_000, 640), cpu=(10_000, 200_000, 640), tiny=(9, 60, 8))
    frozen = random_cirr(*sizes, setting.device, grouped=False)
    queries = compose(frozen.references, frozen.captions[:, 0])
    sides = {
        "rank": lambda: rank(frozen, compose, [ORIGINAL_KEPT], k=50),
        "topk": lambda: nearest_by_topk(queries, frozen.images, 50),
        "FAISS": lambda: nearest_by_faiss(queries, frozen.images, 50),
    }
    what = "the nearest 50, {:,} x {:,}, D {}".format(*sizes)
    yield from rows_of(what, sides, setting.choose(gpu=2, cpu=2, tiny=1))


def loss(setting: Setting) -> Iterator[Row]:
    """Time forward and backward pass of the symmetric loss, which equals open_clip's, on the same features."""
    from open_clip.loss import ClipLoss

    batch, dim = setting.choose(gpu=(4096, 640), cpu=(4096, 640), tiny=(8, 8))
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(2, batch, dim, generator=generator), dim=-1)
    queries, targets = features.to(setting.device).requires_grad_().unbind()
    ids = torch.arange(batch, device=setting.device)
    ours, theirs = ContrastiveLoss(symmetric=True), ClipLoss()
    both = ours(queries, targets, ids), theirs(queries, targets, 100.0)
    assert torch.allclose(*both, rtol=1e-4), "the two sides have different losses"
    sides = {
        "ours": lambda: ours(queries, targets, ids).backward(),
        "open_clip": lambda: theirs(queries, targets, 100.0).backward(),
    }
    yield from rows_of(f"symmetric loss, batch {batch:,}, D {dim}", sides, 5)


def encoding(setting: Setting) -> Iterator[Row]:
    """Time the encoding of photos in batches of 32, in this process only, with random weights."""
    import open_clip

    count = setting.choose(gpu=256, cpu=64, tiny=2)
    encoder = random_encoder("ViT-B/32", setting)
    model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32-quickgelu")
    model = model.eval().to(setting.device)
    with tempfile.TemporaryDirectory() as folder:
        paths = photos(Path(folder), count)
        sides = {
            "ours": lambda: encoder.images(paths),
            "open_clip": lambda: images_by_open_clip(model, preprocess, paths),
        }
        yield from rows_of(f"{count} photos to features, ViT-B/32", sides, 3)


def figures(setting: Setting) -> Iterator[Row]:
    """Yield the rows of the results table."""
    yield from loss(setting)
    yield from encoding(setting)
    yield from ranking(setting)
