"""Draw a composed image retrieval benchmark in the layouts of every benchmark and of your own triplets, by seed.

    PYTHONPATH=src python tests/shapes_dataset.py --output-dir drawn

An image is a shape on a background; a caption edits its shape, colours or size, absolutely ("is red") or relative to
the reference ("swap the two colors"). The answers of CIRR's test1 split go to `test1_answers.json` beside the data,
those of the other test splits to `circo_test_answers.json` and `triplets_test_answers.json`.
"""

import argparse
import json
import logging
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from cli.options import add_seed
from cli.parsers import ScriptParser
from settings.flag_types import positive_int, usable_path
from utils import command

logger = logging.getLogger(__name__)

COLORS = {
    "red": (215, 40, 40),
    "orange": (245, 145, 30),
    "yellow": (245, 225, 60),
    "green": (50, 165, 70),
    "teal": (60, 205, 205),
    "blue": (45, 70, 200),
    "purple": (135, 50, 160),
    "pink": (245, 150, 195),
}
RAINBOW = list(COLORS)
FIGURE_SIZES = ("small", "medium", "large")
# As a share of the image's shorter side.
RADIUS_OF_SIZE = {"small": 0.16, "medium": 0.26, "large": 0.4}
SHAPES = ("circle", "square", "triangle", "star", "cross", "bar")
ATTRIBUTES = ("shape", "color", "background", "size")
IMAGE_SIDE = (36, 72)  # pixels, the least and the most
RADIUS_JITTER = (0.93, 1.07)
POSITION_JITTER = 0.12  # of a side, at most
JPEG_QUALITY = 92

CATEGORIES = ("dress", "toptee", "shirt")
# Split -> how the names of its images begin.
CIRR_PREFIXES = {"train": "train", "val": "dev", "test1": "test1"}
GROUP_SIZE = 6
MOST_TARGETS = 5  # of a query of CIRCO
DISTRACTORS = 14  # of a query of GeneCIS
# What CIRCO calls a query that asks for another value of an attribute.
ASPECTS = {
    "shape": "compare_change",
    "color": "direct_addressing",
    "background": "spatial_relations_background",
    "size": "comparative_statement",
}


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What an image shows; images of one scene differ in position, proportions and size in pixels."""

    shape: str
    color: str
    background: str
    size: str


@dataclass(frozen=True)
class Edit:
    """A change of one or two attributes, and the ways to say it."""

    attributes: frozenset[str]
    phrasings: tuple[str, ...]
    apply: Callable[[Scene], Scene]


def random_scene(rng: random.Random) -> Scene:
    """Any shape, two different colours, any size."""
    color, background = rng.sample(RAINBOW, 2)
    shape = rng.choice(SHAPES)
    size = rng.choice(FIGURE_SIZES)
    return Scene(shape=shape, color=color, background=background, size=size)


def absolute_edit(scene: Scene, attribute: str) -> Edit:
    """The edit that gives any scene this scene's value of an attribute."""
    value = getattr(scene, attribute)
    phrasings = {
        "shape": (f"is a {value}", f"shows a {value} instead", f"change the shape to a {value}"),
        "color": (f"is {value}", f"change the color to {value}", f"the shape is {value}"),
        "background": (f"has a {value} background", f"is on {value}", f"the background is {value}"),
        "size": (f"is {value} in size", f"make it {value}", f"the shape is {value}"),
    }
    return Edit(
        frozenset([attribute]), phrasings[attribute], lambda s: replace(s, **{attribute: value})
    )


def swap_edit() -> Edit:
    """Exchange the colours of shape and background."""
    phrasings = (
        "swap the two colors",
        "has its colors exchanged",
        "the colors are the other way round",
    )
    attributes = frozenset(["color", "background"])
    return Edit(attributes, phrasings, lambda s: replace(s, color=s.background, background=s.color))


def rainbow_edit() -> Edit:
    """The shape takes the next colour of the rainbow."""
    phrasings = (
        "has the next color of the rainbow",
        "move one color further",
        "take the color that comes next",
    )
    return Edit(frozenset(["color"]), phrasings, lambda s: replace(s, color=_next_color(s)))


def _next_color(scene: Scene) -> str:
    return RAINBOW[(RAINBOW.index(scene.color) + 1) % len(RAINBOW)]


