"""What a training says: what it is when it begins, then its speed, its memory and the time that is left."""

import io
import logging
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from tqdm import tqdm

from runtime import progress
from runtime.progress import Counter, duration, rate
from trainers import stage_1_flags
from training import terminal
from training.terminal import Pace
from training.trainer import BAR_FORMAT

CPU = torch.device("cpu")
SPEED = r"[\d,.]+ (images|triplets)/s, learning rate \S+, \d+\.\d GiB, \d+ (s|min) left"


@pytest.fixture
def clock(monkeypatch):
    """The seconds that have passed, which a test sets."""
    seconds = [0.0]
    for module in (progress, terminal):
        monkeypatch.setattr(module.time, "monotonic", lambda: seconds[0])
    return seconds


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (90, "2 min"),
        (3599, "1 h 00 min"),
        (11_520, "3 h 12 min"),
        (360_000, "100 h 00 min"),
    ],
)
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words


def test_small_rates_keep_a_decimal():
    assert [rate(value) for value in (0.25, 9.9, 10.2, 12_345.6)] == ["0.2", "9.9", "10", "12,346"]


def test_a_file_gets_a_line_a_minute(clock, caplog, monkeypatch):
    """No bar, whose thousands of updates would all be in the file."""
    caplog.set_level(logging.INFO)
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    with Counter(1000, "encoding images") as counter:
        for _ in range(100):
            clock[0] += 4
            counter.update(10)
    assert written.getvalue() == ""
    assert len(caplog.messages) == 400 // 60
    assert caplog.messages[0] == "encoding images: 150 of 1,000, 2.5 images/s, 6 min left"


@pytest.mark.parametrize("shown", [True, False])
def test_a_terminal_gets_a_bar_and_no_lines(shown, clock, caplog, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    caplog.set_level(logging.INFO)
    written = Terminal()
    monkeypatch.setattr(sys, "stderr", written)
    with Counter(10, "encoding images", shown=shown) as counter:
        for _ in range(10):
            clock[0] += 100
            counter.update()
    assert ("encoding images" in written.getvalue()) == shown
    assert caplog.messages == []


def test_the_bar_of_a_long_training_fits_80_columns(clock):
    of = pace()
    of.task.images_each, of.flags = 0, of.flags.model_copy(update={"num_epochs": 300})
    of.task.steps = 12_345
    take(of, clock, steps=2, seconds=0.1)
    status = ", ".join(["loss 12.3456", *of.speed(0, 2)])
    assert re.fullmatch(r"loss 12.3456, 80 triplets/s, \d+ h \d\d min left", status)
    line = tqdm.format_meter(
        1234,
        12_345,
        60,
        ncols=80,
        prefix="epoch 299",
        postfix=status,
        bar_format=BAR_FORMAT,
        ascii=True,
    )
    assert len(line) == 80
    assert line.endswith("min left")
    assert re.search(r"\|[# \d]{5,}\|", line)  # a bar that can be seen


def pace() -> Pace:
    flags = stage_1_flags("--num-epochs", 10, "--validation-frequency", 2)
    return Pace(SimpleNamespace(steps=5, images_each=2), flags, CPU)


def take(of: Pace, clock: list[float], *, steps: int, seconds: float) -> None:
    """Steps of 8 triplets, the first of a process ten times slower."""
    with of.stepping():
        for _ in range(steps):
            clock[0] += seconds if of.warm else 10 * seconds
            of.count_step(8)


def test_the_first_step_of_a_process_is_left_out(clock):
    of = pace()
    take(of, clock, steps=1, seconds=3)
    assert "left" not in of.status(1e-6, epoch=0, done=1)
    take(of, clock, steps=4, seconds=3)
    status = of.status(2e-6, epoch=0, done=5)
    assert re.fullmatch(r"5\.3 images/s, learning rate 2e-06, \d+\.\d GiB, 2 min left", status)


def test_what_is_left_counts_steps_and_validations(clock):
    of = pace()
    take(of, clock, steps=5, seconds=2)
    assert of.seconds_left(0, 5) == 9 * 5 * 2
    with of.validating():
        clock[0] += 7
    # Epoch 0 is over: 9 epochs of 5 steps, and the validations after the epochs 2, 4, 6 and 8.
    assert of.seconds_left(1, 0) == 9 * 5 * 2 + 4 * 7
    clock[0] += 1000  # whatever else takes time, it is no step
    take(of, clock, steps=3, seconds=2)
    assert of.seconds_left(1, 3) == (9 * 5 - 3) * 2 + 4 * 7
    assert of.seconds_left(10, 0) == 0


@pytest.mark.parametrize(
    ("script", "flags", "learning"),
    [
        ("clip_fine_tune", ["--encoder", "text"], r"([\d,]+) of ([\d,]+) parameters, rate 2e-06"),
        ("combiner_train", ["--seeds", "1", "2"], r"([\d,]+) of \1 parameters, rate 2e-05"),
    ],
)
def test_a_training_says_what_it_is_and_how_fast_it_goes(
    script, flags, learning, run, drawn, caplog, monkeypatch
):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)  # a minute for which no test waits
    words = [*flags, "--num-epochs", 2, "--batch-size", 12, "--validation-frequency", 1]
    if script == "combiner_train":
        words += ["--projection-dim", 16, "--hidden-dim", 24, "--no-feature-cache"]
    words += ["--clip-model-name", drawn / "tiny_clip_vit.pt"]
    (folder,) = run(script, drawn, "--dataset", "CIRR", *words).iterdir()
    told = "\n".join(caplog.messages)
    folders = [folder] if script == "clip_fine_tune" else [folder / "seed_1", folder / "seed_2"]
    for of in folders:
        assert f"run: {of}" in caplog.messages
    assert re.search(
        r"^CIRR: [\d,]+ triplets to train, [\d,]+ to validate, [\d,]+ images$", told, re.M
    )
    found = re.search(rf"^learning: {learning}, 2 x \d+ steps of 12 triplets$", told, re.M)
    assert script == "combiner_train" or found[1] != found[2]
    assert re.search(r"^on: the CPU, precision amp \(float32\)$", told, re.M)
    epochs = re.findall(rf"^epoch (\d+): loss .*, \d+\.\d s; {SPEED}$", told, re.M)
    assert [number for number, *_ in epochs] == ["0", "1"] * len(folders)
    assert re.search(rf"^epoch 1, step 3 of \d+: loss \d+\.\d{{4}}, {SPEED}$", told, re.M)
    unit = "images" if script == "clip_fine_tune" else "triplets"
    assert {of for _, of, _ in epochs} == {unit}


def test_a_validation_that_wastes_a_gpu_is_told():
    half = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16)
    assert terminal.wastes_a_gpu(half, "fp32")
    assert not terminal.wastes_a_gpu(half, "fp16")
    for other in ({"dtype": None}, {"device": torch.device("cpu")}):
        assert not terminal.wastes_a_gpu(SimpleNamespace(**(vars(half) | other)), "fp32")
