"""Read the environment variables that torchrun sets for each process that it starts."""

import os


def launched() -> bool:
    """Check whether torchrun started this process as one of several."""
    return {"RANK", "MASTER_ADDR"} <= set(os.environ) and world_size() > 1


def world_size() -> int:
    """Return the number of processes on all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Check whether this process is the first of several, or the only one."""
    return not launched() or os.environ["RANK"] == "0"


def local_rank() -> int:
    """Return this process's rank on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def command() -> str:
    """Return the words before the script's name in a command that starts the current number of processes."""
    if not launched():
        return "python"
    here = local_world_size()
    nodes = f"--nnodes {world_size() // here} ... " if world_size() > here else ""
    return f"torchrun {nodes}--nproc-per-node {here}"
