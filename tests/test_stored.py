"""What files say of themselves, field by field, and weights from elsewhere, weight by weight: read, or named."""

import json
import math
from pathlib import Path

import pytest
import torch

from combiner import build_combiner, load_combiner
from conftest import CASES
from models import clip_model
from models.clip_model import load_clip, load_finetuned
from models.configuration import read_checkpoint
from runtime.choices import CombinerChoice
from runtime.tensors import load_tensors
from utils import UserError

CPU = torch.device("cpu")


def refused(call, *words: str) -> str:
    """The one line of a UserError, which has some words."""
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    for word in words:
        assert word in message
    return message


# Weights


@pytest.fixture(scope="module")
def clip_file(drawn) -> Path:
    return drawn / "tiny_clip_resnet.pt"  # with counters, which are whole numbers


@pytest.fixture(scope="module")
def clip(clip_file):
    return load_clip(str(clip_file), CPU)


COMBINERS = {
    "moe": {"combiner_type": "moe", "num_experts": 3, "top_k": 1},
    "clip4cir": {"combiner_type": "clip4cir", "num_experts": None, "top_k": None},
}


def combiner_of(kind: str):
    return build_combiner(
        {"clip_dim": 12, "projection_dim": 8, "hidden_dim": 10, **COMBINERS[kind]}
    )


def load_as(kind: str, state: dict, clip, path: Path = Path("there.pt")) -> dict:
    """The weights that a state dict gives to a model of a kind: CLIP, or one of COMBINERS."""
    if kind == "CLIP":
        load_finetuned(clip, state, path)
        return clip.state_dict()
    wanted = CombinerChoice()
    return load_combiner(state, {"top_k": 1}, path, wanted=wanted, clip_dim=12).state_dict()


def weights_of(kind: str, clip) -> dict[str, torch.Tensor]:
    model = clip if kind == "CLIP" else combiner_of(kind)
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def with_first(weight: torch.Tensor, value: float) -> torch.Tensor:
    changed = weight.clone()
    changed.view(-1)[0] = value
    return changed


FLAWS = {
    "NaN": lambda weight: with_first(weight, math.nan),
    "infinite": lambda weight: with_first(weight, math.inf),
    "infinite below": lambda weight: with_first(weight, -math.inf),
    "too large for float32": lambda weight: with_first(weight.double(), 1e300),
    "complex": lambda weight: weight.to(torch.complex64),
    "whole numbers": lambda weight: weight.long(),
    "yes and no": lambda weight: weight.bool(),
    "eight bits": lambda weight: weight.to(torch.float8_e4m3fn),
    "sparse": lambda weight: weight.to_sparse(),
    "without data": lambda weight: weight.to("meta"),
    "one value for all": lambda weight: torch.ones(()).expand(weight.shape),
    "a list": lambda weight: weight.tolist(),
    "nothing": lambda weight: None,
    "one row more": lambda weight: torch.cat([weight.view(-1), torch.ones(1)]),
    "flat": lambda weight: weight.view(*weight.shape, 1),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("flaw", FLAWS)
@pytest.mark.parametrize("kind", ["CLIP", *COMBINERS])
def test_a_flaw_of_any_weight_is_named(kind, flaw, clip):
    weights = weights_of(kind, clip)
    for name, weight in weights.items():
        if not weight.is_floating_point() or (flaw == "one value for all" and weight.numel() == 1):
            continue
        damaged = {**weights, name: FLAWS[flaw](weight)}
        refused(lambda state=damaged: load_as(kind, state, clip), "there.pt", name)
        CASES["weights", "refused"] += 1


@pytest.mark.parametrize("kind", ["CLIP", *COMBINERS])
def test_any_weight_that_is_missing_or_extra_is_named(kind, clip):
    weights = weights_of(kind, clip)
    for name in weights:
        others = {other: weight for other, weight in weights.items() if other != name}
        if not name.endswith("num_batches_tracked"):
            refused(lambda state=others: load_as(kind, state, clip), "there.pt", name)
    extra = {**weights, "ema.decay": torch.ones(1), "more": torch.ones(1)}
    refused(lambda: load_as(kind, extra, clip), "ema.decay and 1 more extra")


@pytest.mark.parametrize("kind", ["CLIP", *COMBINERS])
def test_weights_of_zeros(kind, clip):
    """All of them, or those that every feature passes; a bias may well be zero."""
    weights = weights_of(kind, clip)
    zeros = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    refused(lambda: load_as(kind, zeros, clip), "is zero throughout")
    biases = {name: torch.zeros_like(w) if "bias" in name else w for name, w in weights.items()}
    load_as(kind, biases, clip)
    load_as(kind, weights, clip)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: ".".join([*name.split(".")[:1], "_orig_mod", *name.split(".")[1:]]),
    ],
)
@pytest.mark.parametrize("form", [".pt", "plain", ".safetensors"])
@pytest.mark.parametrize("kind", ["CLIP", *COMBINERS])
def test_names_of_wrappers_are_taken_off_in_every_form(kind, form, wrapped, clip, tmp_path):
    weights = weights_of(kind, clip)
    key = "CLIP" if kind == "CLIP" else "Combiner"
    path = tmp_path / f"weights{'.pt' if form == 'plain' else form}"
    save(path, {wrapped(name): weight for name, weight in weights.items()}, form, key)
    found = read_checkpoint("--path", tmp_path / "weights", key)
    loaded = load_as(kind, found.state, clip, path)
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    if kind != "CLIP":
        assert found.table["top_k"] == 1
    other = {"CLIP": "Combiner", "Combiner": "CLIP"}[key]
    refused(lambda: read_checkpoint("--path", path, other), "--path", str(path), "weights, not")


