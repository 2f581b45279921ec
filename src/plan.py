"""Estimate the GPU memory and time that a training run needs, by part, and the settings that fit.

    python src/plan.py stage1 --dataset CIRR --clip-model-name RN50x16 --batch-size 128 --gpu a100-40
    python src/plan.py stage2 --dataset CIRR --clip-model-name RN50x16 --batch-size 4096 --gpu t4

The script accepts the flags of clip_fine_tune.py and combiner_train.py; flags that do not affect the GPU are ignored.
All numbers are estimated, none is measured; docs/gpus.md explains the method and what it leaves out.
"""

import argparse
import dataclasses
import datetime
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks import BENCHMARKS
from cli import options
from cli.parsers import ScriptParser
from cli.startup import check_files
from models.configuration import read_checkpoint, resolve_clip_options
from runtime.gpus import EFFICIENCY, GIB, GPUS, USABLE, Gpu, Work, seconds
from settings import groups
from settings.flag_types import positive_float, rows
from utils import UserError, command, flag

if TYPE_CHECKING:
    from training.planning import PlannedTraining, Sizes, Way


def plan_flags() -> argparse.ArgumentParser:
    """Return the flags that only a plan has: the GPU, and the numbers of triplets and images."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("plan")
    group.add_argument(
        "--gpu", choices=GPUS, help="GPU model to plan for; required unless --memory is given"
    )
    group.add_argument(
        "--memory",
        type=positive_float,
        metavar="GIB",
        help="GPU memory in GiB, for a GPU that is not listed or partly in use",
    )
    for name in ("--triplets", "--images"):
        group.add_argument(
            name,
            type=rows,
            nargs=2,
            metavar=("TRAIN", "VAL"),
            help=f"number of {name[2:]} for training and for validation, instead of the counts of --dataset",
        )
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags of a plan: a stage, and the flags of its training script.

    Settings that only the other stage has get the values that this stage implies.
    """
    parser: argparse.ArgumentParser = ScriptParser(__doc__)
    stages = parser.add_subparsers(dest="stage", required=True)
    stage_1 = stages.add_parser(
        "stage1",
        help="fine-tune CLIP: flags of clip_fine_tune.py",
        parents=[plan_flags(), *options.training_flags(groups.Stage1)],
    )
    stage_1.set_defaults(clip_model_path=None, clip_bs=32, negatives="batch")
    stage_2 = stages.add_parser(
        "stage2",
        help="train a Combiner: flags of combiner_train.py",
        parents=[plan_flags(), *options.training_flags(groups.Stage2)],
    )
    stage_2.set_defaults(encoder=None, micro_batch_size=None, gradient_checkpointing=False)
    for action in [*stage_1._actions, *stage_2._actions]:
        if action.dest == "dataset":  # it need not exist: --triplets and --images replace it
            action.required = False
    stages_of_recipe = {"clip_fine_tune.py": stage_1, "combiner_train.py": stage_2}
    return options.parse_with_recipe(parser, argv, stages_of_recipe)


def check(args: argparse.Namespace) -> None:
    """Reject flags that do not define a plan, before anything heavy is loaded."""
    if args.resume:
        raise UserError("--resume: a plan is made from flags: pass the flags of the run instead")
    if not args.gpu and not args.memory:
        raise UserError(f"--gpu is missing: choose {', '.join(GPUS)}, or pass --memory")
    if bool(args.triplets) != bool(args.images):
        raise UserError("--triplets and --images belong together: pass both")
    if not args.dataset and not args.triplets:
        raise UserError("--dataset is missing: choose one, or pass --triplets and --images")
    if args.micro_batch_size and args.micro_batch_size > args.batch_size:
        raise UserError(
            f"--micro-batch-size {args.micro_batch_size} is larger than the batch of {args.batch_size}: lower it"
        )
    check_files(args)


def planned_gpu(args: argparse.Namespace) -> Gpu:
    """Return the GPU that the flags choose; without --gpu, its rates are unknown."""
    gpu = GPUS[args.gpu] if args.gpu else Gpu(title="unnamed GPU", memory=0, rates={})
    return dataclasses.replace(gpu, memory=args.memory or gpu.memory)


def check_precision(gpu: Gpu, name: str, precision: str) -> None:
    """Raise UserError if a GPU does not support a precision.

    Args:
        name: name of the setting that requests the precision, for the message.
    """
    if gpu.rates and precision not in gpu.rates:
        known = ", ".join(gpu.rates)
        raise UserError(
            f"{flag(name)} {precision}: the {gpu.title} does not support it: choose {known}"
        )


def planned_sizes(args: argparse.Namespace) -> "Sizes":
    """Return the sizes of the dataset, from --triplets and --images or from the benchmark."""
    from training.planning import Sizes, sizes_of

    if args.triplets:
        triplets, queries = args.triplets
        images, gallery = args.images
        sizes = Sizes(
            name="your data",
            triplets=triplets,
            variants=1,
            images=images,
            val=[(queries, gallery)],
        )
    else:
        sizes = sizes_of(BENCHMARKS[args.dataset](args.data_root))
    if args.batch_size > sizes.triplets:
        raise UserError(
            f"--batch-size {args.batch_size} is larger than the training set of {sizes.triplets} triplets: choose at "
            f"most {sizes.triplets}"
        )
    return sizes


