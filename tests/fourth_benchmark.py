"""A benchmark of one file, as an extension would add it: a JSON file for each split, with its images and queries."""

import json
from pathlib import Path

from benchmarks import Benchmark, Triplet
from benchmarks.annotations import read
from benchmarks.protocols import ORIGINAL_REMOVED, VAL_REMOVED


class Fourth(Benchmark):
    """Queries with one caption and one target each, and no test split."""

    name = "Fourth"
    run_name = "fourth"
    folder = "fourth_dataset"
    test_split = None
    protocols = (VAL_REMOVED, ORIGINAL_REMOVED)
    selection = {"recall_at3": "best"}
    titles = {"recall_at3": "R@3", "recall_at9": "R@9"}

    def files(self, part, split):
        file = self.annotation_folder() / f"{split}.json"
        return file, self.annotation_folder() / f"{split}_images.json"

    def image_folders(self, part):
        return [self.data_root / "cirr_dataset"]

    def image_places(self, images_file):
        return read(images_file, dict)

    def triplet(self, entry, split):
        return Triplet(
            reference=entry.text("from"), captions=(entry.text("edit"),), target=entry.text("to")
        )

    def hits(self, ranks):
        return {f"recall_at{k}": ranks.named < k for k in (3, 9)}


def draw(root: Path) -> None:
    """Its files, in a data root with a drawn CIRR, on whose images they are."""
    official = root / "cirr_dataset" / "cirr"
    folder = root / Fourth.folder
    folder.mkdir()
    for split in ("train", "val"):
        queries = []
        for entry in json.loads((official / f"captions/cap.rc2.{split}.json").read_text()):
            query = {
                "from": entry["reference"],
                "to": entry["target_hard"],
                "edit": entry["caption"],
            }
            queries.append(query)
        (folder / f"{split}.json").write_text(json.dumps(queries))
        images = official / f"image_splits/split.rc2.{split}.json"
        (folder / f"{split}_images.json").write_text(images.read_text())
