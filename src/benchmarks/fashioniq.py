"""FashionIQ: its files, captions, protocols and metrics."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from benchmarks.base import Benchmark, by_part, official_files
from benchmarks.entries import FromList, ImageName, Query, read_queries
from benchmarks.metrics import Metric, Ranks
from benchmarks.protocols import ORIGINAL_KEPT, ORIGINAL_REMOVED, VAL_KEPT, VAL_REMOVED
from benchmarks.splits import Triplet
from runtime.schema import read_checked
from utils import UserError

if TYPE_CHECKING:
    import numpy as np

CUTOFFS = (10, 50)


class FashionIQTestQuery(Query):
    """An entry of `cap.{category}.test.json`."""

    candidate: ImageName
    captions: Annotated[tuple[str, str], FromList]

    def triplet(self) -> Triplet:
        return Triplet(reference=self.candidate, captions=self.captions)


class FashionIQQuery(FashionIQTestQuery):
    """An entry of `cap.{category}.{split}.json` for training or validation."""

    target: ImageName

    def triplet(self) -> Triplet:
        return replace(super().triplet(), target=self.target)


class FashionIQ(Benchmark):
    """FashionIQ (Wu et al., CVPR 2021): one gallery for each category."""

    name = "FashionIQ"
    run_name = "fiq"
    folder = "fashionIQ_dataset"
    parts = ("dress", "toptee", "shirt")
    official = {
        "dress.train": (5985, 11452), "dress.val": (2017, 3817), "dress.test": (2024, 3818),
        "shirt.train": (5988, 19036), "shirt.val": (2038, 6346), "shirt.test": (2038, 6346),
        "toptee.train": (6027, 16121), "toptee.val": (1961, 5373), "toptee.test": (2056, 5374),
    }  # fmt: skip
    official_wordless = ("B004ECJWVI -> B006MW3CTG",)  # captions "Darker and not as shiny" and "."
    counts_explained = (
        "The nine official lists have 77,683 entries, which papers count as images, but 3,302 of them repeat: the "
        "complete dataset is 74,381 images, and the 3,300 that seem to be missing do not exist"
    )
    protocols = (ORIGINAL_KEPT, ORIGINAL_REMOVED, VAL_REMOVED, VAL_KEPT)
    reported = {
        **{f"{part}_recall_at{k}": Metric(f"{part} R@{k}") for part in parts for k in CUTOFFS},
        **{f"average_recall_at{k}": Metric(f"mean R@{k}") for k in CUTOFFS},
        "average_recall": Metric("mean", checkpoint="best"),
    }
    hyper_parameters = {"train_dress_types": list(parts), "val_dress_types": list(parts)}

    def files(self, part: str, split: str) -> tuple[Path, Path]:
        return official_files(self.annotation_folder(), part, split)

    def image_folders(self, part: str) -> list[Path]:
        """Return the folders that may hold images: images/ (the official layout), and one folder per category.

        An image in two categories may be in either folder.
        """
        root = self.annotation_folder()
        own_first = sorted(self.parts, key=lambda other: other != part)
        folders = [root / "images"]
        for kind in ("images", "resized_image"):
            folders += [root / kind / category for category in own_first]
        return folders

    def image_places(self, images_file: Path) -> dict[str, str]:
        names = read_checked(list[ImageName], images_file, remedy=self.remedy)
        if len(set(names)) < len(names):
            raise UserError(f"{images_file}: an image is listed twice: {self.remedy}")
        return {name: f"{name}.jpg" for name in names}

    def queries(self, queries_file: Path, split: str) -> Iterable[tuple[str, Triplet]]:
        schema = FashionIQTestQuery if split == self.test_split else FashionIQQuery
        return read_queries(schema, queries_file, remedy=self.remedy)

    def caption(self, captions: tuple[str, ...]) -> str:
        return self.caption_variants(captions)[0]

    def caption_variants(self, captions: tuple[str, ...]) -> list[str]:
        first, second = (caption.strip(".?, ") for caption in captions)
        return [
            f"{first.capitalize()} and {second}",
            f"{second.capitalize()} and {first}",
            first.capitalize(),
            second.capitalize(),
        ]

    def hits(self, ranks: Ranks) -> "dict[str, np.ndarray]":
        return {f"recall_at{k}": ranks.named < k for k in CUTOFFS}

    def summary(self, scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        metrics = by_part(scores)
        for k in CUTOFFS:
            recalls = [of_category[f"recall_at{k}"] for of_category in scores.values()]
            metrics[f"average_recall_at{k}"] = sum(recalls) / len(recalls)
        both = [metrics[f"average_recall_at{k}"] for k in CUTOFFS]
        metrics["average_recall"] = sum(both) / 2
        return metrics
