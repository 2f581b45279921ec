"""Values of annotation files, checked; what is wrong is a UserError that names file and entry."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from runtime.files import read_json
from utils import UserError


def check(holds: bool, file: Path, expected: str) -> None:
    """Raise UserError unless the file is as expected."""
    if not holds:
        raise UserError(f"{file}: expected {expected}; download the official annotation file again")


def read(file: Path, kind: type) -> Any:
    """The content of a JSON file that must be a list or an object (dict)."""
    content = read_json(file)
    check(isinstance(content, kind), file, f"a JSON {'list' if kind is list else 'object'}")
    return content


def field(entry: Any, key: str, kind: type, file: Path, where: str) -> Any:
    """A value of an entry, which must be there and of its type."""
    found = isinstance(entry, dict) and isinstance(entry.get(key), kind) and not isinstance(entry[key], bool)
    check(found, file, f'"{key}" ({kind.__name__}) in {where}')
    return entry[key]


def check_known(names: Iterable[str], known: Mapping[str, Any], file: Path, where: str, *, images_file: Path) -> None:
    """Raise UserError unless every image that an entry names is in the split's list of images."""
    for name in names:
        if name not in known:
            raise UserError(f"{file}: {where} names the image {name}, which is not in {images_file}: get both anew")
