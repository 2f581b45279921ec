"""Composition of queries: image or text only, their sum, two Combiners; and loading a Combiner from a checkpoint.

Shapes: B queries, D = CLIP's feature dimension, P = projection_dim, H = hidden_dim, E experts, k experts per query.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime import distributed
from runtime.choices import COMBINER_TYPES
from runtime.precision import product_type
from runtime.weights import Unfilled, fitted, shape_of
from utils import UserError, first_line, flag

# Image features (B, D), text features (B, D) -> queries (B, D).
Compose = Callable[[Tensor, Tensor], Tensor]

ATTENTION_HEADS = 4
ORIGINAL_TOP_K = 2
# Names of the first layers, which are the same in both Combiners.
PROJECTIONS = ("text_projection_layer", "image_projection_layer")
# Optional part of a mixture -> a weight that only this part has, which identifies it if there is no configuration.
PART_WEIGHTS = {
    "shared_expert": "moe_layer.shared_expert.0.weight",
    "router_norm": "moe_layer.router_norm.weight",
    "router_bias": "moe_layer.router_bias",
}


def compose_sum(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Return the normalised sum of unnormalised CLIP features, stage 1's query: (B, D), (B, D) -> (B, D)."""
    return F.normalize(image_features + text_features, dim=-1)


@dataclass(frozen=True, kw_only=True)
class Insight:
    """Expert weights and gates of a Combiner for a batch of queries.

    Attributes:
        experts: (B, E) weights of the experts, 0 for experts to which a query is not sent; E is 0 without a mixture.
        gate: (B,) fraction of text in the residual, from 0 to 1: the mean over the gate's elements.
    """

    experts: Tensor
    gate: Tensor

    def cpu(self) -> "Insight":
        """Return a copy on the CPU."""
        return Insight(experts=self.experts.cpu(), gate=self.gate.cpu())


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Optional parts of a mixture of experts, which the original code does not have; all are off by default.

    Attributes:
        shared_expert: whether to add an expert for every query (Dai et al. 2024, arXiv 2401.06066, section 3.2).
        router_norm: whether to layer-normalise the router's input.
        router_bias: if not 0, a bias is added to the logits for the choice of experts (Wang et al. 2024, arXiv
            2408.15664).
        router_noise: standard deviation of the noise on the router's logits in training (Shazeer et al. 2017).
    """

    shared_expert: bool = False
    router_norm: bool = False
    router_bias: float = 0.0
    router_noise: float = 0.0

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Parts":
        """Return the parts that a Combiner's settings turn on."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: settings[name] for name in names if settings.get(name)})


NO_PARTS = Parts()


