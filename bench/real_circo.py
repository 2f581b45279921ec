"""Run the scripts on CIRCO at its real size, with a synthetic picture for each of its 123,403 images and a tiny CLIP.

    python bench/real_circo.py --annotations DIR

DIR contains the official val.json and test.json. The list of images is synthetic: the image IDs in these files, and
random IDs up to the official number. Each command runs in a process of its own; its time and peak memory are reported.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

from tqdm import tqdm

from benchmarks import CIRCO
from models.clip_model import write_tiny_clip
from timing import run_script, script_table

IMAGES = 123_403
LARGEST_ID = 581_929  # largest image ID of COCO 2017
SIDE = 16  # pixels
NAMED = ("reference_img_id", "target_img_id")


def image_ids(annotations: Path) -> list[int]:
    """Return the image IDs in the annotations, and random IDs up to the official number."""
    ids: set[int] = set()
    for split in ("val", "test"):
        for entry in json.loads((annotations / f"{split}.json").read_text()):
            ids.update(entry[key] for key in NAMED if key in entry)
            ids.update(entry.get("gt_img_ids", []))
    rng = random.Random(0)
    while len(ids) < IMAGES:
        ids.add(rng.randint(1, LARGEST_ID))
    return sorted(ids)


def draw_all(root: Path, annotations: Path) -> None:
    """Write CIRCO's folder with a small picture of noise for each image, and a tiny CLIP."""
    benchmark = CIRCO(root)
    queries_file, images_file = benchmark.files(benchmark.parts[0], "val")
    shutil.copytree(annotations, queries_file.parent)
    ids = image_ids(annotations)
    listed = [{"id": number, "file_name": f"{number:012d}.jpg"} for number in ids]
    images_file.parent.mkdir(parents=True)
    images_file.write_text(json.dumps({"images": listed}))
    (folder,) = benchmark.image_folders(benchmark.parts[0])
    folder.mkdir()
    rng = random.Random(1)
    for image in tqdm(listed, "drawing", unit="img"):
        # Pillow recognises formats by content, so a .jpg may be an uncompressed PPM, which is fast to write and read.
        noise = f"P6 {SIDE} {SIDE} 255\n".encode() + rng.randbytes(3 * SIDE * SIDE)
        (folder / image["file_name"]).write_bytes(noise)
    write_tiny_clip(root / "tiny_clip_vit.pt", "vit")


def main(argv: list[str] | None = None) -> None:
    """Draw the images, run the scripts, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--annotations", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        draw_all(root, args.annotations)
        where = ["--data-root", root]
        pair = ["--clip-model-name", root / "tiny_clip_vit.pt", "--combining-function", "sum"]
        pair += [*where, "--feature-cache", root / "features", "--device", "cpu"]
        outputs = ["--metrics-json", root / "m.json", "--rankings", root / "r.json"]
        validate = ["src/validate.py", "--dataset", "CIRCO", *pair]
        submission = ["--submission-name", "real", "--output-dir", root / "s"]
        rows = [
            run_script(*validate),
            run_script(*validate, *outputs),
            run_script("src/circo_test_submission.py", *submission, *pair),
            run_script("src/check_submission.py", root / "s/real.json", *where),
            run_script("src/check_submission.py", root / "r.json", "--split", "val", *where),
            run_script("src/check_dataset.py", "--dataset", "CIRCO", *where),
        ]
        size = (root / "s/real.json").stat().st_size
    print(script_table(rows, name))
    print(f"real.json: {size:,} bytes")


if __name__ == "__main__":
    main()