def size_edit(step: int) -> Edit:
    """One size larger (step 1) or smaller (step -1)."""
    word = "larger" if step > 0 else "smaller"
    phrasings = (f"is one size {word}", f"make it {word}", f"the same but {word}")
    return Edit(frozenset(["size"]), phrasings, lambda s: replace(s, size=_next_size(s, step)))


def _next_size(scene: Scene, step: int) -> str:
    return FIGURE_SIZES[FIGURE_SIZES.index(scene.size) + step]


def possible_edits(scene: Scene, rng: random.Random) -> list[Edit]:
    """One absolute edit of each attribute, and the relative edits that a scene allows."""
    edits = [absolute_edit(random_scene(rng), attribute) for attribute in ATTRIBUTES]
    # The swap comes twice, which makes it as likely as the absolute edits of its two attributes.
    edits += [swap_edit(), swap_edit()]
    if _next_color(scene) != scene.background:
        edits.append(rainbow_edit())
    if scene.size != "large":
        edits.append(size_edit(1))
    if scene.size != "small":
        edits.append(size_edit(-1))
    return edits


def random_change(scene: Scene, rng: random.Random) -> tuple[Scene, list[Edit]]:
    """A scene that one or two edits of different attributes lead to, and the edits.

    Each edit changes its attributes, and the two colours stay different.
    """
    while True:
        possible = possible_edits(scene, rng)
        edits = rng.sample(possible, rng.choice((1, 1, 2)))  # one edit is twice as likely as two
        attributes: list[str] = []
        for edit in edits:
            attributes += edit.attributes
        if len(set(attributes)) < len(attributes):
            continue
        target = scene
        for edit in edits:
            target = edit.apply(target)
        if target.color == target.background:
            continue
        if set(attributes) <= set(differing_attributes(scene, target)):
            return target, edits


def differing_attributes(scene: Scene, other: Scene) -> list[str]:
    """The attributes that two scenes differ in."""
    return [name for name in ATTRIBUTES if getattr(scene, name) != getattr(other, name)]


def caption(edits: list[Edit], rng: random.Random) -> str:
    """The edits in random phrasings and order."""
    return " and ".join(rng.choice(edit.phrasings) for edit in rng.sample(edits, len(edits)))


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """An image of a scene, 36 to 72 pixels a side, the shape at a random place."""
    width = rng.randint(*IMAGE_SIDE)
    height = rng.randint(*IMAGE_SIDE)
    radius = min(width, height) * RADIUS_OF_SIZE[scene.size] * rng.uniform(*RADIUS_JITTER)
    x = _random_centre(width, radius, rng)
    y = _random_centre(height, radius, rng)
    image = Image.new("RGB", (width, height), COLORS[scene.background])
    pen = ImageDraw.Draw(image)
    if scene.shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), COLORS[scene.color])
    else:
        corners = [(x + radius * dx, y + radius * dy) for dx, dy in outline(scene.shape)]
        pen.polygon(corners, COLORS[scene.color])
    return image


def _random_centre(side: int, radius: float, rng: random.Random) -> float:
    """Where a shape's centre lies along a side: near its middle, so that the shape stays inside."""
    return side / 2 + rng.uniform(-1, 1) * min(side * POSITION_JITTER, side / 2 - radius)


def outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape within the unit square around the origin, y downwards."""
    if shape == "star":
        return _star()
    arm = 0.33  # half the width of a cross's arms
    corners: dict[str, list[tuple[float, float]]] = {
        "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
        "triangle": [(0, -1), (1, 0.9), (-1, 0.9)],
        "bar": [(-1, -0.4), (1, -0.4), (1, 0.4), (-1, 0.4)],
        "cross": [
            (-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm),
            (arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm),
        ],
    }  # fmt: skip
    return corners[shape]


def _star() -> list[tuple[float, float]]:
    """Five points on the unit circle, with the dents between them nearer to the middle."""
    corners = []
    for number in range(10):
        angle = number * math.pi / 5
        distance = 1.0 if number % 2 == 0 else 0.45
        corners.append((distance * math.sin(angle), -distance * math.cos(angle)))
    return corners


def _save_image(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=JPEG_QUALITY)


def _write_text(path: Path, text: str) -> None:
    """Write a file without a sync to the disk, which would take longer than all drawing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _write_json(path: Path, content: object) -> None:
    _write_text(path, json.dumps(content, indent=1))


