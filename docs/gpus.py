"""Write the tables of gpus.md: the flags with which stage 1 fits a GPU, and how long an epoch takes. All computed.

python docs/gpus.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from benchmarks import BENCHMARKS
from plan import GIB, typed
from runtime.gpus import GPUS, Gpu
from training.planning import USABLE, CountedClip, FineTuning, Way, seconds, sizes_of

GUIDE = Path(__file__).with_suffix(".md")
MARK = "<!-- What follows is written by `python docs/gpus.py`. -->\n"
CLIPS = ("RN50x4", "RN50x16", "ViT-B/32", "ViT-L/14")
BATCHES = (128, 1024)  # the original's, and a large one
SIZES = [
    sizes_of(benchmark(Path()))
    for benchmark in BENCHMARKS.values()
    if benchmark.official and benchmark.train_split
]


def table(name: str) -> str:
    """The table of one CLIP, in Markdown."""
    clip = CountedClip(name, "both")
    trainings = [FineTuning(clip=clip, sizes=sizes, precision="fp16") for sizes in SIZES]
    titles = ["batch", "GPU", "flags", "GiB", *(f"{sizes.name}, s" for sizes in SIZES)]
    lines = [f"### {name}", "", row(titles), row(["---"] * len(titles))]
    for batch in BATCHES:
        for gpu in GPUS.values():
            lines.append(row([f"{batch:,}", *cells(trainings, batch, gpu)]))
    return "\n".join(lines)


def cells(trainings: list[FineTuning], batch: int, gpu: Gpu) -> list[str]:
    """GPU, flags, GiB, and for each dataset the seconds of an epoch and those of a validation."""
    asked = Way(batch_size=batch)
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
    """A row of a table."""
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Write the tables, below a mark, into the guide."""
    text, mark, _ = GUIDE.read_text(encoding="utf-8").partition(MARK)
    tables = [table(name) for name in CLIPS]
    GUIDE.write_text(text + mark + "\n" + "\n\n".join(tables) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
