"""Measure memory and time of indexes in files: write and update a million images, search ten million vectors.

Images are tiny text files, since an update reads their bytes but decodes none; features are synthetic. Each measurement
runs in a forked process, and its memory is the total of that process, mapped files included.
"""

import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from image_search import faiss_index, list_file
from image_search.image_index import Update, update_index
from image_search.photos import find_images
from image_search.stores.base import Keeping
from image_search.stores.faiss import FaissImages
from timing import GIB, Row, Setting
from vector_search import DIM, INTRINSIC

COUNT = 1_000_000
MORE = 10_000  # images that are added later
LARGEST = 10_000_000
QUERIES = 30
FORK = multiprocessing.get_context("fork")
SURFACE = np.random.default_rng(0).standard_normal((INTRINSIC, DIM), dtype=np.float32)


class DrawnEncoder:
    """Stand-in for the encoder of an update. Its features are random points near a surface of few dimensions."""

    backbone = SimpleNamespace(dim=DIM)
    precision = "fp32"
    reported_preprocessing = {
        "transform": "targetpad",
        "target_ratio": 1.25,
        "resolution": 224,
        "background": "white",
    }

    def describe(self) -> dict[str, str]:
        """Return a description with a digest that no weights have."""
        return {"weights": "0" * 64}

    def between(self) -> None:
        """Do nothing, since nothing interrupts the encoding."""

    def readable_images(self, shards: list[list[Path]]) -> Iterator[tuple[torch.Tensor, list[str]]]:
        """Yield the features of each shard, and an empty reason for each file, as all files are readable."""
        rng = np.random.default_rng(len(shards))
        for shard in shards:
            places = rng.standard_normal((len(shard), INTRINSIC), dtype=np.float32)
            noise = 0.3 * rng.standard_normal((len(shard), DIM), dtype=np.float32)
            yield torch.from_numpy(np.tanh(places) @ SURFACE + noise), [""] * len(shard)


def apart(work: Callable[[], Any]) -> tuple[Any, float, float, float]:
    """Run a call in a process of its own; return its result, seconds, CPU-seconds, and peak memory in GiB."""
    ours, theirs = FORK.Pipe(duplex=False)

    def run() -> None:
        start = time.perf_counter()
        made = work()
        taken = time.perf_counter() - start
        used = resource.getrusage(resource.RUSAGE_SELF)
        theirs.send((made, taken, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / GIB))

    process = FORK.Process(target=run)
    process.start()
    theirs.close()
    answer = ours.recv()
    process.join()
    return answer


def touch(folder: Path, numbers: range) -> None:
    """Write small files with different contents, a thousand per folder."""
    for number in numbers:
        file = folder / f"{number // 1000:05}" / f"{number:08}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{number}")


def brought_up_to_date(root: Path, keeping: Keeping) -> Update:
    """Update an index as `search.py index` does, but without loading a model."""
    folders = [root / "images"]
    images = find_images(folders)
    pair = {**DrawnEncoder.reported_preprocessing, "clip_model_name": "drawn"}
    output = root / keeping.kind
    update = update_index(output, images, DrawnEncoder(), keeping=keeping, pair=pair)
    assert update is not None
    return update


def told(update: Update) -> str:
    """Describe the result of an update."""
    return f"{update.counts.added:,} added, {update.counts.kept:,} kept"


def updates(setting: Setting) -> Iterator[Row]:
    """Yield rows for writing and updating indexes of a million images."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        touch(root / "images", range(COUNT))
        for keeping in (Keeping(), Keeping(kind="ivfpq", on_disk=True)):
            what = f"{keeping.kind}{' on disk' if keeping.on_disk else ''}"
            publish = lambda keeping=keeping: told(brought_up_to_date(root, keeping))  # noqa: E731
            yield figure(f"{COUNT:,} images published, D {DIM}, {what}", publish)
            yield figure(f"the same, nothing new, {what}", publish)
        touch(root / "images", range(COUNT, COUNT + MORE))
        yield figure(f"{MORE:,} images more, {what}", publish)


def figure(what: str, work: Callable[[], Any]) -> Row:
    """Measure a call and return its row."""
    made, seconds, processors, peak = apart(work)
    note = f"{processors:.0f} s of processors, {peak:.2f} GiB in all; {made}"
    return {"figure": what, "ours": seconds, "GiB": peak, "note": note}


def on_disk(setting: Setting) -> Iterator[Row]:
    """Yield rows for searching lists in a file. Codes are random, which does not change what a search reads."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in (COUNT, LARGEST):
            apart(lambda count=count: drawn_lists(folder, count))
            timed = lambda count=count: time_queries(folder, count)  # noqa: E731
            row = figure(f"{QUERIES} queries in {count:,} vectors, D {DIM}, ivfpq on disk", timed)
            yield {**row, "must": "at most 4 GiB", "passed": row["GiB"] <= 4}


def drawn_lists(folder: Path, count: int) -> None:
    """Write an index of `count` vectors, all of whose lists are equally long."""
    rng = np.random.default_rng(0)
    faiss = faiss_index.import_faiss()
    full = faiss_index._empty_ivfpq(faiss, count, DIM)
    full.quantizer.add(faiss_index.normalised(rng.standard_normal((full.nlist, DIM))))
    words = rng.standard_normal(full.pq.centroids.size(), dtype=np.float32)
    faiss.copy_array_to_vector(words, full.pq.centroids)
    full.is_trained = True
    sizes = np.diff(np.linspace(0, count, full.nlist + 1).astype(np.int64))
    ids = iter(np.array_split(rng.permutation(count), np.cumsum(sizes)[:-1]))
    with open(folder / "lists.bin", "wb") as file:
        for size in sizes.tolist():
            file.write(rng.bytes(size * full.code_size))
            file.write(next(ids).astype(np.int64).data)
    lists = list_file._on_disk(full, sizes, folder / "lists.bin")
    full.replace_invlists(lists, True)
    lists.this.disown()
    full.ntotal = count
    full.nprobe = max(faiss_index.LEAST_PROBED, round(full.nlist * faiss_index.PROBED_SHARE))
    faiss_index.write(full, folder / "vectors.faiss")


def time_queries(folder: Path, count: int) -> str:
    """Open an index and search it; return the median time per query."""
    rng = np.random.default_rng(1)
    index = FaissImages(
        folder=folder,
        files=[("/drawn.jpg", 0, 0)] * count,
        # All images share one row, which needs no memory.
        features=np.broadcast_to(rng.standard_normal(DIM, dtype=np.float32), (count, DIM)),
        vectors=list_file.read(folder / "vectors.faiss", folder / "lists.bin"),
        about={},
    )
    times = []
    for query in rng.standard_normal((QUERIES, DIM)):
        start = time.perf_counter()
        index.search(faiss_index.normalised(query[None]), 10)
        times.append(time.perf_counter() - start)
    return f"{1000 * statistics.median(times):.0f} ms each"
