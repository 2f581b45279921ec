"""What a training lowers: losses as modules, each with the parameters of its own, by name."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime import distributed
from runtime.precision import product_type
from utils import UserError

LOGIT_SCALE = 100.0  # of the original; CLIP's own training allows no more
MOST_LOGITS = 2**24  # of queries against a bank, in memory at a time: 64 MiB


class Loss(nn.Module):
    """The loss of all processes' batches together, from the rows of this one.

    A new one is a class with a `forward` and a line in `make_loss`; its parameters are trained, saved and resumed like
    the model's.
    """

    def forward(self, queries: Tensor, targets: Tensor, target_ids: Tensor) -> Tensor:
        """Return the loss, the same on every process.

        Args:
            queries, targets: (b, D), normalised.
            target_ids: (b,) which image each target is; rows of the bank where there is one.
        """
        raise NotImplementedError

    def report(self) -> dict[str, float]:
        """Return what it has learned, for the log and the CSV files."""
        return {}


class ScaledLoss(Loss):
    """A loss over cosines times a scale, the inverse of a temperature.

    Args:
        learn_temperature: let the scale learn, from the original's 100 on and never above it, as CLIP bounds it
            (Radford et al. 2021, arXiv 2103.00020, 2.5).
    """

    def __init__(self, *, learn_temperature: bool = False) -> None:
        super().__init__()
        self.log_scale = (
            nn.Parameter(torch.tensor(math.log(LOGIT_SCALE))) if learn_temperature else None
        )

    def scale(self) -> Tensor | float:
        """Return what cosines are multiplied with."""
        if self.log_scale is None:
            return LOGIT_SCALE
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(LOGIT_SCALE))
        return self.log_scale.exp()

    def report(self) -> dict[str, float]:
        return (
            {} if self.log_scale is None else {"logit_scale": torch.as_tensor(self.scale()).item()}
        )


class ContrastiveLoss(ScaledLoss):
    """Cross entropy over the batch: row i's answer is column i, every other target is a negative.

    Args:
        symmetric: the mean of both directions, each target looking for its query too (CLIP); else the original's one.
        mask_duplicate_targets: rows of the same target are not each other's negatives, as supervised contrastive
            learning treats positives (Khosla et al. 2020, arXiv 2004.11362).
    """

    def __init__(
        self,
        *,
        symmetric: bool = False,
        mask_duplicate_targets: bool = False,
        learn_temperature: bool = False,
    ) -> None:
        super().__init__(learn_temperature=learn_temperature)
        self.symmetric = symmetric
        self.mask_duplicate_targets = mask_duplicate_targets

    def forward(self, queries: Tensor, targets: Tensor, target_ids: Tensor) -> Tensor:
        queries = distributed.gather_rows(queries)  # (B, D)
        targets = distributed.gather_rows(targets)
        # Every process computes all of it: its parameters have their gradient from each.
        scale = distributed.in_equal_parts(self.scale())
        # Never in half precision: at 100 times a cosine, bf16 has steps of a half.
        with torch.autocast(queries.device.type, enabled=False):
            exact = torch.promote_types(queries.dtype, torch.float32)
            logits = scale * queries.to(exact) @ targets.to(exact).T  # (B, B)
        answers = torch.arange(len(logits), device=logits.device)
        if self.mask_duplicate_targets:
            ids = distributed.gather_rows(target_ids)
            same = ids.unsqueeze(1) == ids  # (B, B)
            logits = logits.masked_fill(same.fill_diagonal_(False), float("-inf"))
        loss = F.cross_entropy(logits, answers)
        if self.symmetric:
            loss = (loss + F.cross_entropy(logits.T, answers)) / 2
        return loss


class BankLoss(ScaledLoss):
    """Cross entropy over a bank of frozen targets: every target but its own is a negative of a query.

    The loss is as exact as that of a batch. Its gradient's product, with probabilities and not with 100 times a cosine,
    is computed in what autocast says.

    Args:
        bank: (T, D), normalised, each target once: so no column but a query's own is of its target.
    """

    def __init__(self, bank: Tensor, *, learn_temperature: bool = False) -> None:
        super().__init__(learn_temperature=learn_temperature)
        self.bank = bank

    def forward(self, queries: Tensor, targets: Tensor, target_ids: Tensor) -> Tensor:
        learned_in = product_type(queries)
        with torch.autocast(queries.device.type, enabled=False):
            exact = torch.promote_types(queries.dtype, torch.float32)
            own_loss = _BankLoss.apply(
                queries.to(exact),
                self.bank.to(exact),
                target_ids,
                self.bank.to(learned_in),
                self.scale(),
            )
        return distributed.gather_rows(own_loss.unsqueeze(0)).mean()


class _BankLoss(torch.autograd.Function):
    """The cross entropy of `BankLoss`, a block of queries after another.

    A bank learns nothing, so the gradient of each query is made beside its loss: the bank's rows times the scale,
    weighed by the probabilities and without its own row. No more than one block's logits are ever kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        bank: Tensor,
        columns: Tensor,
        rounded_bank: Tensor,
        scale: Tensor | float,
    ) -> Tensor:
        losses = []
        gradients = []
        rows = max(1, MOST_LOGITS // len(bank))
        for block, own in zip(queries.split(rows), columns.unsqueeze(1).split(rows), strict=True):
            probabilities = F.log_softmax(scale * block @ bank.T, dim=1)  # (b, T)
            losses.append(-probabilities.gather(1, own))
            probabilities.exp_().scatter_add_(1, own, torch.full_like(losses[-1], -1))
            gradients.append(probabilities.to(rounded_bank.dtype) @ rounded_bank)
        ctx.save_for_backward(torch.cat(gradients).to(queries.dtype), queries)
        ctx.scale = scale
        return torch.cat(losses).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of_cosines, queries = ctx.saved_tensors
        of_scale = None
        if isinstance(ctx.scale, Tensor):
            of_scale = gradients[0] * (queries * of_cosines).sum() / len(queries)
        of_queries = gradients[0] * (of_cosines * (ctx.scale / len(queries)))
        return of_queries, None, None, None, of_scale


def learned_groups(learned: Iterable[nn.Parameter], loss: Loss) -> list[dict[str, Any]]:
    """Return what an optimizer takes: a model's parameters, and those of its loss, which no weight decay moves."""
    groups: list[dict[str, Any]] = [{"params": list(learned)}]
    if own := list(loss.parameters()):
        groups.append({"params": own, "weight_decay": 0.0})
    return groups


def make_loss(
    name: str, *, mask_duplicate_targets: bool, learn_temperature: bool, bank: Tensor | None = None
) -> Loss:
    """Return the loss that the flags ask for.

    Args:
        name: one of `choices.LOSSES`.
        bank: all targets (T, D), where they are every query's negatives; None where those of its batch are.

    Raises:
        UserError: the loss has no form with a bank.
    """
    if bank is not None:
        if name != "contrastive":
            raise UserError(f"--loss {name} is over a batch: leave it out, or --negatives bank")
        return BankLoss(bank, learn_temperature=learn_temperature)
    losses: dict[str, Callable[..., Loss]] = {
        "contrastive": ContrastiveLoss,
        "symmetric": functools.partial(ContrastiveLoss, symmetric=True),
    }
    return losses[name](
        mask_duplicate_targets=mask_duplicate_targets, learn_temperature=learn_temperature
    )