def save(path: Path, state: dict, form: str, key: str) -> None:
    """A checkpoint in one of the forms that are read."""
    if form == ".pt":
        torch.save({key: state, "config": {"top_k": 1}}, path)
    elif form == "plain":
        torch.save({**state, "config": {"top_k": 1}}, path)
    else:
        safetensors = pytest.importorskip("safetensors.torch")
        metadata = {"config": json.dumps({"top_k": 1})}
        safetensors.save_file(state, path, metadata=metadata)


def test_weights_twice_or_without_a_name(tmp_path):
    torch.save({"CLIP": {"a": torch.ones(1), "module.a": torch.ones(1)}}, tmp_path / "a.pt")
    refused(lambda: read_checkpoint("--path", tmp_path, "CLIP"), "a.pt holds a twice", "module.a")
    torch.save({"CLIP": {3: torch.ones(1)}}, tmp_path / "a.pt")
    refused(lambda: read_checkpoint("--path", tmp_path, "CLIP"), "a.pt: 3 is no name of a weight")


# What tells the sizes of a CLIP, before there is a model to compare with.
TELLING = {
    "visual.proj", "visual.conv1.weight", "visual.positional_embedding", "visual.layer1.0.conv1.weight",
    "visual.attnpool.positional_embedding", "ln_final.weight", "text_projection", "positional_embedding",
    "token_embedding.weight",
}  # fmt: skip


@pytest.mark.parametrize("file", ["tiny_clip_vit.pt", "tiny_clip_resnet.pt"])
def test_a_model_is_read_in_every_form(file, drawn, tmp_path, monkeypatch):
    state = load_tensors(drawn / file)
    whole = load_clip(str(drawn / file), CPU).state_dict()
    safetensors = pytest.importorskip("safetensors.torch")
    wrapped = {f"module.{name}": weight for name, weight in state.items()}
    safetensors.save_file(wrapped, tmp_path / "model.safetensors")
    loaded = load_clip(str(tmp_path / "model"), CPU).state_dict()
    assert all(torch.equal(loaded[name], whole[name]) for name in whole)
    path = drawn / file
    content: dict = {}
    monkeypatch.setattr(clip_model, "load_tensors", lambda _: dict(content))
    for name in [*TELLING & state.keys(), *list(state)[::25]]:
        if name.endswith("num_batches_tracked"):
            continue
        weight = state[name]
        others = {other: kept for other, kept in state.items() if other != name}
        for changed in ({}, {name: None}, {name: weight[None]}, {name: weight * math.nan}):
            content = {**others, **changed}
            refused(lambda: load_clip(str(path), CPU), f"--clip-model-name {path}", name)
            CASES["weights", "refused"] += 1
    # It would be infinite when it is rounded to half precision.
    content = {**state, "text_projection": with_first(state["text_projection"].float(), 1e5)}
    refused(lambda: load_clip(str(path), CPU), "text_projection is not finite")


def test_a_damaged_safetensors_file(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "a.safetensors"
    safetensors.save_file({"text_projection": torch.ones(4, 4)}, path)
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        refused(lambda: load_tensors(path), str(path), "not a readable checkpoint")
    safetensors.save_file({"a": torch.ones(1)}, path, metadata={"config": "{"})
    refused(lambda: load_tensors(path), str(path))
