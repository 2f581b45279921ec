"""Padding, preprocessing on every image mode, broken images, and batches in order."""

import contextlib
import errno
import functools
import gc
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import tempfile
import time
from pathlib import Path

import clip
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from benchmarks.image_check import TOO_LARGE, inspect
from benchmarks.splits import check_images_exist
from conftest import SOAK
from data_utils import (
    ImageLoader,
    SquarePad,
    TargetPad,
    load_image,
    make_preprocess,
    normalise,
    read_or_explain,
)
from forks import HANG, family, forked
from models.clip_model import CLIP_MEAN, CLIP_STD
from runtime import collate, interruption
from runtime.image_files import LONGEST_SIDE, decoded
from runtime.prefetch import one_ahead
from utils import WORKERS_REMEDY, UserError, refusal_of_the_machine

MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"]
CPU = torch.device("cpu")
FORK = multiprocessing.get_context("fork")  # as loaders start their processes


def reader():
    return functools.partial(load_image, preprocess=make_preprocess("clip", 1.25, 16))


def picture(mode: str, width: int, height: int) -> Image.Image:
    """An image of a mode with varied content."""
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    rgb = Image.fromarray(values)
    if mode == "LAB":
        return Image.merge("LAB", rgb.split())
    if mode in ("PA", "I;16"):
        return rgb.convert("L" if mode == "I;16" else "P").convert(mode)
    return rgb.convert(mode)


@pytest.mark.parametrize("size", [(40, 30), (30, 41), (1, 90), (90, 1), (1, 1)])
def test_square_pad_is_square_to_a_pixel(size):
    padded = SquarePad()(picture("RGB", *size))
    width, height = size
    longest = max(size)
    assert padded.size == (
        width + 2 * int((longest - width) / 2),
        height + 2 * int((longest - height) / 2),
    )


@pytest.mark.parametrize(
    ("size", "padded"),
    [
        ((100, 90), (100, 90)),  # below the ratio: left alone
        ((100, 80), (100, 80)),  # at the ratio: padded by nothing
        ((200, 100), (200, 160)),
        ((100, 200), (160, 200)),
        ((1000, 1), (1000, 799)),
        ((1, 1000), (799, 1000)),
    ],
)
def test_target_pad(size, padded):
    assert TargetPad(1.25)(picture("RGB", *size)).size == padded


def test_padding_is_black_and_centred():
    padded = np.array(TargetPad(1.25)(Image.new("RGB", (200, 100), "white")))
    assert (padded[:30] == 0).all()
    assert (padded[30:130] == 255).all()
    assert (padded[130:] == 0).all()


