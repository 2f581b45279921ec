"""Stage 1: fine-tune CLIP so that image feature + text feature lies near the target's image feature.

On a GPU:
    python src/clip_fine_tune.py --dataset CIRR --num-epochs 100 --clip-model-name RN50x16 --encoder both \
        --learning-rate 2e-6 --batch-size 128 --transform targetpad --target-ratio 1.25 \
        --save-training --save-best --validation-frequency 1

On a laptop, with drawn data: see `make demo`.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING

from benchmarks import Benchmark
from cli import training
from cli.startup import pick_device
from models.configuration import Settings, resolve_clip_options
from runtime.interruption import StopRequest
from settings.declaring import stored
from settings.groups import Stage1
from training.hyper_parameters import started_with
from utils import command, seed_everything

if TYPE_CHECKING:
    import torch

    from models.encoder import Encoder

SCRIPT = "clip_fine_tune.py"


def parse(argv: list[str] | None) -> Stage1:
    """The flags of stage 1."""
    return training.parse(Stage1, SCRIPT, __doc__, argv)


def train(args: Stage1, benchmark: Benchmark, stop: StopRequest) -> None:
    """Fine-tune CLIP in a run folder."""
    from combiner import compose_sum
    from evaluation.retrieval import evaluate
    from models.encoder import versions
    from training.data import read_training_data
    from training.run_folder import about_run, claim_folder, open_run, run_name
    from training.saving import CheckpointNames, Checkpoints
    from training.schedule import Precision
    from training.stage1 import fine_tuning, with_image_cache
    from training.terminal import log_opening
    from training.trainer import Trainer

    seed_everything(args.seed)
    device = pick_device(args.device)
    precision = Precision(args.precision, device)

    # What it learns from: the benchmark, CLIP, and the images, decoded or from the cache.
    data = read_training_data(
        benchmark,
        batch_size=args.batch_size,
        seed=args.seed,
        micro_batch_size=args.micro_batch_size,
        verify=args.verify,
    )
    encoder = with_image_cache(load_clip(args, benchmark, device, stop), data, args)
    settings = Settings(
        flags=stored(args),
        preprocessing=encoder.preprocessing,
        data=data.describe(),
        versions=versions(),
    )
    if args.resume:
        settings = started_with(args.resume, settings)

    # What it learns, and what is measured of it.
    measure = functools.partial(
        evaluate, benchmark, compose=compose_sum, block=args.similarity_block
    )
    task = fine_tuning(encoder, data, args, measure)

    # Where it is written.
    name = run_name("clip_finetuned", benchmark.run_name, settings.preprocessing["clip_model_name"])
    folder = claim_folder(args.output_dir, name, settings.on_disk(), args.resume)
    names = CheckpointNames(key="CLIP", prefix="tuned_clip", best=benchmark.best_clips())
    checkpoints = Checkpoints(folder, names, settings.on_disk(), args)
    log_opening(data, task, args, precision=precision, folder=folder)
    validated = {"combining-function": "sum", "clip-model-path": checkpoints.first_choice()}
    run = open_run(folder, about_run(data, settings, folder, validated), args)

    trainer = Trainer(task, args, run, checkpoints=checkpoints, precision=precision, stop=stop)
    trainer.fit()


def load_clip(
    args: Stage1, benchmark: Benchmark, device: "torch.device", stop: StopRequest
) -> "Encoder":
    """CLIP as the flags want it; it stops between two batches of images."""
    from models.encoder import load_encoder

    clip = resolve_clip_options(args, [], benchmark.background)
    encoder = load_encoder(clip, None, device, workers=args.num_workers)
    if args.gradient_checkpointing:
        encoder.backbone.checkpoint_gradients(encoder.model)
    return dataclasses.replace(encoder, between=stop.check)


@command
def main(argv: list[str] | None = None) -> None:
    """Fine-tune CLIP; writes a run folder under --output-dir."""
    training.run(parse(argv), train)


if __name__ == "__main__":
    main()
