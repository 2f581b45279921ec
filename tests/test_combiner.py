"""The Combiners against their definitions, in values and gradients, and their checkpoints."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import combiner
from combiner import (
    NO_PARTS,
    Combiner,
    Parts,
    PlainCombiner,
    Reordered,
    SparseMoE,
    build_combiner,
    combiner_settings,
    compose_sum,
    load_combiner,
)
from models.routing import router_penalty
from training.losses import ContrastiveLoss
from training.schedule import Precision
from training.stage2 import ComposedFeatures
from training.step import Gradient
from twins import DefinedCombiner, DefinedPlainCombiner, RowLoopMoE
from utils import UserError

ALL_PARTS = Parts(shared_expert=True, router_norm=True, router_bias=0.1, router_noise=1.0)


def moe_and_twin(
    num_experts: int, top_k: int, seed: int = 0, dtype=torch.float64, parts: Parts = NO_PARTS
):
    torch.manual_seed(seed)
    moe = SparseMoE(6, 5, num_experts, top_k, parts=parts).to(dtype).eval()
    if parts.router_bias:
        moe.router_bias.normal_()
    twin = RowLoopMoE(6, 5, num_experts, top_k, parts).to(dtype).eval()
    twin.load_state_dict(moe.state_dict())
    return moe, twin


def assert_same_values_and_gradients(moe, twin, x, tolerance=1e-12):
    results = []
    for module in (moe, twin):
        own = x.clone().requires_grad_()
        out = module(own)
        module.zero_grad()
        (out * torch.arange(out.numel(), dtype=out.dtype).view_as(out).cos()).sum().backward()
        gradients = {
            n: torch.zeros_like(p) if p.grad is None else p.grad
            for n, p in module.named_parameters()
        }
        results.append([out, own.grad, *gradients.values()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@settings(max_examples=60)
@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(0, 1000),
    st.builds(
        Parts,
        shared_expert=st.booleans(),
        router_norm=st.booleans(),
        router_bias=st.sampled_from([0.0, 0.1]),
    ),
)
def test_moe_equals_its_definition(num_experts, top_k, rows, seed, parts):
    moe, twin = moe_and_twin(num_experts, min(top_k, num_experts), seed, parts=parts)
    x = torch.randn(rows, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert_same_values_and_gradients(moe, twin, x)


@pytest.mark.parametrize("top_k", [1, 4])
def test_moe_at_the_ends_of_k(top_k):
    assert_same_values_and_gradients(
        *moe_and_twin(4, top_k), torch.randn(7, 6, dtype=torch.float64)
    )


def test_the_gradient_of_reordered_rows_is_that_of_indexing():
    order = torch.tensor([3, 0, 5, 1, 4, 2])  # slots of 3 rows, 2 copies each
    rows = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.equal(Reordered.apply(rows, order, order.argsort()), rows[order // 2])
    assert torch.autograd.gradcheck(Reordered.apply, (rows, order, order.argsort()))


def test_an_expert_without_rows_does_not_run_and_gets_no_gradient():
    moe, twin = moe_and_twin(4, 2)
    with torch.no_grad():
        for module in (moe, twin):
            module.router.bias[1] = -1e9
    moe.experts[1].register_forward_hook(lambda *_: pytest.fail("an expert without rows was run"))
    assert_same_values_and_gradients(moe, twin, torch.randn(5, 6, dtype=torch.float64))
    assert moe.experts[1][0].weight.grad is None


def test_each_expert_runs_at_most_once_a_step():
    """Guards against the original's loop over rows: 2B one-row expert calls a step."""
    moe, _ = moe_and_twin(4, 2, dtype=torch.float32)
    calls = []
    for expert in moe.experts:
        expert.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    moe(torch.randn(50, 6))
    assert len(calls) <= 4
    assert sum(calls) == 100


def looped_grouped_mm(rows, weights, *, offs):
    """What `torch.nn.functional.grouped_mm` is."""
    counts = offs.diff(prepend=offs.new_zeros(1)).tolist()
    return torch.cat([part @ w for part, w in zip(rows.split(counts), weights, strict=True)])


