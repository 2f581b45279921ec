"""The nearest among many vectors, by FAISS: exact by default, approximate for large galleries.

Vectors are normalised features, so that inner products are cosine similarities. What an approximate index finds is
ranked again by the exact similarities, so only what is missed can differ.
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

ADDED_AT_ONCE = 65_536  # vectors

# An approximate index proposes this many times k candidates, and at least so many.
CANDIDATES_PER_RESULT = 20
LEAST_CANDIDATES = 256

# Of HNSW (Malkov and Yashunin 2018, arXiv 1603.09320).
NEIGHBOURS = 32
BUILD_EFFORT = 80
SEARCH_EFFORT = 128

# Of IVF with product quantisation (Jegou et al. 2011).
PROBED_SHARE = 1 / 8  # of the lists, which a query looks at
LEAST_PROBED = 16  # lists
SUB_VECTOR = 8  # elements that are stored in one code
CODE_BITS = 8
LEAST_TRAINED_ON = 10_000  # vectors that the 256 words of a code are learned of
TRAINED_ON_PER_LIST = 64  # vectors
PICKED_AT_ONCE = 1024  # rows here and there of a memory map; of each, 64 KiB may be mapped
GROWN_AT_MOST = (
    4  # times as many vectors as it was trained for, so that lists are twice as long as new ones
)

# Rows that tell whether files are of one index: all of a small one, and few enough for a disk that seeks each.
SAMPLED = 256
PROBED_ROWS = 32  # of these, which compressed vectors are searched for
TOLERANCE = 1e-4  # of an element of a normalised vector

# Of a recall report.
REPORT_QUERIES = 200
REPORT_K = 10

NearestRows = list[tuple[int, float]]  # (row, cosine similarity), the nearest first


def import_faiss() -> Any:
    """FAISS, which only a search needs."""
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)
    try:
        import faiss
    except ImportError:
        raise UserError("search needs FAISS: pip install -r requirements-app.txt") from None
    return faiss


def normalised(features: np.ndarray) -> np.ndarray:
    """Rows (N, D) of length 1, float32.

    Raises:
        UserError: a row is too short or too long, see `models.encoder.check_lengths`.
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
    """Raise UserError where there are too few vectors, or vectors that cannot be split, for a kind."""
    if kind == "ivfpq" and (count < LEAST_TRAINED_ON or dim % SUB_VECTOR):
        raise UserError(
            f"--index-type ivfpq needs {LEAST_TRAINED_ON:,} images and a feature dimension that is a multiple of "
            f"{SUB_VECTOR}, but there are {count} of dimension {dim}: choose flat or hnsw"
        )


