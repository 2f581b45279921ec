"""Encode a benchmark, compose its queries, rank its galleries, evaluate."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import Benchmark
from combiner import Compose
from data_utils import Split
from features import FeatureCache, FrozenSplit, freeze
from metrics import NotFiniteError, nearest, target_ranks
from utils import UserError

MOST_VALUES = 2**28  # similarities in memory at one time: 1 GiB
CACHE_VALUES = 2**18  # on a CPU rather what its caches hold, but so many rows that the product stays efficient
CACHE_ROWS = 128


def freeze_queries(cache: FeatureCache, benchmark: Benchmark, split: Split, label: str) -> FrozenSplit:
    """A split's gallery and its evaluation captions as features, V = 1."""
    return freeze(cache, split, [[benchmark.caption(t.captions)] for t in split.triplets], label)


def freeze_val(cache: FeatureCache, benchmark: Benchmark, splits: list[Split]) -> list[FrozenSplit]:
    """`freeze_queries` of each validation split."""
    return [freeze_queries(cache, benchmark, split, f"{benchmark.run_name}-val-{split.name}") for split in splits]


def evaluate(
    benchmark: Benchmark, frozen: list[FrozenSplit], compose: Compose, block: int | None = None
) -> dict[str, float]:
    """All metrics of a benchmark, by the names of the CSV files.

    Args:
        frozen: its validation splits, from `freeze_val`.
        compose: the way queries are made; a module must be in eval mode.
        block: queries whose similarities are in memory at a time; None for `default_block`.
    """
    ranks = {f.split.name: rank(f, compose, benchmark.keeps_reference, block) for f in frozen}
    return benchmark.summary({name: benchmark.score(*both) for name, both in ranks.items()})


@torch.no_grad()
def rank(
    frozen: FrozenSplit, compose: Compose, keeps_reference: bool, block: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Ranks of the targets in the gallery and, where queries have groups, among the five others of the group.

    Args:
        keeps_reference: whether a query's own reference may be retrieved.

    Returns:
        (Q,) and (Q,) or None, on the CPU; 0 is the first place.
    """
    split, device = frozen.split, frozen.images.device
    targets = split.target_rows.to(device)
    groups = split.group_rows.to(device) if split.triplets[0].group else None
    ranks, group_ranks = [], []
    with _naming(split):
        for rows, similarity in similarity_blocks(frozen, compose, keeps_reference, block):
            ranks.append(target_ranks(similarity, targets[rows]))
            if groups is not None:
                place = (groups[rows] == targets[rows, None]).int().argmax(1)  # the target's column within its group
                group_ranks.append(target_ranks(similarity.gather(1, groups[rows]), place))
    return torch.cat(ranks).cpu(), torch.cat(group_ranks).cpu() if group_ranks else None


@contextlib.contextmanager
def _naming(split: Split) -> Iterator[None]:
    """Name the split whose similarities are not finite, and what to do."""
    try:
        yield
    except NotFiniteError as error:
        raise UserError(f"{split.name}: {error}; the weights have diverged, or their file is damaged") from None


@torch.no_grad()
def similarity_blocks(
    frozen: FrozenSplit, compose: Compose, keeps_reference: bool, block: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Cosine similarities of a block of queries to the whole gallery, block by block.

    Yields:
        The block's rows (b,) and its similarities (b, N); -inf at the reference unless it may be retrieved.
    """
    gallery = F.normalize(frozen.images, dim=-1)  # (N, D)
    references = frozen.split.reference_rows.to(gallery.device)  # (Q,)
    block = block or default_block(len(gallery), gallery.device)
    for rows in torch.arange(len(references), device=gallery.device).split(block):
        queries = compose(frozen.images[references[rows]], frozen.captions[rows, 0])  # (b, D)
        similarity = queries @ gallery.T  # (b, N)
        if not keeps_reference:
            similarity.scatter_(1, references[rows, None], float("-inf"))
        yield rows, similarity


def default_block(gallery: int, device: torch.device) -> int:
    """Queries to compare at a time with a gallery of that many images."""
    most = max(1, MOST_VALUES // gallery)
    return most if device.type == "cuda" else min(most, max(CACHE_ROWS, CACHE_VALUES // gallery))


@torch.no_grad()
def top_k(
    frozen: FrozenSplit, compose: Compose, k: int, group_k: int, block: int | None = None
) -> tuple[list[list[str]], list[list[str]]]:
    """Names of the k nearest images of each query, and of the group_k nearest within its group; never its reference."""
    names, groups = frozen.split.names, frozen.split.group_rows.to(frozen.images.device)
    k, group_k = min(k, len(names) - 1), min(group_k, groups.shape[1])  # a small gallery has no more to give
    rows_of, rows_in_group = [], []
    with _naming(frozen.split):
        for rows, similarity in similarity_blocks(frozen, compose, keeps_reference=False, block=block):
            rows_of += nearest(similarity, k).tolist()
            rows_in_group += groups[rows].gather(1, nearest(similarity.gather(1, groups[rows]), group_k)).tolist()
    return [[names[i] for i in row] for row in rows_of], [[names[i] for i in row] for row in rows_in_group]
