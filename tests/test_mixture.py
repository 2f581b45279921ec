"""What a mixture may have beyond the original's, from its flags through training to a pair that was handed on."""

import json

import pytest
import torch

import export
from combiner import Combiner, Parts, SparseMoE, build_combiner, combiner_settings, load_combiner
from conftest import read_csv
from equal_parameters import ONE_EXPERT, PLAIN, equal_hidden_dim, parameters
from models.routing import load_balancing_loss, router_penalty, router_statistics
from runtime import distributed
from runtime.tensors import load_tensors
from utils import UserError

ALL_PARTS = Parts(shared_expert=True, router_norm=True, router_bias=0.1, router_noise=0.5)
FLAGS = ["--shared-expert", "--router-norm", "--router-bias", 0.1, "--router-noise", 0.5]
TOLD = {"shared_expert": True, "router_norm": True, "router_bias": True}
SIZES = {"clip_dim": 12, "projection_dim": 8, "hidden_dim": 10, "num_experts": 4, "top_k": 2}


@pytest.fixture
def combiner():
    torch.manual_seed(0)
    built = build_combiner({**SIZES, "combiner_type": "moe", **vars(ALL_PARTS)})
    built.router_bias.normal_()
    return built.eval()


def test_noise_is_that_of_the_global_batch_and_in_training_alone(monkeypatch):
    moe = SparseMoE(6, 5, 4, 2, parts=Parts(router_noise=0.5))
    x = torch.randn(1000, 6)
    torch.manual_seed(1)
    noisy = moe.route(x)
    torch.manual_seed(1)
    torch.testing.assert_close(noisy, moe.router(x) + 0.5 * torch.randn(1000, 4))
    shards = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        torch.manual_seed(1)
        shards.append(moe.route(x.chunk(2)[rank]))
    torch.testing.assert_close(torch.cat(shards), noisy)
    assert torch.equal(moe.eval().route(x), moe.router(x))


def test_a_step_moves_the_bias_against_the_load_and_evens_it():
    """By the sign of each expert's error (Wang et al. 2024, algorithm 1), whatever the router prefers."""
    torch.manual_seed(0)
    moe = SparseMoE(6, 5, 4, 2, parts=Parts(router_bias=0.05))
    with torch.no_grad():
        moe.router.bias.copy_(torch.tensor([3.0, 0.0, 0.0, -3.0]))
    x = torch.randn(200, 6)
    for _ in range(150):
        expected = moe.router_bias.clone()
        moe(x)
        for expert, rows in enumerate(moe.load.tolist()):
            expected[expert] += 0.05 * ((rows < 100) - (rows > 100))
        moe.rebalance(0.05)
        torch.testing.assert_close(moe.router_bias.data, expected)
    assert moe.load.sum() == 400
    assert max(moe.load) - min(moe.load) < 40
    logits = moe.route(x).detach()
    even = router_statistics(logits, 2, moe.router_bias)["load_entropy"]
    assert even > 0.99 > router_statistics(logits, 2)["load_entropy"]


def test_the_balancing_loss_counts_those_that_the_bias_chose():
    logits, bias = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0.0, 0.0, 9.0])
    chosen_last = 3 * logits.softmax(-1)[0, 2]
    torch.testing.assert_close(load_balancing_loss(logits, 1, bias), chosen_last)
    torch.testing.assert_close(router_penalty(1.0, 0.0, 1, bias=bias)(logits), chosen_last)


def test_a_query_depends_on_no_other_of_its_batch(combiner):
    image, text = torch.randn(2, 9, 12)
    together = combiner(image, text)
    alone = [combiner(image[row : row + 1], text[row : row + 1]) for row in range(9)]
    torch.testing.assert_close(torch.cat(alone), together)
    order = torch.randperm(9)
    torch.testing.assert_close(combiner(image[order], text[order]), together[order])


def test_weights_alone_tell_the_parts(combiner, tmp_path):
    state = combiner.state_dict()
    assert combiner_settings(state, {}, tmp_path) == {**SIZES, "combiner_type": "moe", **TOLD}
    loaded = load_combiner(state, {}, tmp_path, wanted={"shared_expert": True}, clip_dim=12)
    image, text = torch.randn(2, 5, 12)
    assert torch.equal(loaded(image, text), combiner(image, text))
    assert torch.equal(
        loaded.explained(image, text)[1].experts, combiner.explained(image, text)[1].experts
    )
    plain = Combiner(12, 8, 10).state_dict()
    with pytest.raises(UserError, match=r"--shared-expert True differs from the value none in "):
        load_combiner(plain, {}, tmp_path, wanted={"shared_expert": True}, clip_dim=12)


@pytest.mark.slow
def test_a_pair_is_handed_on_with_all_parts(stage_2, drawn, run, tmp_path):
    """Trained, its averaged weights saved, measured, exported, and measured again: the same numbers."""
    folder = stage_2("CIRR", *FLAGS, "--ema-decay", 0.5, "--save-best")
    weights = sorted((folder / "saved_models").iterdir())[-1]
    state = load_tensors(weights)["Combiner"]
    assert state["moe_layer.router_bias"].any()
    assert combiner_settings(state, {}, weights).items() >= TOLD.items()
    assert read_csv(folder / "router_metrics.csv")["epoch"] == [0, 1]
    own = ["--clip-model-name", drawn / "tiny_clip_vit.pt", "--combiner-path", weights]
    export.main(list(map(str, [*own, "--output", tmp_path / "pair"])))
    sizes = json.loads((tmp_path / "pair" / "config.json").read_text())["combiner"]["sizes"]
    assert sizes.items() >= TOLD.items()
    assert "shared expert True" in (tmp_path / "pair" / "README.md").read_text()
    metrics = []
    for name, flags in {"own": own, "exported": ["--pair", tmp_path / "pair"]}.items():
        words = ["--dataset", "CIRR", "--combining-function", "combiner", *flags]
        run("validate", drawn, *words, "--metrics-json", tmp_path / name)
        metrics.append(json.loads((tmp_path / name).read_text())["metrics"])
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("other", [ONE_EXPERT, PLAIN, {"num_experts": 3, "shared_expert": True}])
@pytest.mark.parametrize("projection_dim", [8, 256])
def test_equal_parameters_are_the_nearest(other, projection_dim):
    mixture = {**SIZES, "combiner_type": "moe", "projection_dim": projection_dim}
    size = equal_hidden_dim(mixture, other)
    near = [size - 1, size, size + 1]
    counts = [parameters({**mixture, **other, "hidden_dim": hidden}) for hidden in near]
    errors = [abs(count - parameters(mixture)) for count in counts]
    assert min(errors) == errors[1]
