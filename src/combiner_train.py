"""Stage 2: train a Combiner on features of a frozen CLIP, which are made once.

On a GPU:
    python src/combiner_train.py --dataset CIRR --projection-dim 2560 --hidden-dim 5120 --num-epochs 300 \
        --clip-model-name RN50x16 --clip-model-path clip_finetuned --combiner-lr 2e-5 --batch-size 4096 --clip-bs 32 \
        --transform targetpad --target-ratio 1.25 --save-training --save-best --validation-frequency 1

On a laptop, with drawn data: see `make demo`.
"""

import argparse
import dataclasses
import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from benchmarks import Benchmark
from benchmarks.metrics import mean_and_spread
from cli import options, startup
from cli.training import about_run, parse_training, start_training
from combiner import Combiner, build_combiner
from evaluation.retrieval import evaluate
from models.clip_model import feature_dim
from models.configuration import plain, read_checkpoint, settle
from models.encoder import load_encoder, versions, weights_digest
from models.features import FeatureCache, FrozenSplit, freeze, freeze_queries
from models.routing import router_penalty, router_statistics
from runtime import distributed
from runtime.files import read_json, write_text
from runtime.interruption import StopRequest, listening
from training.checkpoints import Checkpoints
from training.data import Order, TrainingData, read_training_data
from training.loop import Task, average, fit, trainable
from training.run import (
    BEST_METRICS,
    claim_folder,
    drop_half_made,
    is_complete,
    make_folder,
    open_run,
    run_name,
    started_with,
)
from training.schedule import Precision, Regime
from training.tracker import NoTracker
from utils import command, seed_everything

