"""Stage 2: train a Combiner on the features of a frozen CLIP, which are computed only once.

On a GPU:
    python src/combiner_train.py --dataset CIRR --projection-dim 2560 --hidden-dim 5120 --num-epochs 300 \
        --clip-model-name RN50x16 --clip-model-path clip_finetuned --combiner-lr 2e-5 --batch-size 4096 --clip-bs 32 \
        --transform targetpad --target-ratio 1.25 --save-training --save-best --validation-frequency 1

`make demo` runs it on a laptop, on synthetic data.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING

from benchmarks import Benchmark
from cli import training
from cli.options import told_by
from cli.startup import pick_device
from models.configuration import (
    Settings,
    assumed,
    read_checkpoint,
    resolve_clip_options,
    say_assumed,
    warn_of_transfer,
)
from runtime.interruption import StopRequest
from settings.declaring import stored
from settings.groups import Stage2
from training.hyper_parameters import started_with
from utils import command

if TYPE_CHECKING:
    import torch

    from models.encoder import Encoder
    from models.features import FrozenSplit
    from training.data import TrainingData
    from training.step import Task

    Features = tuple[FrozenSplit, list[FrozenSplit]]  # training split, validation splits

SCRIPT = "combiner_train.py"


def parse(argv: list[str] | None) -> Stage2:
    """Parse the flags of stage 2."""
    return training.parse(Stage2, SCRIPT, __doc__, argv)


def train(args: Stage2, benchmark: Benchmark, stop: StopRequest) -> None:
    """Train one Combiner, or one with each of several seeds."""
    from training.data import read_training_data
    from training.run_folder import claim_place
    from training.schedule import Precision

    precision = Precision(args.precision, pick_device(args.device))
    data = read_training_data(benchmark, args)
    encoder = load_clip(args, benchmark, precision.device, stop)
    settings = settings_of(args, data, encoder)
    features = features_of(args, data, encoder)
    del encoder  # frees its memory for the Combiner
    whole = claim_place("combiner_trained", benchmark.run_name, settings, args)
    training.train_places(
        whole,
        data,
        args,
        task_of=lambda place, own: task_of(args, own, features, place.settings),
        precision=precision,
        stop=stop,
    )


def task_of(args: Stage2, data: "TrainingData", features: "Features", settings: Settings) -> "Task":
    """Return the task of training a new Combiner and validating it."""
    from combiner import build_combiner
    from evaluation.retrieval import evaluate
    from training.stage2 import combiner_training

    train, val = features
    return combiner_training(
        build_combiner(settings.table).to(train.images.device),
        train,
        val,
        order=data.order,
        flags=args,
        measure=functools.partial(evaluate, data.benchmark, val, block=args.similarity_block),
    )


def load_clip(
    args: Stage2, benchmark: Benchmark, device: "torch.device", stop: StopRequest
) -> "Encoder":
    """Load the CLIP that the flags and its checkpoint choose; a signal stops its encoding between two batches."""
    from models.encoder import load_encoder

    tuned = read_checkpoint("--clip-model-path", args.clip_model_path, "CLIP")
    warn_of_transfer(benchmark.name, [tuned])
    clip = resolve_clip_options(args, [tuned], benchmark.background)
    say_assumed(assumed(args, clip, [tuned]), [tuned])
    encoder = load_encoder(clip, tuned, device, workers=args.num_workers, batch_size=args.clip_bs)
    return dataclasses.replace(encoder, between=stop.check)


def settings_of(args: Stage2, data: "TrainingData", encoder: "Encoder") -> Settings:
    """Return the settings of the training run; for a resumed run, return the settings that it was started with.

    Raises:
        UserError: the settings contradict the resumed run, or the Combiner does not fit in memory.
    """
    import torch

    from combiner import build_combiner
    from models.encoder import versions, weights_digest
    from training.stage2 import check_memory

    settings = Settings(
        flags=stored(args),
        preprocessing={**encoder.preprocessing, "clip_dim": encoder.backbone.dim},
        data={**data.describe(), "clip_weights": weights_digest(encoder.model.state_dict())},
        versions=versions(),
    )
    with torch.device("meta"):  # too large a Combiner is rejected before images are encoded
        check_memory(build_combiner(settings.table), encoder.device)
    return started_with(args.resume, settings) if args.resume else settings


def features_of(args: Stage2, data: "TrainingData", encoder: "Encoder") -> "Features":
    """Return the features of the training split and of the validation splits, from the cache if it has them."""
    from models.features import FeatureCache, freeze, freeze_queries

    cache = FeatureCache(args.feature_cache, encoder, told_by=told_by(args))
    name = data.benchmark.run_name
    return (
        freeze(cache, data.train, data.texts, label=f"{name}-train"),
        freeze_queries(cache, data.val, data.benchmark, f"{name}-val"),
    )


@command
def main(argv: list[str] | None = None) -> None:
    """Train a Combiner, or one with each of several seeds, and write a run folder under --output-dir."""
    training.run(parse(argv), train)


if __name__ == "__main__":
    main()
