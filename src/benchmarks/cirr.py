"""CIRR: its files, captions, protocol and metrics."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import annotations
from benchmarks.annotations import check, field
from benchmarks.base import Benchmark
from benchmarks.metrics import means
from benchmarks.protocols import ORIGINAL_REMOVED
from benchmarks.splits import Triplet, locate

if TYPE_CHECKING:
    import numpy as np

GROUP_SIZE = 6  # images in a query's group, its reference among them
RECALLS = (1, 5, 10, 50)
GROUP_RECALLS = (1, 2, 3)
# The seven recalls whose means select checkpoints. A recall that is reported beside them changes no selection.
SELECTING = (
    "group_recall_at1", "group_recall_at2", "group_recall_at3",
    "recall_at1", "recall_at5", "recall_at10", "recall_at50",
)  # fmt: skip


class CIRR(Benchmark):
    """CIRR rc2 (Liu et al., ICCV 2021): one gallery, without the query's own reference; groups of six images."""

    name = "CIRR"
    run_name = "cirr"
    parts = ("rc2",)
    train_split = "train"
    val_split = "val"
    test_split = "test1"
    official = {"rc2.train": (28225, 16939), "rc2.val": (4181, 2297), "rc2.test1": (4148, 2315)}
    protocols = (ORIGINAL_REMOVED,)
    selection = {"arithmetic_mean": "arithmetic", "harmonic_mean": "harmonic", "geometric_mean": "geometric"}
    titles = {
        "recall_at1": "R@1",
        "recall_at5": "R@5",
        "recall_at10": "R@10",
        "recall_at50": "R@50",
        "group_recall_at1": "R_subset@1",
        "group_recall_at2": "R_subset@2",
        "group_recall_at3": "R_subset@3",
        "mean(R@5+R_s@1)": "mean(R@5+R_s@1)",
    }

    def annotation_folder(self) -> Path:
        return self.data_root / "cirr_dataset" / "cirr"

    def image_folders(self, part: str) -> list[Path]:
        root = self.data_root / "cirr_dataset"
        return [root, root / "img_raw", root / "images"]

    def _part_name(self, part: str, split: str) -> str:
        return split

    def _image_paths(self, part: str, images_file: Path) -> dict[str, Path]:
        places = annotations.read(images_file, dict)
        check(all(isinstance(place, str) for place in places.values()), images_file, "an object of id -> path")
        return locate(places, self.image_folders(part))

    def _triplet(self, entry: Any, split: str, file: Path, where: str) -> Triplet:
        triplet = Triplet(
            reference=field(entry, "reference", str, file, where),
            captions=(field(entry, "caption", str, file, where),),
            target=None if split == self.test_split else field(entry, "target_hard", str, file, where),
            pair_id=field(entry, "pairid", int, file, where),
        )
        if split == self.train_split:
            return triplet
        group = field(field(entry, "img_set", dict, file, where), "members", list, file, where)
        six = all(isinstance(name, str) for name in group) and len(group) == len(set(group)) == GROUP_SIZE
        whole = six and all(name in group for name in triplet.images)
        check(whole, file, f"six members in {where}, reference and target two of them")
        return replace(triplet, group=tuple(group))

    def caption(self, captions: tuple[str, ...]) -> str:
        return captions[0]

    def caption_variants(self, captions: tuple[str, ...]) -> list[str]:
        return [captions[0]]

    def hits(self, ranks: "np.ndarray", group_ranks: "np.ndarray | None") -> "dict[str, np.ndarray]":
        if group_ranks is None:
            raise ValueError("CIRR is measured in the groups of its queries too")
        hits = {f"group_recall_at{k}": group_ranks < k for k in GROUP_RECALLS}
        for k in RECALLS:
            hits[f"recall_at{k}"] = ranks < k
        return hits

    def summary(self, scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        (recalls,) = scores.values()
        headline = (recalls["recall_at5"] + recalls["group_recall_at1"]) / 2
        selecting = means([recalls[name] for name in SELECTING])
        return {**recalls, "mean(R@5+R_s@1)": headline, **selecting}
