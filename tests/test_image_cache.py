"""Images decoded once: the same bits as decoding, and honest about what is on the disk."""

import errno
import functools
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

import clip_fine_tune
from benchmarks import CIRR
from conftest import ROOT, SOAK, read_csv
from data_utils import load_image, make_preprocess
from forks import HANG
from runtime.image_files import decoded
from test_data_utils import MODES, picture
from trainers import stage_1_flags
from training import image_cache, stage1
from training.data import read_training_data
from training.image_cache import REPAYS, CachedImages, ImageCache
from training.stage1 import decodings
from utils import Stopped, UserError

PREPROCESSING = {"transform": "targetpad", "target_ratio": 1.25, "resolution": 24}


def open_image_cache(folder, paths, read, *, preprocessing, workers) -> CachedImages:
    cache = ImageCache(
        folder=folder, paths=paths, read=read, preprocessing=preprocessing, workers=workers
    )
    return cache.open()


@pytest.fixture(scope="module")
def every_mode(tmp_path_factory) -> Path:
    """A folder with a file of every mode that files have."""
    folder = tmp_path_factory.mktemp("modes")
    for mode in MODES:
        for ending in ("png", "tiff", "jpg"):
            file = folder / f"{mode.replace(';', '')}.{ending}"
            try:
                picture(mode, 40, 25).save(file)
                decoded(file)
            except OSError:
                file.unlink(
                    missing_ok=True
                )  # this format does not hold this mode, or this Pillow cannot read it back
    assert len(list(folder.iterdir())) > len(MODES)
    return folder


@pytest.fixture
def paths(every_mode, tmp_path) -> list[Path]:
    """Copies of them."""
    return sorted(shutil.copytree(every_mode, tmp_path / "modes").iterdir())


@pytest.mark.parametrize(
    ("transform", "workers"), [("clip", 0), ("squarepad", 0), ("targetpad", 0), ("targetpad", 2)]
)
def test_cached_images_equal_decoded_ones_bit_for_bit(transform, workers, paths, tmp_path):
    read = functools.partial(load_image, preprocess=make_preprocess(transform, 1.25, 24))
    cached = open_image_cache(
        tmp_path / "cache",
        paths,
        read,
        preprocessing=PREPROCESSING | {"transform": transform},
        workers=workers,
    )
    for path in reversed(paths):
        assert torch.equal(cached(path), read(path))


def test_a_cache_is_small_when_sent_to_a_worker(paths, tmp_path):
    """Guards against a pickled memory map, which is a copy of every image."""
    read = functools.partial(load_image, preprocess=make_preprocess("clip", 1.25, 224))
    preprocessing = PREPROCESSING | {"resolution": 224}
    cached = open_image_cache(
        tmp_path / "cache", paths, read, preprocessing=preprocessing, workers=0
    )
    pickled = pickle.dumps(cached)
    assert len(pickled) < 10_000
    assert torch.equal(pickle.loads(pickled)(paths[3]), cached(paths[3]))


def reader_that_counts():
    calls = []
    read = functools.partial(load_image, preprocess=make_preprocess("targetpad", 1.25, 24))
    return (lambda path: calls.append(path) or read(path)), calls


def test_a_warm_cache_decodes_nothing(paths, tmp_path):
    read, calls = reader_that_counts()
    open_image_cache(tmp_path / "cache", paths, read, preprocessing=PREPROCESSING, workers=0)
    assert calls == paths
    calls.clear()
    open_image_cache(tmp_path / "cache", paths, read, preprocessing=PREPROCESSING, workers=0)
    assert calls == []


def test_another_image_or_recipe_is_another_cache(paths, tmp_path):
    read, calls = reader_that_counts()
    for preprocessing, change in (
        (PREPROCESSING, None),
        (PREPROCESSING | {"target_ratio": 1.5}, None),
        (PREPROCESSING, paths[0]),
    ):
        if change:
            picture("RGB", 30, 30).save(change)
        calls.clear()
        open_image_cache(tmp_path / "cache", paths, read, preprocessing=preprocessing, workers=0)
        assert calls == paths


def test_the_size_is_announced(paths, tmp_path, caplog):
    caplog.set_level("INFO")
    open_image_cache(
        tmp_path / "cache", paths, reader_that_counts()[0], preprocessing=PREPROCESSING, workers=0
    )
    assert f"image cache: {len(paths)} images, 0.00 GiB, in {tmp_path / 'cache'}" in caplog.text


