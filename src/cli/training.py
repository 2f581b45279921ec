"""What both trainings do with their flags: those of a resumed run, folders, seed, tracker, the page of the run."""

import argparse
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import Benchmark
from cli.startup import command_line, pick_device
from reports.run_page import About
from runtime import distributed
from runtime.files import check_writable
from training.run import read_hyper_parameters
from training.tracker import NoTracker, make_tracker
from utils import UserError, seed_everything


def start_training(args: argparse.Namespace) -> tuple[torch.device, NoTracker]:
    """Seed everything; device and tracker. Fails now, not after hours of work, if a folder cannot be written to."""
    seed_everything(args.seed)
    device = pick_device(args.device)
    written = ("output_dir", "image_cache", "feature_cache")
    check_writable({"--" + name.replace("_", "-"): getattr(args, name, None) for name in written})
    return device, make_tracker(args.api_key, args.workspace, args.experiment_name)


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
