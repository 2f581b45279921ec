"""Set up stage 1: fine-tune CLIP so that image feature + text feature is near the target's image feature."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from benchmarks.splits import all_paths
from combiner import compose_sum
from data_utils import ImageLoader
from models.backbone import Backbone, choose_trained
from models.encoder import Encoder
from models.features import FrozenSplit
from runtime.choices import AUTO, MINED
from settings.groups import Lora
from training.augmentation import augmented
from training.data import TrainingData
from training.image_cache import PIXELS, ImageCache
from training.losses import learned_groups, make_loss
from training.negatives import HardNegatives
from training.regularisation import told_what_is_kept
from training.step import Batch, Batches, Task


class SumFeatures(nn.Module):
    """CLIP as stage 1 trains it: reference, target and caption -> normalised query and target features."""

    def __init__(self, clip_model: Any, backbone: Backbone) -> None:
        super().__init__()
        self.clip_model = clip_model
        self.normalise = backbone.normalise

    def train(self, mode: bool = True) -> "SumFeatures":
        """Stay in evaluation mode for any `mode`: BatchNorm keeps its pretrained statistics, and dropout is off."""
        return super().train(False)

    def forward(
        self, references: Tensor, targets: Tensor, tokens: Tensor, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode images (b, 3, R, R) uint8 and tokens (b, L) to queries (b, D) and targets (b, D).

        References and targets are encoded in one pass. With hard negatives, each target is followed by its negatives:
        the images are (b, 1 + N, 3, R, R), and the features (b, 1 + N, D).

        Args:
            kept: (b, 2) whether a query keeps its image and its text; None to keep both in all queries.
        """
        pixels = self.normalise(torch.cat([references, targets.flatten(0, -4)]))
        images = self.clip_model.encode_image(pixels)  # (2b, D), or (2b + b * N, D)
        reference_features, target_features = images.tensor_split([len(references)])
        text_features = self.clip_model.encode_text(tokens)
        if kept is not None:
            reference_features = reference_features * kept[:, :1]
            text_features = text_features * kept[:, 1:]
        queries = compose_sum(reference_features, text_features)
        return queries, F.normalize(target_features, dim=-1).unflatten(0, targets.shape[:-3])


def fine_tuning(
    encoder: Encoder,
    data: TrainingData,
    flags: Any,
    measure: Callable[[list[FrozenSplit]], dict[str, float]],
) -> Task:
    """Return the task of stage 1.

    Args:
        flags: flags of stage 1.
        measure: computes the metrics of the sum from the features of the validation splits.
    """
    model = encoder.model
    loss = make_loss(flags).to(encoder.device)
    negatives = None
    if flags.hard_negatives:
        negatives = HardNegatives(
            data.train,
            flags,
            seed=data.order.seed,
            features=lambda: encoder.images(data.train.paths, "training images"),
            every=flags.mine_every if flags.encoder != "text" else flags.num_epochs,
        )
    images_each = 2 + (negatives.number if negatives else 0)
    learned = learned_groups(choose_trained(model, flags.encoder, Lora.of(flags)), loss)
    # A compiled step is recompiled for each number of token columns.
    batches = triplet_batches(encoder, data, negatives, trim=not flags.compile)
    batches = augmented(batches, data, flags, images_each)
    return Task(
        batches=told_what_is_kept(batches, data.order, flags),
        steps=data.order.steps,
        model=SumFeatures(model, encoder.backbone),
        module=model,
        loss=loss,
        optimizer=AdamW(learned, lr=flags.learning_rate, betas=(0.9, 0.999), eps=1e-7, fused=True),
        validate=sum_validation(
            encoder, data, images_learn=flags.encoder != "text", measure=measure
        ),
        micro_batch=flags.micro_batch_size,
        negatives=negatives,
        images_each=images_each,
    )


