"""Small files that ask for much memory: refused in a line before they have it."""

import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from runtime.tensors import load_tensors, save_tensors

ASKED = 2**26  # bytes that each of these asks for, or more
MOST = 48 * 2**20  # bytes that all of them may take together
# Reads each file as weights of either kind; prints how each was refused, and by how much the process grew.
PROBE = """
import json, re, sys
from pathlib import Path
import torch
from combiner import load_combiner
from models.clip_model import load_clip
from models.configuration import read_checkpoint
from utils import UserError

# Of this process alone, unlike what `getrusage` says, which begins with its parent's.
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
said = {}
for file in sys.argv[1:]:
    said[file] = []
    try:
        found = read_checkpoint("--combiner-path", Path(file), "Combiner")
        load_combiner(found.state, found.table, found.path, wanted={}, clip_dim=64)
    except UserError as error:
        said[file].append(str(error))
    try:
        load_clip(file, torch.device("cpu"))
    except UserError as error:
        said[file].append(str(error))
print(json.dumps([said, peak() - before]))
"""


def saved(content: object, **how: bool) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **how)
    return stream.getvalue()


def packed(archive: bytes, kind: int) -> bytes:
    """A zip archive whose parts are compressed."""
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(archive)) as plain,
        zipfile.ZipFile(stream, "w", kind, compresslevel=1) as small,
    ):
        for name in plain.namelist():
            small.writestr(name, plain.read(name))
    return stream.getvalue()


def with_pickle(instructions: bytes) -> bytes:
    """A checkpoint {"Combiner": ...} whose value is made by a pickle's instructions."""
    made = b"\x80\x02}X\x08\x00\x00\x00Combiner" + instructions + b"s."
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved({}))) as plain,
        zipfile.ZipFile(stream, "w") as other,
    ):
        for name in plain.namelist():
            other.writestr(name, made if name.endswith("data.pkl") else plain.read(name))
    return stream.getvalue()


def calling(what: bytes) -> bytes:
    """A pickle's instructions that call something of a module with so many."""
    return b"c" + what + b"\n\x8a\x05" + ASKED.to_bytes(5, "little") + b"\x85R"


def of_earlier_torch(instructions: bytes) -> bytes:
    file = saved({}, _use_new_zipfile_serialization=False)
    empty = pickle.dumps({}, 2)
    assert empty in file
    return file.replace(empty, b"\x80\x02}X\x01\x00\x00\x00a" + instructions + b"s.", 1)


def zeros() -> dict:
    return {"Combiner": {"output_layer.weight": torch.zeros(ASKED // 4, 1)}}


def weights(**more: object) -> dict:
    return {"Combiner": {"output_layer.weight": torch.zeros(64, 32)}, **more}


def doubled() -> dict:
    content: dict = {"a": 1}
    for _ in range(40):
        content = {"a": content, "b": content}
    return content


def shared() -> dict:
    """A mixture whose experts are all the same bytes: built, it is thousands of times the file."""
    one = torch.randn(512, 1024)
    state = {"output_layer.weight": torch.randn(64, 512), "moe_layer.router.weight": one[:, :]}
    for number in range(2048):
        state[f"moe_layer.experts.{number}.0.weight"] = one
    return {"Combiner": state}


class Zeros(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(ASKED // 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def scripted() -> bytes:
    stream = io.BytesIO()
    torch.jit.save(torch.jit.script(Zeros()), stream)
    return stream.getvalue()


def tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            about = tarfile.TarInfo(name)
            about.size = 4
            archive.addfile(about, io.BytesIO(pickle.dumps({}, 2)))
    return stream.getvalue()


def header(length: int, shape: int) -> bytes:
    """A safetensors file that says it has so many bytes of header, and a tensor that is not there."""
    told = {"a": {"dtype": "F32", "shape": [shape], "data_offsets": [0, 4 * shape]}}
    text = json.dumps(told).encode()
    return struct.pack("<Q", length or len(text)) + text


BOMBS: dict[str, Callable[[], bytes]] = {
    "deflated.pt": lambda: packed(saved(zeros()), zipfile.ZIP_DEFLATED),
    "scripted.pt": lambda: packed(scripted(), zipfile.ZIP_DEFLATED),
    "bytearray.pt": lambda: with_pickle(calling(b"__builtin__\nbytearray")),
    "builtins.pt": lambda: with_pickle(calling(b"builtins\nbytearray")),
    "earlier.pt": lambda: of_earlier_torch(calling(b"__builtin__\nbytearray")),
    "earlier_zip.pt": lambda: of_earlier_torch(calling(b"builtins\nbytearray")) + saved({}),
    "constructed.pt": lambda: with_pickle(calling(b"torch\nFloatTensor")),
    "expanded.pt": lambda: saved(
        {"Combiner": {"output_layer.weight": torch.zeros(1).expand(2**15, 2**15)}}
    ),
    "shared.pt": lambda: saved(shared()),
    "doubled.pt": lambda: saved(weights(config=doubled())),
    "tar.pt": tar,
    "header.safetensors": lambda: header(2**40, 4),
    "absent.safetensors": lambda: header(0, ASKED),
}


def test_small_files_that_ask_for_much_memory(start, tmp_path):
    files = []
    for name, make in BOMBS.items():
        files.append(tmp_path / name)
        files[-1].write_bytes(make())
        assert files[-1].stat().st_size < 10 * 2**20
    script = tmp_path / "probe.py"
    script.write_text(PROBE)
    done = start(script, *files)
    assert done.wait() == 0, done.stderr
    said, grown = json.loads(done.stdout)
    for file in files:
        assert len(said[str(file)]) == 2
        assert all(file.name in line for line in said[str(file)])
    assert grown < MOST


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_weights_that_somebody_packed_are_read(kind, tmp_path):
    """Numbers do not pack to a small part of themselves."""
    state = {"output_layer.weight": torch.randn(300, 200), "half": torch.randn(300).half()}
    file: Path = tmp_path / "a.pt"
    save_tensors(file, {"Combiner": state, "config": {"seeds": [1] * 1000}})
    file.write_bytes(packed(file.read_bytes(), kind))
    content = load_tensors(file)
    assert all(torch.equal(content["Combiner"][name], weight) for name, weight in state.items())
    assert content["config"] == {"seeds": [1] * 1000}
