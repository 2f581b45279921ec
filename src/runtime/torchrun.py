"""What torchrun tells each process that it starts, by the environment."""

import os


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return {"RANK", "MASTER_ADDR"} <= set(os.environ) and world_size() > 1


def world_size() -> int:
    """How many processes it started on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def command() -> str:
    """What stands before a script in a command that starts as many processes as there are."""
    if not launched():
        return "python"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    nodes = f"--nnodes {world_size() // here} ... " if world_size() > here else ""
    return f"torchrun {nodes}--nproc-per-node {here}"
