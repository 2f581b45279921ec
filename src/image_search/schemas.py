"""Define the fields of a manifest that all stores share; each store adds its own fields."""

from typing import Annotated

from pydantic import Field, PositiveInt

from models.schemas import (
    ABSENT,
    Background,
    Count,
    Digest,
    PathText,
    Preprocessing,
    SideRatio,
    Transform,
)
from runtime.schema import Schema
from settings.declaring import AnyText


class EncoderKey(Preprocessing):
    """Settings, besides the images, on which features depend."""

    transform: Transform
    target_ratio: SideRatio
    background: Background
    weights: Digest
    resolution: Count


class IndexedPair(Preprocessing):
    """Settings with which a query loads the same CLIP."""

    transform: Transform
    target_ratio: SideRatio
    background: Background
    clip_model_name: PathText
    clip_model_path: PathText | None = ABSENT
    exported: PathText = ABSENT


class Manifest(Schema):
    """index.json of an index in any store."""

    images: PositiveInt
    encoder: EncoderKey
    pair: IndexedPair = ABSENT
    folders: list[PathText] = ABSENT
    unreadable: dict[str, AnyText] = ABSENT
    made_here: Digest = ABSENT


class StoreManifest(Manifest):
    """index.json of an index in a database; `images` is absent until the first update is complete."""

    store: Annotated[str, Field(pattern=r"^\w+:\S")]
    kind: AnyText
    images: PositiveInt = ABSENT
