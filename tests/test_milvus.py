"""An index in Milvus, on a server that the tests start and in a file: it answers as an index in files does."""

import dataclasses
import json
import logging
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import torch
from PIL import Image

import demo_app
import search
from conftest import CASES, ROOT, SOAK
from forks import HANG, torchrun
from image_search.image_index import open_index
from image_search.manifest import read_manifest
from image_search.searcher import SearchQuery, load_searcher
from image_search.stores import milvus
from image_search.stores.base import Keeping, QueryError, store_address
from runtime import torchrun as launcher
from settings.groups import PairChoice
from test_search import images, refused
from test_stored import refuse_each_wrong_value
from utils import UserError

pytest.importorskip("pymilvus", reason="pip install -r requirements-milvus.txt")
pytest.importorskip("milvus_lite", reason="pip install -r requirements-milvus.txt")

CHOICE = PairChoice(combining_function=None, clip_path=None, combiner_path=None)


class Server:
    """`milvus-lite server` on the loopback interface."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.store = f"milvus:{self.address}"
        self.start()

    def start(self) -> None:
        words = ["server", "--data-dir", self.folder, "--host", "127.0.0.1", "--port", self.port]
        with open(self.folder.with_suffix(".log"), "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "milvus_lite", *map(str, words)], stdout=log, stderr=log
            )
        deadline = time.monotonic() + HANG
        while not self._answers():
            assert self._process.poll() is None, self.folder.with_suffix(".log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def _answers(self) -> bool:
        with socket.socket() as asked:
            return asked.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    started = Server(tmp_path_factory.mktemp("milvus") / "data")
    yield started
    started.stop()


@pytest.fixture(params=["server", "file"])
def store(request, tmp_path) -> str:
    """An address of Milvus, of both kinds."""
    if request.param == "file":
        return f"milvus:{tmp_path / 'lite.db'}"
    return request.getfixturevalue("server").store


# Answers


def test_answers_are_those_of_an_index_in_files_and_a_kind_is_changed_without_encoding_again(
    server, index, ask, tmp_path, encoded
):
    files = images(tmp_path / "photos", 24)
    index(tmp_path / "photos", output=tmp_path / "files")
    for kind in ("hnsw", "ivfflat", "flat"):
        encoded.clear()
        said = index(tmp_path / "photos", flags=["--store", server.store, "--index-type", kind])
        assert ("24 images added, 0 kept" if kind == "hnsw" else "0 images added, 24 kept") in said
        assert sum(encoded) == (24 if kind == "hnsw" else 0)
        about = open_index(tmp_path / "index").table.call("describe_index", index_name="features")
        assert about["index_type"] == milvus.INDEX_TYPES[kind]
        for image in files[:2]:
            theirs = ask(image, "is red", "--json", "--k", 9, of=tmp_path / "files")
            assert json.loads(ask(image, "is red", "--json", "--k", 9)) == json.loads(theirs)
        CASES["stores that answer alike", "read"] += 1


def test_new_changed_and_vanished_files(store, index, ask, tmp_path, encoded, caplog):
    files = images(tmp_path / "photos", 6)
    broken = tmp_path / "photos" / "broken.png"
    broken.write_bytes(b"none")
    flags = ["--store", store]
    assert "6 images added, 0 kept, 0 removed, 1 left out" in index(
        tmp_path / "photos", flags=flags
    )
    encoded.clear()
    assert "0 images added, 6 kept, 0 removed" in index(tmp_path / "photos")  # where it was made
    assert sum(encoded) == 0
    files[1].unlink()
    images(tmp_path / "photos", 2, start=6)
    Image.new("RGB", (30, 31), "white").save(files[2])
    assert "3 images added, 4 kept, 2 removed, 1 left out" in index(tmp_path / "photos")
    assert sum(encoded) == 3
    there = sorted(row["file"] for row in open_index(tmp_path / "index").table.rows())
    assert there == sorted(map(str, (tmp_path / "photos").rglob("*g")))[:-1] or len(there) == 7
    assert str(files[1]) not in ask(files[0], "is red", "--k", 20)


def test_conditions(store, index, ask, tmp_path, capsys):
    files = images(tmp_path / "photos", 8)
    (tmp_path / "photos" / 'a "b"').mkdir()
    shutil.copy(files[1], tmp_path / "photos" / 'a "b"' / "quoted.png")
    index(tmp_path / "photos", flags=["--store", store])
    below = {str(file) for file in files if file.parent.name == "below"}
    size = files[3].stat().st_size
    searcher = load_searcher(tmp_path / "index", CHOICE, torch.device("cpu"))
    for condition, wanted in [
        ('path like "below/%"', below),
        ('category == "below"', below),
        ('category == ""', {str(file) for file in files} - below),
        (f"size == {size}", {str(file) for file in files if file.stat().st_size == size}),
        (f"time > {10**19 - 1 - 10**18}", set()),
    ]:
        query = SearchQuery(references=[files[0]], text="is red", k=20, condition=condition)
        found = {str(result.path) for result in searcher.search([query])[0].results}
        assert found & {str(file) for file in files} == wanted, condition
        CASES["conditions", "taken"] += 1
    out = json.loads(ask(files[0], "is red", "--json", "--filter", f"size == {size}"))
    assert str(files[3]) in [result["image"] for result in out["results"]]
    for condition in ("path like", "size > 'x'", 'size == "connect"', "1 +"):
        query = SearchQuery(references=[files[0]], text="is red", k=20, condition=condition)
        with pytest.raises(QueryError) as error:
            searcher.search([query])
        assert f"--filter {condition}: Milvus rejects it" in str(error.value)
        assert store not in str(error.value)
        CASES["conditions", "refused"] += 1
    assert "Milvus rejects it" in refused(
        lambda: ask(files[0], "is red", "--filter", "path like"), capsys
    )


FOREIGN = [
    "file",
    "row",
    "features",
    "$meta",
    "nothing",
    "connect",
    "FILE",
    "r",
    "json_contains",
    "ﬁle",
    "_x",
]
TAKEN = [
    "", "size > 3", 'path like "a%" and not (time < 0x1F or size in [1, 2.5, -3e5])', "category == 'it is \"file\"'",
    "3<size<=4", 'path != ""&&!(size*2>1)', 'path LIKE "file%" OR true',
    'text_match(path, "row")', "category is not null", 'path == "日本"',
]  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize(
    "condition",
    [
        "{} == 1", '{} like "/tmp/%"', 'path == "a" or {} > ""', "size > 1or {}==1", "path == 'a'{}", '"a"=={}',
        "size>1 and\n{}>2", 'path == "a\\" or {} like "/tmp%"', "path == 'a\\' or {} like '/t%'", "[{}]", "1{} > 2",
        '{}["a"] > 0', "path == \"a' or {} == 'b\" or {} > 1", "size > 1 // \" \n or {} > 1 \"",
    ],
)  # fmt: skip
def test_a_condition_names_few_fields_alone(condition, name):
    """Visitors of the page ask with them, and would find the paths of the machine letter by letter."""
    with pytest.raises(UserError, match="conditions can use path, category, size and time"):
        milvus.check_condition(condition.replace("{}", name))


@pytest.mark.parametrize("condition", TAKEN)
def test_what_a_condition_may_say(condition):
    milvus.check_condition(condition)


def test_conditions_are_for_milvus(index, ask, tmp_path, capsys):
    files = images(tmp_path / "photos", 2)
    index(tmp_path / "photos")
    assert "--filter" in refused(lambda: ask(files[0], "is red", "--filter", "size > 3"), capsys)


def test_the_page_goes_on_from_an_answer(index, tmp_path):
    files = images(tmp_path / "photos", 6)
    index(tmp_path / "photos", flags=["--store", f"milvus:{tmp_path / 'lite.db'}"])
    searcher = load_searcher(tmp_path / "index", CHOICE, torch.device("cpu"))
    assert len(searcher) == 6
    rows = searcher.index.some(4)
    assert len(set(rows)) == 4
    assert {searcher.image(row) for row in searcher.index.some(50)} == set(files)
    for row in (-1, 7, milvus.HIGHEST_ROW, 2**64):
        assert searcher.image(row) is None
    plain = SearchQuery(references=[searcher.image(rows[0])], text="is red", k=3)
    without = dataclasses.replace(plain, without=frozenset([rows[0]]))
    only = dataclasses.replace(plain, condition="size < 0")
    together = searcher.search([plain, only, without])
    assert together == [searcher.search([query])[0] for query in (plain, only, without)]
    assert [len(found.results) for found in together] == [3, 0, 3]
    assert rows[0] not in [result.row for result in together[2].results]


def test_the_page_passes_conditions_on(server, index, tmp_path):
    pytest.importorskip("fastapi", reason="pip install -r requirements-app.txt")
    files = images(tmp_path / "photos", 8)
    index(tmp_path / "photos", flags=["--store", server.store])
    searcher = load_searcher(tmp_path / "index", CHOICE, torch.device("cpu"))
    bound = demo_app.bound_socket("127.0.0.1", 0)
    address = f"http://127.0.0.1:{bound.getsockname()[1]}"
    with (
        demo_app.application(searcher, 8, host="127.0.0.1", names=[], documented=False) as app,
        demo_app.served(app, bound),
    ):

        def asked(**fields: object) -> dict:
            body = urllib.parse.urlencode(fields).encode()
            with urllib.request.urlopen(f"{address}/search", body, HANG) as answer:
                return json.load(answer)

        with urllib.request.urlopen(f"{address}/health") as answer:
            assert json.load(answer)["filters"] is True
        row = searcher.index.some(1)[0]
        everything = asked(row=row, text="is red", k=20)["results"]
        assert {result["name"] for result in everything} == {file.name for file in files}
        below = [result for result in everything if "/below/" in result["path"]]
        assert 0 < len(below) < len(everything)
        said = asked(row=row, text="is red", k=20, filter='path like "below/%"')
        assert said["results"] == below
        target = below[-1]["row"]
        assert asked(row=row, text="is red", k=1, target=target)["rank"] > 1
        with pytest.raises(urllib.error.HTTPError) as error:
            asked(row=row, text="is red", filter="path like")
        assert error.value.code == 400
        told = json.load(error.value)["error"]
        assert told == f"--filter path like: Milvus rejects it: {milvus.CONDITIONS}"


# Interruptions


def same_answers(ours: str, theirs: str) -> None:
    """The same images; batches of other images round their features otherwise."""
    found, expected = json.loads(ours)["results"], json.loads(theirs)["results"]
    assert [result["image"] for result in found] == [result["image"] for result in expected]
    similarities = [result["similarity"] for result in expected]
    assert [result["similarity"] for result in found] == pytest.approx(similarities, abs=2e-6)


KILLED = """
import os, signal, sys
sys.path.insert(0, {source!r})
import search
from image_search import image_index
from image_search.stores import milvus
image_index.SHARD = 3
call = milvus.Table.call
def called(self, method, **about):
    if method == "upsert" and {when}:
        {how}
        os.kill(os.getpid(), signal.SIGKILL)
    return call(self, method, **about)
