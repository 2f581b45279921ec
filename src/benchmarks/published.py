"""Annotation files as others publish them, read as your own triplets: what src/convert.py writes."""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.annotations import Entry, check, read
from benchmarks.base import Benchmark
from benchmarks.cirr import CIRR
from benchmarks.fashioniq import FashionIQ
from benchmarks.splits import Triplet
from benchmarks.triplets import image_list

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A split as your own triplets have it.

    Attributes:
        lines: the queries.
        gallery: paths of images below the folder that was read; empty where there is no list but the queries.
    """

    lines: list[dict[str, Any]]
    gallery: list[str]


def of_benchmark(kind: type[Benchmark], folder: Path) -> dict[str, Converted]:
    """The splits of a benchmark that are there; where it has several galleries, they become one.

    The captions are its texts of training, of which the first is that of an evaluation.

    Args:
        folder: its own, below a data root.
    """
    benchmark = kind(folder.parent)
    splits = {}
    for split, called in benchmark.splits.items():
        if not any(benchmark.files(part, called)[0].exists() for part in benchmark.parts):
            continue
        lines: list[dict[str, Any]] = []
        places: dict[str, str] = {}
        for part in benchmark.read(called):
            for name, path in part.image_paths.items():
                # One of two galleries may lie in each of two folders.
                places.setdefault(name, path.relative_to(folder).as_posix())
            for triplet in part.triplets:
                texts = benchmark.caption_variants(triplet.captions)
                lines.append(_line(triplet, texts, places))
        splits[split] = Converted(lines=lines, gallery=list(places.values()))
    return splits


def _line(triplet: Triplet, texts: Sequence[str], places: dict[str, str]) -> dict[str, Any]:
    """A query without what it lacks.

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


def lasco(folder: Path) -> dict[str, Converted]:
    """LaSCo (Levy et al., AAAI 2024), as in github.com/levymsn/LaSCo: images of COCO 2014.

    Its "qid" is that of a question of VQA, which may have several queries, and so is no id.
    """
    splits = {}
    for split in ("train", "val"):
        file = folder / f"lasco_{split}.json"
        if not file.exists():
            continue
        lines = []
        for number, content in enumerate(read(file, list)):
            entry = Entry(content, file, f"entry {number}")
            line = {
                "reference": _path_of_lasco(entry, "query-image"),
                "caption": entry.text("query-text"),
                "target": _path_of_lasco(entry, "target-image"),
            }
            lines.append(line)
        gallery = _corpus_of_lasco(folder / "lasco_val_corpus.json") if split == "val" else []
        splits[split] = Converted(lines=lines, gallery=gallery)
    return splits


def _path_of_lasco(entry: Entry, key: str) -> str:
    """The path of an image that is given by its id and path."""
    image = entry.list(key)
    entry.check(len(image) == 2 and isinstance(image[1], str), f'an id and a path in "{key}"')
    return image[1]


def _corpus_of_lasco(file: Path) -> list[str]:
    """The gallery. Its paths begin with the split, those of the queries do not."""
    paths = []
    for number, content in enumerate(read(file, list)):
        paths.append(Entry(content, file, f"entry {number}").text("path").removeprefix("val/"))
    return paths


def shoes(folder: Path) -> dict[str, Converted]:
    """Shoes (Guo et al., NeurIPS 2018), as in github.com/XiaoxiaoGuo/fashion-retrieval: images in womens_*/."""
    places = {}
    for path in sorted(folder.glob("womens_*/**/*.jpg")):
        places[path.name] = path.relative_to(folder).as_posix()
    lists = {"train": folder / "train_im_names.txt", "val": folder / "eval_im_names.txt"}
    splits = {}
    split_of = {}
    for split, file in lists.items():
        names = image_list(file)
        check(set(names) <= places.keys(), file, "names of images that are in womens_*/")
        splits[split] = Converted(lines=[], gallery=[places[name] for name in names])
        split_of.update(dict.fromkeys(names, split))
    file = folder / "relative_captions_shoes.json"
    for number, content in enumerate(read(file, list)):
        entry = Entry(content, file, f"entry {number}")
        reference = entry.text("ReferenceImageName")
        target = entry.text("ImageName")
        are_known = reference in split_of and target in places
        entry.check(
            are_known, f"images of womens_*/ and of {' or '.join(map(str, lists.values()))}"
        )
        line = {
            "reference": places[reference],
            "caption": entry.text("RelativeCaption"),
            "target": places[target],
        }
        splits[split_of[reference]].lines.append(line)
    return splits


# Name -> the folder below a data root, and what reads it.
Source = tuple[str, Callable[[Path], dict[str, Converted]]]
SOURCES: dict[str, Source] = {
    "FashionIQ": ("fashionIQ_dataset", functools.partial(of_benchmark, FashionIQ)),
    "CIRR": ("cirr_dataset", functools.partial(of_benchmark, CIRR)),
    "LaSCo": ("lasco_dataset", lasco),
    "Shoes": ("shoes_dataset", shoes),
}


def usable(split: str, converted: Converted) -> Converted:
    """A split without queries that say nothing, and with all images of the others in its gallery; says what it does."""
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
                "warning: %s: %d images of queries are added to the gallery, whose list lacks them",
                split,
                len(added),
            )
    return Converted(lines=lines, gallery=list(gallery))


def _all(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value
