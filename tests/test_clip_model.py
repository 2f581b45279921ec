"""Loading CLIP by name, by path and as OpenAI's archive; downloads; tokens; rounding."""

import hashlib

import clip
import pytest
import torch

from models.backbone import choose_trained
from models.clip_model import (
    describe,
    load_clip,
    load_finetuned,
    resolution,
    tokenize,
    write_tiny_clip,
)
from utils import UserError

CPU = torch.device("cpu")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home folder, so that nobody's cache of CLIP models is touched."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def publish(golden, tmp_path, monkeypatch, name="RN50x16"):
    """Serve a tiny model at the place that the clip package downloads a name from."""
    content = (golden / "clip_vit.pt").read_bytes()
    folder = tmp_path / hashlib.sha256(content).hexdigest()
    folder.mkdir()
    (folder / "RN50x16.pt").write_bytes(content)
    monkeypatch.setitem(clip.clip._MODELS, name, (folder / "RN50x16.pt").as_uri())


def test_a_name_is_downloaded_once(golden, tmp_path, monkeypatch, home):
    publish(golden, tmp_path, monkeypatch)
    model = load_clip("RN50x16", CPU)
    assert resolution(model) == 64
    assert (home / ".cache/clip/RN50x16.pt").is_file()
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "url", ["file:///nowhere/abc/RN50x16.pt", "https://127.0.0.1:9/abc/RN50x16.pt"]
)
def test_a_failed_download_says_where_the_file_can_be_put(url, monkeypatch, home):
    monkeypatch.setitem(clip.clip._MODELS, "RN50x16", url)
    with pytest.raises(UserError) as error:
        load_clip("RN50x16", CPU)
    assert url in str(error.value)
    assert str(home / ".cache/clip/RN50x16.pt") in str(error.value)


def test_unknown_names_list_the_known(home):
    with pytest.raises(UserError, match=r"RN50x64.*ViT-L/14"):
        load_clip("RN51", CPU)


def test_a_path_is_tried_with_pt(golden):
    with_ending, without = (
        load_clip(str(golden / "clip_vit.pt"), CPU),
        load_clip(str(golden / "clip_vit"), CPU),
    )
    for ours, theirs in zip(with_ending.parameters(), without.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore")
def test_openais_archive_loads_by_path(golden, tmp_path):
    """OpenAI publishes TorchScript archives; one that was fetched by hand may lie anywhere."""
    model = clip.model.build_model(dict(torch.load(golden / "clip_vit.pt"))).float().eval()
    image, tokens = torch.zeros(1, 3, 64, 64), tokenize(["a"])
    traced = torch.jit.trace_module(model, {"encode_image": image, "encode_text": tokens})
    traced.save(str(tmp_path / "archive.pt"))
    loaded = load_clip(str(tmp_path / "archive.pt"), CPU)
    torch.testing.assert_close(loaded.encode_image(image), model.encode_image(image))


def test_building_rounds_to_half_and_fine_tuned_weights_stay_float(golden):
    """Guards against the original's rounding of fine-tuned weights on CUDA."""
    model = load_clip(str(golden / "clip_vit.pt"), CPU)
    assert torch.equal(model.visual.proj, model.visual.proj.half().float())
    state = {name: weight + 1e-5 for name, weight in model.state_dict().items()}
    load_finetuned(model, state, golden)
    assert torch.equal(model.visual.proj, state["visual.proj"])


def test_long_captions_are_truncated():
    """Guards against the original, which raised in validation."""
    tokens = tokenize(["red " * 200, "short"])
    assert tokens.shape == (2, 77)
    assert tokens[0, -1] == tokens[1].max()  # the end of the text


@pytest.mark.parametrize("encoder", ["both", "text", "image"])
def test_what_learns(encoder, golden):
    model = load_clip(str(golden / "clip_rn.pt"), CPU)
    learned = choose_trained(model, encoder)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    visual = {name for name, _ in model.named_parameters() if name.startswith("visual.")}
    everything = {name for name, _ in model.named_parameters()} - {
        "logit_scale"
    }  # no part of the loss
    assert names == {"both": everything, "text": everything - visual, "image": visual}[encoder]
    assert len(learned) == len(names)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_tiny_clips_are_deterministic_and_a_few_million_parameters(kind, tmp_path):
    for name in ("a.pt", "b.pt"):
        write_tiny_clip(tmp_path / name, kind, seed=3)
    assert (tmp_path / "a.pt").read_bytes()[:500]
    first, second = load_clip(str(tmp_path / "a.pt"), CPU), load_clip(str(tmp_path / "b.pt"), CPU)
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert 1e6 < sum(p.numel() for p in first.parameters()) < 6e6
    assert resolution(first) == 32


def test_describe():
    assert describe({"nothing": torch.ones(1)}) == "not a CLIP"
