"""Stage 2: train a Combiner on features of a frozen CLIP, which are made once.

On a GPU:
    python src/combiner_train.py --dataset CIRR --projection-dim 2560 --hidden-dim 5120 --num-epochs 300 \
        --clip-model-name RN50x16 --clip-model-path clip_finetuned --combiner-lr 2e-5 --batch-size 4096 --clip-bs 32 \
        --transform targetpad --target-ratio 1.25 --save-training --save-best --validation-frequency 1

`make demo` runs it on a laptop, on drawn data.
"""

import dataclasses
import functools
import logging
from dataclasses import dataclass
from pathlib import Path
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
from utils import command, seed_everything

if TYPE_CHECKING:
    import torch

    from models.features import FrozenSplit
    from training.data import TrainingData

SCRIPT = "combiner_train.py"
logger = logging.getLogger(__name__)


def parse(argv: list[str] | None) -> Stage2:
    """The flags of stage 2."""
    return training.parse(Stage2, SCRIPT, __doc__, argv)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What the Combiners of all seeds are trained on and with."""

    data: "TrainingData"
    train: "FrozenSplit"
    val: "list[FrozenSplit]"
    settings: Settings
    device: "torch.device"

    def settings_of(self, seed: int) -> Settings:
        """The settings of one seed's run."""
        return self.settings.with_flags(seed=seed, seeds=None)


def prepare(args: Stage2, benchmark: Benchmark, stop: StopRequest) -> Stage:
    """Read the benchmark and make its features, or take them from the cache."""
    import torch

    from combiner import build_combiner
    from models.encoder import load_encoder, versions, weights_digest
    from models.features import FeatureCache, freeze, freeze_queries
    from training.data import read_training_data
    from training.stage2 import check_memory

    seed_everything(args.seed)
    device = pick_device(args.device)
    tuned = read_checkpoint("--clip-model-path", args.clip_model_path, "CLIP")
    data = read_training_data(
        benchmark, batch_size=args.batch_size, seed=args.seed, verify=args.verify
    )
    warn_of_transfer(benchmark.name, [tuned])
    clip = resolve_clip_options(args, [tuned], benchmark.background)
    say_assumed(assumed(args, clip, [tuned]), [tuned])
    encoder = load_encoder(clip, tuned, device, workers=args.num_workers, batch_size=args.clip_bs)
    settings = Settings(
        flags=stored(args),
        preprocessing={**encoder.preprocessing, "clip_dim": encoder.backbone.dim},
        data={**data.describe(), "clip_weights": weights_digest(encoder.model.state_dict())},
        versions=versions(),
    )
    with torch.device("meta"):
        combiner = build_combiner(
            settings.table
        )  # refuses impossible sizes before anything is encoded
    check_memory(combiner, device)
    if args.resume:
        settings = started_with(args.resume, settings)
    cache = FeatureCache(
        args.feature_cache,
        dataclasses.replace(encoder, between=stop.check),
        told_by=told_by(args),
    )
    return Stage(
        data=data,
        train=freeze(cache, data.train, data.texts, label=f"{benchmark.run_name}-train"),
        val=freeze_queries(cache, data.val, benchmark, f"{benchmark.run_name}-val"),
        settings=settings,
        device=device,
    )


def train(
    args: Stage2,
    stage: Stage,
    seed: int,
    *,
    folder: Path,
    resumed_by: Path,
    stop: StopRequest,
) -> None:
    """Train one Combiner in its folder.

    Args:
        resumed_by: the folder that `--resume` takes: its own, or that of all seeds.
    """
    from combiner import build_combiner
    from evaluation.retrieval import evaluate
    from training.run_folder import about_run, open_run
    from training.saving import CheckpointNames, Checkpoints
    from training.schedule import Precision
    from training.stage2 import combiner_training
    from training.terminal import log_opening
    from training.trainer import Trainer

    seed_everything(seed)
    benchmark = stage.data.benchmark
    settings = stage.settings_of(seed)
    precision = Precision(args.precision, stage.device)

    # What it learns, and what is measured of it.
    task = combiner_training(
        build_combiner(settings.table).to(stage.device),
        stage.train,
        stage.val,
        order=dataclasses.replace(stage.data.order, seed=seed),
        flags=args,
        measure=functools.partial(evaluate, benchmark, stage.val, block=args.similarity_block),
    )

    # Where it is written.
    names = CheckpointNames(key="Combiner", prefix="combiner", best=benchmark.best_combiners())
    checkpoints = Checkpoints(folder, names, settings.on_disk(), args)
    log_opening(stage.data, task, args, precision=precision, folder=folder)
    validated = {"combining-function": "combiner", "combiner-path": checkpoints.first_choice()}
    if settings.flags["clip_model_path"]:
        validated["clip-model-path"] = settings.flags["clip_model_path"]
    run = open_run(folder, about_run(stage.data, settings, resumed_by, validated), args)

    trainer = Trainer(task, args, run, checkpoints=checkpoints, precision=precision, stop=stop)
    trainer.fit()


def train_seeds(args: Stage2, stage: Stage, folder: Path, stop: StopRequest) -> None:
    """Train a Combiner with each seed in a folder of its own, and report mean and standard deviation."""
    from runtime import distributed
    from training.run_folder import drop_half_made, is_complete, make_folder, seed_folder
    from training.seeds import report_seeds

    seeds = args.seeds or []
    if distributed.is_main():
        drop_half_made(folder)
    for seed in seeds:
        run = seed_folder(folder, seed)
        if distributed.is_main() and not run.exists():
            make_folder(folder, run.name, stage.settings_of(seed).on_disk())
        distributed.wait_for_all()
        if is_complete(run):
            logger.info("seed %d is complete", seed)
        else:
            train(args, stage, seed, folder=run, resumed_by=folder, stop=stop)
    distributed.wait_for_all()
    if distributed.is_main():
        report_seeds(folder, seeds, stage.data, stage.settings)


def train_all(args: Stage2, benchmark: Benchmark, stop: StopRequest) -> None:
    """Train a Combiner, or one with each of several seeds, in a run folder."""
    from training.run_folder import claim_folder, run_name

    stage = prepare(args, benchmark, stop)
    name = run_name(
        "combiner_trained", benchmark.run_name, stage.settings.preprocessing["clip_model_name"]
    )
    folder = claim_folder(args.output_dir, name, stage.settings.on_disk(), args.resume)
    if args.seeds:
        train_seeds(args, stage, folder, stop)
    else:
        train(args, stage, args.seed, folder=folder, resumed_by=folder, stop=stop)


@command
def main(argv: list[str] | None = None) -> None:
    """Train a Combiner, or one with each of several seeds; writes a run folder under --output-dir."""
    training.run(parse(argv), train_all)


if __name__ == "__main__":
    main()
