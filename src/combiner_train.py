"""Stage 2: train a Combiner on features of a frozen CLIP, which are made once.

On a GPU:
    python src/combiner_train.py --dataset CIRR --projection-dim 2560 --hidden-dim 5120 --num-epochs 300 \
        --clip-model-name RN50x16 --clip-model-path clip_finetuned --combiner-lr 2e-5 --batch-size 4096 --clip-bs 32 \
        --transform targetpad --target-ratio 1.25 --save-training --save-best --validation-frequency 1

`make demo` runs it on a laptop, on drawn data.
"""

import dataclasses
import functools
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import Benchmark
from benchmarks.metrics import mean_and_deviation, shown
from cli import training
from cli.options import told_by
from models.configuration import (
    Settings,
    assumed,
    read_checkpoint,
    say_assumed,
    settle,
    warn_of_transfer,
)
from reports.tables import text_table
from runtime.files import write_text
from runtime.interruption import StopRequest
from settings.declaring import stored
from settings.groups import Stage2
from training.hyper_parameters import started_with
from utils import command, seed_everything, two_decimals

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

    device = training.start(args)
    tuned = read_checkpoint("--clip-model-path", args.clip_model_path, "CLIP")
    data = read_training_data(
        benchmark, batch_size=args.batch_size, seed=args.seed, verify=args.verify
    )
    warn_of_transfer(benchmark.name, [tuned])
    clip = settle(args, [tuned])
    say_assumed(assumed(args, clip, [tuned]), [tuned])
    encoder = load_encoder(clip, tuned, device, workers=args.num_workers, batch_size=args.clip_bs)
    settings = Settings(
        flags=stored(args),
        recipe={**encoder.recipe, "clip_dim": encoder.backbone.dim},
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
    from models.routing import router_penalty
    from training.checkpoints import Checkpoints
    from training.schedule import Precision
    from training.stage2 import combiner_training

    seed_everything(seed)
    benchmark = stage.data.benchmark
    settings = stage.settings_of(seed)
    combiner = build_combiner(settings.table).to(stage.device)
    task, measured = combiner_training(
        combiner,
        stage.train,
        stage.val,
        order=dataclasses.replace(stage.data.order, seed=seed),
        learning_rate=args.combiner_lr,
        ema_decay=args.ema_decay,
        compiled=args.compile,
        loss=functools.partial(training.loss_of, args),
        negatives=args.negatives,
        penalty=router_penalty(args.load_balancing_weight, args.router_z_weight, combiner.top_k),
        measure=functools.partial(evaluate, benchmark, stage.val, block=args.similarity_block),
    )
    training.fit_as_asked(
        args,
        task,
        Checkpoints(
            folder,
            measured,
            key="Combiner",
            prefix="combiner",
            best_names=benchmark.best_combiners(),
            config=settings.on_disk(),
            kept=training.kept_weights(args),
        ),
        folder=folder,
        resumed_by=resumed_by,
        data=stage.data,
        settings=settings,
        to_validate=flags_to_validate(settings),
        precision=Precision(args.precision, stage.device),
        stop=stop,
    )


def flags_to_validate(settings: Settings) -> dict[str, str | None]:
    """Flags of `validate.py` for a Combiner, whose own path is None."""
    flags = {"combining-function": "combiner", "combiner-path": None}
    if settings.flags["clip_model_path"]:
        flags["clip-model-path"] = settings.flags["clip_model_path"]
    return flags


def train_seeds(args: Stage2, stage: Stage, folder: Path, stop: StopRequest) -> None:
    """Train a Combiner with each seed in a folder of its own, and report mean and standard deviation."""
    from runtime import distributed
    from training.run import drop_half_made, is_complete, make_folder, seed_folder

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
        report_seeds(folder, seeds, stage)


def report_seeds(folder: Path, seeds: list[int], stage: Stage) -> None:
    """Print the best validation of each seed, and mean and standard deviation of several; write them down."""
    from training.run import BEST_METRICS, best_validation, seed_folder

    benchmark = stage.data.benchmark
    chosen_by = next(iter(benchmark.selection))
    best: dict[int, dict[str, Any]] = {}
    for seed in seeds:
        best[seed] = best_validation(seed_folder(folder, seed), chosen_by)
    mean = {}
    deviation = {}
    for metric in best[seeds[0]]:
        if metric != "epoch":
            mean[metric], deviation[metric] = mean_and_deviation(
                [row[metric] for row in best.values()]
            )
    rows = {f"seed {seed}": row for seed, row in best.items()}
    summary = {"chosen_by": chosen_by, "seeds": best, "mean": mean}
    if len(seeds) > 1:
        rows["mean"] = mean
        rows["standard deviation"] = deviation
        summary["standard_deviation"] = deviation
    table = {}
    for name, row in rows.items():
        table[name] = {
            title: two_decimals(row[metric]) for metric, title in benchmark.titled(row).items()
        }
    about = f"validations with the best {chosen_by} of each seed"
    print(f"{about}\n{text_table(table)}")
    write_text(folder / "index.html", page_of_seeds(folder, best, stage))
    write_text(folder / BEST_METRICS, json.dumps(summary, indent=2) + "\n")


def page_of_seeds(folder: Path, best: Mapping[int, dict[str, Any]], stage: Stage) -> str:
    """The page of a run with several seeds.

    Args:
        best: seed -> its best validation.
    """
    from reports.curves import Panel
    from reports.run_page import seeds_page
    from training.run import read_rows, seed_folder

    about = training.about_run(stage.data, stage.settings, folder, {"combiner-path": None})
    chosen_by = about.chosen_by[0]
    names = {seed: f"seed {seed}" for seed in best}
    epochs: dict[float, dict[str, float]] = {}
    lines = {}
    for seed, row in best.items():
        lines[names[seed]] = [two_decimals(row[metric]) for metric in about.titles]
        for validation in read_rows(seed_folder(folder, seed), "validation"):
            of_seeds = epochs.setdefault(validation["epoch"], {"epoch": validation["epoch"]})
            of_seeds[names[seed]] = validation[chosen_by]
    if len(best) > 1:
        together = []
        for metric in about.titles:
            together.append(shown([row[metric] for row in best.values()]))
        lines["mean ± standard deviation"] = together
    titles = {name: name for name in names.values()}
    return seeds_page(
        about,
        folder,
        lines,
        validations=Panel(label=chosen_by, rows=list(epochs.values()), titles=titles),
        addresses={names[seed]: f"{seed_folder(folder, seed).name}/index.html" for seed in best},
    )


def train_all(args: Stage2, benchmark: Benchmark, stop: StopRequest) -> None:
    """Train a Combiner, or one with each of several seeds, in a run folder."""
    from training.run import claim_folder, run_name

    stage = prepare(args, benchmark, stop)
    name = run_name(
        "combiner_trained", benchmark.run_name, stage.settings.recipe["clip_model_name"]
    )
    folder = claim_folder(args.output_dir, name, stage.settings.on_disk(), args.resume)
    if args.seeds:
        train_seeds(args, stage, folder, stop)
    else:
        train(args, stage, args.seed, folder=folder, resumed_by=folder, stop=stop)


@command
def main(argv: list[str] | None = None) -> None:
    """Train a Combiner, or one with each of several seeds; writes a run folder under --output-dir."""
    training.carry_out(parse(argv), train_all)


if __name__ == "__main__":
    main()
