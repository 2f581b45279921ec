"""Time ranking: CIRR's validation at its real size, a comparison with `topk`, and a gallery of a million images."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import Split, Triplet
from benchmarks.protocols import ORIGINAL_KEPT, ORIGINAL_REMOVED
from benchmarks.ranking import target_ranks
from evaluation.retrieval import rank
from models.features import FrozenSplit
from timing import GIB, Row, Setting, extra_memory, in_turns, seconds
from twins import nearest_by_topk, string_matrix_ranks


def random_cirr(
    queries: int, gallery: int, dim: int, device: torch.device, grouped: bool
) -> FrozenSplit:
    """Return a split of a benchmark's size with random features; a group is six consecutive gallery images."""
    generator = torch.Generator().manual_seed(0)
    names = [f"dev-{i // 6}-{i % 4}-img{i % 6}-{i}" for i in range(gallery)]
    firsts = torch.randint(gallery - 6, (queries,), generator=generator).tolist()
    groups = [tuple(names[f : f + 6]) if grouped else () for f in firsts]
    triplets = []
    for first, group in zip(firsts, groups, strict=True):
        triplets.append(
            Triplet(reference=names[first], captions=("",), target=names[first + 3], group=group)
        )
    images = torch.randn(gallery, dim, generator=generator).to(device)
    captions = torch.randn(queries, 1, dim, generator=generator).to(device)
    return FrozenSplit(
        split=Split(name="val", triplets=triplets, image_paths=dict.fromkeys(names, Path())),
        images=images,
        captions=captions,
    )


def compose(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Return the normalised sum."""
    return F.normalize(image + text, dim=-1)


def val_size(setting: Setting) -> Iterator[Row]:
    """Time CIRR's validation with groups, with and without the matrix multiplication that both sides need."""
    device = setting.device
    sizes = setting.choose(gpu=(4181, 2297, 640), cpu=(4181, 2297, 640), tiny=(40, 30, 8))
    frozen = random_cirr(*sizes, device, grouped=True)
    split = frozen.split
    gallery = F.normalize(frozen.images, dim=-1).cpu()
    queries = compose(frozen.references, frozen.captions[:, 0]).cpu()
    triplets = split.triplets
    named = (
        [t.reference for t in triplets],
        [t.target for t in triplets],
        [list(t.group) for t in triplets],
    )

    def twin():
        return string_matrix_ranks(queries, gallery, split.names, *named)

    labels, group_labels = twin()
    ranking = rank(frozen, compose, [ORIGINAL_REMOVED])[ORIGINAL_REMOVED]
    for ours, theirs in ((ranking.ranks, labels), (ranking.group_ranks, group_labels)):
        # The reference sorts 1 - s. Rounding makes some of these values equal, and they are sorted in any order.
        moved = (ours - theirs.int().argmax(1)).abs()
        assert moved.max() <= 2, "the two sides rank differently"
        assert (moved > 0).float().mean() < 0.01, "the two sides rank differently"
    what = "ranking CIRR val, {:,} x {:,}, D {}, groups".format(*sizes)
    ours, slow = in_turns(
        lambda: rank(frozen, compose, [ORIGINAL_REMOVED]), twin, device, rounds=5, twin_rounds=3
    )
    product = seconds(lambda: queries @ gallery.T, torch.device("cpu"))
    similarity, targets = (queries @ gallery.T).to(device), frozen.target_rows.to(device)
    blocks = list(zip(similarity.split(128), targets.split(128), strict=True))
    counting, _ = in_turns(lambda: [target_ranks(*block) for block in blocks], lambda: None, device)
    yield {
        "figure": f"{what}, all of it / string matrices",
        "ours": ours,
        "twin": slow,
        "must": "100 x",
    }
    yield {
        "figure": f"{what}, after the product / string matrices",
        "ours": counting,
        "twin": slow - product,
    }


def against_topk(setting: Setting) -> Iterator[Row]:
    """Time each query's nearest 50 images and its target's rank, against torch's `topk`, which gives no ranks."""
    sizes = setting.choose(gpu=(1000, 200_000, 640), cpu=(1000, 200_000, 640), tiny=(40, 300, 8))
    frozen = random_cirr(*sizes, setting.device, grouped=False)

    def twin() -> None:
        queries = compose(frozen.references, frozen.captions[:, 0])
        nearest_by_topk(queries, frozen.images, 50)

    ours, taken = in_turns(
        lambda: rank(frozen, compose, [ORIGINAL_KEPT], k=50), twin, setting.device, 3, 3
    )
    what = "ranking {:,} x {:,}, D {}, with the nearest 50 / product and topk".format(*sizes)
    yield {"figure": what, "ours": ours, "twin": taken, "ours / twin": ours / taken}


def million(setting: Setting) -> Iterator[Row]:
    """Time the ranking of a million vectors for 10,000 queries, and measure its memory."""
    device = setting.device
    large = (10_000, 1_000_000)
    queries, gallery = setting.choose(gpu=large, cpu=large, tiny=(20, 1000))
    frozen = random_cirr(queries, gallery, 64, device, grouped=False)
    taken: list[float] = []
    memory = extra_memory(
        lambda: taken.append(seconds(lambda: rank(frozen, compose, [ORIGINAL_KEPT]), device)),
        device,
    )
    note = f"{1e3 * taken[0] / queries:.2f} ms a query, {memory / GIB:.2f} GiB of extra memory"
    yield {
        "figure": f"ranking {queries:,} x {gallery:,}, D 64",
        "ours": taken[0],
        "note": note,
        "must": "within 4 GiB",
    }


def figures(setting: Setting) -> Iterator[Row]:
    """Yield the rows of the results table."""
    yield from val_size(setting)
    yield from against_topk(setting)
    yield from million(setting)
