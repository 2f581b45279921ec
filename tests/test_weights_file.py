# ruff: noqa: F401, F811
"""Weights that other trainings and publishers wrote: the same on every flag, or named as what they are."""

import argparse
import gzip
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from combiner import build_combiner
from models.clip_model import load_clip, tokenize
from models.configuration import read_checkpoint
from models.encoder import load_backbone
from runtime.tensors import load_tensors
from test_backbones import openais
from utils import UserError

CPU = torch.device("cpu")
OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}


def renamed(state: dict, prefix: str) -> dict:
    return {f"{prefix}{name}": weight for name, weight in state.items()}


def with_buffers(state: dict) -> dict:
    numbers = {"input_resolution": torch.tensor(64), "attn_mask": torch.zeros(77, 77)}
    return {**state, **numbers}


# What others write, of a state dict -> words of the line that says so.
FORMS = {
    "open_clip": (
        lambda state: {
            "epoch": 3,
            "name": "mine",
            "state_dict": renamed(state, "module."),
            "optimizer": OPTIMIZER,
        },
        "other training code (state_dict); left out: epoch, name, optimizer",
    ),
    "lightning": (
        lambda state: {
            "pytorch-lightning_version": "2.5",
            "state_dict": {**renamed(state, "model."), "loss.scale": torch.ones(1)},
            "optimizer_states": [OPTIMIZER],
        },
        "other training code (state_dict), a model called model.; left out: pytorch-lightning_version, "
        "optimizer_states",
    ),
    "plain training": (
        lambda state: {"model_state_dict": with_buffers(state), "config": argparse},
        "other training code (model_state_dict); left out: config, input_resolution, attn_mask",
    ),
    "inside a larger model": (
        lambda state: {**renamed(state, "clip."), "head.weight": torch.ones(2)},
        "a model called clip.; left out: head.weight",
    ),
}


def saved(form: str, state: dict, path: Path) -> str:
    """Write a state dict as others do; what is said of it."""
    make, said = FORMS[form]
    content = {name: value for name, value in make(state).items() if value is not argparse}
    if "config" in make(state):
        content["config"] = {"model": "of another project"}
    torch.save(content, path)
    return said


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_others_are_the_same_on_every_flag(form, openais, golden, tmp_path, caplog):
    caplog.set_level("INFO")
    state = load_tensors(golden / "clip_vit.pt")
    plain = load_clip(str(golden / "clip_vit.pt"), CPU).state_dict()
    path = tmp_path / "theirs.ckpt"
    said = saved(form, state, path)
    own = load_clip(str(path), CPU).state_dict()
    other = load_backbone(f"open_clip:clip_vit-quickgelu={path}", CPU)[0].state_dict()
    tuned = read_checkpoint("--clip-model-path", path, "CLIP")
    assert tuned.config == {}
    assert tuned.state.keys() == plain.keys() == other.keys()
    for name, weight in plain.items():
        assert torch.equal(own[name], weight)  # rounded, as the clip package builds it
        assert torch.equal(other[name], state[name])
        assert torch.equal(tuned.state[name], state[name])
    lines = [record.getMessage() for record in caplog.records if said in record.getMessage()]
    assert len(lines) == 3
    with pytest.raises(UserError, match="stage-1 weights, not stage-2"):
        read_checkpoint("--combiner-path", path, "Combiner")


def test_a_combiner_of_others(tmp_path):
    sizes = {"clip_dim": 12, "projection_dim": 8, "hidden_dim": 10, "combiner_type": "clip4cir"}
    state = build_combiner({**sizes, "num_experts": None, "top_k": None}).state_dict()
    saved("lightning", state, tmp_path / "theirs.ckpt")
    found = read_checkpoint("--combiner-path", tmp_path / "theirs.ckpt", "Combiner")
    assert found.state.keys() == state.keys()


def test_of_several_models_none_is_chosen(golden, tmp_path):
    state = load_tensors(golden / "clip_vit.pt")
    torch.save({**renamed(state, "student."), **renamed(state, "teacher.")}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"several models \(student., teacher.\)"):
        load_clip(str(tmp_path / "a.pt"), CPU)


