"""What both trainings do with their flags: those of a resumed run, folders, seed, trackers, the page of the run."""

import argparse
import logging
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from benchmarks import Benchmark
from cli import options
from cli.parsers import ScriptParser
from cli.startup import check_annotations, check_files, command_line, open_benchmark, pick_device
from models.configuration import Settings
from runtime import torchrun
from runtime.choices import AUTO
from runtime.files import check_writable
from runtime.interruption import StopRequest, listening
from runtime.trackers import check_trackers
from settings import groups
from settings.declaring import parsed
from settings.flag_types import usable_path
from settings.groups import FREE_FLAGS
from training.hyper_parameters import read_hyper_parameters
from utils import PROJECT_ROOT, UserError, flag, seed_everything

if TYPE_CHECKING:
    import torch

    from reports.run_page import About
    from training.checkpoints import Checkpoints, Kept
    from training.data import TrainingData
    from training.loop import Task
    from training.losses import Loss
    from training.schedule import Precision, Schedule


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
    stored = read_hyper_parameters(folder).table
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


def carry_out(args: AnyStage, train: Callable[[Any, Benchmark, StopRequest], None]) -> None:
    """Train as the flags ask, with the signals that ask for a stop heard; nothing where the run is complete."""
    if args.resume:
        from training.run import is_complete

        if is_complete(args.resume):
            logger.info("%s is complete", args.resume)
            return
    args, benchmark = checked(args)

    from runtime import distributed

    with listening() as stop:
        train(args, benchmark, stop)
    distributed.stop()


def start(args: groups.BothStages) -> "torch.device":
    """Seed everything, and return the device."""
    seed_everything(args.seed)
    return pick_device(args.device)


def kept_weights(args: groups.BothStages) -> "Kept":
    """What of the weights the flags want kept."""
    if not args.save_training:
        return "nothing"
    return "best" if args.save_best else "every epoch"


def schedule_of(args: groups.BothStages) -> "Schedule":
    """How long and how fast the flags want it to learn. Micro-batches are flags of stage 1 alone."""
    from training.schedule import Schedule

    return Schedule(
        num_epochs=args.num_epochs,
        validation_frequency=args.validation_frequency,
        warmup_steps=args.warmup_steps,
        cosine=args.cosine,
        micro_batch_size=getattr(args, "micro_batch_size", None),
        clip_grad_norm=args.clip_grad_norm,
    )


def loss_of(args: groups.BothStages, bank: "torch.Tensor | None" = None) -> "Loss":
    """The loss that the flags want.

    Args:
        bank: see `make_loss`.
    """
    from training.losses import make_loss

    return make_loss(
        args.loss,
        mask_duplicate_targets=args.mask_duplicate_targets,
        learn_temperature=args.learn_temperature,
        bank=bank,
    )


def fit_as_asked(
    args: groups.BothStages,
    task: "Task",
    checkpoints: "Checkpoints",
    *,
    data: "TrainingData",
    settings: Settings,
    precision: "Precision",
    stop: StopRequest,
    folder: Path,
    to_validate: Mapping[str, Any],
    resumed_by: Path | None = None,
) -> None:
    """Train in a claimed folder with the schedule of the flags.

    Args:
        resumed_by: what `--resume` takes, if that is not the folder itself but that of all seeds.
        to_validate: flags of `validate.py` for the weights that will be kept; the one whose value is None names them.
    """
    from runtime.trackers import Account
    from training.loop import fit
    from training.run import open_run
    from training.terminal import opening

    schedule = schedule_of(args)
    told = opening(
        data,
        task.module,
        schedule,
        learning_rate=task.optimizer.defaults["lr"],
        precision=precision,
        folder=folder,
    )
    for name, words in told.items():
        logger.info("%s: %s", name, words)
    weights = checkpoints.first_choice(schedule.last_validation)
    flags = {name: weights if value is None else value for name, value in to_validate.items()}
    fit(
        task,
        schedule=schedule,
        precision=precision,
        run=open_run(
            Account(
                folder=folder,
                name=args.experiment_name or folder.name,
                api_key=args.api_key,
                workspace=args.workspace,
            ),
            args.tracker,
            about_run(data, settings, resumed_by or folder, flags),
        ),
        checkpoints=checkpoints,
        stop=stop,
        minutes=args.checkpoint_every_minutes,
    )


def about_run(
    data: "TrainingData", settings: Settings, folder: Path, validated: Mapping[str, Any]
) -> "About":
    """What the page of a run says, and how it is resumed.

    Args:
        folder: what `--resume` takes.
        validated: flags of the weights to validate, without their dashes; None where there are none.
    """
    from reports.run_page import About
    from training.run import run_title

    flags = settings.flags
    scripts = PROJECT_ROOT / "src"
    resume = shlex.join([str(scripts / flags["script"]), "--resume", str(folder.absolute())])
    commands = {"resume": f"{torchrun.command()} {resume}"}
    if None not in validated.values():
        words = ["python", str(scripts / "validate.py"), "--dataset", data.benchmark.name]
        words += ["--data-root", flags["data_root"]]
        for name, value in validated.items():
            absolute = value.absolute() if isinstance(value, Path) else value
            words += [f"--{name}", str(absolute)]
        commands["validate"] = shlex.join(words)
    commands["reproduce"] = reproducing(flags)
    return About(
        title=run_title(data.benchmark.name, settings),
        titles=data.benchmark.titles_in(data.val),
        chosen_by=tuple(data.benchmark.selection),
        hyper_parameters=settings.table,
        commands=commands,
    )


def reproducing(flags: Mapping[str, Any]) -> str:
    """The command that began a run, from any folder: what it names is found from where it was typed.

    Args:
        flags: of the run; those of earlier versions do not say where that was.
    """
    python, script, rest = flags["command"].partition(f"src/{flags['script']}")
    started_in = flags.get("started_in")
    if started_in is None or not script:
        return flags["command"]
    at = shlex.quote(str(PROJECT_ROOT / script))
    return f"cd {shlex.quote(started_in)} && {python}{at}{rest}"