def draw_fashioniq(root: Path, triplets: dict[str, int], seed: int) -> None:
    """Write `fashionIQ_dataset/`: three categories, two captions a triplet, two images a triplet.

    Args:
        triplets: split -> triplets in each category.
    """
    folder = root / "fashionIQ_dataset"
    number = 0  # of the next image
    for category in CATEGORIES:
        for split, count in triplets.items():
            rng = random.Random(f"{seed} {category} {split}")
            names: list[str] = []
            entries = []
            for _ in range(count):
                candidate = f"S{number:06d}"
                target = f"S{number + 1:06d}"
                number += 2
                names += [candidate, target]
                captions = _draw_triplet(folder / "images", candidate, target, rng)
                entry: dict[str, Any] = {"candidate": candidate, "captions": captions}
                if split != "test":
                    entry = {"target": target, **entry}
                entries.append(entry)
            _write_json(folder / "image_splits" / f"split.{category}.{split}.json", names)
            _write_json(folder / "captions" / f"cap.{category}.{split}.json", entries)


def _draw_triplet(folder: Path, candidate: str, target: str, rng: random.Random) -> list[str]:
    """Draw a triplet's two images; returns its two captions."""
    scene = random_scene(rng)
    changed, edits = random_change(scene, rng)
    _save_image(folder / f"{candidate}.jpg", draw(scene, rng))
    _save_image(folder / f"{target}.jpg", draw(changed, rng))
    return [caption(edits, rng), caption(edits, rng)]


@dataclass(frozen=True)
class GroupQuery:
    """A query inside a group of CIRR; reference and target are places in the group."""

    reference: int
    target: int
    edits: list[Edit]


def make_group(rng: random.Random) -> tuple[list[Scene], list[GroupQuery]]:
    """Six different scenes, the first and five changes of it, and the queries to and from each change."""
    first = random_scene(rng)
    scenes = [first]
    queries = []
    while len(scenes) < GROUP_SIZE:
        changed, edits = random_change(first, rng)
        if changed in scenes:
            continue
        place = len(scenes)
        scenes.append(changed)
        queries.append(GroupQuery(0, place, edits))
        edits_back = [absolute_edit(first, name) for name in differing_attributes(first, changed)]
        queries.append(GroupQuery(place, 0, edits_back))
    return scenes, queries


def draw_cirr(root: Path, groups: dict[str, int], seed: int) -> None:
    """Write `cirr_dataset/`: groups of six similar images, ten queries a group; test1's targets apart from the rest.

    Args:
        groups: split -> number of groups.
    """
    folder = root / "cirr_dataset"
    pair_id = 0  # of the next query
    answers = {}
    for split, count in groups.items():
        rng = random.Random(f"{seed} {split}")
        paths: dict[str, str] = {}
        entries = []
        for group in range(count):
            scenes, queries = make_group(rng)
            members = [
                f"{CIRR_PREFIXES[split]}-{group}-0-img{place}" for place in range(GROUP_SIZE)
            ]
            image_folder = (
                f"./train/{group % 10}" if split == "train" else f"./{CIRR_PREFIXES[split]}"
            )
            for name, scene in zip(members, scenes, strict=True):
                paths[name] = f"{image_folder}/{name}.png"
                _save_image(folder / paths[name], draw(scene, rng))
            for query in rng.sample(queries, len(queries)):
                secret = split == "test1"
                entries.append(
                    _cirr_entry(pair_id, group, members, query=query, secret=secret, rng=rng)
                )
                if secret:
                    answers[str(pair_id)] = members[query.target]
                pair_id += 1
        _write_json(folder / "cirr" / "image_splits" / f"split.rc2.{split}.json", paths)
        _write_json(folder / "cirr" / "captions" / f"cap.rc2.{split}.json", entries)
    _write_json(root / "test1_answers.json", answers)


def _cirr_entry(
    pair_id: int,
    group: int,
    members: list[str],
    *,
    query: GroupQuery,
    secret: bool,
    rng: random.Random,
) -> dict[str, Any]:
    """A query as CIRR's annotations have it, without its target where that is secret."""
    target = members[query.target]
    image_set = {
        "id": group,
        "members": rng.sample(members, len(members)),
        "reference_rank": query.reference,
        "target_rank": query.target,
    }
    entry: dict[str, Any] = {
        "pairid": pair_id,
        "reference": members[query.reference],
        "caption": caption(query.edits, rng),
    }
    if not secret:
        entry["target_hard"] = target
        entry["target_soft"] = {target: 1.0}
    entry["img_set"] = image_set
    return entry


