"""What is written goes to what a path names, whatever that is, and never takes its place unless it is a file."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import CASES, ROOT
from evaluation.result_file import write_result
from runtime.files import (
    check_file_writable,
    read_json,
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


def test_a_pipe_gets_what_is_written(writer, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    descriptor = os.open(pipe, os.O_RDWR)  # a reader, and what is written fits into the pipe
    writer(pipe)
    got = os.read(descriptor, 2**16)
    os.close(descriptor)
    assert len(got) == len(written(writer, tmp_path))
    assert got[:4] == written(writer, tmp_path)[:4]
    assert pipe.is_fifo()


def test_a_pipe_that_nobody_reads_is_refused_and_not_waited_for(writer, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DiskError, match="pipe"):
        writer(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("device", ["/dev/null", "/dev/zero", "/dev/full"])
def test_a_device_stays_a_device(writer, device, tmp_path):
    """By a link, so that an error here costs no device of the machine."""
    link = tmp_path / "link"
    link.symlink_to(device)
    if device == "/dev/full":
        with pytest.raises(DiskError, match="space"):
            writer(link)
    else:
        writer(link)
    assert link.is_symlink()
    assert stat.S_ISCHR(Path(device).stat().st_mode)


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
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


def test_where_a_file_may_be_written_is_known_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "missing" / "file")
    os.mkfifo(tmp_path / "pipe")
    good = ["file", "new", "link", "pipe", "missing/too/new"]
    for name in good:
        check_file_writable({"--flag": tmp_path / name})
    check_file_writable({"--flag": Path("/dev/null"), "--other": None})
    for path in (tmp_path, tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="--flag"):
            check_file_writable({"--flag": path})


def test_what_may_never_end_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path / "zero", Path("/dev/null")):
        with pytest.raises(UserError, match="a device or a pipe"):
            read_json(path)


def test_what_the_shell_hands_over_is_read():
    """As in `compare.py <(zcat result.json.gz)`."""
    read, write = os.pipe()
    os.write(write, b'{"a": 1}')
    os.close(write)
    assert read_json(Path(f"/dev/fd/{read}")) == {"a": 1}
    os.close(read)
