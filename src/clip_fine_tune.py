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
from models.configuration import Settings, settle
from runtime.interruption import StopRequest
from settings.declaring import stored
from settings.groups import Stage1
from training.hyper_parameters import started_with
from utils import command

if TYPE_CHECKING:
    import torch

    from models.encoder import Encoder
    from training.data import TrainingData

SCRIPT = "clip_fine_tune.py"


def parse(argv: list[str] | None) -> Stage1:
    """The flags of stage 1."""
    return training.parse(Stage1, SCRIPT, __doc__, argv)


def train(args: Stage1, benchmark: Benchmark, stop: StopRequest) -> None:
    """Fine-tune CLIP in a run folder."""
    from combiner import compose_sum
    from evaluation.retrieval import evaluate
    from models.encoder import versions
    from training.checkpoints import Checkpoints
    from training.data import read_training_data
    from training.run import claim_folder, run_name
    from training.schedule import Precision
    from training.stage1 import fine_tuning

    device = training.start(args)
    precision = Precision(args.precision, device)
    data = read_training_data(
        benchmark,
        batch_size=args.batch_size,
        seed=args.seed,
        micro_batch_size=args.micro_batch_size,
        verify=args.verify,
    )
    encoder = load_clip_and_images(args, data, device, stop)
    settings = Settings(
        flags=stored(args), recipe=encoder.recipe, data=data.describe(), versions=versions()
    )
    if args.resume:
        settings = started_with(args.resume, settings)
    task, measured = fine_tuning(
        encoder,
        data,
        trained=args.encoder,
        learning_rate=args.learning_rate,
        ema_decay=args.ema_decay,
        compiled=args.compile,
        loss=training.loss_of(args),
        measure=functools.partial(
            evaluate, benchmark, compose=compose_sum, block=args.similarity_block
        ),
    )
    name = run_name("clip_finetuned", benchmark.run_name, settings.recipe["clip_model_name"])
    folder = claim_folder(args.output_dir, name, settings.on_disk(), args.resume)
    checkpoints = Checkpoints(
        folder,
        measured.model,
        key="CLIP",
        prefix="tuned_clip",
        best_names=benchmark.best_clips(),
        config=settings.on_disk(),
        kept=training.kept_weights(args),
    )
    training.fit_as_asked(
        args,
        task,
        checkpoints,
        data=data,
        settings=settings,
        precision=precision,
        stop=stop,
        folder=folder,
        to_validate={"combining-function": "sum", "clip-model-path": None},
    )


def load_clip_and_images(
    args: Stage1, data: "TrainingData", device: "torch.device", stop: StopRequest
) -> "Encoder":
    """CLIP as the flags want it, with its images decoded or from the cache."""
    from models.encoder import load_encoder
    from training.stage1 import decodings, with_image_cache

    encoder = load_encoder(settle(args, []), None, device, workers=args.num_workers)
    encoder = dataclasses.replace(encoder, between=stop.check)
    if args.gradient_checkpointing:
        encoder.backbone.checkpoint_gradients(encoder.model)
    if args.image_cache is None:
        return encoder
    without = decodings(
        data,
        epochs=args.num_epochs,
        validation_frequency=args.validation_frequency,
        images_learn=args.encoder != "text",
    )
    return with_image_cache(encoder, args.image_cache, data, without)


@command
def main(argv: list[str] | None = None) -> None:
    """Fine-tune CLIP; writes a run folder under --output-dir."""
    training.carry_out(parse(argv), train)


if __name__ == "__main__":
    main()
