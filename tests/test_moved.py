"""Indexes whose images move: what is there under another name keeps its features, and answers say what is gone."""

import json
import os
import shutil
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import demo_app
import search
from conftest import SOAK
from forks import HANG
from image_search.image_index import open_index
from image_search.searcher import load_searcher
from settings.groups import PairChoice
from test_search import images, refused

STORES = ["faiss", "milvus"]
# What is decided before a store is asked is tried with one; `make soak` tries both.
either_store = pytest.mark.parametrize("store", STORES if SOAK else STORES[:1], indirect=True)


@pytest.fixture(params=STORES)
def store(request, tmp_path) -> str:
    """Where an index lives."""
    if request.param == "faiss":
        return "faiss"
    pytest.importorskip("milvus_lite", reason="pip install -r requirements-milvus.txt")
    return f"milvus:{tmp_path / 'lite.db'}"


def features(folder: Path) -> dict[str, np.ndarray]:
    """Image -> its features in an index."""
    opened = open_index(folder)
    rows = {str(opened.file(row)[0]): row for row in opened.some(1000)}
    return {path: opened.features_of(row) for path, row in rows.items()}


def moved_to(new: Path, old: Path) -> None:
    """Move a folder as a download or an unpacked archive would: with other times."""
    shutil.copytree(old, new, copy_function=shutil.copyfile)
    shutil.rmtree(old)


def check_features(folder: Path, index, anew: Path) -> None:
    """An index has the features of its images as they are now."""
    there = features(folder)
    index(*open_index(folder).about["folders"], output=anew)
    wanted = features(anew)
    assert there.keys() == wanted.keys()
    for path, row in wanted.items():
        np.testing.assert_allclose(there[path], row, atol=1e-4, err_msg=path)


@either_store
def test_a_renamed_folder_is_not_encoded_again(store, index, tmp_path, encoded):
    images(tmp_path / "photos", 6)
    index(tmp_path / "photos", flags=["--store", store])
    encoded.clear()
    vectors = {file.name for file in (tmp_path / "index").glob("*-*") if "files" not in file.name}
    moved_to(tmp_path / "pictures", tmp_path / "photos")
    out = index(tmp_path / "pictures")
    assert "0 images added, 6 kept, 0 removed" in out
    assert "6 indexed images had moved" in out
    assert encoded == []
    kept = {file.name for file in (tmp_path / "index").glob("*-*") if "files" not in file.name}
    assert kept == vectors  # of an index in files, which are not written again
    assert open_index(tmp_path / "index").about["folders"] == [str(tmp_path / "pictures")]
    check_features(tmp_path / "index", index, tmp_path / "anew")


def test_renamed_images_and_their_copies(store, index, tmp_path, encoded):
    """Names go round, a copy stays with its original, and one name is that of another image now."""
    files = images(tmp_path / "photos", 5)
    shutil.copy(files[0], tmp_path / "photos" / "copy.jpg")
    index(tmp_path / "photos", flags=["--store", store])
    assert sum(encoded) == 5  # copies once
    encoded.clear()
    last = files[4].rename(tmp_path / "photos" / "last.jpg")
    shutil.copy(last, tmp_path / "photos" / "last copy.jpg")
    for old, new in [(2, 4), (0, 2)]:
        files[old].rename(files[new])
    Image.new("RGB", (40, 41), "white").save(files[0])
    (tmp_path / "photos" / "copy.jpg").touch()
    assert "2 images added, 6 kept, 0 removed" in index(tmp_path / "photos")
    assert sum(encoded) == 1
    check_features(tmp_path / "index", index, tmp_path / "anew")


@either_store
def test_a_folder_that_is_gone_goes_only_with_its_images(store, index, tmp_path, capsys, encoded):
    files = images(tmp_path / "photos", 3)
    images(tmp_path / "others", 2, start=7)
    index(tmp_path / "photos", flags=["--store", store])
    encoded.clear()
    files[2].unlink()
    moved_to(tmp_path / "pictures", tmp_path / "photos")
    said = refused(lambda: index(tmp_path / "pictures", tmp_path / "others"), capsys)
    assert "1 of its images (such as " in said
    assert str(files[2]) in said
    assert encoded == []
    assert "2 images added, 2 kept, 1 removed" in index(
        tmp_path / "pictures", tmp_path / "others", flags=["--forget", tmp_path / "photos"]
    )


