"""What a step of each stage spends its time on, and where a training waits for the device."""

import collections
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import clip_fine_tune
import combiner_train
from runs import draw
from stage1 import ARCHITECTURES, make_step, random_clip
from stage2 import full_size_epoch
from timing import Row, Setting, Step, seconds

SHOWN = 10


def profiles(setting: Setting) -> Iterator[Row]:
    """The operations that take longest in a step of stage 1 and in an epoch of stage 2."""
    batch = setting.choose(gpu=32, tiny=2)
    for name in ARCHITECTURES:
        step = make_step(random_clip(name, setting), batch, setting.device)
        yield profiled(f"a stage-1 step of {name}, batch {batch}", step, setting)
    yield profiled("a stage-2 epoch at CIRR's real size", full_size_epoch(setting), setting)


def profiled(what: str, step: Step, setting: Setting) -> Row:
    """The operations of a step by their own time on the device."""
    step()
    taken = seconds(step, setting.device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.on_gpu else [])]
    with profile(activities=activities) as trace:
        seconds(step, setting.device)
    own = "self_device_time_total" if setting.on_gpu else "self_cpu_time_total"
    events = sorted(trace.key_averages(), key=lambda event: -getattr(event, own))[:SHOWN]
    longest = {event.key: getattr(event, own) / 1e3 for event in events}  # ms
    note = ", ".join(f"{name[:60]} {ms:.2f} ms" for name, ms in longest.items())
    return {"figure": f"profile of {what}", "ours": taken, "ms": longest, "note": note}


def waits(setting: Setting) -> Iterator[Row]:
    """Where short trainings of both stages, with their validations, wait for the device."""
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data"
        draw(data, setting)
        flags = ["--dataset", "CIRR", "--data-root", data, "--num-workers", 0]
        flags += ["--clip-model-name", data / "tiny_clip_vit.pt", "--device", setting.device]
        flags += [
            "--num-epochs",
            2,
            "--validation-frequency",
            1,
            "--output-dir",
            Path(name) / "runs",
        ]
        flags += ["--batch-size", setting.choose(gpu=60, tiny=12)]
        sizes = ["--projection-dim", 64, "--hidden-dim", 128, "--no-feature-cache"]
        stages = {"stage 1": (clip_fine_tune.main, []), "stage 2": (combiner_train.main, sizes)}
        for stage, (main, own) in stages.items():
            places = waiting_places(
                lambda main=main, own=own: main([str(f) for f in [*flags, *own]]), setting
            )
            note = ", ".join(f"{place} {times} x" for place, times in places.most_common(SHOWN))
            yield {
                "figure": f"waits of {stage}: 2 epochs of 10 steps, each with a validation",
                "waits": dict(places),
                "note": f"{places.total()}: {note}",
            }


def waiting_places(work: Step, setting: Setting) -> collections.Counter[str]:
    """File and line -> how often a GPU was waited for there."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if setting.on_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        work()
    found: collections.Counter[str] = collections.Counter()
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            file = Path(warning.filename)
            found[f"{file.parent.name}/{file.name}:{warning.lineno}"] += 1
    return found
