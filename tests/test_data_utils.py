"""Padding, preprocessing on every image mode, broken images, and batches in order."""

import functools
import gc
import multiprocessing
import os
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import data_utils
from benchmarks.image_check import TOO_LARGE, inspect
from benchmarks.splits import check_images_exist
from data_utils import (
    ImageLoader,
    SquarePad,
    TargetPad,
    load_image,
    make_preprocess,
    normalise,
    one_ahead,
    read_or_explain,
)
from forks import HANG, family, forked
from models.clip_model import CLIP_MEAN, CLIP_STD
from runtime import interruption
from runtime.image_files import LONGEST_SIDE, decoded
from utils import UserError

MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"]
CPU = torch.device("cpu")


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


@pytest.mark.parametrize("transform", ["squarepad", "targetpad"])
@pytest.mark.parametrize("size", [(1, 2000), (2000, 1), (1, 1)])
def test_extreme_aspect_ratios(transform, size):
    assert make_preprocess(transform, 1.25, 32)(picture("RGB", *size)).shape == (3, 32, 32)


@pytest.mark.parametrize("mode", MODES)
@given(data=st.data())
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_long_image_is_padded_in_strips_to_the_last_bit(mode, data):
    """Against padding as a whole, which smaller images get."""
    size = data.draw(st.tuples(st.integers(1, 120), st.integers(1, 120)), label="size")
    transform = data.draw(st.sampled_from(["squarepad", "targetpad"]), label="transform")
    resolution = data.draw(st.integers(1, 40), label="resolution")
    resize = make_preprocess(transform, 1.25, resolution).transforms[0]
    image = picture(mode, *size)
    whole = resize(image)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_utils, "MOST_PADDED", 0)
        patch.setattr(data_utils, "STRIP", data.draw(st.integers(1, 3000), label="strip"))
        in_strips = resize(image)
    assert (in_strips.mode, in_strips.size) == (whole.mode, whole.size)
    assert in_strips.tobytes() == whole.tobytes()
    assert in_strips.convert("RGB").tobytes() == whole.convert("RGB").tobytes()


@pytest.mark.parametrize("transform", ["squarepad", "targetpad"])
@pytest.mark.parametrize("size", [(1, LONGEST_SIDE), (LONGEST_SIDE, 1), (16_000, 3000)])
def test_no_image_takes_more_memory_than_a_few_of_its_size(transform, size, monkeypatch):
    made = []
    real = Image.new

    def new(mode, size, *how):
        made.append(size[0] * size[1])
        return real(mode, size, *how)

    image = Image.new("L", size)
    monkeypatch.setattr(Image, "new", new)
    make_preprocess(transform, 1.25, 32)(image)
    assert made
    assert max(made) <= max(data_utils.STRIP, size[0] * size[1])


