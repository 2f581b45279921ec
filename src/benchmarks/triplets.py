"""Your own triplets: a file of queries for each split, and a folder of images, as described in docs/own-data.md.

A line of `{split}.jsonl` is an object with "reference", "caption" and "target", and optionally "id", "group",
"negatives" and "kind"; in a table, these are columns. Captions and targets may be several: a list in JSON,
`one | another` in a table cell. Confidence intervals can resample queries by the value of any other field or column,
such as the product that an image shows.
"""

import functools
import itertools
import logging
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from benchmarks.base import Benchmark
from benchmarks.entries import FromList, Name, Query, refuse_all
from benchmarks.metrics import Metric, Ranks, average_precision, only
from benchmarks.places import image_name
from benchmarks.protocols import ORIGINAL_KEPT, ORIGINAL_REMOVED
from benchmarks.splits import Split, Triplet
from benchmarks.tables import TABLES, cell_values, table_rows, unmarked_text
from runtime.choices import WHITE
from runtime.files import parse_json
from runtime.schema import first_fault
from utils import UserError, first_line

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

# Column -> regular expression that separates values in a cell. A caption may contain a | without spaces.
BAR = r"\|"
OWN_COLUMNS = {
    "reference": BAR,
    "caption": r"\s+\|\s*|\|\s+",
    "target": BAR,
    "id": r"(?!)",  # never separates
    "group": BAR,
    "negatives": BAR,
    "kind": BAR,
}
OF_ALL_OR_NONE = {"id", "group"}
OWN_RECALLS = (1, 5, 10, 50)
OWN_GROUP_RECALLS = (1, 2, 3)
PRECISION_PLACES = 10
KIND_PLACES = 10
OF_KIND = f"recall_at{KIND_PLACES}_of_"


def _listed(value: object) -> object:
    """Return the value as a list: a single value becomes a list of one."""
    return value if isinstance(value, list) else [value]


