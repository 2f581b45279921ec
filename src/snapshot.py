"""All of a training's state in one file: taken between two steps, put back bit for bit."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from runtime.tensors import load_tensors, save_tensors
from utils import UserError


class Stateful(Protocol):
    """What modules, optimizers, schedules and scalers have in common."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> object: ...


def save_state(file: Path, parts: Mapping[str, Stateful], progress: dict[str, Any], device: torch.device) -> None:
    """Write the state of some parts, of all random numbers, and how far the training is, whole or not at all."""
    states = {name: part.state_dict() for name, part in parts.items()}
    save_tensors(file, {"parts": states, "random": _random_states(device), "progress": progress})


def load_state(file: Path, parts: Mapping[str, Stateful], device: torch.device) -> dict[str, Any]:
    """Put a state back into the parts and the random numbers; returns how far the training was.

    Raises:
        UserError: the file is damaged, or another training's.
    """
    try:
        content = load_tensors(file)
        for name, part in parts.items():
            if name != "scaler" or name in content["parts"]:  # a run that began on a CPU has none
                part.load_state_dict(content["parts"][name])
        _set_random_states(content["random"], device)
        return content["progress"]
    except (UserError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"--resume: {file} cannot be continued from ({error}): delete it to begin the run again"
        ) from None


def _random_states(device: torch.device) -> dict[str, Any]:
    """Processes draw the same numbers, each for all of the batch, so one's states are those of all."""
    states = {"python": random.getstate(), "cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_random_states(states: dict[str, Any], device: torch.device) -> None:
    random.setstate(states["python"])
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