def test_preprocess_is_clips_own_where_nothing_is_padded():
    """Against the clip package's transform."""
    from clip.clip import _transform

    image = picture("RGBA", 50, 45)
    for transform in ("clip", "targetpad"):
        assert torch.equal(
            normalise(make_preprocess(transform, 1.25, 24)(image), CLIP_MEAN, CLIP_STD),
            _transform(24)(image),
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
    gc.collect()  # what refers to itself keeps its loader, and the loader its processes
    return set(family(os.getpid())[1:])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_keep_the_order_of_files(grey, workers):
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
    assert workers_now() == before  # none is started before there is work
    list(loader.batches([grey]))
    started = workers_now() - before
    assert len(started) == 2
    for _ in range(3):
        list(loader.batches([grey, grey]))
        assert workers_now() - before == started
    del loader
    assert workers_now() == before


def test_a_pass_that_breaks_off_leaves_nothing_to_the_next(grey, tmp_path):
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


def out_of_shared_memory() -> None:
    raise RuntimeError(
        "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left"
    )


def no_threads() -> None:
    raise RuntimeError("can't start new thread")


# How a process that decodes fails: by signals of the kernel, by itself, or in an error of PyTorch's.
DEATHS = {
    "bus error": lambda: os.kill(os.getpid(), signal.SIGBUS),
    "killed for memory": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segmentation fault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "exit": lambda: os._exit(3),
    "shared memory": out_of_shared_memory,
    "threads": no_threads,
}
PASS = [[4, 0], [2, 1], [3], [5, 5], [1]]


class Dying:
    """Reads an image; a process that decodes dies of one of them, each time or the first time alone."""

    def __init__(self, path, death, once):
        self.path = path
        self.death = death
        self.once = once  # a file that is there once a process has died

    def __call__(self, path):
        is_due = self.once is None or not self.once.exists()
        if path == self.path and is_due and torch.utils.data.get_worker_info():
            if self.once is not None:
                self.once.touch()
            self.death()
        return reader()(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dies"),
    [*((name, "always") for name in DEATHS), ("bus error", "once"), ("shared memory", "once")],
)
def test_images_come_whole_and_in_order_whatever_processes_die_of(
    grey, name, dies, tmp_path, caplog, capfd
):
    """First others go on through pipes, then this process goes on without any; each is said in a line."""
    once = tmp_path / "died" if dies == "once" else None
    loader = ImageLoader(Dying(grey[3], DEATHS[name], once), 2, CPU)
    before = workers_now()
    for _ in range(2):
        batches = list(loader.batches(batches_of(grey, *PASS)))
        assert [greys(batch) for batch in batches] == PASS
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (1 if dies == "once" else 2)
    for line in said:
        assert "--shm-size" in line
        assert "--num-workers" in line
        assert len(line.splitlines()) == 1
    assert len(workers_now() - before) == (2 if dies == "once" else 0)
    assert "Traceback" not in capfd.readouterr().err


def test_what_an_image_is_to_blame_for_ends_no_process(grey):
    """Guards against taking any error for the machine's."""

    def read(path):
        raise RuntimeError("a fault of the program")

    with pytest.raises(RuntimeError, match="a fault of the program"):
        list(ImageLoader(read, 1, CPU).batches([grey]))


@pytest.mark.slow
def test_texts_come_through_pipes_too(grey, tmp_path):
    read = functools.partial(
        read_or_explain,
        read=Dying(grey[3], DEATHS["exit"], tmp_path / "died"),
        resolution=16,
    )
    loader = ImageLoader(read, 2, CPU)
    for _ in range(2):
        batches = list(loader.batches(batches_of(grey, *PASS)))
        assert [greys(pixels) for pixels, _ in batches] == PASS
        assert all(text == "" for _, texts in batches for text in texts)


@pytest.mark.parametrize("workers", [0, 2])
def test_texts_stay_beside_the_images(grey, tmp_path, workers):
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
    before = workers_now()
    stage_1("FashionIQ", "--num-workers", 2, "--ema-decay", 0.9)
    assert len(started) == 2
    assert workers_now() == before


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
@pytest.mark.parametrize("transform", ["clip", "squarepad", "targetpad"])
@pytest.mark.parametrize("size", [(1, 18_001), (40, 4_194_334)])
def test_a_side_that_padding_would_square_is_refused(transform, size, tmp_path):
    Image.new("1", size).save(tmp_path / "long.png")
    with pytest.raises(
        UserError, match=r"long\.png cannot be decoded .*a side above 18,000 pixels"
    ):
        load_image(tmp_path / "long.png", make_preprocess(transform, 1.25, 16))
    assert inspect(tmp_path / "long.png").problem == TOO_LARGE


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
    tempfile.tempdir = str(temporary)
    multiprocessing.current_process()._config.pop("tempdir", None)  # that of the tests
    for number, _ in enumerate(ImageLoader(reader(), 2, CPU).batches([[path] for path in paths])):
        if number == 3 and list(temporary.rglob("listener-*")):
            os.kill(os.getpid(), signal.SIGKILL)


def test_workers_whose_parent_is_killed_leave_nothing(grey):
    """In a folder of a short name, as sockets have room for."""
    with tempfile.TemporaryDirectory(prefix="w") as name:
        process = forked(decode_until_killed, grey, Path(name))
        process.join()
        assert process.exitcode == -signal.SIGKILL
        give_up = time.monotonic() + HANG
        while list(Path(name).iterdir()) and time.monotonic() < give_up:
            time.sleep(0.1)  # they look every few seconds whether it is there
        assert list(Path(name).iterdir()) == []


def test_missing_and_empty_images_are_counted(golden):
    from benchmarks import CIRR

    split = CIRR(golden).val()[0]
    check_images_exist([split])
    lost = golden / "nowhere.png"
    split.image_paths[split.names[3]] = lost
    with pytest.raises(UserError, match=r"1 of \d+ image files .*nowhere.png"):
        check_images_exist([split])
