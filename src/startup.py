"""What scripts do before their own work: flags of a resumed run, device, seed, tracker, benchmark."""

import argparse
import logging
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import BENCHMARKS, Benchmark
from benchmarks.exclusions import read_exclusions
from reports.run_page import About
from runtime import distributed
from runtime.files import check_writable
from training.run import read_hyper_parameters
from training.tracker import NoTracker, make_tracker
from utils import UserError, first_line, seed_everything


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


def start_training(args: argparse.Namespace) -> tuple[torch.device, NoTracker]:
    """Seed everything; device and tracker. Fails now, not after hours of work, if a folder cannot be written to."""
    seed_everything(args.seed)
    device = pick_device(args.device)
    written = ("output_dir", "image_cache", "feature_cache")
    check_writable({"--" + name.replace("_", "-"): getattr(args, name, None) for name in written})
    return device, make_tracker(args.api_key, args.workspace, args.experiment_name)


def open_benchmark(args: argparse.Namespace) -> tuple[Benchmark, dict[str, str]]:
    """The benchmark that the flags name, without the images that they exclude, and why those are."""
    reasons = read_exclusions(args.exclusions, args.dataset)
    return BENCHMARKS[args.dataset](args.data_root, reasons), reasons


def command_line(script: str, argv: list[str] | None, secret: str | None = None) -> str:
    """A command as it was typed, but for a secret in it, for results that say how they were made."""
    words = ["python", f"src/{script}", *(sys.argv[1:] if argv is None else argv)]
    return shlex.join(word.replace(secret, "...") if secret else word for word in words)


def parse_training(parser: argparse.ArgumentParser, script: str, argv: list[str] | None) -> argparse.Namespace:
    """The flags of a training; with `--resume` those of the run, and what is typed beside it laid over them.

    That must not contradict the run: `experiment.started_with` holds it against the hyper-parameters as they come out.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser.set_defaults(script=script)
    only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only.add_argument("--resume", type=Path)
    folder = only.parse_known_args(argv)[0].resume
    if folder is None:
        args = parser.parse_args(argv)
        args.command = command_line(script, argv, args.api_key)
        return args
    stored = read_hyper_parameters(folder)
    if stored.get("script", script) != script:
        raise UserError(f"--resume {folder} was started by {stored['script']}: resume it with that script")
    dataset = ["--dataset", str(stored.get("dataset"))]
    known = vars(parser.parse_args(dataset)).keys() - {"workspace", "script", "resume"}
    # As text, so that argparse checks and converts the values like typed ones.
    texts = {k: str(v) if isinstance(v, int | float) and not isinstance(v, bool) else v for k, v in stored.items()}
    parser.set_defaults(**{name: value for name, value in texts.items() if name in known})
    return parser.parse_args([*dataset, *argv])


def about_run(benchmark: Benchmark, config: Mapping[str, Any], folder: Path, validated: Mapping[str, Any]) -> About:
    """What the page of a run says, and how it is resumed.

    Args:
        folder: what `--resume` takes.
        validated: flags of the weights to validate, without their dashes; None where there are none.
    """
    commands = {"resume": f"{distributed.launcher()} src/{config['script']} --resume {shlex.quote(str(folder))}"}
    if None not in validated.values():
        flags = {"dataset": benchmark.name, "data-root": config["data_root"], **validated}
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        commands["validate"] = shlex.join(["python", "src/validate.py", *words])
    commands["reproduce"] = config["command"]
    return About(benchmark.titles, tuple(benchmark.selection), config, commands)
