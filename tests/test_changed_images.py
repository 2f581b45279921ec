"""Other pixels in a file of the same size and modification time are another image, wherever something is kept of it."""

import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import combiner_train
import visualize
from benchmarks import CIRR
from benchmarks.splits import images_digest
from image_search.image_index import open_index
from runtime.files import SAMPLE, file_identities
from runtime.image_source import IMAGES
from test_resume import stopped as stopped
from training.image_cache import ImageCache


def replace(path: Path, at: int | None = None) -> None:
    """Put another image in the place of one, or flip the byte at a place; its size and time stay."""
    before = path.stat()
    if at is None:
        other = io.BytesIO()
        Image.new("RGB", (24, 24), "red").save(other, "PNG")
        content = other.getvalue()
        assert len(content) <= before.st_size
        content += bytes(before.st_size - len(content))  # decoders do not look behind the end
    else:
        content = bytearray(path.read_bytes())
        content[at] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize("size", [1, 100, 3 * SAMPLE, 3 * SAMPLE + 1, 10 * SAMPLE])
def test_a_sample_is_of_both_ends_and_the_middle(size, tmp_path):
    """What lies between is told by all of the bytes alone."""
    file = tmp_path / "a"
    file.write_bytes(os.urandom(size))
    for place in (0, size // 2, size - 1, size // 4):
        sample, whole, time = (
            file_identities([file], told_by) for told_by in ("sample", "content", "time")
        )
        replace(file, place)
        between = size == 10 * SAMPLE and place == size // 4
        assert (file_identities([file], "sample") == sample) == between
        assert file_identities([file], "content") != whole
        assert file_identities([file], "time") == time
        assert len({sample[0], whole[0], time[0]}) == 3


def drawn_images(root: Path) -> list[Path]:
    """The images of the drawn CIRR's validation."""
    return CIRR(root).val()[0].paths


def test_the_image_cache(own_images, tmp_path):
    paths = drawn_images(own_images)

    def file() -> Path:
        preprocessing = {"resolution": 8}
        return ImageCache(
            folder=tmp_path, paths=paths, read=torch.tensor, preprocessing=preprocessing
        ).file

    before = file()
    assert file() == before
    replace(paths[3])
    assert file() != before


def test_the_feature_cache_of_a_validation(own_images, run, tmp_path):
    def metrics(*flags) -> dict:
        words = [
            "--clip-model-name",
            own_images / "tiny_clip_vit.pt",
            "--combining-function",
            "sum",
        ]
        file = tmp_path / "r.json"
        run("validate", own_images, "--dataset", "CIRR", *words, "--metrics-json", file, *flags)
        return json.loads(file.read_text())["protocols"]

    cache = ["--feature-cache", tmp_path / "features"]
    before = metrics(*cache)
    for path in drawn_images(own_images)[::2]:
        replace(path)
    after = metrics()
    assert after != before
    assert metrics(*cache) == after
    assert metrics(*cache, "--verify") == after


@pytest.mark.parametrize("flags", [[], ["--verify"]])
def test_an_index(flags, own_images, index, tmp_path):
    folder = drawn_images(own_images)[0].parent
    count = len(list(folder.iterdir()))
    assert f"{count} images added" in index(folder, flags=flags)
    assert f"0 images added, {count} kept" in index(folder)
    replace(next(folder.iterdir()))
    assert f"1 images added, {count - 1} kept, 1 removed" in index(folder)
    if not flags:  # from then on it is told so, without the flag too
        assert f"0 images added, {count} kept" in index(folder, flags=["--verify"])
        assert open_index(tmp_path / "index").about["told_by"] == "content"
        assert f"0 images added, {count} kept" in index(folder)


@pytest.mark.parametrize("flags", [[], ["--verify"]])
def test_a_resumed_run(flags, stopped, own_images, tmp_path, capsys):
    """In another place, with other times, the images are the same; with other pixels they are not."""
    run = stopped(2, "CIRR", *flags, data_root=own_images)
    moved = tmp_path / "moved"
    shutil.copytree(own_images, moved, copy_function=shutil.copyfile)
    words = ["--resume", str(run), "--data-root", str(moved)]
    for split in (CIRR(moved).train(), CIRR(moved).val()[0]):
        path = split.paths[1]
        kept = path.read_bytes()
        replace(path)
        with pytest.raises(SystemExit) as stop:
            combiner_train.main(words)
        assert stop.value.code == 2
        assert "the images have changed since the run was started" in capsys.readouterr().err
        path.write_bytes(kept)
    combiner_train.main(words)
    assert (run / "best_metrics.json").exists()


def test_rankings_that_are_looked_at(own_images, run, tmp_path, capsys):
    words = ["--clip-model-name", own_images / "tiny_clip_vit.pt", "--combining-function", "sum"]
    file = tmp_path / "rankings.json"
    run("validate", own_images, "--dataset", "CIRR", *words, "--rankings", file)
    where = ["--data-root", own_images, "--output-dir", tmp_path / "sheet"]

    def look(*flags: str) -> None:
        visualize.main(list(map(str, ["--rankings", file, "--num", 2, *where, *flags])))

    look()
    look("--verify")
    replace(drawn_images(own_images)[0])
    for flags in ([], ["--verify"]):
        with pytest.raises(SystemExit) as stop:
            look(*flags)
        assert stop.value.code == 2
        assert "are not the images that were ranked" in capsys.readouterr().err


def test_a_digest_of_images_names_each(own_images):
    split = CIRR(own_images).val()[0]
    whole, sampled = images_digest(split), images_digest(split, sampled=True)
    assert whole != sampled
    first, second = split.paths[:2]
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert images_digest(split) != whole
    assert images_digest(split, sampled=True) != sampled


def test_images_are_hashed_once_and_remembered_beside_their_features(golden, tmp_path, monkeypatch):
    root = shutil.copytree(golden / "cirr_dataset", tmp_path / "cirr_dataset").parent
    (split,) = CIRR(root).val()
    read = []
    digest = type(IMAGES).digest
    monkeypatch.setattr(
        type(IMAGES), "digest", lambda *a, **how: read.append(a[1]) or digest(*a, **how)
    )
    whole = images_digest(split, kept=tmp_path / "features")
    assert whole == images_digest(split)
    assert len(read) == 2 * len(split.paths)
    assert images_digest(split, kept=tmp_path / "features") == whole
    assert len(read) == 2 * len(split.paths)
    split.paths[0].write_bytes(split.paths[1].read_bytes())
    assert images_digest(split, kept=tmp_path / "features") == images_digest(split) != whole
