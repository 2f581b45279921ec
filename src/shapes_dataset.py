"""Draw a composed image retrieval benchmark in the official layouts of FashionIQ and CIRR, deterministic by seed.

    python src/shapes_dataset.py --output-dir demo/data

An image is a shape on a background; a caption edits its shape, colours or size, absolutely ("is red") or relative to
the reference ("swap the two colors"). The answers of CIRR's test1 split go to `test1_answers.json` beside the data.
"""

import argparse
import json
import logging
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageDraw

from cli.flag_types import positive_int
from cli.options import add_seed
from runtime.files import check_writable, write_text
from utils import UserError, command

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
SIZES = ("small", "medium", "large")
SHAPES = ("circle", "square", "triangle", "star", "cross", "bar")
CATEGORIES = ("dress", "toptee", "shirt")


@dataclass(frozen=True)
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
    return Scene(rng.choice(SHAPES), color, background, rng.choice(SIZES))


def absolute_edit(scene: Scene, attribute: str) -> Edit:
    """The edit that gives any scene this scene's value of an attribute."""
    value = getattr(scene, attribute)
    phrasings = {
        "shape": (f"is a {value}", f"shows a {value} instead", f"change the shape to a {value}"),
        "color": (f"is {value}", f"change the color to {value}", f"the shape is {value}"),
        "background": (f"has a {value} background", f"is on {value}", f"the background is {value}"),
        "size": (f"is {value} in size", f"make it {value}", f"the shape is {value}"),
    }
    return Edit(frozenset([attribute]), phrasings[attribute], lambda s: replace(s, **{attribute: value}))


def swap_edit() -> Edit:
    """Exchange the colours of shape and background."""
    phrasings = ("swap the two colors", "has its colors exchanged", "the colors are the other way round")
    swap = frozenset(["color", "background"])
    return Edit(swap, phrasings, lambda s: replace(s, color=s.background, background=s.color))


def rainbow_edit() -> Edit:
    """The shape takes the next colour of the rainbow."""
    phrasings = ("has the next color of the rainbow", "move one color further", "take the color that comes next")
    return Edit(frozenset(["color"]), phrasings, lambda s: replace(s, color=_next_color(s)))


def _next_color(scene: Scene) -> str:
    return RAINBOW[(RAINBOW.index(scene.color) + 1) % len(RAINBOW)]


def size_edit(step: int) -> Edit:
    """One size larger (step 1) or smaller (step -1)."""
    word = "larger" if step > 0 else "smaller"
    phrasings = (f"is one size {word}", f"make it {word}", f"the same but {word}")
    return Edit(frozenset(["size"]), phrasings, lambda s: replace(s, size=SIZES[SIZES.index(s.size) + step]))


def possible_edits(scene: Scene, rng: random.Random) -> list[Edit]:
    """One absolute edit of each attribute, and the relative edits that a scene allows."""
    attributes = ("shape", "color", "background", "size")
    edits = [absolute_edit(random_scene(rng), attribute) for attribute in attributes]
    edits += [swap_edit(), swap_edit()]  # twice: as likely as the absolute edits of its two attributes
    edits += [rainbow_edit()] if _next_color(scene) != scene.background else []
    edits += [size_edit(1)] if scene.size != "large" else []
    edits += [size_edit(-1)] if scene.size != "small" else []
    return edits


def random_change(scene: Scene, rng: random.Random) -> tuple[Scene, list[Edit]]:
    """A scene that one or two edits of different attributes lead to, with two different colours, and the edits."""
    while True:
        edits = rng.sample(possible_edits(scene, rng), rng.choice((1, 1, 2)))
        attributes = [a for edit in edits for a in edit.attributes]
        if len(set(attributes)) < len(attributes):
            continue
        target = scene
        for edit in edits:
            target = edit.apply(target)
        if target.color != target.background and all(getattr(scene, a) != getattr(target, a) for a in attributes):
            return target, edits


def caption(edits: list[Edit], rng: random.Random) -> str:
    """The edits in random phrasings and order."""
    return " and ".join(rng.choice(edit.phrasings) for edit in rng.sample(edits, len(edits)))


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """An image of a scene, 36 to 72 pixels a side, the shape at a random place."""
    width, height = rng.randint(36, 72), rng.randint(36, 72)
    radius = min(width, height) * {"small": 0.16, "medium": 0.26, "large": 0.4}[scene.size] * rng.uniform(0.93, 1.07)
    x = width / 2 + rng.uniform(-1, 1) * min(width * 0.12, width / 2 - radius)
    y = height / 2 + rng.uniform(-1, 1) * min(height * 0.12, height / 2 - radius)
    image = Image.new("RGB", (width, height), COLORS[scene.background])
    pen = ImageDraw.Draw(image)
    if scene.shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), COLORS[scene.color])
    else:
        pen.polygon([(x + radius * dx, y + radius * dy) for dx, dy in outline(scene.shape)], COLORS[scene.color])
    return image


def outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape within the unit square around the origin, y downwards."""
    if shape == "star":
        turns = [(i * math.pi / 5, 1.0 if i % 2 == 0 else 0.45) for i in range(10)]
        return [(r * math.sin(a), -r * math.cos(a)) for a, r in turns]
    arm = 0.33
    corners: dict[str, list[tuple[float, float]]] = {
        "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
        "triangle": [(0, -1), (1, 0.9), (-1, 0.9)],
        "bar": [(-1, -0.4), (1, -0.4), (1, 0.4), (-1, 0.4)],
        "cross": [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)]
        + [(arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm)],
    }
    return corners[shape]


def _save_image(path: Path, image: Image.Image) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=92)
    except OSError as error:
        raise UserError(f"could not write {path} ({error.strerror}): free space or choose another folder") from None


def _write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=1))


def draw_fashioniq(root: Path, triplets: dict[str, int], seed: int) -> None:
    """Write `fashionIQ_dataset/`: three categories, two captions a triplet, two images a triplet.

    Args:
        triplets: split -> triplets in each category.
    """
    folder = root / "fashionIQ_dataset"
    number = 0
    for category in CATEGORIES:
        for split, count in triplets.items():
            rng = random.Random(f"{seed} {category} {split}")
            names, entries = [], []
            for _ in range(count):
                scene = random_scene(rng)
                target, edits = random_change(scene, rng)
                pair = [f"S{number:06d}", f"S{number + 1:06d}"]
                number += 2
                for name, shown in zip(pair, (scene, target), strict=True):
                    _save_image(folder / "images" / f"{name}.jpg", draw(shown, rng))
                names += pair
                answer = {} if split == "test" else {"target": pair[1]}
                captions = [caption(edits, rng), caption(edits, rng)]
                entries.append(answer | {"candidate": pair[0], "captions": captions})
            _write_json(folder / "image_splits" / f"split.{category}.{split}.json", names)
            _write_json(folder / "captions" / f"cap.{category}.{split}.json", entries)


def draw_group(rng: random.Random) -> tuple[list[Scene], list[tuple[int, int, list[Edit]]]]:
    """Six different scenes, one and five changes of it, and the queries (reference, target, edits) among them."""
    scenes, queries = [random_scene(rng)], []
    while len(scenes) < 6:
        target, edits = random_change(scenes[0], rng)
        if target in scenes:
            continue
        place = len(scenes)
        scenes.append(target)
        queries.append((0, place, edits))
        differing = [a for a in ("shape", "color", "background", "size") if vars(target)[a] != vars(scenes[0])[a]]
        queries.append((place, 0, [absolute_edit(scenes[0], a) for a in differing]))
    return scenes, queries


def draw_cirr(root: Path, groups: dict[str, int], seed: int) -> None:
    """Write `cirr_dataset/`: groups of six similar images, ten queries a group; test1's targets apart from the rest.

    Args:
        groups: split -> number of groups.
    """
    pair_id, answers = 0, {}
    for split, count in groups.items():
        rng = random.Random(f"{seed} {split}")
        prefix = {"train": "train", "val": "dev", "test1": "test1"}[split]
        paths: dict[str, str] = {}
        entries = []
        for group in range(count):
            scenes, queries = draw_group(rng)
            members = [f"{prefix}-{group}-0-img{i}" for i in range(6)]
            folder = f"./train/{group % 10}" if split == "train" else f"./{prefix}"
            paths |= {name: f"{folder}/{name}.png" for name in members}
            for name, scene in zip(members, scenes, strict=True):
                _save_image(root / "cirr_dataset" / paths[name], draw(scene, rng))
            for reference, target, edits in rng.sample(queries, len(queries)):
                places = {"reference_rank": reference, "target_rank": target}
                image_set = {"id": group, "members": rng.sample(members, 6)} | places
                entry = {"pairid": pair_id, "reference": members[reference], "caption": caption(edits, rng)}
                if split == "test1":
                    answers[str(pair_id)] = members[target]
                else:
                    entry |= {"target_hard": members[target], "target_soft": {members[target]: 1.0}}
                entries.append(entry | {"img_set": image_set})
                pair_id += 1
        _write_json(root / "cirr_dataset" / "cirr" / "image_splits" / f"split.rc2.{split}.json", paths)
        _write_json(root / "cirr_dataset" / "cirr" / "captions" / f"cap.rc2.{split}.json", entries)
    _write_json(root / "test1_answers.json", answers)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags of the drawing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="the data root to be")
    add_seed(parser)
    parser.add_argument("--train-triplets", type=positive_int, default=1200, help="FashionIQ, a category")
    parser.add_argument("--val-triplets", type=positive_int, default=200, help="FashionIQ, a category")
    parser.add_argument("--train-groups", type=positive_int, default=360, help="CIRR, ten triplets each")
    parser.add_argument("--val-groups", type=positive_int, default=60, help="CIRR val and test1, ten triplets each")
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    """Draw both benchmarks, and write two tiny CLIPs with random weights."""
    args = parse(argv)
    check_writable({"--output-dir": args.output_dir})
    draw_fashioniq(
        args.output_dir, {"train": args.train_triplets, "val": args.val_triplets, "test": args.val_triplets}, args.seed
    )
    draw_cirr(
        args.output_dir, {"train": args.train_groups, "val": args.val_groups, "test1": args.val_groups}, args.seed
    )

    from models.clip_model import write_tiny_clip

    for kind in ("vit", "resnet"):
        write_tiny_clip(args.output_dir / f"tiny_clip_{kind}.pt", kind, args.seed)
    logger.info("drawn in %s: fashionIQ_dataset/, cirr_dataset/, test1_answers.json, two tiny CLIPs", args.output_dir)


if __name__ == "__main__":
    main()
