"""What both trainings do with their flags: those of a resumed run, and what must be there before anything is loaded."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import Benchmark
from cli.flag_types import usable_path
from cli.parsers import ScriptParser
from cli.startup import check_annotations, check_files, command_line, open_benchmark
from models.configuration import FREE_FLAGS
from runtime.choices import AUTO
from runtime.files import check_writable
from training.hyper_parameters import read_hyper_parameters
from training.trackers import check_trackers
from utils import UserError, flag

logger = logging.getLogger(__name__)


def parse(
    script: str,
    about: str | None,
    parents: Sequence[argparse.ArgumentParser],
    argv: list[str] | None,
) -> argparse.Namespace:
    """The flags of a training; with `--resume` those of the run, and what is typed beside it laid over them.

    What is typed must not contradict the run: `started_with` compares what comes out with the run's hyper-parameters.

    Args:
        script: its file's name.
        about: its docstring, of which `--help` shows the first line.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = ScriptParser(about, parents=parents)
    parser.set_defaults(script=script)
    only_resume = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_resume.add_argument("--resume", type=usable_path)
    folder = only_resume.parse_known_args(argv)[0].resume
    if folder is None:
        args = parser.parse_args(argv)
        args.command = command_line(script, argv, args.api_key)
        args.started_in = working_folder()
        return args
    stored = read_hyper_parameters(folder).table
    if stored.get("script", script) != script:
        raise UserError(
            f"--resume {folder} was started by {stored['script']}: resume it with that script"
        )
    dataset = ["--dataset", str(stored.get("dataset"))]
    known = vars(parser.parse_args(dataset)).keys() - {"workspace", "script", "resume"}
    parser.set_defaults(
        **{name: _as_typed(value) for name, value in stored.items() if name in known}
    )
    args = parser.parse_args([*dataset, *argv])
    for name in known - stored.keys() - FREE_FLAGS:  # of a later version than the run's
        if getattr(args, name) != parser.get_default(name):
            raise UserError(
                f"--resume {folder}: the run was started without {flag(name)}: leave it out"
            )
    return args


def working_folder() -> str | None:
    """The folder that a script is started in; None where it is gone, or has a name that no file can hold."""
    try:
        here = str(Path.cwd())
        here.encode()
    except (OSError, UnicodeError):
        return None
    return here


def _as_typed(value: Any) -> Any:
    """A stored number as text, so that argparse checks and converts it like a typed one."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number else value


def check(args: argparse.Namespace) -> Benchmark:
    """The benchmark to train on. Fails now, not after packages are loaded, if a file or a folder is no good."""
    check_files(args)
    args.tracker = check_trackers(args.tracker, args.api_key, args.workspace)
    if args.save_best and not args.save_training:
        logger.warning("warning: --save-best saves nothing without --save-training: add it")
    written = {}
    for name in ("output_dir", "image_cache", "feature_cache"):
        folder = getattr(args, name, None)
        written[flag(name)] = None if folder == AUTO else folder
    check_writable(written)
    benchmark, _ = open_benchmark(args)
    check_annotations(benchmark, [benchmark.split_called("train"), benchmark.val_split])
    return benchmark


def is_complete(args: argparse.Namespace) -> bool:
    """Whether the run that `--resume` names has nothing left to do, which is said."""
    if args.resume is None:
        return False

    from training.run_folder import is_complete

    done = is_complete(args.resume)
    if done:
        logger.info("%s is complete", args.resume)
    return done
