"""A GPU that computes nothing: fake CUDA tensors, where a program waits for them, and in which types they are computed.

A fake tensor has a shape, a type and a device, and no values. torch treats it as a real one, autocast included, and
refuses an operation on tensors of two devices. So models of true size are rehearsed without memory, wherever torch is a
CUDA build. One thing asks for CUDA's driver, the backward pass. In its place every weight that a loss depends on gets a
gradient; what gradients are is tested on the CPU.
"""

import contextlib
import functools
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data_utils
from forks import ROOT
from models import encoder
from runtime import prefetch

GPU = torch.device("cuda:0")
# Whose functions are named: of those that an operation comes from, the innermost.
NAMED = (f"{ROOT / 'src'}/", "/clip/model.py", "/torch/amp/", "/torch/optim/")


@functools.cache
def named(file: str) -> str | None:
    """What a file is called, if its functions are named."""
    return Path(file).name if any(part in file for part in NAMED) else None


def place() -> str:
    """File and function that an operation comes from."""
    frame = sys._getframe(1)
    while frame is not None:
        name = named(frame.f_code.co_filename)
        function = frame.f_code.co_name
        if name and not function.startswith("<"):  # a comprehension is a part of its function
            return f"{name} {function}"
        frame = frame.f_back
    return "elsewhere"


def unfused(func: Any, args: Any) -> tuple[Any, Any]:
    """The plain convolution in place of one that cuDNN fuses with what follows, whose shapes torch cannot tell."""
    aten = torch.ops.aten
    if func is aten.cudnn_convolution_relu.default:
        images, weight, bias, *shape = args
    elif func is aten.cudnn_convolution_add_relu.default:
        images, weight, _, _, bias, *shape = args
    else:
        return func, args
    *shape, groups = shape
    return aten.convolution.default, (images, weight, bias, *shape, False, [0, 0], groups)


class Seen(TorchDispatchMode):
    """What a piece of code asks of the GPU.

    Attributes:
        waits: "file function: what for" -> how often. A copy to the GPU waits unless it is asked not to, which the
            loader does, whose memory is pinned.
        types: operation -> "file function" -> the floating types of its arguments.

    Args:
        answers: "file function" -> what is read there; zeros elsewhere.
    """

    def __init__(self, answers: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.answers = answers or {}
        self.waits: Counter[str] = Counter()
        self.types: dict[str, dict[str, set]] = defaultdict(lambda: defaultdict(set))
        # A list is read at one time, not number by number as from a fake tensor.
        self.reading = mock.patch.object(FakeTensor, "tolist", lambda tensor: self.read(tensor))

    def __enter__(self) -> "Seen":
        self.reading.start()
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self.reading.stop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        func, args = unfused(func, args)
        if func.namespace == "prim":  # which device a tensor is on
            return func(*args, **kwargs)
        name = func.__name__.split(".")[0]
        if name == "_local_scalar_dense":
            return self.read(args[0])
        if name == "nonzero":
            self.wait(args[0], "nonzero")
            return args[0].new_empty(1, args[0].dim(), dtype=torch.long)
        indices = [i for i in args[1] if i is not None] if name in ("index", "index_put_") else []
        if any(i.dtype == torch.bool for i in indices):
            self.wait(args[0], "mask")
            return args[0].new_empty(1, *args[0].shape[indices[0].dim() :])
        if any(i.is_cpu for i in indices):
            self.wait(args[0], "index from the CPU")
        out = func(*args, **kwargs)
        if name == "copy_":
            self.look_at_copy(args[1], out, is_async=args[2:] == (True,))
        if name == "_to_copy":
            self.look_at_copy(args[0], out, is_async=kwargs.get("non_blocking", False))
        floating = {
            leaf.dtype
            for leaf in tree_leaves(args)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        }
        self.types[name][place()] |= floating
        return out

    def wait(self, tensor: Tensor, what: str) -> None:
        """Count a wait for the GPU, if that is where the tensor is."""
        if tensor.is_cuda:
            self.waits[f"{place()}: {what}"] += 1

    def look_at_copy(self, source: Tensor, target: Tensor, is_async: bool) -> None:
        """Count a copy between the devices that waits."""
        if source.device != target.device and not is_async:
            self.waits[f"{place()}: to the {'GPU' if target.is_cuda else 'CPU'}"] += 1

    def read(self, tensor: Tensor) -> Any:
        """What a place reads from a tensor, as a number or as lists."""
        self.wait(tensor, "read")
        return self.answers.get(place(), zeros(tensor.shape, tensor.dtype))


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Any:
    """A number, or lists of them."""
    if shape:
        return [zeros(shape[1:], dtype)] * shape[0]
    return False if dtype == torch.bool else 0.0 if dtype.is_floating_point else 0


def replace_tensors(module: nn.Module, change: Any) -> nn.Module:
    """`Module._apply` with new parameters, where torch swaps a parameter's content and refuses to swap a fake one's."""
    for child in module.children():
        child._apply(change)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            changed = change(parameter.detach())
            module._parameters[name] = nn.Parameter(changed, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = change(buffer)
    return module


def copied(tensor: Tensor, memo: Mapping) -> Tensor:
    """`copy.deepcopy` of a fake tensor, which else copies the mode that makes it fake."""
    copy = tensor.detach().clone()
    return nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *_, **__):
    """Attention as the kernel that takes heads of every length. Without a GPU torch would take it apart."""
    if mask is not None:
        mask = mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, mask, compute_log_sumexp=True)[0]


