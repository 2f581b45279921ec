"""What an index says of itself, wherever its features live; a store adds what it says beside."""

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
    """What features depend on beside the images."""

    transform: Transform
    target_ratio: SideRatio
    background: Background
    weights: Digest
    resolution: Count


class IndexedPair(Preprocessing):
    """What a query needs to load the same CLIP."""

    transform: Transform
    target_ratio: SideRatio
    background: Background
    clip_model_name: PathText
    clip_model_path: PathText | None = ABSENT
    exported: PathText = ABSENT


class Manifest(Schema):
    """index.json, wherever the features live."""

    images: PositiveInt
    encoder: EncoderKey
    pair: IndexedPair = ABSENT
    folders: list[PathText] = ABSENT
    unreadable: dict[str, AnyText] = ABSENT
    made_here: Digest = ABSENT


class StoreManifest(Manifest):
    """The same of an index that lives elsewhere. `images` is absent until an update has come to its end."""

    store: Annotated[str, Field(pattern=r"^\w+:\S")]
    kind: AnyText
    images: PositiveInt = ABSENT
