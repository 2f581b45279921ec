"""The router's statistics and losses, by hand and against their formulas, and what training does with them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from combiner import Combiner
from conftest import read_csv
from models.routing import load_balancing_loss, router_penalty, router_statistics, router_z_loss
from training.losses import ContrastiveLoss
from training.schedule import Precision
from training.stage2 import ComposedFeatures
from training.step import Gradient

LOGITS = torch.tensor(
    [[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 2.0, 1.0], [1.0, 0.0, 2.0]]
)  # pairs 01, 01, 12, 02


def test_statistics_by_hand():
    statistics = router_statistics(LOGITS, 2)
    high, low = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))  # softmax of two neighbours
    expected = {"expert0_share": 0.75, "expert1_share": 0.75, "expert2_share": 0.5}
    expected |= {"expert0_weight": (2 * high + low) / 4, "expert1_weight": (2 * low + high) / 4}
    expected |= {"expert2_weight": (low + high) / 4}
    halves = [0.375, 0.375, 0.25]
    expected |= {"load_entropy": -sum(p * math.log(p) for p in halves) / math.log(3)}
    expected |= {"row_entropy": -(high * math.log(high) + low * math.log(low)) / math.log(2)}
    expected |= {"experts0+1_rows": 2, "experts0+2_rows": 1, "experts1+2_rows": 1}
    assert statistics == pytest.approx(expected)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.integers(0, 99))
def test_statistics_add_up(experts, top_k, rows, seed):
    top_k = min(top_k, experts)
    logits = torch.randn(rows, experts, generator=torch.Generator().manual_seed(seed))
    statistics = router_statistics(logits, top_k)
    assert sum(v for k, v in statistics.items() if k.endswith("_share")) == pytest.approx(top_k)
    assert sum(v for k, v in statistics.items() if k.endswith("_weight")) == pytest.approx(1)
    assert (
        sum(v for k, v in statistics.items() if k.endswith("_rows"))
        == rows * top_k * (top_k - 1) // 2
    )
    assert 0 <= statistics["load_entropy"] <= 1 + 1e-6
    assert 0 <= statistics["row_entropy"] <= 1 + 1e-6


def test_the_balancing_loss_is_that_of_switch_transformers():
    """N sum f_i P_i with f from the argmax (equations 4 to 6), 1 at balance, N where one expert takes all."""
    probabilities = LOGITS.softmax(-1).mean(0)
    fractions = torch.tensor([0.5, 0.25, 0.25])
    torch.testing.assert_close(
        load_balancing_loss(LOGITS, 1), 3 * (fractions * probabilities).sum()
    )
    even = torch.eye(4) * 50
    assert load_balancing_loss(even, 1).item() == pytest.approx(1)
    assert load_balancing_loss(even[:1].repeat(4, 1), 1).item() == pytest.approx(4)
    assert load_balancing_loss(even, 4).item() == pytest.approx(1)


def test_the_z_loss():
    expected = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in LOGITS.tolist()) / 4
    assert router_z_loss(LOGITS).item() == pytest.approx(expected)


def test_no_weight_is_no_penalty():
    assert router_penalty(0.0, 0.0, 2) is None
    both = router_penalty(0.5, 0.25, 2)(LOGITS)
    torch.testing.assert_close(
        both, 0.5 * load_balancing_loss(LOGITS, 2) + 0.25 * router_z_loss(LOGITS)
    )


def test_the_penalty_adds_its_gradient_and_not_its_value():
    torch.manual_seed(0)
    model = ComposedFeatures(Combiner(8, 8, 8).eval(), with_router=True)
    inputs = [
        torch.randn(5, 8),
        torch.randn(5, 8),
        torch.nn.functional.normalize(torch.randn(5, 8), dim=-1),
    ]
    penalty = router_penalty(0.3, 0.2, 2)
    precision = Precision("fp32", torch.device("cpu"))
    gradient = Gradient(
        model=model,
        loss=ContrastiveLoss(),
        precision=precision,
        scaler=precision.scaler(),
        penalty=penalty,
    )
    loss = gradient.add(inputs, torch.arange(5))
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    queries, targets, logits = model(*inputs)
    plain = ContrastiveLoss()(queries, targets, torch.arange(5))
    (plain + penalty(logits)).backward()
    assert loss.item() == pytest.approx(plain.item())
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, dict(model.named_parameters())[name].grad)


@pytest.mark.slow
def test_statistics_of_every_epoch_stand_beside_the_validations(stage_2):
    folder = stage_2("CIRR", "--num-epochs", 3, "--validation-frequency", 2, "--num-experts", 3)
    rows = read_csv(folder / "router_metrics.csv")
    assert rows["epoch"] == [0, 1, 2]
    assert [name for name in rows if name.endswith("_share")] == [
        f"expert{i}_share" for i in range(3)
    ]
    assert [
        sum(rows[f"experts{pair}_rows"][i] for pair in ("0+1", "0+2", "1+2")) for i in range(3)
    ] == [30, 30, 30]
    plain = stage_2("CIRR", "--combiner-type", "clip4cir", "--num-epochs", 1, output="plain")
    assert not (plain / "router_metrics.csv").exists()


@pytest.mark.slow
def test_the_losses_change_the_training_and_balance_the_load(stage_2):
    flags = ["CIRR", "--num-epochs", 12, "--validation-frequency", 12]
    plain = read_csv(stage_2(*flags, output="a") / "router_metrics.csv")
    flags += ["--load-balancing-weight", 3, "--router-z-weight", 0.01]
    steered = read_csv(stage_2(*flags, output="b") / "router_metrics.csv")
    assert steered["load_entropy"][-1] > plain["load_entropy"][-1]


@pytest.mark.slow
def test_off_by_default(stage_2):
    zero = ["--load-balancing-weight", 0, "--router-z-weight", "0.0"]
    files = [
        stage_2("CIRR", "--num-epochs", 1, *flags, output=name) / "train_metrics.csv"
        for name, flags in (("a", []), ("b", zero))
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "x"])
def test_weights_that_are_none(value, fails, drawn):
    name = ["--clip-model-name", drawn / "tiny_clip_vit.pt"]
    error = fails(
        "combiner_train", drawn, "--dataset", "CIRR", *name, f"--load-balancing-weight={value}"
    )
    assert "--load-balancing-weight" in error
