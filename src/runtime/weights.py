"""Weights that may come from elsewhere: names without wrappers, shapes that fit a model, values that are numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from utils import UserError

# What DistributedDataParallel and torch.compile put into the names of what they wrap, at any depth.
WRAPPERS = frozenset({"module", "_orig_mod"})
# What is copied into a float32 weight as it is; narrower kinds are quantized and have scales elsewhere.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# A layer counts its batches, and weights of earlier versions of torch do not: nothing here asks for it.
COUNTER = "num_batches_tracked"

INITIALISERS = {"normal_", "uniform_", "kaiming_uniform_", "xavier_uniform_"}


class Unfilled(TorchFunctionMode):
    """A context in which modules are built whose weights are about to be replaced: nothing is drawn for them.

    Memory that is not written costs nothing. Tensors without data ("meta") would do as well, but to compute with them
    torch imports its compiler, which takes longer than all else that a question takes.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Tensor:
        kwargs = kwargs or {}
        if func is torch.randn:
            return torch.empty(*args, **kwargs)
        if func.__name__ in INITIALISERS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def unwrapped(state: Mapping[Any, Any], source: str) -> dict[str, Any]:
    """A state dict by the names that its model gave, without those of wrappers.

    Args:
        source: how a message begins: the flag and its file.

    Raises:
        UserError: a name is no text, or two are the same without wrappers.
    """
    plain: dict[str, Any] = {}
    for name, weight in state.items():
        if not isinstance(name, str):
            raise UserError(
                f"{source}: {name!r} is not a valid name of a weight: save its state dict again"
            )
        own = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if own in plain:
            raise UserError(
                f"{source} contains {own} twice, once as {name}: save the weights of one model"
            )
        plain[own] = weight
    return plain


def shape_of(
    state: Mapping[str, Any], name: str, dimensions: int, *, source: str, remedy: str
) -> tuple[int, ...]:
    """The shape of a weight that tells the sizes of its model.

    Raises:
        UserError: there is none of so many dimensions.
    """
    shape = _shape(state.get(name)) or ()
    if len(shape) != dimensions or 0 in shape:
        raise UserError(f"{source} has no {name} of {dimensions} dimensions: {remedy}")
    return shape


def fitted(
    state: Mapping[str, Any],
    model: Mapping[str, Tensor],
    *,
    source: str,
    remedy: str,
    vital: Sequence[str] = (),
) -> dict[str, Tensor]:
    """The weights of a state dict, if a model can take every one of them.

    Args:
        model: the model's own state dict, of which names, shapes and types count; it may have no data.
        source: how a message begins: the flag and its file.
        remedy: how it ends where names or shapes differ.
        vital: beginnings of the names of matrices that all features pass, so that zeros there make all alike.

    Raises:
        UserError: the first weight that is missing, extra, misshapen, not of real numbers or not finite is named.
    """
    found = differences(state, model)
    if found:
        raise UserError(f"{source} does not fit the model: {found}: {remedy}")
    for name, weight in state.items():
        flaw = _flaw(weight, model[name], vital=name.startswith(tuple(vital)))
        if flaw:
            raise UserError(f"{source}: {name} {flaw}: copy the file again, or train it again")
    return dict(state)


def differences(state: Mapping[str, Any], model: Mapping[str, Tensor]) -> str:
    """Describe how a state dict differs from a model's in names and shapes, with counts; "" if equal."""
    missing = [name for name in model if name not in state and not name.endswith(COUNTER)]
    extra = [name for name in state if name not in model]
    misshapen = []
    for name, weight in model.items():
        if name in state and _shape(state[name]) != tuple(weight.shape):
            misshapen.append(name)
    parts = []
    if missing:
        parts.append(f"{counted(missing)} missing")
    if extra:
        parts.append(f"{counted(extra)} extra")
    if misshapen:
        first = misshapen[0]
        shapes = f"{_shape(state[first]) or 'no tensor'}, not {tuple(model[first].shape)}"
        parts.append(f"{counted(misshapen)} of another shape ({shapes})")
    return "; ".join(parts)


def counted(names: Sequence[str], shown: int = 1) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _shape(weight: Any) -> tuple[int, ...] | None:
    return tuple(weight.shape) if isinstance(weight, Tensor) else None


def _flaw(weight: Tensor, own: Tensor, *, vital: bool) -> str:
    """Return the problem with the values of a weight that is copied into a model's own, "" for none."""
    if not own.is_floating_point() or weight.numel() == 0:
        return ""
    if weight.dtype not in FLOATS or weight.layout != torch.strided or weight.is_meta:
        kind = str(weight.dtype).removeprefix("torch.")
        return (
            f"holds no plain floating-point numbers, but {kind} ({weight.layout}, {weight.device})"
        )
    # The lowest and the highest, both NaN where a value is: a tenth of the time of `isfinite`.
    ends = torch.stack(weight.detach().aminmax()).to(own.dtype)
    if not ends.isfinite().all():
        return "is not finite"
    if vital and weight.dim() > 1 and not ends.any():
        return "is zero throughout, which makes all features alike"
    return ""
