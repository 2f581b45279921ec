"""Slow, plain twins written from the definitions, which the tests hold the code against."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RowLoopMoE(nn.Module):
    """The sparse MoE row by row: for each row its k experts one after the other. Parameters named as in checkpoints."""

    def __init__(self, in_dim: int, hidden_dim: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(in_dim, num_experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.Dropout(0.1)) for _ in range(num_experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for row in x:
            logits, chosen = self.router(row).topk(self.top_k)
            weights = logits.softmax(0)
            rows.append(sum(w * self.experts[e](row[None])[0] for w, e in zip(weights, chosen.tolist(), strict=True)))
        return torch.stack(rows)


class DefinedCombiner(nn.Module):
    """The MoE Combiner at evaluation, sentence by sentence from its specification."""

    def __init__(self, d: int, p: int, h: int, num_experts: int = 4, top_k: int = 2) -> None:
        super().__init__()
        self.text_projection_layer = nn.Sequential(nn.Linear(d, p), nn.LayerNorm(p))
        self.image_projection_layer = nn.Sequential(nn.Linear(d, p), nn.LayerNorm(p))
        self.attn_layer = nn.MultiheadAttention(p, 4, batch_first=True)
        self.attn_norm = nn.LayerNorm(p)
        self.moe_layer = RowLoopMoE(2 * p, h, num_experts, top_k)
        self.output_layer = nn.Linear(h, d)
        self.gate_net = nn.Sequential(nn.Linear(2 * p, h), nn.ReLU(), nn.Dropout(0.5), nn.Linear(h, d), nn.Sigmoid())

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        sequence = torch.stack([self.text_projection_layer(text).relu(), self.image_projection_layer(image).relu()], 1)
        sequence = self.attn_norm(sequence + self.attn_layer(sequence, sequence, sequence)[0])
        joint = torch.cat([sequence[:, 0], sequence[:, 1]], 1)
        gate = self.gate_net(joint)
        out = self.output_layer(self.moe_layer(joint).relu()) + gate * text + (1 - gate) * image
        return F.normalize(out, dim=-1)


def ranks_by_sorting(similarity: Tensor, targets: Tensor, excluded: Tensor | None = None) -> list[int]:
    """Each query's target's place in the stably sorted list of what may be retrieved."""
    ranks = []
    for row, (values, target) in enumerate(zip(similarity.tolist(), targets.tolist(), strict=True)):
        columns = [c for c in range(len(values)) if excluded is None or c != int(excluded[row])]
        ranks.append(sorted(columns, key=lambda c: -values[c]).index(target))
    return ranks
