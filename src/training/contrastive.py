"""One exact step of contrastive learning: the loss of the global batch, in as little memory as asked for."""

import contextlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from runtime import distributed
from training.schedule import Precision

LOGIT_SCALE = 100.0


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


def global_loss(queries: Tensor, targets: Tensor, target_ids: Tensor | None) -> Tensor:
    """The loss of all ranks' batches together, from this rank's rows (b, D), (b, D), (b,)."""
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
        penalty: what is added to the loss, from a third output of the model; not with micro-batches.
    """
    if micro_batch is None or micro_batch >= len(inputs[0]):
        return _whole_step(
            model, inputs, target_ids, precision=precision, scaler=scaler, penalty=penalty
        )
    chunks = list(zip(*(tensor.split(micro_batch) for tensor in inputs), strict=True))
    with torch.no_grad(), precision.autocast():
        encoded = [model(*chunk) for chunk in chunks]
    queries = torch.cat([own_queries for own_queries, _ in encoded]).requires_grad_()
    targets = torch.cat([own_targets for _, own_targets in encoded]).requires_grad_()
    with precision.autocast():
        loss = global_loss(queries, targets, target_ids)
    scaled = scaler.scale(loss * distributed.world_size())  # see `_whole_step`
    query_gradient, target_gradient = torch.autograd.grad(scaled, (queries, targets))
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
    penalty: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """The plain step of `backward`, with the graph of all rows."""
    with precision.autocast():
        queries, targets, *others = model(*inputs)
        loss = global_loss(queries, targets, target_ids)
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
