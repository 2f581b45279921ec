"""Check JSON files and checkpoints against schemas, and report the first field that is invalid.

Schemas lie beside what reads them, in files that are imported when something is read: pydantic takes half a second.
"""

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from runtime.files import read_json
from utils import UserError

CHARACTERS_SHOWN = 60  # characters of a value that is refused


class Schema(BaseModel):
    """A table with known fields: types are exact, numbers finite, and fields of other versions may stay."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="allow")


Checked = TypeVar("Checked")


def checked(schema: type[Checked], content: Any, *, file: object, remedy: str) -> Checked:
    """The content of a file as its schema has it.

    Args:
        schema: a Schema, a list of one, or a list or an object of strings.
        file: how the message begins: the file, after its flag where there is one, and before the line.
        remedy: how the message ends, such as "measure again".

    Raises:
        UserError: the first field that is missing, of another type or out of range is named, with its value.
    """
    try:
        return TypeAdapter(schema).validate_python(content)
    except ValidationError as error:
        raise UserError(f"{file}: {first_fault(error)}: {remedy}") from None


def first_fault(error: ValidationError) -> str:
    """The first field that breaks a schema, why, and its value."""
    first = error.errors(include_url=False, include_context=False)[0]
    field = _field(first["loc"]) or "the content"
    found = ""
    if first["type"] != "missing":
        value = repr(first["input"])
        whole = len(value) <= CHARACTERS_SHOWN
        found = f", not {value if whole else f'{value[: CHARACTERS_SHOWN - 3]}...'}"
    reason = first["msg"][:1].lower() + first["msg"][1:]
    if first["type"] == "model_type":
        reason = "it should be a table"
    return f"{field}: {reason}{found}"


def read_checked(
    schema: type[Checked], file: Path, *, remedy: str, writer: str | None = None
) -> Checked:
    """The content of a JSON file as its schema has it.

    Args:
        writer: see `read_json`.

    Raises:
        UserError: it is not there or no JSON, or see `checked`.
    """
    return checked(schema, read_json(file, writer), file=file, remedy=remedy)


def _field(place: tuple[int | str, ...]) -> str:
    """Return the name of a field for messages: `preprocessing.mean`, or `entry 3: captions.0` of a list."""
    parts = list(map(str, place))
    if place and isinstance(place[0], int):
        return ": ".join(filter(None, [f"entry {place[0]}", ".".join(parts[1:])]))
    return ".".join(parts)
