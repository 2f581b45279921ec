"""Values of annotation files, checked; what is wrong is a UserError that names file and entry."""

from collections.abc import Container, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runtime.files import read_json
from utils import UserError

# What to do with a file that nobody should edit.
OFFICIAL = "download the official annotation file again"


def check(holds: bool, file: Path, expected: str, *, remedy: str = OFFICIAL) -> None:
    """Raise UserError unless the file is as expected."""
    if not holds:
        raise UserError(f"{file}: expected {expected}; {remedy}")


def read(file: Path, kind: type) -> Any:
    """The content of a JSON file that must be a list or an object (dict)."""
    content = read_json(file)
    check(isinstance(content, kind), file, f"a JSON {'list' if kind is list else 'object'}")
    return content


@dataclass(frozen=True)
class Entry:
    """A part of a file whose values must be there and of their types.

    Attributes:
        content: any JSON.
        where: what an error calls it.
        remedy: what an error says to do.
    """

    content: Any
    file: Path
    where: str
    remedy: str = OFFICIAL

    def text(self, key: str) -> str:
        """A string."""
        return self._value(key, str)

    def number(self, key: str) -> int:
        """A whole number."""
        return self._value(key, int)

    def list(self, key: str) -> list[Any]:
        """A list."""
        return self._value(key, list)

    def table(self, key: str) -> dict[str, Any]:
        """An object."""
        return self._value(key, dict)

    def inner(self, key: str) -> "Entry":
        """An object in it, as an entry."""
        return replace(self, content=self.table(key))

    def check(self, holds: bool, expected: str) -> None:
        """Raise UserError unless the entry is as expected."""
        expectation = f"{expected} in {self.where}" if self.where else expected
        check(holds, self.file, expectation, remedy=self.remedy)

    def _value(self, key: str, kind: type) -> Any:
        value = self.content.get(key) if isinstance(self.content, dict) else None
        self.check(
            isinstance(value, kind) and not isinstance(value, bool), f'"{key}" ({kind.__name__})'
        )
        return value


def check_known(
    names: Iterable[str], known: Container[str], entry: Entry, images_file: Path
) -> None:
    """Raise UserError unless every image that an entry names is in the split's list of images."""
    for name in names:
        if name not in known:
            raise UserError(
                f"{entry.file}: {entry.where} names the image {name}, which is not in {images_file}: {entry.remedy}"
            )


def are_texts(values: Iterable[Any]) -> bool:
    """Whether all of some values are strings."""
    return all(isinstance(value, str) for value in values)
