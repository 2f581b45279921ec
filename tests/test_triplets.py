"""Your own triplets: both forms of the file say the same, every wrong value is named with its line, metrics by hand."""

import csv
import io
import itertools
import json
import re
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import Triplets, image_check
from benchmarks.exclusions import read_exclusions
from benchmarks.metrics import NO_RANK, Ranks
from benchmarks.splits import check_images_exist, split_digest
from benchmarks.triplets import OWN_COLUMNS
from combiner import Sum
from conftest import CASES
from evaluation import rankings_file
from evaluation.rankings_file import make_records, read_rankings, write_rankings
from evaluation.result_file import make_result, read_result, write_result
from evaluation.retrieval import rank_all
from models.features import FrozenSplit
from reports.sheets import make_card
from test_compare import MADE_BY
from utils import UserError

SPLITS = ("train", "val", "test")
FULL = {
    "id": 1, "reference": "a.jpg", "caption": "is red", "target": "b.jpg", "group": ["a.jpg", "b.jpg"],
    "negatives": ["a.jpg"], "kind": "color",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    """Where a test writes its files."""
    (tmp_path / "triplets_dataset" / "images").mkdir(parents=True)
    return tmp_path / "triplets_dataset"


def write_lines(folder: Path, split: str, lines: list) -> Path:
    file = folder / f"{split}.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def read(folder: Path, split: str = "val"):
    """The only part of a split."""
    (part,) = Triplets(folder.parent).read(split)
    return part


def refused(folder: Path, split: str = "val") -> str:
    with pytest.raises(UserError) as error:
        read(folder, split)
    assert len(str(error.value).splitlines()) == 1
    assert str(folder) in str(error.value)
    return str(error.value)


# Lines


# Of a value whose rule is to be there, to be texts, and none of them empty.
NO_TEXTS = [3, True, 1.5, {}, {"a": "b"}, [3], [None], [["a.jpg"]], " ", ["a.jpg", ""]]
NOTHING = [None, "", []]
WRONG = {
    "reference": [*NOTHING, *NO_TEXTS, ["a.jpg", "b.jpg"], "b.jpg"],
    "caption": [*NOTHING, *NO_TEXTS],
    "target": [*NOTHING, *NO_TEXTS, "a.jpg", ["b.jpg", "b.jpg"], ["b.jpg", "./b.jpg"], "c.jpg"],
    "id": [True, 1.5, {}, [1], 2, "2", *NOTHING],
    "group": [*NO_TEXTS, ["a.jpg"], "a.jpg", *NOTHING],
    "negatives": [True, 1.5, {}, [None], ["a.jpg", ""], "b.jpg"],
    "kind": [True, 1.5, {}, [None], ["a", ""]],
}
CASES_OF_LINES = []
for key, values in WRONG.items():
    for value in values:
        CASES_OF_LINES.append(pytest.param(key, value, id=f"{key} {json.dumps(value)}"))
    if key not in ("kind", "negatives"):
        CASES_OF_LINES.append(pytest.param(key, ..., id=f"{key} missing"))


CASES_OF_CELLS = []
for case in CASES_OF_LINES:
    _, value = case.values
    if value in (None, "", []) or all(isinstance(one, str) for one in np.atleast_1d(value)):
        CASES_OF_CELLS.append(case)


def test_every_key_is_tried():
    assert WRONG.keys() == set(OWN_COLUMNS) == FULL.keys()


@pytest.mark.parametrize(("key", "value"), CASES_OF_LINES)
def test_a_wrong_value_is_named_with_its_line(key, value, folder):
    """In the third line, of which the second is blank."""
    wrong = {**FULL, "id": 3, key: value}
    if value is ...:
        del wrong[key]
    file = folder / "val.jsonl"
    lines = [{**FULL, "id": 2}, wrong, {**FULL, "id": 4}]
    file.write_text("\n\n".join(map(json.dumps, lines)))
    error = refused(folder)
    assert str(file) in error
    assert "line 3" in error
    CASES["lines of your own triplets", "refused"] += 1


@pytest.mark.parametrize("key", ["target", "group"])
@pytest.mark.parametrize("value", NOTHING)
def test_a_test_query_may_lack_its_answer(key, value, folder):
    write_lines(folder, "test", [{**FULL, "group": [], key: value}])
    assert read(folder, "test").is_secret


@pytest.mark.parametrize(
    "line", ["{", "[" * 9999, "3", "null", '"a"', "[]", '{"id": 1, "id": 2}', '{"caption": "\\ud800"}']
)  # fmt: skip
@pytest.mark.parametrize("split", SPLITS)
def test_a_line_that_is_no_object(line, split, folder):
    (folder / f"{split}.jsonl").write_text(f"{json.dumps(FULL)}\n{line}\n")
    error = refused(folder, split)
    assert f"{split}.jsonl" in error
    assert "line 2" in error
    assert "line 1" not in error


AWAY = ["../a.jpg", "/etc/passwd", "a/../../b.jpg", "C:/a.jpg", "..\\a.jpg", "a\0.jpg"]


@pytest.mark.parametrize("path", AWAY)
@pytest.mark.parametrize("key", ["reference", "target", "group", "negatives"])
def test_a_path_that_leads_out(path, key, folder):
    wrong = [*FULL["group"], path] if key == "group" else path
    write_lines(folder, "val", [{**FULL, "group": [*FULL["group"], path], key: wrong}])
    assert "points outside the dataset" in refused(folder)


@pytest.mark.parametrize("path", AWAY)
def test_a_gallery_that_leads_out(path, folder):
    write_lines(folder, "val", [FULL])
    (folder / "gallery.val.txt").write_text(f"a.jpg\nb.jpg\n{path}\n")
    assert "points outside the dataset" in refused(folder)


# Files


def test_the_gallery_is_its_file_or_what_the_split_names(folder):
    other = {"id": 2, "target": ["c/d.jpg", "b.jpg"], "group": ["c//d.jpg"]}
    write_lines(folder, "val", [FULL, {**FULL, **other}])
    assert read(folder).names == ["a.jpg", "b.jpg", "c/d.jpg"]
    (folder / "gallery.val.txt").write_text("\ufeffe.jpg\r\n./c/d.jpg\n\nb.jpg\na.jpg\nb.jpg\n")
    assert read(folder).names == ["e.jpg", "c/d.jpg", "b.jpg", "a.jpg"]
    (folder / "gallery.val.txt").write_text("a.jpg\nb.jpg\n")
    error = refused(folder)
    assert "line 2" in error
    assert "c/d.jpg" in error
    assert "gallery.val.txt" in error


NO_QUERIES = [b"", b"\n \n", b"\xff\xfe\0", "caption,référence".encode("latin1"), None]


@pytest.mark.parametrize("name", ["val.jsonl", "val.csv", "gallery.val.txt"])
@pytest.mark.parametrize("content", NO_QUERIES)
def test_files_without_a_query(name, content, folder):
    if name.startswith("gallery"):
        write_lines(folder, "val", [FULL])
    file = folder / name
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    assert name in refused(folder)


def test_a_split_in_both_forms(folder):
    write_lines(folder, "val", [FULL])
    (folder / "val.csv").write_text("reference,caption,target\na.jpg,is red,b.jpg\n")
    assert "keep only one" in refused(folder)


def test_a_missing_split_is_named(folder):
    for split in SPLITS:
        assert f"{split}.jsonl" in refused(folder, split)


@pytest.mark.parametrize(
    "line", ["{", json.dumps({**FULL, "target": "c.jpg"})], ids=["no JSON", "in no gallery"]
)
@pytest.mark.parametrize("door", ["clip_fine_tune", "combiner_train", "validate"])
def test_scripts_refuse_in_one_line(line, door, folder, fails):
    """Exit code 2, the file and the line, before anything is loaded or written."""
    for split in ("train", "val"):
        (folder / f"{split}.jsonl").write_text(f"{json.dumps(FULL)}\n{line}\n")
        (folder / f"gallery.{split}.txt").write_text("a.jpg\nb.jpg\n")
    flags = ["--combining-function", "sum"] if door == "validate" else []
    error = fails(door, folder.parent, "--dataset", "Triplets", *flags)
    assert ".jsonl" in error
    assert "line 2" in error


# Tables


def as_table(lines: list[dict], separator: str) -> str:
    """Lines of JSON as a spreadsheet would save them, with a column of its own."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator)
    writer.writerow(["Price", *[name.title() for name in reversed(OWN_COLUMNS)], ""])
    for line in lines:
        cells = []
        for name in reversed(OWN_COLUMNS):
            value = line.get(name, "")
            cells.append(" | ".join(value) if isinstance(value, list) else value)
        writer.writerow([9, *cells, ""])
    return text.getvalue()


def as_workbook(table: str) -> bytes:
    """What Excel would save of a table with commas; a number is one, and the second sheet has notes."""
    openpyxl = pytest.importorskip("openpyxl", reason="workbooks need openpyxl")
    book = openpyxl.Workbook()
    for row in csv.reader(io.StringIO(table)):
        book.active.append([int(cell) if cell.isdigit() else cell or None for cell in row])
    book.create_sheet("notes").append(["not read"])
    content = io.BytesIO()
    book.save(content)
    return content.getvalue()


@pytest.mark.parametrize(
    ("ending", "separator", "told"),
    [
        (".csv", ",", ""),
        (".CSV", ";", ""),
        (".csv", "\t", ""),
        (".csv", "|", "sep=|\r\n"),
        (".tsv", "\t", ""),
        (".xlsx", ",", ""),
    ],
)
@pytest.mark.parametrize("split", SPLITS)
def test_a_table_says_the_same(split, ending, separator, told, own_drawn):
    folder = own_drawn / "triplets_dataset"
    whole = read(folder, split)
    file = folder / f"{split}.jsonl"
    lines = list(map(json.loads, file.read_text().splitlines()))
    lines[1]["caption"] = ["with a comma, and a ; too", 'a "quotation" and\na break\tin it']
    write_lines(folder, split, lines)
    changed = split_digest(read(folder, split))
    assert changed != split_digest(whole)
    file.unlink()
    table = as_table(lines, separator)
    content = b"\xef\xbb\xbf" + (told + table).encode()
    is_workbook = ending == ".xlsx"
    (folder / f"{split}{ending}").write_bytes(as_workbook(table) if is_workbook else content)
    again = read(folder, split)
    assert split_digest(again) == changed
    assert [t.pair_id for t in again.triplets] == [t.pair_id for t in whole.triplets]


@pytest.mark.parametrize(("key", "value"), CASES_OF_CELLS)
def test_a_wrong_cell_is_named_with_its_row(key, value, folder):
    """In the fourth row, of which the third is blank."""
    lines = [{**FULL, "id": 2}, {}, {**FULL, "id": 3, key: value or ""}]
    table = as_table(lines, ",").replace("9,,,,,,", ",,,,,,")
    (folder / "val.csv").write_text(table)
    assert "row 4" in refused(folder)
    CASES["cells of your own triplets", "refused"] += 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jpg,is red,b.jpg\n", "should contain the columns"),
        ("reference,caption,caption,target\na.jpg,red,red,b.jpg\n", "each once"),
        ("reference,target\na.jpg,b.jpg\n", "should contain the columns"),
        ("reference,caption,target\na.jpg,red, with dots,b.jpg\n", "row 2 has 4 cells"),
        ("reference,caption,target\na.jpg,red\n", "row 2 has 2 cells"),
        ("reference,caption,target\na.jpg,red,b.jpg" + 999 * ",", "row 2"),
        ('reference,caption,target\n\na.jpg,"red" dots,b.jpg\n', "not a table: row 3"),
        ('reference,caption,target\na.jpg,"x\ny",b.jpg\na.jpg,"red,b.jpg\n', "not a table: row 3"),
        ("", "is empty"),
        ("reference,caption,target\n", "no triplets"),
        ("reference,caption\na.jpg,red\n", "row 2: target"),
    ],
)
def test_tables_that_are_none(text, expected, folder):
    (folder / "val.csv").write_text(text)
    assert expected in refused(folder)


BAD_TABLES = {
    "no zip": b"reference,caption",
    "half": None,
    "a zip of nothing": b"PK\5\6" + bytes(18),
}


@pytest.mark.parametrize("what", BAD_TABLES)
def test_workbooks_that_are_none(what, folder):
    whole = as_workbook(as_table([FULL], ","))
    (folder / "val.xlsx").write_bytes(BAD_TABLES[what] or whole[: len(whole) // 2])
    assert "not a workbook" in refused(folder)


def test_workbooks_need_openpyxl(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    (folder / "val.xlsx").write_bytes(b"")
    assert "pip install openpyxl" in refused(folder)


@pytest.mark.parametrize(
    ("cell", "captions"),
    [
        ("black|white striped", ["black|white striped"]),
        ("is red | red", ["is red", "red"]),
        ("is red| red |x", ["is red", "red", "x"]),
        ("['is red', \"it's\"]", ["is red", "it's"]),
        ("[sic] red", ["[sic] red"]),
    ],
)
def test_a_cell_holds_what_its_writer_meant(cell, captions, folder, caplog):
    rows = [
        ("reference", "caption", "target"),
        ("a.jpg", cell, "b.jpg|c.jpg"),
        ("a.jpg", "x", "['d.jpg']"),
    ]
    with (folder / "val.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    first, second = read(folder).triplets
    assert list(first.captions) == captions
    assert (first.targets, second.targets) == (("b.jpg", "c.jpg"), ("d.jpg",))
    assert ("without spaces" in caplog.text) == ("|" in captions[0])


@pytest.mark.parametrize("cell", ["nan", " NaN ", "None", "<NA>", "#N/A", "['is red' 'red']"])
@pytest.mark.parametrize("column", ["caption", "id"])
def test_a_cell_that_stands_for_nothing(cell, column, folder):
    row = {"reference": "a.jpg", "caption": "is red", "target": "b.jpg", "id": "1", "kind": "color"}
    (folder / "val.csv").write_text(
        f"{','.join(row)}\n{','.join({**row, column: cell}.values())}\n"
    )
    error = refused(folder)
    assert f"row 2 has the {column} " in error
    assert cell.strip() in error


@pytest.mark.parametrize("name", ["val.csv", "val.jsonl"])
def test_all_that_is_wrong_is_told_at_once(name, folder):
    """What a row holds, and then what it names; twenty of them, and the number of the others."""
    rows = ["a.jpg,is red,b.jpg", *["a.jpg,,b.jpg"] * 12, "a.jpg", *["a.jpg,x,"] * 12]
    lines = [dict(zip(("reference", "caption", "target"), row.split(","), strict=False)) for row in rows]  # fmt: skip
    table = "\n".join(["reference,caption,target", *rows])
    text = table if name.endswith("csv") else "\n".join(map(json.dumps, lines))
    (folder / name).write_text(text)
    where, first = ("row", 3) if name.endswith("csv") else ("line", 2)
    error = refused(folder)
    assert [f"{where} {number}" in error for number in range(first, first + 21)] == [True] * 20 + [False]  # fmt: skip
    assert "and 5 more" in error
    (folder / name).unlink()
    write_lines(folder, "val", [{**FULL, "id": str(number), "target": "a.jpg"} for number in range(3)])  # fmt: skip
    error = refused(folder)
    for number in (1, 2, 3):
        assert f"line {number}: its target is also its reference" in error


# Names


COMPOSED, APART = (unicodedata.normalize(form, "áo/ghế.jpg") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(("written", "stored"), [(COMPOSED, APART), (APART, COMPOSED)])
def test_both_forms_of_an_accent_are_one_name(written, stored, folder):
    """In queries, in the gallery and on the disk, as macOS and Windows write them."""
    (folder / "images" / stored).parent.mkdir()
    for name in (stored, "a.jpg"):
        (folder / "images" / name).write_bytes(b"x")
    lines = [{"reference": "a.jpg", "caption": "x", "target": name} for name in (written, stored)]
    write_lines(folder, "val", lines)
    for gallery in (None, f"a.jpg\n{stored}\n", f"{written}\na.jpg\n"):
        if gallery:
            (folder / "gallery.val.txt").write_text(gallery)
        split = read(folder)
        check_images_exist([split])
        assert sorted(split.names) == ["a.jpg", COMPOSED]
        assert split.image_paths[COMPOSED] == folder / "images" / stored
    exclusions = folder / "exclusions.json"
    exclusions.write_text(json.dumps({"dataset": "Triplets", "images": {APART: "damaged"}}))
    assert read_exclusions(exclusions, "Triplets") == {COMPOSED: "damaged"}


@pytest.mark.parametrize(
    "written", ["Boots/17.JPG", "boots\\17.jpg", "images/boots/17.jpg", "17.jpg", "boots/17"]
)
def test_a_near_name_is_told(written, folder):
    """Where the folder says what there is, and where a list of the gallery does."""
    (folder / "images" / "boots").mkdir()
    for name in ("a.jpg", "b.jpg", "boots/17.jpg", "boots/171.jpg"):
        (folder / "images" / name).write_bytes(b"x")
    write_lines(folder, "val", [{"reference": "a.jpg", "caption": "x", "target": written}])
    with pytest.raises(UserError, match=r"\(did you mean (boots/)?17\.jpg\?\)"):
        check_images_exist([read(folder)])
    (folder / "gallery.val.txt").write_text("a.jpg\nboots/17.jpg\nboots/171.jpg\n")
    assert "(did you mean boots/17.jpg?)" in refused(folder)


def test_a_near_file_is_told(folder):
    (folder / "val.xls").touch()
    assert "val.jsonl is missing (did you mean val.xls?): " in refused(folder)


def test_a_missing_folder_is_one_line(folder):
    write_lines(folder, "val", [FULL])
    (folder / "images").rmdir()
    with pytest.raises(UserError, match=re.escape(f"there is no {folder / 'images'}.")):
        check_images_exist([read(folder)])
    report = image_check.check(Triplets(folder.parent), ["val"], official=True, workers=0)
    about_files = [r for r in report.remarks if "missing" in r.text]
    assert [(r.text, r.ids) for r in about_files] == [
        ("1 folders are missing, with 2 images", [str(folder / "images")])
    ]
    assert report.exit_code == 2


# Training


def test_training_has_a_triplet_for_each_target_and_as_many_captions_for_all(folder):
    several = {"reference": "a.jpg", "caption": ["is red", "more red"], "target": ["b.jpg", "c.jpg"]}  # fmt: skip
    write_lines(
        folder,
        "train",
        [
            several,
            {"reference": "c.jpg", "caption": "x", "target": "a.jpg"},
            {"reference": "c.jpg", "caption": ["1", "2", "3"], "target": "b.jpg"},
        ],
    )
    benchmark = Triplets(folder.parent)
    split = benchmark.train()
    asked = [(t.reference, t.target, t.captions) for t in split.triplets]
    assert asked == [
        ("a.jpg", "b.jpg", ("is red", "more red", "is red")),
        ("a.jpg", "c.jpg", ("is red", "more red", "is red")),
        ("c.jpg", "a.jpg", ("x", "x", "x")),
        ("c.jpg", "b.jpg", ("1", "2", "3")),
    ]
    assert benchmark.caption_variants(asked[3][2]) == ["1", "2", "3"]
    assert benchmark.caption(asked[3][2]) == "1"


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_any_column_of_own_triplets_is_one_to_resample_by(form, tmp_path):
    """Where all queries have a value in it; equal values have equal numbers."""
    folder = tmp_path / "triplets_dataset"
    folder.mkdir()
    rows = [
        {"reference": "a.jpg", "caption": "x", "target": "b.jpg", "Concept": "hat", "note": "n"},
        {"reference": "c.jpg", "caption": "y", "target": "b.jpg", "Concept": "coat|s", "note": ""},
        {"reference": "a.jpg", "caption": "z", "target": "d.jpg", "Concept": "hat", "note": "n"},
    ]
    with (folder / f"val.{form}").open("w") as file:
        if form == "csv":
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    (folder / "images").mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg"):
        (folder / "images" / name).write_bytes(b"not decoded here")
    (split,) = Triplets(tmp_path).val()
    assert split.clusters == {"reference": [0, 1, 0], "target": [0, 0, 1], "concept": [0, 1, 0]}
    result, _ = measured(Triplets(tmp_path), tmp_path)
    assert result["clusters"] == {"val": split.clusters}


# Metrics


def test_metrics_by_hand():
    ranks = Ranks(
        np.array([0, 4, 7, 60]),
        others=np.array([[NO_RANK], [0], [NO_RANK], [3]]),
        in_group=np.array([0, 0, 1, 3]),
    )
    benchmark = Triplets(Path())
    metrics = benchmark.summary({"val": benchmark.score(ranks)})
    assert metrics == {
        "recall_at1": 25,
        "recall_at5": 50,
        "recall_at10": 75,
        "recall_at50": 75,
        "map_at10": pytest.approx(100 * (1 + (1 + 2 / 5) / 2 + 1 / 8 + (1 / 4) / 2) / 4),
        "group_recall_at1": 50,
        "group_recall_at2": 75,
        "group_recall_at3": 75,
        "average_recall": 56.25,
    }
    assert metrics.keys() == benchmark.titles.keys()
    bare = benchmark.summary({"val": benchmark.score(Ranks(ranks.named))})
    assert bare == {name: metrics[name] for name in bare}
    assert bare.keys() == {
        "recall_at1",
        "recall_at5",
        "recall_at10",
        "recall_at50",
        "average_recall",
    }


@pytest.mark.parametrize("given", list(itertools.product((True, False), repeat=3)), ids=str)
def test_every_kind_of_data_is_measured_and_read_again(given, own_drawn, tmp_path):
    """With and without ids, groups and several targets; groups of several sizes, with and without their reference."""
    has_id, has_group, has_several = given
    folder = own_drawn / "triplets_dataset"
    lines = list(map(json.loads, (folder / "val.jsonl").read_text().splitlines()))
    for number, line in enumerate(lines):
        target, *_ = line["target"]
        line["target"] = line["target"] if has_several else target
        others = [name for name in line["group"] if name not in (target, line["reference"])]
        line["group"] = [target, *others[: number % 4], *[line["reference"]][: number % 2]]
        for key, is_given in (("id", has_id), ("group", has_group)):
            if not is_given:
                del line[key]
    write_lines(folder, "val", lines)
    result, rankings = measured(Triplets(own_drawn), tmp_path)
    assert list(result["protocols"]) == ["original-removed", "original-kept"]
    for name, of_protocol in result["protocols"].items():
        metrics = of_protocol["metrics"]
        assert Triplets(own_drawn).titles_in(Triplets(own_drawn).val()).keys() == metrics.keys()
        assert ("map_at10" in metrics) == has_several
        assert ("group_recall_at1" in metrics) == has_group
        hits = []
        for query, line in zip(rankings["queries"]["val"], lines, strict=True):
            nearest = [image for image, _ in query["protocols"][name]["nearest"]]
            target = line["target"][0] if has_several else line["target"]
            hits.append(target in nearest[:5])
            assert query["pair_id"] == (str(line["id"]) if has_id else None)
        assert metrics["recall_at5"] == pytest.approx(100 * np.mean(hits))


def test_recall_by_kind(own_drawn, tmp_path):
    """Of the queries of each kind, in what is printed, stored and read again; a query may have none, or two."""
    folder = own_drawn / "triplets_dataset"
    lines = list(map(json.loads, (folder / "val.jsonl").read_text().splitlines()))
    kinds = [("color",), ("color", "shape"), (), ("shape  of\nit",)]
    for number, line in enumerate(lines):
        line["kind"] = list(kinds[number % 4])
    write_lines(folder, "val", lines)
    benchmark = Triplets(own_drawn)
    assert {"R@10 color", "R@10 shape of it"} < set(benchmark.titles_in(benchmark.val()).values())
    result, rankings = measured(benchmark, tmp_path)
    expected = {"color": (0, 1), "shape": (1,), "shape of it": (3,)}
    for name, of_protocol in result["protocols"].items():
        found = [query["protocols"][name]["rank"] < 10 for query in rankings["queries"]["val"]]
        for kind, places in expected.items():
            of_kind = [hit for number, hit in enumerate(found) if number % 4 in places]
            metric = of_protocol["metrics"][f"recall_at10_of_{kind}"]
            assert metric == pytest.approx(100 * np.mean(of_kind))
    card = make_card("val:1", rankings["queries"]["val"][1], "original-kept", k=1)
    assert list(card.kinds) == ["color", "shape"]


def measured(benchmark: Triplets, folder: Path) -> tuple[dict, dict]:
    """A result and rankings of features that are drawn, written and read again."""
    val = benchmark.val()
    generator = torch.Generator().manual_seed(0)
    frozen = []
    for split in val:
        images = torch.randn(len(split.names), 8, generator=generator)
        captions = torch.randn(len(split.triplets), 1, 8, generator=generator)
        frozen.append(FrozenSplit(split=split, images=images, captions=captions))
    rankings = rank_all(frozen, Sum(), benchmark.protocols, k=99, block=None)
    result = make_result(benchmark, val, rankings, reasons={}, made_by=MADE_BY)
    write_result(folder / "m.json", result)
    write_rankings(
        folder / "r.json",
        result,
        make_records(benchmark, val, rankings, insights={split.name: None for split in val}),
    )
    return read_result(folder / "m.json"), read_rankings(folder / "r.json")


def test_rankings_are_written_as_they_come(own_drawn, tmp_path, monkeypatch):
    """A query is in the file before the next one is made; how many are made at once changes nothing."""
    written = []

    def queries():
        for number in range(4):
            yield {"query": number, "caption": "x" * 2**20}
            written.append(sum(file.stat().st_size for file in tmp_path.iterdir()))

    write_rankings(tmp_path / "r.json", {"protocols": {}, "clusters": {}}, {"val": queries()})
    assert all(size > number * 2**20 for number, size in enumerate(written))
    assert len(json.loads((tmp_path / "r.json").read_text())["queries"]["val"]) == 4

    benchmark = Triplets(own_drawn)
    found = []
    for at_once in (1024, 2):
        monkeypatch.setattr(rankings_file, "NAMED_AT_ONCE", at_once)
        found.append(measured(benchmark, tmp_path)[1])
    assert found[0] == found[1]