def test_no_room_on_the_disk(paths, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10, 9, 1))
    with pytest.raises(UserError, match=r"--image-cache .* are needed, .* are free"):
        open_image_cache(
            tmp_path / "cache",
            paths,
            reader_that_counts()[0],
            preprocessing=PREPROCESSING,
            workers=0,
        )
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("keep", [0, 60, -100])
def test_a_truncated_cache(keep, paths, tmp_path):
    read = reader_that_counts()[0]
    open_image_cache(tmp_path / "cache", paths, read, preprocessing=PREPROCESSING, workers=0)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=f"--image-cache: {file} is truncated .* delete it"):
        open_image_cache(tmp_path / "cache", paths, read, preprocessing=PREPROCESSING, workers=0)


def header(shape: str) -> bytes:
    """What an array's file begins with, whatever the shape says."""
    about = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(about).to_bytes(2, "little") + about.encode()


def as_npz(file: Path) -> None:
    with open(file, "wb") as stream:  # NumPy adds an ending to a name that lacks it
        np.savez(stream, pixels=np.zeros((2, 3, 24, 24), np.uint8))


def as_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def as_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def changed_at(place: float, by: bytes):
    """A change of some bytes, at a part of the file's length."""

    def change(file: Path) -> None:
        content = bytearray(file.read_bytes())
        start = int(len(content) * place)
        content[start : start + len(by)] = by
        file.write_bytes(content)

    return change


# What the file of a cache may have become.
DAMAGES = {
    "another shape": lambda file: np.save(file, np.zeros((2, 3, 24, 24), np.uint8)),
    "another type": lambda file: np.save(file, np.zeros((2, 3, 24, 24))),
    "npz": as_npz,
    "pipe": as_pipe,
    "folder": as_folder,
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"more"),
    "of earlier versions": lambda file: np.save(file, np.load(file)),
    "zeroed": changed_at(0.3, bytes(5000)),
    "zeroed digests": changed_at(0.9995, bytes(10)),
    "a bit": changed_at(0.6, b"\x01\xfe\x55"),
    **{
        f"shape {shape}": changed_at(0, header(shape))
        for shape in ("(-1,)", "(-5, 3, 24, 24)", f"({2**62}, 3, 24, 24)", f"({10**30},)", "()", "0", "x(", "[" * 50)
    },
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_a_line_and_never_pixels(damage, paths, tmp_path):
    """Where it was asked for, and where it was found."""
    cache = ImageCache(
        folder=tmp_path / "cache",
        paths=paths[:6],
        read=reader_that_counts()[0],
        preprocessing=PREPROCESSING,
    )
    cache.open()
    DAMAGES[damage](cache.file)
    told = rf"^--image-cache: {cache.file} is .*damaged \(.*\): delete it$"
    with pytest.raises(UserError, match=told):
        cache.open()
    with pytest.raises(UserError, match=told):
        cache.open_if_it_repays(0)