@pytest.mark.parametrize("transform", ["clip", "squarepad", "targetpad"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_normalised_pixels(mode, transform):
    for size in [(50, 40), (20, 90), (3, 64)]:
        pixels = normalise(
            make_preprocess(transform, 1.25, 16)(picture(mode, *size)), CLIP_MEAN, CLIP_STD
        )
        assert pixels.shape == (3, 16, 16)
        assert pixels.dtype == torch.float32
        low, high = (
            torch.tensor([(v - m) / s for m, s in zip(CLIP_MEAN, CLIP_STD, strict=True)])
            for v in (0.0, 1.0)
        )
        assert (pixels.amin((1, 2)) >= low - 1e-5).all()
        assert (pixels.amax((1, 2)) <= high + 1e-5).all()


def test_preprocess_is_clips_own_where_nothing_is_padded(monkeypatch):
    """Against the clip package's transform, of torchvision's parts."""
    for name in ("Compose", "Resize", "CenterCrop", "ToTensor", "Normalize"):
        monkeypatch.setattr(clip.clip, name, getattr(transforms, name), raising=False)
    monkeypatch.setattr(clip.clip, "BICUBIC", transforms.InterpolationMode.BICUBIC)
    image = picture("RGBA", 50, 45)
    for transform in ("clip", "targetpad"):
        assert torch.equal(
            normalise(make_preprocess(transform, 1.25, 24)(image), CLIP_MEAN, CLIP_STD),
            clip.clip._transform(24)(image),
        )


def test_images_that_cannot_be_decoded_are_named(tmp_path):
    whole = tmp_path / "whole.png"
    picture("RGB", 40, 40).save(whole)
    contents = {
        "truncated.png": whole.read_bytes()[:300],
        "empty.png": b"",
        "text.jpg": b"<html>404 not found</html>",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            load_image(tmp_path / name, make_preprocess("clip", 1.25, 16))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_stops_the_batches_by_name(tmp_path, workers):
    """Also from a worker process, and in one line."""
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for path in paths:
        picture("RGB", 20, 20).save(path)
    paths[2].write_bytes(b"no image")
    loader = ImageLoader(reader(), workers, CPU)
    with pytest.raises(UserError) as error:
        list(loader.batches([paths[:2], paths[2:]]))
    assert str(error.value).startswith(f"image {paths[2]} cannot be decoded")
    assert "\n" not in str(error.value)


@pytest.fixture
def grey(tmp_path):
    """Image files, each of its own grey."""
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for level, path in enumerate(paths):
        Image.new("RGB", (16, 16), (level * 40,) * 3).save(path)
    return paths


def greys(batch) -> list[int]:
    """Which of the grey images a batch holds."""
    return [int(pixels[0, 0, 0]) // 40 for pixels in batch]


def batches_of(paths, *rows):
    return [[paths[row] for row in batch] for batch in rows]


def workers_now() -> set[int]:
    """The processes that run for this one, among them those that decode."""
    return set(family(os.getpid())[1:])


@pytest.fixture(params=["shared memory", "files"])
def way(request, monkeypatch):
    """How processes hand over what they read."""
    if request.param == "files":
        monkeypatch.setattr("data_utils.batch_room", lambda workers: 0 if workers else math.inf)
        monkeypatch.setattr(torch.UntypedStorage, "_new_shared", out_of_shared_memory)
    return request.param


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_keep_the_order_of_files(grey, workers, way):
    loader = ImageLoader(reader(), workers, CPU)
    for rows in (
        [[4, 0], [2, 1], [3]],
        [[5]],
        [],
        [[1, 1], [0, 5], [2, 3], [4, 4], [0, 0], [5, 1]],
    ):
        batches = list(loader.batches(batches_of(grey, *rows)))
        assert [greys(batch) for batch in batches] == rows
        for batch, files in zip(batches, batches_of(grey, *rows), strict=True):
            assert torch.equal(batch, torch.stack([reader()(file) for file in files]))


def test_processes_are_kept_from_pass_to_pass_and_end_with_the_loader(grey):
    before = workers_now()
    loader = ImageLoader(reader(), 2, CPU)
    assert workers_now() <= before  # none is started before there is work
    list(loader.batches([grey]))
    started = workers_now() - before
    assert len(started) == 2
    for _ in range(3):
        list(loader.batches([grey, grey]))
        assert workers_now() - before == started
    del loader
    gc.collect()  # what refers to itself keeps its loader, and the loader its processes
    assert workers_now().isdisjoint(started)


def test_a_pass_that_breaks_off_leaves_nothing_to_the_next(grey, tmp_path, way):
    """Batches that were on their way are not taken for those of the next pass."""
    (tmp_path / "broken.png").write_bytes(b"no image")
    loader = ImageLoader(reader(), 2, CPU)
    before = workers_now()
    for batch in loader.batches([[file] for file in grey * 3]):
        assert greys(batch) == [0]
        break
    with pytest.raises(UserError, match=r"broken\.png cannot be decoded"):
        list(loader.batches([grey[:2], [tmp_path / "broken.png"], grey, grey]))
    assert [greys(batch) for batch in loader.batches(batches_of(grey, [5, 1], [4]))] == [
        [5, 1],
        [4],
    ]
    assert len(workers_now() - before) == 2


def test_a_pass_inside_another_is_refused(grey):
    loader = ImageLoader(reader(), 1, CPU)
    with pytest.raises(RuntimeError, match="inside another"):
        for _ in loader.batches([grey, grey]):
            list(loader.batches([grey]))
    assert len(list(loader.batches([grey, grey]))) == 2


def test_without_processes_passes_do_not_disturb_each_other(grey):
    """The web page encodes in threads."""
    loader = ImageLoader(reader(), 0, CPU)
    passes = [loader.batches(batches_of(grey, *rows)) for rows in ([[0], [1]], [[2], [3]])]
    found = [(greys(one), greys(other)) for one, other in zip(*passes, strict=True)]
    assert found == [([0], [2]), ([1], [3])]


def test_a_batch_takes_its_share_of_free_shared_memory(tmp_path, monkeypatch):
    """Each of two processes on a machine has workers of its own, and all of them share the memory."""
    free = shutil.disk_usage(tmp_path)._replace(free=64_000_000)
    monkeypatch.setattr(collate.shutil, "disk_usage", lambda folder: free)
    monkeypatch.setattr(collate, "SHARED_MEMORY", tmp_path)
    assert collate.batch_room(0) == math.inf
    assert collate.batch_room(7) == 2_000_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert collate.batch_room(7) == 1_000_000
    monkeypatch.setattr(collate, "SHARED_MEMORY", tmp_path / "none")
    assert collate.batch_room(7) == 0


def out_of_shared_memory(*size) -> None:
    raise RuntimeError(
        "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device"
    )


# How a process that decodes fails: by a signal of the kernel, by itself, or in an error of PyTorch's.
DEATHS = {
    "bus error": lambda: os.kill(os.getpid(), signal.SIGBUS),
    "exit": lambda: os._exit(3),
    "shared memory": out_of_shared_memory,
}
if SOAK:
    DEATHS["killed for memory"] = lambda: os.kill(os.getpid(), signal.SIGKILL)
    DEATHS["segmentation fault"] = lambda: os.kill(os.getpid(), signal.SIGSEGV)


def dying_reader(deadly, death):
    """Read images; a process that decodes dies of one of them."""

    def read(path):
        if path == deadly and torch.utils.data.get_worker_info():
            death()
        return reader()(path)

    return read


@pytest.mark.parametrize("name", DEATHS)
def test_a_worker_that_dies_has_a_remedy(grey, name, capfd):
    loader = ImageLoader(dying_reader(grey[5], DEATHS[name]), 2, CPU)
    for _ in range(2):  # it does not hang when it is asked again
        with pytest.raises(RuntimeError) as error:
            list(loader.batches([grey[:3], grey[3:]]))
        told = refusal_of_the_machine(error.value)
        assert told.endswith(WORKERS_REMEDY)
        assert len(told.splitlines()) == 1
    assert "--shm-size" in WORKERS_REMEDY
    assert "--num-workers 0" in WORKERS_REMEDY
    assert "Traceback" not in capfd.readouterr().err


def load_with_few_files(paths: list[Path], said: Path, errors: Path) -> None:
    """Write what a loader says that has room for eight more open files, and beside it what else is printed."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    loader = ImageLoader(reader(), 4, CPU)
    last = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (last + 9, last + 9))
    taken = []
    with contextlib.suppress(OSError):
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    for _ in range(8):
        os.close(taken.pop())
    try:
        list(loader.batches([paths[:3], paths[3:]]))
    except UserError as error:
        os.close(taken.pop())
        said.write_text(str(error))


def test_too_few_open_files_are_one_line(grey, tmp_path):
    """Nothing is printed of the processes that started, nor told of shared memory."""
    said, errors = tmp_path / "said", tmp_path / "errors"
    process = forked(load_with_few_files, grey, said, errors)
    process.join(HANG)
    assert process.exitcode == 0
    assert re.search("cannot start .*ulimit -n", said.read_text())
    assert "Traceback" not in errors.read_text()


def test_a_long_temporary_directory_has_a_remedy(grey, tmp_path, monkeypatch):
    """Processes listen at sockets in it, whose paths have 107 bytes at most; PyTorch would wait for ever."""
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", str(folder))
    with pytest.raises(OSError, match="path too long") as error:
        list(ImageLoader(reader(), 2, CPU).batches([grey]))
    assert "TMPDIR" in refusal_of_the_machine(error.value)


def test_workers_that_cannot_start_have_a_remedy(grey, monkeypatch):
    """As without /dev/shm, in which Python has its semaphores."""

    def refused(*arguments, **more):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", refused)
    with pytest.raises(UserError, match=r"cannot start .*--shm-size.*--num-workers 0"):
        list(ImageLoader(reader(), 2, CPU).batches([grey]))


def test_what_an_image_is_to_blame_for_is_no_death(grey):
    """Guards against taking any error for the machine's."""

    def read(path):
        raise RuntimeError("a fault of the program")

    with pytest.raises(RuntimeError, match="a fault of the program") as error:
        list(ImageLoader(read, 1, CPU).batches([grey]))
    assert refusal_of_the_machine(error.value) is None


@pytest.mark.parametrize("workers", [0, 2])
def test_texts_stay_beside_the_images(grey, tmp_path, workers, way):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    read = functools.partial(read_or_explain, read=reader(), resolution=16)
    (batch,) = ImageLoader(read, workers, CPU).batches([[grey[3], broken, grey[5]]])
    assert greys(batch[0]) == [3, 0, 5]
    assert not batch[0][1].any()
    assert batch[1][0] == batch[1][2] == ""
    assert batch[1][1].startswith(f"image {broken} cannot be decoded")


def test_one_ahead():
    """What is sent to a GPU is sent while it works with the one before, and not earlier."""
    events = []

    def sent():
        for number in range(4):
            events.append(f"send {number}")
            yield number

    for number in one_ahead(sent()):
        events.append(f"work {number}")
    order = "send 0, send 1, work 0, send 2, work 1, send 3, work 2, work 3"
    assert ", ".join(events) == order
    assert list(one_ahead([])) == []
    assert list(one_ahead([7])) == [7]


@pytest.mark.slow
def test_one_set_of_processes_serves_a_training(stage_1, monkeypatch):
    """All epochs, validations included, of the weights and of their average."""
    started = []
    real = multiprocessing.process.BaseProcess.start
    monkeypatch.setattr(
        multiprocessing.process.BaseProcess,
        "start",
        lambda process: started.append(process) or real(process),
    )
    stage_1("CIRR", "--num-workers", 2, "--ema-decay", 0.9)
    assert len(started) == 2
    gc.collect()
    assert workers_now().isdisjoint(process.pid for process in started)


def drawn_photo(file, width: int, height: int):
    """A photo of soft and bright colours, so that what padding adds can be told from it."""
    corners = [[(250, 120, 120), (120, 250, 120)], [(120, 120, 250), (250, 250, 120)]]
    soft = Image.fromarray(np.array(corners, dtype=np.uint8))
    soft.resize((width, height), Image.BILINEAR).save(file, quality=95)
    return file


def pixels_of(file, transform: str, resolution: int, side: int | None):
    preprocess = make_preprocess(transform, 1.25, resolution)
    return load_image(file, preprocess, functools.partial(decoded, side=side)).int()


def padding(pixels) -> list[int]:
    """How many rows and columns are black above, below, left and right."""
    rows, columns = (pixels.amax(0).amax(axis) > 30 for axis in (1, 0))
    counts = []
    for filled in (rows, rows.flip(0), columns, columns.flip(0)):
        counts.append(int(filled.int().argmax()))
    return counts


@pytest.mark.parametrize("transform", ["clip", "squarepad", "targetpad"])
@pytest.mark.parametrize("size", [(512, 384), (701, 1024), (300, 1025), (1031, 257), (640, 512)])
def test_a_draft_is_padded_like_the_whole_image(transform, size, tmp_path):
    """Up to the rounding of a pixel. What it shows is where it was: colours change by 4 to 16 levels a pixel."""
    file = drawn_photo(tmp_path / "photo.jpg", *size)
    assert min(decoded(file, side=32).size) < min(size) / 2  # it is one
    full = pixels_of(file, transform, 32, None)
    draft = pixels_of(file, transform, 32, 32)
    assert draft.shape == full.shape
    for one, other in zip(padding(full), padding(draft), strict=True):
        assert abs(one - other) <= 1
    middle = (full - draft)[:, 13:19, 13:19].abs()
    assert middle.max() <= 8


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_draft_of_what_is_less_than_twice_as_large_is_the_image(mode, tmp_path):
    picture(mode, 90, 63).save(tmp_path / "small.jpg")
    picture("RGB", 400, 300).save(tmp_path / "large.png")  # only JPEG has drafts
    for file in sorted(tmp_path.iterdir()):
        for transform in ("clip", "squarepad", "targetpad"):
            full = pixels_of(file, transform, 32, None)
            assert torch.equal(pixels_of(file, transform, 32, 32), full)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_draft_has_at_least_the_pixels_that_are_needed(mode, tmp_path):
    picture(mode, 801, 405).save(tmp_path / "photo.jpg")
    sizes = {401: (801, 405), 200: (401, 203), 101: (201, 102), 50: (101, 51), 8: (101, 51)}
    for side, size in sizes.items():
        draft = decoded(tmp_path / "photo.jpg", side=side)
        assert (draft.size, draft.mode) == (size, mode)


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("size", [(1, LONGEST_SIDE + 1), (40, 4_194_334), (14_000, 14_000)])
def test_an_image_that_padding_makes_too_large_is_refused(size, tmp_path):
    Image.new("1", size).save(tmp_path / "long.png", compress_level=1)
    limit = "a side above 18,000 pixels" if max(size) > LONGEST_SIDE else "limit of 178956970"
    for transform in ("clip", "squarepad", "targetpad"):
        refusal = rf"long\.png cannot be decoded .*{limit}.*: scale it down"
        with pytest.raises(UserError, match=refusal):
            load_image(tmp_path / "long.png", make_preprocess(transform, 1.25, 16))
    assert inspect(tmp_path / "long.png").problem == TOO_LARGE
    assert all(told in TOO_LARGE for told in ("18,000", "178,956,970", "magick"))


@pytest.mark.parametrize("size", [(1, LONGEST_SIDE), (LONGEST_SIDE, 1)])
def test_an_image_at_the_limit_is_padded(size, tmp_path):
    Image.new("1", size, 1).save(tmp_path / "long.png")
    pixels = load_image(tmp_path / "long.png", make_preprocess("targetpad", 1.25, 8))
    assert pixels.shape == (3, 8, 8)
    assert inspect(tmp_path / "long.png").problem == ""


def start_as_a_signal_comes(number: int) -> None:
    """What a worker does first, with a scheduler's signal just before."""
    os.kill(os.getpid(), signal.SIGTERM)
    interruption.heed_parent_alone()


def test_a_worker_survives_a_signal_while_it_starts(tmp_path, monkeypatch):
    monkeypatch.setattr("data_utils._start_worker", start_as_a_signal_comes)
    Image.new("RGB", (16, 16)).save(tmp_path / "0.png")
    loader = ImageLoader(reader(), 2, CPU)
    assert len(list(loader.batches([[tmp_path / "0.png"]] * 2))) == 2
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []).isdisjoint(interruption.SIGNALS)


def decode_until_killed(paths: list[Path], temporary: Path) -> None:
    """Decode in two processes, in another temporary directory, and be killed."""
    interruption.LOOK_EVERY = 0.1
    tempfile.tempdir = str(temporary)
    multiprocessing.current_process()._config.pop("tempdir", None)  # that of the tests
    for number, _ in enumerate(ImageLoader(reader(), 2, CPU).batches([[path] for path in paths])):
        if number == 3 and list(temporary.rglob("listener-*")):
            os.kill(os.getpid(), signal.SIGKILL)


def test_workers_whose_parent_is_killed_leave_nothing(grey):
    """In a folder of a short name, as sockets have room for."""
    with tempfile.TemporaryDirectory(prefix="w") as name:
        process = FORK.Process(target=decode_until_killed, args=(grey, Path(name)))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        give_up = time.monotonic() + HANG
        while list(Path(name).iterdir()) and time.monotonic() < give_up:
            time.sleep(0.02)  # they look from time to time whether it is there
        assert list(Path(name).iterdir()) == []


def test_missing_and_empty_images_are_counted(golden):
    from benchmarks import CIRR

    split = CIRR(golden).val()[0]
    check_images_exist([split])
    lost = golden / "nowhere.png"
    split.image_paths[split.names[3]] = lost
    with pytest.raises(UserError, match=r"1 of \d+ image files .*nowhere.png"):
        check_images_exist([split])
