"""What is written goes to what a path names, whatever that is, and never takes its place unless it is a file."""

import contextlib
import json
import multiprocessing
import os
import re
import secrets
import signal
import stat
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import CASES, ROOT
from evaluation.result_file import write_result
from runtime.files import (
    beside,
    check_file_writable,
    discard,
    folder_made_beside,
    read_json,
    sweep,
    write_bytes,
    write_same,
    write_text,
    written_whole,
)
from runtime.tensors import save_tensors
from utils import DiskError, UserError

ORIGINAL = b"the original"


def save_array(path: Path) -> None:
    with written_whole(path) as file:
        np.save(file, np.arange(3))


# Every way in which the project writes a file.
WRITERS = {
    "text": lambda path: write_text(path, "text"),
    "bytes": lambda path: write_bytes(path, b"bytes"),
    "result": lambda path: write_result(path, {"metrics": {}}),
    "tensors": lambda path: save_tensors(path, {"a": torch.ones(2)}),
    "array": save_array,
    "same": lambda path: write_same(path, path.parent / "original"),
}


@pytest.fixture(params=WRITERS)
def writer(request, tmp_path):
    (tmp_path / "original").write_bytes(ORIGINAL)
    CASES["ways to write", request.param] += 1
    return WRITERS[request.param]


def written(writer, folder: Path) -> bytes:
    """What a writer writes into a plain file."""
    writer(folder / "plain")
    return (folder / "plain").read_bytes()