called.upserts = 0
milvus.Table.call = called
search.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("store", ["file", "server"] if SOAK else ["file"], indirect=True)
def test_an_insert_that_is_killed_goes_on(store, start, index, ask, tmp_path, drawn, encoded):
    """The process dies when two batches are there and a part of the third."""
    files = images(tmp_path / "photos", 10)
    script = tmp_path / "killed.py"
    when = "(setattr(called, 'upserts', called.upserts + 1) or called.upserts == 3)"
    how = 'call(self, method, data=about["data"][:1])'
    script.write_text(KILLED.format(source=str(ROOT / "src"), when=when, how=how))
    words = ["index", "--images", tmp_path / "photos", "--output", tmp_path / "index"]
    words += ["--clip-model-name", drawn / "tiny_clip_vit.pt", "--num-workers", 0]
    process = start(script, *words, "--device", "cpu", "--store", store)
    assert process.wait() == -9, process.stderr
    with pytest.raises(UserError, match="is incomplete"):
        open_index(tmp_path / "index")
    assert "3 images added, 7 kept" in index(tmp_path / "photos", flags=["--store", store])
    assert sum(encoded) == 3
    index(tmp_path / "photos", output=tmp_path / "files")
    there = [row["file"] for row in open_index(tmp_path / "index").table.rows()]
    assert sorted(there) == sorted(map(str, files))
    for image in files[:2]:
        same_answers(
            ask(image, "is red", "--json"), ask(image, "is red", "--json", of=tmp_path / "files")
        )
    CASES["inserts that were killed", "gone on"] += 1


