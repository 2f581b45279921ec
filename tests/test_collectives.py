"""What processes send each other: the same calls in the same order on all ranks, and each where its backend is."""

import contextlib
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import STAGE_1, STAGE_2, read_csv
from forks import torchrun
from runtime import distributed

GPU = torch.device("cuda", 0)


class Collectives(TorchDispatchMode):
    """Writes down each collective, those that torch's C++ calls too: its name, and shape, type and device of tensors.

    A number that is read off the device, which fake tensors do not have, is a given one where there is one.
    """

    def __init__(self, number: int | None = None) -> None:
        super().__init__()
        self.number = number
        self.lines = []
        self.devices = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            name = operation.overloadpacket.__name__
            words = [f"{tuple(t.shape)} {t.dtype} {t.device}" for t in tensors]
            self.lines.append(f"{name}: {', '.join(words)}")
            self.devices.update((name, tensor.device.type) for tensor in tensors)
        if operation is torch.ops.aten._local_scalar_dense.default and self.number is not None:
            return self.number
        return operation(*args, **(kwargs or {}))

    def note_reductions(self) -> None:
        """Write down by what numbers are reduced, too, which C++ does not tell."""
        real = dist.all_reduce

        def all_reduce(tensor, op=dist.ReduceOp.SUM, **more):
            self.lines.append(f"by {op}")
            return real(tensor, op, **more)

        dist.all_reduce = all_reduce


# What a process does: a script with its collectives written down.
LOGGED = """
import importlib, os, sys
from pathlib import Path
from test_collectives import Collectives
folder, script, *argv = sys.argv[1:]
log = Collectives()
log.note_reductions()
with log:
    importlib.import_module(script).main(argv)
Path(folder, os.environ["RANK"]).write_text("\\n".join(log.lines))
"""
BOTH = "--ema-decay 0.9 --clip-grad-norm 1 --mask-duplicate-targets --num-workers 0 --device cpu"
PENALTIES = "--load-balancing-weight 0.1 --router-z-weight 0.1"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (
            "clip_fine_tune",
            f"{STAGE_1} {BOTH} --dataset FashionIQ --num-epochs 1 --micro-batch-size 2",
        ),
        (
            "combiner_train",
            f"{STAGE_2} {BOTH} --dataset CIRR --num-epochs 1 {PENALTIES} --precision fp16 --save-best",
        ),
    ],
)
def test_all_ranks_call_the_same_collectives_in_the_same_order(
    script, flags, drawn, start, tmp_path
):
    """Each trains on triplets of its own, which other experts take. One call more or less would hang NCCL."""
    (tmp_path / "logged.py").write_text(LOGGED)
    where = ["--data-root", drawn, "--output-dir", tmp_path / "runs"]
    name = ["--clip-model-name", drawn / "tiny_clip_vit.pt"]
    cache = ["--feature-cache", tmp_path / "cache"] if script == "combiner_train" else []
    words = [tmp_path / "logged.py", tmp_path, script, *flags.split(), *where, *name, *cache]
    process = start(*torchrun(2), *words)
    assert process.wait() == 0, process.stderr
    one, two = ((tmp_path / rank).read_text().splitlines() for rank in "01")
    assert one == two
    seen = {line.split(":")[0] for line in one}
    assert seen >= {"allreduce_", "allgather_", "broadcast_", "by RedOpType.MAX"}
    if "fp16" in flags:
        (run,) = (tmp_path / "runs").iterdir()
        assert read_csv(run / "loss_scaling_metrics.csv")["skipped_steps"][0] >= 1


@pytest.fixture
def on_gpus(monkeypatch):
    """This process is the first of two, each with a GPU: tensors have no content, and a backend moves nothing."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    dist.init_process_group("cpu:fake,cuda:fake", store=FakeStore(), rank=0, world_size=2)

    @contextlib.contextmanager
    def on_gpus():
        with FakeTensorMode(allow_non_fake_inputs=True), Collectives(number=4) as log:
            yield log

    yield on_gpus
    dist.destroy_process_group()


@pytest.mark.parametrize("gather", [distributed.gather_rows, distributed.gather_shards])
def test_rows_of_a_gpu_are_gathered_on_it(gather, on_gpus):
    with on_gpus() as log:
        rows = gather(torch.zeros(4, 3, device=GPU))
    assert (rows.shape, rows.device) == ((8, 3), GPU)
    assert {device for _, device in log.devices} == {"cuda"}


@pytest.mark.parametrize("there", [True, False])
def test_the_main_ranks_tensor_goes_from_gpu_to_gpu_and_its_description_over_the_cpu(
    there, on_gpus
):
    with on_gpus() as log:
        got = distributed.from_main(torch.zeros(4, 3) if there else None, GPU)
    (*description, last) = log.lines
    assert description
    if there:
        assert got.device == GPU
        assert last == "broadcast_: (4, 3) torch.float32 cuda:0"
    else:
        assert got is None
        description.append(last)
    assert all(line.startswith("broadcast_") and line.endswith("cpu") for line in description)


def test_votes_texts_and_waits_go_over_the_cpu(on_gpus):
    with on_gpus() as log:
        distributed.highest(1, 0, 3)
        assert distributed.same_object("a text") == "a text"
        distributed.wait_for_all()
    assert {name for name, _ in log.devices} == {"allreduce_", "broadcast_", "barrier"}
    assert {device for _, device in log.devices} == {"cpu"}
