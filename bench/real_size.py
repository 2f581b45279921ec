"""Run checks, validations and a submission at real size, with synthetic pictures for the official annotations' images.

    python bench/real_size.py --data-root DIR

DIR contains the official annotation files in the datasets' folders (fashionIQ_dataset/, cirr_dataset/cirr/); images are
not needed. Each command runs in a process of its own, whose time and peak memory are reported.
"""

import argparse
import hashlib
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

from PIL import Image, ImageDraw
from tqdm import tqdm

from benchmarks import CIRR, FashionIQ
from models.clip_model import write_tiny_clip
from timing import run_script, script_table


def draw(path: Path) -> None:
    """Draw a picture that depends only on the file's name: coloured boxes, with sides of 200 to 300 pixels."""
    rng = random.Random(hashlib.sha256(path.name.encode()).digest())

    def color() -> tuple[int, int, int]:
        return rng.randrange(256), rng.randrange(256), rng.randrange(256)

    image = Image.new("RGB", (rng.randrange(200, 300), rng.randrange(200, 300)), color())
    pen = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = rng.randrange(image.width), rng.randrange(image.height)
        pen.rectangle((x, y, x + rng.randrange(10, 120), y + rng.randrange(10, 120)), color())
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def draw_all(root: Path) -> None:
    """Draw all images of the validation splits and of CIRR's test split, and write a tiny CLIP."""
    splits = [*FashionIQ(root).val(), *CIRR(root).val(), *CIRR(root).test()]
    for path in tqdm(
        sorted({path for split in splits for path in split.paths}), "drawing", unit="img"
    ):
        draw(path)
    write_tiny_clip(root / "tiny_clip_vit.pt", "vit")


def main(argv: list[str] | None = None) -> None:
    """Draw the images, run the scripts, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data-root",
        type=Path,
        required=True,
        metavar="DIR",
        help="holds official annotation files",
    )
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for folder in ("fashionIQ_dataset", "cirr_dataset"):
            shutil.copytree(
                args.data_root / folder,
                root / folder,
                ignore=shutil.ignore_patterns("*.jpg", "*.png"),
            )
        draw_all(root)
        where = ["--data-root", root]
        pair = [
            *where,
            "--clip-model-name",
            root / "tiny_clip_vit.pt",
            "--combining-function",
            "sum",
        ]
        check = ["src/check_dataset.py", "--dataset"]
        rows = [
            run_script(*check, "FashionIQ", "--splits", "val", *where),
            run_script(*check, "CIRR", "--splits", "val", "test", *where),
            run_script(
                "src/validate.py",
                "--dataset",
                "FashionIQ",
                *pair,
                "--metrics-json",
                root / "m.json",
            ),
            run_script(
                "src/validate.py", "--dataset", "CIRR", *pair, "--metrics-json", root / "c.json"
            ),
            run_script(
                "src/cirr_test_submission.py",
                "--submission-name",
                "real",
                *pair,
                "--output-dir",
                root / "s",
            ),
            run_script("src/check_submission.py", *sorted((root / "s").iterdir()), *where),
        ]
        sizes = {file.name: file.stat().st_size for file in sorted((root / "s").iterdir())}
    print(script_table(rows, name))
    print(json.dumps(sizes))


if __name__ == "__main__":
    main()