def planned_training(args: argparse.Namespace, gpu: Gpu) -> "PlannedTraining":
    """Return the training stage and the CLIP that the flags and the checkpoint choose."""
    from training.planning import (
        CountedClip,
        PlannedCombinerTraining,
        PlannedFineTuning,
        combiner_to_count,
    )

    precision = "fp16" if args.precision == "amp" else args.precision
    check_precision(gpu, "precision", precision)
    tuned = read_checkpoint("--clip-model-path", args.clip_model_path, "CLIP")
    choice: dict[str, Any] = resolve_clip_options(groups.Clip.of(args), [tuned]).model_dump()
    check_precision(gpu, "encode_precision", choice["encode_precision"])
    clip = CountedClip(
        choice["clip_model_name"],
        args.encoder,
        batch_size=args.clip_bs,
        precision=choice["encode_precision"],
        lora=groups.Lora.of(args) if args.stage == "stage1" else None,
    )
    shared: dict[str, Any] = {
        "clip": clip,
        "sizes": planned_sizes(args),
        "precision": precision,
        "averaged": args.ema_decay is not None,
        "masked": args.mask_duplicate_targets,
        "hard_negatives": args.hard_negatives,
    }
    if args.stage == "stage1":
        return PlannedFineTuning(**shared)
    combiner = combiner_to_count(clip, groups.WantedCombiner.of(args))
    experts = args.num_experts if combiner.has_router else 0
    return PlannedCombinerTraining(
        **shared, combiner=combiner, experts=experts, negatives=args.negatives
    )


def memory_lines(training: "PlannedTraining", way: "Way", gpu: Gpu) -> Iterator[str]:
    """Yield the memory that a training step needs, by part, and the usable memory of the GPU."""
    step = {**training.lasting(), **training.passing(way)}
    totals = {"a step": sum(step.values()), **training.other_peaks()}
    yield "     GiB"
    for part, size in step.items():
        if size:
            yield f"{size / GIB:8.2f}  {part}"
    for part, size in totals.items():
        yield f"{size / GIB:8.2f}  {part}, in all"
    yield f"{USABLE * gpu.memory:8.2f}  usable: {USABLE:.0%} of {gpu.memory:g} GiB"


def verdict(training: "PlannedTraining", asked: "Way", fitting: "Way | None") -> str:
    """Report whether the requested settings fit in memory and, if not, which settings do."""
    if fitting == asked:
        return "It fits."
    if fitting is None:
        return "It does not fit, and no flag makes it fit: choose a smaller model or a larger GPU."
    size = training.needed(fitting) / GIB
    return f"It does not fit. This does: {typed(fitting, asked)} ({size:.2f} GiB)"


def typed(way: "Way", asked: "Way") -> str:
    """Return the flags for the settings in which `way` differs from the requested settings."""
    words = []
    for name, value in dataclasses.asdict(way).items():
        if value != getattr(asked, name):
            words.append(flag(name) if value is True else f"{flag(name)} {value}")
    return " ".join(words)


def work_line(part: str, work: Sequence[Work], gpu: Gpu) -> str:
    """Format the operations of some work, and its seconds if the GPU's rates are known."""
    operations = sum(own.operations for own in work) / 1e12
    duration = f"{seconds(work, gpu):11.3f}" if gpu.rates else ""
    return f"{operations:10.2f}{duration}  {part}"


def work_lines(total: str, work: Sequence[Work], gpu: Gpu) -> Iterator[str]:
    """Yield a line for each part of some work, and a line for the total."""
    for own in work:
        if own.operations:
            yield work_line(f"  {own.part}, {own.precision}", [own], gpu)
    yield work_line(total, work, gpu)


def time_lines(
    training: "PlannedTraining", way: "Way", gpu: Gpu, args: argparse.Namespace
) -> Iterator[str]:
    """Yield the operations and the time of a training run, by part."""
    once = training.once()
    epoch = training.epoch(way)
    validation = training.validation()
    steps = training.sizes.triplets // way.batch_size
    rate = f"    seconds, at {EFFICIENCY:.0%} of the rate of the {gpu.title}" if gpu.rates else ""
    yield f"     TFLOP{rate}"
    if once:
        yield from work_lines("before the first epoch", once, gpu)
    yield from work_lines("a step", training.step(way), gpu)
    yield work_line(f"an epoch of {training.sizes.name}, {steps} steps", epoch, gpu)
    yield from work_lines("a validation", validation, gpu)
    if gpu.rates:
        validations = len(groups.Training.of(args).validated_epochs)
        run = args.num_epochs * seconds(epoch, gpu) + validations * seconds(validation, gpu)
        seeds = len(args.seeds or [args.seed])
        whole = datetime.timedelta(seconds=round(seconds(once, gpu) + seeds * run))
        runs = f", {seeds} runs" if seeds > 1 else ""
        yield f"{args.num_epochs} epochs with {validations} validations{runs}: {whole} h:m:s"


@command
def main(argv: list[str] | None = None) -> None:
    """Print the plan of a training run."""
    args = parse(argv)
    check(args)

    from training.planning import Way

    gpu = planned_gpu(args)
    training = planned_training(args, gpu)
    asked = Way(
        batch_size=args.batch_size,
        micro_batch_size=args.micro_batch_size,
        gradient_checkpointing=args.gradient_checkpointing,
    )
    fitting = training.first_that_fits(asked, USABLE * gpu.memory * GIB)
    print(f"{args.stage} with {training.clip.name}: estimated, not measured\n")
    print("\n".join(memory_lines(training, asked, gpu)))
    print(verdict(training, asked, fitting), end="\n\n")
    print("\n".join(time_lines(training, fitting or asked, gpu, args)))


if __name__ == "__main__":
    main()
