"""Stage 1: fine-tune CLIP so that the sum of a query's image and text features is near the target's image feature.

On a GPU:
    python src/clip_fine_tune.py --dataset CIRR --num-epochs 100 --clip-model-name RN50x16 --encoder both \
        --learning-rate 2e-6 --batch-size 128 --transform targetpad --target-ratio 1.25 \
        --save-training --save-best --validation-frequency 1

On a laptop, with synthetic data: see `make demo`.
"""

import copy
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
from utils import command

if TYPE_CHECKING:
    import torch

    from models.encoder import Encoder
    from training.data import TrainingData
    from training.step import Task

SCRIPT = "clip_fine_tune.py"


def parse(argv: list[str] | None) -> Stage1:
    """Parse the flags of stage 1."""
    return training.parse(Stage1, SCRIPT, __doc__, argv)


def train(args: Stage1, benchmark: Benchmark, stop: StopRequest) -> None:
    """Fine-tune CLIP once, or once with each of several seeds."""
    from models.encoder import versions
    from training.data import read_training_data
    from training.run_folder import claim_place
    from training.schedule import Precision
    from training.stage1 import with_image_cache

    precision = Precision(args.precision, pick_device(args.device))
    data = read_training_data(benchmark, args)
    encoder = with_image_cache(load_clip(args, benchmark, precision.device, stop), data, args)
    settings = Settings(
        flags=stored(args),
        preprocessing=encoder.preprocessing,
        data=data.describe(),
        versions=versions(),
    )
    if args.resume:
        settings = started_with(args.resume, settings)
    whole = claim_place("clip_finetuned", benchmark.run_name, settings, args)
    if args.seeds:
        encoder.model.cpu()  # each seed trains a copy on the device
    training.train_places(
        whole,
        data,
        args,
        task_of=lambda _, own: task_of(args, own, encoder, precision.device),
        precision=precision,
        stop=stop,
    )


def task_of(
    args: Stage1, data: "TrainingData", encoder: "Encoder", device: "torch.device"
) -> "Task":
    """Return the task of fine-tuning CLIP and validating it; each of several seeds trains a copy."""
    from combiner import compose_sum
    from evaluation.retrieval import evaluate
    from training.stage1 import fine_tuning

    model = copy.deepcopy(encoder.model) if args.seeds else encoder.model
    own = dataclasses.replace(encoder, model=model.to(device))
    measure = functools.partial(
        evaluate, data.benchmark, compose=compose_sum, block=args.similarity_block
    )
    return fine_tuning(own, data, args, measure)


def load_clip(
    args: Stage1, benchmark: Benchmark, device: "torch.device", stop: StopRequest
) -> "Encoder":
    """Load the CLIP that the flags choose; a signal stops its encoding between two batches of images."""
    from models.encoder import load_encoder

    clip = resolve_clip_options(args, [], benchmark.background)
    encoder = load_encoder(clip, None, device, workers=args.num_workers)
    if args.gradient_checkpointing:
        encoder.backbone.checkpoint_gradients(encoder.model)
    return dataclasses.replace(encoder, between=stop.check)


@command
def main(argv: list[str] | None = None) -> None:
    """Fine-tune CLIP, and write a run folder under --output-dir."""
    training.run(parse(argv), train)


if __name__ == "__main__":
    main()
