"""The nearest among many vectors, by FAISS: exact by default, approximate for large galleries.

Vectors are normalised features, so that inner products are cosine similarities. What an approximate index finds is
ranked again by the exact similarities, so only what is missed can differ.
"""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from utils import DiskError, UserError, first_line

CANDIDATES = 20  # times k: how many an approximate index proposes
LEAST = 256  # and at least so many
NEIGHBOURS, BUILD_EFFORT, SEARCH_EFFORT = 32, 80, 128  # of HNSW (Malkov and Yashunin 2018, arXiv 1603.09320)
PROBED, LEAST_PROBED = 1 / 8, 16  # share of IVF's lists that a query looks at, and how many (Jegou et al. 2011)
FEWEST = 10_000  # vectors that product quantisation learns its 256 words of
SUB_VECTOR = 8  # elements that product quantisation stores in one byte
SAMPLES, SAMPLED_K = 200, 10  # queries of a recall report


def import_faiss() -> Any:
    """FAISS, which only a search needs."""
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)
    try:
        import faiss
    except ImportError:
        raise UserError("search needs FAISS: pip install -r requirements-app.txt") from None
    return faiss


def normalised(features: np.ndarray) -> np.ndarray:
    """Rows (N, D) of length 1, float32."""
    rows = np.asarray(features, dtype=np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def check(kind: str, count: int, dim: int) -> None:
    """Raise UserError where there are too few vectors, or vectors that cannot be split, for a kind."""
    if kind == "ivfpq" and (count < FEWEST or dim % SUB_VECTOR):
        raise UserError(
            f"--index-type ivfpq needs {FEWEST:,} images of a feature length that is a multiple of {SUB_VECTOR}, and "
            f"there are {count} of length {dim}: choose flat or hnsw"
        )


def build(features: np.ndarray, kind: str) -> Any:
    """An index of features (N, D), which need not be normalised.

    Args:
        kind: "flat", exact; "hnsw", a graph; "ivfpq", lists of compressed vectors.

    Raises:
        UserError: see `check`.
    """
    faiss = import_faiss()
    count, dim = features.shape
    check(kind, count, dim)
    if kind == "flat":
        index = faiss.IndexFlatIP(dim)
    elif kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = BUILD_EFFORT, SEARCH_EFFORT
    else:
        index = _empty_ivfpq(faiss, count, dim)
        sample = np.random.default_rng(0).permutation(count)[: 64 * index.nlist]
        index.train(normalised(features[np.sort(sample)]))
    for start in range(0, count, 65_536):
        index.add(normalised(features[start : start + 65_536]))
    return index


def _empty_ivfpq(faiss: Any, count: int, dim: int) -> Any:
    """As many lists as the square root of the vectors, each to be compared in bytes."""
    lists = round(count**0.5)
    index = faiss.IndexIVFPQ(faiss.IndexFlatIP(dim), dim, lists, dim // SUB_VECTOR, 8, faiss.METRIC_INNER_PRODUCT)
    index.nprobe = max(LEAST_PROBED, round(lists * PROBED))
    return index


def search(index: Any, features: np.ndarray, queries: np.ndarray, k: int) -> list[list[tuple[int, float]]]:
    """(row, cosine similarity) of the k nearest of each query, the nearest first; equal ones in the order of the rows.

    An approximate index may find fewer.

    Args:
        features: (N, D) that the index was built of.
        queries: (Q, D), normalised.
    """
    k = min(k, len(features))
    proposed = min(len(features), max(LEAST, CANDIDATES * k))
    _, candidates = index.search(np.ascontiguousarray(queries, dtype=np.float32), proposed)
    answers = []
    for query, found in zip(queries, candidates, strict=True):
        known = np.sort(found[found >= 0])
        exact = normalised(features[known]) @ query
        order = np.argsort(-exact, kind="stable")[:k]
        answers.append(list(zip(known[order].tolist(), exact[order].tolist(), strict=True)))
    return answers


def recall_report(index: Any, features: np.ndarray) -> dict[str, float | int]:
    """How much of the exact answer an index finds: of the 10 nearest of 200 queries between two random vectors."""
    rng = np.random.default_rng(0)
    vectors = [normalised(features[rng.integers(len(features), size=SAMPLES)]) for _ in range(2)]
    queries = normalised(vectors[0] + vectors[1])
    exact = search(build(features, "flat"), features, queries, SAMPLED_K)
    return {"queries": SAMPLES, "k": SAMPLED_K, "recall": recall(search(index, features, queries, SAMPLED_K), exact)}


def recall(found: list[list[tuple[int, float]]], exact: list[list[tuple[int, float]]]) -> float:
    """The share of exact answers that are among those found."""
    rows = [({row for row, _ in some}, {row for row, _ in best}) for some, best in zip(found, exact, strict=True)]
    return float(np.mean([len(some & best) / len(best) for some, best in rows]))


def write(index: Any, file: Path) -> None:
    """Write an index; its file's name is new, so no earlier one is touched."""
    try:
        import_faiss().write_index(index, str(file))
        with open(file, "rb") as whole:
            os.fsync(whole.fileno())
    except (RuntimeError, OSError) as error:
        raise DiskError(f"could not write {file} ({first_line(error)[:80]}): free space") from None


def read(file: Path) -> Any:
    """Read an index. Raises UserError where it is damaged."""
    try:
        return import_faiss().read_index(str(file))
    except RuntimeError as error:
        raise UserError(f"{file} is not a readable FAISS index ({first_line(error)[:80]}): build it again") from None
