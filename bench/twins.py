"""Slow reference implementations, written from the definitions, with which tests and benchmarks compare the code."""

import io
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from combiner import NO_PARTS, Parts
from models.clip_model import tokenize


class RowLoopMoE(nn.Module):
    """Sparse MoE that loops over rows, and over each row's k experts. Parameters are named as in checkpoints.

    With `parts`, the router normalises its input, a bias affects only the choice of experts, and a shared expert is
    added.
    """

    def __init__(
        self, in_dim: int, hidden_dim: int, num_experts: int, top_k: int, parts: Parts = NO_PARTS
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.parts = parts
        if parts.router_norm:
            self.router_norm = nn.LayerNorm(in_dim)
        self.router = nn.Linear(in_dim, num_experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.Dropout(0.1))
            for _ in range(num_experts)
        )
        if parts.router_bias:
            self.router_bias = nn.Parameter(torch.zeros(num_experts))
        if parts.shared_expert:
            self.shared_expert = nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for row in x:
            logits = self.router(self.router_norm(row) if self.parts.router_norm else row)
            scores = (logits + self.router_bias if self.parts.router_bias else logits).tolist()
            chosen = sorted(range(len(scores)), key=lambda e: -scores[e])[: self.top_k]
            weights = logits[chosen].softmax(0)
            outputs = [w * self.experts[e](row) for w, e in zip(weights, chosen, strict=True)]
            if self.parts.shared_expert:
                outputs.append(self.shared_expert(row))
            rows.append(sum(outputs))
        return torch.stack(rows)


class ExpertLoopMoE(RowLoopMoE):
    """Sparse MoE in the usual way: a loop over experts, whose outputs are added in place to the rows' results."""

    def forward(self, x: Tensor) -> Tensor:
        logits, chosen = self.router(x).topk(self.top_k, dim=-1)
        weights = logits.softmax(-1)
        total = x.new_zeros(len(x), self.experts[0][0].out_features)
        for number, expert in enumerate(self.experts):
            rows, places = (chosen == number).nonzero(as_tuple=True)
            mixed = weights[rows, places, None] * expert(x[rows])
            total.index_add_(0, rows, mixed.to(total.dtype))
        return total


class DefinedCombiner(nn.Module):
    """The MoE Combiner in evaluation, written directly from its specification."""

    def __init__(self, d: int, p: int, h: int, num_experts: int = 4, top_k: int = 2) -> None:
        super().__init__()
        self.text_projection_layer = nn.Sequential(nn.Linear(d, p), nn.LayerNorm(p))
        self.image_projection_layer = nn.Sequential(nn.Linear(d, p), nn.LayerNorm(p))
        self.attn_layer = nn.MultiheadAttention(p, 4, batch_first=True)
        self.attn_norm = nn.LayerNorm(p)
        self.moe_layer = RowLoopMoE(2 * p, h, num_experts, top_k)
        self.output_layer = nn.Linear(h, d)
        self.gate_net = nn.Sequential(
            nn.Linear(2 * p, h), nn.ReLU(), nn.Dropout(0.5), nn.Linear(h, d), nn.Sigmoid()
        )

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        sequence = torch.stack(
            [self.text_projection_layer(text).relu(), self.image_projection_layer(image).relu()], 1
        )
        sequence = self.attn_norm(sequence + self.attn_layer(sequence, sequence, sequence)[0])
        joint = torch.cat([sequence[:, 0], sequence[:, 1]], 1)
        gate = self.gate_net(joint)
        out = self.output_layer(self.moe_layer(joint).relu()) + gate * text + (1 - gate) * image
        return F.normalize(out, dim=-1)


class DefinedPlainCombiner(nn.Module):
    """CLIP4Cir's Combiner in evaluation, written directly from its paper."""

    def __init__(self, d: int, p: int, h: int) -> None:
        super().__init__()
        self.text_projection_layer = nn.Linear(d, p)
        self.image_projection_layer = nn.Linear(d, p)
        self.combiner_layer = nn.Linear(2 * p, h)
        self.output_layer = nn.Linear(h, d)
        self.dynamic_scalar = nn.Sequential(
            nn.Linear(2 * p, h), nn.ReLU(), nn.Dropout(0.5), nn.Linear(h, 1)
        )

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        joint = torch.cat(
            [self.text_projection_layer(text).relu(), self.image_projection_layer(image).relu()], 1
        )
        scalar = self.dynamic_scalar(joint).sigmoid()
        out = self.output_layer(self.combiner_layer(joint).relu())
        return F.normalize(out + scalar * text + (1 - scalar) * image, dim=-1)


def ranks_by_sorting(
    similarity: Tensor, targets: Tensor, excluded: Tensor | None = None
) -> list[int]:
    """Return the zero-based rank of each query's target in the stably sorted list of retrievable images."""
    ranks = []
    for row, (values, target) in enumerate(zip(similarity.tolist(), targets.tolist(), strict=True)):
        columns = [c for c in range(len(values)) if excluded is None or c != int(excluded[row])]
        ranks.append(sorted(columns, key=lambda c: -values[c]).index(target))
    return ranks


def string_matrix_ranks(
    queries: Tensor,
    gallery: Tensor,
    names: list[str],
    references: list[str],
    targets: list[str],
    groups: list[list],
) -> tuple[Tensor, Tensor]:
    """Return CIRR's labels from fully sorted matrices of names, (Q, N - 1) in the gallery and (Q, 5) in the group."""
    order = torch.argsort(1 - queries @ gallery.T, dim=-1)
    table = np.array(names)[order.numpy()]
    shape = len(targets), -1
    table = table[table != np.repeat(np.array(references), len(names)).reshape(shape)].reshape(
        shape
    )
    labels = table == np.repeat(np.array(targets), len(names) - 1).reshape(shape)
    in_group = (table[..., None] == np.array(groups)[:, None, :]).sum(-1).astype(bool)
    return torch.from_numpy(labels), torch.from_numpy(labels[in_group].reshape(shape))


