"""What an index says of itself and of its images; what an earlier version did not write may be missing."""

from typing import Annotated

from pydantic import Field, PositiveInt, Strict

from models.schemas import (
    ABSENT,
    Count,
    Decode,
    Digest,
    EncodePrecision,
    Model,
    PathText,
    SideRatio,
    Text,
    Transform,
)
from runtime.choices import INDEX_KINDS, MILVUS_KINDS, TOLD_BY
from runtime.schema import Schema
from settings.declaring import OneOf


class Recall(Schema):
    """How much of the exact answer an approximate index finds."""

    queries: Count
    k: Count
    recall: Annotated[float, Field(ge=0, le=1)]


class Preprocessing(Schema):
    """How images were preprocessed, and in what precision they were encoded."""

    transform: Transform
    target_ratio: SideRatio
    decode: Decode = ABSENT
    encode_precision: EncodePrecision = ABSENT


class EncoderKey(Preprocessing, Model):
    """What features depend on beside the images."""

    weights: Digest
    resolution: Count


class Pair(Preprocessing):
    """What a query needs to load the same CLIP."""

    clip_model_name: PathText
    clip_model_path: PathText | None = ABSENT
    exported: PathText = ABSENT


class Digests(Schema):
    """Of the list of files in whole, and of some rows of the features."""

    files: Digest
    features: Digest


class Sizes(Schema):
    """Bytes of files that an update does not read."""

    vectors: PositiveInt
    lists: PositiveInt = ABSENT


class Manifest(Schema):
    """index.json, wherever the features live."""

    images: PositiveInt
    encoder: EncoderKey
    pair: Pair = ABSENT
    folders: list[PathText] = ABSENT
    unreadable: dict[str, Text] = ABSENT
    made_here: Digest = ABSENT


class FilesManifest(Manifest):
    """The same of an index in files."""

    files: Annotated[str, Field(pattern=r"^files-[0-9a-f]{12}\.json$")]
    features: Annotated[str, Field(pattern=r"^features-[0-9a-f]{12}\.npy$")]
    vectors: Annotated[str, Field(pattern=r"^vectors-[0-9a-f]{12}\.faiss$")]
    lists: Annotated[str, Field(pattern=r"^lists-[0-9a-f]{12}\.bin$")] = ABSENT
    kind: Annotated[str, OneOf(INDEX_KINDS)] = ABSENT
    torch: Text = ABSENT
    sha256: Digests = ABSENT
    sizes: Sizes = ABSENT
    told_by: Annotated[str, OneOf(TOLD_BY)] = ABSENT
    recall: Recall = Field(ABSENT, alias="recall against exact")


class MilvusManifest(Manifest):
    """The same of an index in Milvus, where `images` is absent until an update has come to its end."""

    store: Annotated[str, Field(pattern=r"^milvus:\S")]
    collection: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]
    kind: Annotated[str, OneOf(MILVUS_KINDS)]
    images: PositiveInt = ABSENT


# A list in JSON, an image's `runtime.files.Identity`.
File = Annotated[tuple[PathText, Annotated[int, Field(ge=0)], int], Strict(False)]


class Files(Schema):
    """files-*.json, whose only content is the list."""

    files: list[File]
