"""Read what torchrun tells each process that it starts, by the environment."""

import os


def launched() -> bool:
    """Return whether torchrun started this process as one of several."""
    return {"RANK", "MASTER_ADDR"} <= set(os.environ) and world_size() > 1


def world_size() -> int:
    """Return how many processes it started on all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Return whether this process is the first of those that it started, or the only one."""
    return not launched() or os.environ["RANK"] == "0"


def local_rank() -> int:
    """Return this process's number among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """Return how many processes it started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def command() -> str:
    """Return what stands before a script in a command that starts as many processes as there are."""
    if not launched():
        return "python"
    here = local_world_size()
    nodes = f"--nnodes {world_size() // here} ... " if world_size() > here else ""
    return f"torchrun {nodes}--nproc-per-node {here}"