def _full(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("full", "it should not be empty")
    return text


def _one_line(text: str) -> str:
    return " ".join(text.split())


FullText = Annotated[str, AfterValidator(_full)]
Image = Annotated[FullText, AfterValidator(image_name)]
Texts = Annotated[tuple[FullText, ...], BeforeValidator(_listed), FromList]
Images = Annotated[tuple[Image, ...], BeforeValidator(_listed), FromList]
Kind = Annotated[Name, AfterValidator(_full), AfterValidator(_one_line)]
Kinds = Annotated[tuple[Kind, ...], BeforeValidator(_listed), FromList]


class OwnTestQuery(Query):
    """A line or a row of the test queries' file."""

    model_config = ConfigDict(extra="allow")

    reference: Annotated[Images, Field(max_length=1)]
    caption: Texts
    target: Images = ()
    id: Name | None = None
    group: Images = ()
    negatives: Images = ()
    kind: Kinds = ()

    @model_validator(mode="before")
    @classmethod
    def given(cls, content: object) -> object:
        """Remove empty values, because an empty cell or list means that the value is missing."""
        if not isinstance(content, dict):
            return content
        return {name: value for name, value in content.items() if value not in (None, "", [])}

    def triplet(self) -> Triplet:
        group = dict.fromkeys([*self.reference, *self.group]) if self.group else ()
        return Triplet(
            reference=self.reference[0],
            captions=self.caption,
            group=tuple(group),
            negatives=self.negatives,
            pair_id=self.id,
            kinds=tuple(dict.fromkeys(self.kind)),
            columns={name.lower(): str(value) for name, value in (self.model_extra or {}).items()},
        )


class OwnQuery(OwnTestQuery):
    """A line or a row of the other splits' files."""

    target: Images

    def triplet(self) -> Triplet:
        target, *others = self.target
        return replace(super().triplet(), target=target, other_targets=tuple(others))


class Triplets(Benchmark):
    """A benchmark of your own: one gallery, any number of captions and targets per query, and groups if you have some.

    A query's first caption is its text at evaluation, and its first target is the target of the recalls.
    """

    name = "Triplets"
    run_name = "triplets"
    folder = "triplets_dataset"
    remedy = "fix it as described in docs/own-data.md"
    background = WHITE
    # Users do not search for the image they already have, so the protocol that selects checkpoints removes references.
    protocols = (ORIGINAL_REMOVED, ORIGINAL_KEPT)
    reported = {
        **{f"recall_at{k}": Metric(f"R@{k}") for k in OWN_RECALLS},
        f"map_at{PRECISION_PLACES}": Metric(f"mAP@{PRECISION_PLACES}"),
        **{f"group_recall_at{k}": Metric(f"R_subset@{k}") for k in OWN_GROUP_RECALLS},
        "average_recall": Metric("mean R", checkpoint="best"),
    }

    def files(self, part: str, split: str) -> tuple[Path, Path]:
        """Return the files of queries and gallery. Without a gallery file, the gallery is all images in the queries."""
        folder = self.annotation_folder()
        names = {f"{split}{ending}" for ending in (".jsonl", *TABLES)}
        there = sorted(file for file in folder.glob("*") if file.name.lower() in names)
        if len(there) > 1:
            others = " and ".join(file.name for file in there[1:])
            raise UserError(
                f"{there[0]} and {others} next to it contain the same split: keep only one of them"
            )
        queries = there[0] if there else folder / f"{split}.jsonl"
        gallery = folder / f"gallery.{split}.txt"
        return queries, gallery if gallery.exists() else queries

    def image_folders(self, part: str) -> list[Path]:
        return [self.annotation_folder() / "images"]

    def image_places(self, images_file: Path) -> dict[str, str]:
        names: list[str] = []
        if images_file.suffix == ".txt":
            names += image_list(images_file)
        else:
            for _, query in _entries(images_file):
                names += [*query.reference, *query.target, *query.group, *query.negatives]
        return {name: name for name in names}

    def queries(self, queries_file: Path, split: str) -> Iterator[tuple[str, Triplet]]:
        entries = _entries(queries_file)
        of_first = entries[0][1].model_fields_set & OF_ALL_OR_NONE if entries else set()
        faults = []
        bare = 0
        for where, query in entries:
            if query.model_fields_set & OF_ALL_OR_NONE != of_first:
                faults.append(f'{where}: "id" and "group" must each be in all lines or in none')
            bare += any("|" in caption for caption in query.caption)
        refuse_all(queries_file, faults, self.remedy)
        if bare and queries_file.suffix.lower() in TABLES:
            logger.warning(
                "note: %s: %d captions have a | without spaces, which is read literally: ' | ' separates several "
                "captions",
                queries_file,
                bare,
            )
        for where, query in entries:
            yield where, query.triplet()

    def train(self) -> Split:
        """Return the training triplets, one for each target. Captions repeat so that all triplets have equally many."""
        split = super().train()
        most = max(len(triplet.captions) for triplet in split.triplets)
        triplets = []
        for triplet in split.triplets:
            captions = itertools.islice(itertools.cycle(triplet.captions), most)
            triplets.append(replace(triplet, captions=tuple(captions)))
        return replace(split, triplets=triplets)

    def caption_variants(self, captions: tuple[str, ...]) -> list[str]:
        return list(captions)

    def hits(self, ranks: Ranks) -> "dict[str, np.ndarray]":
        hits = {f"recall_at{k}": ranks.named < k for k in OWN_RECALLS}
        if ranks.others is not None:
            precision = average_precision(ranks.of_all, PRECISION_PLACES)
            hits[f"map_at{PRECISION_PLACES}"] = precision
        if ranks.in_group is not None:
            for k in OWN_GROUP_RECALLS:
                hits[f"group_recall_at{k}"] = ranks.in_group < k
        for kind, queries in ranks.kinds.items():
            hits[OF_KIND + kind] = only(queries, ranks.named < KIND_PLACES)
        return hits

    def titled(self, metrics: Collection[str]) -> dict[str, str]:
        """Return metric -> title in a table; the recall of a kind of query has the name of the kind."""
        titles = super().titled(metrics)
        for metric in metrics:
            if metric.startswith(OF_KIND):
                titles[metric] = f"R@{KIND_PLACES} {metric.removeprefix(OF_KIND)}"
        return titles

    def summary(self, scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        (measured,) = scores.values()
        average = statistics.fmean(measured[f"recall_at{k}"] for k in OWN_RECALLS)
        return {**measured, "average_recall": average}


def _entries(file: Path) -> list[tuple[str, OwnTestQuery]]:
    """Return the entries of a file, each with its name in error messages.

    Raises:
        UserError: lines or rows are malformed; the message lists them (see `refuse_all`).
    """
    schema = OwnTestQuery if file.stem.lower() == Triplets.test_split else OwnQuery
    contents = _rows(file) if file.suffix.lower() in TABLES else _lines(file)
    entries = []
    faults = []
    for where, content in contents:
        entry = _entry(schema, where, content)
        if isinstance(entry, str):
            faults.append(entry)
        else:
            entries.append((where, entry))
    refuse_all(file, faults, Triplets.remedy)
    return entries


def _entry(schema: type[OwnTestQuery], where: str, content: "Reading") -> OwnTestQuery | str:
    """Return the entry of a line or row, or the problem with it."""
    try:
        return schema.model_validate(content())
    except ValidationError as error:
        return f"{where}: {first_fault(error)}"
    except ValueError as error:
        return f"{where} {first_line(error)}"


def image_list(file: Path) -> list[str]:
    """Return the images in a text file that lists one image per line."""
    return [image_name(line) for line in unmarked_text(file).split("\n") if line.strip()]


# Reads a line or row as an object. Raises ValueError with a message that continues "line 3", such as "is not JSON".
Reading = Callable[[], Any]


def _lines(file: Path) -> Iterator[tuple[str, Reading]]:
    """Yield the name of each line, for error messages, and a function that reads the line."""
    for number, line in enumerate(unmarked_text(file).split("\n"), start=1):
        if line.strip():
            yield f"line {number}", functools.partial(_object, line)


def _object(line: str) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        problem, _, _ = first_line(error).partition(": line 1")
        raise ValueError(f"is not JSON ({problem}): write an object on each line") from None


def _rows(file: Path) -> Iterator[tuple[str, Reading]]:
    """Yield the name of each row, for error messages, and a function that reads its cells as an object."""
    rows = table_rows(file)
    names = [name.strip().lower() for name in next(rows, (1, []))[1]]
    known = [name for name in OWN_COLUMNS if names.count(name) == 1]
    if not {"reference", "caption"} <= set(known) or len(known) < len(
        set(names) & set(OWN_COLUMNS)
    ):
        found = "is empty" if not names else "has other columns"
        raise UserError(
            f"{file} {found}: its first row should contain the columns reference, caption, target, each once: "
            f"{Triplets.remedy}"
        )
    for number, cells in rows:
        yield f"row {number}", functools.partial(_cells, names, known, cells)


def _cells(names: Sequence[str], known: Sequence[str], cells: Sequence[str]) -> dict[str, Any]:
    """Return the values of a row by column."""
    if len(cells) != len(names):
        raise ValueError(
            f"has {len(cells)} cells, but the first row has {len(names)}: put cells with a separator in quotation marks"
        )
    content: dict[str, Any] = {}
    for name in known:
        try:
            values = cell_values(cells[names.index(name)], OWN_COLUMNS[name])
        except ValueError as error:
            raise ValueError(f"has the {name} {error}") from None
        content[name] = values[0] if len(values) == 1 else values
    others = zip(names, cells, strict=True)
    content.update(
        (name, cell.strip()) for name, cell in others if name and name not in OWN_COLUMNS
    )
    return content
