"""Entries of annotation files: what the schemas of all benchmarks share, and how a list of queries is read."""

from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Strict
from pydantic_core import PydanticCustomError

from benchmarks.splits import Triplet
from runtime.schema import Schema, read_checked
from runtime.spelling import nfc
from utils import UserError

# What to do with a file that nobody should edit.
OFFICIAL = "download the official annotation file again"
NAMED_FAULTS = 20  # faults of a file that a message names


def distinct(values: Sequence[Hashable]) -> Sequence[Hashable]:
    """The values, each there once."""
    if len(set(values)) < len(values):
        raise PydanticCustomError("distinct", "its values should not repeat")
    return values


def refuse_all(file: Path, faults: Sequence[str], remedy: str) -> None:
    """Raise UserError where a file has faults: the first of them, and how many more."""
    if faults:
        more = f"; and {len(faults) - NAMED_FAULTS} more" if len(faults) > NAMED_FAULTS else ""
        raise UserError(f"{file}: {'; '.join(faults[:NAMED_FAULTS])}{more}: {remedy}")


def _as_text(value: object) -> object:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if is_number else value


Distinct = AfterValidator(distinct)
FromList = Strict(False)  # JSON knows lists alone
ImageName = Annotated[str, AfterValidator(nfc)]
# Of a query: a text, or a whole number as one.
Name = Annotated[str, BeforeValidator(_as_text), AfterValidator(nfc)]


class Entry(Schema):
    """An entry of a file, of which some fields are read."""

    model_config = ConfigDict(extra="ignore", defer_build=True)


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
