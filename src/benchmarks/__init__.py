"""Every fact of a benchmark: annotations, splits, protocols, metrics, the files of test servers, checks of a copy."""

from benchmarks.base import Benchmark
from benchmarks.circo import CIRCO
from benchmarks.cirr import CIRR
from benchmarks.fashioniq import FashionIQ
from benchmarks.protocols import PROTOCOLS, Protocol
from benchmarks.splits import Split, Triplet
from benchmarks.triplets import Triplets

BENCHMARKS: dict[str, type[Benchmark]] = {
    benchmark.name: benchmark for benchmark in (CIRR, FashionIQ, CIRCO, Triplets)
}

__all__ = [
    "BENCHMARKS",
    "CIRCO",
    "CIRR",
    "PROTOCOLS",
    "Benchmark",
    "FashionIQ",
    "Protocol",
    "Split",
    "Triplet",
    "Triplets",
]
