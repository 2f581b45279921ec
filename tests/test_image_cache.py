"""Images decoded once: the same bits as decoding, and honest about what is on the disk."""

import functools
import pickle
import shutil
from collections import namedtuple

import pytest
import torch

from conftest import read_csv
from data_utils import load_image, make_preprocess
from runtime.image_files import decoded
from test_data_utils import MODES, picture
from training.image_cache import open_image_cache
from utils import UserError

RECIPE = {"transform": "targetpad", "target_ratio": 1.25, "resolution": 24}


@pytest.fixture
def paths(tmp_path):
    """A file of every mode that files have."""
    files = []
    for mode in MODES:
        for ending in ("png", "tiff", "jpg"):
            file = tmp_path / f"{mode.replace(';', '')}.{ending}"
            try:
                picture(mode, 40, 25).save(file)
                decoded(file)
                files.append(file)
            except OSError:
                file.unlink(
                    missing_ok=True
                )  # this format does not hold this mode, or this Pillow cannot read it back
    assert len(files) > len(MODES)
    return files


@pytest.mark.parametrize("transform", ["clip", "squarepad", "targetpad"])
@pytest.mark.parametrize("workers", [0, 2])
def test_cached_images_equal_decoded_ones_bit_for_bit(transform, workers, paths, tmp_path):
    read = functools.partial(load_image, preprocess=make_preprocess(transform, 1.25, 24))
    cached = open_image_cache(
        tmp_path / "cache", paths, read, recipe=RECIPE | {"transform": transform}, workers=workers
    )
    for path in reversed(paths):
        assert torch.equal(cached(path), read(path))


def test_a_cache_is_small_when_sent_to_a_worker(paths, tmp_path):
    """Guards against a pickled memory map, which is a copy of every image."""
    read = functools.partial(load_image, preprocess=make_preprocess("clip", 1.25, 224))
    cached = open_image_cache(tmp_path / "cache", paths, read, recipe=RECIPE, workers=0)
    pickled = pickle.dumps(cached)
    assert len(pickled) < 10_000
    assert torch.equal(pickle.loads(pickled)(paths[3]), cached(paths[3]))


def reader_that_counts():
    calls = []
    read = functools.partial(load_image, preprocess=make_preprocess("targetpad", 1.25, 24))
    return (lambda path: calls.append(path) or read(path)), calls


def test_a_warm_cache_decodes_one_image_to_know_the_shape(paths, tmp_path):
    read, calls = reader_that_counts()
    open_image_cache(tmp_path / "cache", paths, read, recipe=RECIPE, workers=0)
    assert len(calls) == len(paths) + 1
    calls.clear()
    open_image_cache(tmp_path / "cache", paths, read, recipe=RECIPE, workers=0)
    assert len(calls) == 1


def test_another_image_or_recipe_is_another_cache(paths, tmp_path):
    read, calls = reader_that_counts()
    for recipe, change in (
        (RECIPE, None),
        (RECIPE | {"target_ratio": 1.5}, None),
        (RECIPE, paths[0]),
    ):
        if change:
            picture("RGB", 30, 30).save(change)
        calls.clear()
        open_image_cache(tmp_path / "cache", paths, read, recipe=recipe, workers=0)
        assert len(calls) == len(paths) + 1


def test_the_size_is_announced(paths, tmp_path, caplog):
    caplog.set_level("INFO")
    open_image_cache(tmp_path / "cache", paths, reader_that_counts()[0], recipe=RECIPE, workers=0)
    assert f"image cache: {len(paths)} images, 0.00 GiB, in {tmp_path / 'cache'}" in caplog.text


def test_no_room_on_the_disk(paths, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10, 9, 1))
    with pytest.raises(UserError, match=r"--image-cache .* are needed .* are free"):
        open_image_cache(
            tmp_path / "cache", paths, reader_that_counts()[0], recipe=RECIPE, workers=0
        )
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("keep", [0, 60, -100])
def test_a_truncated_cache(keep, paths, tmp_path):
    read = reader_that_counts()[0]
    open_image_cache(tmp_path / "cache", paths, read, recipe=RECIPE, workers=0)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=f"--image-cache: {file} is truncated .* delete it"):
        open_image_cache(tmp_path / "cache", paths, read, recipe=RECIPE, workers=0)


def test_a_cache_of_another_shape(paths, tmp_path):
    import numpy as np

    read = reader_that_counts()[0]
    open_image_cache(tmp_path / "cache", paths, read, recipe=RECIPE, workers=0)
    (file,) = (tmp_path / "cache").iterdir()
    np.save(file, np.zeros((2, 3, 24, 24), np.uint8))
    with pytest.raises(UserError, match=r"has shape \(2, 3, 24, 24\)"):
        open_image_cache(tmp_path / "cache", paths, read, recipe=RECIPE, workers=0)


def test_an_image_that_fails_to_decode_leaves_no_cache(paths, tmp_path):
    paths[3].write_bytes(b"no image")
    with pytest.raises(UserError, match=paths[3].name):
        open_image_cache(
            tmp_path / "cache", paths, reader_that_counts()[0], recipe=RECIPE, workers=0
        )
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.slow
def test_training_from_the_cache_gives_the_same_numbers(stage_1, tmp_path, fails, drawn):
    flags = ["--image-cache", tmp_path / "images"]
    plain, cold, warm = (
        stage_1("CIRR"),
        stage_1("CIRR", *flags, output="cold"),
        stage_1("CIRR", *flags, output="warm"),
    )
    for name in ("train_metrics.csv", "validation_metrics.csv"):
        assert read_csv(plain / name) == read_csv(cold / name) == read_csv(warm / name)
    (file,) = (tmp_path / "images").iterdir()
    file.write_bytes(b"")
    name = ["--clip-model-name", drawn / "tiny_clip_vit.pt", "--batch-size", 12]
    assert "truncated" in fails("clip_fine_tune", drawn, "--dataset", "CIRR", *name, *flags)
