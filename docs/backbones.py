"""Write the table of backbones.md: sizes of models worth choosing, and what stage 1 takes of a GPU. All computed.

python docs/backbones.py             (needs open_clip; minutes)
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from benchmarks.fashioniq import FashionIQ
from runtime.gpus import GIB
from training.planning import CountedClip, PlannedFineTuning, Way, sizes_of

GUIDE = Path(__file__).with_suffix(".md")
MARK = "<!-- What follows is written by `python docs/backbones.py`. -->\n"
ORIGINAL = (640, 2560, 5120)  # D, P and H of the original's Combiner on RN50x4
BATCH = 128
# Name -> licence of its weights, as their publishers' pages say; they are not ours to give.
MODELS = {
    "RN50x4": "MIT",
    "ViT-B/16": "MIT",
    "ViT-L/14": "MIT",
    "open_clip:ViT-B-16/datacomp_xl_s13b_b90k": "MIT",
    "open_clip:ViT-L-14/datacomp_xl_s13b_b90k": "MIT",
    "open_clip:ViT-H-14-quickgelu/metaclip_fullcc": "CC BY-NC 4.0",
    "open_clip:EVA02-B-16/merged2b_s8b_b131k": "MIT",
    "open_clip:EVA02-L-14/merged2b_s4b_b131k": "MIT",
    "open_clip:ViT-B-16-SigLIP2/webli": "Apache-2.0",
    "open_clip:ViT-L-16-SigLIP2-256/webli": "Apache-2.0",
    "open_clip:ViT-SO400M-14-SigLIP2-378/webli": "Apache-2.0",
    "open_clip:PE-Core-B-16/meta": "Apache-2.0",
    "open_clip:PE-Core-L-14-336/meta": "Apache-2.0",
    "open_clip:MobileCLIP2-S0/dfndr2b": "Apple's, research only",
}


def line(name: str) -> str:
    """A model's row."""
    clip = CountedClip(name, "both")
    training = PlannedFineTuning(clip=clip, sizes=sizes_of(FashionIQ(Path())), precision="fp16")
    whole = training.needed(Way(batch_size=BATCH)) / GIB
    parts = training.needed(Way(batch_size=BATCH, micro_batch_size=16)) / GIB
    projection, hidden = (round(clip.dim * size / ORIGINAL[0]) for size in ORIGINAL[1:])
    about = (clip.dim, clip.backbone.resolution, clip.backbone.tokenizer.context)
    cells = [f"`{name}`", *map(str, about), f"{whole:.1f}", f"{parts:.1f}"]
    return row([*cells, f"{projection} / {hidden}", MODELS[name]])


def row(cells: list[str]) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Write the table, below a mark, into the guide."""
    text, mark, _ = GUIDE.read_text(encoding="utf-8").partition(MARK)
    titles = [
        "`--clip-model-name`", "features", "pixels", "tokens", f"GiB, batch {BATCH}",
        "GiB, micro-batches of 16", "`--projection-dim` / `--hidden-dim`", "licence of the weights",
    ]  # fmt: skip
    lines = [row(titles), row(["---"] * len(titles)), *map(line, MODELS)]
    GUIDE.write_text(text + mark + "\n" + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
