"""Define the losses as modules, each with its own parameters, by name."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.splits import NO_ROW
from runtime import distributed
from runtime.precision import product_type

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
            queries: (b, D), normalised.
            targets: (b, D), normalised; with hard negatives (b, 1 + N, D), each target before its own.
            target_ids: (b,) which image each target is, rows of the bank where there is one; with hard negatives
                (b, 1 + N), NO_ROW in place of one that is missing.
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
        label_smoothing: share of the answer that is spread evenly over all columns that are not masked, the own one
            among them (Szegedy et al. 2016, arXiv 1512.00567, 7); 0 of the original.
    """

    def __init__(self, *, learn_temperature: bool = False, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.log_scale = (
            nn.Parameter(torch.tensor(math.log(LOGIT_SCALE))) if learn_temperature else None
        )
        self.label_smoothing = label_smoothing

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

    Hard negatives are further columns, for all rows but those whose own target they are.

    Args:
        symmetric: the mean of both directions, each target looking for its query too (CLIP); else the original's one.
        mask_duplicate_targets: rows of the same target are not each other's negatives, as supervised contrastive
            learning treats positives (Khosla et al. 2020, arXiv 2004.11362).
        how: of `ScaledLoss`.
    """

    def __init__(
        self, *, symmetric: bool = False, mask_duplicate_targets: bool = False, **how: Any
    ) -> None:
        super().__init__(**how)
        self.symmetric = symmetric
        self.mask_duplicate_targets = mask_duplicate_targets

    def forward(self, queries: Tensor, targets: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.logits(queries, targets, target_ids)
        loss = cross_entropy(logits, self.label_smoothing)
        return (loss + self.backwards(logits)) / 2 if self.symmetric else loss

    def backwards(self, logits: Tensor) -> Tensor:
        """The loss of the batch's targets, each of which looks for its query among the batch's."""
        return cross_entropy(logits[:, : len(logits)].T, self.label_smoothing)

    def logits(self, queries: Tensor, targets: Tensor, target_ids: Tensor) -> Tensor:
        """Compare all queries (B, D) with all targets, then with their hard negatives: (B, B + B * N)."""
        queries = distributed.gather_rows(queries)
        columns = distributed.gather_rows(targets)
        has_negatives = target_ids.ndim == 2
        if has_negatives:
            columns = columns.transpose(0, 1).flatten(0, 1)
        # Every process computes all of it: its parameters have their gradient from each.
        scale = distributed.in_equal_parts(self.scale())
        # Never in half precision: at 100 times a cosine, bf16 has steps of a half.
        with torch.autocast(queries.device.type, enabled=False):
            exact = torch.promote_types(queries.dtype, torch.float32)
            logits = scale * queries.to(exact) @ columns.to(exact).T
        if not self.mask_duplicate_targets and not has_negatives:
            return logits
        ids = distributed.gather_rows(target_ids).t().flatten()
        rows = len(queries)
        masked = ids[:rows].unsqueeze(1) == ids
        if not self.mask_duplicate_targets:
            masked[:, :rows] = False
        masked.fill_diagonal_(False).logical_or_(ids == NO_ROW)
        return logits.masked_fill(masked, float("-inf"))


def cross_entropy(logits: Tensor, smoothing: float) -> Tensor:
    """The mean over rows, row i's answer being column i. What is masked, -inf, has no share of the smoothing."""
    answers = torch.arange(len(logits), device=logits.device)
    loss = F.cross_entropy(logits, answers)
    if not smoothing:
        return loss
    kept = logits.isfinite()
    log_shares = logits.log_softmax(1).masked_fill(~kept, 0)
    spread = -(log_shares.sum(1) / kept.sum(1)).mean()
    return (1 - smoothing) * loss + smoothing * spread


class BankLoss(ContrastiveLoss):
    """Cross entropy over a bank of frozen targets: every target but its own is a negative of a query.

    The loss is as exact as that of a batch. Its gradient's product, with probabilities and not with 100 times a cosine,
    is computed in what autocast says.

    Args:
        bank: (T, D), normalised, each target once: so no column but a query's own is of its target.
        how: of `ContrastiveLoss`. There is no bank of queries, so the other direction is that of the batch, and it
            alone has duplicates to mask.
    """

    def __init__(self, bank: Tensor, **how: Any) -> None:
        super().__init__(**how)
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
                self.label_smoothing,
            )
        loss = distributed.gather_rows(own_loss.unsqueeze(0)).mean()
        if not self.symmetric:
            return loss
        return (loss + self.backwards(self.logits(queries, targets, target_ids))) / 2


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
        smoothing: float,
    ) -> Tensor:
        losses = []
        gradients = []
        rows = max(1, MOST_LOGITS // len(bank))
        for block, own in zip(queries.split(rows), columns.unsqueeze(1).split(rows), strict=True):
            probabilities = F.log_softmax(scale * block @ bank.T, dim=1)  # (b, T)
            losses.append((smoothing - 1) * probabilities.gather(1, own))
            if smoothing:
                losses[-1] -= smoothing * probabilities.mean(1, keepdim=True)
            # Minus the answer, of which each column has its share.
            probabilities.exp_().scatter_add_(1, own, torch.full_like(losses[-1], smoothing - 1))
            if smoothing:
                probabilities -= smoothing / len(bank)
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
        return of_queries, None, None, None, of_scale, None


def learned_groups(learned: Iterable[nn.Parameter], loss: Loss) -> list[dict[str, Any]]:
    """Return what an optimizer takes: a model's parameters, and those of its loss, which no weight decay moves."""
    groups: list[dict[str, Any]] = [{"params": list(learned)}]
    if own := list(loss.parameters()):
        groups.append({"params": own, "weight_decay": 0.0})
    return groups


def make_loss(flags: Any, *, bank: Tensor | None = None) -> Loss:
    """Return the loss that the flags choose.

    Args:
        flags: of a training; `loss` is one of `choices.LOSSES`.
        bank: all targets (T, D), where they are every query's negatives; None where those of its batch are.
    """
    form = ContrastiveLoss if bank is None else functools.partial(BankLoss, bank)
    losses: dict[str, Callable[..., Loss]] = {
        "contrastive": form,
        "symmetric": functools.partial(form, symmetric=True),
    }
    return losses[flags.loss](
        mask_duplicate_targets=flags.mask_duplicate_targets,
        learn_temperature=flags.learn_temperature,
        label_smoothing=flags.label_smoothing,
    )
