"""One exact step of contrastive learning: the loss of the global batch, in as little memory as asked for."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from runtime import distributed
from runtime.precision import product_type
from training.schedule import Precision

LOGIT_SCALE = 100.0
MOST_LOGITS = 2**24  # of queries against a bank, in memory at a time: 64 MiB


def contrastive_loss(queries: Tensor, targets: Tensor, target_ids: Tensor | None = None) -> Tensor:
    """Cross entropy over the batch: row i's answer is column i, every other target is a negative (one direction).

    Args:
        queries, targets: (B, D), normalised.
        target_ids: (B,) image of each target; if given, rows of the same target are not each other's negatives, as
            supervised contrastive learning treats positives (Khosla et al. 2020, arXiv 2004.11362).
    """
    # Never in half precision: at 100 times a cosine, bf16 has steps of a half.
    with torch.autocast(queries.device.type, enabled=False):
        exact = torch.promote_types(queries.dtype, torch.float32)
        logits = LOGIT_SCALE * queries.to(exact) @ targets.to(exact).T  # (B, B)
    answers = torch.arange(len(logits), device=logits.device)
    if target_ids is not None:
        same = target_ids.unsqueeze(1) == target_ids  # (B, B)
        logits = logits.masked_fill(same.fill_diagonal_(False), float("-inf"))
    return F.cross_entropy(logits, answers)


def bank_loss(queries: Tensor, bank: Tensor, columns: Tensor) -> Tensor:
    """Cross entropy over a bank of frozen targets: every target but its own is a negative of a query.

    The loss is as exact as that of a batch. Its gradient's product, with probabilities and not with 100 times a cosine,
    is computed in what autocast says.

    Args:
        queries: (B, D), normalised.
        bank: (T, D), normalised, each target once: so no column but a query's own is of its target.
        columns: (B,) each query's target in the bank.
    """
    learned_in = product_type(queries)
    with torch.autocast(queries.device.type, enabled=False):
        exact = torch.promote_types(queries.dtype, torch.float32)
        return _BankLoss.apply(queries.to(exact), bank.to(exact), columns, bank.to(learned_in))


class _BankLoss(torch.autograd.Function):
    """The cross entropy of `bank_loss`, a block of queries after another.

    A bank learns nothing, so the gradient of each query is made beside its loss: 100 times the bank's rows, weighed by
    the probabilities and without its own row. No more than one block's logits are ever kept.
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, bank: Tensor, columns: Tensor, rounded_bank: Tensor
    ) -> Tensor:
        losses = []
        gradients = []
        rows = max(1, MOST_LOGITS // len(bank))
        for block, own in zip(queries.split(rows), columns.unsqueeze(1).split(rows), strict=True):
            probabilities = F.log_softmax(LOGIT_SCALE * block @ bank.T, dim=1)  # (b, T)
            losses.append(-probabilities.gather(1, own))
            probabilities.exp_().scatter_add_(1, own, torch.full_like(losses[-1], -1))
            gradients.append(probabilities.to(rounded_bank.dtype) @ rounded_bank)
        scale = LOGIT_SCALE / len(queries)
        ctx.save_for_backward(torch.cat(gradients).to(queries.dtype).mul_(scale))
        return torch.cat(losses).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (of_queries,) = ctx.saved_tensors
        return gradients[0] * of_queries, None, None, None


def global_loss(
    queries: Tensor, targets: Tensor, target_ids: Tensor | None, bank: Tensor | None = None
) -> Tensor:
    """The loss of all ranks' batches together, from this rank's rows (b, D), (b, D), (b,).

    Args:
        bank: all targets (T, D), of which `target_ids` are rows; None where those of the batch are compared.
    """
    if bank is not None:
        if target_ids is None:
            raise ValueError("which rows of the bank the targets are must be known")
        own_loss = bank_loss(queries, bank, target_ids)
        return distributed.gather_rows(own_loss.unsqueeze(0)).mean()
    ids = None if target_ids is None else distributed.gather_rows(target_ids)
    return contrastive_loss(distributed.gather_rows(queries), distributed.gather_rows(targets), ids)


def backward(
    model: nn.Module,
    inputs: list[Tensor],
    target_ids: Tensor | None,
    *,
    micro_batch: int | None,
    precision: Precision,
    scaler: torch.amp.GradScaler,
    bank: Tensor | None = None,
    penalty: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Add the gradient of the global batch's loss to the parameters; returns the loss, without penalty and graph.

    With a micro-batch the features' graph is never held for more rows than that: gradient caching (Gao et al. 2021,
    arXiv 2101.06983). Features are computed without graph, the loss gives its gradient with respect to them, and each
    chunk is encoded again with graph to carry its part on. The sum of the parts is the plain step's gradient, if
    encoding is deterministic: no dropout, no batch statistics.

    Args:
        model: inputs -> normalised queries (b, D) and targets (b, D); `distributed.parallel` has wrapped it.
        inputs: this rank's rows, (b, ...) each.
        micro_batch: rows in memory at a time, None for all.
        scaler: scales the loss; that of `precision`.
        bank: see `global_loss`.
        penalty: what is added to the loss, from a third output of the model; not with micro-batches.
    """
    if micro_batch is None or micro_batch >= len(inputs[0]):
        return _whole_step(
            model,
            inputs,
            target_ids,
            precision=precision,
            scaler=scaler,
            bank=bank,
            penalty=penalty,
        )
    chunks = list(zip(*(tensor.split(micro_batch) for tensor in inputs), strict=True))
    with torch.no_grad(), precision.autocast():
        encoded = [model(*chunk) for chunk in chunks]
    queries = torch.cat([own_queries for own_queries, _ in encoded]).requires_grad_()
    targets = torch.cat([own_targets for _, own_targets in encoded]).requires_grad_()
    with precision.autocast():
        loss = global_loss(queries, targets, target_ids, bank)
    scaled = scaler.scale(loss * distributed.world_size())  # see `_whole_step`
    # With a bank the loss does not depend on the batch's targets: their gradient is 0.
    query_gradient, target_gradient = torch.autograd.grad(
        scaled, (queries, targets), materialize_grads=True
    )
    gradients = zip(
        query_gradient.split(micro_batch), target_gradient.split(micro_batch), strict=True
    )
    for number, (chunk, chunk_gradients) in enumerate(zip(chunks, gradients, strict=True), start=1):
        is_last = number == len(chunks)
        with contextlib.nullcontext() if is_last else _unsynced(model):
            with precision.autocast():
                features = model(*chunk)
            _backward_from(features, chunk_gradients)
    return loss.detach()


def _whole_step(
    model: nn.Module,
    inputs: list[Tensor],
    target_ids: Tensor | None,
    *,
    precision: Precision,
    scaler: torch.amp.GradScaler,
    bank: Tensor | None,
    penalty: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """The plain step of `backward`, with the graph of all rows."""
    with precision.autocast():
        queries, targets, *others = model(*inputs)
        loss = global_loss(queries, targets, target_ids, bank)
        whole = loss if penalty is None else loss + penalty(*others)
    # Parallel modules average over ranks what has to be summed.
    scaler.scale(whole * distributed.world_size()).backward()
    return loss.detach()


def _backward_from(features: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Carry the loss's gradient with respect to features on to the parameters that they were made with."""
    learned = []
    learned_gradients = []
    for feature, gradient in zip(features, gradients, strict=True):
        if feature.requires_grad:
            learned.append(feature)
            learned_gradients.append(gradient)
    torch.autograd.backward(learned, learned_gradients)


def _unsynced(model: nn.Module) -> contextlib.AbstractContextManager:
    """Let a parallel module keep its gradients to itself; the last chunk shares the sum of all."""
    return (
        model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()
    )
