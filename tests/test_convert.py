"""Annotation files of others as your own triplets: the same queries, texts, galleries and recalls."""

import json
from pathlib import Path

import pytest

import convert
from benchmarks import CIRR, FashionIQ, Triplets
from benchmarks.published import SOURCES
from conftest import CASES
from test_triplets import measured
from utils import UserError


def converted(dataset: str, root: Path, folder: Path) -> Triplets:
    convert.main(["--dataset", dataset, "--data-root", str(root), "--output-dir", str(folder)])
    return Triplets(folder)


def test_converted_cirr_gives_the_recalls_of_cirr(drawn, tmp_path):
    """From the same features, in the gallery and in the groups."""
    results = []
    for benchmark in (CIRR(drawn), converted("CIRR", drawn, tmp_path)):
        result, rankings = measured(benchmark, tmp_path)
        results.append((result["protocols"]["original-removed"], rankings["queries"]["val"]))
    (of_cirr, asked), (own, asked_again) = results
    assert own["ranks"] == of_cirr["ranks"]
    assert own["group_ranks"] == of_cirr["group_ranks"]
    shared = own["metrics"].keys() - {"average_recall"}
    assert len(shared) == 7
    assert {name: of_cirr["metrics"][name] for name in shared} == {
        name: own["metrics"][name] for name in shared
    }
    assert [q["caption"] for q in asked] == [q["caption"] for q in asked_again]
    assert [str(q["pair_id"]) for q in asked] == [q["pair_id"] for q in asked_again]


@pytest.mark.parametrize("kind", [CIRR, FashionIQ])
def test_every_split_has_the_same_queries_and_images(kind, drawn, tmp_path):
    """With the texts of training, in their order, and that of an evaluation."""
    own = converted(kind.name, drawn, tmp_path)
    official = kind(drawn)
    trained, own_trained = official.train(), own.train()
    texts = [official.caption_variants(t.captions) for t in trained.triplets]
    assert [own.caption_variants(t.captions) for t in own_trained.triplets] == texts
    for split, called in official.splits.items():
        parts = official.read(called)
        (part,) = own.read(split)
        files = [path.resolve() for of in parts for path in of.paths]
        assert [path.resolve() for path in part.paths] == list(dict.fromkeys(files))
        triplets = [(of, t) for of in parts for t in of.triplets]
        for (of, triplet), again in zip(triplets, part.triplets, strict=True):
            assert own.caption(again.captions) == official.caption(triplet.captions)
            for name, own_name in zip(triplet.images, again.images, strict=True):
                assert of.image_paths[name].resolve() == part.image_paths[own_name].resolve()
            assert len(again.group) == len(triplet.group)


def test_captions_that_are_empty(own_drawn, tmp_path, caplog):
    """One of FashionIQ's two is left out of the texts; a query of CIRR that says nothing is left out, and said."""
    file = own_drawn / "fashionIQ_dataset/captions/cap.dress.val.json"
    entries = json.loads(file.read_text())
    entries[0]["captions"] = ["is red", ""]
    file.write_text(json.dumps(entries))
    (val,) = converted("FashionIQ", own_drawn, tmp_path / "a").val()
    assert val.triplets[0].captions == ("Is red and ", " and is red", "Is red")
    file = own_drawn / "cirr_dataset/cirr/captions/cap.rc2.test1.json"
    entries = json.loads(file.read_text())
    entries[3]["caption"] = " "
    file.write_text(json.dumps(entries))
    (test,) = converted("CIRR", own_drawn, tmp_path / "b").test()
    assert len(test.triplets) == len(entries) - 1
    assert "test: 1 queries without a caption are left out" in caplog.text


def test_what_is_there_is_converted(own_drawn, tmp_path, capsys):
    (own_drawn / "cirr_dataset/cirr/captions/cap.rc2.test1.json").unlink()
    folder = converted("CIRR", own_drawn, tmp_path / "a").annotation_folder()
    assert sorted(file.stem for file in folder.glob("*.jsonl")) == ["train", "val"]
    with pytest.raises(SystemExit):
        converted("CIRR", own_drawn, tmp_path / "a")
    assert "already exists" in capsys.readouterr().err


# LaSCo and Shoes, as their repositories have them

COCO = "val2014/COCO_val2014_{:012d}.jpg"


def lasco_entry(qid: int, reference: int, target: int) -> dict:
    return {
        "qid": qid,
        "query-image": [reference, COCO.format(reference)],
        "query-text": "The person is riding the bike",
        "target-image": [target, COCO.format(target)],
    }


