"""The checks and a submission at the real size: drawn stand-ins for every image that official annotations name.

    python bench/real_size.py --data-root DIR

DIR holds the official annotation files where the datasets have them (fashionIQ_dataset/, cirr_dataset/cirr/); images
are not needed. Each command runs in a process of its own, whose time and largest memory are reported.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

from PIL import Image, ImageDraw
from tqdm import tqdm

from benchmarks import CIRR, FashionIQ
from clip_model import write_tiny_clip

ROOT = Path(__file__).parent.parent


def draw(path: Path) -> None:
    """A picture of its own for a name: coloured boxes, 200 to 300 pixels a side."""
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
    """Every image of the validation splits, and of CIRR's test split."""
    splits = [*FashionIQ(root).val(), *CIRR(root).val(), *CIRR(root).test()]
    for path in tqdm(sorted({path for split in splits for path in split.paths}), "drawing", unit="img"):
        draw(path)
    write_tiny_clip(root / "tiny_clip_vit.pt", "vit")


def measured(*words: object) -> dict:
    """Run a script; its seconds, its largest memory in GiB, its exit code and its last line."""
    start = time.monotonic()
    command = [sys.executable, *map(str, words)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    return {
        "command": " ".join(map(str, words[:3])),
        "seconds": round(time.monotonic() - start, 1),
        "GiB": round(usage.ru_maxrss / 2**20, 2),
        "exit code": os.waitstatus_to_exitcode(status),
        "says": out.strip().splitlines()[-1] if out.strip() else "",
    }


def main(argv: list[str] | None = None) -> None:
    """Draw, check, submit, check, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, required=True, metavar="DIR", help="holds official annotation files")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for folder in ("fashionIQ_dataset", "cirr_dataset"):
            shutil.copytree(args.data_root / folder, root / folder, ignore=shutil.ignore_patterns("*.jpg", "*.png"))
        draw_all(root)
        where = ["--data-root", root]
        pair = [*where, "--clip-model-name", root / "tiny_clip_vit.pt", "--combining-function", "sum"]
        check = ["src/check_dataset.py", "--dataset"]
        rows = [
            measured(*check, "FashionIQ", "--splits", "val", *where),
            measured(*check, "CIRR", "--splits", "val", "test", *where),
            measured("src/validate.py", "--dataset", "FashionIQ", *pair, "--metrics-json", root / "m.json"),
            measured("src/validate.py", "--dataset", "CIRR", *pair, "--metrics-json", root / "c.json"),
            measured("src/cirr_test_submission.py", "--submission-name", "real", *pair, "--output-dir", root / "s"),
            measured("src/check_submission.py", *sorted((root / "s").iterdir()), *where),
        ]
        sizes = {file.name: file.stat().st_size for file in sorted((root / "s").iterdir())}
    print("| command | seconds | largest process, GiB | exit code | says |\n|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(str(value).replace(name, "DIR") for value in row.values()) + " |")
    print(json.dumps(sizes))


if __name__ == "__main__":
    main()
