"""Ways to compose a query: image or text alone, the sum, two Combiners; build a Combiner from a checkpoint.

Shapes: B queries, D = CLIP's feature length, P = projection_dim, H = hidden_dim, E experts, k of them per query.
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
CombinerSettings = dict[str, Any]  # kind and sizes of a Combiner, by the names of their flags

ATTENTION_HEADS = 4
ORIGINAL_TOP_K = 2
# What all features pass first; both kinds of Combiner name them so.
PROJECTIONS = ("text_projection_layer", "image_projection_layer")
# A part that a mixture may have -> a weight of its own, which tells of it where no configuration does.
PART_WEIGHTS = {
    "shared_expert": "moe_layer.shared_expert.0.weight",
    "router_norm": "moe_layer.router_norm.weight",
    "router_bias": "moe_layer.router_bias",
}


def compose_sum(image_features: Tensor, text_features: Tensor) -> Tensor:
    """The normalised sum of unnormalised CLIP features, (B, D), (B, D) -> (B, D): stage 1's query."""
    return F.normalize(image_features + text_features, dim=-1)


@dataclass(frozen=True, kw_only=True)
class Insight:
    """Experts and gates that a Combiner uses for queries.

    Attributes:
        experts: (B, E) weight of each expert, 0 for those that a query does not go to; E is 0 without a mixture.
        gate: (B,) how much of the residual is text, 0 to 1, the mean over its elements.
    """

    experts: Tensor
    gate: Tensor

    def cpu(self) -> "Insight":
        """Return a copy on the CPU."""
        return Insight(experts=self.experts.cpu(), gate=self.gate.cpu())


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Parts of a mixture of experts beyond the original's; all are off by default.

    Attributes:
        shared_expert: one more expert, which every query goes through (Dai et al. 2024, arXiv 2401.06066, section 3.2).
        router_norm: whether the router sees its input layer-normalised.
        router_bias: not 0 where a bias counts in the choice of experts (Wang et al. 2024, arXiv 2408.15664).
        router_noise: standard deviation of the noise on the router's logits in training (Shazeer et al. 2017).
    """

    shared_expert: bool = False
    router_norm: bool = False
    router_bias: float = 0.0
    router_noise: float = 0.0

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Parts":
        """Return the parts that are set in the settings of a Combiner."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: settings[name] for name in names if settings.get(name)})


NO_PARTS = Parts()


