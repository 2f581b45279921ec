"""What both trainings do with their flags: those of a resumed run, and what must be there before anything is loaded."""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from benchmarks import Benchmark
from cli import options
from cli.parsers import ScriptParser
from cli.startup import check_annotations, check_files, command_line, open_benchmark
from runtime.choices import AUTO, UNNAMED
from runtime.files import check_writable
from runtime.interruption import StopRequest, listening
from runtime.trackers import check_trackers
from settings import groups
from settings.declaring import parsed
from settings.flag_types import usable_path
from settings.groups import FREE_FLAGS
from training.hyper_parameters import read_hyper_parameters
from utils import UserError, flag

logger = logging.getLogger(__name__)

AnyStage = TypeVar("AnyStage", bound=groups.BothStages)


def parse(
    stage: type[AnyStage], script: str, about: str | None, argv: list[str] | None
) -> AnyStage:
    """The settings of a training; with `--resume` those of the run, and what is typed beside it laid over them.

    What is typed must not contradict the run: `started_with` compares what comes out with the run's hyper-parameters.

    Args:
        script: its file's name.
        about: its docstring, of which `--help` shows the first line.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = ScriptParser(about, parents=options.training_flags(stage))
    only_resume = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_resume.add_argument("--resume", type=usable_path)
    folder = only_resume.parse_known_args(argv)[0].resume
    if folder is None:
        typed = parser.parse_args(argv)
        parser.set_defaults(
            script=script,
            command=command_line(script, argv, typed.api_key),
            started_in=working_folder(),
        )
        return parsed(parser, stage, parser.parse_args(argv))
    stored = {**UNNAMED, **read_hyper_parameters(folder).table}
    if stored["script"] != script:
        raise UserError(
            f"--resume {folder} was started by {stored['script']}: resume it with that script"
        )
    known = stage.model_fields.keys() - {"workspace", "resume"}
    parser.set_defaults(**{name: value for name, value in stored.items() if name in known})
    args = parser.parse_args(["--dataset", stored["dataset"], *argv])
    for name in known - stored.keys() - FREE_FLAGS:  # of a later version than the run's
        if getattr(args, name) != parser.get_default(name):
            raise UserError(
                f"--resume {folder}: the run was started without {flag(name)}: leave it out"
            )
    return parsed(parser, stage, args)


def working_folder() -> str | None:
    """The folder that a script is started in; None where it is gone, or has a name that no file can hold."""
    try:
        here = str(Path.cwd())
        here.encode()
    except (OSError, UnicodeError):
        return None
    return here


def checked(args: AnyStage) -> tuple[AnyStage, Benchmark]:
    """The settings and the benchmark to train on.

    Fails now, not after packages are loaded, if a file or a folder is no good or a tracker's package is missing.
    """
    check_files(args)
    trackers = check_trackers(args.tracker, args.api_key, args.workspace)
    if args.save_best and not args.save_training:
        logger.warning("warning: --save-best saves nothing without --save-training: add it")
    written = {}
    for name in ("output_dir", "image_cache", "feature_cache"):
        folder = getattr(args, name, None)
        written[flag(name)] = None if folder == AUTO else folder
    check_writable(written)
    benchmark, _ = open_benchmark(args)
    check_annotations(benchmark, [benchmark.split_called("train"), benchmark.val_split])
    return args.model_copy(update={"tracker": trackers}), benchmark


def run(args: AnyStage, train: Callable[[AnyStage, Benchmark, StopRequest], None]) -> None:
    """Train as flags say, unless the run that `--resume` names is complete. A signal stops it between two steps."""
    if is_complete(args):
        return
    args, benchmark = checked(args)

    from runtime import distributed

    with listening() as stop:
        train(args, benchmark, stop)
    distributed.stop()


def is_complete(args: groups.BothStages) -> bool:
    """Whether the run that `--resume` names has nothing left to do, which is said."""
    if args.resume is None:
        return False

    from training.run_folder import is_complete

    done = is_complete(args.resume)
    if done:
        logger.info("%s is complete", args.resume)
    return done
