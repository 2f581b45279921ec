"""What torchrun tells each process that it starts, by the environment."""

import os

from utils import UserError


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return {"RANK", "MASTER_ADDR"} <= set(os.environ) and world_size() > 1


def check_environment() -> None:
    """Raise UserError where a variable that torchrun sets is there and is no number."""
    if launched():
        for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
            _number(name, 0)


def world_size() -> int:
    """How many processes it started on all machines."""
    return _number("WORLD_SIZE", 1)


def is_first() -> bool:
    """Whether this process is the first of those that it started, or the only one."""
    return not launched() or _number("RANK", 0) == 0


def local_rank() -> int:
    """This process's number among those of its machine."""
    return _number("LOCAL_RANK", 0)


def local_world_size() -> int:
    """How many processes it started on this machine."""
    return _number("LOCAL_WORLD_SIZE", world_size())


def command() -> str:
    """What stands before a script in a command that starts as many processes as there are."""
    if not launched():
        return "python"
    here = local_world_size()
    nodes = f"--nnodes {world_size() // here} ... " if world_size() > here else ""
    return f"torchrun {nodes}--nproc-per-node {here}"


def _number(name: str, otherwise: int) -> int:
    """What a variable of the environment says. Raises UserError where that is no whole number."""
    text = os.environ.get(name, str(otherwise))
    if not text.isdecimal():
        raise UserError(
            f"the environment has {name}={text}, which is no number: unset it, or start with torchrun"
        )
    return int(text)