def draw_circo(root: Path, queries: dict[str, int], seed: int) -> None:
    """Write `circo_dataset/`: queries with one to five targets in one gallery; the test split's targets apart.

    Args:
        queries: split -> number of queries.
    """
    folder = root / "circo_dataset"
    images: list[dict[str, Any]] = []
    answers = {}
    for split, count in queries.items():
        rng = random.Random(f"{seed} circo {split}")
        entries = []
        for number in range(count):
            entry = _draw_circo_query(folder / "COCO2017_unlabeled/unlabeled2017", images, rng)
            entry["id"] = number
            if split == "test":
                answers[str(number)] = entry.pop("gt_img_ids")
                del entry["target_img_id"], entry["semantic_aspects"]
            entries.append(entry)
        _write_json(folder / "annotations" / f"{split}.json", entries)
    listed = folder / "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json"
    _write_json(listed, {"images": images})
    _write_json(root / "circo_test_answers.json", answers)


def _draw_circo_query(
    folder: Path, images: list[dict[str, Any]], rng: random.Random
) -> dict[str, Any]:
    """Draw a query's images, add them to the list of all, and return its entry, but for the id."""
    scene = random_scene(rng)
    changed, edits = random_change(scene, rng)
    scenes = [scene] + [changed] * rng.randint(1, MOST_TARGETS)
    first = 7 + 4 * len(images)  # no number is that of a place
    ids = [first + 4 * place for place in range(len(scenes))]
    for image_id, shown in zip(ids, scenes, strict=True):
        name = f"{image_id:012d}.jpg"
        images.append({"id": image_id, "file_name": name})
        _save_image(folder / name, draw(shown, rng))
    aspects = [ASPECTS[name] for name in differing_attributes(scene, changed)]
    if len(edits) > 1:
        aspects.append("statement_with_conjunction")
    return {
        "reference_img_id": ids[0],
        "target_img_id": ids[1],
        "relative_caption": caption(edits, rng),
        "shared_concept": shared_concept(scene, changed),
        "gt_img_ids": ids[1:],
        "semantic_aspects": aspects,
    }


def shared_concept(scene: Scene, other: Scene) -> str:
    """What two scenes have in common, in words."""
    differing = differing_attributes(scene, other)
    words = [getattr(scene, name) for name in ("size", "color") if name not in differing]
    words.append("shape" if "shape" in differing else scene.shape)
    background = "" if "background" in differing else f" on {scene.background}"
    return f"a {' '.join(words)}{background}"


def draw_triplets(root: Path, groups: int, seed: int) -> None:
    """Write `triplets_dataset/`: groups as those of CIRR, with two captions and one or two targets a query.

    Args:
        groups: of each split; the targets of test go to a file apart from the rest.
    """
    folder = root / "triplets_dataset"
    answers = {}
    for split in ("train", "val", "test"):
        rng = random.Random(f"{seed} triplets {split}")
        gallery: list[str] = []
        lines: list[str] = []
        for group in range(groups):
            scenes, queries = make_group(rng)
            members = [f"{split}/{group}-{place}.jpg" for place in range(GROUP_SIZE)]
            copies = [f"{split}/{group}-{place}-again.jpg" for place in range(GROUP_SIZE)]
            gallery += members + copies
            for name, scene in zip([*members, *copies], [*scenes, *scenes], strict=True):
                _save_image(folder / "images" / name, draw(scene, rng))
            for query in queries:
                targets = [members[query.target], copies[query.target]][: rng.randint(1, 2)]
                line = {
                    "id": len(lines),
                    "reference": members[query.reference],
                    "caption": [caption(query.edits, rng), caption(query.edits, rng)],
                    "target": targets,
                    "group": members,
                }
                if split == "test":
                    answers[line["id"]] = line.pop("target")
                lines.append(json.dumps(line))
        _write_text(folder / f"{split}.jsonl", "\n".join(lines) + "\n")
        _write_text(folder / f"gallery.{split}.txt", "\n".join(gallery) + "\n")
    _write_json(root / "triplets_test_answers.json", answers)