def plain_clip_step(
    model, optimizer, scaler, references: Tensor, targets: Tensor, tokens: Tensor
) -> float:
    """Run a stage-1 step with an encoder call per input, fp16 autocast and an unfused optimizer; return the loss.

    Args:
        references, targets: (B, 3, R, R) float32, normalised on the host.
    """
    optimizer.zero_grad()
    with torch.autocast(
        references.device.type, dtype=torch.float16, enabled=references.device.type == "cuda"
    ):
        query = F.normalize(model.encode_image(references) + model.encode_text(tokens), dim=-1)
        target = F.normalize(model.encode_image(targets), dim=-1)
        loss = F.cross_entropy(
            100 * query @ target.T, torch.arange(len(query), device=query.device)
        )
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss.item()


def re_encoding_epoch(
    encoder, combiner, optimizer, split, captions: list[str], rows: Tensor
) -> None:
    """Run a stage-2 epoch that decodes and encodes the images and captions of each batch again.

    Args:
        rows: numbers of the triplets in each batch, (steps, B).
    """
    combiner.train()
    for batch in rows.tolist():
        triplets = [split.triplets[row] for row in batch]
        with torch.no_grad():
            references = encoder.images([split.image_paths[t.reference] for t in triplets])
            targets = encoder.images([split.image_paths[t.target] for t in triplets])
            texts = encoder.model.encode_text(
                tokenize([captions[row] for row in batch]).to(encoder.device)
            ).float()
        optimizer.zero_grad()
        logits = 100 * combiner(references, texts) @ F.normalize(targets, dim=-1).T
        loss = F.cross_entropy(logits, torch.arange(len(batch), device=encoder.device))
        loss.backward()
        optimizer.step()
        loss.item()


def ranked_names(similarity: list[float], names: list[str], allowed: set[str]) -> list[str]:
    """Return the allowed names in descending order of similarity; ties are in the gallery's order."""
    return [
        name
        for _, name in sorted(zip(similarity, names, strict=True), key=lambda pair: -pair[0])
        if name in allowed
    ]


def protocol_rankings(similarity: Tensor, split, gallery: str, reference: str) -> list[list[str]]:
    """Return the full ranking of each query under a protocol, written directly from the protocol's definition."""
    val = {t.reference for t in split.triplets} | {t.target for t in split.triplets}
    rankings = []
    for values, triplet in zip(similarity.tolist(), split.triplets, strict=True):
        allowed = set(split.names) if gallery == "original" else set(val)
        if reference == "removed":
            allowed.remove(triplet.reference)
        rankings.append(ranked_names(values, split.names, allowed))
    return rankings


def nearest_by_topk(queries: Tensor, images: Tensor, k: int) -> None:
    """Find the k nearest images of each query by matrix multiplication and `topk`, 512 queries at a time."""
    gallery = F.normalize(images, dim=-1)
    for block in queries.split(512):
        (block @ gallery.T).topk(k)


def nearest_by_faiss(queries: Tensor, images: Tensor, k: int) -> None:
    """Find the k nearest images of each query by a flat FAISS index."""
    import faiss

    index = faiss.IndexFlatIP(images.shape[1])
    index.add(F.normalize(images, dim=-1).numpy())
    index.search(queries.numpy(), k)


class Photos(torch.utils.data.Dataset):
    """Dataset of image files with open_clip's preprocessing."""

    def __init__(self, paths, preprocess) -> None:
        self.paths = paths
        self.preprocess = preprocess

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Tensor:
        return self.preprocess(Image.open(self.paths[row]))


@torch.no_grad()
def images_by_open_clip(model, preprocess, paths) -> Tensor:
    """Return the features (N, D) of image files, computed as in open_clip's examples."""
    batches = torch.utils.data.DataLoader(Photos(paths, preprocess), batch_size=32)
    return torch.cat([model.encode_image(batch) for batch in batches])


def plain_search_app(searcher, k: int):
    """Return a minimal search server: one function that decodes, encodes, composes and sorts, without limits.

    Args:
        searcher: searcher whose encoder, Combiner and features are used, but not its search.
    """
    from fastapi import FastAPI, File, Form

    encoder = searcher.pair.encoder
    features = torch.cat(
        [torch.from_numpy(searcher.index.features_of(row)) for row in range(len(searcher))]
    )
    gallery = F.normalize(features, dim=-1)
    app = FastAPI()

    @app.post("/search")
    def search(
        text: Annotated[str, Form()],
        row: Annotated[int | None, Form()] = None,
        image: Annotated[bytes | None, File()] = None,
    ) -> dict:
        with torch.no_grad():
            if image is None:
                reference = features[row : row + 1]
            else:
                pixels = encoder.loader.read(io.BytesIO(image))
                reference = encoder.read_images(pixels.unsqueeze(0))
            query = searcher.pair.compose(reference, encoder.captions([text]))
            similarities, rows = (query @ gallery.T)[0].topk(k)
        results = []
        for number, similarity in zip(rows.tolist(), similarities.tolist(), strict=True):
            name = searcher.image(number).name
            results.append({"row": number, "name": name, "similarity": similarity})
        return {"results": results}

    return app
