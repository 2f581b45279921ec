"""A benchmark in one file: a table of queries and a list of images, with one to five targets a query."""

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.base import Benchmark
from benchmarks.metrics import Metric, Ranks, average_precision
from benchmarks.splits import Triplet


class Fourth(Benchmark):
    """Rows "reference,caption,targets", the targets parted by spaces; no test split, no ids, no groups."""

    name = "Fourth"
    run_name = "fourth"
    folder = "fourth_dataset"
    remedy = "correct it"
    test_split = None
    reported = {
        "map_at10": Metric("mAP@10", checkpoint="best"),
        "recall_at1": Metric("R@1"),
        "recall_at10": Metric("R@10"),
    }

    def files(self, part: str, split: str) -> tuple[Path, Path]:
        folder = self.annotation_folder()
        return folder / f"{split}.csv", folder / "gallery.txt"

    def image_folders(self, part: str) -> list[Path]:
        return [self.annotation_folder() / "images"]

    def image_places(self, images_file: Path) -> dict[str, str]:
        return {name: f"{name}.jpg" for name in images_file.read_text().split()}

    def queries(self, queries_file: Path, split: str) -> Iterator[tuple[str, Triplet]]:
        with queries_file.open(newline="") as lines:
            for number, row in enumerate(csv.DictReader(lines), start=2):
                target, *others = row["targets"].split()
                yield (
                    f"line {number}",
                    Triplet(
                        reference=row["reference"],
                        captions=(row["caption"],),
                        target=target,
                        other_targets=tuple(others),
                    ),
                )

    def hits(self, ranks: Ranks) -> dict[str, np.ndarray]:
        return {
            "map_at10": average_precision(ranks.of_all, 10),
            "recall_at1": ranks.named < 1,
            "recall_at10": ranks.named < 10,
        }
