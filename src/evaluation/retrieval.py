"""Compose a benchmark's queries, rank its galleries, compute metrics, and explain what the Combiner did."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import Benchmark, Protocol, Split
from benchmarks.ranking import (
    NotFiniteError,
    Ranking,
    Rankings,
    joined,
    nearest,
    other_target_ranks,
    target_ranks,
)
from combiner import Compose, Composer, Insight
from models.features import FrozenSplit
from runtime import distributed
from utils import UserError

logger = logging.getLogger(__name__)

MOST_VALUES = 2**28  # maximum number of similarities in memory at a time: 1 GiB
# On a CPU, a block should fit into the caches, but have enough rows for an efficient matrix multiplication.
CACHE_VALUES = 2**18
CACHE_ROWS = 512
EQUAL = 1e-6  # maximum difference between similarities that are equal up to rounding
FEW = 2  # with so few images, ties in similarity are likely


def evaluate(
    benchmark: Benchmark,
    frozen: Sequence[FrozenSplit],
    compose: Compose,
    *,
    block: int | None = None,
) -> dict[str, float]:
    """Return a benchmark's metrics under its first protocol, named as in the CSV files; for training runs.

    Weights that make all similarities equal only cause a warning, because a training run may leave such a state again.

    Args:
        frozen: the validation splits, from `features.freeze_queries`.
        compose: composes the queries; a module must be in evaluation mode.
        block: number of queries whose similarities are in memory at a time; None for `default_block`.
    """
    protocol = benchmark.protocols[0]
    rankings = rank_all(frozen, compose, [protocol], block=block, if_equal=_warn_of_equal)
    return benchmark.metrics([frozen_split.split for frozen_split in frozen], rankings[protocol])


def refuse_equal(split: Split) -> None:
    """Raise UserError, because ranks would only reflect the order of the gallery's list."""
    raise UserError(
        f"{split.name}: every image is equally similar to every query: the weights have collapsed; choose other weights"
    )


def rank_all(
    frozen: Sequence[FrozenSplit],
    compose: Compose,
    protocols: Sequence[Protocol],
    *,
    k: int = 0,
    block: int | None,
    if_equal: Callable[[Split], None] = refuse_equal,
) -> Rankings:
    """Rank every split under every protocol, see `rank`.

    Raises:
        UserError: similarities are not finite, or all are equal and `if_equal` refuses that.
    """
    rankings: dict[Protocol, dict[str, Ranking]] = {protocol: {} for protocol in protocols}
    for frozen_split in frozen:
        ranked = rank(frozen_split, compose, protocols, k=k, block=block, if_equal=if_equal)
        for protocol, ranking in ranked.items():
            rankings[protocol][frozen_split.split.name] = ranking
    return rankings


@torch.no_grad()
def explain_all(
    frozen: Sequence[FrozenSplit], compose: Composer, text: str = ""
) -> dict[str, Insight | None]:
    """Return split's name -> experts and gate of its queries, on the CPU; None if the composition has neither.

    Args:
        text: text of the protocol, see `Protocol.text`.
    """
    insights = {}
    for frozen_split in frozen:
        _, insight = compose.explained(frozen_split.references, frozen_split.captions_of(text))
        insights[frozen_split.split.name] = insight and insight.cpu()
    return insights


@torch.no_grad()
def rank(
    frozen: FrozenSplit,
    compose: Compose,
    protocols: Sequence[Protocol],
    *,
    k: int = 0,
    block: int | None = None,
    if_equal: Callable[[Split], None] | None = None,
) -> dict[Protocol, Ranking]:
    """Rank a split's gallery for every query, and its group.

    Protocols with the same text share one computation of the similarities.

    Args:
        k: number of nearest images to keep, and with them the complete group; 0 to keep only ranks.
        if_equal: called with the split if every image is equally similar to every query.

    Raises:
        UserError: a similarity is not finite.
    """
    by_text: dict[str, dict[Protocol, list[Ranking]]] = {}
    for protocol in protocols:
        by_text.setdefault(protocol.text, {})[protocol] = []
    ranked = {}
    for text, blocks in by_text.items():
        tells_nothing = len(frozen.split.names) > FEW
        try:
            for rows, similarity in similarity_blocks(frozen, compose, block, text=text):
                tells_nothing = tells_nothing and _are_equal(similarity)
                group = _rank_group(similarity, frozen, rows, sort=k > 0)
                for protocol, parts in blocks.items():
                    whole = similarity.clone() if len(blocks) > 1 else similarity
                    outside = frozen.outside_of(protocol.gallery)
                    allowed = protocol.restrict(whole, frozen.reference_rows[rows], outside)
                    most = min(k, protocol.most_answers(frozen.split))
                    parts.append(_rank_gallery(allowed, frozen, rows, group=group, k=most))
        except NotFiniteError as error:
            raise UserError(
                f"{frozen.split.name}: {error}; the weights have diverged or their file is damaged: choose other "
                "weights"
            ) from None
        if tells_nothing and if_equal:
            if_equal(frozen.split)
        ranked.update({protocol: joined(parts) for protocol, parts in blocks.items()})
    return {protocol: ranked[protocol] for protocol in protocols}


