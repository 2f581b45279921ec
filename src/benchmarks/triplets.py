"""Your own triplets: a file of queries for each split, and a folder of images. docs/own-data.md says how to make them.

A line of `{split}.jsonl` is an object with "reference", "caption" and "target", and if you like "id" and "group"; in
`{split}.csv` these are columns. Captions and targets may be several: a list, in a cell of a CSV file `one | another`.
"""

import csv
import io
import itertools
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from benchmarks.base import Benchmark
from benchmarks.entries import FromList, Name, Query
from benchmarks.metrics import Metric, Ranks, average_precision
from benchmarks.places import image_name
from benchmarks.protocols import ORIGINAL_KEPT, ORIGINAL_REMOVED
from benchmarks.splits import Split, Triplet
from runtime.choices import WHITE
from runtime.files import missing_file, parse_json, read_text
from runtime.schema import checked
from utils import UserError, first_line

if TYPE_CHECKING:
    import numpy as np

COLUMNS = ("reference", "caption", "target", "id", "group")
OF_ALL_OR_NONE = {"id", "group"}
SEVERAL = "|"  # between the values of a cell
RECALLS = (1, 5, 10, 50)
GROUP_RECALLS = (1, 2, 3)
PRECISION_PLACES = 10


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
    id: Name | None = None
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
            pair_id=self.id,
        )


class OwnQuery(OwnTestQuery):
    """A line or a row of the other splits."""

    target: Images

    def triplet(self) -> Triplet:
        target, *others = self.target
        return replace(super().triplet(), target=target, other_targets=tuple(others))


class Triplets(Benchmark):
    """A benchmark of your own: one gallery, any number of captions and targets a query, groups where you have some.

    A query's first caption is its text at evaluation, its first target the one of the recalls.
    """

    name = "Triplets"
    run_name = "triplets"
    folder = "triplets_dataset"
    remedy = "mend it as docs/own-data.md says"
    id_types = (NoneType, str)
    group_size = None
    background = WHITE
    # The picture that a search begins with is no answer to anybody, so this is what checkpoints are chosen by.
    protocols = (ORIGINAL_REMOVED, ORIGINAL_KEPT)
    reported = {
        **{f"recall_at{k}": Metric(f"R@{k}") for k in RECALLS},
        f"map_at{PRECISION_PLACES}": Metric(f"mAP@{PRECISION_PLACES}"),
        **{f"group_recall_at{k}": Metric(f"R_subset@{k}") for k in GROUP_RECALLS},
        "average_recall": Metric("mean R", checkpoint="best"),
    }

    def files(self, part: str, split: str) -> tuple[Path, Path]:
        """The queries, and the gallery: where no file lists it, all images that the queries name."""
        folder = self.annotation_folder()
        lines = folder / f"{split}.jsonl"
        table = folder / f"{split}.csv"
        if lines.exists() and table.exists():
            raise UserError(f"{lines} and {table.name} beside it are one split: keep one of them")
        queries = table if table.exists() else lines
        gallery = folder / f"gallery.{split}.txt"
        return queries, gallery if gallery.exists() else queries

    def image_folders(self, part: str) -> list[Path]:
        return [self.annotation_folder() / "images"]

    def image_places(self, images_file: Path) -> dict[str, str]:
        names: list[str] = []
        if images_file.suffix == ".txt":
            names += image_list(images_file)
        else:
            for _, query in _entries(OwnTestQuery, images_file):
                names += [*query.reference, *query.target, *query.group]
        return {name: name for name in names}

    def queries(self, queries_file: Path, split: str) -> Iterator[tuple[str, Triplet]]:
        schema = OwnTestQuery if split == self.test_split else OwnQuery
        of_first: set[str] | None = None
        for where, query in _entries(schema, queries_file):
            given = query.model_fields_set & OF_ALL_OR_NONE
            of_first = given if of_first is None else of_first
            if given != of_first:
                raise UserError(
                    f'{queries_file}: {where}: "id" and "group" are in all lines or in none: {self.remedy}'
                )
            yield where, query.triplet()

    def train(self) -> Split:
        """The training triplets, one for each target; those with fewer captions than another have theirs again."""
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
        hits = {f"recall_at{k}": ranks.named < k for k in RECALLS}
        if ranks.others is not None:
            precision = average_precision(ranks.of_all, PRECISION_PLACES)
            hits[f"map_at{PRECISION_PLACES}"] = precision
        if ranks.in_group is not None:
            for k in GROUP_RECALLS:
                hits[f"group_recall_at{k}"] = ranks.in_group < k
        return hits

    def summary(self, scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        (measured,) = scores.values()
        average = statistics.fmean(measured[f"recall_at{k}"] for k in RECALLS)
        return {**measured, "average_recall": average}


def _entries(schema: type[OwnTestQuery], file: Path) -> Iterator[tuple[str, OwnTestQuery]]:
    """What an error calls each line or row of a file, and what it holds."""
    for where, content in _rows(file) if file.suffix == ".csv" else _lines(file):
        yield where, checked(schema, content, file=f"{file}: {where}", remedy=Triplets.remedy)


def image_list(file: Path) -> list[str]:
    """The images of a text file that has one on each line."""
    return [image_name(line) for line in _text(file).split("\n") if line.strip()]


def _text(file: Path) -> str:
    """The text of a file, without the mark that spreadsheets put before it."""
    try:
        return read_text(file).removeprefix("\ufeff")
    except FileNotFoundError:
        raise missing_file(file) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({first_line(error)}): save it as UTF-8") from None


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    """What an error calls each line, and its content."""
    for number, line in enumerate(_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            content = parse_json(line)
        except ValueError as error:
            problem, _, _ = first_line(error).partition(": line 1")
            raise UserError(
                f"{file}: line {number} is no JSON ({problem}): write an object on each line"
            ) from None
        yield f"line {number}", content


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    """What an error calls each row, as spreadsheets number them, and its cells as a line of JSON would have them."""
    text = _text(file)
    header, _, _ = text.partition("\n")
    separator = max(",;\t", key=header.count)  # that of spreadsheets, which differs by country
    try:
        names, *rows = csv.reader(io.StringIO(text), delimiter=separator, strict=True)
    except (csv.Error, ValueError) as error:
        raise UserError(f"{file} is no table ({error}): save it as CSV again") from None
    names = [name.strip().lower() for name in names]
    known = {name: names.index(name) for name in COLUMNS if names.count(name) == 1}
    if not {"reference", "caption"} <= known.keys() or len(known) < len(set(names) & set(COLUMNS)):
        raise UserError(
            f"{file}: its first row should name the columns {', '.join(COLUMNS[:3])}, each once: {Triplets.remedy}"
        )
    for number, cells in enumerate(rows, start=2):
        if not any(map(str.strip, cells)):
            continue
        if len(cells) != len(names):
            problem = f"row {number} has {len(cells)} cells, the first row {len(names)}"
            raise UserError(f"{file}: {problem}: put cells with {separator!r} in quotation marks")
        content = {name: _cell(name, cells[column]) for name, column in known.items()}
        yield f"row {number}", content


def _cell(name: str, text: str) -> str | list[str]:
    """A cell's value, or its values."""
    values = [value.strip() for value in text.split(SEVERAL)]
    return text.strip() if name == "id" or len(values) == 1 else values
