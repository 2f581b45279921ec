"""Define the fields of result files and rankings files. A field with a default may be missing."""

from typing import Annotated, Any, cast

from pydantic import Field, Strict

from runtime.schema import Schema
from settings.groups import Share

Natural = Annotated[int, Field(ge=0, lt=2**31)]
AtLeastOne = Annotated[int, Field(ge=1, lt=2**31)]
# One, with a margin for the rounding of half precision and TF32.
Cosine = Annotated[float, Field(ge=-1.01, le=1.01)]
# Lists are accepted, because JSON has no tuples.
NearestImage = Annotated[tuple[str, Cosine], Strict(False)]


class ProtocolHeader(Schema):
    """Result of one protocol, without the ranks."""

    gallery: str
    reference: str
    text: str
    template: str
    gallery_images: dict[str, AtLeastOne]
    queries: dict[str, AtLeastOne]
    metrics: dict[str, float]
    certain: dict[str, list[str]]


class ProtocolResult(ProtocolHeader):
    """Result of one protocol."""

    ranks: dict[str, list[Natural]]
    other_ranks: dict[str, list[list[Natural]]]
    group_ranks: dict[str, list[Natural]]


class Weights(Schema):
    """Digests of a pair's weights."""

    clip: str
    combiner: str = ""


class MeasuredPreprocessing(Schema):
    """Preprocessing of the images."""

    transform: str = ""
    target_ratio: Annotated[float, Field(gt=0)] = 1
    resolution: AtLeastOne = 1
    decode: str = ""
    interpolation: str = ""
    resize_mode: str = ""
    mean: list[float] = []
    std: list[float] = []
    context: AtLeastOne = 1
    architecture: str = ""


class Assumed(Schema):
    """Defaults of settings that neither flags nor weights gave; settings that were given are absent."""

    clip_model_name: str = ""
    transform: str = ""
    target_ratio: Annotated[float, Field(gt=0)] = 1
    decode: str = ""
    encode_precision: str = ""
    background: str = ""
    top_k: AtLeastOne = 1


class MeasuredList(Schema):
    """List to which an evaluation was restricted, see `benchmarks.query_lists.QueryList.describe`."""

    file: str
    sha256: str


class Measurement(Schema):
    """Fields of a result besides its protocols."""

    dataset: str
    split: str
    protocol: str
    metrics: dict[str, float]
    excluded_images: dict[str, dict[str, str]]
    excluded_triplets: dict[str, Natural]
    smaller_groups: dict[str, Natural]
    images_sha256: dict[str, str]
    images_sampled: dict[str, str]
    queries_sha256: dict[str, str]
    kinds: dict[str, dict[str, list[Natural]]]
    query_list: MeasuredList | None
    clip_model_name: str
    combining_function: str
    checkpoints: dict[str, str]
    weights_sha256: Weights
    encode_precision: str
    preprocessing: MeasuredPreprocessing
    training: dict[str, dict[str, Any]]
    trained_on: dict[str, str]
    assumed: Assumed
    versions: dict[str, str]
    command: str
    date: str


class ResultFile(Measurement):
    """A file of validate.py --metrics-json."""

    clusters: dict[str, dict[str, list[Natural]]]
    protocols: Annotated[dict[str, ProtocolResult], Field(min_length=1)]


class Ranked(Schema):
    """Images retrieved for a query from a gallery or its group."""

    rank: Natural
    other_ranks: list[Natural] = []
    caption: str = ""
    nearest: Annotated[list[NearestImage], Field(min_length=1)]


class RankedQuery(Schema):
    """A query with its results."""

    query: Natural
    pair_id: int | str | None
    reference: str
    target: str
    other_targets: list[str]
    caption: str
    group: list[str]
    kinds: list[str] = []
    extended: list[str] = []
    protocols: Annotated[dict[str, Ranked], Field(min_length=1)]
    # The field may be missing, but not null.
    in_group: Ranked = cast("Ranked", None)
    gate: Share = 0
    experts: Annotated[list[Share], Field(min_length=1)] = [1]


class RankingsFile(Measurement):
    """A file of validate.py --rankings."""

    protocols: Annotated[dict[str, ProtocolHeader], Field(min_length=1)]
    queries: dict[str, Annotated[list[RankedQuery], Field(min_length=1)]]
