"""Prepare a script: check the files of its flags, choose the device, open the benchmark."""

import importlib.util
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import BENCHMARKS, Benchmark
from benchmarks.exclusions import read_exclusions
from models.exported import read_exported
from models.names import check_clip
from runtime import torchrun
from runtime.files import find_checkpoint, missing_file
from runtime.hub import import_hub
from utils import UserError, first_line, flag

if TYPE_CHECKING:
    import torch


def check_files(args: Any) -> None:
    """Check the files and packages that flags need, before heavy packages and weights are loaded.

    Args:
        args: flags of any script; flags that the script does not have are skipped.

    Raises:
        UserError: a file or a package is missing; the message names its flag.
    """
    exported = getattr(args, "pair", None)
    if exported is not None:
        check_pair(args, exported)
    for name in ("clip_model_path", "combiner_path"):
        path = getattr(args, name, None)
        if path is not None:
            find_checkpoint(flag(name), path)
    clip = getattr(args, "clip_model_name", None)
    if clip is not None:
        check_clip(clip)
    if getattr(args, "lora_rank", None) and importlib.util.find_spec("peft") is None:
        raise UserError(
            "--lora-rank needs a package: pip install -r requirements-lora.txt, or remove --lora-rank"
        )


def check_pair(args: Any, exported: Path | str) -> None:
    """Reject an incomplete exported pair, and flags for parts that it contains.

    A Hub repository is downloaded later, by only one of the processes.
    """
    for name in ("clip_model_name", "clip_model_path", "combiner_path"):
        if getattr(args, name, None) is not None:
            raise UserError(
                f"{flag(name)} cannot be combined with --pair {exported}, which already contains it: "
                "remove one of them"
            )
    if isinstance(exported, Path):
        read_exported(exported)
    else:
        import_hub()


def check_annotations(benchmark: Benchmark, splits: Sequence[str]) -> None:
    """Raise UserError if an annotation file of these splits is missing."""
    for part in benchmark.parts:
        for split in splits:
            for file in benchmark.files(part, split):
                if not file.is_file():
                    raise missing_file(file)


def pick_device(name: str | None) -> "torch.device":
    """Return the device of `--device`, by default this process's GPU or the CPU; join the other processes, if any."""
    import torch

    from runtime import distributed
    from runtime.precision import choose_kernels

    try:
        # Without a number, "cuda" would be the first GPU in every process.
        own_gpu = name == "cuda" and torch.cuda.is_available()
        device = torch.device(distributed.local_device() if own_gpu or name is None else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        wanted = name or distributed.local_device()
        raise UserError(
            f"--device {wanted}: not usable here ({first_line(error)}): choose --device cpu"
        ) from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: choose cuda or cpu")
    if torchrun.launched() and name and ":" in name:
        raise UserError(
            f"--device {name}: each process uses the GPU that has its process number: remove --device"
        )
    if device.type == "cuda":
        # Otherwise pinned memory would create a context on the first GPU, even if this process uses another one.
        torch.cuda.set_device(device)
    choose_kernels()
    distributed.start(device)
    if not distributed.is_main():
        logging.getLogger().setLevel(logging.WARNING)
    return device


def open_benchmark(args: Any) -> tuple[Benchmark, dict[str, str]]:
    """Return the benchmark that the flags choose, without excluded images, and the reason for each exclusion."""
    reasons = read_exclusions(args.exclusions, args.dataset)
    benchmark = BENCHMARKS[args.dataset](args.data_root, reasons)
    template = getattr(args, "concept_template", None)
    if template is not None:
        if not benchmark.concept_template:
            raise UserError(
                f"--concept-template: queries of {benchmark.name} have no shared concept: remove --concept-template"
            )
        benchmark.concept_template = template
    return benchmark, reasons


def command_line(script: str, argv: Sequence[str] | None, secret: str | None = None) -> str:
    """Return the command that was typed, for the records of a result; a secret in it is replaced by "..."."""
    words = ["python", f"src/{script}", *(sys.argv[1:] if argv is None else argv)]
    return shlex.join(word.replace(secret, "...") if secret else word for word in words)
