"""GeneCIS: its two tasks on objects, their files, protocol and metrics.

The file format and the metrics follow github.com/facebookresearch/genecis (README.md, datasets/coco_dataset.py,
eval/eval_functions.py). Its two tasks on attributes need crops of Visual Genome's images, and are left out.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from benchmarks.base import Benchmark, by_part
from benchmarks.entries import Distinct, Entry, FromList, Query, read_queries
from benchmarks.metrics import Metric, Ranks
from benchmarks.protocols import ORIGINAL_REMOVED
from benchmarks.splits import Triplet

if TYPE_CHECKING:
    import numpy as np

RECALLS = (1, 2, 3)
DISTRACTORS = 14
TASKS = {"change_object": "change", "focus_object": "focus"}


class GenecisImage(Entry):
    """An image of COCO."""

    val_image_id: Annotated[int, Field(ge=0)]


class GenecisQuery(Query):
    """An entry of `{task}.json`: a query with its distractors."""

    reference: GenecisImage
    condition: str
    target: GenecisImage
    gallery: Annotated[
        tuple[GenecisImage, ...],
        FromList,
        Field(min_length=DISTRACTORS, max_length=DISTRACTORS),
        Distinct,
    ]

    @model_validator(mode="after")
    def apart(self) -> "GenecisQuery":
        """Check that the reference is not in the gallery."""
        if self.reference in self.gallery:
            raise PydanticCustomError("apart", "gallery should not include the reference")
        return self

    def triplet(self) -> Triplet:
        members = [_name(image) for image in (self.reference, self.target, *self.gallery)]
        return Triplet(
            reference=members[0],
            captions=(self.condition,),
            target=members[1],
            group=tuple(dict.fromkeys(members)),  # one official query lists its target twice
        )


def _name(image: GenecisImage) -> str:
    return str(image.val_image_id)


class GeneCIS(Benchmark):
    """GeneCIS (Vaze et al., CVPR 2023), only the tasks on objects: each query has its own gallery of 15 images.

    This gallery is treated as the query's group, and recalls are computed within groups. Sheets also show the nearest
    images of the whole task.
    """

    name = "GeneCIS"
    run_name = "genecis"
    folder = "genecis_dataset"
    parts = tuple(TASKS)
    train_split = None
    test_split = None
    official = {"change_object.val": (1960, 2739), "focus_object.val": (1960, 2198)}
    counts_explained = "Of the official queries, 167 and 427 repeat another query, and count twice"
    protocols = (ORIGINAL_REMOVED,)
    reported = {
        f"{task}_recall_at{k}": Metric(f"{title} R@{k}")
        for task, title in TASKS.items()
        for k in RECALLS
    }

    def files(self, part: str, split: str) -> tuple[Path, Path]:
        file = self.annotation_folder() / f"{part}.json"
        return file, file

    def image_folders(self, part: str) -> list[Path]:
        return [self.annotation_folder() / "val2017"]

    def image_places(self, images_file: Path) -> dict[str, str]:
        places = {}
        for _, triplet in self.queries(images_file, self.val_split):
            places.update({name: f"{int(name):012d}.jpg" for name in triplet.group})
        return places

    def queries(self, queries_file: Path, split: str) -> Iterable[tuple[str, Triplet]]:
        return read_queries(GenecisQuery, queries_file, remedy=self.remedy)

    def hits(self, ranks: Ranks) -> "dict[str, np.ndarray]":
        if ranks.in_group is None:
            raise ValueError("GeneCIS needs ranks within the groups")
        return {f"recall_at{k}": ranks.in_group < k for k in RECALLS}

    def summary(self, scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        return by_part(scores)
