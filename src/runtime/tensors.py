"""Tensors on disk: checkpoints written whole, checked, and read without running code; safetensors too."""

import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.files import parse_json, write_bytes, written_whole
from utils import UserError, first_line

# What reading a damaged checkpoint raises.
LOADING_ERRORS = (
    OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError, OverflowError, MemoryError, NotImplementedError,
    struct.error, zlib.error, zipfile.BadZipFile,
)  # fmt: skip


SAFETENSORS = ".safetensors"


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    """`torch.save`, whole or not at all. Raises UserError where the disk refuses it."""
    with written_whole(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # what torch makes of a full disk, and of Ctrl-C
            if isinstance(error.__context__, KeyboardInterrupt):
                raise error.__context__ from None
            raise OSError(0, f"the disk refused it: {first_line(error)}") from None


def save_safetensors(path: Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write tensors by name, and beside them their settings, as `load_tensors` reads them; whole or not at all."""
    from safetensors.torch import save

    metadata = {"format": "pt"}
    if config:
        metadata["config"] = json.dumps(config)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_bytes(path, save(tensors, metadata))


def _check_sums(path: Path) -> None:
    """Raise BadZipFile where a checkpoint's parts are not what was written, which `torch.load` does not look at."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


def load_tensors(path: Path) -> dict[str, Any]:
    """`torch.load` on the CPU of a dict of tensors and plain types; code in a pickle is refused, never run.

    Of a safetensors file its tensors by name, and beside them "config" where its metadata have that as JSON.

    Raises:
        UserError: the file is missing, truncated, not a checkpoint, or holds more than tensors and plain types.
    """
    if path.suffix == SAFETENSORS:
        return _load_safetensors(path)
    try:
        _check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except LOADING_ERRORS as error:
        raise UserError(
            f"{path} is not a readable checkpoint ({first_line(error)}): copy or train it again"
        ) from None
    except (pickle.UnpicklingError, AttributeError, TypeError):
        raise UserError(
            f"{path} is damaged or holds objects other than tensors and plain types, which could run code: refused; "
            "save it again as a dict of tensors"
        ) from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds a {type(content).__name__}, not a dict: it is not a checkpoint of this project"
        )
    return content


def _load_safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError(f"{path} needs a package to be read: pip install safetensors") from None
    try:
        with safe_open(path, framework="pt") as file:
            content: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            config = (file.metadata() or {}).get("config")
        return content if config is None else {**content, "config": parse_json(config)}
    except (SafetensorError, *LOADING_ERRORS) as error:
        raise UserError(
            f"{path} is not a readable checkpoint ({first_line(error)}): copy or train it again"
        ) from None
