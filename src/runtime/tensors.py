"""Checkpoints and safetensors files: written atomically, checked, and read without running code."""

import io
import json
import pickle
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.files import parse_json, write_bytes, written_whole
from utils import UserError, first_line

# Exceptions that are raised when a damaged checkpoint is read.
LOADING_ERRORS = (
    OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError, OverflowError, MemoryError, NotImplementedError,
    struct.error, zlib.error, zipfile.BadZipFile,
)  # fmt: skip


SAFETENSORS = ".safetensors"
# Files may be compressed, so a file's content may need this many times its size in memory, or LEAST_BOUND bytes.
MOST_TIMES = 4
LEAST_BOUND = 2**26
MOST_PARTS = 10**7  # maximum number of nested parts of a dict; a training state has thousands
# Calls in a pickle that make bytes. `torch.load` allows them, although a short pickle can make any number of bytes.
MAKES_BYTES = re.compile(rb"c(__builtin__|builtins)\nbytearray\n|c_codecs\nencode\n")
UNKNOWN_OBJECT = re.compile(r"Unsupported global: GLOBAL (\S+)")
ZIP = b"PK\3\4"  # beginning by which torch recognises its own format
WEB_PAGE = (
    "a web page",
    "its download asked to log in or to confirm: do that in a browser, and download it again",
)
# Beginning of a file that does not contain weights -> kind of the file, and how to get the weights.
OTHER_FILES = {
    b"version https://git-lfs": (
        "a Git LFS pointer",
        "run `git lfs pull` where it was cloned, or download the file itself",
    ),
    b"<!doctype html": WEB_PAGE,
    b"<html": WEB_PAGE,
    b"\x1f\x8b": ("a gzip archive", "unpack it, and pass the file inside"),
}


def mapped_array(path: Path) -> np.ndarray:
    """Map the array of a .npy file into memory, to be read.

    Raises:
        ValueError: the file is not an array, is damaged, or is too short. NumPy itself raises a
            dozen kinds of errors.
    """
    try:
        with np.errstate(over="ignore"):  # for a shape larger than any file
            return np.lib.format.open_memmap(path, mode="r")
    except (*LOADING_ERRORS, SyntaxError, TypeError, tokenize.TokenError) as error:
        raise ValueError(first_line(error)) from None


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    """Save content by `torch.save`, atomically. Raises UserError if the disk rejects it."""
    with written_whole(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch raises it for a full disk, and for Ctrl-C
            if isinstance(error.__context__, KeyboardInterrupt):
                raise error.__context__ from None
            raise OSError(0, f"the file system reported an error: {first_line(error)}") from None


def save_safetensors(path: Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Atomically write named tensors and their settings, in the format that `load_tensors` reads."""
    from safetensors.torch import save

    metadata = {"format": "pt"}
    if config:
        metadata["config"] = json.dumps(config)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_bytes(path, save(tensors, metadata))


def check_archive(path: Path) -> None:
    """Check a file before torch reads it: its parts are undamaged, and will not need too much memory.

    Raises:
        BadZipFile: a checksum is wrong, or the parts unpack to many times the file's size.
        UnpicklingError: a pickle in the file makes bytes by itself.
    """
    with open(path, "rb") as file:
        if file.read(len(ZIP)) != ZIP:  # format of early torch versions: pickles, then bytes
            file.seek(0)
            _check_pickle(file.read())
            return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(part.file_size for part in archive.infolist())
        if unpacked > _bound(path):
            raise zipfile.BadZipFile(f"its parts unpack to {unpacked:,} bytes")
        damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        for name in archive.namelist():
            if name.endswith("data.pkl"):
                _check_pickle(archive.read(name))


def _bound(path: Path) -> int:
    """Return the maximum number of bytes of memory for the content of a file."""
    return max(MOST_TIMES * path.stat().st_size, LEAST_BOUND)


def _check_pickle(content: bytes) -> None:
    if MAKES_BYTES.search(content):
        raise pickle.UnpicklingError("it makes bytes")


def _check_size(path: Path, content: Any) -> None:
    """Raise ValueError if content is far larger than its file, because tensors share memory or parts are repeated.

    A copy of such content, or a loop over it, would need more memory or time than the file's size
    suggests.
    """
    bound = _bound(path)
    left = min(path.stat().st_size, MOST_PARTS)
    size = 0
    parts = [content]
    while parts:
        part = parts.pop()
        left -= 1
        if isinstance(part, Tensor) and part.layout == torch.strided and not part.is_meta:
            size += part.numel() * part.itemsize
        elif isinstance(part, dict):
            parts += part.values()
        elif isinstance(part, list | tuple | set):
            parts += part
        if left < 0 or size > bound:
            raise ValueError("its parts repeat to many times the size of the file")


def load_tensors(path: Path) -> dict[str, Any]:
    """Load a dict of tensors and plain types on the CPU; code in a pickle is rejected, never run.

    Safetensors files are recognised by their content, whatever the file's name. The dict also has
    "config" if their metadata contain it as JSON.

    Raises:
        UserError: the file is missing, truncated, not a checkpoint, or contains more than tensors
            and plain types.
    """
    try:
        if _is_safetensors(path):
            return _load_safetensors(path)
        check_archive(path)
        # torch decides by this extension, so a checkpoint with it is passed without its name.
        held = io.BytesIO(path.read_bytes()) if path.suffix == SAFETENSORS else path
        content = torch.load(held, map_location="cpu", weights_only=True)
        _check_size(path, content)
    except LOADING_ERRORS as error:
        raise UserError(
            f"{path} is not a readable checkpoint ({first_line(error)}): copy the file again, or retrain the model"
        ) from None
    except (pickle.UnpicklingError, AttributeError, TypeError) as error:
        named = UNKNOWN_OBJECT.search(str(error))
        found = f"holds {named[1]}" if named else "is damaged or holds objects"
        raise UserError(
            f"{path} {found}, not a tensor or plain type, and could run code: on the "
            "machine where it was trained, save only the model's state dict"
        ) from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path} contains a {type(content).__name__}, not a dict: choose a checkpoint of this project"
        )
    return content


def _is_safetensors(path: Path) -> bool:
    """Check whether a file has the format of safetensors, whatever its name.

    Raises:
        OSError: the file cannot be read.
        UserError: the file is known to contain something other than weights.
    """
    with open(path, "rb") as file:
        start = file.read(64)
    for beginning, (what, remedy) in OTHER_FILES.items():
        if start.lstrip(b"\xef\xbb\xbf \r\n").lower().startswith(beginning):
            raise UserError(f"{path} is {what}, not weights: {remedy}")
    header = int.from_bytes(start[:8], "little")
    is_header = start[8:9] == b"{" and header < path.stat().st_size
    return is_header or (path.suffix == SAFETENSORS and not start.startswith(ZIP))


def _load_safetensors(path: Path) -> dict[str, Any]:
    """Read the tensors of a safetensors file, and "config". Raises LOADING_ERRORS, or UserError without the package."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError(f"{path} needs a package to be read: pip install safetensors") from None
    try:
        with safe_open(path, framework="pt") as file:
            content: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            config = (file.metadata() or {}).get("config")
    except SafetensorError as error:
        raise ValueError(first_line(error)) from None
    return content if config is None else {**content, "config": parse_json(config)}
