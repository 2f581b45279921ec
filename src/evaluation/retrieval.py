"""Compose a benchmark's queries, rank its galleries, evaluate."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import Benchmark, Protocol, Split
from benchmarks.metrics import NotFiniteError, nearest, target_ranks
from benchmarks.protocols import Rankings, outside
from benchmarks.ranking import Ranking, joined
from combiner import Compose, Insight
from models.features import FrozenSplit
from utils import UserError

MOST_VALUES = 2**28  # similarities in memory at one time: 1 GiB
CACHE_VALUES = 2**18  # on a CPU rather what its caches hold, but so many rows that the product stays efficient
CACHE_ROWS = 128
GROUP_LENGTH = 5  # candidates in a query's group


def evaluate(
    benchmark: Benchmark, frozen: list[FrozenSplit], compose: Compose, block: int | None = None
) -> dict[str, float]:
    """All metrics of a benchmark under its first protocol, by the names of the CSV files.

    Args:
        frozen: its validation splits, from `features.freeze_queries`.
        compose: the way queries are made; a module must be in eval mode.
        block: queries whose similarities are in memory at a time; None for `default_block`.
    """
    protocol = benchmark.protocols[0]
    return benchmark.metrics({f.split.name: rank(f, compose, [protocol], block=block)[protocol] for f in frozen})


@torch.no_grad()
def rank(
    frozen: FrozenSplit,
    compose: Compose,
    protocols: Sequence[Protocol],
    k: int = 0,
    group_k: int = 0,
    block: int | None = None,
) -> dict[Protocol, Ranking]:
    """Rank a split's gallery for every query, under several protocols from one computation of the similarities.

    Args:
        k: how many of the nearest images to keep.
        group_k: how many of the nearest within the group to keep.

    Raises:
        UserError: a similarity is not finite.
    """
    split, device = frozen.split, frozen.images.device
    secret = any(t.target is None for t in split.triplets)
    targets = None if secret else split.target_rows.to(device)
    groups = split.group_rows.to(device) if split.triplets[0].group else None
    references, others = split.reference_rows.to(device), outside(split).to(device)
    most = {p: min(k, p.gallery_size(split) - (p.reference == "removed")) for p in protocols}
    blocks: dict[Protocol, list[Ranking]] = {protocol: [] for protocol in protocols}
    with _naming(split):
        for rows, similarity in similarity_blocks(frozen, compose, block):
            own_targets = None if secret else targets[rows]
            in_group = None if groups is None else _group_block(similarity, groups[rows], references[rows])
            for protocol in protocols:
                whole = similarity.clone() if len(protocols) > 1 else similarity
                allowed = protocol.restrict(whole, references[rows], others)
                blocks[protocol].append(_rank_block(allowed, own_targets, most[protocol], in_group, group_k))
    return {protocol: joined(parts) for protocol, parts in blocks.items()}


def _group_block(similarity: Tensor, groups: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the candidates in each query's group (b, G - 1) and their similarities, -inf where there is none."""
    candidates = similarity.gather(1, groups)
    return groups, candidates.masked_fill_(groups == references[:, None], float("-inf"))


def _rank_block(
    similarity: Tensor, targets: Tensor | None, k: int, in_group: tuple[Tensor, Tensor] | None, group_k: int
) -> Ranking:
    """The ranking of a block of queries, on the device."""
    ranks = None if targets is None else target_ranks(similarity, targets)
    first = nearest(similarity, k)
    similarities = similarity.gather(1, first)
    if in_group is None:
        return Ranking(ranks, None, first, similarities, None, None)
    groups, candidates = in_group
    group_ranks = None
    if targets is not None:
        place = (groups == targets[:, None]).int().argmax(1)  # the target's column within its group
        group_ranks = target_ranks(candidates, place)
    best = nearest(candidates, min(group_k, groups.shape[1]))
    return Ranking(ranks, group_ranks, first, similarities, groups.gather(1, best), candidates.gather(1, best))


@contextlib.contextmanager
def _naming(split: Split) -> Iterator[None]:
    """Name the split whose similarities are not finite, and what to do."""
    try:
        yield
    except NotFiniteError as error:
        raise UserError(f"{split.name}: {error}; the weights have diverged, or their file is damaged") from None


@torch.no_grad()
def similarity_blocks(
    frozen: FrozenSplit, compose: Compose, block: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Cosine similarities of a block of queries to the whole gallery, block by block.

    Yields:
        The block's rows (b,) and its similarities (b, N).
    """
    gallery = F.normalize(frozen.images, dim=-1)  # (N, D)
    references = frozen.split.reference_rows.to(gallery.device)  # (Q,)
    block = block or default_block(len(gallery), gallery.device)
    for rows in torch.arange(len(references), device=gallery.device).split(block):
        yield rows, compose(frozen.images[references[rows]], frozen.captions[rows, 0]) @ gallery.T  # (b, N)


def default_block(gallery: int, device: torch.device) -> int:
    """Queries to compare at a time with a gallery of that many images."""
    most = max(1, MOST_VALUES // gallery)
    return most if device.type == "cuda" else min(most, max(CACHE_ROWS, CACHE_VALUES // gallery))


def choose_protocols(names: Sequence[str] | None, benchmark: Benchmark) -> list[Protocol]:
    """The protocols asked for, in the benchmark's order; all of them where nothing is asked for."""
    known = [protocol.name for protocol in benchmark.protocols]
    for name in names or []:
        if name not in known:
            raise UserError(f"--protocol {name} is none of {benchmark.name}: choose from {', '.join(known)}")
    return [protocol for protocol in benchmark.protocols if names is None or protocol.name in names]


def rank_all(
    frozen: Sequence[FrozenSplit], compose: Compose, protocols: Sequence[Protocol], k: int, block: int | None
) -> Rankings:
    """Every split's ranking under every protocol, with the k nearest images and all of the group."""
    by_split = {f.split.name: rank(f, compose, protocols, k, GROUP_LENGTH, block) for f in frozen}
    return {p: {name: rankings[p] for name, rankings in by_split.items()} for p in protocols}


@torch.no_grad()
def explain_all(frozen: Sequence[FrozenSplit], compose: Compose) -> dict[str, Insight | None]:
    """Split's name -> what the Combiner does with its queries, on the CPU; None for the sum."""
    if not isinstance(compose, nn.Module):
        return {f.split.name: None for f in frozen}
    insights = {}
    for f in frozen:
        found = compose.insight(f.images[f.split.reference_rows], f.captions[:, 0])
        insights[f.split.name] = Insight(found.experts.cpu(), found.gate.cpu())
    return insights
