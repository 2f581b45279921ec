"""Check JSON files and checkpoints against schemas, and report the first field that is invalid.

Schemas are next to the code that reads the files, in modules that are imported on demand, because
importing pydantic takes half a second.
"""

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from runtime.files import read_json
from utils import UserError

CHARACTERS_SHOWN = 60  # maximum length of an invalid value in a message


class Schema(BaseModel):
    """Base of all schemas: types are exact, numbers are finite, and unknown fields of other versions are allowed."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="allow")


Checked = TypeVar("Checked")


def checked(schema: type[Checked], content: Any, *, file: object, remedy: str) -> Checked:
    """Return the content of a file after checking it against its schema.

    Args:
        schema: a Schema, a list of Schemas, or a list or an object of strings.
        file: beginning of the message: the flag if there is one, the file, and the line if the file
            has several.
        remedy: end of the message, such as "measure again".

    Raises:
        UserError: a field is missing, has another type or is out of range; the message has the
            first and its value.
    """
    try:
        return TypeAdapter(schema).validate_python(content)
    except ValidationError as error:
        raise UserError(f"{file}: {first_fault(error)}: {remedy}") from None


def first_fault(error: ValidationError) -> str:
    """Describe the first field that violates a schema, with the reason and its value."""
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
    """Read a JSON file and check it against its schema.

    Args:
        writer: see `read_json`.

    Raises:
        UserError: the file is missing or not JSON, or violates the schema, see `checked`.
    """
    return checked(schema, read_json(file, writer), file=file, remedy=remedy)


def _field(place: tuple[int | str, ...]) -> str:
    """Return the name of a field for messages: `preprocessing.mean`, or `entry 3: captions.0` in a list."""
    parts = list(map(str, place))
    if place and isinstance(place[0], int):
        return ": ".join(filter(None, [f"entry {place[0]}", ".".join(parts[1:])]))
    return ".".join(parts)
