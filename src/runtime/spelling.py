"""Match file names that differ only in their spelling: in Unicode form, in case, or in leading folders."""

import functools
import itertools
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

MOST_FILES = 100_000  # maximum number of files that are searched for a hint
_ENDING = re.compile(r"(?<=[^/])\.[^./]+$")


def nfc(name: str) -> str:
    """Return a name in the Unicode form NFC, as keyboards write it. macOS separates letters and accents (NFD)."""
    return unicodedata.normalize("NFC", name)


def as_stored(path: Path) -> Path:
    """Return the path under which a file exists, if the disk has its name or a folder's in the other Unicode form."""
    if str(path).isascii() or path.exists():
        return path
    parent = as_stored(path.parent)
    try:
        names = _stored_names(parent, parent.stat().st_mtime_ns)
    except OSError:  # the folder does not exist
        return path
    return parent / names.get(nfc(path.name), path.name)


@functools.lru_cache(maxsize=64)
def _stored_names(folder: Path, changed: int) -> dict[str, str]:
    """Return NFC form -> name in a folder, cached until `changed`, the folder's modification time, differs."""
    return {nfc(entry.name): entry.name for entry in folder.iterdir()}


class Spellings:
    """Known names, for finding the correct spelling of an unknown name.

    A misspelled name differs in Unicode form or case, or has backslashes, extra or missing leading
    folders, another extension, or none.
    """

    def __init__(self, known: Iterable[str]) -> None:
        self.names = known

    @functools.cached_property
    def _by_end(self) -> dict[str, list[str]]:
        """Return end of a name, see `_ends` -> known names with this end."""
        found: dict[str, list[str]] = {}
        for name in self.names:
            for end in _ends(name):
                found.setdefault(end, []).append(name)
        return found

    def hint(self, name: str) -> str:
        """Return a hint with the known name that was probably meant; "" if no single name matches."""
        for end in _ends(name):
            if len(meant := self._by_end.get(end, [])) == 1:
                return f" (did you mean {meant[0]}?)"
        return ""


def _ends(name: str) -> list[str]:
    """Return a normalised name, then the name without its first folder, its first two, and so on.

    Each form is followed by the same form without its extension.
    """
    parts = PurePosixPath(nfc(name.replace("\\", "/")).casefold()).parts
    ends = []
    for number in range(len(parts)):
        end = "/".join(parts[number:])
        ends += [end, _ENDING.sub("", end)]
    return list(dict.fromkeys(ends))


def missing_folder(path: Path) -> Path | None:
    """Return the highest missing folder above a file; None if all its folders exist."""
    missing = itertools.takewhile(lambda folder: not folder.exists(), path.parents)
    return next(reversed(list(missing)), None)


def hint_of_file(path: Path) -> str:
    """Return `Spellings.hint` for a missing file, from the files below its nearest existing folder."""
    above = (missing_folder(path) or path).parent
    files = []
    for file in itertools.islice(above.rglob("*"), MOST_FILES):
        files.append(file.relative_to(above).as_posix())
    return Spellings(files).hint(path.relative_to(above).as_posix())
