"""Define the losses, as modules with parameters of their own, and choose one by its name."""

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

LOGIT_SCALE = 100.0  # scale in the original implementation, and upper bound in CLIP's own training
MOST_LOGITS = 2**24  # maximum number of logits against a bank in memory at a time: 64 MiB


class Loss(nn.Module):
    """Loss of the global batch over all processes, computed from the rows of this process.

    To add a loss, write a class with a `forward` and a line in `make_loss`. Its parameters are trained, saved and
    resumed like the model's parameters.
    """

    def forward(self, queries: Tensor, targets: Tensor, target_ids: Tensor) -> Tensor:
        """Return the loss, which is equal on every process.

        Args:
            queries: (b, D), normalised.
            targets: (b, D), normalised; with hard negatives (b, 1 + N, D), each target followed by its negatives.
            target_ids: (b,) identifies the image of each target; with a bank, its row there. With hard negatives (b, 1
                + N), NO_ROW for a missing negative.
        """
        raise NotImplementedError

    def report(self) -> dict[str, float]:
        """Return the learned values, for the log and the CSV files."""
        return {}


class ScaledLoss(Loss):
    """Loss over cosines times a scale, the inverse of a temperature.

    Args:
        learn_temperature: learn the scale. It starts at 100, the original implementation's scale, and never exceeds it,
            as in CLIP (Radford et al. 2021, arXiv 2103.00020, 2.5).
        label_smoothing: probability that is spread evenly over all columns that are not masked, including the query's
            target (Szegedy et al. 2016, arXiv 1512.00567, 7); 0 in the original implementation.
    """

    def __init__(self, *, learn_temperature: bool = False, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.log_scale = (
            nn.Parameter(torch.tensor(math.log(LOGIT_SCALE))) if learn_temperature else None
        )
        self.label_smoothing = label_smoothing

    def scale(self) -> Tensor | float:
        """Return the factor of the cosines."""
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
    """Cross entropy over the batch: the target of row i is column i, and all other targets are its negatives.

    Hard negatives are additional columns, and are negatives for all rows except rows with the same image as target.

    Args:
        symmetric: average the losses of both directions, query to target and target to query, as CLIP does; otherwise
            use query to target alone, as the original implementation does.
        mask_duplicate_targets: do not use rows with the same target as negatives of each other, as supervised
            contrastive learning treats positives (Khosla et al. 2020, arXiv 2004.11362).
        how: arguments of `ScaledLoss`.
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
        """Return the loss of the direction target to query, within the batch."""
        return cross_entropy(logits[:, : len(logits)].T, self.label_smoothing)

    def logits(self, queries: Tensor, targets: Tensor, target_ids: Tensor) -> Tensor:
        """Return the logits of all queries (B, D) for all targets and then their hard negatives: (B, B + B * N)."""
        queries = distributed.gather_rows(queries)
        columns = distributed.gather_rows(targets)
        has_negatives = target_ids.ndim == 2
        if has_negatives:
            columns = columns.transpose(0, 1).flatten(0, 1)
        # Every process computes the whole loss, so each contributes an equal part of the scale's gradient.
        scale = distributed.in_equal_parts(self.scale())
        # Never compute logits in half precision: just below 100, bf16 values are 0.5 apart.
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
    """Return the mean cross entropy over rows, where column i is the target of row i.

    Masked logits, -inf, get no share of the smoothing.
    """
    targets = torch.arange(len(logits), device=logits.device)
    loss = F.cross_entropy(logits, targets)
    if not smoothing:
        return loss
    kept = logits.isfinite()
    log_shares = logits.log_softmax(1).masked_fill(~kept, 0)
    spread = -(log_shares.sum(1) / kept.sum(1)).mean()
    return (1 - smoothing) * loss + smoothing * spread


class BankLoss(ContrastiveLoss):
    """Cross entropy over a bank of frozen targets: all targets except a query's own target are its negatives.

    The loss is computed as precisely as the loss of a batch. Its gradient multiplies the bank by probabilities, which
    stay accurate in half precision, and not by cosines times 100, so that product is computed in autocast's precision.

    Args:
        bank: (T, D), normalised. Each target occurs once, so exactly one column contains a query's target.
        how: arguments of `ContrastiveLoss`. As there is no bank of queries, the direction target to query is computed
            within the batch, and only this direction has duplicates to mask.
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
    """The cross entropy of `BankLoss`, computed for one block of queries at a time.

    The bank is frozen, so the gradient of each query is computed together with its loss: the bank's rows times the
    scale, weighted by the probabilities, minus the target's row. Only one block's logits are in memory at a time.
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
            # Subtract the target distribution, of which smoothing gives a part to each column.
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
    """Return an optimizer's parameter groups: a model's parameters, and the loss's parameters without weight decay."""
    groups: list[dict[str, Any]] = [{"params": list(learned)}]
    if own := list(loss.parameters()):
        groups.append({"params": own, "weight_decay": 0.0})
    return groups


def make_loss(flags: Any, *, bank: Tensor | None = None) -> Loss:
    """Return the loss that the flags choose.

    Args:
        flags: flags of a training run; `loss` is one of `choices.LOSSES`.
        bank: (T, D) all training targets, if they are every query's negatives; None for the targets of the batch.
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
