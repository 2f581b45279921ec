"""Compare a device's results with definitions, plain training steps and the CPU."""

import copy
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.protocols import ORIGINAL_KEPT, ORIGINAL_REMOVED
from combiner import Combiner, Composer, PlainCombiner, compose_sum
from evaluation.retrieval import rank
from models.clip_model import backbone, load_clip, ready, write_tiny_clip
from models.features import FrozenSplit
from ranking import random_cirr
from report import held
from runtime.precision import exact_float32
from stage1 import random_batch, random_clip
from timing import Row, Setting
from training.losses import ContrastiveLoss
from training.schedule import Precision
from training.stage1 import SumFeatures
from training.step import Gradient
from twins import DefinedCombiner, DefinedPlainCombiner

# Maximum relative differences of queries and of gradients. In half precision, some inputs of a ReLU round to the other
# side of zero, which changes gradients completely: the difference of fp16 on a CPU is 0.012 to 0.017.
LIMITS = {"fp32": (1e-5, 1e-5), "amp": (1e-2, 3e-2)}
TIE = 1e-5  # maximum difference of cosines that rounding explains
SCALE = 2.0**10  # loss scale in half precision
# Maximum relative differences of features and gradients of a complete CLIP in float32. In half precision, the
# difference may be twice that of the clip package itself.
PACKAGE_LIMITS = (1e-4, 1e-3)


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Return the norm of the difference of two tensors, relative to the norm of the second."""
    exact = theirs.cpu().double()
    return ((ours.cpu().double() - exact).norm() / exact.norm()).item()


def gradients(module: nn.Module) -> Tensor:
    """Return the gradients of all parameters that have one, in the order of their names, as one vector."""
    named = sorted(module.named_parameters())
    return torch.cat([p.grad.flatten() for _, p in named if p.grad is not None])


def combiners(setting: Setting) -> Iterator[Row]:
    """Compare both Combiners with their definitions in float64 on the CPU: queries, and gradients of all parameters."""
    exact_float32()
    d, p, h = setting.choose(gpu=(64, 256, 512), tiny=(12, 16, 24))
    pairs = [
        ("MoE Combiner", Combiner(d, p, h), DefinedCombiner(d, p, h)),
        ("plain Combiner", PlainCombiner(d, p, h), DefinedPlainCombiner(d, p, h)),
    ]
    for name, ours, twin in pairs:
        twin.load_state_dict(ours.state_dict())
        ours, twin = ours.to(setting.device).eval(), twin.double().eval()
        inputs = torch.randn(3, 128, d)
        for precision, limits in LIMITS.items():
            found = differences(ours, twin, inputs, Precision(precision, setting.device))
            for what, apart_by, most in zip(("queries", "gradients"), found, limits, strict=True):
                what = f"{name} against its definition, {precision}, {what}"
                yield held(what, apart_by, most)


def differences(
    ours: Composer, twin: nn.Module, inputs: Tensor, precision: Precision
) -> tuple[float, float]:
    """Return the relative differences of queries and gradients from the definition's.

    Args:
        twin: the definition, in float64 on the CPU.
        inputs: images, captions, and the gradient of the queries for the backward pass, (3, B, D), on the CPU.
    """
    images, captions, direction = inputs[:, is_sure(ours, *inputs[:2])]
    with precision.autocast():
        queries = ours(images.to(precision.device), captions.to(precision.device))
    exact = twin(images.double(), captions.double())
    found = []
    for module, of_module in ((ours, queries), (twin, exact)):
        module.zero_grad()
        (SCALE * (of_module * direction.to(of_module.device)).sum()).backward()
        found.append(gradients(module))
    return apart(queries, exact), apart(*found)


@torch.no_grad()
def is_sure(combiner: Composer, images: Tensor, captions: Tensor) -> Tensor:
    """Return a mask (B,) of the queries whose choice of experts cannot depend on rounding; inputs (B, D) on the CPU."""
    exact = copy.deepcopy(combiner).cpu().double()
    _, logits = exact.routed(images.double(), captions.double())
    if not combiner.has_router:
        return torch.ones(len(images), dtype=torch.bool)
    values = logits.sort(dim=1, descending=True).values
    return values[:, combiner.top_k - 1] - values[:, combiner.top_k] > 0.02


def clip_package(setting: Setting) -> Iterator[Row]:
    """Compare features and gradients of the lean forward passes with the clip package's, at real size.

    Freed memory is filled with NaN, so that a kernel that reads uninitialised memory is detected.
    """
    exact_float32()
    batch = setting.choose(gpu=16, tiny=3)
    for name in ("RN50x16", "ViT-L/14"):
        package = random_clip(name, setting)
        references, targets, tokens = random_batch(package, batch, setting.device)
        lean = ready(copy.deepcopy(package), setting.device)
        exact = outputs_and_gradients(package, (references, targets, tokens), "fp32")
        for precision in LIMITS:
            theirs = outputs_and_gradients(package, (references, targets, tokens), precision)
            poison(setting)
            found = outputs_and_gradients(lean, (references, targets, tokens), precision)
            parts = zip(
                ("features", "gradients"), found, theirs, exact, PACKAGE_LIMITS, strict=True
            )
            for what, mine, other, true, most in parts:
                named = f"{name}, {precision}, {what}"
                wrong = int((~mine.isfinite()).sum())
                yield held(f"{named} that are not finite", wrong, 0)
                own = apart(other, true)
                note = f"the package's own is {own:.3g} off"
                what = f"{named} against the clip package's in float32"
                yield held(what, apart(mine, true), max(most, 2 * own), note)


def outputs_and_gradients(
    model: nn.Module, inputs: tuple[Tensor, ...], precision: str
) -> tuple[Tensor, Tensor]:
    """Return the queries and targets of stage 1, and the gradients of all parameters as one vector."""
    model.zero_grad()
    model.logit_scale.requires_grad_(False)
    chosen = Precision(precision, inputs[0].device)
    with chosen.autocast():
        features = torch.cat(SumFeatures(model, backbone(model))(*inputs))
    torch.manual_seed(0)
    direction = torch.randn(features.shape).to(features)
    (SCALE * (features.float() * direction.float()).sum()).backward()
    return features.detach(), gradients(model)


def poison(setting: Setting) -> None:
    """Fill the memory that will be allocated next with NaN."""
    if setting.on_gpu:
        torch.cuda.empty_cache()
    blocks = setting.choose(gpu=16, tiny=1)
    held_here = [torch.full((2**26,), torch.nan, device=setting.device) for _ in range(blocks)]
    del held_here  # 256 MiB each


def micro_batches(setting: Setting) -> Iterator[Row]:
    """Compare the gradients of a step in micro-batches with the gradients of the plain step, for tiny CLIPs."""
    batch, micro = setting.choose(gpu=(128, 16), tiny=(8, 3))
    limits = {"fp32": 1e-4, "amp": 2e-2}
    exact_float32()
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("vit", "resnet"):
            file = Path(folder) / f"{kind}.pt"
            write_tiny_clip(file, kind)
            model = load_clip(str(file), setting.device)
            inputs = random_batch(model, batch, setting.device)
            step = functools.partial(step_gradients, model, inputs, device=setting.device)
            for precision, most in limits.items():
                plain, parts = step(precision, None), step(precision, micro)
                what = f"stage-1 gradients, tiny {kind}, {precision}, micro-batches / plain step"
                yield held(what, apart(parts, plain), most)


def step_gradients(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    precision: str,
    micro_batch: int | None,
    device: torch.device,
    wrap: type[nn.Module] | None = None,
) -> Tensor:
    """Return the gradients of a step of stage 1 as one vector.

    Args:
        wrap: class that wraps the model for data parallelism; None for no wrapper.
    """
    model.zero_grad()
    module = SumFeatures(model, backbone(model))
    model.logit_scale.requires_grad_(False)
    chosen = Precision(precision, device)
    # This scale is small enough that no gradient overflows.
    scaler = torch.amp.GradScaler(
        device.type, init_scale=SCALE, enabled=chosen.scaler().is_enabled()
    )
    gradient = Gradient(
        model=wrap(module) if wrap else module,
        loss=ContrastiveLoss(),
        precision=chosen,
        scaler=scaler,
        micro_batch=micro_batch,
    )
    gradient.add(list(inputs), torch.arange(len(inputs[0]), device=device))
    return gradients(model)


def ranking(setting: Setting) -> Iterator[Row]:
    """Compare the ranks of CIRR's validation at real size with the ranks of exact similarities, apart from ties."""
    exact_float32()
    sizes = setting.choose(gpu=(4181, 2297, 640), tiny=(40, 30, 8))
    protocols = [ORIGINAL_REMOVED, ORIGINAL_KEPT]
    frozen = random_cirr(*sizes, torch.device("cpu"), grouped=True)
    there = FrozenSplit(
        split=frozen.split,
        images=frozen.images.to(setting.device),
        captions=frozen.captions.to(setting.device),
    )
    rankings = rank(there, compose_sum, protocols, k=10)
    exact = exact_similarities(frozen)
    on_cpu = rank(frozen, compose_sum, protocols, k=10)
    for protocol, found in rankings.items():
        outside = frozen.outside_of(protocol.gallery)
        allowed = protocol.restrict(exact.clone(), frozen.reference_rows, outside)
        wrong = outside_bounds(found.known_ranks, allowed, frozen.target_rows)
        what = f"ranking {sizes[0]:,} x {sizes[1]:,}, {protocol.name}"
        yield held(f"{what}, ranks that no tie explains", wrong, 0)
        similarities = (found.similarities - on_cpu[protocol].similarities).abs().max().item()
        yield held(f"{what}, similarities of the nearest", similarities, TIE)
    in_group = exact.gather(1, frozen.group_rows)
    answers = (frozen.group_rows == frozen.target_rows[:, None]).int().argmax(1)
    wrong = outside_bounds(rankings[ORIGINAL_REMOVED].group_ranks, in_group, answers)
    yield held("ranking in groups, ranks that no tie explains", wrong, 0)


def exact_similarities(frozen: FrozenSplit) -> Tensor:
    """Return the cosine similarities (Q, N) in float64."""
    images, captions = frozen.images.double(), frozen.captions[:, 0].double()
    queries = compose_sum(images[frozen.reference_rows], captions)
    return queries @ F.normalize(images, dim=-1).T


def outside_bounds(ranks: Tensor, exact: Tensor, targets: Tensor) -> int:
    """Count the ranks (Q,) that contradict the exact similarities (Q, N) in every order of ties."""
    of_target = exact.gather(1, targets[:, None])
    fewest = (exact > of_target + TIE).sum(1)
    most = (exact > of_target - TIE).sum(1) - 1  # without the target
    return int(((ranks < fewest) | (ranks > most)).sum())
