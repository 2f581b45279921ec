"""What a sparse mixture's router does, in numbers, and two losses that steer it. Logits are (B, E), k experts a row."""

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime import distributed


def load_balancing_loss(logits: Tensor, top_k: int) -> Tensor:
    """E times the sum over experts of (share of assignments) x (mean router probability); 1 where both are even.

    Fedus et al. 2021 (arXiv 2101.03961), equations 4 to 6, for k = 1; with k experts a row, shares are of the B k
    assignments. Only the probabilities have a gradient.
    """
    experts = logits.shape[1]
    shares = F.one_hot(logits.topk(top_k).indices, experts).sum(1).float().mean(0) / top_k  # (E,)
    return experts * (shares * logits.float().softmax(-1).mean(0)).sum()


def router_z_loss(logits: Tensor) -> Tensor:
    """Mean square of the log-sum-exp of the logits (ST-MoE, Zoph et al. 2022, arXiv 2202.08906, equation 5)."""
    return logits.float().logsumexp(-1).square().mean()


def router_penalty(load_balancing_weight: float, z_weight: float, top_k: int) -> Callable[[Tensor], Tensor] | None:
    """This rank's logits (b, E) -> the weighted sum of both losses over the global batch.

    None where both weigh 0, and without a mixture (top_k 0).
    """
    if top_k == 0 or not (load_balancing_weight or z_weight):
        return None

    def penalty(logits: Tensor) -> Tensor:
        everybodys = distributed.gather_rows(logits)  # (B, E)
        balance = load_balancing_weight * load_balancing_loss(everybodys, top_k)
        return balance + z_weight * router_z_loss(everybodys)

    return penalty


def router_statistics(logits: Tensor, top_k: int) -> dict[str, float]:
    """How rows spread over the experts.

    Returns:
        `expert{i}_share`: share of the rows that go to expert i, these sum to k; `expert{i}_weight`: its mean weight
        over all rows, these sum to 1; `load_entropy`: of the shares over k, from 0, all rows to the same expert, to 1,
        evenly; `row_entropy`: mean of the entropies of the rows' k weights, from 0 to 1; `experts{i}+{j}_rows`: rows
        that both get.
    """
    rows, experts = logits.shape
    values, chosen = logits.float().topk(top_k)
    weights = values.softmax(-1)  # (B, k)
    taken = F.one_hot(chosen, experts).sum(1).float()  # (B, E) of 0 and 1
    shares = taken.mean(0)
    weight = torch.zeros(experts, device=logits.device).index_add_(0, chosen.flatten(), weights.flatten()) / rows
    together = (taken.T @ taken).long().tolist()  # (E, E)
    statistics = {f"expert{i}_share": share for i, share in enumerate(shares.tolist())}
    statistics |= {f"expert{i}_weight": value for i, value in enumerate(weight.tolist())}
    statistics["load_entropy"] = _entropy(shares[None] / top_k)
    statistics["row_entropy"] = _entropy(weights)
    pairs = itertools.combinations(range(experts), 2)
    return statistics | {f"experts{i}+{j}_rows": together[i][j] for i, j in pairs}


def _entropy(distributions: Tensor) -> float:
    """Mean entropy of distributions (n, m) in units of the even one's, 0 where there is nothing to choose."""
    if distributions.shape[1] == 1:
        return 0.0
    return float(torch.special.entr(distributions).sum(1).mean()) / math.log(distributions.shape[1])