def let_go(features: np.ndarray) -> None:
    """Give back the memory that rows of a memory map took when they were read; they stay on the disk."""
    if isinstance(features.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        features.base.madvise(mmap.MADV_DONTNEED)


def blocks(features: np.ndarray, start: int = 0) -> Iterator[np.ndarray]:
    """The rows of features (N, D) from one on, normalised, so many at a time that memory does not grow with N."""
    for row in range(start, len(features), ADDED_AT_ONCE):
        yield normalised(features[row : row + ADDED_AT_ONCE])
        let_go(features)


def picked(features: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Some rows of features (N, D), normalised. A system maps what surrounds a row too, so few are read at a time."""
    taken = np.empty((len(rows), features.shape[1]), np.float32)
    for start in range(0, len(rows), PICKED_AT_ONCE):
        some = slice(start, start + PICKED_AT_ONCE)
        taken[some] = normalised(features[rows[some]])
        let_go(features)
    return taken


def build(features: np.ndarray, kind: str) -> Any:
    """An index of features (N, D), see `trained`."""
    index = trained(features, kind)
    add(index, features)
    return index


def trained(features: np.ndarray, kind: str) -> Any:
    """An index without vectors for features (N, D), which need not be normalised. It is trained on some of them.

    Args:
        kind: "flat", exact; "hnsw", a graph; "ivfpq", lists of compressed vectors.

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
    """Add the features that an index lacks: all rows (N, D) but for its first, which it has."""
    faiss = import_faiss()
    whole = faiss.downcast_index(index.storage) if hasattr(index, "storage") else index
    if isinstance(whole, faiss.IndexFlat):
        # Room for all at once. Grown step by step it takes up to three times as much.
        held = whole.codes.size()
        whole.codes.resize(len(features) * whole.code_size)
        whole.codes.resize(held)
    for block in blocks(features, index.ntotal):
        index.add(block)


def can_grow(index: Any, count: int) -> bool:
    """Return whether an index is as good with so many vectors as one that is newly built of them."""
    return not hasattr(index, "nlist") or count <= GROWN_AT_MOST * index.nlist**2


def _empty_ivfpq(faiss: Any, count: int, dim: int) -> Any:
    """An untrained index with as many lists as the square root of the number of vectors."""
    lists = round(count**0.5)
    coarse = faiss.IndexFlatIP(dim)
    codes = dim // SUB_VECTOR
    index = faiss.IndexIVFPQ(coarse, dim, lists, codes, CODE_BITS, faiss.METRIC_INNER_PRODUCT)
    index.nprobe = max(LEAST_PROBED, round(lists * PROBED_SHARE))
    return index


def sampled_rows(count: int) -> np.ndarray:
    """Some of so many rows, evenly spaced, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, SAMPLED)).astype(np.int64))


def mismatch(index: Any, features: np.ndarray, kind: str) -> str:
    """Say why an index is not one of a kind of these features, as far as sampled rows tell; "" if it is."""
    faiss = import_faiss()
    kinds = {"flat": faiss.IndexFlat, "hnsw": faiss.IndexHNSWFlat, "ivfpq": faiss.IndexIVFPQ}
    if not isinstance(index, kinds[kind]) or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        return f"it is not of the kind {kind}"
    if (index.ntotal, index.d) != features.shape:
        return f"it holds {index.ntotal} vectors of dimension {index.d}, not {features.shape}"
    rows = sampled_rows(len(features))
    if kind == "ivfpq":
        # What is stored is not the vector, but a search for a vector finds it, or its equal, in the nearest list.
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
    return "" if agree else "its vectors are of other features"


def search(index: Any, features: np.ndarray, queries: np.ndarray, *, k: int) -> list[NearestRows]:
    """The k nearest of each query; equally near ones in the order of the rows. An approximate index may find fewer.

    Args:
        features: (N, D) that the index was built of.
        queries: (Q, D), normalised.
    """
    k = min(k, len(features))
    proposed = min(len(features), max(LEAST_CANDIDATES, CANDIDATES_PER_RESULT * k))
    _, candidates = index.search(np.ascontiguousarray(queries, dtype=np.float32), proposed)
    return _ranked(candidates, features, queries, k)


def _ranked(
    candidates: np.ndarray, features: np.ndarray, queries: np.ndarray, k: int
) -> list[NearestRows]:
    """The k nearest among the candidate rows (Q, C) of each query, by their exact similarities."""
    results = []
    for query, rows in zip(queries, candidates, strict=True):
        found_rows = np.sort(rows[rows >= 0])  # FAISS fills up with -1
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
    """Find what `search` finds in a flat index, without one: a block of features at a time.

    Args:
        queries: (Q, D), normalised.
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
    """Measure how much of the exact answer an index finds: of the 10 nearest of 200 queries between two vectors."""
    rng = np.random.default_rng(0)
    first = normalised(features[rng.integers(len(features), size=REPORT_QUERIES)])
    second = normalised(features[rng.integers(len(features), size=REPORT_QUERIES)])
    queries = normalised(first + second)
    exact = exact_search(features, queries, k=REPORT_K)
    found = search(index, features, queries, k=REPORT_K)
    return {"queries": REPORT_QUERIES, "k": REPORT_K, "recall": recall(found, exact)}


def recall(found: Sequence[NearestRows], exact: Sequence[NearestRows]) -> float:
    """The share of exact answers that are among those found."""
    shares = []
    for nearest, best_nearest in zip(found, exact, strict=True):
        rows = {row for row, _ in nearest}
        best_rows = {row for row, _ in best_nearest}
        shares.append(len(rows & best_rows) / len(best_rows))
    return float(np.mean(shares))


def write(index: Any, file: Path) -> None:
    """Write an index, whole or not at all. FAISS's own writing passes over a disk that is full at the last bytes."""
    faiss = import_faiss()
    try:
        with written_whole(file) as stream:
            faiss.write_index(index, faiss.PyCallbackIOWriter(stream.write))
    except RuntimeError as error:  # what some versions of FAISS make of an OSError
        raise DiskError(f"could not write {file} ({first_line(error)[:80]}): free space") from None


def read(file: Path, *, to_grow: bool = False) -> Any:
    """Read an index. Its vectors stay on the disk until they are looked at, where FAISS can do that.

    Args:
        to_grow: whether vectors will be added, which then are in memory.

    Raises:
        UserError: it is damaged.
    """
    faiss = import_faiss()
    # A memory map, which FAISS has since 1.11.
    how = 0 if to_grow else getattr(faiss, "IO_FLAG_MMAP_IFC", 0)
    with readable(file):
        return faiss.read_index(str(file), how)


@contextlib.contextmanager
def readable(file: Path) -> Iterator[None]:
    """Raise what FAISS says of a damaged file as a UserError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        raise UserError(
            f"{file} is not a readable FAISS index ({first_line(error)[:80]}): build it again"
        ) from None
