"""Set up stage 2: train a Combiner on features of a frozen CLIP."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from combiner import Combiner, Composer
from models.features import FrozenSplit
from models.routing import router_penalty, router_statistics
from runtime.gpus import GIB
from training.data import Order
from training.losses import learned_groups, make_loss
from training.negatives import HardNegatives
from training.regularisation import regularised
from training.step import Batch, Batches, Task
from utils import UserError

KEPT_PER_WEIGHT = 4  # float32 numbers: a weight, its gradient, and Adam's two averages


class ComposedFeatures(nn.Module):
    """A Combiner as stage 2 trains it: frozen features -> normalised queries and targets, and the router's logits."""

    combiner: Composer

    def __init__(self, combiner: Composer, *, with_router: bool) -> None:
        super().__init__()
        self.combiner = combiner
        self.with_router = with_router

    def forward(self, images: Tensor, captions: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Return queries (b, D), targets (b, D) and, if `with_router`, the router's logits (b, E).

        The logits are an output because `DistributedDataParallel` only finds parameters that outputs depend on.

        Args:
            images, captions: (b, D), not normalised.
            targets: (b, D), normalised; with hard negatives (b, 1 + N, D), each target followed by its negatives.
        """
        if self.with_router:
            queries, logits = self.combiner.routed(images, captions)
            return queries, targets, logits
        return self.combiner(images, captions), targets


def check_memory(combiner: nn.Module, device: torch.device) -> None:
    """Raise UserError if training a Combiner needs more memory than exists, before it takes memory from others.

    Args:
        combiner: a Combiner without data.

    Raises:
        UserError: the weights, their gradients and Adam's two averages alone exceed the memory of the machine or GPU.
    """
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:  # Windows
        return
    parameters = sum(weight.numel() for weight in combiner.parameters())
    needed = parameters * KEPT_PER_WEIGHT * 4
    if needed > memory:
        raise UserError(
            f"a Combiner of {parameters:,} parameters needs {needed / GIB:,.0f} GiB to train, but {device} has "
            f"{memory / GIB:,.0f} GiB: lower --hidden-dim, --projection-dim or --num-experts"
        )


def combiner_training(
    combiner: Composer,
    train: FrozenSplit,
    val: Sequence[FrozenSplit],
    *,
    order: Order,
    flags: Any,
    measure: Callable[[Composer], dict[str, float]],
) -> Task:
    """Return the task of stage 2.

    Args:
        flags: flags of stage 2. With `negatives`, a query's negatives are the other targets of its batch, or all
            training targets.
        measure: computes the metrics of a Combiner on the validation splits.
    """
    device = train.images.device
    negatives = None
    if flags.hard_negatives:
        negatives = HardNegatives(
            train.split,
            flags,
            seed=order.seed,
            features=lambda: train.images,
            every=flags.num_epochs,  # frozen features have the same neighbours in every epoch
        )
    targets = Targets.of(train) if negatives is None else Targets.all_images(train)
    penalty = router_penalty(
        flags.load_balancing_weight,
        flags.router_z_weight,
        combiner.top_k,
        bias=combiner.router_bias,
    )
    bank = targets.features if flags.negatives == "bank" else None
    loss = make_loss(flags, bank=bank).to(device)
    optimizer = Adam(learned_groups(combiner.parameters(), loss), lr=flags.combiner_lr, fused=True)
    if isinstance(combiner, Combiner):
        moe = combiner.moe_layer
        optimizer.register_step_post_hook(lambda *_: moe.rebalance(flags.router_bias))
    return Task(
        batches=regularised(feature_batches(train, targets, order, negatives), order, flags),
        steps=order.steps,
        model=ComposedFeatures(combiner, with_router=penalty is not None),
        module=combiner,
        loss=loss,
        optimizer=optimizer,
        validate=lambda measured: measure(measured.eval()),
        penalty=penalty,
        router=router_report(val) if combiner.has_router else None,
        negatives=negatives,
    )


@dataclass(frozen=True)
class Targets:
    """Features of the images that queries are compared with in training.

    Attributes:
        features: (T, D), normalised, each image once.
        rows: (Q,) row of each triplet's target in `features`.
    """

    features: Tensor
    rows: Tensor

    @classmethod
    def of(cls, frozen: FrozenSplit) -> "Targets":
        """Return the features of a split's targets, each image once."""
        images, rows = np.unique(frozen.split.target_rows, return_inverse=True)
        device = frozen.images.device
        features = frozen.images[torch.tensor(images, device=device)]
        return cls(F.normalize(features, dim=-1), torch.tensor(rows, device=device))

    @classmethod
    def all_images(cls, frozen: FrozenSplit) -> "Targets":
        """Return the features of all images, as any image may be a hard negative; rows are gallery rows."""
        return cls(F.normalize(frozen.images, dim=-1), frozen.target_rows)


def feature_batches(
    frozen: FrozenSplit, targets: Targets, order: Order, negatives: HardNegatives | None = None
) -> Batches:
    """Return batches of reference, caption and normalised target features (b, D), with target ids (b,).

    Target ids are rows of `targets`. With hard negatives, each target is followed by its negatives, which are also rows
    of `targets`: target features are (b, 1 + N, D) and ids (b, 1 + N). The device gathers all features by index: an
    epoch sends it two tables of indices, and no step waits.
    """

    def batches(epoch: int, first_step: int = 0) -> Iterable[Batch]:
        device = frozen.images.device
        compared = negatives.beside(targets.rows, epoch) if negatives else targets.rows
        tables = (table[first_step:].to(device) for table in order.batches(epoch))
        for rows, variants in zip(*tables, strict=True):
            references = frozen.images[frozen.reference_rows[rows]]
            ids = compared[rows]
            yield [references, frozen.captions[rows, variants], targets.features[ids]], ids

    return batches


def router_report(frozen: Sequence[FrozenSplit]) -> Callable[[Combiner], dict[str, float]]:
    """Return a function: Combiner -> statistics of its router on all validation queries, without dropout."""

    @torch.no_grad()
    def report(combiner: Combiner) -> dict[str, float]:
        combiner.eval()
        logits = [combiner.route(split.references, split.captions[:, 0]) for split in frozen]
        return router_statistics(torch.cat(logits), combiner.top_k, combiner.router_bias)

    return report
