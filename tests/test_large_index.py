"""Indexes that outgrow a process: made by several, in bounded memory, grown instead of built anew, lists in a file."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from conftest import CASES, ROOT
from forks import torchrun
from image_search import faiss_index, image_index, list_file
from image_search.image_index import open_index
from image_search.stores import faiss
from image_search.stores.base import Keeping, chosen_keeping
from image_search.stores.faiss import FaissWriter
from test_search import images, refused
from utils import UserError

DIM = 16
KEY = {
    "weights": "0" * 64, "transform": "targetpad", "target_ratio": 1.25, "background": "white", "resolution": 32,
}  # fmt: skip
LARGE = [("flat", False), ("hnsw", False), ("ivfpq", False), ("ivfpq", True)]


def identities(count: int) -> list:
    return [(f"/photos/{number:06}.png", 100, 10**18) for number in range(count)]


@pytest.fixture(autouse=True)
def few_are_enough_to_compress(monkeypatch):
    monkeypatch.setattr(faiss_index, "LEAST_TRAINED_ON", 1000)


def drawn_features() -> np.ndarray:
    """Near few centres."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(50, DIM))
    rows = centres[np.arange(1500) % 50] + 0.3 * rng.normal(size=(1500, DIM))
    return rows.astype(np.float32)


FEATURES = drawn_features()


def features_of(files: list) -> np.ndarray:
    """Features that follow from a file."""
    return FEATURES[[int(Path(path).stem) for path, _, _ in files]]


def published(folder: Path, files: list, kind: str, on_disk: bool = False):
    """Bring an index of drawn features up to date, and open it."""
    folder.mkdir(exist_ok=True)
    writer = FaissWriter(folder, KEY, DIM, keeping=Keeping(kind=kind, on_disk=on_disk), origin={})
    writer.open()
    held = writer.held()
    missing = [file for file in files if file not in held]
    for start in range(0, len(missing), 300):
        part = missing[start : start + 300]
        writer.keep(part, features_of(part), [0] * len(part))
    return writer.publish(sorted(files), {"folders": ["/photos"], "unreadable": {}})


# Several processes

SHARDED = """
import os, signal, sys, time
sys.path.insert(0, {source!r})
import search
from image_search import image_index
from image_search.stores.faiss import FaissWriter
from runtime.interruption import StopRequest
image_index.SHARD = 3
told = []
StopRequest.handle = lambda request, number, frame, handle=StopRequest.handle: (
    handle(request, number, frame), told.append(number)
)
def have_all_told_to_stop():
    os.kill(os.getppid(), signal.SIGTERM)
    while not told:
        time.sleep(0.01)
keep = FaissWriter.keep
def kept(self, *features):
    keep(self, *features)
    {then}
FaissWriter.keep = kept
search.main(sys.argv[1:])
"""
DIES = 'os.environ["RANK"] == "1" and os.kill(os.getpid(), signal.SIGKILL)'
TOLD = 'os.environ["RANK"] == "1" and have_all_told_to_stop()'


@pytest.fixture
def index_together(start, drawn, tmp_path):
    """Index tmp_path/photos in two processes, each of which does something after a shard."""

    def index_together(output: Path, then: str = "pass"):
        script = tmp_path / "sharded.py"
        script.write_text(SHARDED.format(source=str(ROOT / "src"), then=then))
        words = ["index", "--images", tmp_path / "photos", "--output", output]
        words += ["--clip-model-name", drawn / "tiny_clip_vit.pt", "--num-workers", 0]
        process = start(*torchrun(2), script, *words, "--device", "cpu")
        process.wait()
        return process

    return index_together


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of an index's files by what they are; of the manifest what does not name them."""
    parts = {}
    for file in folder.iterdir():
        if file.is_file() and file.name != "index.json":
            parts[file.name.partition("-")[0]] = file.read_bytes()
    about = json.loads((folder / "index.json").read_text())
    # The seal is of the folder itself.
    parts["about"] = {name: about[name] for name in sorted(set(about) - set(parts) - {"made_here"})}
    return parts