def test_a_library_is_relocated(store, index, ask, tmp_path, encoded, capsys, caplog):
    files = images(tmp_path / "photos", 6)
    index(tmp_path / "photos", flags=["--store", store])
    before = features(tmp_path / "index")
    encoded.clear()
    new = tmp_path / "disk" / "photos"
    moved_to(new, tmp_path / "photos")
    (new / files[1].name).unlink()
    changed = new / files[3].name
    was, content = changed.stat(), bytearray(changed.read_bytes())
    content[-1] ^= 1
    changed.write_bytes(content)
    os.utime(changed, ns=(was.st_atime_ns, was.st_mtime_ns))
    words = ["index", "--output", tmp_path / "index", "--relocate", tmp_path / "photos", new]
    search.main(list(map(str, words)))
    out = capsys.readouterr().out
    assert "6 paths rewritten; 1 of these images have changed content, 1 are missing" in out
    assert f"{changed} has changed since it was indexed" in caplog.text
    assert f"{new / files[1].name} is missing" in caplog.text
    there = features(tmp_path / "index")
    assert there.keys() == {path.replace(str(tmp_path / "photos"), str(new)) for path in before}
    for path, row in before.items():
        assert np.array_equal(there[path.replace(str(tmp_path / "photos"), str(new))], row)
    assert encoded == []
    assert "1 images added, 4 kept, 2 removed" in index(new)
    assert sum(encoded) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere", "pictures"], "no image of the index is in the old folder"),
        (["photos", "nowhere"], "nowhere is not a folder"),
        (["photos", "pictures"], "no image of the index is in the new folder"),
        (
            ["photos", "pictures", "--images", "pictures"],
            "--images cannot be combined with --relocate",
        ),
    ],
)
def test_a_move_to_where_nothing_is(words, said, index, tmp_path, monkeypatch, capsys):
    images(tmp_path / "photos", 2)
    (tmp_path / "pictures").mkdir()
    index(tmp_path / "photos")
    before = {file: file.read_bytes() for file in (tmp_path / "index").glob("*.*")}
    monkeypatch.chdir(tmp_path)
    assert said in refused(
        lambda: search.main(["index", "--output", "index", "--relocate", *words]), capsys
    )
    assert {file: file.read_bytes() for file in (tmp_path / "index").glob("*.*")} == before


# Answers


def test_answers_say_what_is_gone_and_what_is_a_copy(store, index, ask, tmp_path):
    files = images(tmp_path / "photos", 4)
    for number in range(3):
        shutil.copy(files[1], tmp_path / "photos" / f"copy {number}.png")
    Image.open(files[1]).save(tmp_path / "photos" / "same.bmp")  # other bytes, the same pixels
    index(tmp_path / "photos", flags=["--store", store])
    files[0].unlink()
    answers = json.loads(ask(files[1], "is red", "--json", "--k", 20))["results"]
    assert [answer["image"] for answer in answers if answer["is_gone"]] == [str(files[0])]
    copies = [answer for answer in answers if answer["copy_of"]]
    assert len(copies) == 4
    (original,) = {answer["copy_of"] for answer in copies}
    assert original in [answer["image"] for answer in answers if not answer["copy_of"]]
    place = 1 + [answer["image"] for answer in answers].index(original)
    lines = ask(files[1], "is red", "--k", 20).splitlines()
    assert sum(line.endswith(f"(copy of {place})") for line in lines) == 4
    assert [line for line in lines if line.endswith(f"{files[0]} (gone)")]
    distinct = json.loads(ask(files[1], "is red", "--json", "--k", 4, "--distinct"))["results"]
    assert distinct == [answer for answer in answers if not answer["copy_of"]]
    least = answers[2]["similarity"]
    near = json.loads(
        ask(files[1], "is red", "--json", "--k", 20, "--min-similarity", least - 1e-6)
    )["results"]
    assert near == [answer for answer in answers if answer["similarity"] >= least]
    nothing = json.loads(ask(files[1], "is red", "--json", "--min-similarity", 1))
    assert nothing["results"] == []
    assert f"{answers[0]['similarity']:.4f}" in nothing["note"]


def test_a_page_of_answers_says_it_too(index, ask, tmp_path):
    files = images(tmp_path / "photos", 3)
    shutil.copy(files[1], tmp_path / "photos" / "copy.png")
    index(tmp_path / "photos")
    files[0].unlink()
    ask(files[1], "is red", "--html", tmp_path / "answers.html")
    page = (tmp_path / "answers.html").read_text()
    assert page.count("(gone)") == page.count("(copy of ") == 1


