"""Encode a benchmark, compose its queries, rank its galleries, evaluate."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import Benchmark
from combiner import Compose
from data_utils import Split
from features import FeatureCache, FrozenSplit, freeze
from metrics import check_finite, exclude, target_ranks
from utils import UserError

BLOCK = 1024  # queries whose similarities are in memory at one time


def freeze_queries(cache: FeatureCache, benchmark: Benchmark, split: Split, label: str) -> FrozenSplit:
    """A split's gallery and its evaluation captions as features, V = 1."""
    return freeze(cache, split, [[benchmark.caption(t.captions)] for t in split.triplets], label)


def freeze_val(cache: FeatureCache, benchmark: Benchmark, splits: list[Split]) -> list[FrozenSplit]:
    """`freeze_queries` of each validation split."""
    return [freeze_queries(cache, benchmark, split, f"{benchmark.run_name}-val-{split.name}") for split in splits]


def evaluate(benchmark: Benchmark, frozen: list[FrozenSplit], compose: Compose) -> dict[str, float]:
    """All metrics of a benchmark, by the names of the CSV files.

    Args:
        frozen: its validation splits, from `freeze_val`.
        compose: the way queries are made; a module must be in eval mode.
    """
    return benchmark.summary({f.split.name: benchmark.score(*rank(benchmark, f, compose)) for f in frozen})


@torch.no_grad()
def rank(benchmark: Benchmark, frozen: FrozenSplit, compose: Compose) -> tuple[Tensor, Tensor | None]:
    """Ranks of the targets in the gallery and, where queries have groups, among the five others of the group.

    Returns:
        (Q,) and (Q,) or None, on the CPU; 0 is the first place.
    """
    split, device = frozen.split, frozen.images.device
    targets = split.target_rows.to(device)
    groups = split.group_rows.to(device) if split.triplets[0].group else None
    ranks, group_ranks = [], []
    for rows, similarity in similarity_blocks(frozen, compose, benchmark.keeps_reference):
        ranks.append(target_ranks(similarity, targets[rows]))
        if groups is not None:
            place = (groups[rows] == targets[rows, None]).int().argmax(1)  # the target's column within its group
            group_ranks.append(target_ranks(similarity.gather(1, groups[rows]), place))
    return torch.cat(ranks).cpu(), torch.cat(group_ranks).cpu() if group_ranks else None


@torch.no_grad()
def similarity_blocks(frozen: FrozenSplit, compose: Compose, keeps_reference: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Cosine similarities of a block of queries to the whole gallery, block by block.

    Yields:
        The block's rows (b,) and its similarities (b, N); -inf at the reference unless it may be retrieved.
    """
    gallery = F.normalize(frozen.images, dim=-1)  # (N, D)
    references = frozen.split.reference_rows.to(gallery.device)  # (Q,)
    for rows in torch.arange(len(references), device=gallery.device).split(BLOCK):
        queries = compose(frozen.images[references[rows]], frozen.captions[rows, 0])  # (b, D)
        similarity = queries @ gallery.T  # (b, N)
        try:
            check_finite(similarity)
        except ValueError as error:
            raise UserError(f"{frozen.split.name}: {error}; the weights have diverged or the file is damaged") from None
        yield rows, similarity if keeps_reference else exclude(similarity, references[rows])


@torch.no_grad()
def top_k(frozen: FrozenSplit, compose: Compose, k: int, group_k: int) -> tuple[list[list[str]], list[list[str]]]:
    """Names of the k nearest images of each query, and of the group_k nearest within its group; never its reference.

    Equal similarities keep the gallery's order.
    """
    names, groups = frozen.split.names, frozen.split.group_rows.to(frozen.images.device)
    k, group_k = min(k, len(names) - 1), min(group_k, groups.shape[1])  # a small gallery has no more to give
    nearest, nearest_in_group = [], []
    for rows, similarity in similarity_blocks(frozen, compose, keeps_reference=False):
        nearest += similarity.argsort(dim=1, descending=True, stable=True)[:, :k].tolist()
        own = similarity.gather(1, groups[rows]).argsort(dim=1, descending=True, stable=True)[:, :group_k]
        nearest_in_group += groups[rows].gather(1, own).tolist()
    return [[names[i] for i in row] for row in nearest], [[names[i] for i in row] for row in nearest_in_group]