class Composer(nn.Module, ABC):
    """A way to compose queries: unnormalised image and text features (B, D), (B, D) -> normalised queries (B, D).

    Attributes:
        combining_function: what `--combining-function` calls it.
        top_k: experts that a query goes to; 0 without a mixture.
        shapes: matrices that a checkpoint is recognised by -> the settings that are its rows and columns. The mixture
            and CLIP4Cir's Combiner need none.
    """

    combining_function = "combiner"
    top_k: int = 0
    shapes: Mapping[str, tuple[str, str]] = MappingProxyType({})

    @property
    def has_router(self) -> bool:
        """Tell whether a router sends queries to experts."""
        return self.top_k > 0

    @property
    def router_bias(self) -> Tensor | None:
        """Return the bias (E,) of the router's logits for the choice of experts; None without a bias."""
        return None

    @abstractmethod
    def forward(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Unnormalised CLIP features (B, D), (B, D) -> normalised query (B, D)."""

    def explained(
        self, image_features: Tensor, text_features: Tensor, lean: Tensor | None = None
    ) -> tuple[Tensor, Insight | None]:
        """Return the queries (B, D), and experts and gate; None if it has neither.

        Args:
            lean: of the gate, see `leaned`.
        """
        return self(image_features, text_features), None

    def routed(self, image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
        """The queries (B, D) and the router's logits (B, E); E is 0 without a mixture."""
        queries = self(image_features, text_features)
        return queries, queries.new_empty(len(queries), 0)


class Sum(Composer):
    """The normalised sum, which learns nothing."""

    combining_function = "sum"

    def forward(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        return compose_sum(image_features, text_features)


class ImageAlone(Composer):
    """The normalised image, whatever is asked for."""

    combining_function = "image"

    def forward(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        return F.normalize(image_features, dim=-1)


class TextAlone(Composer):
    """The normalised text, whatever it is said of."""

    combining_function = "text"

    def forward(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        return F.normalize(text_features, dim=-1)


# What composes without weights of its own, by the names of `--combining-function`.
UNLEARNED = {kind.combining_function: kind for kind in (ImageAlone, TextAlone, Sum)}


class RowDropout(nn.Dropout):
    """Dropout whose mask is that of the global batch: every process draws all of it and takes its own rows.

    With one seed, several processes so train like one.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(b, ...) -> (b, ...)."""
        world = distributed.world_size()
        if world == 1 or not self.training:
            return super().forward(x)
        mask = torch.empty(world, *x.shape, device=x.device, dtype=x.dtype).bernoulli_(1 - self.p)
        return x * mask[distributed.rank()].div_(1 - self.p)


class Reordered(torch.autograd.Function):
    """Rows (n, m), k copies of each, in another order.

    Indexing alone would add the gradient up in a copy of zeros, slot by slot: it cannot know that each slot is taken
    once. Here the slots are put back, and those of one row summed.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        """Row i is slot `order[i]`, (n k,); copy j of row r is slot r k + j. `order[inverse]` is 0 .. n k - 1."""
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
    """The k experts of each row: their logits (B, k) and their numbers (B, k), of logits (B, E).

    A bias (E,) counts in the choice alone: what the experts weigh is of the logits.
    """
    if bias is None:
        return logits.topk(top_k, dim=-1)
    chosen = (logits + bias).topk(top_k, dim=-1).indices
    return logits.gather(-1, chosen), chosen


def has_grouped_product(rows: Tensor, columns: int) -> bool:
    """Check whether one kernel multiplies all groups of rows (n, m) to (n, columns), with their bounds on the device.

    torch has it from 2.10 on, for bfloat16 on GPUs of compute capability 9, in steps of 16 bytes. For all else
    `grouped_mm` is a loop over the groups that waits for the device, or refuses; on capability 10 its gradient is not
    zero for an expert without rows (pytorch issue 172439).
    """
    return (
        hasattr(F, "grouped_mm")
        and rows.device.type == "cuda"
        and rows.dtype == torch.bfloat16
        and rows.shape[1] % 8 == columns % 8 == 0
        and torch.cuda.get_device_properties(rows.device).major == 9
    )


class SparseMoE(nn.Module):
    """Sparse mixture of experts, each Linear(P_in, H) + GELU + dropout (Shazeer et al. 2017, top-k gating).

    Of a row's E router logits the k largest are kept; softmax over those k alone weighs the experts' outputs.
    Rows are grouped by expert, so an expert runs once on all of its rows. One without rows does not run and gets no
    gradient; in a grouped product it gets a gradient of zeros. A shared expert's output is added to the mixture.

    Attributes:
        load: (E,) rows that each expert had in the last forward pass, where there is a bias to be moved by it.
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
        # A parameter without gradient, not a buffer: a moving average of the weights follows it too.
        bias = nn.Parameter(torch.zeros(num_experts), requires_grad=False)
        self.router_bias = bias if parts.router_bias else None
        self.load: Tensor | None = None
        self.dropout = RowDropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_dim) -> (B, H)."""
        return self.mix(x, self.route(x))

    def route(self, x: Tensor) -> Tensor:
        """The router's logits, (B, in_dim) -> (B, E), in training with their noise.

        Never in half precision, which would flip choices (Fedus et al. 2021, arXiv 2101.03961, section 2.4).
        """
        with torch.autocast(x.device.type, enabled=False):
            exact = x.to(torch.promote_types(x.dtype, torch.float32))
            logits = self.router(self.router_norm(exact))
        if not (self.noise and self.training):
            return logits
        # That of the global batch, of which each process takes its own rows, as in RowDropout.
        noise = logits.new_empty(distributed.world_size(), *logits.shape).normal_(std=self.noise)
        return logits + noise[distributed.rank()]

    def mix(self, x: Tensor, router_logits: Tensor) -> Tensor:
        """(B, in_dim) and the router's (B, E) for them -> (B, H)."""
        logits, chosen = choose(router_logits, self.top_k, self.router_bias)  # (B, k), (B, k)
        # (B * k,) each: slots b * k + j, those of one expert side by side, and where each slot then is.
        experts, slots = chosen.flatten().sort(stable=True)
        places = slots.argsort()
        # Cast once, before there are k of each.
        rows = Reordered.apply(x.to(product_type(x)), slots, places)  # (B * k, in_dim)
        outputs = self.run_experts(rows, experts)
        ungrouped = Reordered.apply(outputs, places, slots).unflatten(0, chosen.shape)  # (B, k, H)
        # In float32: the router learns from the difference of outputs that may be nearly alike.
        mixed = (logits.softmax(-1).unsqueeze(-1) * self.dropout(ungrouped)).sum(1)
        return mixed if self.shared_expert is None else mixed + self.dropout(self.shared_expert(x))

    def run_experts(self, rows: Tensor, experts: Tensor) -> Tensor:
        """Rows (n, in_dim) and the expert of each, (n,) ascending -> their outputs (n, H)."""
        every = torch.arange(len(self.experts), device=rows.device)
        is_of = experts.unsqueeze(1) == every  # (n, E)
        counts = is_of.sum(0)  # (E,)
        if self.router_bias is not None:
            self.load = counts
        layers = [cast(nn.Linear, expert.get_submodule("0")) for expert in self.experts]
        if has_grouped_product(rows, layers[0].out_features):
            # Autocast does not cast what goes into a grouped product.
            weights = torch.stack([layer.weight.to(rows.dtype) for layer in layers])  # (E, H, in)
            ends = counts.cumsum(0, dtype=torch.int32)
            products = F.grouped_mm(rows, weights.mT, offs=ends)
            biases = torch.stack([layer.bias for layer in layers])  # (E, H)
            return F.gelu(torch.addmm(products, is_of.to(rows.dtype), biases))
        parts = rows.split(counts.tolist())  # the one wait for the device
        # Without strict, which the compiler of torch 2.6 does not know.
        pairs = zip(self.experts, parts)  # noqa: B905
        return torch.cat([expert(part) for expert, part in pairs if len(part)])

    @torch.no_grad()
    def rebalance(self, rate: float) -> None:
        """Move the bias by a rate towards experts that had less of the global batch than the mean, from the others.

        So loads are evened without a loss (Wang et al. 2024, arXiv 2408.15664, algorithm 1).
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
                f"--projection-dim {projection_dim} is not a multiple of {ATTENTION_HEADS}, the heads"
            )
        if top_k > num_experts:
            raise UserError(
                f"--top-k {top_k} is more than --num-experts {num_experts}: choose at most all of them"
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
        """The router's logits alone, (B, D), (B, D) -> (B, E)."""
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
        """The projections side by side (B, 2P), text first."""
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
    """The gate of its logits (B, n), leaned towards image or text.

    Args:
        lean: (B,) from 0, the image alone in the residual, to 1, the text alone. The gate's odds are multiplied by
            lean / (1 - lean), so 1/2 is the gate as it was trained, to the last bit; None is the same.
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
    """A Combiner with fresh weights from the settings that `combiner_settings` reads back from a checkpoint."""
    sizes = {name: settings[name] for name in ("clip_dim", "projection_dim", "hidden_dim")}
    if settings["combiner_type"] != "moe":
        return _class_of(settings["combiner_type"])(**sizes)
    mixture = {name: settings[name] for name in ("num_experts", "top_k")}
    return Combiner(**sizes, **mixture, parts=Parts.of(settings))


def combiner_settings(
    state: Mapping[str, Tensor], config: Mapping[str, Any], path: Path
) -> CombinerSettings:
    """Kind, sizes, experts, k and parts of a Combiner, of which parts those alone that it has.

    Its weights tell them; k, which weights cannot tell, is that of its configuration, else the original's 2.

    Args:
        config: the configuration stored beside the weights, flat; empty where there is none.

    Raises:
        UserError: the weights are those of no Combiner known here.
    """
    source = f"--combiner-path {path}"
    is_moe = any(name.startswith("moe_layer.") for name in state)

    def shape(name: str) -> tuple[int, ...]:
        remedy = "it is not a known Combiner; choose another file"
        return shape_of(state, name, 2, source=source, remedy=remedy)

    for kind in COMBINER_TYPES:
        shapes = _class_of(kind).shapes
        if shapes and shapes.keys() <= state.keys():
            told: CombinerSettings = {"combiner_type": kind, "num_experts": None, "top_k": None}
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
    if top_k > num_experts:
        raise UserError(
            f"{source}: top_k is {top_k}, but its weights have {num_experts} experts: choose another file, or set "
            "--top-k"
        )
    parts = {
        name: True for name, weight in PART_WEIGHTS.items() if weight in state or config.get(name)
    }
    return {"combiner_type": "moe", **sizes, "num_experts": num_experts, "top_k": top_k, **parts}


def assumed_top_k(
    state: Mapping[str, Tensor], config: Mapping[str, Any], wanted: Mapping[str, Any]
) -> dict[str, int]:
    """k of a mixture, by its name, where neither its configuration nor a flag says it: `load_combiner` takes this."""
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
    """The Combiner of a checkpoint, in eval mode.

    Args:
        state: its weights.
        config: see `combiner_settings`.
        path: the checkpoint's file, which errors name.
        wanted: what flags say of it, None where they are silent; its k holds where the configuration says none.
        clip_dim: feature dimension D of the CLIP beside it.

    Raises:
        UserError: a wanted value, or the CLIP, disagrees with the checkpoint; both values are named.
    """
    if wanted.get("top_k") is not None:
        config = {"top_k": wanted["top_k"], **config}
    settings = combiner_settings(state, config, path)
    for name, value in wanted.items():
        has = settings.get(name)
        if value is not None and value != has:
            has = "none" if has is None else has
            raise UserError(
                f"{flag(name)} {value} differs from {path}, which has {has}: remove the flag"
            )
    if settings["clip_dim"] != clip_dim:
        raise UserError(
            f"--combiner-path {path} was trained on features of dimension {settings['clip_dim']}, but "
            f"--clip-model-name gives {clip_dim}: choose the CLIP model that it was trained with"
        )
    source = f"--combiner-path {path}"
    try:
        with Unfilled():
            combiner = build_combiner(settings)
    except (UserError, RuntimeError) as error:
        raise UserError(f"{source}: {first_line(error)}") from None
    remedy = "train or copy it again"
    weights = fitted(state, combiner.state_dict(), source=source, remedy=remedy, vital=PROJECTIONS)
    combiner.load_state_dict(weights)
    return combiner.eval()
