"""Measure time and memory to build, update and search an index of 100,000 synthetic images.

python bench/large_index.py            (about 2 minutes on 2 cores)
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))
sys.path.append(str(Path(__file__).parent.parent / "tests"))

from tqdm import tqdm

from models.clip_model import write_tiny_clip
from shapes_dataset import draw, random_scene
from timing import run_script, script_table


def draw_all(folder: Path, count: int) -> None:
    """Draw `count` images of shapes, a thousand per folder."""
    rng = random.Random(0)
    for number in tqdm(range(count), "drawing", unit="img", disable=None):
        path = folder / f"{number // 1000:03}" / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(random_scene(rng), rng).save(path, quality=90)


def main(argv: list[str] | None = None) -> None:
    """Draw images, index them twice, run queries, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        draw_all(root / "images", args.images)
        write_tiny_clip(root / "tiny_clip_vit.pt", "vit")
        index = ["src/search.py", "index", "--output", root / "index", "--images", root / "images"]
        index += ["--clip-model-name", root / "tiny_clip_vit.pt"]
        query = [
            "src/search.py",
            "query",
            "--index",
            root / "index",
            "--image",
            root / "images/000/000007.jpg",
        ]
        rows = [
            run_script(*index),
            run_script(*index),
            run_script(*query, "--text", "is red", "--k", 3),
            run_script(*index, "--index-type", "hnsw"),
            run_script(*query, "--text", "is red", "--k", 3),
        ]
        print(script_table(rows, name))


if __name__ == "__main__":
    main()