def test_every_block_of_a_cache_is_checked(paths, tmp_path, monkeypatch):
    monkeypatch.setattr(image_cache, "BLOCK", 4)
    paths = paths[:10]
    cache = ImageCache(
        folder=tmp_path / "cache",
        paths=paths,
        read=reader_that_counts()[0],
        preprocessing=PREPROCESSING,
    )
    cache.open()
    whole = cache.file.read_bytes()
    start = len(whole) - cache.size - 32 * -(-len(paths) // 4)
    for row in range(len(paths)):
        at = start + row * 3 * 24 * 24 + row
        cache.file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        first = row // 4 * 4
        last = min(first + 3, len(paths) - 1)
        with pytest.raises(UserError, match=f"images {first} to {last} have changed"):
            cache.open()
    cache.file.write_bytes(whole)
    cache.open()


def test_a_cache_under_the_name_of_another_is_noticed(paths, tmp_path):
    """As many images of the same size, which only the key tells apart."""
    caches = [
        ImageCache(
            folder=tmp_path, paths=files, read=reader_that_counts()[0], preprocessing=PREPROCESSING
        )
        for files in (paths[:2], paths[2:4])
    ]
    for cache in caches:
        cache.open()
    caches[0].file.replace(caches[1].file)
    with pytest.raises(UserError, match="images 0 to 1 have changed since they were written"):
        caches[1].open()


def test_an_image_that_fails_to_decode_leaves_no_cache(paths, tmp_path):
    paths[3].write_bytes(b"no image")
    with pytest.raises(UserError, match=paths[3].name):
        open_image_cache(
            tmp_path / "cache",
            paths,
            reader_that_counts()[0],
            preprocessing=PREPROCESSING,
            workers=0,
        )
    assert list((tmp_path / "cache").iterdir()) == []


# Unasked


@pytest.fixture
def automatic(paths, tmp_path, caplog):
    """Open a cache if it repays so many decodings; returns what there is then, and the lines that were said."""

    def automatic(decodings: int, **changes):
        caplog.set_level("INFO")
        caplog.clear()
        read, _ = reader_that_counts()
        given = {
            "folder": tmp_path / "pixels",
            "paths": paths,
            "read": read,
            "preprocessing": PREPROCESSING,
        }
        cached = ImageCache(**given | changes).open_if_it_repays(decodings)
        return cached, caplog.messages

    return automatic


def test_a_cache_is_made_where_it_saves_enough_decodings(automatic, paths, tmp_path):
    few = len(paths) + REPAYS - 1
    cached, lines = automatic(few)
    assert cached is None
    assert not (tmp_path / "pixels").exists()
    size = f"{len(paths)} images, 0.00 GiB, in {tmp_path / 'pixels'}"
    assert lines[0].startswith(f"no image cache ({size}")
    assert lines[0].endswith(
        ": it would save only 19,999 decodings, fewer than 20,000; see --image-cache"
    )
    cached, made = automatic(few + 1)
    again, found = automatic(few + 1)
    anyway, _ = automatic(0)  # it costs nothing now
    for opened in (cached, again, anyway):
        assert torch.equal(opened(paths[2]), reader_that_counts()[0](paths[2]))
    assert made[0].startswith(f"image cache: {size}")
    assert made[0].endswith(
        f"saves 20,000 of {few + 1:,} decodings; --no-image-cache decodes instead"
    )
    assert "using existing" in found[0]
    assert [len(said) for said in (lines, made, found)] == [1, 1, 1]


def test_a_cache_is_made_where_twice_its_size_is_free(automatic, paths, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    size = len(paths) * 3 * 24 * 24
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, 2 * size - 1))
    cached, (line,) = automatic(10**6)
    assert cached is None
    assert line.endswith("0.00 GiB are free, less than twice its size; see --image-cache")
    assert not (tmp_path / "pixels").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, 2 * size))
    assert automatic(10**6)[0] is not None


def test_a_cache_that_cannot_be_written_costs_a_line_and_nothing_else(automatic, tmp_path):
    (tmp_path / "file").write_text("where a folder should be")
    cached, lines = automatic(10**6, folder=tmp_path / "file" / "pixels")
    assert cached is None
    assert "warning: no image cache: could not write" in lines[-1]
    assert lines[-1].endswith("images are decoded each time")