@pytest.mark.slow
def test_two_processes_make_the_index_of_one(index, index_together, tmp_path, monkeypatch):
    monkeypatch.setattr(image_index, "SHARD", 3)
    files = images(tmp_path / "photos", 11)
    files[0].write_bytes(b"none")  # in the first's part
    files[9].write_bytes(b"none")  # in the second's
    done = index_together(tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("9 images added, 0 kept, 0 removed, 2 left out") == 1
    index(tmp_path / "photos", output=tmp_path / "one")
    assert content(tmp_path / "one") == content(tmp_path / "two")
    again = index_together(tmp_path / "two")
    assert "0 images added, 9 kept, 0 removed, 2 left out" in again.stdout, again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("then", [DIES, TOLD], ids=["dies", "is told to stop"])
def test_what_was_encoded_is_there_the_next_time(
    then,
    index,
    index_together,
    tmp_path,
    encoded,
):
    images(tmp_path / "photos", 12)
    done = index_together(tmp_path / "index", then)
    assert not (tmp_path / "index" / "index.json").exists(), done.stderr
    assert done.returncode != 0 or then != DIES
    shards = list((tmp_path / "index" / "partial").glob("*.pt"))
    assert shards
    assert ("encoded features are kept" in done.stderr) or then == DIES
    assert "12 images added" in index(tmp_path / "photos")
    assert sum(encoded) == 12 - 3 * len(shards)


# Nothing more than needed


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_an_update_with_nothing_new_looks_at_each_file_once_and_reads_no_vectors(
    kind,
    index,
    tmp_path,
    monkeypatch,
):
    files = images(tmp_path / "photos", 6)
    index(tmp_path / "photos", flags=["--index-type", kind])
    looked_at = []
    real = os.lstat
    monkeypatch.setattr(
        os, "lstat", lambda path, **how: looked_at.append(Path(path)) or real(path, **how)
    )
    for module, name in [(faiss_index, "read"), (list_file, "read"), (faiss, "publish")]:
        monkeypatch.setattr(module, name, None)
    assert "0 images added, 6 kept" in index(tmp_path / "photos")
    assert sorted(path for path in looked_at if path in files) == sorted(files)


def damages(whole: bytes) -> list[bytes | None]:
    """A file that is gone, cut or longer."""
    return [None, whole[:-1], whole + b"\0"]


def put(file: Path, damaged: bytes | None) -> None:
    file.unlink(missing_ok=True)
    if damaged is not None:
        file.write_bytes(damaged)


def test_an_update_with_nothing_new_refuses_a_damaged_index(index, tmp_path, capsys):
    images(tmp_path / "photos", 3)
    index(tmp_path / "photos")
    for part in ("files", "features", "vectors"):
        (file,) = (tmp_path / "index").glob(f"{part}*")
        whole = file.read_bytes()
        for damaged in damages(whole):
            if part == "features" and damaged == whole + b"\0":
                continue  # what follows a table in a file of NumPy's is not read
            put(file, damaged)
            assert file.name in refused(lambda: index(tmp_path / "photos"), capsys)
            CASES["updates of a damaged index", "refused"] += 1
            file.write_bytes(whole)
    assert "0 images added, 3 kept" in index(tmp_path / "photos")


@pytest.mark.parametrize(("kind", "on_disk"), LARGE)
def test_features_pass_in_blocks(kind, on_disk, tmp_path, monkeypatch):
    """However many images there are, so many rows are in memory at once; more only to train on."""
    monkeypatch.setattr(faiss_index, "ADDED_AT_ONCE", 300)
    monkeypatch.setattr(list_file, "IN_MEMORY", 500)
    monkeypatch.setattr(faiss_index, "TRAINED_ON_PER_LIST", 16)
    sizes = []
    real = faiss_index.normalised
    monkeypatch.setattr(
        faiss_index, "normalised", lambda rows: sizes.append(len(rows)) or real(rows)
    )
    gathered = []
    real_rows = FaissWriter._rows
    monkeypatch.setattr(
        FaissWriter,
        "_rows",
        lambda self, files, start, stop: (
            gathered.append(stop - start) or real_rows(self, files, start, stop)
        ),
    )
    files = identities(1200)
    published(tmp_path, files, kind, on_disk)
    published(tmp_path, files[1:] + [("/photos/000000.png", 7, 7)], kind, on_disk)
    assert max(gathered) == 300
    trained_on = {round(1200**0.5) * 16} if kind == "ivfpq" else set()
    assert {size for size in sizes if size > 300} == trained_on
    opened = open_index(tmp_path)
    np.testing.assert_array_equal(opened.features, features_of(opened.files))


# Growth


@pytest.mark.parametrize(("kind", "on_disk"), LARGE)
def test_new_images_are_added_and_removed_ones_build_it_anew(kind, on_disk, tmp_path, monkeypatch):
    files = identities(1100)
    first = [file for file in files if int(Path(file[0]).stem) % 11]
    published(tmp_path, first, kind, on_disk)
    built = []
    real = faiss_index.trained
    monkeypatch.setattr(faiss_index, "trained", lambda *about: built.append(1) or real(*about))
    assert published(tmp_path, files, kind, on_disk) == (100, 1000, 0, 0)
    assert len(built) == (kind == "flat")
    grown = open_index(tmp_path)
    assert sorted(grown.files) == files
    assert grown.files[:1000] == first or kind == "flat"
    assert faiss_index.recall_report(grown.vectors, grown.features)["recall"] > 0.8
    for row in (3, 1050):
        ((hit,),) = grown.search(faiss_index.normalised(grown.features_of(row)), 1)
        assert (hit.row, str(hit.path)) == (row, grown.files[row][0])
    built.clear()
    assert published(tmp_path, files[:-1], kind, on_disk) == (0, 1099, 1, 0)
    assert built
    assert open_index(tmp_path).files == files[:-1]
    assert len(list(tmp_path.glob("lists-*"))) == on_disk


def test_an_index_that_outgrew_its_lists_is_built_anew():
    index = faiss_index.trained(features_of(identities(1000)), "ivfpq")
    assert faiss_index.can_grow(index, 4 * 32**2)
    assert not faiss_index.can_grow(index, 4 * 32**2 + 1)


# Lists in a file


def test_lists_in_a_file_give_the_answers_of_lists_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(list_file, "IN_MEMORY", 400)
    files = identities(1000)
    published(tmp_path / "memory", files, "ivfpq")
    published(tmp_path / "disk", files, "ivfpq", True)
    (tmp_path / "disk").rename(tmp_path / "moved")
    memory, moved = open_index(tmp_path / "memory"), open_index(tmp_path / "moved")
    queries = faiss_index.normalised(features_of(files[:20]) + features_of(files[20:40]))
    assert memory.search(queries, 10) == moved.search(queries, 10)


def test_a_damaged_file_of_lists_is_named(tmp_path):
    published(tmp_path / "a", identities(1000), "ivfpq", True)
    published(tmp_path / "b", identities(1001), "ivfpq", True)
    (file,) = (tmp_path / "a").glob("lists-*")
    (other,) = (tmp_path / "b").glob("lists-*")
    whole = file.read_bytes()
    for damaged in (*damages(whole), other.read_bytes()):
        put(file, damaged)
        with pytest.raises(UserError, match=file.name):
            open_index(tmp_path / "a")
        with pytest.raises(UserError, match=file.name):
            published(tmp_path / "a", identities(1000), "ivfpq", True)
        CASES["parts of an index", "refused"] += 2


def test_ids_that_no_row_has(tmp_path):
    published(tmp_path, identities(1000), "ivfpq", True)
    index = open_index(tmp_path)
    (file,) = tmp_path.glob("lists-*")
    with open(file, "r+b") as stream:  # not cut, which would end who has it mapped
        np.full(file.stat().st_size // 8, 10**9).tofile(stream)
    with pytest.raises(UserError, match="build the index again"):
        index.search(faiss_index.normalised(index.features_of(0)), 1)
    with pytest.raises(UserError, match="build the index again"):
        open_index(tmp_path)


@pytest.mark.parametrize("earlier", [{}, {"kind": "flat"}, {"kind": "ivfpq", "lists": "x"}])
@pytest.mark.parametrize("kind", [None, "flat", "hnsw", "ivfpq", "ivfflat"])
@pytest.mark.parametrize("on_disk", [None, True, False])
def test_an_index_is_kept_as_flags_say_and_else_as_it_was(earlier, kind, on_disk):
    expected_kind = kind or earlier.get("kind", "flat")
    if expected_kind == "ivfflat" or (on_disk and expected_kind != "ivfpq"):
        with pytest.raises(UserError, match=r"is not supported by|remove --on-disk"):
            chosen_keeping(earlier, None, kind, on_disk)
        CASES["ways to keep an index", "refused"] += 1
        return
    keeping = chosen_keeping(earlier, None, kind, on_disk)
    stays = expected_kind == "ivfpq" and "lists" in earlier
    expected = Keeping(
        kind=expected_kind,
        on_disk=stays if on_disk is None else on_disk,
        told_by="sample",
    )
    assert keeping == expected
    CASES["ways to keep an index", "taken"] += 1


@pytest.mark.parametrize(("kind", "on_disk"), [LARGE[0], LARGE[-1]])
def test_what_kills_left_in_an_index_goes_and_what_links_point_to_stays(kind, on_disk, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "0123456789abcdef.pt").write_text("precious")
    folder = tmp_path / "index"
    published(folder, identities(1000), kind, on_disk)
    (folder / ".lists.clip4cir-0.tmp").mkdir()
    (folder / ".lists.clip4cir-0.tmp" / "link").symlink_to(outside)
    (folder / ".link.1.tmp").symlink_to(outside)
    (folder / "partial" / "fedcba9876543210.pt").symlink_to(outside / "0123456789abcdef.pt")
    published(folder, identities(1100), kind, on_disk)
    assert not list(folder.rglob(".*.tmp"))
    assert not list((folder / "partial").iterdir())
    assert (outside / "0123456789abcdef.pt").read_text() == "precious"


@pytest.mark.parametrize("is_new", [True, False])
def test_partial_as_a_link_is_refused(is_new, index, tmp_path, capsys):
    outside = tmp_path / "outside"
    outside.mkdir()
    names = ["0123456789abcdef.pt", ".half.1.tmp"]
    for name in names:
        (outside / name).write_text("precious")
    images(tmp_path / "photos", 3)
    if not is_new:
        index(tmp_path / "photos")
        shutil.rmtree(tmp_path / "index" / "partial")
        images(tmp_path / "photos", 4)
    (tmp_path / "index").mkdir(exist_ok=True)
    (tmp_path / "index" / "partial").symlink_to(outside)
    assert "partial is a symlink" in refused(lambda: index(tmp_path / "photos"), capsys)
    assert sorted(file.name for file in outside.iterdir()) == sorted(names)
    with pytest.raises(UserError, match="partial is a symlink"):
        published(tmp_path / "index", identities(10), "flat")