@pytest.fixture
def grouped(monkeypatch):
    """Let the CPU multiply all groups at once, by torch's own loop or, before torch 2.10, by ours."""

    def grouped(is_on: bool = True) -> None:
        monkeypatch.setattr(combiner, "has_grouped_product", lambda *_: is_on)

    if not hasattr(F, "grouped_mm"):
        monkeypatch.setattr(F, "grouped_mm", looped_grouped_mm, raising=False)
    return grouped


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("num_experts", "top_k", "parts"),
    [(4, 2, NO_PARTS), (4, 1, NO_PARTS), (4, 4, NO_PARTS), (1, 1, NO_PARTS), (4, 2, ALL_PARTS)],
)
def test_a_grouped_product_equals_one_product_an_expert(
    num_experts, top_k, parts, autocast, grouped
):
    torch.manual_seed(2)
    moe = SparseMoE(16, 8, num_experts, top_k, parts=parts).eval()
    with torch.no_grad():
        moe.router.bias[0] = -1e9  # unless all are chosen, the first expert has no rows
    x = torch.randn(7, 16)
    results = []
    for is_on in (False, True):
        grouped(is_on)
        own = x.clone().requires_grad_()
        moe.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = moe(own)
        out.sin().sum().backward()
        gradients = [
            torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in moe.parameters()
        ]
        assert moe.load is None or sum(moe.load) == top_k * len(x)
        results.append([out, own.grad, *gradients])
    tolerance = 2**-6 if autocast else 1e-6  # bfloat16: the bias is added after rounding
    for one_by_one, at_once in zip(*results, strict=True):
        assert one_by_one.dtype == at_once.dtype == torch.float32
        torch.testing.assert_close(at_once, one_by_one, rtol=tolerance, atol=tolerance)


def test_a_grouped_product_runs_once_a_step(grouped, monkeypatch):
    grouped()
    calls = []
    product = F.grouped_mm
    monkeypatch.setattr(
        F, "grouped_mm", lambda *rows, offs: calls.append(offs) or product(*rows, offs=offs)
    )
    moe = SparseMoE(16, 8, 4, 2)
    for expert in moe.experts:
        expert.register_forward_hook(lambda *_: pytest.fail("an expert was run by itself"))
    moe(torch.randn(7, 16))
    (ends,) = calls
    assert ends.dtype == torch.int32
    assert ends[-1] == 14


def test_products_are_in_half_precision_and_the_router_never_is():
    moe = SparseMoE(16, 8, 4, 2)
    x = torch.randn(7, 16)
    types = []
    for expert in moe.experts:
        expert.register_forward_hook(lambda _, args, out: types.extend([args[0].dtype, out.dtype]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = moe.route(x)
        assert moe.mix(x, logits).dtype == torch.float32
    assert set(types) == {torch.bfloat16}
    assert torch.equal(logits, moe.router(x))
    composer = Combiner(12, 8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert composer.routed(*torch.randn(2, 5, 12))[1].dtype == torch.float32
        assert composer.explained(*torch.randn(2, 5, 12))[1].experts.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "precision", "backend", "batches"),
    [
        ("plain", "fp32", "eager", [9, 7]),  # an epoch's last batch is smaller
        pytest.param("one by one", "fp32", "aot_eager", [9], marks=pytest.mark.long),
        # torch traces a grouped product in bfloat16 alone, where other kernels than eager ones round differently.
        ("grouped", "bf16", "eager", [9, 7]),
    ],
)
def test_a_compiled_combiner_learns_the_same(kind, precision, backend, batches, grouped):
    """Traced, forward and backward, but without the minute that generating code for a CPU takes.

    In one graph, but for the experts that run one by one: their wait cuts it in two.
    """
    torch.manual_seed(3)
    composer = PlainCombiner(12, 8, 16) if kind == "plain" else Combiner(12, 8, 16)
    if kind == "grouped":
        grouped()
    model = ComposedFeatures(composer.eval(), with_router=composer.has_router)
    compiled = torch.compile(model, backend=backend, fullgraph=kind != "one by one")
    chosen = Precision(precision, torch.device("cpu"))

    def learn(learned, rows: int) -> tuple:
        torch.manual_seed(rows)
        model.zero_grad()
        gradient = Gradient(
            model=learned,
            loss=ContrastiveLoss(),
            precision=chosen,
            scaler=chosen.scaler(),
            penalty=router_penalty(0.1, 0.1, composer.top_k),
        )
        inputs = [torch.randn(rows, 12), torch.randn(rows, 12)]
        inputs.append(F.normalize(torch.randn(rows, 12)))
        loss = gradient.add(inputs, torch.arange(rows))
        return loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    for rows in batches:
        torch.testing.assert_close(learn(compiled, rows), learn(model, rows))


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 2), (3, 1), (2, 2)])
def test_the_moe_combiner_equals_its_definition(num_experts, top_k):
    torch.manual_seed(1)
    ours = Combiner(12, 8, 10, num_experts, top_k).double().eval()
    twin = DefinedCombiner(12, 8, 10, num_experts, top_k).double().eval()
    twin.load_state_dict(
        ours.state_dict()
    )  # strict: the names are those of the original's checkpoints
    image, text = torch.randn(2, 9, 12, dtype=torch.float64)
    torch.testing.assert_close(ours(image, text), twin(image, text))