SHOE = "img_womens_clogs_{}.jpg"


def shoe_entry(reference: int, target: int) -> dict:
    return {
        "ImageName": SHOE.format(target),
        "ReferenceImageName": SHOE.format(reference),
        "RelativeCaption": "is more of a textured material",
    }


FILES = {
    "LaSCo": {
        "lasco_train.json": [lasco_entry(7, 1, 2), lasco_entry(7, 2, 1)],
        "lasco_val.json": [lasco_entry(8, 3, 4), lasco_entry(9, 4, 5)],
        "lasco_val_corpus.json": [{"id": n, "path": "val/" + COCO.format(n)} for n in (6, 5, 4)],
    },
    "Shoes": {
        "relative_captions_shoes.json": [shoe_entry(1, 2), shoe_entry(4, 3), shoe_entry(2, 1)],
        "train_im_names.txt": [SHOE.format(1), SHOE.format(2)],
        "eval_im_names.txt": [SHOE.format(5), SHOE.format(4), SHOE.format(3)],
    },
}


def write(file: Path, content: list) -> None:
    is_text = file.suffix == ".txt"
    file.write_text("\n".join(content) if is_text else json.dumps(content))


@pytest.fixture
def published(tmp_path) -> Path:
    """A data root with both."""
    for dataset, files in FILES.items():
        folder = tmp_path / "data" / SOURCES[dataset][0]
        folder.mkdir(parents=True)
        for name, content in files.items():
            write(folder / name, content)
    for number in range(1, 6):
        image = folder / f"womens_clogs/{number % 2}" / SHOE.format(number)
        image.parent.mkdir(parents=True, exist_ok=True)
        image.touch()
    return tmp_path / "data"


def test_lasco(published, tmp_path, caplog):
    own = converted("LaSCo", published, tmp_path / "own")
    train = own.train()
    assert [(t.reference, t.target) for t in train.triplets] == [
        (COCO.format(1), COCO.format(2)),
        (COCO.format(2), COCO.format(1)),
    ]
    (val,) = own.val()
    assert val.names == [COCO.format(number) for number in (6, 5, 4, 3)]
    assert "val: 1 query images were missing from the gallery list" in caplog.text
    assert val.triplets[0].captions == ("The person is riding the bike",)
    assert val.paths[0].resolve() == (published / "lasco_dataset" / COCO.format(6)).resolve()


def test_shoes(published, tmp_path):
    own = converted("Shoes", published, tmp_path / "own")
    assert [t.target for t in own.train().triplets] == [
        f"womens_clogs/{number % 2}/{SHOE.format(number)}" for number in (2, 1)
    ]
    (val,) = own.val()
    assert val.names == [f"womens_clogs/{n % 2}/{SHOE.format(n)}" for n in (5, 4, 3)]
    assert [triplet.reference for triplet in val.triplets] == [val.names[1]]
    assert all(path.exists() for path in val.paths)


CASES_OF_FILES = []
for dataset, files in FILES.items():
    for name in files:
        CASES_OF_FILES.append(pytest.param(dataset, name, id=f"{dataset} {name}"))


@pytest.mark.parametrize(("dataset", "name"), CASES_OF_FILES)
def test_every_part_of_a_file_must_be_as_published(dataset, name, published, tmp_path):
    """Each key of the last entry without its value and with others: one line that names the file."""
    file = published / SOURCES[dataset][0] / name
    *others, last = FILES[dataset][name]
    wrong: list = [None, 3, [last]] if file.suffix == ".json" else []
    if isinstance(last, str):
        wrong.append("another.jpg")
    else:
        read = [key for key in last if key not in ("qid", "id")]
        wrong += [{key: last[key] for key in last if key != missing} for missing in read]
        wrong += [{**last, key: value} for key in read for value in (None, 3, [], {}, [1, 2])]
    for entry in wrong:
        write(file, [*others, entry])
        with pytest.raises(UserError) as error:
            SOURCES[dataset][1](file.parent)
        assert str(file) in str(error.value), entry
        assert len(str(error.value).splitlines()) == 1
        CASES["published annotations", "refused"] += 1
    file.unlink()
    if name in ("lasco_train.json", "lasco_val.json"):
        assert len(SOURCES[dataset][1](file.parent)) == 1
        return
    with pytest.raises(UserError, match="is missing"):
        SOURCES[dataset][1](file.parent)
