"""Settings declared once, as fields: flags, their help and bounds, and the check of files follow from them."""

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
    """A text that is one of some names."""

    names: Collection[str]

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def check(self, value: str) -> str:
        """Return a name. Raises PydanticCustomError where it is none."""
        if value not in self.names:
            raise PydanticCustomError("name", f"it should be one of {', '.join(self.names)}")
        return value


@dataclass(frozen=True, eq=False)
class Typed:
    """A text that is parsed as it is typed, such as a path; on disk it is the text of what came of it.

    Attributes:
        parse: what was typed -> the value, or argparse's error.
        stored: a text of a file -> the value; paths in it are those of the machine that wrote it, and not looked up.
    """

    parse: Callable[[str], Any]
    stored: Callable[[str], Any] = str

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def check(self, value: Any) -> Any:
        """Return the value. Raises PydanticCustomError where a file has another kind."""
        if isinstance(value, Path):
            return value
        # Any characters: pydantic's own text has no place for paths that are not UTF-8.
        if not isinstance(value, str) or not value or "\0" in value:
            raise PydanticCustomError("path", "it should be a path")
        return self.stored(value)


class Text:
    """A text of any characters."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Callable) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(cls.check)

    @staticmethod
    def check(value: Any) -> str:
        """Return the text. Raises PydanticCustomError where it is none."""
        if not isinstance(value, str):
            raise PydanticCustomError("text", "it should be a text")
        return value


UsablePath = typing.Annotated[Path, Typed(usable_path, Path)]
AnyText = typing.Annotated[str, Text]


class Flags(BaseModel):
    """Settings of one subject, or those of a script, which mixes subjects in.

    Attributes:
        title, about: what `--help` says above them.
    """

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="ignore")
    title: ClassVar[str] = ""
    about: ClassVar[str] = ""

    @classmethod
    def of(cls: "type[AnyFlags]", values: Any) -> "AnyFlags":
        """Return those of these names among the attributes of a larger whole."""
        return cls(**{name: getattr(values, name) for name in cls.model_fields})


AnyFlags = TypeVar("AnyFlags", bound=Flags)


def setting(
    default: Any, help: str = "", *, metavar: str = "", where: str = "computes", off: str = ""
) -> Any:
    """Declare a setting beside its type; `help` is what makes a flag of it.

    Args:
        where: it counts: "computes" changes numbers, "free" does not, "moves" names a file that may lie elsewhere as
            long as its content is the same, "secret" is written nowhere.
        off: help of a second flag, `--no-...`, which sets None, or False where the setting is a switch.
    """
    more: dict[str, Any] = {"metavar": metavar, "where": where, "off": off}
    return Field(default, description=help, json_schema_extra=more)


def changed(flags: type[Flags], name: str, default: Any, help: str = "") -> Any:
    """Declare the setting of another class with another default, and with more help."""
    known = flags.model_fields[name]
    return setting(default, f"{known.description}{help}", **_more(known))


def subjects(flags: type[Flags]) -> list[type[Flags]]:
    """Return the subjects that a script's settings mix in, in the order in which `--help` has them."""
    mixed = [kind for kind in flags.__mro__ if issubclass(kind, Flags) and "title" in vars(kind)]
    return [kind for kind in mixed if kind.title]


def names_where(flags: type[Flags], *where: str) -> frozenset[str]:
    """Return the names of the settings that count in some way, see `setting`."""
    return frozenset(
        name for name, field in flags.model_fields.items() if _more(field)["where"] in where
    )


def stored(flags: Flags) -> dict[str, Any]:
    """Return settings as plain types that JSON and a checkpoint hold, paths in full; secret ones are left out."""
    values = {}
    for name in type(flags).model_fields.keys() - names_where(type(flags), "secret"):
        value = getattr(flags, name)
        values[name] = str(value.absolute()) if isinstance(value, Path) else value
    return dict(sorted(values.items()))


def parent(group: type[Flags], of: type[Flags] | None = None) -> argparse.ArgumentParser:
    """Return a subject's flags as a parent of a script's parser.

    Args:
        of: the script's own settings, whose defaults hold.
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
    """Return what was typed as settings; the parser rejects what they do not allow together."""
    known = {name: value for name, value in vars(values).items() if name in flags.model_fields}
    try:
        return flags(**known)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    return parser.error(f"argument {flag(str(first['loc'][0]))}: {first['msg']}")


def _more(field: FieldInfo) -> dict[str, str]:
    return typing.cast(dict[str, str], field.json_schema_extra)


def _add_flag(group: argparse._ArgumentGroup, name: str, field: FieldInfo) -> None:
    """Add the flag of a setting, of its type and within its bounds."""
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
    """Add a flag that takes a value."""
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
    """The type of a setting that is not silent, and its bounds or names."""
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
    """The bound on a side, which every number has."""
    return next(getattr(limit, side) for limit in limits if hasattr(limit, side))
