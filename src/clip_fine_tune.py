"""Stage 1: fine-tune CLIP so that image feature + text feature lies near the target's image feature.

On a GPU:
    python src/clip_fine_tune.py --dataset CIRR --num-epochs 100 --clip-model-name RN50x16 --encoder both \
        --learning-rate 2e-6 --batch-size 128 --transform targetpad --target-ratio 1.25 \
        --save-training --save-best --validation-frequency 1

On a laptop, with drawn data: see `make demo`.
"""

import argparse
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW

import options
from benchmarks import BENCHMARKS, Benchmark
from clip_model import choose_trained, tokenize
from combiner import compose_sum, contrastive_loss
from data_utils import Split, TripletImages, check_images_exist, load_batches
from experiment import Checkpoints, make_tracker, open_run, plain
from features import Encoder, FrozenSplit, versions
from pair import load_encoder, settle
from retrieval import evaluate
from training import Order, Task, fit
from utils import check_writable, command, pick_device, seed_everything


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags of stage 1."""
    parents = [options.dataset_flag(), options.encoder_flags(), options.clip_flags()]
    parents += [options.training_flags(batch_size=512, validation_frequency=1), options.machine_flags()]
    return argparse.ArgumentParser(description=__doc__.splitlines()[0], parents=parents).parse_args(argv)


def triplet_batches(
    encoder: Encoder, benchmark: Benchmark, train: Split, order: Order
) -> Callable[[int], tuple[int, Iterable[list[Tensor]]]]:
    """epoch -> count and batches of reference images (B, 3, R, R), target images, caption tokens (B, 77)."""
    images = TripletImages(train, encoder.preprocess)
    tokens = torch.stack([tokenize(benchmark.caption_variants(t.captions)) for t in train.triplets])  # (T, V, 77)

    def batches(epoch: int) -> tuple[int, Iterable[list[Tensor]]]:
        chosen = order.batches(epoch)
        pixels = load_batches(images, [rows.tolist() for rows, _ in chosen], encoder.workers, encoder.device)
        texts = (tokens[rows, variants].to(encoder.device) for rows, variants in chosen)
        return len(chosen), ([*pair, text] for pair, text in zip(pixels, texts, strict=True))

    return batches


def sum_loss(encoder: Encoder) -> Callable[[list[Tensor]], Tensor]:
    """batch -> contrastive loss of the normalised sum against the normalised target."""

    def loss_of(batch: list[Tensor]) -> Tensor:
        references, targets, tokens = batch
        queries = compose_sum(encoder.model.encode_image(references), encoder.model.encode_text(tokens))
        return contrastive_loss(queries, F.normalize(encoder.model.encode_image(targets), dim=-1))

    return loss_of


def sum_validation(
    encoder: Encoder, benchmark: Benchmark, splits: list[Split], images_learn: bool
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
        return evaluate(benchmark, frozen, compose_sum)

    return validate


@command
def main(argv: list[str] | None = None) -> None:
    """Fine-tune CLIP; writes a run folder under --output-dir."""
    args = parse(argv)
    seed_everything(args.seed)
    device = pick_device(args.device)
    check_writable({"--output-dir": args.output_dir})
    tracker = make_tracker(args.api_key, args.workspace, args.experiment_name)

    benchmark = BENCHMARKS[args.dataset](args.data_root)
    train, val = benchmark.train(), benchmark.val()
    variants = len(benchmark.caption_variants(train.triplets[0].captions))
    order = Order(len(train.triplets), variants, args.batch_size, args.seed)
    check_images_exist([train, *val])

    encoder = load_encoder(settle(options.clip_choice(args), []), None, device, args.num_workers)
    learned = choose_trained(encoder.model, args.encoder)
    task = Task(
        triplet_batches(encoder, benchmark, train, order),
        sum_loss(encoder),
        AdamW(learned, lr=args.learning_rate, betas=(0.9, 0.999), eps=1e-7),
        sum_validation(encoder, benchmark, val, images_learn=args.encoder != "text"),
    )
    config = plain(vars(args) | encoder.recipe | {"versions": versions()})
    best_names = {metric: f"tuned_clip_{suffix}" for metric, suffix in benchmark.selection.items()}
    run = open_run(args.output_dir, "clip_finetuned", benchmark.run_name, tracker, config)
    module = encoder.model
    kept = Checkpoints(run, module, "CLIP", "tuned_clip", best_names, config, args.save_training, args.save_best)
    fit(task, run, kept, device, args.num_epochs, args.validation_frequency)


if __name__ == "__main__":
    main()
