"""Check training in several processes: two processes on one device by Gloo, and NCCL with one GPU."""

import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from equality import apart, step_gradients
from models.clip_model import load_clip, write_tiny_clip
from report import held
from runs import start
from runtime import distributed
from stage1 import random_batch
from timing import Row, Setting
from trainings import STAGE_1, STAGE_2, Stage, Training, Trainings, drift, trainings

QUESTIONS = 200


def free_port() -> int:
    """Return a port at which no process listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def of_two() -> list[dict[str, str]]:
    """Return the environments of two processes as torchrun would set them, but both with the first GPU."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        {**shared, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": "0"}
        for rank in ("0", "1")
    ]


def by_gloo(setting: Setting) -> Iterator[Row]:
    """Compare two processes on one device with one process, by Gloo, because NCCL needs a GPU for each process."""
    with trainings(setting) as made:
        for stage in (STAGE_1, STAGE_2):
            one = made.start(stage, "--precision", "fp32", device=setting.device.type)
            two = start_two(made, stage)
            one.script.wait()
            loss, recall = drift(one, two)
            what = f"{stage.name}, two processes / one"
            note = f"recalls {recall:.2f} points"
            if stage is STAGE_1:
                yield held(f"{what}, losses", loss, 1e-2, note)
            else:
                # Not a check: the order in which a GPU draws a dropout mask depends on the mask's shape.
                yield {"figure": what, "note": f"losses {loss:.3g}; {note}"}
    asked = [start(ask, environment=own) for own in of_two()]
    taken = [float(script.wait().split()[0]) for script in asked]
    what = "asking two processes whether to stop"
    yield {"figure": what, "ours": max(taken), "must": "1 % of a step"}


def start_two(made: Trainings, stage: Stage) -> Training:
    """Train a stage in two processes, and wait for both."""
    flags = ["--precision", "fp32"]
    first, second = (
        made.start(stage, *flags, device=made.setting.device.type, environment=own)
        for own in of_two()
    )
    first.script.wait()
    second.script.wait()
    return first


def ask(words: list[str]) -> None:
    """Print the seconds that one of several processes needs to ask whether to stop."""
    distributed.highest(0)
    start_of_all = time.perf_counter()
    for _ in range(QUESTIONS):
        distributed.highest(0)
    print((time.perf_counter() - start_of_all) / QUESTIONS)
    distributed.stop()


def by_nccl(setting: Setting) -> Iterator[Row]:
    """Check a barrier, a broadcast, and gradients of a parallel module: NCCL with one process, or Gloo in a dry run."""
    device = setting.device
    with tempfile.TemporaryDirectory() as folder:
        backend = "cpu:gloo,cuda:nccl" if setting.on_gpu else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        dist.barrier()
        content = [{"shape": (3, 4)}]
        dist.broadcast_object_list(content, device=device)
        yield held("an object broadcast", float(content != [{"shape": (3, 4)}]), 0)
        write_tiny_clip(Path(folder) / "clip.pt", "vit")
        model = load_clip(str(Path(folder) / "clip.pt"), device)
        inputs = random_batch(model, 16, device)
        for micro_batch in (None, 4):
            plain = step_gradients(model, inputs, "amp", micro_batch, device=device)
            ours = step_gradients(
                model, inputs, "amp", micro_batch, device=device, wrap=DistributedDataParallel
            )
            what = f"gradients through a parallel module, micro-batch {micro_batch} / plain module"
            yield held(what, apart(ours, plain), 1e-3)
        dist.destroy_process_group()