def _are_equal(similarity: Tensor) -> bool:
    """Check whether each query of a block (b, N) is equally similar to all images."""
    # The first query nearly always suffices to find a difference.
    for queries in (similarity[:1], similarity):
        least, most = queries.aminmax(dim=1)
        if not (most - least).max() <= EQUAL:
            return False
    return True


def _warn_of_equal(split: Split) -> None:
    if distributed.is_main():
        logger.warning(
            "warning: %s: every image is equally similar to every query: the weights have collapsed, so the recalls "
            "of this validation are meaningless",
            split.name,
        )


def _rank_gallery(
    similarity: Tensor,
    frozen: FrozenSplit,
    rows: Tensor,
    *,
    group: Mapping[str, Tensor],
    k: int,
) -> Ranking:
    """Rank the whole gallery for a block of queries, from similarities (b, N).

    Args:
        group: see `_rank_group`.
    """
    columns = nearest(similarity, k)
    split = frozen.split
    ranks = None
    others = None
    if not split.is_secret:
        ranks = target_ranks(similarity, frozen.target_rows[rows])
    if split.most_other_targets:
        others = other_target_ranks(similarity, frozen.other_target_rows[rows])
    return Ranking(
        nearest=columns,
        similarities=similarity.gather(1, columns),
        ranks=ranks,
        other_ranks=others,
        **group,
    )


def _rank_group(
    similarity: Tensor, frozen: FrozenSplit, rows: Tensor, *, sort: bool
) -> dict[str, Tensor]:
    """Return the fields of a `Ranking` about each query's group, for a block of queries (b, N); empty without groups.

    Every protocol ranks groups in the same way.

    Args:
        sort: keep the group sorted by similarity, which validations in training do not need.
    """
    if not frozen.split.has_groups:
        return {}
    groups = frozen.group_rows[rows]  # (b, G - 1)
    is_filler = groups == frozen.reference_rows[rows][:, None]  # pads groups that lost members
    candidates = similarity.gather(1, groups).masked_fill_(is_filler, float("-inf"))
    columns = nearest(candidates, groups.shape[1] if sort else 0)
    ranking = {
        "nearest_in_group": groups.gather(1, columns),
        "group_similarities": candidates.gather(1, columns),
    }
    if not frozen.split.is_secret:
        is_target = groups == frozen.target_rows[rows][:, None]
        ranking["group_ranks"] = target_ranks(candidates, is_target.int().argmax(1))
    return ranking


@torch.no_grad()
def similarity_blocks(
    frozen: FrozenSplit, compose: Compose, block: int | None = None, *, text: str = ""
) -> Iterator[tuple[Tensor, Tensor]]:
    """Compute cosine similarities of all queries to the whole gallery, block by block.

    Args:
        text: text of the protocol, see `Protocol.text`.

    Yields:
        The rows of a block (b,) and its similarities (b, N).
    """
    gallery = F.normalize(frozen.images, dim=-1)  # (N, D)
    references = frozen.reference_rows  # (Q,)
    captions = frozen.captions_of(text)  # (Q, D)
    block = block or default_block(len(gallery), gallery.device)
    for rows in torch.arange(len(references), device=gallery.device).split(block):
        queries = compose(frozen.images[references[rows]], captions[rows])  # (b, D)
        yield rows, queries @ gallery.T  # (b, N)


def default_block(gallery: int, device: torch.device) -> int:
    """Return the number of queries to compare at a time with a gallery of this size."""
    most = max(1, MOST_VALUES // gallery)
    if device.type == "cuda":
        return most
    return min(most, max(CACHE_ROWS, CACHE_VALUES // gallery))