def triplet_batches(
    encoder: Encoder,
    data: TrainingData,
    negatives: HardNegatives | None = None,
    *,
    trim: bool = True,
) -> Batches:
    """Return batches of reference and target images (b, 3, R, R) uint8, caption tokens (b, L) and target ids (b,).

    Args:
        negatives: hard negatives to add after each target, so that targets are (b, 1 + N, 3, R, R) and ids (b, 1 + N).
        trim: remove the padding columns after the longest caption of a batch if they do not affect features.
    """
    paths = data.train.paths
    reference_rows = torch.tensor(data.train.reference_rows)  # (T,)
    target_rows = torch.tensor(data.train.target_rows)  # (T,)
    texts = list(itertools.chain.from_iterable(data.texts))
    tokenizer = encoder.backbone.tokenizer
    tokens = tokenizer(texts)  # (T * V, L)
    tokenizer.warn_of_cuts(texts, tokens)
    tokens = tokens.unflatten(0, (len(data.texts), -1))

    def batches(epoch: int, first_step: int = 0) -> Iterable[Batch]:
        rows, variants = (table[first_step:] for table in data.order.batches(epoch))  # (steps, b)
        captions = tokens[rows, variants]  # (steps, b, L)
        columns = tokenizer.columns(captions) if trim else [tokenizer.context] * len(captions)
        captions = captions.to(encoder.device)
        compared = negatives.beside(target_rows, epoch) if negatives else target_rows
        compared = compared[rows]  # (steps, b), or (steps, b, 1 + N)
        ids = compared.to(encoder.device)
        images = torch.cat([reference_rows[rows], compared.flatten(1)], 1)  # (steps, 2b + b * N)
        files = []
        for step in images.tolist():
            # NO_ROW, -1, reads any image, which the loss masks.
            files.append([paths[row] for row in step])
        pixels = encoder.loader.batches(files)
        steps = zip(pixels, captions, columns, ids, strict=True)
        for both, own_captions, own_columns, own_ids in steps:
            references, targets = both.tensor_split([len(own_captions)])
            targets = targets.unflatten(0, own_ids.shape)
            yield [references, targets, own_captions[:, :own_columns]], own_ids

    return batches


def sum_validation(
    encoder: Encoder,
    data: TrainingData,
    *,
    images_learn: bool,
    measure: Callable[[list[FrozenSplit]], dict[str, float]],
) -> Callable[[nn.Module], dict[str, float]]:
    """Return a function: CLIP -> metrics of the sum.

    It encodes the galleries each time; if the image encoder is frozen, they are encoded once, now.
    """

    def galleries_of(encoder: Encoder) -> list[Tensor]:
        return [encoder.images(split.paths, f"{split.name} images") for split in data.val]

    kept = None if images_learn else galleries_of(encoder)
    tables_of_splits: list[dict[str, Tensor]] = [{} for _ in data.val]
    texts_of_splits: list[list[str]] = []
    for split in data.val:
        texts = [data.benchmark.caption(triplet.captions) for triplet in split.triplets]
        encoder.warn_of_cuts(texts)
        texts_of_splits.append(texts)

    def validate(model: nn.Module) -> dict[str, float]:
        measured = dataclasses.replace(encoder, model=model)
        galleries = kept if kept is not None else galleries_of(measured)
        frozen = []
        parts = zip(data.val, galleries, texts_of_splits, tables_of_splits, strict=True)
        for split, images, texts, tables in parts:
            captions = measured.captions(texts).unsqueeze(1)
            frozen.append(FrozenSplit(split=split, images=images, captions=captions, tables=tables))
        return measure(frozen)

    return validate


def decodings(data: TrainingData, flags: Any) -> int:
    """Count the image decodings of a training run: in steps, in mining and in validations."""
    each = 2 + flags.hard_negatives  # reference and target
    in_steps = flags.num_epochs * data.order.steps * data.order.batch_size * each
    images_learn = flags.encoder != "text"
    validations = len(flags.validated_epochs) if images_learn else 1
    minings = 0
    if flags.hard_negatives and flags.hard_negatives_from == MINED:
        minings = math.ceil(flags.num_epochs / flags.mine_every) if images_learn else 1
    in_minings = minings * len(data.train.paths)
    return in_steps + in_minings + validations * sum(len(split.paths) for split in data.val)


def with_image_cache(encoder: Encoder, data: TrainingData, flags: Any) -> Encoder:
    """Return the encoder with images from a cache, which is filled first if it does not exist.

    Args:
        flags: `image_cache` is a folder, None for no cache, or AUTO for the project's folder if a cache is worth it.
    """
    folder = flags.image_cache
    if folder is None:
        return encoder
    cache = ImageCache(
        folder=PIXELS if folder == AUTO else Path(folder),
        paths=all_paths(data.splits),
        read=encoder.loader.read,
        preprocessing=encoder.image_preprocessing(),
        workers=encoder.loader.workers,
        between=encoder.between,
        told_by="content" if data.verify else "sample",
    )
    cached = cache.open_if_it_repays(decodings(data, flags)) if folder == AUTO else cache.open()
    if cached is None:
        return encoder
    loader = ImageLoader(cached, encoder.loader.workers, encoder.device)
    return dataclasses.replace(encoder, loader=loader)
