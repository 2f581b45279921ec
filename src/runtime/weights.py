"""Check weights from any source: names without wrappers, shapes that fit a model, and finite values."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from utils import UserError

# Parts that DistributedDataParallel and torch.compile add to the names of weights, at any depth.
WRAPPERS = frozenset({"module", "_orig_mod"})
# Types that can be copied into a float32 weight; narrower types are quantized, and their scales are stored elsewhere.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# BatchNorm's counter, which may be missing: earlier versions of torch do not save it, and no code here reads it.
COUNTER = "num_batches_tracked"

INITIALISERS = {"normal_", "uniform_", "kaiming_uniform_", "xavier_uniform_"}


class Unfilled(TorchFunctionMode):
    """A context for building modules whose weights will be replaced, so that no random numbers are drawn for them.

    Memory that is not written costs nothing. Tensors on the meta device would do as well, but to
    compute with them, torch imports its compiler, which takes longer than all the rest of a search
    query.
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
    """Return a state dict under its model's names, without the parts that wrappers add.

    Args:
        source: beginning of a message: the flag and its file.

    Raises:
        UserError: a name is not a string, or two names are the same without wrappers.
    """
    plain: dict[str, Any] = {}
    for name, weight in state.items():
        if not isinstance(name, str):
            raise UserError(
                f"{source}: {name!r} is not a valid weight name: save the state dict again"
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
    """Return the shape of a weight that determines sizes of its model.

    Raises:
        UserError: the weight is missing, is empty or has another number of dimensions.
    """
    shape = _shape(state.get(name)) or ()
    if len(shape) != dimensions or 0 in shape:
        raise UserError(f"{source} has no {name} with {dimensions} dimensions: {remedy}")
    return shape


def fitted(
    state: Mapping[str, Any],
    model: Mapping[str, Tensor],
    *,
    source: str,
    remedy: str,
    vital: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Return the weights of a state dict after checking that all of them fit a model.

    Args:
        model: the model's own state dict; only its names, shapes and types are used, so it may have
            no data.
        source: beginning of a message: the flag and its file.
        remedy: end of the message if names or shapes differ.
        vital: name prefixes of matrices that all features pass; if such a matrix is zero, all
            features are equal.

    Raises:
        UserError: a weight is missing, extra, misshapen, not real, not finite, or vital and zero;
            the message names the first such weight.
    """
    found = differences(state, model)
    if found:
        raise UserError(f"{source} does not fit the model: {found}: {remedy}")
    for name, weight in state.items():
        flaw = _flaw(weight, model[name], vital=name.startswith(tuple(vital)))
        if flaw:
            raise UserError(f"{source}: {name} {flaw}: copy the file again, or retrain the model")
    return dict(state)


def differences(state: Mapping[str, Any], model: Mapping[str, Tensor]) -> str:
    """Describe how a state dict differs from a model's in names and shapes, with counts; "" if it does not differ."""
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
        parts.append(f"{counted(misshapen)} with another shape ({shapes})")
    return "; ".join(parts)


def counted(names: Sequence[str], shown: int = 1) -> str:
    """Return the first names as text, with the number of the remaining names."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _shape(weight: Any) -> tuple[int, ...] | None:
    return tuple(weight.shape) if isinstance(weight, Tensor) else None


def _flaw(weight: Tensor, own: Tensor, *, vital: bool) -> str:
    """Return the problem with the values of a weight that will replace a model's own; "" if there is none."""
    if not own.is_floating_point() or weight.numel() == 0:
        return ""
    if weight.dtype not in FLOATS or weight.layout != torch.strided or weight.is_meta:
        kind = str(weight.dtype).removeprefix("torch.")
        return (
            f"contains {kind} ({weight.layout}, {weight.device}), not plain floating-point numbers"
        )
    # Checking minimum and maximum, which are NaN if any value is, takes a tenth of the time of `isfinite`.
    ends = torch.stack(weight.detach().aminmax()).to(own.dtype)
    if not ends.isfinite().all():
        return "is not finite"
    if vital and weight.dim() > 1 and not ends.any():
        return "contains only zeros, which makes all features equal"
    return ""
