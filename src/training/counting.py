"""What a forward pass takes, counted on tensors without data: nothing is allocated, nothing computed, no GPU needed."""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import data_utils

Module = TypeVar("Module", bound=nn.Module)
# A torch that is built without CUDA cannot even pretend; the CPU's rules of autocast then stand for CUDA's.
GPU = torch.device("cuda", 0) if torch.backends.cuda.is_built() else torch.device("cpu")


@dataclass(frozen=True)
class Counted:
    """What a forward pass took.

    Attributes:
        kept: bytes that are alive when it has ended: what the backward pass wants, and the outputs.
        peak: bytes that were alive at the same time, at the most; weights and inputs are in neither.
        operations: floating-point operations of its products, two for each multiplication with its addition.
        workspace: bytes that the backward pass of one attention takes for itself, at the most.
        blocks: of each watched module in turn, bytes that were alive before it, and those that it left behind.
    """

    kept: int
    peak: int
    operations: int
    workspace: int
    blocks: tuple[tuple[int, int], ...]


class NoData:
    """A device whose tensors have shapes and types but no data, and which need not exist."""

    def __init__(self, device: torch.device = GPU) -> None:
        self.device = device
        self.mode = FakeTensorMode()

    def holding(self, module: Module) -> Module:
        """The module, moved here: its weights lose their data, be they on the CPU or on torch's device "meta"."""
        with self.mode:
            for part in module.modules():
                tables: Any = (part._parameters, part._buffers, vars(part))
                for table in tables:
                    for name, value in table.items():
                        if isinstance(value, Tensor):
                            table[name] = self._like(value)
        return module

    def _like(self, tensor: Tensor) -> Tensor:
        empty = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device
        )
        is_weight = isinstance(tensor, nn.Parameter)
        return nn.Parameter(empty, tensor.requires_grad) if is_weight else empty

    def empty(self, shape: "tuple[int, ...]", dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor of a shape and type."""
        with self.mode:
            return torch.empty(shape, dtype=dtype, device=self.device)

    def count(
        self,
        forward: Callable[[], object],
        *,
        dtype: torch.dtype | None = None,
        watched: "tuple[type[nn.Module], ...]" = (),
        value_read: int = 0,
    ) -> Counted:
        """Run a forward pass and count.

        Args:
            dtype: of autocast; None without.
            watched: kinds of modules that are looked at one by one; none lies in another.
            value_read: what a number is taken for that is read from a tensor.
        """
        live = _Live(value_read)
        with (
            self.mode,
            _fused_attention(live),
            _own_constants(),
            live.watching(watched),
        ):
            with _autocast(self.device.type, dtype), live:
                outputs = forward()
            kept = live.now
        del outputs
        return Counted(kept, live.peak, live.operations, live.workspace, tuple(live.blocks))


class _Live(TorchDispatchMode):
    """Sees every operation, and for how long the tensors live that it makes."""

    def __init__(self, value: int) -> None:
        super().__init__()
        self.value = value
        self.sizes: dict[int, int] = {}  # address of a storage's record -> bytes
        self.now = 0
        self.peak = 0
        self.operations = 0
        self.workspace = 0
        self.blocks: list[tuple[int, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return self.value
        func, args = unfused(func, args)
        self._see((args, kwargs), new=False)
        out = func(*args, **kwargs)
        self._see(out, new=True)
        self.peak = max(self.peak, self.now)
        if func._overloadpacket in flop_registry:
            self.operations += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        return out

    def _see(self, values: Any, *, new: bool) -> None:
        """Count the storages in some values that were not seen before; those that were there before this began as 0."""
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    size = storage.nbytes() if new else 0
                    self.sizes[storage._cdata] = size
                    self.now += size
                    gone = weakref.finalize(storage, self._gone, storage._cdata)
                    gone.atexit = False

    def _gone(self, address: int) -> None:
        self.now -= self.sizes.pop(address)

    @contextlib.contextmanager
    def watching(self, kinds: "tuple[type[nn.Module], ...]") -> Iterator[None]:
        """Look at what modules of some kinds leave behind."""
        before: list[int] = []

        def enter(module: nn.Module, inputs: object) -> None:
            if isinstance(module, kinds):
                before.append(self.now)

        def leave(module: nn.Module, inputs: object, outputs: object) -> None:
            if isinstance(module, kinds):
                start = before.pop()
                self.blocks.append((start, self.now - start))

        hooks = [
            nn.modules.module.register_module_forward_pre_hook(enter),
            nn.modules.module.register_module_forward_hook(leave),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


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


@contextlib.contextmanager
def _autocast(device_type: str, dtype: torch.dtype | None) -> Iterator[None]:
    """`torch.autocast`, which turns itself off where there is no such device."""
    was = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    torch.set_autocast_enabled(device_type, dtype is not None)
    torch.set_autocast_dtype(device_type, dtype or was[1])
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device_type, was[0])
        torch.set_autocast_dtype(device_type, was[1])


@contextlib.contextmanager
def _own_constants() -> Iterator[None]:
    """Let CLIP's constants, which are remembered for each device, be tensors without data here and nowhere else."""
    data_utils._on.cache_clear()
    try:
        yield
    finally:
        data_utils._on.cache_clear()


@contextlib.contextmanager
def _fused_attention(live: _Live) -> Iterator[None]:
    """Let attention be the memory-efficient kernel, which every GPU has; flash attention keeps as much.

    Where there is no GPU, torch would take the formula, which keeps a matrix of weights for each head. In half
    precision the kernel's backward pass adds up the gradients of heads longer than 128 in float32, in a workspace of
    256 rows of a head for each head of each sequence (torch's mem_eff_attention/kernel_backward.h).
    """
    chosen_by_torch = F.scaled_dot_product_attention

    def fused(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if attn_mask is not None:
            attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
        sequences, heads, _, length = query.shape
        if length > 128 and query.dtype != torch.float32 and torch.is_grad_enabled():
            live.workspace = max(live.workspace, 256 * length * 4 * sequences * heads)
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
        )[0]

    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = chosen_by_torch


def autocast_dtype(precision: str | None) -> torch.dtype | None:
    """What products are counted in, None for float32. Both halves take the same bytes."""
    return torch.float16 if precision in ("fp16", "bf16") else None


def weights_bytes(module: nn.Module) -> tuple[int, int]:
    """Bytes of a module's weights and buffers, and of the weights that learn."""
    learned = [weight for weight in module.parameters() if weight.requires_grad]
    return bytes_of([*module.parameters(), *module.buffers()]), bytes_of(learned)


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """What tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