SCRIPT = "combiner_train.py"
logger = logging.getLogger(__name__)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags of stage 2."""
    parents = [options.dataset_flag(), options.frozen_flags(), options.combiner_flags(trains=True)]
    parents += [options.tuned_clip_flag(), options.clip_flags()]
    parents += [options.training_flags(batch_size=1024, validation_frequency=3), options.machine_flags()]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], parents=parents)
    args = parse_training(parser, SCRIPT, argv)
    if args.seeds and len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds {' '.join(map(str, args.seeds))} names a seed twice: name each once")
    return args


class ComposedFeatures(nn.Module):
    """A Combiner as stage 2 trains it: frozen features to normalised query and target, and to the router's logits."""

    def __init__(self, combiner: nn.Module, with_router: bool) -> None:
        super().__init__()
        self.combiner = combiner
        self.with_router = with_router

    def forward(self, images: Tensor, captions: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Unnormalised (b, D), (b, D) and normalised (b, D) -> queries (b, D), targets (b, D), if wanted logits (b, E).

        The logits are an output because parallel training looks only at what outputs depend on.
        """
        if self.with_router:
            queries, logits = self.combiner.routed(images, captions)
            return queries, targets, logits
        return self.combiner(images, captions), targets


def feature_batches(frozen: FrozenSplit, order: Order) -> Callable[[int, int], Iterable[tuple[list[Tensor], Tensor]]]:
    """epoch, first step -> batches of reference, caption and normalised target features (b, D); target ids (b,).

    All of it by index on the device: an epoch sends it two tables of numbers, and nothing waits.
    """
    device = frozen.images.device
    references, targets = frozen.split.reference_rows.to(device), frozen.split.target_rows.to(device)  # (T,)
    normalised = F.normalize(frozen.images, dim=-1)

    def batches(epoch: int, first_step: int = 0) -> Iterable[tuple[list[Tensor], Tensor]]:
        tables = (table[first_step:].to(device) for table in order.batches(epoch))
        for rows, variants in zip(*tables, strict=True):
            ids = targets[rows]
            yield [frozen.images[references[rows]], frozen.captions[rows, variants], normalised[ids]], ids

    return batches


def combiner_validation(
    combiner: nn.Module, benchmark: Benchmark, frozen: list[FrozenSplit], block: int | None
) -> Callable[[], dict[str, float]]:
    """() -> metrics of the Combiner as it is, dropout off."""
    return lambda: evaluate(benchmark, frozen, combiner.eval(), block)


def router_report(combiner: Combiner, frozen: list[FrozenSplit]) -> Callable[[], dict[str, float]]:
    """() -> what the router does with the validation queries of all splits, dropout off."""

    def report() -> dict[str, float]:
        combiner.eval()
        logits = [combiner.router_logits(f.images[f.split.reference_rows], f.captions[:, 0]) for f in frozen]
        return router_statistics(torch.cat(logits), combiner.moe_layer.top_k)

    return report


@dataclasses.dataclass(frozen=True)
class Stage:
    """What the Combiners of all seeds are trained on and with."""

    data: TrainingData
    train: FrozenSplit
    val: list[FrozenSplit]
    config: dict[str, Any]
    device: torch.device
    tracker: NoTracker

    def combiner_task(self, args: argparse.Namespace, combiner: nn.Module, seed: int) -> tuple[Task, nn.Module]:
        """The task of a fresh Combiner, and the module that is measured and kept: itself or its average."""
        averaged = average(combiner, args.ema_decay)
        measured = averaged.module if averaged else combiner
        is_moe = args.combiner_type == "moe"
        weights = args.load_balancing_weight, args.router_z_weight
        penalty = router_penalty(*weights, args.top_k) if is_moe else None
        task = Task(
            feature_batches(self.train, dataclasses.replace(self.data.order, seed=seed)),
            self.data.order.steps,
            trainable(ComposedFeatures(combiner, penalty is not None), self.device, args.compile, some_unused=is_moe),
            Adam(combiner.parameters(), lr=args.combiner_lr, fused=self.device.type == "cuda"),
            combiner_validation(measured, self.data.benchmark, self.val, args.similarity_block),
            combiner,
            averaged,
            penalty,
            router_report(measured, self.val) if is_moe else None,
        )
        return task, measured


def prepare(args: argparse.Namespace, stop: StopRequest) -> Stage:
    """Read the benchmark and make its features, or take them from the cache."""
    device, tracker = start_training(args)
    tuned = read_checkpoint("--clip-model-path", args.clip_model_path, "CLIP")
    data = read_training_data(startup.open_benchmark(args)[0], args.batch_size, None, args.seed)
    encoder = load_encoder(settle(options.clip_choice(args), [tuned]), tuned, device, args.num_workers, args.clip_bs)
    about = {"clip_dim": feature_dim(encoder.model), "clip_weights": weights_digest(encoder.model.state_dict())}
    config = plain(vars(args) | encoder.recipe | about | data.describe() | {"versions": versions()})
    with torch.device("meta"):
        build_combiner(config)  # refuses impossible sizes before anything is encoded
    if args.resume:
        config = started_with(args.resume, config)
    cache = FeatureCache(args.feature_cache, dataclasses.replace(encoder, between=stop.check))
    label = data.benchmark.run_name
    frozen_train = freeze(cache, data.train, data.texts, f"{label}-train")
    frozen_val = freeze_queries(cache, data.val, data.benchmark.caption, f"{label}-val")
    return Stage(data, frozen_train, frozen_val, config, device, tracker)


def train(args: argparse.Namespace, stage: Stage, seed: int, folder: Path, whole: Path, stop: StopRequest) -> None:
    """Train one Combiner in its folder.

    Args:
        whole: the folder that `--resume` takes: its own, or that of all seeds.
    """
    seed_everything(seed)
    config = stage.config | {"seed": seed, "seeds": None}
    combiner = build_combiner(config).to(stage.device)
    task, measured = stage.combiner_task(args, combiner, seed)
    selection = stage.data.benchmark.selection
    only = len(selection) == 1  # one best checkpoint needs no suffix
    best_names = {metric: "combiner" if only else f"combiner_{suffix}" for metric, suffix in selection.items()}
    kept = Checkpoints(folder, measured, "Combiner", "combiner", best_names, config, args.save_training, args.save_best)
    regime, precision = Regime.of(vars(args)), Precision(args.precision, stage.device)
    shown = {"combining-function": "combiner", "combiner-path": kept.first_choice(regime.last_validation)}
    shown |= {"clip-model-path": config["clip_model_path"]} if config["clip_model_path"] else {}
    run = open_run(folder, stage.tracker, about_run(stage.data.benchmark, config, whole, shown))
    fit(task, regime, precision, run, kept, stop, args.checkpoint_every_minutes)


def train_seeds(args: argparse.Namespace, stage: Stage, folder: Path, stop: StopRequest) -> None:
    """Train a Combiner with each seed in a folder of its own, and report mean and standard deviation."""
    if distributed.is_main():
        drop_half_made(folder)
    for seed in args.seeds:
        own = folder / f"seed_{seed}"
        if distributed.is_main() and not own.exists():
            make_folder(folder, own.name, stage.config | {"seed": seed, "seeds": None})
        distributed.wait_for_all()
        if is_complete(own):
            logger.info("seed %d is complete", seed)
        else:
            train(args, stage, seed, own, folder, stop)
    distributed.wait_for_all()
    if distributed.is_main():
        report_seeds(folder, args.seeds, stage.data.benchmark)


def report_seeds(folder: Path, seeds: list[int], benchmark: Benchmark) -> None:
    """Print the best validations of all seeds with their mean and standard deviation, and write them down."""
    chosen_by = next(iter(benchmark.selection))
    best = {seed: read_json(folder / f"seed_{seed}" / BEST_METRICS)[chosen_by] for seed in seeds}
    both = {name: mean_and_spread([row[name] for row in best.values()]) for name in best[seeds[0]] if name != "epoch"}
    mean, deviation = ({name: pair[i] for name, pair in both.items()} for i in (0, 1))
    summary = {"chosen_by": chosen_by, "seeds": best, "mean": mean, "standard_deviation": deviation}
    rows = {f"seed {seed}": row for seed, row in best.items()}
    rows |= {"mean": mean, "standard deviation": deviation}
    table = pd.DataFrame.from_dict(rows, orient="index")[list(benchmark.titles)].rename(columns=benchmark.titles)
    print(f"validations with the best {chosen_by} of each seed\n{table.to_string(float_format='%.2f')}")
    write_text(folder / BEST_METRICS, json.dumps(summary, indent=2) + "\n")


@command
def main(argv: list[str] | None = None) -> None:
    """Train a Combiner, or one with each of several seeds; writes a run folder under --output-dir."""
    args = parse(argv)
    if args.resume and is_complete(args.resume):
        logger.info("%s is complete", args.resume)
        return
    with listening() as stop:
        stage = prepare(args, stop)
        name = run_name("combiner_trained", stage.data.benchmark.run_name, stage.config["clip_model_name"])
        folder = claim_folder(args.output_dir, name, stage.config, args.resume)
        if args.seeds:
            train_seeds(args, stage, folder, stop)
        else:
            train(args, stage, args.seed, folder, folder, stop)
    distributed.stop()


if __name__ == "__main__":
    main()