def test_the_plain_combiner_equals_its_definition():
    ours = PlainCombiner(12, 8, 10).double().eval()
    twin = DefinedPlainCombiner(12, 8, 10).double().eval()
    twin.load_state_dict(ours.state_dict())
    image, text = torch.randn(2, 9, 12, dtype=torch.float64)
    torch.testing.assert_close(ours(image, text), twin(image, text))


@pytest.mark.parametrize("kind", [Combiner, PlainCombiner])
def test_a_gate_leans_as_by_a_bias_and_in_the_middle_not_at_all(kind):
    torch.manual_seed(0)
    combiner = kind(8, 8, 6).eval()
    image, text = torch.randn(2, 3, 8)
    trained = combiner(image, text)
    assert torch.equal(combiner(image, text, torch.full([3], 0.5)), trained)
    leaned = combiner(image, text, torch.tensor([0, 0.8, 1]))
    gates = combiner.explained(image, text, torch.tensor([0, 0.8, 1]))[1].gate
    net = combiner.gate_net if kind is Combiner else combiner.dynamic_scalar
    with torch.no_grad():
        net[-1].bias += math.log(0.8 / 0.2)
    torch.testing.assert_close(leaned[1], combiner(image, text)[1])
    torch.testing.assert_close(gates[1], combiner.explained(image, text)[1].gate[1])
    assert gates[0] == 0 and gates[2] == 1


def test_sizes_at_full_scale():
    """About 169 M parameters at D 768, P 2560, H 5120."""
    with torch.device("meta"):
        count = sum(p.numel() for p in Combiner(768, 2560, 5120).parameters())
    assert count == pytest.approx(169e6, rel=0.01)


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    composer = Combiner(12, 8, 10)
    image, text = torch.randn(2, 3, 12)
    assert not torch.equal(composer(image, text), composer(image, text))
    composer.eval()
    assert torch.equal(composer(image, text), composer(image, text))


def test_sum_and_loss():
    image, text = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    torch.testing.assert_close(compose_sum(image, text), torch.tensor([[0.6, 0.8]]))
    queries, targets = torch.eye(3), torch.eye(3)[[0, 2, 1]]
    row_losses = -(100 * queries @ targets.T).log_softmax(1).diagonal()
    loss = ContrastiveLoss()(queries, targets, torch.arange(len(queries)))
    torch.testing.assert_close(loss, row_losses.mean())


@pytest.mark.parametrize("kind", ["moe", "clip4cir"])
def test_a_checkpoint_tells_its_own_sizes(kind, tmp_path):
    settings = {"combiner_type": kind, "clip_dim": 12, "projection_dim": 8, "hidden_dim": 10}
    settings |= (
        {"num_experts": 3, "top_k": 1} if kind == "moe" else {"num_experts": None, "top_k": None}
    )
    built = build_combiner(settings)
    checkpoint = {"Combiner": built.state_dict(), "config": {"top_k": 1}}
    assert (
        combiner_settings(checkpoint["Combiner"], checkpoint.get("config", {}), tmp_path)
        == settings
    )
    loaded = load_combiner(
        checkpoint["Combiner"],
        checkpoint.get("config", {}),
        tmp_path,
        wanted={},
        clip_dim=12,
    )
    image, text = torch.randn(2, 4, 12)
    torch.testing.assert_close(loaded(image, text), built.eval()(image, text))


def test_k_is_the_originals_where_a_checkpoint_does_not_say(tmp_path):
    checkpoint = {"Combiner": Combiner(12, 8, 10, num_experts=4, top_k=1).state_dict()}
    assert (
        combiner_settings(checkpoint["Combiner"], checkpoint.get("config", {}), tmp_path)["top_k"]
        == 2
    )


def test_impossible_sizes_are_refused():
    with pytest.raises(UserError, match="--projection-dim 10"):
        Combiner(12, 10, 10)
    with pytest.raises(UserError, match="--top-k 5"):
        Combiner(12, 8, 10, num_experts=4, top_k=5)
