"""Measure a pair on validation splits: rankings under each protocol, and what the Combiner did."""

from collections.abc import Sequence

import torch
from torch import nn

from benchmarks import Benchmark, Protocol
from benchmarks.protocols import Rankings
from combiner import Compose, Insight
from models.features import FrozenSplit
from retrieval import rank
from utils import UserError

GROUP_LENGTH = 5  # candidates in a query's group


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
