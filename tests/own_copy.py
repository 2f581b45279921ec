"""A copy of the drawn benchmark that tests may damage: made once, and mended after each of them."""

import functools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


def marks(folder: Path) -> dict[str, tuple]:
    """Path below a folder -> what tells whether something there was changed, parents first."""
    found: dict[str, tuple] = {}
    for place, folders, files in os.walk(folder):
        for name in folders + files:
            path = os.path.join(place, name)  # noqa: PTH118  a Path each takes three times as long
            state = os.lstat(path)
            content = () if name in folders else (state.st_ino, state.st_size, state.st_mtime_ns)
            found[os.path.relpath(path, folder)] = (state.st_mode, *content)
    return found


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@functools.cache
def spare(drawn: Path) -> tuple[Path, dict[str, tuple]]:
    """A copy of `drawn`, and what marks it as whole."""
    folder = shutil.copytree(drawn, drawn.with_name(f"{drawn.name}-copy"))
    return folder, marks(folder)


@pytest.fixture
def mended(drawn) -> Iterator[Path]:
    """A copy of `drawn` that a test may damage: `own_drawn` of conftest, without hundreds of files copied each time."""
    folder, whole = spare(drawn)
    yield folder
    found = marks(folder)
    changed = [name for name in whole.keys() | found.keys() if whole.get(name) != found.get(name)]
    for name in sorted(changed):  # a folder before what lies in it: it may be a link by now
        remove(folder / name)
    for name in sorted(whole.keys() & set(changed)):
        if (drawn / name).is_dir():
            (folder / name).mkdir()
        else:
            shutil.copy2(drawn / name, folder / name)
    if changed:
        whole.clear()
        whole.update(marks(folder))
