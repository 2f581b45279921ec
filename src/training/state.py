"""The state of a training in one file: written whole, compared with the training that takes it, and put back."""

import itertools
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from runtime.tensors import load_tensors, save_tensors
from runtime.weights import differences, first_flaw
from utils import UserError

REMEDY = "delete it to begin the run again"


class Stateful(Protocol):
    """What modules, optimizers, schedules and scalers have in common."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> object: ...


def save_state(
    file: Path, parts: Mapping[str, Stateful], progress: dict[str, Any], device: torch.device
) -> None:
    """Write the state of some parts, of all random numbers, and how far the training is, whole or not at all."""
    states = {name: part.state_dict() for name, part in parts.items()}
    save_tensors(file, {"parts": states, "random": _random_states(device), "progress": progress})


def load_state(file: Path, parts: Mapping[str, Stateful], device: torch.device) -> dict[str, Any]:
    """Put a state back into the parts and the random numbers; returns how far the training was.

    Raises:
        UserError: the file is damaged, or another training's.
    """
    from runtime.schema import checked
    from training.schemas import State

    try:
        content = load_tensors(file)
        checked(State, content, file="it", remedy="another training's, or damaged")
        stored = content["parts"]
        # A run that began on a CPU has no scaler.
        resumed = {name: part for name, part in parts.items() if name in stored or name != "scaler"}
        for name, part in resumed.items():
            _check_part(f"parts.{name}", part, stored.get(name))
        _set_random_states(content["random"], device)
        for name, part in resumed.items():
            part.load_state_dict(stored[name])
        return content["progress"]
    except (
        UserError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
        OverflowError,
    ) as error:
        raise UserError(f"--resume: {file} cannot be continued from ({error}): {REMEDY}") from None


def _random_states(device: torch.device) -> dict[str, Any]:
    """Processes draw the same numbers, each for all of the batch, so one's states are those of all."""
    states = {"python": random.getstate(), "cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Put them back. Raises ValueError where one is none."""
    place = "random.python"
    try:
        random.setstate(states["python"])
        place = "random.cpu"
        torch.set_rng_state(states["cpu"])
        if device.type == "cuda" and "cuda" in states:
            place = "random.cuda"
            torch.cuda.set_rng_state(states["cuda"], device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{place}: {error}") from None


def _check_part(place: str, part: Stateful, stored: Any) -> None:
    """Raise ValueError where a stored state could not be that of a part; its place in the file is named."""
    if not isinstance(stored, dict):
        raise ValueError(f"{place} is missing")
    if isinstance(part, nn.Module):
        own = part.state_dict()
        misfitting = differences(stored, own) or first_flaw(stored, own)
        if misfitting:
            raise ValueError(f"{place}: {misfitting}")
        return
    own = part.state_dict()
    if isinstance(part, Optimizer):
        _check_moments(f"{place}.state", part, stored.get("state"))
        del own["state"]
    _check_like(place, own, stored)


def _check_like(place: str, own: Any, stored: Any) -> None:
    """Raise ValueError where a value is of another kind than a part's own one, or a number that none of them can be.

    A switch may be missing: earlier versions of torch have fewer.
    """
    inner: list[Any] = []
    if isinstance(own, dict):
        alike = isinstance(stored, dict)
        inner = [key for key, value in own.items() if not _is_switch(value)]
        inner += [key for key in own if alike and key in stored and key not in inner]
    elif isinstance(own, list | tuple):
        alike = isinstance(stored, type(own)) and len(stored) == len(own)
        inner = list(range(len(own)))
    elif _is_switch(own):
        alike = _is_switch(stored)
    else:
        kind = int if isinstance(own, int) and own else int | float
        is_number = isinstance(stored, kind) and not isinstance(stored, bool)
        alike = is_number and 0 <= stored < math.inf
    if not alike:
        raise ValueError(f"{place} cannot be {str(stored)[:60]}")
    for key in inner:
        if isinstance(own, dict) and key not in stored:
            raise ValueError(f"{place}.{key} is missing")
        _check_like(f"{place}.{key}", own[key], stored[key])


def _is_switch(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _check_moments(place: str, optimizer: Optimizer, stored: Any) -> None:
    """The same for what Adam remembers of its parameters; of one that never had a gradient that is nothing."""
    groups = [group["params"] for group in optimizer.param_groups]
    parameters = dict(enumerate(itertools.chain.from_iterable(groups)))
    if not isinstance(stored, dict):
        raise ValueError(f"{place} is missing")
    for number, moments in stored.items():
        if number not in parameters or not isinstance(moments, dict):
            raise ValueError(f"{place}.{number} is of no parameter")
        parameter = parameters[number]
        own = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
        known = {name: moments[name] for name in own if name in moments}
        misfitting = differences(known, own) or first_flaw(known, own)
        if misfitting:
            raise ValueError(f"{place}.{number}: {misfitting}")
        for name in ("step", "exp_avg_sq"):
            if (known[name] < 0).any():
                raise ValueError(f"{place}.{number}: {name} is below 0")