def test_programs_are_told_it_too(index, tmp_path):
    pytest.importorskip("fastapi", reason="pip install -r requirements-app.txt")
    files = images(tmp_path / "photos", 3)
    shutil.copy(files[1], tmp_path / "photos" / "copy.png")
    index(tmp_path / "photos")
    files[0].unlink()
    choice = PairChoice(combining_function=None, clip_path=None, combiner_path=None)
    searcher = load_searcher(tmp_path / "index", choice, torch.device("cpu"))
    bound = demo_app.bound_socket("127.0.0.1", 0)
    address = f"http://127.0.0.1:{bound.getsockname()[1]}/search"
    body = urllib.parse.urlencode({"row": searcher.index.row(str(files[1])), "text": "is red"})
    with (
        demo_app.application(searcher, 8, host="127.0.0.1", names=[], documented=False) as app,
        demo_app.served(app, bound),
        urllib.request.urlopen(address, body.encode(), HANG) as answered,
    ):
        answers = json.load(answered)["results"]
    assert [answer["name"] for answer in answers if answer["is_gone"]] == [files[0].name]
    (copy,) = [answer for answer in answers if answer["copy_of"] is not None]
    (original,) = [answer for answer in answers if answer["row"] == copy["copy_of"]]
    assert {copy["name"], original["name"]} == {"copy.png", files[1].name}


# A reader makes nothing


@pytest.mark.parametrize("left", ["nothing", "no folder", "an empty folder"])
def test_a_store_that_is_gone_is_not_made_anew(left, index, ask, tmp_path, capsys):
    servers = pytest.importorskip(
        "milvus_lite.server_manager", reason="pip install -r requirements-milvus.txt"
    )
    files = images(tmp_path / "photos", 2)
    place = tmp_path / "stores" / "lite.db"
    index(tmp_path / "photos", flags=["--store", f"milvus:{place}"])
    # As where the process ends that encoded; its server would still write there.
    servers.server_manager_instance.release_server(str(place))
    place.rename(tmp_path / "moved.db")
    if left == "no folder":
        place.parent.rmdir()
    elif left == "an empty folder":
        place.mkdir()
    before = sorted(tmp_path.rglob("*"))
    for attempt in (lambda: ask(files[0], "is red"), lambda: index(tmp_path / "photos")):
        said = refused(attempt, capsys)
        assert f"{place}, which contains the features of the index, is missing" in said
        assert "restore it" in said
        assert sorted(tmp_path.rglob("*")) == before
    place.parent.mkdir(exist_ok=True)
    shutil.rmtree(place, ignore_errors=True)
    (tmp_path / "moved.db").rename(place)
    assert ask(files[0], "is red")


# Text alone, image alone


def asked(capsys, *words: object) -> str:
    capsys.readouterr()
    search.main(list(map(str, ["query", *words, "--device", "cpu"])))
    return capsys.readouterr().out


def test_text_alone_and_image_alone(index, tmp_path, capsys):
    files = images(tmp_path / "photos", 5)
    index(tmp_path / "photos")
    of = ["--index", tmp_path / "index", "--json"]
    for given, named in [
        (["--text", "is red"], ["--image", files[0]]),
        (["--image", files[0]], ["--text", "is red"]),
    ]:
        alone = given[0][2:]
        by_name = asked(capsys, *of, *given, "--combining-function", alone)
        assert by_name == asked(capsys, *of, *given)  # what is given says it
        assert by_name == asked(capsys, *of, *given, *named, "--combining-function", alone)
        assert by_name != asked(capsys, *of, *given, *named)
        page = tmp_path / f"{alone}.html"
        asked(capsys, "--index", tmp_path / "index", *given, "--html", page)
        assert page.read_text().count("<figure") == 5 + (alone == "image")
    for words, said in [
        ([], "--image is missing"),
        (["--text", "is red", "--combining-function", "sum"], "--image is missing"),
        (["--image", files[0], "--combining-function", "sum"], "--text is missing"),
        (["--text", "is red", "--combining-function", "image"], "--image is missing"),
    ]:
        assert said in refused(lambda w=words: asked(capsys, *of, *w), capsys)


def test_the_commands_are_named(capsys):
    assert "{index,query}" in refused(lambda: search.main([]), capsys)
