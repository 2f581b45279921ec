"""Convert published annotation files to the form of your own triplets, for src/convert.py."""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from benchmarks.base import Benchmark
from benchmarks.cirr import CIRR
from benchmarks.entries import OFFICIAL, Entry
from benchmarks.fashioniq import FashionIQ
from benchmarks.lasco import LaSCo
from benchmarks.splits import Triplet
from benchmarks.triplets import image_list
from runtime.schema import read_checked
from utils import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A split in the form of your own triplets.

    Attributes:
        lines: the queries.
        gallery: paths of images below the folder that was read; empty if only the queries list images.
    """

    lines: list[dict[str, Any]]
    gallery: list[str]


class ShoesQuery(Entry):
    """An entry of `relative_captions_shoes.json`."""

    reference: Annotated[str, Field(alias="ReferenceImageName")]
    target: Annotated[str, Field(alias="ImageName")]
    caption: Annotated[str, Field(alias="RelativeCaption")]


def of_benchmark(kind: type[Benchmark], folder: Path) -> dict[str, Converted]:
    """Convert the existing splits of a benchmark; if it has several galleries, they become one.

    The captions are its training texts; the first one is its text at evaluation.

    Args:
        folder: the benchmark's folder, below a data root.
    """
    benchmark = kind(folder.parent)
    splits = {}
    for split, called in benchmark.splits.items():
        if not any(benchmark.files(part, called)[0].exists() for part in benchmark.parts):
            continue
        lines: list[dict[str, Any]] = []
        places: dict[str, str] = {}
        only_asked: set[str] = set()
        for part in benchmark.read(called):
            for name, path in part.image_paths.items():
                # An image in two galleries may have two files in different folders: use the first one.
                places.setdefault(name, path.relative_to(folder).as_posix())
            only_asked |= part.only_asked
            for triplet in part.triplets:
                texts = benchmark.caption_variants(triplet.captions)
                lines.append(_line(triplet, texts, places))
        gallery = [place for name, place in places.items() if name not in only_asked]
        splits[split] = Converted(lines=lines, gallery=gallery)
    return splits


def _line(triplet: Triplet, texts: Sequence[str], places: dict[str, str]) -> dict[str, Any]:
    """Return a query without empty fields.

    Args:
        places: image name -> its path.
    """
    line = {
        "id": triplet.pair_id,
        "reference": places[triplet.reference],
        "caption": [text for text in texts if text.strip()] or "",
        "target": [places[name] for name in triplet.targets],
        "group": [places[name] for name in triplet.group],
    }
    return {key: value for key, value in line.items() if value not in ([], None)}


def shoes(folder: Path) -> dict[str, Converted]:
    """Convert Shoes (Guo et al., NeurIPS 2018) from github.com/XiaoxiaoGuo/fashion-retrieval, images in womens_*/."""
    places = {}
    for path in sorted(folder.glob("womens_*/**/*.jpg")):
        places[path.name] = path.relative_to(folder).as_posix()
    lists = {"train": folder / "train_im_names.txt", "val": folder / "eval_im_names.txt"}
    splits = {}
    split_of = {}
    for split, file in lists.items():
        names = image_list(file)
        for name in names:
            if name not in places:
                raise UserError(f"{file}: {name} is not in womens_*/: {OFFICIAL}")
        splits[split] = Converted(lines=[], gallery=[places[name] for name in names])
        split_of.update(dict.fromkeys(names, split))
    file = folder / "relative_captions_shoes.json"
    for number, query in enumerate(read_checked(list[ShoesQuery], file, remedy=OFFICIAL)):
        if query.reference not in split_of or query.target not in places:
            listed = " or ".join(map(str, lists.values()))
            raise UserError(
                f"{file}: entry {number}: an image is missing from womens_*/, or from {listed}: {OFFICIAL}"
            )
        line = {
            "reference": places[query.reference],
            "caption": query.caption,
            "target": places[query.target],
        }
        splits[split_of[query.reference]].lines.append(line)
    return splits


# Name -> folder below a data root, and the function that reads it.
PublishedSource = tuple[str, Callable[[Path], dict[str, Converted]]]
SOURCES: dict[str, PublishedSource] = {
    "FashionIQ": ("fashionIQ_dataset", functools.partial(of_benchmark, FashionIQ)),
    "CIRR": ("cirr_dataset", functools.partial(of_benchmark, CIRR)),
    "LaSCo": ("lasco_dataset", functools.partial(of_benchmark, LaSCo)),
    "Shoes": ("shoes_dataset", shoes),
}


def usable(split: str, converted: Converted) -> Converted:
    """Return a split without queries that have no caption, and with the other queries' images in its gallery.

    Both changes are logged.
    """
    lines = [line for line in converted.lines if any(map(str.strip, line["caption"]))]
    if lost := len(converted.lines) - len(lines):
        logger.warning("warning: %s: %d queries without a caption are left out", split, lost)
    gallery = dict.fromkeys(converted.gallery)
    if gallery:
        named: set[str] = set()
        for line in lines:
            named.update([line["reference"], *_all(line.get("target", [])), *line.get("group", [])])
        added = sorted(named - gallery.keys())
        gallery.update(dict.fromkeys(added))
        if added:
            logger.warning(
                "warning: %s: %d query images were missing from the gallery list and have been added to it",
                split,
                len(added),
            )
    return Converted(lines=lines, gallery=list(gallery))


def _all(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value