def draw_lasco(root: Path, groups: int, seed: int) -> None:
    """Write `lasco_dataset/`: groups as those of CIRR; half of the validation's references are in no gallery.

    Args:
        groups: of each split.
    """
    folder = root / "lasco_dataset"
    for split in ("train", "val"):
        rng = random.Random(f"{seed} lasco {split}")
        corpus: list[dict[str, Any]] = []
        entries = []
        for group in range(groups):
            scenes, queries = make_group(rng)
            images = []
            for place, scene in enumerate([*scenes, scenes[0]]):  # the last is asked with alone
                number = 10 * group + place
                images.append([number, f"{split}2014/COCO_{split}2014_{number:012d}.jpg"])
                _save_image(folder / images[-1][1], draw(scene, rng))
            corpus += [{"id": number, "path": f"val/{path}"} for number, path in images[:-1]]
            for query in queries:
                reference = query.reference if split == "train" else query.reference or -1
                entry = {
                    "qid": group,
                    "query-image": images[reference],
                    "query-text": caption(query.edits, rng),
                    "target-image": images[query.target],
                }
                entries.append(entry)
        _write_json(folder / f"lasco_{split}.json", entries)
        if split == "val":
            _write_json(folder / "lasco_val_corpus.json", corpus)


def draw_genecis(root: Path, groups: int, seed: int) -> None:
    """Write `genecis_dataset/`: two tasks on one set of images, a gallery of 15 images for each query.

    Args:
        groups: as those of CIRR; three at least are drawn, which have images for a gallery.
    """
    groups = max(3, groups)
    folder = root / "genecis_dataset"
    rng = random.Random(f"{seed} genecis")
    asked = []
    for group in range(groups):
        scenes, queries = make_group(rng)
        numbers = [7 + 4 * (GROUP_SIZE * group + place) for place in range(GROUP_SIZE)]
        for number, scene in zip(numbers, scenes, strict=True):
            _save_image(folder / "val2017" / f"{number:012d}.jpg", draw(scene, rng))
        asked += [(numbers, query) for query in queries]
    everything = sorted({number for numbers, _ in asked for number in numbers})
    for task in ("change_object", "focus_object"):
        entries = []
        for numbers, query in asked:
            pair = [numbers[query.reference], numbers[query.target]]
            others = [number for number in everything if number not in pair]
            reference, target, *gallery = [
                {"val_image_id": number} for number in pair + rng.sample(others, DISTRACTORS)
            ]
            entry = {"reference": reference, "target": target, "gallery": gallery}
            entries.append({**entry, "condition": caption(query.edits, rng)})
        _write_json(folder / f"{task}.json", entries)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags of the drawing."""
    parser = ScriptParser(__doc__)
    parser.add_argument(
        "--output-dir", type=usable_path, required=True, metavar="DIR", help="the data root to be"
    )
    add_seed(parser, help="of all that is drawn")
    parser.add_argument(
        "--train-triplets", type=positive_int, default=1200, help="FashionIQ, a category"
    )
    parser.add_argument(
        "--val-triplets", type=positive_int, default=200, help="FashionIQ, a category"
    )
    parser.add_argument(
        "--train-groups", type=positive_int, default=360, help="CIRR, ten triplets each"
    )
    parser.add_argument(
        "--val-groups", type=positive_int, default=60, help="CIRR val and test1, ten triplets each"
    )
    parser.add_argument(
        "--circo-queries", type=positive_int, default=60, help="CIRCO val and test, each"
    )
    parser.add_argument(
        "--own-groups",
        type=positive_int,
        default=12,
        help="Triplets, LaSCo and GeneCIS, ten queries each, a split; three or more",
    )
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    """Draw the benchmarks, and write two tiny CLIPs with random weights."""
    args = parse(argv)
    triplets = {"train": args.train_triplets, "val": args.val_triplets, "test": args.val_triplets}
    draw_fashioniq(args.output_dir, triplets, args.seed)
    groups = {"train": args.train_groups, "val": args.val_groups, "test1": args.val_groups}
    draw_cirr(args.output_dir, groups, args.seed)
    queries = {"val": args.circo_queries, "test": args.circo_queries}
    draw_circo(args.output_dir, queries, args.seed)
    draw_triplets(args.output_dir, args.own_groups, args.seed)
    draw_lasco(args.output_dir, args.own_groups, args.seed)
    draw_genecis(args.output_dir, args.own_groups, args.seed)

    from models.clip_model import write_tiny_clip

    for kind in ("vit", "resnet"):
        write_tiny_clip(args.output_dir / f"tiny_clip_{kind}.pt", kind, args.seed)
    contents = "six benchmarks, answers of three test splits, two tiny CLIPs"
    logger.info("drawn in %s: %s", args.output_dir, contents)


if __name__ == "__main__":
    main()