def test_a_disk_that_fills_up_leaves_no_half_of_a_cache(automatic, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(image_cache, "_reserve", full)
    cached, lines = automatic(10**6)
    assert cached is None
    assert "No space left on device" in lines[-1]
    assert list((tmp_path / "pixels").iterdir()) == []


def test_a_stop_while_a_cache_is_filled_leaves_nothing(automatic, tmp_path):
    def stop():
        raise Stopped("SIGTERM")

    with pytest.raises(Stopped):
        automatic(10**6, between=stop)
    assert list((tmp_path / "pixels").iterdir()) == []


def test_what_a_killed_process_left_half_made_goes(automatic, tmp_path):
    (tmp_path / "pixels").mkdir()
    old, recent = (tmp_path / "pixels" / f".images-24px-{name}.npy.1.tmp" for name in "ab")
    for file in (old, recent):
        file.write_bytes(b"half")
    os.utime(old, (1, 1))
    automatic(10**6)
    assert not old.exists()
    assert recent.exists()  # its process may be alive


def test_how_often_a_training_reads_an_image(drawn):
    data = read_training_data(CIRR(drawn), stage_1_flags("--batch-size", 12))
    gallery = len(data.val[0].paths)
    steps = data.order.steps
    assert steps > 1
    words = ["--num-epochs", 5, "--validation-frequency", 2]
    learning = stage_1_flags(*words)
    frozen = stage_1_flags(*words, "--encoder", "text")
    assert decodings(data, learning) == 5 * steps * 24 + 3 * gallery  # epochs 0, 2 and 4
    assert decodings(data, frozen) == 5 * steps * 24 + gallery
    mining = stage_1_flags(*words, "--hard-negatives", 3, "--mine-every", 2)
    beside = 3 * len(data.train.paths)
    assert decodings(data, mining) == 5 * steps * 60 + 3 * gallery + beside


@pytest.mark.slow
def test_trainings_make_a_cache_unasked_keep_out_of_it_and_go_on(
    stage_1, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(image_cache, "REPAYS", 1)
    monkeypatch.setattr(stage1, "PIXELS", tmp_path / "pixels")
    caplog.set_level("INFO")
    one_epoch = ["CIRR", "--num-epochs", 1]
    without = stage_1(*one_epoch, "--no-image-cache", output="without")
    assert not (tmp_path / "pixels").exists()
    assert "image cache" not in caplog.text
    with_cache = stage_1(*one_epoch, output="with")
    assert len(list((tmp_path / "pixels").iterdir())) == 1
    assert caplog.text.count("image cache") == 1
    for name in ("train_metrics.csv", "validation_metrics.csv"):
        assert (without / name).read_bytes() == (with_cache / name).read_bytes()
    folders = []
    for run in (without, with_cache):
        file = run / "training_hyperparameters.json"
        folders.append(json.loads(file.read_text())["flags"]["image_cache"])
        words = ["--resume", str(run)]
        assert clip_fine_tune.parse(words).image_cache == folders[-1]
        assert clip_fine_tune.parse([*words, "--no-image-cache"]).image_cache is None
        assert clip_fine_tune.parse([*words, "--image-cache", "there"]).image_cache == Path("there")
    assert folders == [None, "auto"]  # runs of earlier versions say None, and go on without


@pytest.mark.slow
def test_training_from_the_cache_gives_the_same_numbers(stage_1, tmp_path, fails, drawn):
    flags = ["--image-cache", tmp_path / "images"]
    plain = stage_1("CIRR", "--num-epochs", 1)
    cold = stage_1("CIRR", "--num-epochs", 1, *flags, output="cold")
    warm = stage_1("CIRR", "--num-epochs", 1, *flags, output="warm")
    for name in ("train_metrics.csv", "validation_metrics.csv"):
        assert read_csv(plain / name) == read_csv(cold / name) == read_csv(warm / name)
    (file,) = (tmp_path / "images").iterdir()
    file.write_bytes(b"")
    name = ["--clip-model-name", drawn / "tiny_clip_vit.pt", "--batch-size", 12]
    assert "truncated" in fails("clip_fine_tune", drawn, "--dataset", "CIRR", *name, *flags)


# Two trainings that fill one cache, in containers whose processes have equal numbers.

FILLS = """
import os, sys, time
from pathlib import Path
import torch
from training.image_cache import ImageCache
images, cache, own, other = map(Path, sys.argv[1:])
if os.getpid() != 1:
    os.getpid = lambda: 1
paths = sorted(images.iterdir())
def read(path):
    if path == paths[100]:
        own.touch()
        while not other.exists():  # in the middle of theirs
            time.sleep(0.01)
    return torch.full((3, 24, 24), int(path.name), dtype=torch.uint8)
cached = ImageCache(folder=cache, paths=paths, read=read, preprocessing={"resolution": 24}).open()
assert all((cached(path) == int(path.name)).all() for path in paths)
print("right as process", os.getpid())
"""
NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc"]


# In namespaces of their own their numbers are equal without help; `make soak` tries that too.
@pytest.mark.parametrize("own_namespace", [False, True] if SOAK else [False])
def test_two_containers_fill_one_cache(own_namespace, start, tmp_path, monkeypatch):
    if own_namespace and (
        shutil.which("unshare") is None or subprocess.run([*NAMESPACE, "true"]).returncode
    ):
        pytest.skip("no process namespaces may be made here")
    (tmp_path / "images").mkdir()
    for number in range(150):
        (tmp_path / "images" / f"{number:03}").touch()
    signs = [tmp_path / "one", tmp_path / "two"]
    script = tmp_path / "fills.py"
    script.write_text(FILLS)
    lines = [
        [script, tmp_path / "images", tmp_path / "cache", *pair] for pair in (signs, signs[::-1])
    ]
    if own_namespace:
        monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
        started = [
            subprocess.Popen(
                [*NAMESPACE, sys.executable, *words], stdout=subprocess.PIPE, text=True
            )
            for words in lines
        ]
        said = [process.communicate(timeout=HANG)[0] for process in started]
    else:
        forks = [start(*words) for words in lines]
        assert [fork.wait() for fork in forks] == [0, 0], [fork.stderr for fork in forks]
        said = [fork.stdout for fork in forks]
    assert said == ["right as process 1\n"] * 2
    assert len(list((tmp_path / "cache").iterdir())) == 1
