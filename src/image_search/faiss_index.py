"""Nearest-neighbour search with FAISS: exact by default, approximate for large galleries.

Vectors are normalised features, so inner products are cosine similarities. The candidates that an approximate index
finds are ranked again by their exact similarities, so its results differ only by the neighbours that it misses.
"""

import contextlib
import logging
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.files import written_whole
from utils import LONGEST_FEATURE, SHORTEST_FEATURE, DiskError, UserError, first_line

ADDED_AT_ONCE = 65_536  # number of vectors in a block

# Number of candidates that an index proposes for k results: a multiple of k, with a minimum.
CANDIDATES_PER_RESULT = 20
LEAST_CANDIDATES = 256

# HNSW parameters (Malkov and Yashunin 2018, arXiv 1603.09320).
NEIGHBOURS = 32
BUILD_EFFORT = 80
SEARCH_EFFORT = 128

# Parameters of IVF with product quantisation (Jegou et al. 2011).
PROBED_SHARE = 1 / 8  # fraction of the lists that a query searches
LEAST_PROBED = 16  # minimum number of lists that a query searches
SUB_VECTOR = 8  # number of elements per code
CODE_BITS = 8
LEAST_TRAINED_ON = 10_000  # minimum number of vectors to train the 256 centroids of a code
TRAINED_ON_PER_LIST = 64  # number of training vectors per list
PICKED_AT_ONCE = 1024  # rows at arbitrary positions of a memory map; reading a row may map 64 KiB
# Maximum growth of an IVF index beyond the number of vectors it was trained for; its lists are then twice as long as in
# a new index.
GROWN_AT_MOST = 4

# Number of rows that are compared to check that files belong together: all rows of a small index, but few enough for a
# disk that seeks each of them.
SAMPLED = 256
PROBED_ROWS = 32  # number of sampled rows to search for in an index of compressed vectors
TOLERANCE = 1e-4  # maximum difference of an element of a normalised vector

# Settings of a recall report.
REPORT_QUERIES = 200
REPORT_K = 10

NearestRows = list[tuple[int, float]]  # (row, cosine similarity), most similar first


def import_faiss() -> Any:
    """Import FAISS. Raises UserError if it is not installed."""
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)
    try:
        import faiss
    except ImportError:
        raise UserError("search needs FAISS: pip install -r requirements-app.txt") from None
    return faiss


def normalised(features: np.ndarray) -> np.ndarray:
    """Return features (N, D) with norm 1, float32.

    Raises:
        UserError: the norm of a row is too small or too large, see `models.encoder.check_lengths`.
    """
    rows = np.asarray(features, dtype=np.float32)
    with np.errstate(over="ignore"):
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if ((lengths < SHORTEST_FEATURE) | (lengths > LONGEST_FEATURE)).any():
        raise UserError(
            f"features of the index have norms from {lengths.min():.1g} to {lengths.max():.1g}, which cannot be "
            "ranked: build the index again with other weights"
        )
    return rows / lengths


def check(kind: str, count: int, dim: int) -> None:
    """Raise UserError if an index of a kind needs more vectors, or a dimension that is divisible by SUB_VECTOR."""
    if kind == "ivfpq" and (count < LEAST_TRAINED_ON or dim % SUB_VECTOR):
        raise UserError(
            f"--index-type ivfpq needs {LEAST_TRAINED_ON:,} images and a feature dimension that is a multiple of "
            f"{SUB_VECTOR}, but there are {count} images of dimension {dim}: choose flat or hnsw"
        )


