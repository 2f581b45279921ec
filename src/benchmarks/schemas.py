"""What the entries of annotation files hold, benchmark by benchmark, and the triplet that a query is.

A field that a class does not name is not read.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    RootModel,
    Strict,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from benchmarks.places import image_name
from benchmarks.splits import Triplet
from runtime.schema import Schema, read_checked


def _distinct(values: Sequence[Hashable]) -> Sequence[Hashable]:
    if len(set(values)) < len(values):
        raise PydanticCustomError("distinct", "its values should not repeat")
    return values


Distinct = AfterValidator(_distinct)
FromList = Strict(False)  # JSON knows lists alone


class Entry(Schema):
    """An entry of a file, of which some fields are read."""

    model_config = ConfigDict(extra="ignore")


class Query(Entry):
    """An entry that is a query."""

    def triplet(self) -> Triplet:
        """The query as every benchmark has it."""
        raise NotImplementedError


def read_queries(schema: type[Query], file: Path, *, remedy: str) -> Iterator[tuple[str, Triplet]]:
    """The queries of a JSON list, in order: what an error calls each, and the query.

    Raises:
        UserError: see `read_checked`.
    """
    entries: list[Query] = read_checked(
        list[schema],  # type: ignore[valid-type]
        file,
        remedy=remedy,
    )
    for place, entry in enumerate(entries):
        yield f"entry {place}", entry.triplet()


class ImageNames(RootModel[Annotated[list[str], Distinct]]):
    """A list of images, as FashionIQ has it."""

    model_config = ConfigDict(strict=True)


class ImagePaths(RootModel[dict[str, str]]):
    """Image name -> path, as CIRR has it."""

    model_config = ConfigDict(strict=True)


# FashionIQ


class FashionIQTestQuery(Query):
    """An entry of `cap.{category}.test.json`."""

    candidate: str
    captions: Annotated[tuple[str, str], FromList]

    def triplet(self) -> Triplet:
        return Triplet(reference=self.candidate, captions=self.captions)


class FashionIQQuery(FashionIQTestQuery):
    """An entry of the other splits."""

    target: str

    def triplet(self) -> Triplet:
        return replace(super().triplet(), target=self.target)


# CIRR


class CirrTrainQuery(Query):
    """An entry of `cap.rc2.train.json`, whose group no training reads."""

    pairid: int
    reference: str
    caption: str
    target_hard: str

    def triplet(self) -> Triplet:
        return Triplet(
            reference=self.reference,
            captions=(self.caption,),
            target=self.target_hard,
            pair_id=self.pairid,
        )


class CirrGroup(Entry):
    """Six images like each other, the query's reference and its target among them."""

    members: Annotated[tuple[str, ...], FromList, Field(min_length=6, max_length=6), Distinct]


class CirrTestQuery(Query):
    """An entry of `cap.rc2.test1.json`."""

    pairid: int
    reference: str
    caption: str
    img_set: CirrGroup

    def triplet(self) -> Triplet:
        return Triplet(
            reference=self.reference,
            captions=(self.caption,),
            pair_id=self.pairid,
            group=self.img_set.members,
        )


class CirrQuery(CirrTestQuery):
    """An entry of `cap.rc2.val.json`."""

    target_hard: str

    def triplet(self) -> Triplet:
        return replace(super().triplet(), target=self.target_hard)


# CIRCO: images are called by their ids, as the server takes them.


class CocoImage(Entry):
    """An image of COCO."""

    id: int
    file_name: str


class CocoImages(Entry):
    """`image_info_{part}.json`."""

    images: list[CocoImage]

    @field_validator("images")
    @classmethod
    def once(cls, images: list[CocoImage]) -> list[CocoImage]:
        """Each id once."""
        _distinct([image.id for image in images])
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
    semantic_aspects: Annotated[tuple[str, ...], FromList, Distinct]

    @model_validator(mode="after")
    def named(self) -> "CircoQuery":
        """The target is one of all."""
        if self.target_img_id not in self.gt_img_ids:
            raise PydanticCustomError("named", "gt_img_ids should have target_img_id among them")
        return self

    def triplet(self) -> Triplet:
        others = [str(image) for image in self.gt_img_ids if image != self.target_img_id]
        return replace(
            super().triplet(),
            target=str(self.target_img_id),
            other_targets=tuple(others),
            kinds=self.semantic_aspects,
        )


# Your own triplets


def _listed(value: object) -> object:
    """Values as a list, of which one alone needs none."""
    return value if isinstance(value, list) else [value]


def _full(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("full", "it should not be empty")
    return text


Text = Annotated[str, AfterValidator(_full)]
Image = Annotated[Text, AfterValidator(image_name)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(_listed), FromList]
Images = Annotated[tuple[Image, ...], BeforeValidator(_listed), FromList]


class OwnTestQuery(Query):
    """A line of `test.jsonl` or a row of `test.csv`."""

    reference: Annotated[Images, Field(max_length=1)]
    caption: Texts
    target: Images = ()
    id: int | str | None = None
    group: Images = ()

    @model_validator(mode="before")
    @classmethod
    def given(cls, content: object) -> object:
        """What is there: an empty cell or list says nothing."""
        if not isinstance(content, dict):
            return content
        return {name: value for name, value in content.items() if value not in (None, "", [])}

    def triplet(self) -> Triplet:
        group = dict.fromkeys([*self.reference, *self.group]) if self.group else ()
        return Triplet(
            reference=self.reference[0],
            captions=self.caption,
            group=tuple(group),
            pair_id=None if self.id is None else str(self.id),
        )


class OwnQuery(OwnTestQuery):
    """A line or a row of the other splits."""

    target: Images

    def triplet(self) -> Triplet:
        target, *others = self.target
        return replace(super().triplet(), target=target, other_targets=tuple(others))


# Files as others publish them


class LascoQuery(Entry):
    """An entry of `lasco_{split}.json`: an image is an id and a path."""

    query_image: Annotated[tuple[Any, str], FromList, Field(alias="query-image")]
    query_text: Annotated[str, Field(alias="query-text")]
    target_image: Annotated[tuple[Any, str], FromList, Field(alias="target-image")]


class LascoImage(Entry):
    """An entry of `lasco_val_corpus.json`."""

    path: str


class ShoesQuery(Entry):
    """An entry of `relative_captions_shoes.json`."""

    reference: Annotated[str, Field(alias="ReferenceImageName")]
    target: Annotated[str, Field(alias="ImageName")]
    caption: Annotated[str, Field(alias="RelativeCaption")]


# Lists of images and queries that flags name


class Exclusions(Entry):
    """A file of `check_dataset.py --write-exclusions`: image id -> the reason to leave it out."""

    dataset: str
    images: dict[str, str]


class QueryNames(Entry):
    """A file of `audit.py --write-queries`: names of queries, pairids among them as numbers too."""

    dataset: str
    split: str
    queries: list[int | str]
