"""Inspect image files in parallel: the problems of each file, and which files are copies of each other."""

import contextlib
import functools
import hashlib
import io
import multiprocessing
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from benchmarks.base import Benchmark
from benchmarks.dataset_report import (
    DEEP,
    MISSING,
    TRANSPARENT,
    TURNED,
    Inspection,
    Report,
    needed_images,
    read_parts,
    remark_on_annotations,
    remark_on_images,
)
from runtime import interruption
from runtime.image_files import (
    DECODING_ERRORS,
    LONGEST_SIDE,
    SHRINK,
    decoded,
    has_more_bits,
    is_transparent,
)
from runtime.image_source import IMAGES
from runtime.progress import Counter

ALL_SPLITS = ("train", "val", "test")
EMPTY = "empty"
NO_IMAGE = "not an image"
DAMAGED = "truncated or damaged"
PILLOWS_MOST = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # Pillow refuses images with more pixels
TOO_LARGE = (
    f"too large (above {LONGEST_SIDE:,} pixels per side, or {PILLOWS_MOST:,} pixels: {SHRINK})"
)
ORIENTATION = 0x0112  # number of the EXIF tag
PLAIN_MODES = ("L", "LA", "RGB", "RGBA")


def inspect(path: Path) -> Inspection:
    """Read and decode an image file as training and evaluation do."""
    if IMAGES.size(path) is None:
        return Inspection(MISSING, "")
    try:
        with IMAGES.open(path) as stream:
            content = stream.read()
    except OSError:
        return Inspection(DAMAGED, "")
    if not content:
        return Inspection(EMPTY, "")
    digest = hashlib.sha256(content).hexdigest()
    try:
        return Inspection("", digest, _traits(content))
    except UnidentifiedImageError:
        return Inspection(NO_IMAGE, digest)
    except Image.DecompressionBombError:
        return Inspection(TOO_LARGE, digest)
    except (OSError, ValueError, MemoryError):
        return Inspection(DAMAGED, digest)


def _traits(content: bytes) -> list[str]:
    """Return the traits of an image that can be converted to RGB; raise the errors of `runtime.image_files.decoded`."""
    traits = []
    with warnings.catch_warnings():
        # Ignore warnings about odd metadata, which decoding does not read.
        warnings.simplefilter("ignore")
        image = decoded(io.BytesIO(content))
        image.convert("RGB")
        with contextlib.suppress(*DECODING_ERRORS):
            if image.getexif().get(ORIENTATION, 1) != 1:
                traits.append(TURNED)
    if is_transparent(image):
        traits.append(TRANSPARENT)
    if has_more_bits(image):
        traits.append(DEEP)
    elif image.mode not in PLAIN_MODES:
        traits.append(f"the mode {image.mode}")
    return traits


def inspect_all(paths: list[Path], workers: int) -> dict[Path, Inspection]:
    """Inspect files, and show the progress.

    Args:
        workers: number of processes, 0 to use this process.
    """
    inspections = {}
    mapped: Callable[..., Iterator[Inspection]] = map
    with contextlib.ExitStack() as stack:
        if workers:
            context = multiprocessing.get_context(interruption.START_METHOD)
            pool = ProcessPoolExecutor(workers, context, initializer=interruption.heed_parent_alone)
            mapped = functools.partial(stack.enter_context(pool).map, chunksize=32)
        counter = stack.enter_context(Counter(len(paths), "decoding images"))
        for path, inspection in zip(paths, mapped(inspect, paths), strict=True):
            inspections[path] = inspection
            counter.update()
    return inspections


def check(
    benchmark: Benchmark, splits: Sequence[str] | None, *, official: bool, workers: int
) -> Report:
    """Check everything about a copy of a benchmark.

    Args:
        splits: the splits to check, of ALL_SPLITS; None for all existing splits.
        official: whether to compare counts with the official files.

    Raises:
        UserError: the benchmark has no such split.
    """
    report = Report(benchmark.name)
    chosen = [split for split in ALL_SPLITS if split in (splits or benchmark.splits)]
    wanted = [benchmark.split_called(split) for split in chosen]
    parts = read_parts(
        benchmark, wanted, official=official, asked_for=splits is not None, report=report
    )
    remark_on_annotations(benchmark, parts, report)
    paths: list[Path] = []
    for (_, split), records in parts.items():
        paths += needed_images(benchmark, split, records).values()
    inspections = inspect_all(list(dict.fromkeys(paths)), workers)
    remark_on_images(benchmark, parts, inspections, report)
    return report
