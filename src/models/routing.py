"""Statistics of a sparse mixture's router, and two losses that regularise it.

Logits are (B, E), for B rows and E experts. A row goes to the k experts with its largest logits,
after a bias (E,) is added if the router has one, see `combiner.choose`.
"""

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from combiner import choose
from runtime import distributed


def load_balancing_loss(logits: Tensor, top_k: int, bias: Tensor | None = None) -> Tensor:
    """Return E times the sum over experts of (fraction of assignments) x (mean router probability).

    The loss is 1 if both are uniform. For k = 1 it is the loss of Fedus et al. 2021 (arXiv
    2101.03961), equations 4 to 6. For larger k, there are B k assignments. Only the probabilities
    have a gradient.
    """
    experts = logits.shape[1]
    _, chosen = choose(logits, top_k, bias)  # (B, k)
    assigned = F.one_hot(chosen, experts).sum(1)  # (B, E) of 0 and 1
    shares = assigned.float().mean(0) / top_k  # (E,)
    probabilities = logits.float().softmax(-1).mean(0)  # (E,)
    return experts * (shares * probabilities).sum()


def router_z_loss(logits: Tensor) -> Tensor:
    """Return the mean square of the logits' log-sum-exp (Zoph et al. 2022, arXiv 2202.08906, equation 5)."""
    return logits.float().logsumexp(-1).square().mean()


def router_penalty(
    load_balancing_weight: float, z_weight: float, top_k: int, *, bias: Tensor | None = None
) -> Callable[[Tensor], Tensor] | None:
    """Return a function that maps this process's logits (b, E) to the weighted sum of both losses on the global batch.

    Return None if both weights are 0, or without a mixture (top_k 0).
    """
    if top_k == 0 or not (load_balancing_weight or z_weight):
        return None

    def penalty(logits: Tensor) -> Tensor:
        gathered = distributed.gather_rows(logits)  # (B, E)
        balance = load_balancing_weight * load_balancing_loss(gathered, top_k, bias)
        return balance + z_weight * router_z_loss(gathered)

    return penalty


def router_statistics(logits: Tensor, top_k: int, bias: Tensor | None = None) -> dict[str, float]:
    """Compute statistics of the load of the experts.

    Returns:
        expert{i}_share: fraction of the rows that go to expert i; the fractions sum to k.
        expert{i}_weight: mean weight of expert i over all rows; the weights sum to 1.
        load_entropy: entropy of the fractions, divided by its maximum; 1 if all experts get equally
            many rows.
        row_entropy: entropy of a row's k weights, from 0 to 1, averaged over the rows.
        experts{i}+{j}_rows: number of rows that go to both experts.
    """
    rows, experts = logits.shape
    values, chosen = choose(logits.float(), top_k, bias)
    weights = values.softmax(-1)  # (B, k)
    assigned = F.one_hot(chosen, experts).sum(1).float()  # (B, E) of 0 and 1
    shares = assigned.mean(0)  # (E,)
    total_weights = torch.zeros(experts, device=logits.device)
    total_weights.index_add_(0, chosen.flatten(), weights.flatten())
    mean_weights = total_weights / rows  # (E,)
    rows_of_both = (assigned.T @ assigned).long().tolist()  # (E, E)
    statistics = {f"expert{expert}_share": share for expert, share in enumerate(shares.tolist())}
    for expert, weight in enumerate(mean_weights.tolist()):
        statistics[f"expert{expert}_weight"] = weight
    statistics["load_entropy"] = _entropy(shares[None] / top_k)
    statistics["row_entropy"] = _entropy(weights)
    for first, second in itertools.combinations(range(experts), 2):
        statistics[f"experts{first}+{second}_rows"] = rows_of_both[first][second]
    return statistics


def _entropy(distributions: Tensor) -> float:
    """Return the mean entropy of distributions (n, m), divided by the entropy of the uniform one; 0 if m is 1."""
    choices = distributions.shape[1]
    if choices == 1:
        return 0.0
    entropy = float(torch.special.entr(distributions).sum(1).mean())
    return entropy / math.log(choices)
