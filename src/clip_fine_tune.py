"""Stage 1: fine-tune CLIP so that image feature + text feature lies near the target's image feature.

On a GPU:
    python src/clip_fine_tune.py --dataset CIRR --num-epochs 100 --clip-model-name RN50x16 --encoder both \
        --learning-rate 2e-6 --batch-size 128 --transform targetpad --target-ratio 1.25 \
        --save-training --save-best --validation-frequency 1

On a laptop, with drawn data: see `make demo`.
"""

import argparse
import dataclasses
import logging
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from benchmarks import Benchmark, Split
from cli import options, startup
from cli.training import about_run, parse_training, start_training
from combiner import compose_sum
from data_utils import load_batches, normalise
from evaluation.retrieval import evaluate
from models.clip_model import CLIP, checkpoint_gradients, choose_trained, suit_to_gpu, tokenize
from models.configuration import plain, settle
from models.encoder import Encoder, load_encoder, versions
from models.features import FrozenSplit
from runtime import distributed
from runtime.interruption import StopRequest, listening
from training.checkpoints import Checkpoints
from training.data import TrainingData, TripletImages, read_training_data
from training.image_cache import open_image_cache
from training.loop import Task, average, fit, trainable
from training.run import claim_folder, is_complete, open_run, run_name, started_with
from training.schedule import Precision, Regime
from utils import command

SCRIPT = "clip_fine_tune.py"
logger = logging.getLogger(__name__)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags of stage 1."""
    parents = [options.dataset_flag(), options.encoder_flags(), options.clip_flags()]
    parents += [options.training_flags(batch_size=512, validation_frequency=1), options.machine_flags()]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], parents=parents)
    return parse_training(parser, SCRIPT, argv)


class SumFeatures(nn.Module):
    """CLIP as stage 1 trains it: reference, target and caption to normalised query and target."""

    def __init__(self, clip_model: CLIP) -> None:
        super().__init__()
        self.clip_model = clip_model

    def train(self, mode: bool = True) -> "SumFeatures":
        """Stay in eval mode whatever is asked for: BatchNorm keeps the statistics it was pretrained with."""
        return super().train(False)

    def forward(self, references: Tensor, targets: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Images (b, 3, R, R) uint8 twice, tokens (b, 77) -> queries (b, D), targets (b, D); images in one pass."""
        images = self.clip_model.encode_image(normalise(torch.cat([references, targets])))  # (2b, D)
        reference_features, target_features = images.chunk(2)
        queries = compose_sum(reference_features, self.clip_model.encode_text(tokens))
        return queries, F.normalize(target_features, dim=-1)


def triplet_batches(
    encoder: Encoder, data: TrainingData
) -> Callable[[int, int], Iterable[tuple[list[Tensor], Tensor]]]:
    """epoch, first step -> batches of reference and target images (b, 3, R, R) uint8 and caption tokens (b, 77), with
    target ids (b,)."""
    images = TripletImages(data.train, encoder.read)
    tokens = torch.stack([tokenize(variants) for variants in data.texts])  # (T, V, 77)
    targets = data.train.target_rows

    def batches(epoch: int, first_step: int = 0) -> Iterable[tuple[list[Tensor], Tensor]]:
        rows, variants = (table[first_step:] for table in data.order.batches(epoch))
        texts, ids = tokens[rows, variants].to(encoder.device), targets[rows].to(encoder.device)  # (steps, b, ...)
        pixels = load_batches(images, rows.tolist(), encoder.workers, encoder.device)
        return (([*pair, text], own) for pair, text, own in zip(pixels, texts, ids, strict=True))

    return batches


def sum_validation(
    encoder: Encoder, benchmark: Benchmark, splits: list[Split], images_learn: bool, block: int | None
) -> Callable[[], dict[str, float]]:
    """() -> metrics of the sum. Galleries are encoded anew each time, or once, now, if the image encoder is frozen."""

    def encode_galleries() -> list[Tensor]:
        return [encoder.images(split.paths, f"{split.name} images") for split in splits]

    fixed = None if images_learn else encode_galleries()

    def validate() -> dict[str, float]:
        frozen = []
        for split, gallery in zip(splits, fixed or encode_galleries(), strict=True):
            captions = encoder.captions([benchmark.caption(t.captions) for t in split.triplets])
            frozen.append(FrozenSplit(split, gallery, captions.unsqueeze(1)))
        return evaluate(benchmark, frozen, compose_sum, block)

    return validate


def load_stage(args: argparse.Namespace, splits: list[Split], device: torch.device, stop: StopRequest) -> Encoder:
    """CLIP as the flags want it, with its images decoded or from the cache."""
    encoder = load_encoder(settle(options.clip_choice(args), []), None, device, args.num_workers)
    encoder = dataclasses.replace(encoder, between=stop.check)
    suit_to_gpu(encoder.model, device)
    if args.gradient_checkpointing:
        checkpoint_gradients(encoder.model)
    if args.image_cache is None:
        return encoder
    paths = list(dict.fromkeys(path for split in splits for path in split.paths))
    cached = open_image_cache(args.image_cache, paths, encoder.read, encoder.image_recipe(), args.num_workers)
    return dataclasses.replace(encoder, read=cached)


def train(args: argparse.Namespace, stop: StopRequest) -> None:
    """Fine-tune CLIP in a run folder."""
    device, tracker = start_training(args)
    precision = Precision(args.precision, device)
    data = read_training_data(startup.open_benchmark(args)[0], args.batch_size, args.micro_batch_size, args.seed)
    encoder = load_stage(args, [data.train, *data.val], device, stop)
    config = plain(vars(args) | encoder.recipe | data.describe() | {"versions": versions()})
    if args.resume:
        config = started_with(args.resume, config)

    learned = choose_trained(encoder.model, args.encoder)
    averaged = average(encoder.model, args.ema_decay)
    measured = dataclasses.replace(encoder, model=averaged.module if averaged else encoder.model)
    task = Task(
        triplet_batches(encoder, data),
        data.order.steps,
        trainable(SumFeatures(encoder.model), device, args.compile),
        AdamW(learned, lr=args.learning_rate, betas=(0.9, 0.999), eps=1e-7, fused=device.type == "cuda"),
        sum_validation(measured, data.benchmark, data.val, args.encoder != "text", args.similarity_block),
        encoder.model,
        averaged,
    )
    name = run_name("clip_finetuned", data.benchmark.run_name, config["clip_model_name"])
    folder = claim_folder(args.output_dir, name, config, args.resume)
    best_names = {metric: f"tuned_clip_{suffix}" for metric, suffix in data.benchmark.selection.items()}
    saving = args.save_training, args.save_best
    kept = Checkpoints(folder, measured.model, "CLIP", "tuned_clip", best_names, config, *saving)
    regime = Regime.of(vars(args))
    shown = {"combining-function": "sum", "clip-model-path": kept.first_choice(regime.last_validation)}
    run = open_run(folder, tracker, about_run(data.benchmark, config, folder, shown))
    fit(task, regime, precision, run, kept, stop, args.checkpoint_every_minutes)


@command
def main(argv: list[str] | None = None) -> None:
    """Fine-tune CLIP; writes a run folder under --output-dir."""
    args = parse(argv)
    if args.resume and is_complete(args.resume):
        logger.info("%s is complete", args.resume)
        return
    with listening() as stop:
        train(args, stop)
    distributed.stop()


if __name__ == "__main__":
    main()
