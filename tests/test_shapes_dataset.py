"""The drawn benchmark: the official layouts, determinism, and captions that say what changed."""

import hashlib
import json
import random

from PIL import Image

import shapes_dataset
from shapes_dataset import (
    RAINBOW,
    Scene,
    absolute_edit,
    draw,
    rainbow_edit,
    random_change,
    size_edit,
    swap_edit,
)


def digests(folder) -> dict[str, str]:
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix in (".json", ".jsonl", ".txt", ".jpg", ".png")
    )
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def test_one_seed_draws_the_same_files(drawn, tmp_path):
    triplets = "--train-triplets 12 --val-triplets 6 --train-groups 4 --val-groups 3"
    sizes = f"{triplets} --own-groups 3 --circo-queries 8".split()
    shapes_dataset.main(["--output-dir", str(tmp_path / "same"), *sizes])
    shapes_dataset.main(["--output-dir", str(tmp_path / "other"), *sizes, "--seed", "1"])
    assert digests(tmp_path / "same") == digests(drawn)
    assert digests(tmp_path / "other") != digests(drawn)


SCENE = Scene(shape="star", color="red", background="blue", size="medium")


def test_edits():
    assert swap_edit().apply(SCENE) == Scene(
        shape="star", color="blue", background="red", size="medium"
    )
    assert size_edit(1).apply(SCENE).size == "large"
    assert size_edit(-1).apply(SCENE).size == "small"
    assert rainbow_edit().apply(SCENE).color == RAINBOW[RAINBOW.index("red") + 1]
    green = absolute_edit(
        Scene(shape="bar", color="green", background="teal", size="small"), "color"
    )
    assert green.apply(SCENE) == Scene(
        shape="star", color="green", background="blue", size="medium"
    )
    assert all("green" in phrasing for phrasing in green.phrasings)


def test_changes_change_just_what_their_edits_name():
    rng = random.Random(0)
    kinds = set()
    for _ in range(500):
        scene = shapes_dataset.random_scene(rng)
        target, edits = random_change(scene, rng)
        named = {a for edit in edits for a in edit.attributes}
        assert {a for a in vars(scene) if getattr(scene, a) != getattr(target, a)} == named
        assert target.color != target.background
        kinds |= {edit.phrasings[0] for edit in edits}
    assert {"swap the two colors", "is one size larger", "is one size smaller", "is red"} <= kinds


def test_images_vary_in_size_and_show_their_colours():
    rng = random.Random(0)
    images = [draw(SCENE, rng) for _ in range(20)]
    assert len({image.size for image in images}) > 10
    for image in images:
        colors = {color for _, color in image.getcolors()}
        assert colors == {shapes_dataset.COLORS["red"], shapes_dataset.COLORS["blue"]}


def test_layouts(drawn):
    captions = json.loads((drawn / "fashionIQ_dataset/captions/cap.dress.train.json").read_text())
    assert len(captions) == 12
    assert set(captions[0]) == {"target", "candidate", "captions"}
    assert (
        "target"
        not in json.loads((drawn / "fashionIQ_dataset/captions/cap.dress.test.json").read_text())[0]
    )
    entries = json.loads((drawn / "cirr_dataset/cirr/captions/cap.rc2.val.json").read_text())
    assert len(entries) == 30
    for entry in entries:
        assert len(set(entry["img_set"]["members"])) == 6
        assert {entry["reference"], entry["target_hard"]} < set(entry["img_set"]["members"])
    secret = json.loads((drawn / "cirr_dataset/cirr/captions/cap.rc2.test1.json").read_text())
    assert not any("target_hard" in entry or "target_soft" in entry for entry in secret)
    answers = json.loads((drawn / "test1_answers.json").read_text())
    assert set(answers) == {str(entry["pairid"]) for entry in secret}
    for path in json.loads(
        (drawn / "cirr_dataset/cirr/image_splits/split.rc2.test1.json").read_text()
    ).values():
        Image.open(drawn / "cirr_dataset" / path).verify()
