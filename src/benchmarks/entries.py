"""Define the entries of annotation files: types and schemas that all benchmarks share, and how to read queries."""

from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Strict
from pydantic_core import PydanticCustomError

from benchmarks.splits import Triplet
from runtime.schema import Schema, read_checked
from runtime.spelling import nfc
from utils import UserError

# Remedy for a file that nobody should edit.
OFFICIAL = "download the official annotation file again"
NAMED_FAULTS = 20  # maximum number of faults in a message


def distinct(values: Sequence[Hashable]) -> Sequence[Hashable]:
    """Return the values after checking that they do not repeat."""
    if len(set(values)) < len(values):
        raise PydanticCustomError("distinct", "its values should not repeat")
    return values


def refuse_all(file: Path, faults: Sequence[str], remedy: str) -> None:
    """Raise UserError if a file has faults; the message contains the first faults and the number of others."""
    if faults:
        more = f"; and {len(faults) - NAMED_FAULTS} more" if len(faults) > NAMED_FAULTS else ""
        raise UserError(f"{file}: {'; '.join(faults[:NAMED_FAULTS])}{more}: {remedy}")


def _as_text(value: object) -> object:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if is_number else value


Distinct = AfterValidator(distinct)
FromList = Strict(False)  # accepts lists, because JSON has no tuples
ImageName = Annotated[str, AfterValidator(nfc)]
# Name of a query: a text, or a whole number that becomes a text.
Name = Annotated[str, BeforeValidator(_as_text), AfterValidator(nfc)]


class Entry(Schema):
    """An entry of a file, of which only some fields are read."""

    model_config = ConfigDict(extra="ignore", defer_build=True)


class Query(Entry):
    """An entry that describes a query."""

    def triplet(self) -> Triplet:
        """Return the query in the form that all benchmarks share."""
        raise NotImplementedError


def read_queries(schema: type[Query], file: Path, *, remedy: str) -> Iterator[tuple[str, Triplet]]:
    """Yield the queries of a JSON list, in order: the name of each one in error messages, and the query.

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