@pytest.mark.slow
def test_two_processes_insert_into_a_server(server, start, index, ask, tmp_path, drawn):
    files = images(tmp_path / "photos", 10)
    script = tmp_path / "two.py"
    script.write_text(KILLED.format(source=str(ROOT / "src"), when="False", how="pass"))
    words = ["index", "--images", tmp_path / "photos", "--output", tmp_path / "index"]
    words += ["--clip-model-name", drawn / "tiny_clip_vit.pt", "--num-workers", 0]
    done = start(*torchrun(2), script, *words, "--device", "cpu", "--store", server.store)
    assert done.wait() == 0, done.stderr
    assert done.stdout.count("10 images added, 0 kept, 0 removed") == 1
    index(tmp_path / "photos", output=tmp_path / "files")
    theirs = ask(files[0], "is red", "--json", "--k", 10, of=tmp_path / "files")
    same_answers(ask(files[0], "is red", "--json", "--k", 10), theirs)


def test_a_file_is_for_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "launched", lambda: True)
    keeping = Keeping(store=f"milvus:{tmp_path / 'x.db'}")
    with pytest.raises(UserError, match="only one process"):
        milvus.MilvusWriter(tmp_path, {}, 8, keeping=keeping, origin={"folders": []})


def test_a_file_that_another_process_has_or_that_is_none(index, tmp_path, capsys):
    images(tmp_path / "photos", 2)
    (tmp_path / "taken.db").write_text("mine")
    said = refused(
        lambda: index(tmp_path / "photos", flags=["--store", f"milvus:{tmp_path / 'taken.db'}"]),
        capsys,
    )
    assert "taken.db" in said
    assert (tmp_path / "taken.db").read_text() == "mine"


