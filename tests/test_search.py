"""Search of one's own images: exact vectors, an index that is brought up to date and never half-written, the script."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data_utils
import search
from benchmarks import CIRR, FashionIQ
from conftest import one_of_each_kind
from image_search import faiss_index, image_index
from image_search.image_index import open_index
from image_search.stores.faiss import VECTOR_KINDS
from models import backbone
from runtime import image_files
from utils import UserError


def images(folder: Path, count: int, start: int = 0) -> list[Path]:
    """Files of different colours, some in folders below."""
    files = []
    for number in range(start, start + count):
        file = folder / (f"{number}.png" if number % 2 else f"below/{number}.jpg")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + number, 24), (number * 37 % 256, number * 101 % 256, 200)).save(file)
        files.append(file)
    return files


def refused(call, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        call()
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2, lines
    assert sum(": error: " in line for line in lines) == 1, lines
    return lines[-1]


# Vectors


def clustered(count: int, dim: int = 32, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(50, dim))
    return (centres[rng.integers(50, size=count)] + 0.6 * rng.normal(size=(count, dim))).astype(
        np.float32
    )


@pytest.fixture
def few_are_enough_to_compress(monkeypatch):
    monkeypatch.setattr(faiss_index, "LEAST_TRAINED_ON", 2000)


@pytest.mark.parametrize("kind", VECTOR_KINDS)
def test_what_is_found_is_in_the_exact_order(kind, few_are_enough_to_compress):
    gallery, queries = clustered(4000), faiss_index.normalised(clustered(20, seed=1))
    found = faiss_index.search(faiss_index.build(gallery, kind), gallery, queries, k=10)
    rows, similarities = (
        np.array([[pair[i] for pair in answers] for answers in found]) for i in (0, 1)
    )
    exact = queries @ faiss_index.normalised(gallery).T
    np.testing.assert_allclose(similarities, np.take_along_axis(exact, rows, 1), rtol=1e-5)
    assert (np.diff(similarities, axis=1) <= 0).all()
    best = np.argsort(-exact, axis=1, kind="stable")[:, :10]
    if kind == "flat":
        assert rows.tolist() == best.tolist()
    else:
        assert (
            faiss_index.recall(
                found, [[(row, 0.0) for row in answers] for answers in best.tolist()]
            )
            > 0.9
        )


def test_equal_vectors_keep_the_order_of_the_rows():
    gallery = np.repeat(clustered(3), 4, axis=0)
    (answers,) = faiss_index.search(
        faiss_index.build(gallery, "flat"), gallery, faiss_index.normalised(gallery[:1]), k=4
    )
    assert [row for row, _ in answers] == [0, 1, 2, 3]


def test_a_report_of_recall(few_are_enough_to_compress):
    gallery = clustered(4000)
    assert faiss_index.recall_report(faiss_index.build(gallery, "flat"), gallery)["recall"] == 1
    empty = faiss_index.build(gallery, "ivfpq")
    empty.nprobe = 1
    assert 0 < faiss_index.recall_report(empty, gallery)["recall"] < 1


def test_too_few_vectors_to_compress():
    with pytest.raises(UserError, match="10,000 images"):
        faiss_index.build(clustered(100), "ivfpq")
    with pytest.raises(UserError, match="multiple of 8"):
        faiss_index.build(clustered(10_000, dim=30), "ivfpq")


def test_faiss_is_asked_for_where_it_is_needed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(UserError, match=r"requirements-app\.txt"):
        faiss_index.build(clustered(10), "flat")


# The index


def paths_of(index) -> list[Path]:
    """The image files of an index by row."""
    return [Path(path) for path, _, _ in index.files]


def test_new_files_are_encoded_and_vanished_ones_go(index, tmp_path, encoded):
    files = images(tmp_path / "photos", 6)
    assert "6 images added, 0 kept, 0 removed, 0 left out" in index(tmp_path / "photos")
    first = open_index(tmp_path / "index")
    assert paths_of(first) == sorted(files)
    files[1].unlink()
    images(tmp_path / "photos", 2, start=6)
    Image.new("RGB", (30, 31), "white").save(files[2])  # another image of the same name
    encoded.clear()
    assert "3 images added, 4 kept, 2 removed, 0 left out" in index(tmp_path / "photos")
    assert sum(encoded) == 3
    second = open_index(tmp_path / "index")
    assert len(paths_of(second)) == 7
    assert files[1] not in paths_of(second)
    for path in set(paths_of(first)) & set(paths_of(second)) - {files[2]}:
        rows = paths_of(first).index(path), paths_of(second).index(path)
        assert np.array_equal(first.features[rows[0]], second.features[rows[1]])
    assert "0 images added, 7 kept, 0 removed" in index(tmp_path / "photos")
    assert sorted(f.name.split("-")[0] for f in (tmp_path / "index").iterdir()) == [
        "features", "files", "index.json", "partial", "vectors",
    ]  # fmt: skip


def test_unreadable_files_are_listed_and_the_others_indexed(index, tmp_path, caplog):
    files = images(tmp_path / "photos", 4)
    files[0].write_bytes(b"<html>404</html>")
    files[1].write_bytes(files[1].read_bytes()[:60])
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    (tmp_path / "photos" / ".thumbnails").mkdir()
    shutil.copy(files[2], tmp_path / "photos" / ".thumbnails" / "hidden.png")
    for _ in range(2):  # they are not forgotten
        caplog.clear()
        assert "2 left out (unreadable)" in index(tmp_path / "photos")
        assert f"image {files[0]} cannot be decoded" in caplog.text
        assert f"image {files[1]} cannot be decoded" in caplog.text
    assert paths_of(open_index(tmp_path / "index")) == files[2:] or set(
        paths_of(open_index(tmp_path / "index"))
    ) == set(files[2:])
    images(tmp_path / "photos", 1)  # repaired
    assert "1 images added, 2 kept, 0 removed, 1 left out" in index(tmp_path / "photos")


def test_several_folders_and_a_file_in_both(index, tmp_path):
    images(tmp_path / "a", 3)
    assert "3 images added" in index(tmp_path / "a", tmp_path / "a" / "below")


def test_other_folders_stay_until_they_are_forgotten(index, tmp_path, capsys):
    images(tmp_path / "a", 3)
    images(tmp_path / "b", 2)
    index(tmp_path / "a")
    assert "2 images added, 3 kept, 0 removed" in index(tmp_path / "b")
    images(tmp_path / "a", 1, start=3)
    again = [
        "index",
        "--output",
        str(tmp_path / "index"),
        "--num-workers",
        "0",
    ]  # with the CLIP that it was made with
    search.main(again)
    assert "1 images added, 5 kept, 0 removed" in capsys.readouterr().out
    assert "does not contain this folder" in refused(
        lambda: search.main([*again, "--forget", str(tmp_path / "c")]), capsys
    )
    shutil.rmtree(tmp_path / "a")  # or a disk that is not there today
    assert "is not a folder" in refused(lambda: search.main(again), capsys)
    search.main([*again, "--forget", str(tmp_path / "a")])
    assert "0 images added, 2 kept, 4 removed" in capsys.readouterr().out


def test_a_folder_with_other_files_is_not_taken_for_an_index(index, tmp_path, capsys):
    files = images(tmp_path / "photos", 4)
    for name in ("files-0.jpg", "features-notes.txt", "partial/holiday.png"):
        file = tmp_path / "photos" / name
        file.parent.mkdir(exist_ok=True)
        shutil.copy(files[0], file)
    before = sorted(tmp_path.joinpath("photos").rglob("*"))
    assert "which does not belong to an index" in refused(
        lambda: index(tmp_path / "photos", output=tmp_path / "photos"), capsys
    )
    assert sorted(tmp_path.joinpath("photos").rglob("*")) == before
    index(tmp_path / "photos")
    for name in ("files-mine.txt", "partial/mine.pt"):  # put there afterwards
        (tmp_path / "index" / name).write_text("mine")
    images(tmp_path / "photos", 5)
    index(tmp_path / "photos")
    assert (tmp_path / "index" / "files-mine.txt").exists()
    assert (tmp_path / "index" / "partial" / "mine.pt").exists()


def test_a_file_that_could_not_be_read_is_tried_again(index, tmp_path, monkeypatch):
    files = images(tmp_path / "photos", 3)
    real = image_files.decoded

    def failing(file, *how):
        if file == files[1]:
            raise PermissionError("for now")
        return real(file, *how)

    with monkeypatch.context() as patch:
        patch.setattr(image_files, "decoded", failing)
        assert "2 images added, 0 kept, 0 removed, 1 left out" in index(tmp_path / "photos")
    assert "1 images added, 2 kept, 0 removed, 0 left out" in index(tmp_path / "photos")


def test_an_interrupted_run_goes_on(index, tmp_path, monkeypatch, capsys, encoded):
    images(tmp_path / "photos", 10)
    monkeypatch.setattr(image_index, "SHARD", 4)
    normalise = backbone.normalise

    def interrupted(pixels, *colours):
        if len(encoded) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return normalise(pixels, *colours)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(backbone, "normalise", interrupted)
        index(tmp_path / "photos")
    assert stop.value.code == 0
    assert (
        "stopped by SIGTERM; encoded features are kept: run the same command again to resume"
        in capsys.readouterr().err
    )
    assert refused(
        lambda: search.main(
            ["query", "--index", str(tmp_path / "index"), "--image", "x", "--text", "x"]
        ),
        capsys,
    )
    encoded.clear()
    assert "10 images added" in index(tmp_path / "photos")
    assert sum(encoded) == 6  # the first four are kept
    whole = open_index(tmp_path / "index")
    index(tmp_path / "photos", output=tmp_path / "other")
    assert np.array_equal(whole.features, open_index(tmp_path / "other").features)
    assert not list((tmp_path / "index" / "partial").iterdir())


def test_a_failed_update_leaves_the_good_index(index, tmp_path, monkeypatch, capsys):
    images(tmp_path / "photos", 3)
    index(tmp_path / "photos")
    before = {f.name: f.read_bytes() for f in (tmp_path / "index").iterdir() if f.is_file()}
    images(tmp_path / "photos", 2, start=3)

    def full(*_):
        raise image_index.UserError("could not write: free space")

    for step in ("write", "build"):
        with monkeypatch.context() as patch:
            patch.setattr(faiss_index, step, full)
            refused(lambda: index(tmp_path / "photos"), capsys)
        assert {name: (tmp_path / "index" / name).read_bytes() for name in before} == before
        assert len(paths_of(open_index(tmp_path / "index"))) == 3
    assert "2 images added, 3 kept" in index(tmp_path / "photos")


def test_all_shards_are_read_in_one_pass(index, tmp_path, monkeypatch):
    """Each is on the disk before the next is encoded; a batch ends with its shard."""
    images(tmp_path / "photos", 10)
    monkeypatch.setattr(image_index, "SHARD", 4)
    passes, encoded, on_disk = [], [], []
    real_pass, real = data_utils.ImageLoader.batches, backbone.normalise

    def batches(loader, files):
        passes.append([len(batch) for batch in files])
        return real_pass(loader, files)

    def normalise(pixels, *colours):
        encoded.append(len(pixels))
        on_disk.append(len(list((tmp_path / "index" / "partial").glob("*.pt"))))
        return real(pixels, *colours)

    monkeypatch.setattr(data_utils.ImageLoader, "batches", batches)
    monkeypatch.setattr(backbone, "normalise", normalise)
    assert "10 images added" in index(tmp_path / "photos", flags=["--clip-bs", 3])
    assert passes == [[3, 1, 3, 1, 2]]
    assert encoded == [3, 1, 3, 1, 2]
    assert on_disk == [0, 0, 1, 1, 2]


def test_an_index_of_drafts_stays_one(index, ask, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6  # by 90 degrees
    for number in range(3):
        photo = Image.effect_noise((300, 200), 60 + 30 * number).convert("RGB")
        photo.save(tmp_path / "photos" / f"{number}.jpg", exif=turned)
    index(tmp_path / "photos", output=tmp_path / "full")
    index(tmp_path / "photos", flags=["--decode", "draft"])
    again = ["index", "--output", str(tmp_path / "index"), "--num-workers", "0"]
    search.main(again)
    assert "0 images added, 3 kept, 0 removed" in capsys.readouterr().out
    whole, drafts = open_index(tmp_path / "full"), open_index(tmp_path / "index")
    assert "decode" not in whole.about["encoder"]
    assert "decode" not in whole.about["pair"]
    assert drafts.about["encoder"]["decode"] == drafts.about["pair"]["decode"] == "draft"
    assert not np.array_equal(whole.features, drafts.features)
    photo = tmp_path / "photos" / "1.jpg"
    assert str(photo) in ask(photo, "is red")
    with_full = ["--decode", "full"]
    assert "differ in decode:" in refused(lambda: ask(photo, "x", *with_full), capsys)
    assert "differ in decode:" in refused(
        lambda: ask(photo, "x", "--decode", "draft", of=tmp_path / "full"), capsys
    )


def test_large_galleries_report_their_recall(index, tmp_path, capsys):
    images(tmp_path / "photos", 60)
    assert "10,000 images" in refused(
        lambda: index(tmp_path / "photos", flags=["--index-type", "ivfpq"]), capsys
    )
    assert "recall@10 against exact search: 1.000" in index(
        tmp_path / "photos", flags=["--index-type", "hnsw"]
    )
    images(tmp_path / "photos", 1, start=60)
    assert "1 images added, 60 kept" in index(tmp_path / "photos")
    assert open_index(tmp_path / "index").about["kind"] == "hnsw"
    assert "61 kept" in index(
        tmp_path / "photos", flags=["--index-type", "flat"]
    )  # without encoding again
    assert open_index(tmp_path / "index").about["kind"] == "flat"


def test_two_processes_cannot_update_at_once(index, tmp_path, capsys):
    images(tmp_path / "photos", 2)
    (tmp_path / "index").mkdir()
    with image_index.locked(tmp_path / "index", ""):
        assert "another process is updating this index" in refused(
            lambda: index(tmp_path / "photos"), capsys
        )


def test_what_is_refused(index, ask, tmp_path, drawn, capsys):
    (tmp_path / "empty").mkdir()
    assert "no images found" in refused(lambda: index(tmp_path / "empty"), capsys)
    assert "is not a folder" in refused(lambda: index(tmp_path / "nowhere"), capsys)
    files = images(tmp_path / "photos", 3)
    index(tmp_path / "photos")
    other = lambda: index(tmp_path / "photos", name=drawn / "tiny_clip_resnet.pt")  # noqa: E731
    assert "contains an index made with different weights" in refused(other, capsys)
    with_other = ["--clip-model-name", drawn / "tiny_clip_resnet.pt"]
    assert "differ in weights" in refused(lambda: ask(files[0], "is red", *with_other), capsys)
    assert "differ in transform" in refused(
        lambda: ask(files[0], "is red", "--transform", "clip"), capsys
    )
    assert "--text is empty" in refused(lambda: ask(files[0], "  "), capsys)
    (tmp_path / "none.png").write_bytes(b"none")
    assert "none.png cannot be decoded" in refused(
        lambda: ask(tmp_path / "none.png", "is red"), capsys
    )
    assert "there is no image" in refused(lambda: ask(tmp_path / "nowhere.png", "is red"), capsys)
    for path in files:
        path.write_bytes(b"none")
    assert "none of the 3 images can be read" in refused(
        lambda: index(tmp_path / "photos", output=tmp_path / "new"), capsys
    )


def test_a_damaged_index_is_named(index, ask, tmp_path, capsys):
    files = images(tmp_path / "photos", 3)
    index(tmp_path / "photos")
    for part in ("files", "features", "vectors", "index.json"):
        (file,) = (tmp_path / "index").glob(f"{part}*")
        content = file.read_bytes()
        for damaged in (None, content[: len(content) // 2], b"[]"):
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            assert str(tmp_path / "index") in refused(lambda: ask(files[0], "is red"), capsys)
            file.write_bytes(content)
    assert ask(files[0], "is red")


# Answers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dataset", "composed"),
    one_of_each_kind(
        [("CIRR", True), ("FashionIQ", False), ("FashionIQ", True), ("CIRR", False)],
        kind=lambda pair: pair[0],
    ),
)
def test_answers_equal_validates_ranking_of_the_same_gallery(
    dataset, composed, golden, run, index, ask, tmp_path
):
    benchmark = {"CIRR": CIRR, "FashionIQ": FashionIQ}[dataset](golden)
    tuned = ["--clip-model-path", golden / "tuned_clip_vit.pt"]
    split = benchmark.val()[0]
    # Its files alone, named in its order, so that equal similarities agree too.
    gallery = tmp_path / "gallery"
    gallery.mkdir()
    named = {}
    for row, (image, path) in enumerate(split.image_paths.items()):
        named[image] = gallery / f"{row:04}{path.suffix}"
        shutil.copy(path, named[image])
    flags = [*tuned, "--background", "original"]
    index(gallery, name=golden / "clip_vit.pt", flags=flags)
    file = {"CIRR": "combiner_moe_cirr.pt", "FashionIQ": "combiner_moe_fiq.pt"}[dataset]
    combiner = ["--combiner-path", golden / file] if composed else []
    how = ["--combining-function", "combiner" if composed else "sum", *combiner, *tuned]
    how += ["--clip-model-name", golden / "clip_vit.pt", "--rankings", tmp_path / "r.json"]
    run("validate", golden, "--dataset", dataset, *how)
    queries = json.loads((tmp_path / "r.json").read_text())["queries"][split.name]
    for query in queries[:3]:
        (protocol,) = {"original-kept", "original-removed"} & set(query["protocols"]) - (
            {"original-removed"} if dataset == "FashionIQ" else set()
        )
        nearest = query["protocols"][protocol]["nearest"]
        reference = named[query["reference"]]
        out = json.loads(ask(reference, query["caption"], "--json", "--k", 51, *combiner))
        answers = [
            answer
            for answer in out["results"]
            if dataset == "FashionIQ" or answer["image"] != str(reference)
        ]
        assert [a["image"] for a in answers[:50]] == [str(named[image]) for image, _ in nearest]
        assert [a["similarity"] for a in answers[:50]] == pytest.approx(
            [s for _, s in nearest], abs=2e-6
        )
        assert out.get("gate") == (pytest.approx(query["gate"], abs=1e-4) if composed else None)
        assert out["experts"] == pytest.approx(query.get("experts", []), abs=1e-4)


def test_an_image_from_elsewhere_and_one_that_changed(index, ask, tmp_path):
    files = images(tmp_path / "photos", 4)
    index(tmp_path / "photos")
    outside = tmp_path / "outside.png"
    shutil.copy(files[1], outside)
    assert ask(outside, "is red", "--json") == ask(files[1], "is red", "--json")
    before = ask(files[0], "is red", "--json")
    Image.new("RGB", (60, 60), "white").save(files[0])
    assert ask(files[0], "is red", "--json") != before  # encoded as it is now


def test_answers_as_text_and_as_a_page_also_of_files_that_vanished(index, ask, tmp_path, caplog):
    files = images(tmp_path / "photos", 5)
    index(tmp_path / "photos")
    lines = ask(files[0], "red " * 70, "--k", 3).strip().splitlines()
    assert "note" not in caplog.text
    out = json.loads(ask(files[0], "red " * 100, "--json"))
    assert "more than 77 tokens" in caplog.text
    assert "more than 77 tokens" in out["note"]
    assert [line.split()[0] for line in lines] == ["1", "2", "3"]
    ask(files[0], "is <b>red</b>", "--k", 3, "--html", tmp_path / "answers.html")
    page = (tmp_path / "answers.html").read_text()
    assert page.count("<figure") == 4
    assert "<b>red" not in page
    assert Path(lines[0].split()[2]).name in page
    for file in files:
        file.unlink()
    ask(files[0], "is red", "--html", tmp_path / "answers.html")
    assert (tmp_path / "answers.html").read_text().count("<figure") == 6


def test_a_query_takes_milliseconds_when_the_index_is_open():
    gallery = clustered(50_000, dim=64)
    index = faiss_index.build(gallery, "flat")
    query = faiss_index.normalised(clustered(1, dim=64, seed=2))
    faiss_index.search(index, gallery, query, k=10)
    start = time.process_time()
    for _ in range(10):
        faiss_index.search(index, gallery, query, k=10)
    assert (time.process_time() - start) / 10 < 0.1
