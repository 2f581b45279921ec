"""Parse and check the flags of both training scripts, and start or resume a training run."""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from benchmarks import Benchmark
from benchmarks.exclusions import read_exclusions
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
from settings.groups import FREE_FLAGS, PairChoice
from training.hyper_parameters import read_hyper_parameters
from utils import UserError, flag, seed_everything

if TYPE_CHECKING:
    import torch

    from training.data import TrainingData
    from training.run_folder import Place
    from training.schedule import Precision
    from training.step import Task

logger = logging.getLogger(__name__)

AnyStage = TypeVar("AnyStage", bound=groups.BothStages)


def parse(
    stage: type[AnyStage], script: str, about: str | None, argv: list[str] | None
) -> AnyStage:
    """Return the settings of a training run; flags take precedence over the recipe, and the recipe over the defaults.

    With `--resume`, the settings of the resumed run replace the recipe and the defaults. Flags must not contradict
    these settings: `started_with` compares the result with the run's hyper-parameters.

    Args:
        script: file name of the training script.
        about: docstring of the script, for `--help`.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = ScriptParser(about, parents=options.training_flags(stage))
    only_resume = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_resume.add_argument("--resume", type=usable_path)
    folder = only_resume.parse_known_args(argv)[0].resume
    if folder is None:
        args = options.parse_with_recipe(parser, argv, {script: parser})
        args.script, args.started_in = script, working_folder()
        args.command = command_line(script, argv, args.api_key)
        return parsed(parser, stage, args)
    stored = {**UNNAMED, **read_hyper_parameters(folder).table}
    if stored["script"] != script:
        raise UserError(
            f"--resume {folder}: {stored['script']} started this run: resume it with that script"
        )
    known = stage.model_fields.keys() - {"workspace", "resume"}
    parser.set_defaults(**{name: value for name, value in stored.items() if name in known})
    args = parser.parse_args(["--dataset", stored["dataset"], *argv])
    for name in known - stored.keys() - FREE_FLAGS:  # flags that are newer than the run
        if getattr(args, name) != parser.get_default(name):
            raise UserError(
                f"--resume {folder}: the run was started without {flag(name)}: remove {flag(name)}"
            )
    return parsed(parser, stage, args)


def working_folder() -> str | None:
    """Return the folder in which the script was started; None if it was deleted or its name cannot be encoded."""
    try:
        here = str(Path.cwd())
        here.encode()
    except (OSError, UnicodeError):
        return None
    return here


def checked(args: AnyStage) -> tuple[AnyStage, Benchmark]:
    """Check the flags of a training run before heavy packages are loaded; return its final settings and benchmark."""
    check_files(args)
    trackers = check_trackers(args.tracker, args.api_key, args.workspace)
    if args.save_best and not args.save_training:
        logger.warning(
            "warning: --save-best saves nothing without --save-training: add --save-training"
        )
    if args.seeds and not args.save_training:
        logger.warning(
            "warning: --seeds writes no metrics for compare.py without --save-training: add --save-training"
        )
    warn_of_lost_epochs(args)
    written = {}
    for name in ("output_dir", "image_cache", "feature_cache"):
        folder = getattr(args, name, None)
        written[flag(name)] = None if folder == AUTO else folder
    check_writable(written)
    benchmark, _ = open_benchmark(args)
    if args.hard_negatives:
        benchmark.negatives_from = args.hard_negatives_from
    check_annotations(benchmark, [benchmark.split_called("train"), benchmark.val_split])
    return args.model_copy(update={"tracker": trackers}), benchmark


def warn_of_lost_epochs(args: groups.BothStages) -> None:
    """Warn if the last epochs of a training run are neither validated nor saved."""
    last = max([*args.validated_epochs, *args.saved_epochs])
    first_lost = last + 1
    if first_lost < args.num_epochs:
        is_one = first_lost == args.num_epochs - 1
        logger.warning(
            "warning: %s neither validated nor saved: add --validate-last, or --save-every",
            f"epoch {first_lost} will be"
            if is_one
            else f"epochs {first_lost} to {args.num_epochs - 1} will be",
        )


def run(args: AnyStage, train: Callable[[AnyStage, Benchmark, StopRequest], None]) -> None:
    """Train with these settings, unless the run to resume is complete. A signal stops training between two steps."""
    if args.resume:
        from training.run_folder import is_complete

        if is_complete(args.resume):
            logger.info("%s is complete", args.resume)
            return
    args, benchmark = checked(args)

    from runtime import distributed

    with listening() as stop:
        train(args, benchmark, stop)
    distributed.stop()


def train_places(
    whole: "Place",
    data: "TrainingData",
    args: groups.BothStages,
    *,
    task_of: "Callable[[Place, TrainingData], Task]",
    precision: "Precision",
    stop: StopRequest,
) -> None:
    """Train once, or once with each of the seeds, and report the results of all seeds together.

    Args:
        whole: folder and settings of the run; with several seeds, each has a place below it.
        task_of: function from a place, and data in the order of its seed, to the task to train.
    """
    from training.run_folder import places_to_train
    from training.trainer import train_in

    for place in places_to_train(whole):
        seed_everything(place.seed)
        own = data.with_seed(place.seed)
        train_in(place, task_of(place, own), own, args, precision=precision, stop=stop)
    if args.seeds:
        report_seeds(args, data, whole, precision.device)


def report_seeds(
    args: groups.BothStages,
    data: "TrainingData",
    whole: "Place",
    device: "torch.device",
) -> None:
    """Evaluate the best weights of each seed, and report the results of all seeds together."""
    from runtime import distributed
    from training import seeds
    from training.run_folder import best_validation, seed_places
    from training.saving import CheckpointNames, Checkpoints

    names = CheckpointNames.of(args.script, data.benchmark)
    for place in seed_places(whole):
        best = best_validation(place.folder, next(iter(names.best)))
        weights = Checkpoints(place.folder, names, {}, args).first_choice(int(best["epoch"]))
        if weights is not None:
            try:
                write_metrics(args, data, place, weights=weights, device=device)
            except UserError as error:  # only a warning, since training itself has succeeded
                logger.warning("warning: seed %d has no metrics file: %s", place.seed, error)
    if distributed.is_main():
        seeds.report_seeds(whole, data)


def write_metrics(
    args: groups.BothStages,
    data: "TrainingData",
    place: "Place",
    *,
    weights: Path,
    device: "torch.device",
) -> None:
    """Evaluate a seed's weights as validate.py does, and write the result for compare.py next to the seed's folder."""
    from evaluation.result_file import make_result, provenance, write_result
    from evaluation.retrieval import rank_all
    from models.pair import load_and_freeze
    from runtime import distributed
    from training.run_folder import pair_with

    pair_flags = pair_with(weights, place.settings.flags)
    choice = PairChoice(
        combining_function=pair_flags["combining_function"],
        clip_path=pair_flags.get("clip_model_path"),
        combiner_path=pair_flags.get("combiner_path"),
        workers=args.num_workers,
        feature_cache=getattr(args, "feature_cache", None),
        told_by=options.told_by(args),
    )
    benchmark = data.benchmark
    pair, frozen = load_and_freeze(benchmark, data.val, device, choice)
    rankings = rank_all(frozen, pair.compose, benchmark.protocols, k=0, block=args.similarity_block)
    if distributed.is_main():
        result = make_result(
            benchmark,
            data.val,
            rankings,
            reasons=read_exclusions(args.exclusions, benchmark.name),
            made_by=provenance(pair, place.settings.flags["command"]),
            kept=None if args.verify else choice.feature_cache,
        )
        file = place.folder.with_name(f"{place.folder.name}.json")
        write_result(file, result)
        logger.info("metrics of seed %d: %s", place.seed, file)
