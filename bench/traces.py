"""Profile a step of each stage, and find the lines where a training run waits for the device."""

import collections
import functools
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import clip_fine_tune
import combiner_train
from runs import draw
from stage1 import TIMED, make_step, random_clip
from stage2 import full_size_epoch
from timing import Row, Setting, Step, seconds

SHOWN = 10


def profiles(setting: Setting) -> Iterator[Row]:
    """Profile the slowest operations in a step of stage 1 and in an epoch of stage 2."""
    batch = setting.choose(gpu=32, tiny=2)
    for name in TIMED:
        step = make_step(random_clip(name, setting), batch, setting.device)
        yield profiled(f"a stage-1 step of {name}, batch {batch}", step, setting)
    yield profiled("a stage-2 epoch at CIRR's real size", full_size_epoch(setting), setting)


def profiled(what: str, step: Step, setting: Setting) -> Row:
    """Return a row with the operations of a step that take most time on the device."""
    step()
    taken = seconds(step, setting.device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.on_gpu else [])]
    with profile(activities=activities) as trace:
        seconds(step, setting.device)
    own = "self_device_time_total" if setting.on_gpu else "self_cpu_time_total"
    # Events of kernels are left out: their time is included in the operations that launched them.
    operations = [event for event in trace.key_averages() if event.device_type == DeviceType.CPU]
    events = sorted(operations, key=lambda event: -getattr(event, own))[:SHOWN]
    longest = {event.key: getattr(event, own) / 1e3 for event in events}  # ms
    note = ", ".join(f"{name[:60]} {ms:.2f} ms" for name, ms in longest.items())
    return {"figure": f"profile of {what}", "ours": taken, "ms": longest, "note": note}


def waits(setting: Setting) -> Iterator[Row]:
    """Find the lines where short training runs of both stages, with validations, wait for the device."""
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data"
        draw(data, setting)
        flags = ["--dataset", "CIRR", "--data-root", data, "--num-workers", 0]
        flags += ["--clip-model-name", data / "tiny_clip_vit.pt", "--device", setting.device]
        flags += ["--batch-size", setting.choose(gpu=60, tiny=12), "--num-epochs", 2]
        flags += ["--validation-frequency", 1, "--output-dir", Path(name) / "runs"]
        sizes = ["--projection-dim", 64, "--hidden-dim", 128, "--no-feature-cache"]
        for stage, main, own in (
            ("stage 1", clip_fine_tune.main, []),
            ("stage 2", combiner_train.main, sizes),
        ):
            words = list(map(str, [*flags, *own]))
            places = waiting_places(functools.partial(main, words), setting)
            most = ", ".join(f"{place} {times} x" for place, times in places.most_common(SHOWN))
            yield {
                "figure": f"waits of {stage}: 2 epochs, each with a validation, 20 steps",
                "waits": dict(places),
                "note": f"{places.total()}: {most}",
            }


def waiting_places(work: Step, setting: Setting) -> collections.Counter[str]:
    """Return line of code -> number of times that it waited for a GPU."""
    found: collections.Counter[str] = collections.Counter()

    def count(message: Warning | str, *_: object) -> None:
        if "synchronizing CUDA operation" in str(message):
            found[place()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = count
        if setting.on_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        work()
    return found


def place() -> str:
    """Return the innermost line of this project or of the clip package on the call stack."""
    frames = [
        frame
        for frame in traceback.extract_stack()
        if "/src/" in frame.filename or "/clip/" in frame.filename
    ]
    if not frames:
        return "elsewhere"
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
