"""Declaration of settings as pydantic fields, from which flags, their help and the checks of stored values follow."""

import argparse
import types
import typing
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from settings.flag_types import Several, number, usable_path, whole_number
from utils import flag


@dataclass(frozen=True, eq=False)
class OneOf:
    """Constraint on a text: it must be one of the given names."""

    names: Collection[str]

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def check(self, value: str) -> str:
        """Return the value. Raises PydanticCustomError if it is not one of the names."""
        if value not in self.names:
            raise PydanticCustomError("name", f"it should be one of {', '.join(self.names)}")
        return value


@dataclass(frozen=True, eq=False)
class Typed:
    """Constraint on a value that is parsed from text, such as a path, and stored as text.

    Attributes:
        parse: function from the text of a flag to the value; raises argparse's error.
        stored: function from the text in a file to the value; a path may be from another machine, so it need not exist.
    """

    parse: Callable[[str], Any]
    stored: Callable[[str], Any] = str

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def check(self, value: Any) -> Any:
        """Return the value. Raises PydanticCustomError if it is neither a path nor a text that can be one."""
        if isinstance(value, Path):
            return value
        # Pydantic's own check of texts would reject paths that are not UTF-8.
        if not isinstance(value, str) or not value or "\0" in value:
            raise PydanticCustomError("path", "it should be a path")
        return self.stored(value)


class Text:
    """Constraint on a text that may contain any characters, even lone surrogates."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Callable) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(cls.check)

    @staticmethod
    def check(value: Any) -> str:
        """Return the value. Raises PydanticCustomError if it is not a text."""
        if not isinstance(value, str):
            raise PydanticCustomError("text", "it should be a string")
        return value


UsablePath = typing.Annotated[Path, Typed(usable_path, Path)]
AnyText = typing.Annotated[str, Text]


class Flags(BaseModel):
    """Settings of one subject, or all settings of a script, which inherits from its subjects.

    Attributes:
        title, about: heading and introduction of the subject's flags in `--help`.
    """

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="ignore")
    title: ClassVar[str] = ""
    about: ClassVar[str] = ""

    @classmethod
    def of(cls: "type[AnyFlags]", values: Any) -> "AnyFlags":
        """Return the settings of this class, read from the attributes of an object that may have others too."""
        return cls(**{name: getattr(values, name) for name in cls.model_fields})


AnyFlags = TypeVar("AnyFlags", bound=Flags)


def setting(
    default: Any, help: str = "", *, metavar: str = "", where: str = "computes", off: str = ""
) -> Any:
    """Declare the default, help and use of a setting; a setting with a help text gets a flag.

    Args:
        where: use of the value; "computes": it changes numbers; "free": it does not; "moves": it is the path of a file
            that may be moved as long as its content stays the same; "secret": it must not be written to any file.
        off: help of a second flag, `--no-...`, which sets None, or False if the setting is a switch.
    """
    more: dict[str, Any] = {"metavar": metavar, "where": where, "off": off}
    return Field(default, description=help, json_schema_extra=more)


def changed(flags: type[Flags], name: str, default: Any, help: str = "") -> Any:
    """Declare a setting of another class again, with a new default and with `help` appended to its help text."""
    known = flags.model_fields[name]
    return setting(default, f"{known.description}{help}", **_more(known))


def subjects(flags: type[Flags]) -> list[type[Flags]]:
    """Return the subjects that a script's settings inherit from, in the order of `--help`."""
    mixed = [kind for kind in flags.__mro__ if issubclass(kind, Flags) and "title" in vars(kind)]
    return [kind for kind in mixed if kind.title]


def names_where(flags: type[Flags], *where: str) -> frozenset[str]:
    """Return the names of the settings with one of these uses, see `where` in `setting`."""
    return frozenset(
        name for name, field in flags.model_fields.items() if _more(field)["where"] in where
    )


def stored(flags: Flags) -> dict[str, Any]:
    """Return settings as types that JSON and checkpoints can store: paths are absolute, secret settings left out."""
    values = {}
    for name in type(flags).model_fields.keys() - names_where(type(flags), "secret"):
        value = getattr(flags, name)
        values[name] = str(value.absolute()) if isinstance(value, Path) else value
    return dict(sorted(values.items()))


def parent(group: type[Flags], of: type[Flags] | None = None) -> argparse.ArgumentParser:
    """Return a parser with a subject's flags, for use as a parent of a script's parser.

    Args:
        of: settings of the script, whose defaults replace the subject's defaults.
    """
    parser = argparse.ArgumentParser(add_help=False)
    titled = parser.add_argument_group(group.title, group.about or None)
    for name in group.__annotations__:
        field = (of or group).model_fields.get(name)
        if field is not None and field.description:
            _add_flag(titled, name, field)
    return parser


def parsed(
    parser: argparse.ArgumentParser, flags: type[AnyFlags], values: argparse.Namespace
) -> AnyFlags:
    """Convert parsed flags to settings; the parser rejects combinations of values that the settings do not allow."""
    known = {name: value for name, value in vars(values).items() if name in flags.model_fields}
    try:
        return flags(**known)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    return parser.error(f"argument {flag(str(first['loc'][0]))}: {first['msg']}")


def _more(field: FieldInfo) -> dict[str, str]:
    return typing.cast(dict[str, str], field.json_schema_extra)


def _add_flag(group: argparse._ArgumentGroup, name: str, field: FieldInfo) -> None:
    """Add the flag of a setting, and its `--no-...` flag if it has one."""
    kind, _ = _kind(field)
    told: dict[str, Any] = {"help": field.description}
    told.update({"required": True} if field.is_required() else {"default": field.default})
    if kind is bool:
        group.add_argument(flag(name), action="store_true", **told)
    else:
        _add_value(group, name, field, told)
    if off := _more(field)["off"]:
        nothing = False if kind is bool else None
        no = f"--no-{name.replace('_', '-')}"
        group.add_argument(no, dest=name, action="store_const", const=nothing, help=off)


def _add_value(
    group: argparse._ArgumentGroup, name: str, field: FieldInfo, told: dict[str, Any]
) -> None:
    kind, limits = _kind(field)
    if typing.get_origin(kind) is list:
        kind, limits = _unwrapped(typing.get_args(kind)[0])
        told.update(nargs="+", action=Several)
    if metavar := _more(field)["metavar"]:
        told["metavar"] = metavar
    for limit in limits:
        if isinstance(limit, OneOf):
            told["choices"] = limit.names
        if isinstance(limit, Typed):
            told["type"] = limit.parse
    if kind in (int, float):
        between = whole_number if kind is int else number
        told["type"] = between(_bound(limits, "ge"), _bound(limits, "le"))
    group.add_argument(flag(name), **told)


def _kind(field: FieldInfo) -> tuple[Any, list[Any]]:
    """Return the type of a setting without None, and its constraints, such as bounds or names."""
    kind, limits = _unwrapped(field.annotation)
    return kind, [*field.metadata, *limits]


def _unwrapped(annotation: Any) -> tuple[Any, list[Any]]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        (annotation,) = [part for part in typing.get_args(annotation) if part is not type(None)]
    if typing.get_origin(annotation) is not typing.Annotated:
        return annotation, []
    kind, *limits = typing.get_args(annotation)
    flat: list[Any] = []
    for limit in limits:
        flat += limit.metadata if isinstance(limit, FieldInfo) else [limit]
    return kind, flat


def _bound(limits: Collection[Any], side: str) -> Any:
    """Return the bound on one side, "ge" or "le"; every numeric setting has both."""
    return next(getattr(limit, side) for limit in limits if hasattr(limit, side))