class Composer(nn.Module, ABC):
    """Base of all compositions: unnormalised image and text features (B, D), (B, D) -> normalised queries (B, D).

    Attributes:
        combining_function: name of the composition in `--combining-function`.
        top_k: number of experts that a query is sent to; 0 without a mixture.
        shapes: name of a weight matrix -> settings that equal its numbers of rows and columns. A checkpoint with all of
            these matrices is recognised as this class; the two built-in Combiners need none.
    """

    combining_function = "combiner"
    top_k: int = 0
    shapes: Mapping[str, tuple[str, str]] = MappingProxyType({})

    @property
    def has_router(self) -> bool:
        """Check whether a router sends queries to experts."""
        return self.top_k > 0

    @property
    def router_bias(self) -> Tensor | None:
        """Return the bias (E,) that is added to the router's logits for the choice of experts; None without a bias."""
        return None

    @abstractmethod
    def forward(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Compose unnormalised CLIP features of images and texts, each (B, D), into normalised queries (B, D)."""

    def explained(
        self, image_features: Tensor, text_features: Tensor, lean: Tensor | None = None
    ) -> tuple[Tensor, Insight | None]:
        """Return the queries (B, D), and their experts and gates, or None if the composition has neither.

        Args:
            lean: (B,) shift of the gate, see `leaned`.
        """
        return self(image_features, text_features), None

    def routed(self, image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the queries (B, D) and the router's logits (B, E); E is 0 without a mixture."""
        queries = self(image_features, text_features)
        return queries, queries.new_empty(len(queries), 0)


class Sum(Composer):
    """The normalised sum of image and text features, which has no parameters."""

    combining_function = "sum"

    def forward(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        return compose_sum(image_features, text_features)


class ImageAlone(Composer):
    """The normalised image feature; the text is ignored."""

    combining_function = "image"

    def forward(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        return F.normalize(image_features, dim=-1)


class TextAlone(Composer):
    """The normalised text feature; the image is ignored."""

    combining_function = "text"

    def forward(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        return F.normalize(text_features, dim=-1)


# Compositions without parameters, by their names in `--combining-function`.
UNLEARNED = {kind.combining_function: kind for kind in (ImageAlone, TextAlone, Sum)}


class RowDropout(nn.Dropout):
    """Dropout with a mask for the global batch: every process draws the complete mask and uses its own rows of it.

    With the same seed, several processes therefore drop the same elements as a single process.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of x, (b, ...) -> (b, ...)."""
        world = distributed.world_size()
        if world == 1 or not self.training:
            return super().forward(x)
        mask = torch.empty(world, *x.shape, device=x.device, dtype=x.dtype).bernoulli_(1 - self.p)
        return x * mask[distributed.rank()].div_(1 - self.p)


class Reordered(torch.autograd.Function):
    """Copy each row of (n, m) k times, and return the n k copies, called slots, in a given order.

    Plain indexing would accumulate gradients into zeros slot by slot, since it cannot know that each slot is used
    exactly once. Here the gradients are put back in order, and the k gradients of each row are summed.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        """Return (n k, m), whose row i is slot `order[i]`; copy j of row r is slot r k + j.

        Args:
            inverse: the inverse permutation, so that `order[inverse]` is 0 .. n k - 1.
        """
        ctx.save_for_backward(inverse)
        ctx.copies = len(order) // len(rows)
        return rows[order // ctx.copies]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        back = gradients[0][inverse]
        if ctx.copies > 1:
            back = back.unflatten(0, (-1, ctx.copies)).sum(1)
        return back, None, None


def choose(logits: Tensor, top_k: int, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Choose k experts for each row of logits (B, E), and return their logits (B, k) and their indices (B, k).

    A bias (E,) affects only the choice; the returned logits, from which the experts' weights follow, do not include it.
    """
    if bias is None:
        return logits.topk(top_k, dim=-1)
    chosen = (logits + bias).topk(top_k, dim=-1).indices
    return logits.gather(-1, chosen), chosen


def has_grouped_product(rows: Tensor, columns: int) -> bool:
    """Check whether one kernel can multiply all groups of rows (n, m) to (n, columns), with group bounds on the device.

    torch has such a kernel since 2.10, for bfloat16 on GPUs of compute capability 9 and rows of a multiple of 16 bytes.
    In other cases `grouped_mm` loops over the groups and waits for the device, or raises an error; on capability 10,
    its gradient for an expert without rows is not zero (pytorch issue 172439).
    """
    return (
        hasattr(F, "grouped_mm")
        and rows.device.type == "cuda"
        and rows.dtype == torch.bfloat16
        and rows.shape[1] % 8 == columns % 8 == 0
        and torch.cuda.get_device_properties(rows.device).major == 9
    )


class SparseMoE(nn.Module):
    """Sparse mixture of experts, each Linear(in_dim, H) + GELU + dropout (Shazeer et al. 2017, top-k gating).

    The k largest of a row's E router logits are kept, and their softmax gives the weights of the experts' outputs.
    Rows are grouped by expert, so an expert runs once on all of its rows. An expert without rows does not run and gets
    no gradient; in a grouped matrix multiplication, its gradient is zero. A shared expert's output is added to the
    mixture.

    Attributes:
        load: (E,) number of rows of each expert in the last forward pass, for `rebalance`; None without a router bias.
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int,
        num_experts: int,
        top_k: int,
        *,
        parts: Parts = NO_PARTS,
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.noise = parts.router_noise
        self.router_norm = nn.LayerNorm(in_dim) if parts.router_norm else nn.Identity()
        self.router = nn.Linear(in_dim, num_experts)
        self.experts = nn.ModuleList(_expert(in_dim, hidden_dim) for _ in range(num_experts))
        self.shared_expert = _expert(in_dim, hidden_dim) if parts.shared_expert else None
        # The bias is a parameter without gradient, not a buffer, so that a moving average of the weights includes it.
        bias = nn.Parameter(torch.zeros(num_experts), requires_grad=False)
        self.router_bias = bias if parts.router_bias else None
        self.load: Tensor | None = None
        self.dropout = RowDropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Route each row to its experts and mix their outputs, (B, in_dim) -> (B, H)."""
        return self.mix(x, self.route(x))

    def route(self, x: Tensor) -> Tensor:
        """Return the router's logits, (B, in_dim) -> (B, E), with noise in training.

        They are never computed in half precision, whose rounding would change the choice of experts (Fedus et al. 2021,
        arXiv 2101.03961, section 2.4).
        """
        with torch.autocast(x.device.type, enabled=False):
            exact = x.to(torch.promote_types(x.dtype, torch.float32))
            logits = self.router(self.router_norm(exact))
        if not (self.noise and self.training):
            return logits
        # Every process draws the noise of the global batch and uses its own rows of it, as in RowDropout.
        noise = logits.new_empty(distributed.world_size(), *logits.shape).normal_(std=self.noise)
        return logits + noise[distributed.rank()]

    def mix(self, x: Tensor, router_logits: Tensor) -> Tensor:
        """Mix the outputs of the experts that the router's logits (B, E) choose, (B, in_dim) -> (B, H)."""
        logits, chosen = choose(router_logits, self.top_k, self.router_bias)  # (B, k), (B, k)
        # All are (B * k,). Slots b * k + j are sorted by expert; places[s] is the position of slot s in this order.
        experts, slots = chosen.flatten().sort(stable=True)
        places = slots.argsort()
        # Rows are cast before they are copied k times.
        rows = Reordered.apply(x.to(product_type(x)), slots, places)  # (B * k, in_dim)
        outputs = self.run_experts(rows, experts)
        ungrouped = Reordered.apply(outputs, places, slots).unflatten(0, chosen.shape)  # (B, k, H)
        # The sum is in float32, since the router's gradient depends on differences between outputs, which may be small.
        mixed = (logits.softmax(-1).unsqueeze(-1) * self.dropout(ungrouped)).sum(1)
        return mixed if self.shared_expert is None else mixed + self.dropout(self.shared_expert(x))

    def run_experts(self, rows: Tensor, experts: Tensor) -> Tensor:
        """Run each expert on its rows: rows (n, in_dim) and their experts (n,), ascending -> outputs (n, H)."""
        every = torch.arange(len(self.experts), device=rows.device)
        is_of = experts.unsqueeze(1) == every  # (n, E)
        counts = is_of.sum(0)  # (E,)
        if self.router_bias is not None:
            self.load = counts
        layers = [cast(nn.Linear, expert.get_submodule("0")) for expert in self.experts]
        if has_grouped_product(rows, layers[0].out_features):
            # Autocast does not cast the inputs of a grouped matrix multiplication.
            weights = torch.stack([layer.weight.to(rows.dtype) for layer in layers])  # (E, H, in)
            ends = counts.cumsum(0, dtype=torch.int32)
            products = F.grouped_mm(rows, weights.mT, offs=ends)
            biases = torch.stack([layer.bias for layer in layers])  # (E, H)
            return F.gelu(torch.addmm(products, is_of.to(rows.dtype), biases))
        parts = rows.split(counts.tolist())  # only this line waits for the device
        # torch 2.6 cannot compile zip with `strict`.
        pairs = zip(self.experts, parts)  # noqa: B905
        return torch.cat([expert(part) for expert, part in pairs if len(part)])

    @torch.no_grad()
    def rebalance(self, rate: float) -> None:
        """Move the bias of each expert by `rate`: up if the expert's load is below the mean load, down if it is above.

        The load is the number of rows in the global batch. It is balanced without an auxiliary loss (Wang et al. 2024,
        arXiv 2408.15664, algorithm 1).
        """
        if self.router_bias is not None and self.load is not None:
            load = distributed.gather_rows(self.load.unsqueeze(0)).sum(0).float()  # (E,)
            self.router_bias.add_((load.mean() - load).sign(), alpha=rate)


class Combiner(Composer):
    """The MoE Combiner: projections, self-attention over [text, image], sparse MoE, element-wise gate, residual.

    Raises:
        UserError: projection_dim is not a multiple of the attention's 4 heads, or top_k exceeds num_experts.
    """

    def __init__(
        self,
        clip_dim: int,
        projection_dim: int,
        hidden_dim: int,
        num_experts: int = 4,
        top_k: int = 2,
        *,
        parts: Parts = NO_PARTS,
    ):
        super().__init__()
        if projection_dim % ATTENTION_HEADS:
            raise UserError(
                f"--projection-dim {projection_dim} is not a multiple of {ATTENTION_HEADS}, the number of attention "
                "heads"
            )
        if top_k > num_experts:
            raise UserError(
                f"--top-k {top_k} exceeds --num-experts {num_experts}: choose at most {num_experts}"
            )
        self.text_projection_layer = _normed_projection(clip_dim, projection_dim)
        self.image_projection_layer = _normed_projection(clip_dim, projection_dim)
        self.attn_layer = nn.MultiheadAttention(projection_dim, ATTENTION_HEADS, batch_first=True)
        self.attn_norm = nn.LayerNorm(projection_dim)
        self.top_k = top_k
        self.moe_layer = SparseMoE(2 * projection_dim, hidden_dim, num_experts, top_k, parts=parts)
        self.output_layer = nn.Linear(hidden_dim, clip_dim)
        self.gate_net = _gate(2 * projection_dim, hidden_dim, clip_dim)
        self.dropout = RowDropout(0.5)

    @property
    def router_bias(self) -> Tensor | None:
        return self.moe_layer.router_bias

    def forward(
        self, image_features: Tensor, text_features: Tensor, lean: Tensor | None = None
    ) -> Tensor:
        return self.composed(image_features, text_features, lean)[0]

    def routed(self, image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
        return self.composed(image_features, text_features)[:2]

    def composed(
        self, image_features: Tensor, text_features: Tensor, lean: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries (B, D), the router's logits (B, E) and the gate (B, D)."""
        joint = self.joint(image_features, text_features)  # (B, 2P)
        logits = self.moe_layer.route(joint)  # (B, E)
        hidden = self.dropout(F.relu(self.moe_layer.mix(joint, logits)))  # (B, H)
        gate = leaned(self.gate_net(joint), lean)  # (B, D)
        composed = self.output_layer(hidden) + gate * text_features + (1 - gate) * image_features
        return F.normalize(composed, dim=-1), logits, gate

    def route(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Return only the router's logits, (B, D), (B, D) -> (B, E)."""
        return self.moe_layer.route(self.joint(image_features, text_features))

    def joint(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Compute the input of router, experts and gate: the attended projections (B, 2P), text first."""
        text = self.dropout(self.text_projection_layer(text_features))  # (B, P)
        image = self.dropout(self.image_projection_layer(image_features))  # (B, P)
        pair = torch.stack([text, image], dim=1)  # (B, 2, P)
        attended, _ = self.attn_layer(pair, pair, pair, need_weights=False)
        return self.attn_norm(pair + attended).flatten(1)

    @torch.no_grad()
    def explained(
        self, image_features: Tensor, text_features: Tensor, lean: Tensor | None = None
    ) -> tuple[Tensor, Insight]:
        queries, logits, gate = self.composed(image_features, text_features, lean)
        values, chosen = choose(logits, self.top_k, self.router_bias)
        weights = torch.zeros_like(logits).scatter(1, chosen, values.softmax(-1))
        return queries, Insight(experts=weights, gate=gate.mean(1))


class PlainCombiner(Composer):
    """CLIP4Cir's Combiner: projections, one hidden layer, a scalar that balances text and image (arXiv 2308.11485)."""

    def __init__(self, clip_dim: int, projection_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.text_projection_layer = nn.Linear(clip_dim, projection_dim)
        self.image_projection_layer = nn.Linear(clip_dim, projection_dim)
        self.combiner_layer = nn.Linear(2 * projection_dim, hidden_dim)
        self.output_layer = nn.Linear(hidden_dim, clip_dim)
        self.dynamic_scalar = _gate(2 * projection_dim, hidden_dim, 1)
        self.dropout = RowDropout(0.5)

    def forward(
        self, image_features: Tensor, text_features: Tensor, lean: Tensor | None = None
    ) -> Tensor:
        return self.composed(image_features, text_features, lean)[0]

    def composed(
        self, image_features: Tensor, text_features: Tensor, lean: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the queries (B, D) and the scalar (B, 1)."""
        joint = self.joint(image_features, text_features)  # (B, 2P)
        hidden = self.dropout(F.relu(self.combiner_layer(joint)))  # (B, H)
        scalar = leaned(self.dynamic_scalar(joint), lean)  # (B, 1)
        composed = (
            self.output_layer(hidden) + scalar * text_features + (1 - scalar) * image_features
        )
        return F.normalize(composed, dim=-1), scalar

    def joint(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Concatenate the projections to (B, 2P), text first."""
        text = self.dropout(F.relu(self.text_projection_layer(text_features)))  # (B, P)
        image = self.dropout(F.relu(self.image_projection_layer(image_features)))  # (B, P)
        return torch.cat([text, image], dim=-1)

    @torch.no_grad()
    def explained(
        self, image_features: Tensor, text_features: Tensor, lean: Tensor | None = None
    ) -> tuple[Tensor, Insight]:
        queries, scalar = self.composed(image_features, text_features, lean)
        none = scalar.new_empty(len(scalar), 0)
        return queries, Insight(experts=none, gate=scalar.squeeze(1))


def leaned(logits: Tensor, lean: Tensor | None) -> Tensor:
    """Return the gate for logits (B, n), shifted towards image or text.

    Args:
        lean: (B,) from 0 to 1: at 0 the residual contains only the image, at 1 only the text. The gate's odds are
            multiplied by lean / (1 - lean), so 1/2 leaves the trained gate unchanged, bit for bit, as does None.
    """
    return torch.sigmoid(logits if lean is None else logits + lean.logit().unsqueeze(1))


def _normed_projection(clip_dim: int, projection_dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(clip_dim, projection_dim), nn.LayerNorm(projection_dim), nn.ReLU()
    )


def _expert(in_dim: int, hidden_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.GELU())


def _gate(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim), nn.ReLU(), RowDropout(0.5), nn.Linear(hidden_dim, out_dim)
    )


def _class_of(kind: str) -> type[Any]:
    return globals()[COMBINER_TYPES[kind]]


def build_combiner(settings: Mapping[str, Any]) -> Composer:
    """Build a Combiner with new weights from settings such as `combiner_settings` returns."""
    sizes = {name: settings[name] for name in ("clip_dim", "projection_dim", "hidden_dim")}
    if settings["combiner_type"] != "moe":
        return _class_of(settings["combiner_type"])(**sizes)
    mixture = {name: settings[name] for name in ("num_experts", "top_k")}
    return Combiner(**sizes, **mixture, parts=Parts.of(settings))


def combiner_settings(
    state: Mapping[str, Tensor], config: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """Return a Combiner's architecture, sizes, number of experts, k, and the optional parts that it has, by flag.

    All but k follow from the weights; k is read from the configuration, or is 2 as in the original code.

    Args:
        config: configuration stored with the weights, name -> value; empty if there is none.

    Raises:
        UserError: the weights do not belong to a known Combiner.
    """
    source = f"--combiner-path {path}"
    is_moe = any(name.startswith("moe_layer.") for name in state)

    def shape(name: str) -> tuple[int, ...]:
        remedy = "it is not a known Combiner; choose another file"
        return shape_of(state, name, 2, source=source, remedy=remedy)

    for kind in COMBINER_TYPES:
        shapes = _class_of(kind).shapes
        if shapes and shapes.keys() <= state.keys():
            told: dict[str, Any] = {"combiner_type": kind, "num_experts": None, "top_k": None}
            for name, (rows, columns) in shapes.items():
                told[rows], told[columns] = shape(name)
            return told
    clip_dim, hidden_dim = shape("output_layer.weight")
    joint_dim = shape("gate_net.0.weight" if is_moe else "combiner_layer.weight")[1]  # 2P
    sizes = {"clip_dim": clip_dim, "projection_dim": joint_dim // 2, "hidden_dim": hidden_dim}
    if not is_moe:
        return {"combiner_type": "clip4cir", **sizes, "num_experts": None, "top_k": None}
    num_experts = shape("moe_layer.router.weight")[0]
    top_k = config.get("top_k", ORIGINAL_TOP_K)
    parts = {
        name: True for name, weight in PART_WEIGHTS.items() if weight in state or config.get(name)
    }
    return {"combiner_type": "moe", **sizes, "num_experts": num_experts, "top_k": top_k, **parts}


def assumed_top_k(
    state: Mapping[str, Tensor], config: Mapping[str, Any], wanted: Mapping[str, Any]
) -> dict[str, int]:
    """Return the top_k that is assumed for a mixture if neither its configuration nor a flag sets it; otherwise {}."""
    is_moe = any(name.startswith("moe_layer.") for name in state)
    known = not is_moe or "top_k" in config or wanted.get("top_k") is not None
    return {} if known else {"top_k": ORIGINAL_TOP_K}


def load_combiner(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    path: Path,
    *,
    wanted: Mapping[str, Any],
    clip_dim: int,
) -> Composer:
    """Build the Combiner of a checkpoint, in eval mode.

    Args:
        state: weights of the Combiner.
        config: see `combiner_settings`.
        path: file of the checkpoint, for error messages.
        wanted: expected settings by flag, None for flags not given; its top_k is used if the configuration has none.
        clip_dim: feature dimension D of the CLIP that is used with the Combiner.

    Raises:
        UserError: the checkpoint contradicts a flag or the CLIP (the message gives both values), or is incomplete.
    """
    if wanted.get("top_k") is not None:
        config = {"top_k": wanted["top_k"], **config}
    settings = combiner_settings(state, config, path)
    for name, value in wanted.items():
        has = settings.get(name)
        if value is not None and value != has:
            has = "none" if has is None else has
            raise UserError(
                f"{flag(name)} {value} differs from the value {has} in {path}: remove {flag(name)}"
            )
    if settings["clip_dim"] != clip_dim:
        raise UserError(
            f"--combiner-path {path} was trained on features of dimension {settings['clip_dim']}, but "
            f"--clip-model-name gives {clip_dim}: choose the CLIP model that the Combiner was trained with"
        )
    source = f"--combiner-path {path}"
    try:
        with Unfilled():
            combiner = build_combiner(settings)
    except (UserError, RuntimeError) as error:
        raise UserError(f"{source}: {first_line(error)}") from None
    remedy = "copy the file again, or retrain the Combiner"
    weights = fitted(state, combiner.state_dict(), source=source, remedy=remedy, vital=PROJECTIONS)
    combiner.load_state_dict(weights)
    return combiner.eval()