def give_gradients(outputs: Sequence[Tensor]) -> None:
    """Give a gradient to every weight that some outputs depend on."""
    waiting = [output.grad_fn for output in outputs]
    seen = set()
    while waiting:
        function = waiting.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        if hasattr(function, "variable"):
            function.variable.grad = torch.empty_like(function.variable)
        waiting += [before for before, _ in function.next_functions]


def backward(outputs: Tensor | Sequence[Tensor], gradients: Any = None, *_, **__) -> None:
    """In place of `torch.autograd.backward`."""
    if isinstance(outputs, Tensor):
        assert outputs.dtype == torch.float32
        assert outputs.shape == ()
        return give_gradients([outputs])
    for output, gradient in zip(outputs, gradients, strict=True):
        assert output.shape == gradient.shape
        assert output.device == gradient.device
    return give_gradients(outputs)


def grad(
    output: Tensor, inputs: Sequence[Tensor], *, materialize_grads: bool = False
) -> tuple[Tensor, ...]:
    """In place of `torch.autograd.grad`."""
    assert output.requires_grad
    return tuple(torch.empty_like(tensor) for tensor in inputs)


def on_device(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """In place of that of `runtime.prefetch`, whose streams ask for the driver."""
    for batch in batches:
        yield prefetch._each_tensor(batch, lambda part: part.to(device, non_blocking=True))


@contextlib.contextmanager
def fake_gpu() -> Iterator[None]:
    """Let every new tensor be fake, and CUDA be there: an H100."""
    properties = SimpleNamespace(major=9, minor=0)
    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in (
            # Autocast and loss scaling turn themselves off where there is no GPU.
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda *_: True),
            (torch.cuda, "get_device_properties", lambda *_: properties),
            (nn.Module, "_apply", replace_tensors),
            (FakeTensor, "__deepcopy__", copied),
            (F, "scaled_dot_product_attention", attention),
            (torch.autograd, "backward", backward),
            (torch.autograd, "grad", grad),
            (data_utils, "on_device", on_device),
        ):
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        # What is remembered must be neither real in here nor fake outside.
        for remembered in (data_utils._on, encoder._tokens):
            remembered.cache_clear()
            stack.callback(remembered.cache_clear)
        stack.enter_context(FakeTensorMode())
        yield
