"""Build and search each kind of index of a million vectors, and measure its recall against exact search."""

import statistics
import time
from collections.abc import Iterator

import numpy as np
import torch

from image_search import faiss_index
from timing import Row, Setting, extra_memory, seconds

COUNT, DIM, ASKED = 1_000_000, 512, 100
# Dimension of the surface near which the vectors are: image features vary in few dimensions, random vectors in all.
INTRINSIC = 32


def gallery(count: int, rng: np.random.Generator) -> np.ndarray:
    """Return vectors (count, DIM) near a surface of few dimensions, like a network's features."""
    surface = rng.standard_normal((INTRINSIC, DIM), dtype=np.float32)
    parts = []
    for start in range(0, count, 100_000):
        rows = min(100_000, count - start)
        noise = 0.3 * rng.standard_normal((rows, DIM), dtype=np.float32)
        parts.append(
            np.tanh(rng.standard_normal((rows, INTRINSIC), dtype=np.float32)) @ surface + noise
        )
    return np.concatenate(parts)


def figures(setting: Setting) -> Iterator[Row]:
    """Yield the rows of the results table, only for CPUs."""
    yield from asked(setting.device, ["flat", "ivfpq"])


def figures_of_graph(setting: Setting) -> Iterator[Row]:
    """Yield the row of a graph index, which takes many minutes to build."""
    _, row = asked(setting.device, ["flat", "hnsw"])
    yield row


def asked(device: torch.device, kinds: list[str]) -> Iterator[Row]:
    """Yield a row for each kind of index, the exact one first."""
    rng = np.random.default_rng(0)
    features = gallery(COUNT, rng)
    pairs = [features[rng.integers(COUNT, size=ASKED)] for _ in range(2)]
    queries = faiss_index.normalised(pairs[0] + pairs[1])
    exact = None
    for kind in kinds:
        built: list = []
        memory = extra_memory(
            lambda kind=kind, built=built: built.append(timed(features, kind)), device
        )
        (index, taken) = built[0]
        faiss_index.search(index, features, queries[:5], k=10)
        each = [
            seconds(lambda q=q, i=index: faiss_index.search(i, features, q[None], k=10), device)
            for q in queries
        ]
        found = faiss_index.search(index, features, queries, k=10)
        exact = exact or found
        recall = faiss_index.recall(found, exact)
        note = f"built in {taken:.0f} s, {memory / 2**30:.2f} GiB of extra memory, recall@10 {recall:.3f}"
        what = f"one query of {COUNT:,} vectors, D {DIM}, {kind}"
        yield {
            "figure": what,
            "ours": statistics.median(each),
            "note": note,
            "must": "milliseconds",
        }


def timed(features: np.ndarray, kind: str) -> tuple:
    """Build an index, and return it with the seconds that this took."""
    start = time.perf_counter()
    return faiss_index.build(features, kind), time.perf_counter() - start
