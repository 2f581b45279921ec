"""TorchScript archives, the form in which OpenAI publishes its weights: tensors are read, and no code is run."""

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
# How the code of an archive lists a module's weights, whose other tensors are constants.
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
    """Reads the modules of an archive. Of all that a pickle can name, it knows tensors, lists and empty modules."""

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
        if module == "torch.jit._pickle":  # types of lists and dicts, which are there as they are
            return lambda values, *_: values
        raise pickle.UnpicklingError(f"{module}.{name} is not part of weights")

    def persistent_load(self, pid: Any) -> Tensor:
        """The numbers of a storage, one after the other."""
        _, dtype, key, _, _ = pid
        if key not in self._storages:
            content = bytearray(self._archive.read(f"{self._root}/data/{key}"))
            numbers = (
                torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
            )
            self._storages[key] = numbers
        return self._storages[key]


def _tensor(numbers: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    """A tensor of a storage's numbers, each of which it has once at most."""
    tensor = numbers.as_strided(size, stride, offset)
    if tensor.numel() > numbers.numel():
        raise ValueError("a tensor is larger than what is stored of it")
    return tensor


def is_archive(path: Path) -> bool:
    """Tell whether a file is a TorchScript archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    # `zipfile.is_zipfile` does not tell of every damaged one.
    except (zipfile.BadZipFile, ValueError):
        return False


def archived_state(path: Path) -> dict[str, Tensor]:
    """The parameters and buffers of an archive by name, as the `state_dict` of its module has them.

    Raises:
        UserError: it is damaged, or holds more than modules of tensors and plain values.
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
    """Tell which tensors of a module are weights: those that its code lists; all where it has no such lists."""
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
    """The weights of a module and of those in it, each with its whole name."""
    for name, value in module.attributes.items():
        if isinstance(value, Tensor) and is_weight(module, name):
            yield f"{prefix}{name}", value
        elif isinstance(value, _Module):
            yield from _named_weights(value, f"{prefix}{name}.", is_weight)
