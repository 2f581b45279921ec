"""What JSON files and checkpoints hold, field by field: a schema says it, and a value that breaks it is named.

Schemas lie beside what reads them, in files that are imported when something is read: pydantic takes half a second.
"""

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from utils import UserError

SHOWN = 60  # characters of a value that is refused


class Schema(BaseModel):
    """A table with known fields: types are exact, numbers finite, and fields of other versions may stay."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="allow")


AnySchema = TypeVar("AnySchema", bound=Schema)


def checked(schema: type[AnySchema], content: Any, *, file: object, remedy: str) -> AnySchema:
    """The content of a file as its schema has it.

    Args:
        file: how the message begins: the file, after its flag where there is one.
        remedy: how the message ends, such as "measure again".

    Raises:
        UserError: the first field that is missing, of another type or out of range is named, with its value.
    """
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(map(str, first["loc"])) or "the content"
    found = ""
    if first["type"] != "missing":
        found = f", not {shortened(first['input'])}"
    reason = first["msg"][:1].lower() + first["msg"][1:]
    if first["type"] == "model_type":
        reason = "it should be a table"
    raise UserError(f"{file}: {field}: {reason}{found}: {remedy}")


def shortened(value: object) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
