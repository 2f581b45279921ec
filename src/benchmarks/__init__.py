"""Benchmarks: annotations, splits, protocols, metrics, submission files of test servers, checks of a copy."""

from collections.abc import Callable
from typing import Any

from benchmarks.base import Benchmark
from benchmarks.circo import CIRCO
from benchmarks.cirr import CIRR
from benchmarks.fashioniq import FashionIQ
from benchmarks.genecis import GeneCIS
from benchmarks.lasco import LaSCo
from benchmarks.protocols import PROTOCOLS, Protocol
from benchmarks.splits import Split, Triplet
from benchmarks.triplets import Triplets

BENCHMARKS: dict[str, type[Benchmark]] = {
    benchmark.name: benchmark for benchmark in (CIRR, FashionIQ, CIRCO, LaSCo, GeneCIS, Triplets)
}


def best_of(metric: str) -> Callable[..., Any]:
    """Return `max`, or `min` if a benchmark reports that lower values of a metric are better."""
    known = [kind.reported[metric] for kind in BENCHMARKS.values() if metric in kind.reported]
    return min if any(reported.lower_is_better for reported in known) else max


__all__ = [
    "BENCHMARKS",
    "CIRCO",
    "CIRR",
    "PROTOCOLS",
    "Benchmark",
    "FashionIQ",
    "GeneCIS",
    "LaSCo",
    "Protocol",
    "Split",
    "Triplet",
    "Triplets",
    "best_of",
]