# What is refused


def test_a_collection_of_another_encoder(server, index, ask, tmp_path, drawn, capsys):
    files = images(tmp_path / "photos", 3)
    index(tmp_path / "photos", flags=["--store", server.store])
    other = lambda: index(tmp_path / "photos", name=drawn / "tiny_clip_resnet.pt")  # noqa: E731
    assert "contains an index made with different weights" in refused(other, capsys)
    manifest = tmp_path / "index" / "index.json"
    about = json.loads(manifest.read_text())
    for field, value in [("weights", "1" * 64), ("transform", "clip"), ("resolution", 64)]:
        wrong = {**about, "encoder": {**about["encoder"], field: value}}
        manifest.write_text(json.dumps(wrong))
        assert "was made with a different encoder" in refused(lambda: ask(files[0], "x"), capsys)
        CASES["collections of another encoder", "refused"] += 1
    manifest.write_text(json.dumps({**about, "collection": f"gone_{about['collection']}"}))
    assert "has no collection gone_" in refused(lambda: ask(files[0], "x"), capsys)
    assert "no longer has the collection gone_" in refused(
        lambda: index(tmp_path / "photos"), capsys
    )


def test_an_index_stays_where_it_is(server, index, tmp_path, capsys):
    images(tmp_path / "photos", 2)
    index(tmp_path / "photos", flags=["--store", server.store])
    for flags, words in [
        (["--store", "faiss"], "this index is stored in milvus:"),
        (["--store", f"milvus:{tmp_path / 'x.db'}"], "this index is stored in milvus:"),
        (["--index-type", "ivfpq"], "is not supported by"),
        (["--on-disk"], "remove --on-disk"),
    ]:
        assert words in refused(lambda f=flags: index(tmp_path / "photos", flags=f), capsys)
    index(tmp_path / "photos", output=tmp_path / "files")
    to_milvus = ["--store", server.store]
    said = refused(
        lambda: index(tmp_path / "photos", output=tmp_path / "files", flags=to_milvus), capsys
    )
    assert "this index is stored in faiss" in said


def test_each_field_of_a_manifest(tmp_path):
    about = {
        "store": "milvus:http://127.0.0.1:19530",
        "collection": "clip4cir_x_0",
        "kind": "hnsw",
        "encoder": {"weights": "0" * 64, "transform": "clip", "target_ratio": 1.25, "background": "white",
                    "resolution": 32},
        "folders": ["/photos"],
        "unreadable": {"/photos/x.png": "it is empty"},
        "images": 3,
    }  # fmt: skip
    file = tmp_path / "index.json"

    def read(content) -> None:
        file.write_text(json.dumps(content))
        read_manifest(tmp_path)

    refuse_each_wrong_value("fields of Milvus's index.json", about, read, names=[str(tmp_path)])


@pytest.fixture
def given(monkeypatch) -> list[str]:
    """The tokens that Milvus was given."""
    tokens = []
    pymilvus = milvus.import_pymilvus()
    real = pymilvus.MilvusClient

    def client(**how):
        tokens.append(how["token"])
        return real(**how)

    monkeypatch.setattr(pymilvus, "MilvusClient", client)
    return tokens


def test_a_token_comes_from_the_environment_and_goes_nowhere(
    server, index, ask, tmp_path, monkeypatch, caplog, given
):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MILVUS_TOKEN", "root:S3cret")
    files = images(tmp_path / "photos", 2)
    out = index(tmp_path / "photos", flags=["--store", server.store])
    out += ask(files[0], "is red", "--json")
    assert set(given) == {"root:S3cret"}
    written = [file.read_bytes() for file in (tmp_path / "index").rglob("*") if file.is_file()]
    assert b"S3cret" not in b"".join(written)
    assert "S3cret" not in out + caplog.text


