"""A copy of a dataset and what is wrong with it; images left out openly; layouts in the wild."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import check_dataset
from benchmarks import BENCHMARKS, CIRR, FashionIQ, Split, Triplet, Triplets
from benchmarks.protocols import ORIGINAL_REMOVED
from conftest import read_csv
from data_utils import load_image, make_preprocess
from evaluation.retrieval import rank
from models.features import FrozenSplit
from runtime.image_files import decoded, read_photo
from test_bad_input import change_json

SUM = ["--combining-function", "sum"]


@pytest.fixture
def check(capsys):
    """Run the check; returns its exit code and what it printed."""

    def check(root: Path, *flags: object) -> tuple[int, str]:
        words = ["--data-root", root, "--unofficial", "--num-workers", 0, *flags]
        capsys.readouterr()
        try:
            check_dataset.main(list(map(str, words)))
        except SystemExit as stop:
            return stop.code, capsys.readouterr().out
        return 0, capsys.readouterr().out

    return check


def checked(check, root: Path, dataset: str, *flags: object) -> dict:
    code, out = check(root, "--dataset", dataset, "--json", *flags)
    (report,) = json.loads(out)
    assert report["exit_code"] == code
    return report


def remarks(report: dict, level: str) -> list[str]:
    return [f"{r['where']}: {r['text']}" for r in report["remarks"] if r["level"] == level]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_whole_copy_is_clean(workers, drawn, check):
    code, out = check(drawn, "--num-workers", workers)
    assert code == 0
    assert "60 needed, 60 decoded" in out
    assert "144 needed, 144 decoded" in out
    assert out.count("clean") == len(BENCHMARKS)
    assert "finding" not in out


def test_counts_are_compared_with_the_official_ones(drawn, capsys):
    with pytest.raises(SystemExit) as stop:
        check_dataset.main(["--data-root", str(drawn), "--num-workers", "0", "--json"])
    assert stop.value.code == 1
    reports = json.loads(capsys.readouterr().out)
    assert [len(remarks(report, "finding")) for report in reports] == [6, 18, 4, 0, 2, 0]
    assert (
        "cap.rc2.val.json: 30 entries, the official file has 4,181"
        in remarks(reports[0], "finding")[2]
    )


def test_the_74381_images_are_explained(drawn, check):
    report = checked(check, drawn, "FashionIQ")
    notes = " ".join(remarks(report, "note"))
    assert "144 entries list 144 images: 0 entries repeat an image of another list" in notes
    assert "77,683 entries" in notes
    assert "the complete dataset is 74,381 images" in notes
    assert "74,381" not in json.dumps(checked(check, drawn, "CIRR"))


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes(
            {"empty": b"", "not an image": b"<html>404</html>"}.get(
                how, content[: len(content) // 2]
            )
        )


PROBLEMS = ["missing", "empty", "not an image", "truncated or damaged"]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_bad_files_by_role_and_what_they_do(problem, own_drawn, check):
    """Of CIRR's queries five ask with and five for a group's first image, one with another; one image is neither."""
    captions = own_drawn / "cirr_dataset/cirr/captions/cap.rc2.val.json"
    images = own_drawn / "cirr_dataset/cirr/image_splits/split.rc2.val.json"
    shutil.copy(
        own_drawn / "cirr_dataset/dev/dev-0-0-img1.png", own_drawn / "cirr_dataset/dev/extra.png"
    )
    with Image.open(own_drawn / "cirr_dataset/dev/extra.png") as image:
        image.resize((31, 47)).save(own_drawn / "cirr_dataset/dev/extra.png")
    change_json(images, lambda paths: paths.update(extra="./dev/extra.png"))

    def no_query_for_it(entries):
        entries.pop(next(i for i, e in enumerate(entries) if e["target_hard"] == "dev-1-0-img2"))

    change_json(captions, no_query_for_it)
    for name in ("dev-0-0-img0", "dev-1-0-img2", "extra"):
        damage(own_drawn / f"cirr_dataset/dev/{name}.png", problem)
    report = checked(check, own_drawn, "CIRR", "--splits", "val")
    assert report["bad"] == dict.fromkeys(("dev-0-0-img0", "dev-1-0-img2", "extra"), problem)
    found = remarks(report, "finding")
    effect = "11 of 29 queries cannot be evaluated; if they are left out, recalls are computed from the other queries"
    assert found[0] == f"rc2 val: 2 files {problem}, role query: {effect}"
    assert found[1].startswith(
        f"rc2 val: 1 files {problem}, role target: 10 of 29 queries have no target"
    )
    assert (
        found[2]
        == f"rc2 val: 1 files {problem}, role distractor: the gallery has 18 images instead of 19: recalls are too high"
    )


TRAITS = {
    "16 bits": ("I;16", {}, "more than 8 bits per channel"),
    "32 bits": ("I", {}, "more than 8 bits per channel"),
    "transparent": ("RGBA", {}, "transparency"),
    "transparent colour": ("P", {"transparency": 1}, "transparency"),
    "turned": ("RGB", {"exif": b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"}, "an orientation"),
    "1 bit": ("1", {}, "the mode 1"),
    "palette": ("P", {}, "the mode P"),
    "grey": ("L", {}, ""),
}  # fmt: skip


@pytest.mark.parametrize("benchmark", [CIRR, Triplets])
def test_what_files_have_is_said_and_what_is_done_to_them(benchmark, own_images, check):
    paths = benchmark(own_images).val()[0].image_paths
    names = dict(zip(TRAITS, paths, strict=False))
    for kind, name in names.items():
        mode, more, _ = TRAITS[kind]
        white = 40_000 if mode[0] == "I" else 1
        Image.new(mode, (64, 64), white).save(paths[name], "TIFF" if mode == "I" else "PNG", **more)
    report = checked(check, own_images, benchmark.name, "--splits", "val")
    assert not report["bad"]
    is_own = benchmark is Triplets
    for trait in {trait for _, _, trait in TRAITS.values()} - {""}:
        (found,) = [r for r in report["remarks"] if f"files have {trait}" in r["text"]]
        having = {name for kind, name in names.items() if TRAITS[kind][2] == trait}
        having |= {names["transparent colour"]} if trait == "the mode P" else set()
        assert set(found["ids"]) == having
        is_lost = trait.startswith("more than") and not is_own
        assert found["level"] == ("finding" if is_lost else "note")
        assert ("original" in found["text"]) == (not is_own)
    read = read_photo if is_own else decoded
    pixels = load_image(paths[names["16 bits"]], make_preprocess("clip", 1.25, 8), read)
    assert (pixels.min() == 255) == (not is_own)


def test_a_copy_without_images_is_unusable(own_drawn, check):
    for folder in ("train", "dev", "test1"):
        shutil.rmtree(own_drawn / "cirr_dataset" / folder)
    report = checked(check, own_drawn, "CIRR")
    assert report["exit_code"] == 2
    assert any(
        "every query has an image that cannot be decoded" in text
        for text in remarks(report, "unusable")
    )
    assert report["layouts"] == {}


def test_a_split_that_was_asked_for_must_be_there(own_drawn, check):
    (own_drawn / "cirr_dataset/cirr/captions/cap.rc2.val.json").unlink()
    assert checked(check, own_drawn, "CIRR")["exit_code"] == 1
    assert checked(check, own_drawn, "CIRR", "--splits", "train")["exit_code"] == 0
    assert checked(check, own_drawn, "CIRR", "--splits", "val")["exit_code"] == 2


def test_paths_from_the_root_are_taken_as_they_are(own_drawn, check):
    file = own_drawn / "cirr_dataset/cirr/image_splits/split.rc2.val.json"
    places = json.loads(file.read_text())
    root = own_drawn / "cirr_dataset"
    elsewhere = shutil.move(root / "dev", own_drawn / "dev")
    file.write_text(
        json.dumps(
            {name: str(elsewhere / place.split("dev/")[1]) for name, place in places.items()}
        )
    )
    report = checked(check, own_drawn, "CIRR")
    assert report["exit_code"] == 0
    assert report["layouts"][str(elsewhere)] == len(places)


def test_training_needs_the_images_of_triplets_alone(own_drawn, check):
    names = own_drawn / "fashionIQ_dataset/image_splits/split.dress.train.json"
    change_json(names, lambda ids: ids.append("UNUSED"))
    assert checked(check, own_drawn, "FashionIQ")["exit_code"] == 0
    first = json.loads((own_drawn / "fashionIQ_dataset/captions/cap.dress.train.json").read_text())[
        0
    ]
    damage(own_drawn / f"fashionIQ_dataset/images/{first['target']}.jpg", "truncated")
    assert (
        "dress train: 1 files truncated or damaged, role target: 1 of 12 triplets cannot be trained on"
        in remarks(checked(check, own_drawn, "FashionIQ"), "finding")
    )


def test_copies_by_role(own_images, check):
    folder = own_images / "cirr_dataset/dev"
    for number in (1, 2, 3, 4):
        shutil.copy(folder / "dev-0-0-img0.png", folder / f"dev-0-0-img{number}.png")
    report = checked(check, own_images, "CIRR")
    (query, target) = remarks(report, "finding")
    assert query.startswith("rc2 val: 5 files have the same content as another file, role query")
    assert "so their order is arbitrary; up to 5 have the same picture" in target
    assert report["bad"] == {}  # copies are no reason to leave anything out


def test_leaks_repeats_and_empty_captions(own_drawn, check):
    root = own_drawn / "fashionIQ_dataset"
    train = json.loads((root / "captions/cap.dress.train.json").read_text())
    shown = train[0]["target"]
    change_json(root / "image_splits/split.shirt.val.json", lambda names: names.append(shown))
    change_json(
        root / "captions/cap.shirt.val.json", lambda entries: entries[0].update(target=shown)
    )
    change_json(
        root / "captions/cap.dress.train.json", lambda entries: entries[1].update(target=shown)
    )
    change_json(
        root / "captions/cap.toptee.test.json",
        lambda entries: entries[0].update(captions=["is red", " "]),
    )
    change_json(
        root / "captions/cap.toptee.test.json",
        lambda entries: entries[1].update(captions=["same", "same"]),
    )
    report = checked(check, own_drawn, "FashionIQ")
    assert report["exit_code"] == 0  # they are properties, of the official files too
    notes = remarks(report, "note")
    assert any(
        note.startswith("train and val: 1 images are in the lists of both splits") for note in notes
    )
    assert "train and val: 1 targets of val are in training triplets" in notes
    assert any(note.startswith("train: 1 targets are repeated") for note in notes)
    assert "test: 1 queries have an empty caption" in notes
    assert any(note.startswith("test: ") and "same caption twice" in note for note in notes)


def test_files_that_are_missing_or_malformed(own_drawn, check, tmp_path):
    (own_drawn / "cirr_dataset/cirr/captions/cap.rc2.train.json").unlink()
    code, out = check(own_drawn, "--dataset", "CIRR")
    assert code == 1
    assert "missing: rc2 train cannot be used without it" in out
    (own_drawn / "cirr_dataset/cirr/captions/cap.rc2.val.json").write_text("[1]")
    code, out = check(own_drawn, "--dataset", "CIRR")
    assert code == 2
    assert "unusable: rc2 val: " in out
    assert check(tmp_path)[0] == 2


# Left out openly


@pytest.fixture
def excluded(own_drawn, check, tmp_path):
    """A CIRR without a target that is a reference too, and the list of exclusions for it."""
    damage(own_drawn / "cirr_dataset/dev/dev-0-0-img0.png", "truncated")
    damage(own_drawn / "cirr_dataset/train/0/train-0-0-img1.png", "missing")
    check(own_drawn, "--dataset", "CIRR", "--write-exclusions", tmp_path / "bad.json")
    return tmp_path / "bad.json"


def test_a_list_of_exclusions(excluded):
    problems = {"dev-0-0-img0": "truncated or damaged", "train-0-0-img1": "missing"}
    assert json.loads(excluded.read_text()) == {"dataset": "CIRR", "images": problems}


def test_evaluation_refuses_an_incomplete_gallery_and_goes_on_without_it(
    excluded, own_drawn, run, fails, tmp_path, caplog
):
    flags = ["--dataset", "CIRR", *SUM, "--clip-model-name", own_drawn / "tiny_clip_vit.pt"]
    assert "dev-0-0-img0.png" in fails("validate", own_drawn, *flags)
    files = ["--metrics-json", tmp_path / "m.json", "--rankings", tmp_path / "r.json"]
    run("validate", own_drawn, *flags, "--exclusions", excluded, *files)
    assert (
        "left out of val: 1 images and the 10 triplets with one as reference or target; 20 triplets remain"
        in caplog.text
    )
    for file in (tmp_path / "m.json", tmp_path / "r.json"):
        result = json.loads(file.read_text())
        assert result["excluded_images"] == {"val": {"dev-0-0-img0": "truncated or damaged"}}
        assert result["excluded_triplets"] == {"val": 10}
        assert result["protocols"]["original-removed"]["gallery_images"] == {"val": 17}
        assert result["protocols"]["original-removed"]["queries"] == {"val": 20}


def test_what_exclusions_do_to_others_is_said(excluded, own_drawn, run, tmp_path, caplog):
    """Smaller subsets, and ids that are in no split that is used."""
    content = json.loads(excluded.read_text())
    content["images"] |= {"dev-1-0-img5": "missing", "a typo": "missing"}
    excluded.write_text(json.dumps(content))
    flags = ["--dataset", "CIRR", *SUM, "--clip-model-name", own_drawn / "tiny_clip_vit.pt"]
    files = ["--exclusions", excluded, "--metrics-json", tmp_path / "m.json"]
    run("validate", own_drawn, *flags, *files)
    triplets = json.loads((own_drawn / "cirr_dataset/cirr/captions/cap.rc2.val.json").read_text())
    gone = {"dev-0-0-img0", "dev-1-0-img5"}
    left = [t for t in triplets if not gone & {t["reference"], t["target_hard"]}]
    smaller = sum(bool(gone & set(t["img_set"]["members"])) for t in left)
    assert smaller > 0
    assert json.loads((tmp_path / "m.json").read_text())["smaller_groups"] == {"val": smaller}
    assert f"{smaller} of the remaining triplets have a smaller subset" in caplog.text
    assert (
        "2 images in --exclusions are not in any split in use: train-0-0-img1, a typo"
        in caplog.text
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage_1", "stage_2"])
def test_training_says_what_it_left_out(stage, excluded, own_drawn, request, fails, caplog):
    train = request.getfixturevalue(stage)
    flags = ["--exclusions", excluded, "--batch-size", 10, "--num-epochs", 1]
    folder = train("CIRR", *flags, data_root=own_drawn)
    assert "left out of train: 1 images and the 2 triplets" in caplog.text
    expected = {"train": {"images": 1, "triplets": 2}, "val": {"images": 1, "triplets": 10}}
    written = json.loads((folder / "training_hyperparameters.json").read_text())
    assert written["data"]["excluded"] == expected
    assert written["flags"]["exclusions"] == str(excluded)
    (file, *_) = (folder / "saved_models").iterdir()
    assert torch.load(file)["config"]["data"]["excluded"] == expected
    assert read_csv(folder / "validation_metrics.csv")["epoch"] == [0]


@pytest.mark.slow
def test_nothing_excluded_changes_nothing(own_drawn, drawn, stage_2, tmp_path):
    (tmp_path / "none.json").write_text('{"dataset": "CIRR", "images": {"elsewhere": "missing"}}')
    first = stage_2("CIRR", "--num-epochs", 1, output="a")
    flags = ["--num-epochs", 1, "--exclusions", tmp_path / "none.json"]
    second = stage_2("CIRR", *flags, output="b")
    for name in ("train_metrics.csv", "validation_metrics.csv"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"dataset": "FashionIQ", "images": {}}',
        '{"dataset": "CIRR", "images": {"a": 1}}',
        None,
    ],
)
def test_files_that_are_no_exclusions(text, drawn, fails, tmp_path):
    file = tmp_path / "list.json"
    if text is not None:
        file.write_text(text)
    flags = ["--dataset", "CIRR", *SUM, "--clip-model-name", drawn / "tiny_clip_vit.pt"]
    error = fails("validate", drawn, *flags, "--exclusions", file)
    assert "--exclusions" in error
    assert str(file) in error


def test_excluding_everything_is_refused(drawn, fails, tmp_path):
    names = json.loads((drawn / "cirr_dataset/cirr/image_splits/split.rc2.val.json").read_text())
    (tmp_path / "all.json").write_text(
        json.dumps({"dataset": "CIRR", "images": dict.fromkeys(names, "missing")})
    )
    flags = ["--dataset", "CIRR", *SUM, "--clip-model-name", drawn / "tiny_clip_vit.pt"]
    assert "--exclusions excludes all triplets" in fails(
        "validate", drawn, *flags, "--exclusions", tmp_path / "all.json"
    )


def test_a_group_that_lost_a_member_is_ranked_among_the_others():
    names = list("abcdefgh")
    triplets = [
        Triplet(reference="a", captions=("",), target="c", group=tuple("abcdef")),
        Triplet(reference="b", captions=("",), target="h", group=tuple("bcdfgh")),
    ]
    split = Split(name="val", triplets=triplets, image_paths=dict.fromkeys(names)).without({"e"})
    similarity = torch.tensor(
        [[9, 8, 7, 6, 5, 4, 3], [1, 9, 8, 2, 3, 4, 5]]
    ).float()  # a b c d f g h
    frozen = FrozenSplit(split=split, images=torch.eye(7), captions=similarity[:, None])
    ranking = rank(frozen, lambda image, text: text, [ORIGINAL_REMOVED], k=7)[ORIGINAL_REMOVED]
    assert ranking.group_ranks.tolist() == [1, 1]
    found = ranking.answers_in_group(split.names)
    assert [[name for name, _ in row] for row in found] == [list("bcdf"), list("chgfd")]


# Layouts in the wild


def fashioniq_by_category(root: Path, kind: str) -> None:
    for category in FashionIQ.parts:
        for split in FashionIQ(root.parent).splits:
            for name in json.loads(
                (root / f"image_splits/split.{category}.{split}.json").read_text()
            ):
                target = root / kind / category / f"{name}.jpg"
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(root / "images" / f"{name}.jpg", target)


@pytest.mark.parametrize("kind", ["images", "resized_image"])
def test_fashioniq_by_category(kind, own_drawn, drawn, run, check, capsys):
    flags = ["--dataset", "FashionIQ", *SUM, "--clip-model-name", drawn / "tiny_clip_vit.pt"]
    run("validate", drawn, *flags)
    expected = capsys.readouterr().out
    fashioniq_by_category(own_drawn / "fashionIQ_dataset", kind)
    run("validate", own_drawn, *flags)
    assert capsys.readouterr().out == expected
    report = checked(check, own_drawn, "FashionIQ")
    assert report["layouts"] == {
        str(own_drawn / "fashionIQ_dataset" / kind / c): 48 for c in FashionIQ.parts
    }
    assert report["exit_code"] == 0


@pytest.mark.parametrize("folder", ["img_raw", "images"])
def test_cirr_below_another_folder(folder, own_drawn, drawn, run, check, capsys):
    flags = ["--dataset", "CIRR", *SUM, "--clip-model-name", drawn / "tiny_clip_vit.pt"]
    run("validate", drawn, *flags)
    expected = capsys.readouterr().out
    (own_drawn / "cirr_dataset" / folder).mkdir()
    for split in ("train", "dev", "test1"):
        shutil.move(own_drawn / "cirr_dataset" / split, own_drawn / "cirr_dataset" / folder / split)
    run("validate", own_drawn, *flags)
    assert capsys.readouterr().out == expected
    assert checked(check, own_drawn, "CIRR")["layouts"] == {
        str(own_drawn / "cirr_dataset" / folder): 60
    }


def test_an_image_of_two_categories_may_lie_under_the_other(own_drawn):
    root = own_drawn / "fashionIQ_dataset"
    shared = json.loads((root / "image_splits/split.dress.val.json").read_text())[0]
    change_json(root / "image_splits/split.shirt.val.json", lambda names: names.append(shared))
    (root / "images" / "dress").mkdir()
    moved = root / "images" / "dress" / f"{shared}.jpg"
    shutil.move(root / "images" / f"{shared}.jpg", moved)
    for split in FashionIQ(own_drawn).val():
        if shared in split.image_paths:
            assert split.image_paths[shared] == moved


def test_the_official_place_comes_first(own_drawn):
    name = "dev-0-0-img0"
    other = own_drawn / "cirr_dataset/img_raw/dev"
    other.mkdir(parents=True)
    shutil.copy(own_drawn / f"cirr_dataset/dev/{name}.png", other)
    assert CIRR(own_drawn).val()[0].image_paths[name] == own_drawn / f"cirr_dataset/dev/{name}.png"
