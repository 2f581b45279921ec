"""CIRCO: its files, captions, protocols and metrics."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from pydantic import field_validator, model_validator
from pydantic_core import PydanticCustomError

from benchmarks.base import Benchmark
from benchmarks.entries import Distinct, Entry, FromList, Query, distinct, read_queries
from benchmarks.metrics import Metric, Ranks, average_precision, only
from benchmarks.protocols import CONCEPT_KEPT, CONCEPT_REMOVED, ORIGINAL_KEPT, ORIGINAL_REMOVED
from benchmarks.splits import Triplet
from runtime.schema import read_checked

if TYPE_CHECKING:
    import numpy as np

PLACES = (5, 10, 25, 50)
Aspect = Literal[
    "cardinality", "addition", "negation", "direct_addressing", "compare_change", "comparative_statement",
    "statement_with_conjunction", "spatial_relations_background", "viewpoint",
]  # fmt: skip
ASPECTS: tuple[Aspect, ...] = get_args(Aspect)
ASPECT_PLACES = 10


class CocoImage(Entry):
    """An image of COCO."""

    id: int
    file_name: str


class CocoImages(Entry):
    """The file `image_info_{part}.json`."""

    images: list[CocoImage]

    @field_validator("images")
    @classmethod
    def once(cls, images: list[CocoImage]) -> list[CocoImage]:
        """Check that each id occurs once."""
        distinct([image.id for image in images])
        return images


class CircoTestQuery(Query):
    """An entry of `test.json`."""

    id: int
    reference_img_id: int
    relative_caption: str
    shared_concept: str

    def triplet(self) -> Triplet:
        return Triplet(
            reference=str(self.reference_img_id),
            captions=(self.relative_caption, self.shared_concept),
            pair_id=self.id,
        )


class CircoQuery(CircoTestQuery):
    """An entry of `val.json`."""

    target_img_id: int
    gt_img_ids: Annotated[list[int], Distinct]
    semantic_aspects: Annotated[tuple[Aspect, ...], FromList, Distinct]

    @model_validator(mode="after")
    def named(self) -> "CircoQuery":
        """Check that the annotated target is one of all targets."""
        if self.target_img_id not in self.gt_img_ids:
            raise PydanticCustomError("named", "gt_img_ids should include target_img_id")
        return self

    def triplet(self) -> Triplet:
        others = [str(image) for image in self.gt_img_ids if image != self.target_img_id]
        return replace(
            super().triplet(),
            target=str(self.target_img_id),
            other_targets=tuple(others),
            kinds=self.semantic_aspects,
        )


class CIRCO(Benchmark):
    """CIRCO (Baldrati et al., ICCV 2023): several targets per query, in the unlabeled images of COCO 2017.

    A query has two captions: the relative caption, and the concept that reference and targets share.
    """

    name = "CIRCO"
    run_name = "circo"
    folder = "circo_dataset"
    parts = ("unlabeled2017",)
    train_split = None
    official = {"unlabeled2017.val": (220, 123_403), "unlabeled2017.test": (800, 123_403)}
    counts_explained = "Both splits search one gallery"
    concept_template = "Find a picture that also {shared_concept}, but {relative_caption}"
    protocols = (ORIGINAL_KEPT, ORIGINAL_REMOVED, CONCEPT_KEPT, CONCEPT_REMOVED)
    reported = {
        **{f"map_at{k}": Metric(f"mAP@{k}") for k in PLACES},
        **{f"recall_at{k}": Metric(f"R@{k}") for k in PLACES},
        **{f"{aspect}_map_at10": Metric(f"{aspect.replace('_', ' ')} @10") for aspect in ASPECTS},
    }

    def files(self, part: str, split: str) -> tuple[Path, Path]:
        folder = self.annotation_folder()
        images = folder / "COCO2017_unlabeled" / "annotations" / f"image_info_{part}.json"
        return folder / "annotations" / f"{split}.json", images

    def image_folders(self, part: str) -> list[Path]:
        return [self.annotation_folder() / "COCO2017_unlabeled" / part]

    def part_name(self, part: str, split: str) -> str:
        return part

    def image_places(self, images_file: Path) -> dict[str, str]:
        listed = read_checked(CocoImages, images_file, remedy=self.remedy).images
        return {str(image.id): image.file_name for image in listed}

    def queries(self, queries_file: Path, split: str) -> Iterable[tuple[str, Triplet]]:
        schema = CircoTestQuery if split == self.test_split else CircoQuery
        return read_queries(schema, queries_file, remedy=self.remedy)

    def evaluation_texts(self, captions: tuple[str, ...]) -> list[str]:
        relative_caption, shared_concept = captions
        with_concept = self.concept_template.format(
            shared_concept=shared_concept, relative_caption=relative_caption
        )
        return [relative_caption, with_concept]

    def hits(self, ranks: Ranks) -> "dict[str, np.ndarray]":
        hits = {f"map_at{k}": average_precision(ranks.of_all, k) for k in PLACES}
        for k in PLACES:
            hits[f"recall_at{k}"] = ranks.named < k
        precisions = average_precision(ranks.of_all, ASPECT_PLACES)
        for aspect in ASPECTS:
            hits[f"{aspect}_map_at10"] = only(ranks.kinds.get(aspect, ()), precisions)
        return hits
