"""Write the table of gpus.md: the flags with which stage 1 fits a GPU, and how long an epoch takes. All computed.

python docs/gpus.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from benchmarks import BENCHMARKS
from plan import typed
from runtime.gpus import GIB, GPUS, USABLE, Gpu, seconds
from training.planning import CountedClip, PlannedFineTuning, Way, sizes_of

GUIDE = Path(__file__).with_suffix(".md")
MARK = "<!-- What follows is written by `python docs/gpus.py`. -->\n"
CLIPS = ("RN50x4", "RN50x16", "ViT-B/32", "ViT-L/14")
BATCH = 128  # the original's
SIZES = [
    sizes_of(benchmark(Path()))
    for benchmark in BENCHMARKS.values()
    if benchmark.official and benchmark.train_split
]


def table() -> str:
    """Return the whole table, in Markdown."""
    columns = [f"{sizes.name}, s, estimated" for sizes in SIZES]
    titles = ["model", "GPU", "flags", "GiB, estimated", *columns]
    lines = [row(titles), row(["---"] * len(titles))]
    for name in CLIPS:
        lines += rows_of(name)
    return "\n".join(lines)


def rows_of(name: str) -> list[str]:
    """Return the rows of one CLIP, one for each GPU."""
    clip = CountedClip(name, "both")
    trainings = [PlannedFineTuning(clip=clip, sizes=sizes, precision="fp16") for sizes in SIZES]
    return [row([name, *cells(trainings, gpu)]) for gpu in GPUS.values()]


def cells(trainings: list[PlannedFineTuning], gpu: Gpu) -> list[str]:
    """Return GPU, flags, GiB, and for each dataset the seconds of an epoch and those of a validation."""
    asked = Way(batch_size=BATCH)
    way = trainings[0].first_that_fits(asked, USABLE * gpu.memory * GIB)
    if way is None:
        return [gpu.title, "nothing fits", *[""] * (1 + len(trainings))]
    flags = f"`{typed(way, asked)}`" if way != asked else ""
    times = []
    for training in trainings:
        parts = (training.epoch(way), training.validation())
        times.append(" + ".join(f"{seconds(part, gpu):,.0f}" for part in parts))
    return [gpu.title, flags, f"{trainings[0].needed(way) / GIB:.1f}", *times]


def row(cells: list[str]) -> str:
    """Return a row of a table."""
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Write the table, below a mark, into the guide."""
    text, mark, _ = GUIDE.read_text(encoding="utf-8").partition(MARK)
    GUIDE.write_text(f"{text}{mark}\n{table()}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
