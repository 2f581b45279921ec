"""Read tensors from TorchScript archives, the form in which OpenAI publishes its weights, without running code."""

import collections
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.tensors import LOADING_ERRORS, check_archive
from utils import UserError, first_line

OWN_TYPES = "__torch__"  # the module of all classes that an archive defines
# Pattern of an archive's code that lists the weights of a module; the module's other tensors are constants.
LISTED = r"class {}\(Module\):\n  __parameters__ = \[(.*?)\]\n  __buffers__ = \[(.*?)\]"
DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Module:
    """A module of an archive, as it was saved: its attributes, and the archive's name of its class."""

    called = ""
    attributes: dict[str, Any] = {}

    def __setstate__(self, attributes: Any) -> None:
        self.attributes = attributes if isinstance(attributes, dict) else {}


class _Reader(pickle.Unpickler):
    """Unpickler of the modules of an archive, which allows only tensors, lists and modules without code."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(archive.open(f"{root}/data.pkl"))
        self._archive = archive
        self._root = root
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == OWN_TYPES:
            return type(name, (_Module,), {"called": f"{module}.{name}"})
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if module == "torch.jit._pickle":  # it only adds types to lists and dicts
            return lambda values, *_: values
        raise pickle.UnpicklingError(f"{module}.{name} is not part of weights")

    def persistent_load(self, pid: Any) -> Tensor:
        """Return the numbers of a storage as a tensor of one dimension."""
        _, dtype, key, _, _ = pid
        if key not in self._storages:
            content = bytearray(self._archive.read(f"{self._root}/data/{key}"))
            numbers = (
                torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
            )
            self._storages[key] = numbers
        return self._storages[key]


def _tensor(numbers: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    """Return a tensor of a storage's numbers. Raises ValueError if it has more numbers than the storage."""
    tensor = numbers.as_strided(size, stride, offset)
    if tensor.numel() > numbers.numel():
        raise ValueError("a tensor is larger than its stored data")
    return tensor


def is_archive(path: Path) -> bool:
    """Check whether a file is a TorchScript archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    # `zipfile.is_zipfile` would not detect every damaged archive.
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return False


def archived_state(path: Path) -> dict[str, Tensor]:
    """Read the parameters and buffers of an archive by name, as in the `state_dict` of its module.

    Raises:
        UserError: the archive is damaged, or contains more than modules of tensors and plain
            values.
    """
    try:
        check_archive(path)
        with zipfile.ZipFile(path) as archive:
            (main,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            root = main.removesuffix("/data.pkl")
            module = _Reader(archive, root).load()
            return dict(_named_weights(module, "", _weights_of(archive, root)))
    except (*LOADING_ERRORS, pickle.UnpicklingError, AttributeError, TypeError) as error:
        raise UserError(
            f"{path} is not a readable TorchScript archive ({first_line(error)}): download it again"
        ) from None


def _weights_of(archive: zipfile.ZipFile, root: str) -> Callable[[_Module, str], bool]:
    """Return a function that checks whether a module's tensor is a weight: its code lists it, or has no such list."""
    members = set(archive.namelist())

    def is_weight(module: _Module, name: str) -> bool:
        place, _, kind = module.called.rpartition(".")
        file = f"{root}/code/{place.replace('.', '/')}.py"
        if file not in members:
            return True
        code = archive.read(file).decode(errors="replace")
        lists = re.search(LISTED.format(re.escape(kind)), code)
        return lists is None or f'"{name}"' in lists[1] + lists[2]

    return is_weight


def _named_weights(
    module: _Module, prefix: str, is_weight: Callable[[_Module, str], bool]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a module and its submodules, each with its full name."""
    for name, value in module.attributes.items():
        if isinstance(value, Tensor) and is_weight(module, name):
            yield f"{prefix}{name}", value
        elif isinstance(value, _Module):
            yield from _named_weights(value, f"{prefix}{name}.", is_weight)
