"""LaSCo: its files, captions, protocols and metrics.

The file format follows github.com/levymsn/LaSCo (README.md and downloads/ at 8b1067f).
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from benchmarks.base import Benchmark
from benchmarks.entries import Entry, FromList, ImageName, Query, read_queries
from benchmarks.metrics import Metric, Ranks
from benchmarks.splits import Triplet
from runtime.schema import read_checked

if TYPE_CHECKING:
    import numpy as np

RECALLS = (1, 5, 10, 50, 100, 500, 1000)
SELECTING = ("recall_at10", "recall_at50")

NumberAndPath = Annotated[tuple[Any, ImageName], FromList]


class LascoQuery(Query):
    """An entry of `lasco_{split}.json`: an image is a COCO id and a path.

    Its "qid" is the id of a VQA question, which several queries may share, so it does not identify a query.
    """

    query_image: Annotated[NumberAndPath, Field(alias="query-image")]
    query_text: Annotated[str, Field(alias="query-text")]
    target_image: Annotated[NumberAndPath, Field(alias="target-image")]

    def triplet(self) -> Triplet:
        return Triplet(
            reference=self.query_image[1],
            captions=(self.query_text,),
            target=self.target_image[1],
        )


class LascoImage(Entry):
    """An entry of `lasco_val_corpus.json`."""

    path: ImageName


class LaSCo(Benchmark):
    """LaSCo (Levy et al., AAAI 2024): images of COCO 2014, captions rephrased from questions of VQA 2.0.

    The first protocol follows other authors' code, because LaSCo's authors have published none. There are no official
    counts here, because publications disagree on the number of validation queries.
    """

    name = "LaSCo"
    run_name = "lasco"
    folder = "lasco_dataset"
    test_split = None
    references_apart = True
    reported = {
        **{f"recall_at{k}": Metric(f"R@{k}") for k in RECALLS},
        "average_recall": Metric("mean R@10, 50", checkpoint="best"),
    }

    def files(self, part: str, split: str) -> tuple[Path, Path]:
        """Return the queries, and the gallery of the validation; training needs only the images of its queries."""
        folder = self.annotation_folder()
        queries = folder / f"lasco_{split}.json"
        return queries, folder / "lasco_val_corpus.json" if split == self.val_split else queries

    def image_folders(self, part: str) -> list[Path]:
        """Return the folders that COCO's train2014/ and val2014/ may have been unpacked in."""
        folder = self.annotation_folder()
        return [folder, folder / "images", folder / "coco"]

    def image_places(self, images_file: Path) -> dict[str, str]:
        if images_file.stem.endswith("corpus"):
            listed = read_checked(list[LascoImage], images_file, remedy=self.remedy)
            # Paths in the corpus begin with the split, unlike paths in the queries.
            names = [image.path.removeprefix("val/") for image in listed]
        else:
            names = []
            for _, triplet in self.queries(images_file, "train"):
                names += triplet.images
        return {name: name for name in names}

    def queries(self, queries_file: Path, split: str) -> Iterable[tuple[str, Triplet]]:
        return read_queries(LascoQuery, queries_file, remedy=self.remedy)

    def hits(self, ranks: Ranks) -> "dict[str, np.ndarray]":
        return {f"recall_at{k}": ranks.named < k for k in RECALLS}

    def summary(self, scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        (recalls,) = scores.values()
        average = sum(recalls[name] for name in SELECTING) / len(SELECTING)
        return {**recalls, "average_recall": average}