def left_over(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize("links", [1, 2])
def test_a_link_stays_and_what_it_points_to_is_written(writer, links, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "file"
    target.write_text("earlier")
    path = tmp_path / "link"
    path.symlink_to(target)
    if links == 2:
        path = tmp_path / "link to a link"
        path.symlink_to("link")
    writer(path)
    assert path.is_symlink()
    assert target.read_bytes() == written(writer, tmp_path)
    assert left_over(tmp_path) == left_over(target.parent) == []


def test_a_link_to_nothing_makes_what_it_points_to(writer, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "new")
    writer(tmp_path / "link")
    assert (tmp_path / "new").read_bytes() == written(writer, tmp_path)
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("device", ["/dev/null", "/dev/zero", "/dev/full", None])
def test_devices_and_pipes_are_refused(writer, device, tmp_path):
    """By a link, so that an error here costs no device of the machine."""
    place = tmp_path / "place"
    if device is None:
        os.mkfifo(place)
    else:
        place.symlink_to(device)
    with pytest.raises(DiskError, match=r"place is a folder, a device or a pipe: choose a file"):
        writer(place)
    with pytest.raises(UserError, match=r"--flag .*place is a device or a pipe: choose a file"):
        check_file_writable({"--flag": place})
    assert place.is_symlink() or place.is_fifo()
    assert device is None or stat.S_ISCHR(Path(device).stat().st_mode)
    assert left_over(tmp_path) == []


def test_a_full_device_as_stdout_is_said(tmp_path):
    program = "from pathlib import Path; from runtime.files import write_text; write_text(Path('/dev/stdout'), 'x')"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        )
    assert "DiskError: could not write /dev/stdout (No space left on device)" in done.stderr


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1"])
@pytest.mark.parametrize("into", ["a pipe", "a file"])
def test_stdout_is_written_to_among_what_is_printed(name, into, tmp_path):
    program = (
        "import sys; from pathlib import Path; from runtime.files import write_text; print('before');"
        "write_text(Path(sys.argv[1]), 'written\\n'); print('after')"
    )
    out = tmp_path / "out"
    with open(out, "w") as file:
        done = subprocess.run(
            [sys.executable, "-c", program, name],
            stdout=file if into == "a file" else subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
            check=True,
        )
    printed = out.read_text() if into == "a file" else done.stdout
    assert printed.split() == ["before", "written", "after"]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_long_name(writer, tmp_path):
    for name in ("a" * 255, "é" * 127, "中" * 85):
        writer(tmp_path / name)
        assert (tmp_path / name).read_bytes() == written(writer, tmp_path)
    with pytest.raises(DiskError, match="name"):
        writer(tmp_path / ("a" * 256))
    assert left_over(tmp_path) == []


# What is being made has a name of its own, is never somebody else's, and goes when nobody makes it any more.


def half_made(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*.tmp"))


def make_folder(path: Path) -> None:
    with folder_made_beside(path) as folder:
        write_text(folder / "file", "text")


MAKERS = WRITERS | {"folder": make_folder}


@pytest.mark.parametrize("maker", MAKERS)
def test_nothing_is_made_at_a_name_that_is_there_already(maker, tmp_path, monkeypatch):
    """Not at one that can be foreseen, and not even at one that is known."""
    (tmp_path / "original").write_bytes(ORIGINAL)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    planted = [tmp_path / f".made.{number}.tmp" for number in (1, os.getpid())]
    for link in planted:
        link.symlink_to(victim)
    MAKERS[maker](tmp_path / "made")
    assert all(link.is_symlink() for link in planted)

    monkeypatch.setattr(secrets, "token_hex", lambda size: "0" * 16)
    for plant in (Path.symlink_to, Path.hardlink_to):
        known = tmp_path / f".other.clip4cir-{'0' * 16}.tmp"
        discard(known)
        plant(known, victim)
        with contextlib.suppress(DiskError):  # a copy is made where no link can be
            MAKERS[maker](tmp_path / "other")
            assert maker == "same"
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("maker", MAKERS)
def test_names_differ_each_time(maker, tmp_path, monkeypatch):
    (tmp_path / "original").write_bytes(ORIGINAL)
    seen = []
    for name in ("replace", "rename"):
        real = getattr(Path, name)
        monkeypatch.setattr(
            Path, name, lambda new, path, real=real: seen.append(new.name) or real(new, path)
        )
    for number in range(3):
        MAKERS[maker](tmp_path / str(number))
    assert len(set(seen)) == len(seen) >= 3


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_what_is_made_is_for_those_that_the_umask_says(mask, tmp_path):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "file", "text")
        make_folder(tmp_path / "folder")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~mask


def killed_while_making(maker: str, path: Path) -> None:
    """Make something, and be killed where it is about to take its name."""
    os.rename = os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
    MAKERS[maker](path)


@pytest.mark.parametrize("maker", ["text", "folder"])
def test_what_a_kill_left_goes_when_it_is_old(maker, tmp_path):
    process = multiprocessing.get_context("fork").Process(
        target=killed_while_making, args=(maker, tmp_path / "made")
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (left,) = half_made(tmp_path)
    assert not (tmp_path / "made").exists()
    sweep(tmp_path)
    os.utime(left, (time.time() - 100, time.time() - 100))
    sweep(tmp_path, age=200)
    assert left.exists()
    os.utime(left, (1, 1))
    sweep(tmp_path)
    assert half_made(tmp_path) == []


@pytest.mark.parametrize("maker", MAKERS)
def test_whatever_is_made_first_sweeps(maker, tmp_path):
    (tmp_path / "original").write_bytes(ORIGINAL)
    file, folder = beside(tmp_path / "made"), beside(tmp_path / "made")
    file.touch()
    (folder / "below").mkdir(parents=True)
    for left in (file, folder):
        os.utime(left, (1, 1))
    MAKERS[maker](tmp_path / "made")
    assert half_made(tmp_path) == []


def test_what_is_not_surely_ours_stays(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").touch()
    others = tmp_path / "others"
    others.mkdir()
    token = f"clip4cir-{'0' * 16}"
    for name in (".notes.tmp", ".notes.123.tmp", "notes.tmp", f"notes.{token}.tmp", f".a.{token}"):
        (others / name).touch()
        os.utime(others / name, (1, 1))
    before = sorted(others.iterdir())
    (others / f".link.{token}.tmp").symlink_to(tmp_path / "elsewhere")
    (others / f".folder.{token}.tmp").mkdir()
    (others / f".folder.{token}.tmp" / "link").symlink_to(tmp_path / "elsewhere")
    sweep(others, age=-1)
    assert sorted(others.iterdir()) == before
    assert (tmp_path / "elsewhere" / "precious").exists()


def test_where_a_file_may_be_written_is_known_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "missing" / "file")
    good = ["file", "new", "link", "missing/too/new"]
    for name in good:
        check_file_writable({"--flag": tmp_path / name})
    check_file_writable({"--flag": Path("/dev/stdout"), "--other": None})
    for path in (tmp_path, tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="--flag"):
            check_file_writable({"--flag": path})


def test_what_the_shell_hands_over_is_read():
    """As in `compare.py <(zcat result.json.gz)`."""
    read, write = os.pipe()
    os.write(write, b'{"a": 1}')
    os.close(write)
    assert read_json(Path(f"/dev/fd/{read}")) == {"a": 1}
    os.close(read)


def test_a_result_is_written_a_list_at_a_time(tmp_path):
    """The bytes are those of the whole text, which is never in memory."""
    ranks = list(range(5_000))
    others = [[], [7], [8, 9]]
    protocols = {name: {"ranks": {"val": ranks}, "others": others} for name in map(str, range(40))}
    result = {"été": None, "empty": [{}, []], "metrics": {"a": 0.1}, "protocols": protocols}
    tracemalloc.start()
    write_result(tmp_path / "result.json", result)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    text = json.dumps(result, indent=2)
    packed = re.sub(r"\[[\s\d,]+\]", lambda found: "".join(found[0].split()), text)
    assert (tmp_path / "result.json").read_text() == f"{packed}\n"
    assert peak < len(packed) / 2
