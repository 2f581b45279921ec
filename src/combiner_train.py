"""Stage 2: train a Combiner on features of a frozen CLIP, which are made once.

On a GPU:
    python src/combiner_train.py --dataset CIRR --projection-dim 2560 --hidden-dim 5120 --num-epochs 300 \
        --clip-model-name RN50x16 --clip-model-path clip_finetuned --combiner-lr 2e-5 --batch-size 4096 --clip-bs 32 \
        --transform targetpad --target-ratio 1.25 --save-training --save-best --validation-frequency 1

On a laptop, with drawn data: see `make demo`.
"""

import argparse
from collections.abc import Callable, Iterable

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

import distributed
import options
from benchmarks import BENCHMARKS, Benchmark
from clip_model import feature_dim
from combiner import build_combiner
from experiment import Checkpoints, open_run, plain
from features import FeatureCache, FrozenSplit, freeze, versions, weights_digest
from pair import load_encoder, read_checkpoint, settle
from retrieval import evaluate, freeze_val
from training import Order, Precision, Regime, Task, average, fit, read_training_data, trainable
from utils import command


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags of stage 2."""
    parents = [options.dataset_flag(), options.frozen_flags(), options.combiner_flags(trains=True)]
    parents += [options.tuned_clip_flag(), options.clip_flags()]
    parents += [options.training_flags(batch_size=1024, validation_frequency=3), options.machine_flags()]
    return argparse.ArgumentParser(description=__doc__.splitlines()[0], parents=parents).parse_args(argv)


class ComposedFeatures(nn.Module):
    """A Combiner as stage 2 trains it: frozen features to normalised query and target."""

    def __init__(self, combiner: nn.Module) -> None:
        super().__init__()
        self.combiner = combiner

    def forward(self, images: Tensor, captions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Unnormalised (b, D), (b, D) and normalised (b, D) -> queries (b, D), targets (b, D)."""
        return self.combiner(images, captions), targets


def feature_batches(frozen: FrozenSplit, order: Order) -> Callable[[int], Iterable[tuple[list[Tensor], Tensor]]]:
    """epoch -> batches of reference features (b, D), caption features, normalised target features; target ids (b,).

    All of it by index on the device: an epoch sends it two tables of numbers, and nothing waits.
    """
    device = frozen.images.device
    references, targets = frozen.split.reference_rows.to(device), frozen.split.target_rows.to(device)  # (T,)
    normalised = F.normalize(frozen.images, dim=-1)

    def batches(epoch: int) -> Iterable[tuple[list[Tensor], Tensor]]:
        for rows, variants in zip(*(table.to(device) for table in order.batches(epoch)), strict=True):
            ids = targets[rows]
            yield [frozen.images[references[rows]], frozen.captions[rows, variants], normalised[ids]], ids

    return batches


def combiner_validation(
    combiner: nn.Module, benchmark: Benchmark, frozen: list[FrozenSplit], block: int | None
) -> Callable[[], dict[str, float]]:
    """() -> metrics of the Combiner as it is, dropout off."""
    return lambda: evaluate(benchmark, frozen, combiner.eval(), block)


@command
def main(argv: list[str] | None = None) -> None:
    """Train a Combiner; writes a run folder under --output-dir."""
    args = parse(argv)
    device, tracker = options.start_training(args)
    precision = Precision(args.precision, device)
    tuned = read_checkpoint("--clip-model-path", args.clip_model_path, "CLIP")
    data = read_training_data(BENCHMARKS[args.dataset](args.data_root), args.batch_size, None, args.seed)
    encoder = load_encoder(settle(options.clip_choice(args), [tuned]), tuned, device, args.num_workers, args.clip_bs)
    about = {"clip_dim": feature_dim(encoder.model), "clip_weights": weights_digest(encoder.model.state_dict())}
    config = plain(vars(args) | encoder.recipe | about | {"versions": versions()})
    combiner = build_combiner(config).to(device)
    cache = FeatureCache(args.feature_cache, encoder)
    frozen_train = freeze(cache, data.train, data.texts, f"{data.benchmark.run_name}-train")
    frozen_val = freeze_val(cache, data.benchmark, data.val)
    averaged = average(combiner, args.ema_decay)
    measured = averaged.module if averaged else combiner
    task = Task(
        feature_batches(frozen_train, data.order),
        data.order.steps,
        trainable(ComposedFeatures(combiner), device, args.compile, some_unused=args.combiner_type == "moe"),
        Adam(combiner.parameters(), lr=args.combiner_lr, fused=device.type == "cuda"),
        combiner_validation(measured, data.benchmark, frozen_val, args.similarity_block),
        combiner,
        averaged,
    )
    only = len(data.benchmark.selection) == 1  # one best checkpoint needs no suffix
    best_names = {metric: "combiner" if only else f"combiner_{s}" for metric, s in data.benchmark.selection.items()}
    run = open_run(args.output_dir, "combiner_trained", data.benchmark.run_name, tracker, config)
    kept = Checkpoints(run, measured, "Combiner", "combiner", best_names, config, args.save_training, args.save_best)
    fit(task, Regime.of(vars(args)), precision, run, kept)
    distributed.stop()


if __name__ == "__main__":
    main()
