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

import options
from benchmarks import BENCHMARKS, Benchmark
from clip_model import feature_dim
from combiner import build_combiner, contrastive_loss
from data_utils import check_images_exist
from experiment import Checkpoints, make_tracker, open_run, plain
from features import FeatureCache, FrozenSplit, freeze, versions
from pair import load_encoder, read_checkpoint, settle
from retrieval import evaluate, freeze_val
from training import Order, Task, fit
from utils import check_writable, command, pick_device, seed_everything


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags of stage 2."""
    parents = [options.dataset_flag(), options.frozen_flags(), options.combiner_flags(trains=True)]
    parents += [options.tuned_clip_flag(), options.clip_flags()]
    parents += [options.training_flags(batch_size=1024, validation_frequency=3), options.machine_flags()]
    return argparse.ArgumentParser(description=__doc__.splitlines()[0], parents=parents).parse_args(argv)


def feature_batches(frozen: FrozenSplit, order: Order) -> Callable[[int], tuple[int, Iterable[list[Tensor]]]]:
    """epoch -> count and batches of reference features (B, D), caption features, normalised target features."""
    device = frozen.images.device
    references, targets = frozen.split.reference_rows.to(device), frozen.split.target_rows.to(device)  # (T,)
    normalised = F.normalize(frozen.images, dim=-1)

    def batch(rows: Tensor, variants: Tensor) -> list[Tensor]:
        rows = rows.to(device)
        return [frozen.images[references[rows]], frozen.captions[rows, variants.to(device)], normalised[targets[rows]]]

    def batches(epoch: int) -> tuple[int, Iterable[list[Tensor]]]:
        chosen = order.batches(epoch)
        return len(chosen), (batch(rows, variants) for rows, variants in chosen)

    return batches


def combiner_loss(combiner: nn.Module) -> Callable[[list[Tensor]], Tensor]:
    """batch -> contrastive loss of the composed queries, dropout on."""

    def loss_of(batch: list[Tensor]) -> Tensor:
        references, captions, targets = batch
        return contrastive_loss(combiner.train()(references, captions), targets)

    return loss_of


def combiner_validation(
    combiner: nn.Module, benchmark: Benchmark, frozen: list[FrozenSplit]
) -> Callable[[], dict[str, float]]:
    """() -> metrics of the Combiner as it is, dropout off."""
    return lambda: evaluate(benchmark, frozen, combiner.eval())


@command
def main(argv: list[str] | None = None) -> None:
    """Train a Combiner; writes a run folder under --output-dir."""
    args = parse(argv)
    seed_everything(args.seed)
    device = pick_device(args.device)
    check_writable({"--output-dir": args.output_dir, "--feature-cache": args.feature_cache})
    tracker = make_tracker(args.api_key, args.workspace, args.experiment_name)

    benchmark = BENCHMARKS[args.dataset](args.data_root)
    train, val = benchmark.train(), benchmark.val()
    texts = [benchmark.caption_variants(t.captions) for t in train.triplets]
    order = Order(len(train.triplets), len(texts[0]), args.batch_size, args.seed)
    check_images_exist([train, *val])

    tuned = read_checkpoint("--clip-model-path", args.clip_model_path, "CLIP")
    encoder = load_encoder(settle(options.clip_choice(args), [tuned]), tuned, device, args.num_workers, args.clip_bs)
    config = plain(vars(args) | encoder.recipe | {"versions": versions(), "clip_dim": feature_dim(encoder.model)})
    combiner = build_combiner(config).to(device)
    cache = FeatureCache(args.feature_cache, encoder)
    frozen_train = freeze(cache, train, texts, f"{benchmark.run_name}-train")
    frozen_val = freeze_val(cache, benchmark, val)
    task = Task(
        feature_batches(frozen_train, order),
        combiner_loss(combiner),
        Adam(combiner.parameters(), lr=args.combiner_lr),
        combiner_validation(combiner, benchmark, frozen_val),
    )
    only = len(benchmark.selection) == 1  # one best checkpoint needs no suffix
    best_names = {metric: "combiner" if only else f"combiner_{s}" for metric, s in benchmark.selection.items()}
    run = open_run(args.output_dir, "combiner_trained", benchmark.run_name, tracker, config)
    kept = Checkpoints(run, combiner, "Combiner", "combiner", best_names, config, args.save_training, args.save_best)
    fit(task, run, kept, device, args.num_epochs, args.validation_frequency)


if __name__ == "__main__":
    main()
