"""The servers' rules, locally: each broken one by its query; files for val score as validate.py measures."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import CIRR, FashionIQ, server_files
from test_protocols import golden_pair

SUM = ["--combining-function", "sum"]


@pytest.fixture
def name(drawn):
    return ["--clip-model-name", drawn / "tiny_clip_vit.pt", *SUM]


@pytest.fixture
def submit(run, drawn, name):
    """Write a submission; returns its folder."""

    def submit(dataset, *flags, root=drawn):
        door = f"{dataset}_test_submission"
        return run(door, root, "--submission-name", "x", *name, *flags, output=dataset)

    return submit


@pytest.fixture(scope="module")
def written() -> dict[tuple[str, str], str]:
    """What submissions that several tests change have in their files."""
    return {}


@pytest.fixture
def files_of(submit, written, tmp_path):
    """The files of a submission by name, of answers that are written once for all tests."""

    def files_of(dataset, *names):
        if (dataset, names[0]) not in written:
            folder = submit(dataset)
            written.update({(dataset, name): (folder / name).read_text() for name in names})
        files = [tmp_path / "files" / name for name in names]
        for file, name in zip(files, names, strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(written[dataset, name])
        return files

    return files_of


@pytest.fixture
def cirr(files_of):
    return files_of("cirr", "recall_submission_x.json", "recall_subset_submission_x.json")


@pytest.fixture
def fashioniq(files_of):
    return files_of("fashioniq", *(f"x/{category}.test.pred.json" for category in FashionIQ.parts))


def test_what_is_written_keeps_all_rules(submit, check, caplog):
    caplog.set_level("INFO")
    files = submit("cirr").glob("*.json")
    assert caplog.text.count("obeys all rules of the server") == 2
    code, out = check(*files)
    assert code == 0
    assert "note: test1 has 30 queries here, but 4148 in the official annotations" in out
    assert out.count("obeys all rules") == 2


def change(file, edit):
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def first_query(root):
    (split,) = CIRR(root).test()
    return split.triplets[0], split


CASES = [
    (0, lambda c, k, t: c.update(version="rc1"), '"version" is "rc1", not rc2'),
    (0, lambda c, k, t: c.pop("version"), '"version" is null, not rc2'),
    (0, lambda c, k, t: c.update(metric="r"), '"metric" is "r", not recall or recall_subset'),
    (0, lambda c, k, t: c.update(metric=[1]), '"metric" is [1]'),
    (0, lambda c, k, t: c.pop(k), "pairid {k}: missing"),
    (0, lambda c, k, t: c.update({"9999": c[k]}), "pairid 9999: not a query of test1"),
    (0, lambda c, k, t: c[k].pop(), "pairid {k}: 16 ids instead of 17"),
    (0, lambda c, k, t: c[k].append("more"), "pairid {k}: more is not an image of test1"),
    (0, lambda c, k, t: c[k].__setitem__(0, c[k][1]), "pairid {k}: {second} occurs 2 times"),
    (
        0,
        lambda c, k, t: c[k].__setitem__(0, t.reference),
        "pairid {k}: the ids include its own reference {reference}",
    ),
    (
        0,
        lambda c, k, t: c[k].__setitem__(0, c[k][0] + ".png"),
        "write {first}, without path and extension",
    ),
    (
        0,
        lambda c, k, t: c[k].__setitem__(0, f"./test1/{c[k][0]}.png"),
        "write {first}, without path and extension",
    ),
    (0, lambda c, k, t: c.update({k: "text"}), "pairid {k}: not a list of image ids"),
    (0, lambda c, k, t: c.update({k: [1, 2]}), "pairid {k}: not a list of image ids"),
    (1, lambda c, k, t: c[k].append(c[k][0]), "pairid {k}: 4 ids instead of 3"),
    (
        1,
        lambda c, k, t: c[k].__setitem__(0, "test1-2-0-img0"),
        "pairid {k}: test1-2-0-img0 is not in the query's group",
    ),
    (1, lambda c, k, t: c.update(metric="recall"), "pairid {k}: 3 ids instead of 17"),
    (0, lambda c, k, t: c.update(metric="recall_subset"), "pairid {k}: 17 ids instead of 3"),
]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_every_rule_of_cirr(number, cirr, check, drawn):
    which, edit, expected = CASES[number]
    file = cirr[which]
    triplet, _ = first_query(drawn)
    key = str(triplet.pair_id)
    first, second = json.loads(file.read_text())[key][:2]
    if "test1-2-0-img0" in expected:
        assert "test1-2-0-img0" not in triplet.group
    change(file, lambda content: edit(content, key, triplet))
    code, out = check(file)
    assert code == 1
    words = {"k": key, "first": first, "second": second, "reference": triplet.reference}
    assert expected.format(**words) in out
    assert f"{file}: obeys all rules" not in out


def test_a_file_that_is_too_large(cirr, check):
    file = cirr[0]
    file.write_text(file.read_text() + " " * 5_000_000)
    code, out = check(file)
    assert code == 1
    assert "bytes, more than 5,000,000" in out


@pytest.mark.parametrize(
    "text", ["", "{", "3", '{"version": "rc2", "version": "rc2"}', "[" * 100_000, None]
)
def test_files_that_cannot_be_read(text, check, cirr, tmp_path):
    file = tmp_path / "s.json"
    if text is not None:
        file.write_text(text)
    code, err = check(cirr[0], file)
    assert code == 2
    assert f"error: {file}" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "dataset"), [("[]", "CIRR"), ("{}", "FashionIQ"), ("[]", "CIRCO")]
)
def test_a_file_that_no_server_of_a_benchmark_takes(text, dataset, check, tmp_path):
    (tmp_path / "x.json").write_text(text)
    code, out = check(tmp_path / "x.json", "--dataset", dataset)
    assert code == 2
    assert f"no submission to {dataset}" in out


def test_a_second_form_of_a_benchmark(monkeypatch):
    """A class and its name among the forms; files are told apart by what they hold."""

    class Newer(server_files.CirrForm):
        version = "rc3"

        @classmethod
        def fits(cls, content):
            return super().fits(content) and content.get("version") == cls.version

    monkeypatch.setattr(server_files, "FORMS", (Newer, *server_files.FORMS))
    for version, form in (
        ("rc3", Newer),
        ("rc2", server_files.CirrForm),
        ("rc1", server_files.CirrForm),
    ):
        content = {"version": version, "metric": "recall"}
        for dataset in (None, "CIRR"):
            assert server_files.form_of(Path("x.json"), content, dataset) is form


@pytest.mark.slow
def test_val_files_score_as_validate_measures(run, golden, tmp_path, capsys, check):
    for dataset in ("CIRR", "FashionIQ"):
        door = f"{dataset.lower()}_test_submission"
        flags = golden_pair(golden, dataset)
        run("validate", golden, "--dataset", dataset, *flags, "--metrics-json", tmp_path / "m.json")
        capsys.readouterr()
        folder = run(
            door, golden, *flags, "--submission-name", "x", "--split", "val", output=dataset
        )
        printed = dict(line.split(" = ") for line in capsys.readouterr().out.splitlines())
        metrics = json.loads((tmp_path / "m.json").read_text())["metrics"]
        assert {name: float(value) for name, value in printed.items()} == metrics
        files = list(folder.rglob("*.json"))
        code, out = check(
            *files, "--split", "val", "--metrics-json", tmp_path / "s.json", root=golden
        )
        assert code == 0
        scored = [line.split(" = ") for line in out.splitlines() if " = " in line]
        assert {name: float(value) for name, value in scored} == metrics
        assert json.loads((tmp_path / "s.json").read_text())["metrics"] == metrics
        code, out = check(files[0], "--split", "val", root=golden)
        assert code == 0  # obeys all rules, but is not all that is scored
        assert "note: " in out
        assert "not scored" in out
        flags = ["--split", "val", "--metrics-json", tmp_path / "none.json"]
        (tmp_path / dataset / "again").mkdir()
        again = shutil.copy(files[0], tmp_path / dataset / "again" / files[0].name)
        for some in (files[:1], [*files, again]):
            assert check(*some, *flags, root=golden)[0] == 2
        assert not (tmp_path / "none.json").exists()


def test_a_submission_answers_all_queries(submit, fails, drawn, own_drawn, name, tmp_path, caplog):
    triplet, _ = first_query(drawn)
    listed = tmp_path / "bad.json"
    listed.write_text(json.dumps({"dataset": "CIRR", "images": {triplet.reference: "missing"}}))
    error = fails(
        "cirr_test_submission", drawn, "--submission-name", "x", *name, "--exclusions", listed
    )
    assert "--exclusions excludes" in error
    assert not list(tmp_path.glob("out/*"))
    images = own_drawn / "cirr_dataset/cirr/image_splits/split.rc2.test1.json"
    change(images, lambda paths: paths.update(spare="./test1/spare.png"))
    listed.write_text(json.dumps({"dataset": "CIRR", "images": {"spare": "missing"}}))
    with pytest.raises(SystemExit) as stop:  # 17 ids where 18 are asked for
        submit("cirr", "--exclusions", listed, root=own_drawn)
    assert stop.value.code == 1
    assert "breaks rules of the server" in caplog.text


def test_fashioniq_predictions_have_the_official_form(fashioniq, drawn, check):
    for file, split in zip(fashioniq, FashionIQ(drawn).test(), strict=True):
        entries = json.loads(
            (drawn / f"fashionIQ_dataset/captions/cap.{split.name}.test.json").read_text()
        )
        content = json.loads(file.read_text())
        assert [{k: v for k, v in entry.items() if k != "ranking"} for entry in content] == entries
        for entry in content:
            assert sorted(entry["ranking"]) == sorted(split.names)  # 12 images, the reference kept
    assert check(*fashioniq)[0] == 0


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda c: c.pop(), "5 entries instead of 6"),
        (lambda c: c[2].update(candidate="x"), "entry 2 (candidate "),
        (
            lambda c: c[2].update(captions=["a", "b"]),
            "not the entry at this position in the captions file",
        ),
        (lambda c: c[2].pop("ranking"), '"ranking" is not a list of image ids'),
        (lambda c: c[2]["ranking"].pop(), "11 ids, fewer than 12"),
        (lambda c: c[2]["ranking"].__setitem__(0, "x"), "x is not an image of dress"),
        (lambda c: c.__setitem__(0, 3), "entry 0 (candidate "),
    ],
)
def test_every_rule_of_fashioniq(edit, expected, fashioniq, check):
    file = fashioniq[0]
    change(file, edit)
    code, out = check(file)
    assert code == 1
    assert expected in out


def test_a_prediction_without_its_category(fashioniq, check, tmp_path):
    file = tmp_path / "pred.json"
    file.write_text(fashioniq[0].read_text())
    code, out = check(file)
    assert code == 1
    assert "does not begin with a category" in out