def let_go(features: np.ndarray) -> None:
    """Release the memory of rows that were read from a memory map; the rows stay on disk."""
    if isinstance(features.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        features.base.madvise(mmap.MADV_DONTNEED)


def blocks(features: np.ndarray, start: int = 0) -> Iterator[np.ndarray]:
    """Yield the rows of features (N, D) from `start`, normalised, in blocks whose size does not depend on N."""
    for row in range(start, len(features), ADDED_AT_ONCE):
        yield normalised(features[row : row + ADDED_AT_ONCE])
        let_go(features)


def picked(features: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return some rows of features (N, D), normalised; read few at a time, since the system maps whole pages."""
    taken = np.empty((len(rows), features.shape[1]), np.float32)
    for start in range(0, len(rows), PICKED_AT_ONCE):
        some = slice(start, start + PICKED_AT_ONCE)
        taken[some] = normalised(features[rows[some]])
        let_go(features)
    return taken


def build(features: np.ndarray, kind: str) -> Any:
    """Build an index of features (N, D), see `trained`."""
    index = trained(features, kind)
    add(index, features)
    return index


def trained(features: np.ndarray, kind: str) -> Any:
    """Return an empty index for features (N, D), trained on some of them; the features need not be normalised.

    Args:
        kind: "flat" (exact), "hnsw" (a graph) or "ivfpq" (lists of compressed vectors).

    Raises:
        UserError: see `check`.
    """
    faiss = import_faiss()
    count, dim = features.shape
    check(kind, count, dim)
    if kind == "flat":
        return faiss.IndexFlatIP(dim)
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = BUILD_EFFORT
        index.hnsw.efSearch = SEARCH_EFFORT
        return index
    index = _empty_ivfpq(faiss, count, dim)
    shuffled = np.random.default_rng(0).permutation(count)
    sample = np.sort(shuffled[: TRAINED_ON_PER_LIST * index.nlist])
    index.train(picked(features, sample))
    return index


def add(index: Any, features: np.ndarray) -> None:
    """Add the rows of features (N, D) that an index lacks; it already contains the first `index.ntotal` rows."""
    faiss = import_faiss()
    whole = faiss.downcast_index(index.storage) if hasattr(index, "storage") else index
    if isinstance(whole, faiss.IndexFlat):
        # Reserve memory for all vectors: growing step by step needs up to three times as much.
        held = whole.codes.size()
        whole.codes.resize(len(features) * whole.code_size)
        whole.codes.resize(held)
    for block in blocks(features, index.ntotal):
        index.add(block)


def can_grow(index: Any, count: int) -> bool:
    """Return whether an index can grow to some number of vectors and remain as good as a new index."""
    return not hasattr(index, "nlist") or count <= GROWN_AT_MOST * index.nlist**2


def _empty_ivfpq(faiss: Any, count: int, dim: int) -> Any:
    """Return an untrained index whose number of lists is the square root of the number of vectors."""
    lists = round(count**0.5)
    coarse = faiss.IndexFlatIP(dim)
    codes = dim // SUB_VECTOR
    index = faiss.IndexIVFPQ(coarse, dim, lists, codes, CODE_BITS, faiss.METRIC_INNER_PRODUCT)
    index.nprobe = max(LEAST_PROBED, round(lists * PROBED_SHARE))
    return index


def sampled_rows(count: int) -> np.ndarray:
    """Return evenly spaced rows, including the first and the last; all rows of a small index."""
    return np.unique(np.linspace(0, count - 1, min(count, SAMPLED)).astype(np.int64))


def mismatch(index: Any, features: np.ndarray, kind: str) -> str:
    """Return why an index is not of a kind and of these features, judged by sampled rows; "" if it is."""
    faiss = import_faiss()
    kinds = {"flat": faiss.IndexFlat, "hnsw": faiss.IndexHNSWFlat, "ivfpq": faiss.IndexIVFPQ}
    if not isinstance(index, kinds[kind]) or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        return f"it is not a {kind} index"
    if (index.ntotal, index.d) != features.shape:
        return f"it contains {index.ntotal} vectors of dimension {index.d}, not {features.shape}"
    rows = sampled_rows(len(features))
    if kind == "ivfpq":
        # The index stores codes, not vectors, but a search for a vector finds it, or an equal one, in the nearest list.
        rows = rows[:: max(1, len(rows) // PROBED_ROWS)]
        probed = index.nprobe
        index.nprobe = 1
        found = search(index, features, normalised(features[rows]), k=1)
        index.nprobe = probed
        best = [nearest[0][1] if nearest else 0.0 for nearest in found]
        agree = bool(np.median(best) > 1 - TOLERANCE)
    else:
        stored = np.stack([index.reconstruct(int(row)) for row in rows])
        agree = np.allclose(stored, normalised(features[rows]), rtol=0, atol=TOLERANCE)
    return "" if agree else "its vectors belong to other features"


def search(index: Any, features: np.ndarray, queries: np.ndarray, *, k: int) -> list[NearestRows]:
    """Return the k nearest rows of each query, ties in the order of the rows; an approximate index may find fewer.

    Args:
        features: unnormalised features (N, D) of the index.
        queries: normalised query features (Q, D).
    """
    k = min(k, len(features))
    proposed = min(len(features), max(LEAST_CANDIDATES, CANDIDATES_PER_RESULT * k))
    _, candidates = index.search(np.ascontiguousarray(queries, dtype=np.float32), proposed)
    return _ranked(candidates, features, queries, k)


def _ranked(
    candidates: np.ndarray, features: np.ndarray, queries: np.ndarray, k: int
) -> list[NearestRows]:
    """Return the k nearest of the candidate rows (Q, C) of each query, by exact similarity."""
    results = []
    for query, rows in zip(queries, candidates, strict=True):
        found_rows = np.sort(rows[rows >= 0])  # FAISS pads with -1
        if len(found_rows) and found_rows[-1] >= len(features):
            raise UserError(f"the vectors refer to row {found_rows[-1]}: build the index again")
        similarities = normalised(features[found_rows]) @ query
        if not np.isfinite(similarities).all():
            row = found_rows[~np.isfinite(similarities)][0]
            raise UserError(f"the features of row {row} are not finite: build the index again")
        order = np.argsort(-similarities, kind="stable")[:k]
        results.append(
            list(zip(found_rows[order].tolist(), similarities[order].tolist(), strict=True))
        )
        let_go(features)
    return results


def exact_search(features: np.ndarray, queries: np.ndarray, *, k: int) -> list[NearestRows]:
    """Return the same results as `search` in a flat index, but read the features block by block, without an index.

    Args:
        queries: normalised query features (Q, D).
    """
    faiss = import_faiss()
    proposed = min(max(LEAST_CANDIDATES, k), len(features))
    best = faiss.ResultHeap(len(queries), proposed, keep_max=True)
    for number, block in enumerate(blocks(features)):
        here = min(proposed, len(block))
        near, rows = faiss.knn(queries, block, here, metric=faiss.METRIC_INNER_PRODUCT)
        best.add_result(near, rows + number * ADDED_AT_ONCE)
    best.finalize()
    return _ranked(best.I, features, queries, min(k, len(features)))


def recall_report(index: Any, features: np.ndarray) -> dict[str, float | int]:
    """Measure the recall@10 of an index against exact search, for 200 queries halfway between two random vectors."""
    rng = np.random.default_rng(0)
    first = normalised(features[rng.integers(len(features), size=REPORT_QUERIES)])
    second = normalised(features[rng.integers(len(features), size=REPORT_QUERIES)])
    queries = normalised(first + second)
    exact = exact_search(features, queries, k=REPORT_K)
    found = search(index, features, queries, k=REPORT_K)
    return {"queries": REPORT_QUERIES, "k": REPORT_K, "recall": recall(found, exact)}


def recall(found: Sequence[NearestRows], exact: Sequence[NearestRows]) -> float:
    """Return the fraction of the exact nearest neighbours that were found, averaged over the queries."""
    shares = []
    for nearest, best_nearest in zip(found, exact, strict=True):
        rows = {row for row, _ in nearest}
        best_rows = {row for row, _ in best_nearest}
        shares.append(len(rows & best_rows) / len(best_rows))
    return float(np.mean(shares))


def write(index: Any, file: Path) -> None:
    """Write an index atomically, and check every write: FAISS's own function can miss that the disk is full."""
    faiss = import_faiss()
    try:
        with written_whole(file) as stream:
            faiss.write_index(index, faiss.PyCallbackIOWriter(stream.write))
    except RuntimeError as error:  # some versions of FAISS convert OSError
        raise DiskError(
            f"could not write {file} ({first_line(error)[:80]}): free disk space"
        ) from None


def read(file: Path, *, to_grow: bool = False) -> Any:
    """Read an index; its vectors are mapped into memory if the version of FAISS supports it.

    Args:
        to_grow: whether vectors will be added to the index, which is then read completely.

    Raises:
        UserError: the file is damaged.
    """
    faiss = import_faiss()
    # Memory mapping, supported since FAISS 1.11.
    how = 0 if to_grow else getattr(faiss, "IO_FLAG_MMAP_IFC", 0)
    with readable(file):
        return faiss.read_index(str(file), how)


@contextlib.contextmanager
def readable(file: Path) -> Iterator[None]:
    """Convert the errors of FAISS about a damaged file to UserError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        raise UserError(
            f"{file} is not a readable FAISS index ({first_line(error)[:80]}): build it again"
        ) from None
