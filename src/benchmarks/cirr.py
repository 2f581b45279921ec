"""CIRR: its files, captions, protocol and metrics."""

from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks import annotations
from benchmarks.annotations import check, field
from benchmarks.base import Benchmark
from benchmarks.metrics import means
from benchmarks.protocols import ORIGINAL_REMOVED
from benchmarks.splits import Triplet, locate


class CIRR(Benchmark):
    """CIRR rc2 (Liu et al., ICCV 2021): one gallery, without the query's own reference; groups of six images."""

    name = "CIRR"
    run_name = "cirr"
    parts = ("rc2",)
    splits = ("train", "val", "test1")
    official = {"rc2.train": (28225, 16939), "rc2.val": (4181, 2297), "rc2.test1": (4148, 2315)}
    protocols = (ORIGINAL_REMOVED,)
    selection = {"arithmetic_mean": "arithmetic", "harmonic_mean": "harmonic", "geometric_mean": "geometric"}
    titles = (
        {f"recall_at{k}": f"R@{k}" for k in (1, 5, 10, 50)}
        | {f"group_recall_at{k}": f"R_subset@{k}" for k in (1, 2, 3)}
        | {"mean(R@5+R_s@1)": "mean(R@5+R_s@1)"}
    )

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
        reference = field(entry, "reference", str, file, where)
        captions = (field(entry, "caption", str, file, where),)
        pair_id = field(entry, "pairid", int, file, where)
        target = None if split == self.splits[2] else field(entry, "target_hard", str, file, where)
        if split == self.splits[0]:
            return Triplet(reference, captions, target, pair_id=pair_id)
        group = field(field(entry, "img_set", dict, file, where), "members", list, file, where)
        whole = all(isinstance(name, str) for name in group) and len(group) == len(set(group)) == 6
        whole = whole and reference in group and target in (None, *group)
        check(whole, file, f"six members in {where}, reference and target two of them")
        return Triplet(reference, captions, target, tuple(group), pair_id)

    def caption(self, captions: tuple[str, ...]) -> str:
        return captions[0]

    def caption_variants(self, captions: tuple[str, ...]) -> list[str]:
        return [captions[0]]

    def hits(self, ranks: Tensor, group_ranks: Tensor | None) -> dict[str, Tensor]:
        subset = {f"group_recall_at{k}": group_ranks < k for k in (1, 2, 3)}
        return subset | {f"recall_at{k}": ranks < k for k in (1, 5, 10, 50)}

    def summary(self, scores: dict[str, dict[str, float]]) -> dict[str, float]:
        (recalls,) = scores.values()
        headline = (recalls["recall_at5"] + recalls["group_recall_at1"]) / 2
        return recalls | {"mean(R@5+R_s@1)": headline} | means(list(recalls.values()))