# Hugging Face


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory) -> tuple[Path, nn.Module]:
    """A tiny CLIP as transformers publishes it, and the model."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tower = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 1, "hidden_act": "quick_gelu"}
    config = transformers.CLIPConfig(
        text_config={**tower, "vocab_size": 49408, "eos_token_id": 49407},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    model = transformers.CLIPModel(config).eval()
    for name, weight in model.named_parameters():  # biases that are some
        if name.endswith("bias"):
            nn.init.normal_(weight, std=0.02)
    model.half().float()  # as load_clip rounds
    folder = tmp_path_factory.mktemp("hugging_face")
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("form", ["as published", "fine-tuned"])
def test_hugging_faces_clip_gives_its_features(form, hugging_face, tmp_path, caplog):
    caplog.set_level("INFO")
    path, theirs = hugging_face
    if form == "fine-tuned":
        path = tmp_path / "tuned.ckpt"
        positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
        state = {**theirs.state_dict(), **positions}
        torch.save({"state_dict": renamed(state, "model.clip.")}, path)
    ours = load_clip(str(path), CPU)
    pixels, tokens = torch.randn(3, 3, 32, 32), tokenize(["is red", "has no sleeves, and a collar"])
    with torch.no_grad():
        images = theirs.vision_model(pixels).pooler_output
        texts = theirs.text_model(tokens).pooler_output
        expected = theirs.visual_projection(images), theirs.text_projection(texts)
        found = ours.encode_image(pixels), ours.encode_text(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert "Hugging Face's CLIP" in caplog.text
    # What the file does not tell is said: a fine-tuned one has no config.json beside it.
    assert ("does not record its activation" in caplog.text) == (form == "fine-tuned")


def test_hugging_faces_weights_that_openais_clip_would_compute_otherwise(hugging_face, tmp_path):
    folder, model = hugging_face
    about = json.loads((folder / "config.json").read_text())
    about["vision_config"]["hidden_act"] = "gelu"
    (tmp_path / "config.json").write_text(json.dumps(about))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"trained with GELU.*open_clip:ARCH=FILE"):
        load_clip(str(tmp_path / "pytorch_model.bin"), CPU)
    head = {**model.state_dict(), "vision_model.head.probe": torch.ones(1, 1, 64)}
    torch.save(head, tmp_path / "siglip.bin")
    with pytest.raises(UserError, match=r"a model that is not a CLIP.*vision_model\.head\.probe"):
        load_clip(str(tmp_path / "siglip.bin"), CPU)


# What is no checkpoint, or is called otherwise

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
NO_WEIGHTS = {
    "Git LFS": (LFS, "git lfs pull"),
    "a web page": (b"\n<!DOCTYPE html><title>Log in</title>", "log in"),
    "a gzip archive": (gzip.compress(b"weights"), "unpack it"),
}


@pytest.mark.parametrize("what", NO_WEIGHTS)
def test_what_is_no_weights_is_named_with_its_remedy(what, tmp_path):
    content, remedy = NO_WEIGHTS[what]
    for name in ("a.pt", "a.safetensors"):
        (tmp_path / name).write_bytes(content)
        for read in (
            lambda path: load_clip(str(path), CPU),
            lambda path: read_checkpoint("--clip-model-path", path, "CLIP"),
        ):
            with pytest.raises(UserError, match=f"{name} is .*{what}.*{remedy}"):
                read(tmp_path / name)


def test_objects_are_named_and_how_to_save_without_them(golden, tmp_path):
    state = load_tensors(golden / "clip_vit.pt")
    hyper_parameters = argparse.Namespace(lr=0.1)
    torch.save({"state_dict": state, "hyper_parameters": hyper_parameters}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"argparse\.Namespace.*only the model's state dict"):
        load_clip(str(tmp_path / "a.ckpt"), CPU)


def test_a_files_name_does_not_say_what_it_holds(golden, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    state = load_tensors(golden / "clip_vit.pt")
    safetensors.save_file(state, tmp_path / "a.pt")
    torch.save(state, tmp_path / "b.safetensors")
    for name in ("a.pt", "b.safetensors"):
        found = load_tensors(tmp_path / name)
        assert all(torch.equal(found[part], weight) for part, weight in state.items())


def refusal(state: dict[str, Tensor], path: Path) -> str:
    torch.save(state, path)
    with pytest.raises(UserError) as error:
        load_clip(str(path), CPU)
    return str(error.value)


def test_of_a_vit_no_layer_of_a_resnet_is_missed(golden, tmp_path):
    state = load_tensors(golden / "clip_vit.pt")
    path = tmp_path / "a.pt"
    cut = {name: w for name, w in state.items() if name not in ("visual.proj", "visual.class_emb")}
    assert "visual.proj missing" in refusal(cut, path)
    trunk = {name.replace("visual.", "visual.trunk."): w for name, w in state.items()}
    assert "open_clip:ARCH=FILE" in refusal(trunk, path)
    wide = {**state, "visual.conv1.weight": torch.ones(1280, 3, 8, 8)}
    assert "number of heads" in refusal(wide, path)
    assert "something else (encoder.weight)" in refusal({"encoder.weight": torch.ones(1)}, path)
