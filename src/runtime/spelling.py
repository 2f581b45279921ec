"""Names that are one name in two spellings: in another Unicode form, in another case, with other folders in front."""

import functools
import itertools
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

MOST_FILES = 100_000  # that are looked through for the sake of a hint
_ENDING = re.compile(r"(?<=[^/])\.[^./]+$")


def nfc(name: str) -> str:
    """A name with its accents as keyboards write them. macOS takes letters and accents apart (NFD)."""
    return unicodedata.normalize("NFC", name)


def as_stored(path: Path) -> Path:
    """The path under which a file is there, where its name or a folder's is there in the other Unicode form."""
    if str(path).isascii() or path.exists():
        return path
    parent = as_stored(path.parent)
    try:
        names = _stored_names(parent, parent.stat().st_mtime_ns)
    except OSError:  # there is no such folder
        return path
    return parent / names.get(nfc(path.name), path.name)


@functools.lru_cache(maxsize=64)
def _stored_names(folder: Path, changed: int) -> dict[str, str]:
    """Return the names in a folder by their NFC; the folder is read again when it has changed."""
    return {nfc(entry.name): entry.name for entry in folder.iterdir()}


class Spellings:
    """Known names, and which of them an unknown one is but for a slip.

    A slip is another Unicode form, another case, backslashes, folders in front that are too many or missing, another
    ending or none.
    """

    def __init__(self, known: Iterable[str]) -> None:
        self.names = known

    @functools.cached_property
    def _by_end(self) -> dict[str, list[str]]:
        """Return the remainders of names, see `_ends` -> the names with this remainder."""
        found: dict[str, list[str]] = {}
        for name in self.names:
            for end in _ends(name):
                found.setdefault(end, []).append(name)
        return found

    def hint(self, name: str) -> str:
        """Name behind an unknown name the known one that was meant; "" where that is not certain."""
        for end in _ends(name):
            if len(meant := self._by_end.get(end, [])) == 1:
                return f" (did you mean {meant[0]}?)"
        return ""


def _ends(name: str) -> list[str]:
    """A name without regard to its spelling, without its ending, without the first folder, the first two, and so on."""
    parts = PurePosixPath(nfc(name.replace("\\", "/")).casefold()).parts
    ends = []
    for number in range(len(parts)):
        end = "/".join(parts[number:])
        ends += [end, _ENDING.sub("", end)]
    return list(dict.fromkeys(ends))


def missing_folder(path: Path) -> Path | None:
    """The highest folder above a file that is not there; None where all are."""
    missing = itertools.takewhile(lambda folder: not folder.exists(), path.parents)
    return next(reversed(list(missing)), None)


def hint_of_file(path: Path) -> str:
    """`Spellings.hint` of a file that is not there, among those below the folder above it that is there."""
    above = (missing_folder(path) or path).parent
    files = []
    for file in itertools.islice(above.rglob("*"), MOST_FILES):
        files.append(file.relative_to(above).as_posix())
    return Spellings(files).hint(path.relative_to(above).as_posix())
