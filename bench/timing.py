"""Where and how large to measure; two sides of a comparison in turns, one side alone, memory, activations."""

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

Row = dict[str, Any]  # of a table of results, see `report.line`
Size = TypeVar("Size")
Step = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """Where cases run, and how large they are.

    Attributes:
        rehearses: as small as it goes: everything runs, and no figure means anything.
    """

    device: torch.device
    rehearses: bool = False

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU computes."""
        return self.device.type == "cuda"

    def choose(self, *, gpu: Size, tiny: Size, cpu: Size | None = None) -> Size:
        """The size for a GPU, for a rehearsal, or for a CPU, where the case is timed on one."""
        if self.rehearses:
            return tiny
        if self.on_gpu:
            return gpu
        assert cpu is not None, "not a case of the CPU"
        return cpu


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call, the device's work included."""
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
    """Median seconds of both sides, measured one after the other in each round; each runs once before, unmeasured.

    Args:
        twin_rounds: rounds in which a slow twin takes part.
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
    """Median seconds of a core that each side takes, in turns: what others take of the machine is not counted."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, work in sides.items():
            start = time.process_time()
            work()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def typical(work: Step, setting: Setting, rounds: int = 5, unmeasured: int = 2) -> float:
    """Median seconds of a call, after some that are not measured; in a rehearsal those of one call."""
    for _ in range(0 if setting.rehearses else unmeasured):
        work()
    times = [seconds(work, setting.device) for _ in range(1 if setting.rehearses else rounds)]
    return statistics.median(times)


@dataclass(frozen=True)
class Cost:
    """What a step takes: seconds, and GiB of memory at its peak, all of it."""

    seconds: float
    peak: float


def cost(
    make: Callable[[], Step], setting: Setting, rounds: int = 5, unmeasured: int = 2
) -> Cost | None:
    """What a step costs that is made for this and freed again, with all its model; None where memory is too small."""
    try:
        step = make()
        step()  # the optimizer's state is there from now on
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
    """Bytes in use at the peak so far: of this process's tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def extra_memory(work: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call needs at its peak beyond what was in use before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def saved_activations(work: Callable[[], object], model: nn.Module) -> int:
    """Bytes that autograd keeps for backward passes at their peak during a call, the model's weights left out."""
    live: Counter[int] = Counter()  # storage -> how often it is kept
    sizes: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    peak = 0

    class Kept:
        """A kept tensor; its storage counts until the last one of it is gone."""

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


# A process between: what a child's memory is counted from is the memory of the one that started it.
LAUNCHER = """
import resource, subprocess, sys
code = subprocess.run([sys.executable, *sys.argv[1:]], stderr=subprocess.DEVNULL).returncode
print()
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def run_script(*words: object) -> dict:
    """Run a script; its seconds, its largest memory in GiB, its exit code and its last line."""
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
    """Rows of `run_script` in Markdown; a folder's name is left out of them."""
    lines = [
        "| command | seconds | largest process, GiB | exit code | says |",
        "|---|---|---|---|---|",
    ]
    lines += [
        "| " + " | ".join(str(value).replace(folder, "DIR") for value in row.values()) + " |"
        for row in rows
    ]
    return "\n".join(lines)
