"""Regularise training: drop the text or the image of queries, mix triplets, add noise to features.

All random numbers are drawn for the global batch, and depend only on the seed, the epoch and the step. So a resumed run
draws the same numbers, and several processes draw the same numbers as a single one.
"""

import random
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime import distributed
from training.data import Order
from training.step import Batch, Batches

MOST_IDS = 2**31  # exceeds the number of targets


def parts_kept(order: Order, epoch: int, flags: Any) -> Tensor:
    """Return whether queries of this process keep their image and their text, (steps, b, 2) bool; never neither."""
    shape = (order.steps, order.batch_size)
    drawn = torch.rand(shape, generator=order.generator(epoch, "parts"))
    no_text = drawn < flags.drop_text
    no_image = ~no_text & (drawn < flags.drop_text + flags.drop_image)
    return order.own(~torch.stack([no_image, no_text], dim=2))


def told_what_is_kept(batches: Batches, order: Order, flags: Any) -> Batches:
    """Return stage 1's batches with a fourth input: whether each query keeps its image and its text, (b, 2) bool."""
    if not flags.drop_text and not flags.drop_image:
        return batches

    def told(epoch: int, first_step: int = 0) -> Iterable[Batch]:
        kept = parts_kept(order, epoch, flags)[first_step:]
        for (inputs, ids), own_kept in zip(batches(epoch, first_step), kept, strict=True):
            yield [*inputs, own_kept.to(ids.device)], ids

    return told


def regularised(batches: Batches, order: Order, flags: Any) -> Batches:
    """Return stage 2's batches with triplets mixed, noise added to query features, and dropped query features set to 0.

    Args:
        flags: flags of stage 2.
    """
    if not any([flags.mix, flags.feature_noise, flags.drop_text, flags.drop_image]):
        return batches

    def harder(epoch: int, first_step: int = 0) -> Iterable[Batch]:
        kept = parts_kept(order, epoch, flags)[first_step:]
        seeds = torch.randint(2**62, (order.steps,), generator=order.generator(epoch, "steps"))
        steps = zip(batches(epoch, first_step), kept, seeds.tolist()[first_step:], strict=True)
        for (inputs, ids), own_kept, seed in steps:
            if flags.mix:
                inputs, ids = mixed(inputs, ids, alpha=flags.mix, seed=seed)
            references, captions, targets = inputs
            if flags.feature_noise:
                noise = torch.Generator(ids.device).manual_seed(seed)
                references = noisy(references, flags.feature_noise, noise)
                captions = noisy(captions, flags.feature_noise, noise)
            keeps_image, keeps_text = own_kept.to(ids.device).split(1, dim=1)
            yield [references * keeps_image, captions * keeps_text, targets], ids

    return harder


def mixed(
    inputs: list[Tensor], ids: Tensor, *, alpha: float, seed: int
) -> tuple[list[Tensor], Tensor]:
    """Mix each triplet with its partner in a permuted batch: mixup (Zhang et al. 2018, arXiv 1710.09412) of features.

    One mixing weight for all triplets of the step is drawn from Beta(alpha, alpha), as in the paper's code. The target
    of a mixed query is the normalised mix of both targets, and its negatives are the other mixed targets of the step.

    Args:
        inputs: reference, caption and normalised target features (b, D) of this process.
        ids: (b,) identifies the image of each target.

    Returns:
        The mixed features, and ids (b,) that are equal only for mixes of the same two targets.
    """
    share = random.Random(seed).betavariate(alpha, alpha)
    batch_size = len(ids) * distributed.world_size()
    order = torch.randperm(batch_size, generator=torch.Generator().manual_seed(seed))
    partners = order.chunk(distributed.world_size())[distributed.rank()].to(ids.device)
    both = []
    for features in inputs:
        both.append(torch.lerp(distributed.gather_rows(features)[partners], features, share))
    *query, targets = both
    return [*query, F.normalize(targets, dim=-1)], (
        ids * MOST_IDS + distributed.gather_rows(ids)[partners]
    )


def noisy(features: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Return features (b, D) plus Gaussian noise whose norm is about sigma times the norm of each feature."""
    own, width = features.shape
    shape = (distributed.world_size(), own, width)
    drawn = torch.randn(shape, generator=generator, device=features.device)[distributed.rank()]
    lengths = features.norm(dim=1, keepdim=True)
    return features + sigma / width**0.5 * lengths * drawn
