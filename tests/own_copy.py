"""A copy of the drawn benchmark that tests may damage: made once, and mended after each of them."""

import functools
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest


def mark(state: os.stat_result) -> tuple:
    """What tells whether a file was changed; of a folder, that it is one."""
    if stat.S_ISDIR(state.st_mode):
        return (state.st_mode,)
    return (state.st_mode, state.st_ino, state.st_size, state.st_mtime_ns)


def marks(folder: Path | str, prefix: str = "") -> dict[str, tuple]:
    """Path below a folder -> its mark."""
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            name = prefix + entry.name
            found[name] = mark(entry.stat(follow_symlinks=False))
            if entry.is_dir(follow_symlinks=False):
                found.update(marks(entry.path, f"{name}/"))
    return found


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@functools.cache
def spare(drawn: Path) -> tuple[Path, dict[str, tuple]]:
    """A copy of `drawn`, and the marks of its files."""
    folder = shutil.copytree(drawn, drawn.with_name(f"{drawn.name}-copy"))
    return folder, marks(folder)


@pytest.fixture
def mended(drawn) -> Iterator[Path]:
    """A copy of `drawn` that a test may damage: `own_drawn` of conftest, without hundreds of files copied each time."""
    folder, whole = spare(drawn)
    yield folder
    found = marks(folder)
    changed = {name for name in whole.keys() | found.keys() if whole.get(name) != found.get(name)}
    for name in sorted(changed):  # a folder before what lies in it: it may be a link by now
        remove(folder / name)
    for name in sorted(whole.keys() & changed):
        if (drawn / name).is_dir():
            (folder / name).mkdir()
        else:
            shutil.copy2(drawn / name, folder / name)
        whole[name] = mark((folder / name).lstat())