def test_a_token_goes_to_no_address_that_only_a_file_names(
    server, index, ask, tmp_path, monkeypatch, caplog, given
):
    files = images(tmp_path / "photos", 2)
    index(tmp_path / "photos", flags=["--store", server.store])
    here = shutil.move(tmp_path / "index", tmp_path / "made")
    shutil.copytree(here, tmp_path / "index")  # as from elsewhere
    monkeypatch.setenv("MILVUS_TOKEN", "root:S3cret")
    given.clear()
    answers = ask(files[0], "is red")
    assert set(given) == {""}
    assert f"MILVUS_TOKEN is not sent to {server.store} unless you pass" in caplog.text
    given.clear()
    assert ask(files[0], "is red", "--store", server.store) == answers
    assert set(given) == {"root:S3cret"}


@pytest.mark.parametrize(
    "text",
    [
        "", "milvus", "milvus:", "milvus:x", "milvus:ftp://h:1", "milvus:http://", "milvus:http://a b", "faiss:x",
        "milvus:http://root:S3cret@host:19530", "milvus:http://host/path?token=S3cret", "milvus:http://h#S3cret",
        "qdrant:http://h", "http://h:19530",
    ],
)  # fmt: skip
def test_addresses_that_are_none(text):
    with pytest.raises(search.argparse.ArgumentTypeError) as error:
        store_address(text)
    assert "S3cret" not in str(error.value)
    CASES["addresses of stores", "refused"] += 1


def test_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert store_address("faiss") == "faiss"
    assert store_address("milvus:x.db") == f"milvus:{tmp_path / 'x.db'}"
    assert store_address("milvus:http://h:19530/") == "milvus:http://h:19530"
    assert store_address("milvus:https://h") == "milvus:https://h"
    CASES["addresses of stores", "taken"] += 4


def test_pymilvus_is_asked_for_where_it_is_needed(index, tmp_path, monkeypatch, capsys):
    images(tmp_path / "photos", 2)
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    flags = ["--store", f"milvus:{tmp_path / 'x.db'}"]
    said = refused(lambda: index(tmp_path / "photos", flags=flags), capsys)
    assert "requirements-milvus.txt" in said
    assert not (tmp_path / "index").exists()


def test_a_row_is_a_files_own():
    names = [f"/photos/{number}.jpg" for number in range(5000)]
    rows = {milvus.row_of(name) for name in names}
    assert len(rows) == len(names)
    assert all(0 <= row <= milvus.HIGHEST_ROW for row in rows)


@pytest.mark.parametrize(
    ("file", "folders", "path"),
    [
        ("/a/b/c.png", ["/a"], "b/c.png"),
        ("/a/b/c.png", ["/a", "/a/b"], "b/c.png"),
        ("/a/b/c.png", ["/a/", "/z"], "b/c.png"),
        ("/ab/c.png", ["/a"], "c.png"),
        ("/c.png", ["/"], "c.png"),
    ],
)
def test_where_an_image_lies(file, folders, path):
    assert milvus.path_below(file, folders) == path


def test_an_image_that_lies_elsewhere_for_conditions_now_is_found_there(
    server, index, ask, tmp_path
):
    """Its folder was indexed as a part of another, and is one of its own now."""
    files = images(tmp_path / "photos", 4)
    index(tmp_path / "photos", flags=["--store", server.store])
    search.main(
        ["index", "--output", str(tmp_path / "index"), "--images", str(tmp_path / "photos/below")]
        + ["--forget", str(tmp_path / "photos"), "--num-workers", "0"]
    )
    out = json.loads(ask(files[0], "is red", "--json", "--filter", 'path == "0.jpg"'))
    assert [Path(result["image"]).name for result in out["results"]] == ["0.jpg"]


def test_a_server_that_is_gone(server, index, ask, tmp_path, capsys):
    """The last test of the server."""
    files = images(tmp_path / "photos", 3)
    index(tmp_path / "photos", flags=["--store", server.store])
    before = ask(files[0], "is red", "--json")
    server.stop()
    for attempt in (lambda: ask(files[0], "is red"), lambda: index(tmp_path / "photos")):
        assert f"--store {server.store}: " in refused(attempt, capsys)
        CASES["servers that are gone", "refused"] += 1
    server.start()
    deadline = time.monotonic() + HANG
    while True:  # a page goes on asking; its connection is tried again after a while
        try:
            assert ask(files[0], "is red", "--json") == before
            break
        except SystemExit:
            assert time.monotonic() < deadline
            time.sleep(0.1)
