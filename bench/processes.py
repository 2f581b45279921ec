"""Time a stage-1 step in two processes with one CPU thread each, against one process with one thread.

Run as a script, this file is one of the processes, and prints the median seconds of a step.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from models.clip_model import load_clip, write_tiny_clip
from runtime import distributed
from stage1 import make_step
from timing import Row, Setting, seconds

BATCH, STEPS = 256, 5


def step_seconds(processes: int, clip: Path) -> float:
    """Return the median seconds of a step in a number of processes, always with the same global batch."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words = [sys.executable, *(torchrun if processes > 1 else []), __file__, str(clip)]
    root = Path(__file__).parent.parent
    places = os.pathsep.join([str(root / "src"), str(root / "tests")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": places}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def figures(setting: Setting) -> Iterator[Row]:
    """Yield the rows of the results table, only for CPUs."""
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.pt"
        write_tiny_clip(clip, "vit", image_resolution=64)
        pairs = [(step_seconds(2, clip), step_seconds(1, clip)) for _ in range(3)]
    ours, twin = (statistics.median(side) for side in zip(*pairs, strict=True))
    what = f"stage-1 step, batch {BATCH}, torchrun with 2 processes of 1 thread / 1 process of 1 thread"
    yield {"figure": what, "ours": ours, "twin": twin, "must": "1.6 x"}


def main() -> None:
    """Run one process's part of the measurement."""
    device = torch.device("cpu")
    distributed.start(device)
    model = load_clip(sys.argv[1], device)
    step = make_step(model, BATCH // distributed.world_size(), device)
    step()
    taken = statistics.median(seconds(step, device) for _ in range(STEPS))
    if distributed.is_main():
        print(taken)
    distributed.stop()


if __name__ == "__main__":
    main()
