"""What scripts do before their own work: flags of a resumed run, device, seed, tracker, benchmark."""

import argparse
import logging
import shlex
import sys

import torch

from benchmarks import BENCHMARKS, Benchmark
from benchmarks.exclusions import read_exclusions
from runtime import distributed
from utils import UserError, first_line


def pick_device(name: str | None) -> torch.device:
    """The device of `--device`, else this process's GPU, else the CPU; joins the other processes, if there are any."""
    try:
        own_gpu = name == "cuda" and torch.cuda.is_available()  # not everybody's first one
        device = torch.device(distributed.local_device() if own_gpu or name is None else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch built without CUDA
        wanted = name or distributed.local_device()
        raise UserError(f"--device {wanted}: not usable here ({first_line(error)}); try --device cpu") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: choose cuda or cpu")
    if distributed.launched() and name and ":" in name:
        raise UserError(f"--device {name}: each process takes the GPU of its own number; leave the flag out")
    distributed.start(device)
    if not distributed.is_main():
        logging.getLogger().setLevel(logging.WARNING)
    return device


def open_benchmark(args: argparse.Namespace) -> tuple[Benchmark, dict[str, str]]:
    """The benchmark that the flags name, without the images that they exclude, and why those are."""
    reasons = read_exclusions(args.exclusions, args.dataset)
    return BENCHMARKS[args.dataset](args.data_root, reasons), reasons


def command_line(script: str, argv: list[str] | None, secret: str | None = None) -> str:
    """A command as it was typed, but for a secret in it, for results that say how they were made."""
    words = ["python", f"src/{script}", *(sys.argv[1:] if argv is None else argv)]
    return shlex.join(word.replace(secret, "...") if secret else word for word in words)
