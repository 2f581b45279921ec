"""Measure time, memory and activations, for one implementation or for two in turns."""

import gc
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

GIB = 2**30

Row = dict[str, Any]  # row of a table of results, see `report.line`
Size = TypeVar("Size")
Step = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """Device and size of the cases.

    Attributes:
        rehearses: whether this is a dry run, in which everything runs at the smallest size and figures mean nothing.
    """

    device: torch.device
    rehearses: bool = False

    @property
    def on_gpu(self) -> bool:
        """Check whether cases run on a GPU."""
        return self.device.type == "cuda"

    def choose(self, *, gpu: Size, tiny: Size, cpu: Size | None = None) -> Size:
        """Return the size for a GPU, for a dry run, or for a CPU if the case is timed on a CPU."""
        if self.rehearses:
            return tiny
        if self.on_gpu:
            return gpu
        assert cpu is not None, "not a case of the CPU"
        return cpu


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the wall-clock seconds of one call, including the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def in_turns(
    ours: Callable[[], object],
    twin: Callable[[], object],
    device: torch.device,
    rounds: int = 5,
    twin_rounds: int = 5,
) -> tuple[float, float]:
    """Return the median seconds of both sides, which alternate after a warm-up call of each.

    Args:
        twin: the reference implementation.
        twin_rounds: number of rounds of the reference; if it differs from `rounds`, the reference has no warm-up call.
    """
    ours()
    if twin_rounds == rounds:
        twin()
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        times[0].append(seconds(ours, device))
        if number < twin_rounds:
            times[1].append(seconds(twin, device))
    return statistics.median(times[0]), statistics.median(times[1])


def processor_seconds(sides: Mapping[str, Step], rounds: int) -> dict[str, float]:
    """Return the median CPU-seconds of each side. The sides take turns; other work on the machine is not counted."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, work in sides.items():
            start = time.process_time()
            work()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def typical(work: Step, setting: Setting, rounds: int = 5, unmeasured: int = 2) -> float:
    """Return the median seconds of a call, after some unmeasured calls; in a dry run, the seconds of one call."""
    for _ in range(0 if setting.rehearses else unmeasured):
        work()
    times = [seconds(work, setting.device) for _ in range(1 if setting.rehearses else rounds)]
    return statistics.median(times)


@dataclass(frozen=True)
class Cost:
    """Cost of a step: seconds, and total peak memory in GiB."""

    seconds: float
    peak: float


def cost(
    make: Callable[[], Step], setting: Setting, rounds: int = 5, unmeasured: int = 2
) -> Cost | None:
    """Measure the cost of a step, which is built and freed with its model; return None if memory is too small."""
    try:
        step = make()
        step()  # creates the optimizer's state
        if setting.on_gpu:
            torch.cuda.reset_peak_memory_stats(setting.device)
        taken = typical(step, setting, rounds, unmeasured)
        return Cost(taken, peak_memory(setting.device) / GIB)
    except torch.OutOfMemoryError:
        return None
    finally:
        step = None
        gc.collect()
        if setting.on_gpu:
            torch.cuda.empty_cache()


def peak_memory(device: torch.device) -> int:
    """Return the peak memory so far in bytes: of this process's tensors on a GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def extra_memory(work: Callable[[], object], device: torch.device) -> int:
    """Return the peak memory of a call in bytes, beyond the memory that was in use before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak on Linux
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def saved_activations(work: Callable[[], object], model: nn.Module) -> int:
    """Return the peak bytes that autograd keeps for backward passes during a call, without the model's weights."""
    live: Counter[int] = Counter()  # storage -> number of kept tensors in it
    sizes: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    peak = 0

    class Kept:
        """A kept tensor; its storage counts until the last tensor in it is released."""

        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal peak
            self.tensor, storage = tensor, tensor.untyped_storage()
            self.key = storage.data_ptr()
            live[self.key] += 1
            sizes[self.key] = storage.nbytes()
            peak = max(
                peak, sum(sizes[key] for key, count in live.items() if count and key not in weights)
            )

        def __del__(self) -> None:
            live[self.key] -= 1

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        work()
    return peak


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


# A small process in between, because the peak memory of a child starts at the memory of its parent.
LAUNCHER = """
import resource, subprocess, sys
code = subprocess.run([sys.executable, *sys.argv[1:]], stderr=subprocess.DEVNULL).returncode
print()
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def run_script(*words: object) -> dict:
    """Run a script; return its seconds, peak memory in GiB, exit code, and last line of output."""
    start = time.monotonic()
    command = [sys.executable, "-c", LAUNCHER, *map(str, words)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True)
    *said, kilobytes = done.stdout.strip().splitlines()
    said = [line for line in said if line.strip()]
    return {
        "command": " ".join(map(str, words[:3])),
        "seconds": round(time.monotonic() - start, 1),
        "GiB": round(int(kilobytes) / 2**20, 2),
        "exit code": done.returncode,
        "says": said[-1] if said else "",
    }


def script_table(rows: list[dict], folder: str) -> str:
    """Return rows of `run_script` as a table in Markdown; a folder's name is replaced by DIR."""
    lines = [
        "| command | seconds | largest process, GiB | exit code | says |",
        "|---|---|---|---|---|",
    ]
    lines += [
        "| " + " | ".join(str(value).replace(folder, "DIR") for value in row.values()) + " |"
        for row in rows
    ]
    return "\n".join(lines)
