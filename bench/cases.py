"""All checks and benchmarks: `run.py` runs the benchmarks of one device, `gpu_check.py` all that need a GPU."""

from dataclasses import dataclass

import attention
import encoding
import equality
import index_memory
import libraries
import moe
import original
import parallel
import processes
import ranking
import stage1
import stage2
import traces
import trainings
import vector_search
from isolated import Run

BOTH = frozenset({"cpu", "cuda"})
CPU = frozenset({"cpu"})
GPU = frozenset({"cuda"})


@dataclass(frozen=True, kw_only=True)
class Case:
    """Measurements that run together, in a process of their own.

    Attributes:
        run: function that yields the rows of the results.
        seconds: maximum duration on a GPU.
        on: kinds of device that the case is for.
        checks: whether the rows pass or fail; otherwise, they are timings.
        unasked: whether the case runs by default.
    """

    run: Run
    seconds: float = 60
    on: frozenset[str] = GPU
    checks: bool = False
    unasked: bool = True


# The order on a GPU: first correctness, then the operations that cost most, then less important figures.
CASES = {
    "golden": Case(run=original.validations, checks=True),
    "golden-losses": Case(run=original.full_batch_losses, checks=True),
    "combiners": Case(run=equality.combiners, seconds=30, checks=True),
    "clip-package": Case(run=equality.clip_package, checks=True),
    "micro-batches": Case(run=equality.micro_batches, seconds=30, checks=True),
    "ranks": Case(run=equality.ranking, seconds=30, checks=True),
    "learning": Case(run=trainings.learning, seconds=120, checks=True),
    "resuming": Case(run=trainings.resuming, checks=True),
    "gloo": Case(run=parallel.by_gloo, checks=True),
    "nccl": Case(run=parallel.by_nccl, seconds=30, checks=True),
    "stage1-resnet": Case(run=stage1.figures_of_resnet),
    "stage1-vit": Case(run=stage1.figures_of_vit),
    "stage1-large-batch": Case(run=stage1.large_batch, seconds=40),
    "stage2-full-size": Case(run=stage2.full_size, seconds=30),
    "stage2-bank": Case(run=stage2.bank, seconds=20, on=BOTH, unasked=False),
    "encoding": Case(run=encoding.figures, seconds=40),
    "moe": Case(run=moe.figures, seconds=30, on=BOTH),
    "stage1-variants": Case(run=stage1.variants, seconds=40),
    "stage1-memory": Case(run=stage1.memory, seconds=40),
    "attention": Case(run=attention.figures, seconds=20),
    "waits": Case(run=traces.waits, seconds=30),
    "profiles": Case(run=traces.profiles, seconds=40),
    "stage1-resnet-compiled": Case(run=stage1.compiled_resnet, seconds=90),
    "stage1": Case(run=stage1.figures, on=BOTH),
    "saving": Case(run=stage1.saving),
    "index": Case(run=encoding.index),
    "stage1-vit-compiled": Case(run=stage1.compiled_vit, seconds=90),
    "ranking": Case(run=ranking.figures, on=BOTH),
    "stage2": Case(run=stage2.drawn, seconds=90, on=BOTH),
    "processes": Case(run=processes.figures, on=CPU),
    "search": Case(run=vector_search.figures, on=CPU),
    "search-hnsw": Case(run=vector_search.figures_of_graph, on=CPU, unasked=False),
    "search-on-disk": Case(run=index_memory.on_disk, on=CPU),
    "libraries": Case(run=libraries.figures, on=CPU, unasked=False),
    "index-million": Case(run=index_memory.updates, on=CPU, unasked=False),
}
