"""The lean forward passes against the clip package's own: features, gradients, types, memory."""

import copy

import clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from models import lean_clip
from models.backbone import choose_trained
from models.clip_model import backbone as clip_backbone
from models.clip_model import checkpoint_gradients, load_clip, tokenize
from models.lean_clip import LeanBlock, convolution_then_relu, folded, make_lean
from timing import saved_activations

CPU = torch.device("cpu")
TEXTS = ["is red", "has longer sleeves and a deep neckline", "the same in blue", "a", ""]
# Numbered anew, so that a vocabulary of these is enough: padding is 0, and the end of a text the largest.
VOCABULARY, TOKENS = tokenize(TEXTS).unique(return_inverse=True)


@pytest.fixture
def pair(golden, monkeypatch):
    """A CLIP of the clip package with random norms, in float64, and the same one lean."""
    # The package computes its layer norms in float32 whatever the weights are.
    monkeypatch.setattr(clip.model.LayerNorm, "forward", nn.LayerNorm.forward)

    def pair(name: str) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        state = dict(torch.load(golden / f"clip_{name}.pt"))
        state["token_embedding.weight"] = state["token_embedding.weight"][VOCABULARY]
        plain = clip.model.build_model(state).double().eval()
        for norm in plain.modules():
            if isinstance(norm, nn.LayerNorm | nn.BatchNorm2d):
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
        return plain, make_lean(copy.deepcopy(plain))

    return pair


def features_and_gradients(model: nn.Module, dtype: torch.dtype = torch.float64):
    """Features of five images and texts, and every parameter's gradient of a number that depends on all."""
    torch.manual_seed(1)
    side = model.visual.input_resolution
    images = torch.randn(5, 3, side, side, dtype=dtype)
    image_features, text_features = model.encode_image(images), model.encode_text(TOKENS)
    (image_features.square().sum() + (image_features * text_features).sum()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return image_features, text_features, gradients


def assert_same(ours, theirs) -> None:
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    assert ours[2].keys() == theirs[2].keys()
    for name, gradient in theirs[2].items():
        if gradient is None:
            assert ours[2][name] is None, name
        else:
            scale = max(1, float(gradient.abs().max()))
            torch.testing.assert_close(
                ours[2][name], gradient, rtol=1e-9, atol=1e-10 * scale, msg=name
            )


@pytest.mark.parametrize("encoder", ["both", "text", "image"])
@pytest.mark.parametrize("name", ["vit", "rn"])
def test_features_and_gradients_are_those_of_the_clip_package(name, encoder, pair):
    plain, lean = pair(name)
    for model in (plain, lean):
        choose_trained(model, encoder)
    assert_same(features_and_gradients(lean), features_and_gradients(plain))


WAYS = [(way, name) for way in ("checkpointed", "compiled", "copied") for name in ("vit", "rn")]


@pytest.mark.parametrize(("way", "name"), [*WAYS, ("channels last", "rn")])
def test_they_are_the_same_in_every_way_that_training_takes(way, name, pair, monkeypatch):
    plain, lean = pair(name)
    if way == "checkpointed":
        checkpoint_gradients(lean)
    if way == "compiled":
        # What the compiler traces in place of functions that it cannot look into.
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    if way == "copied":
        lean = copy.deepcopy(lean)
    if way == "channels last":  # as on a GPU
        lean.visual.to(memory_format=torch.channels_last)
    assert_same(features_and_gradients(lean), features_and_gradients(plain))


def test_checkpointing_finds_the_blocks(pair):
    for name in ("vit", "rn"):
        plain, lean = pair(name)
        checkpoint_gradients(lean)
        blocks = (clip.model.Bottleneck, clip.model.ResidualAttentionBlock)
        found = [
            m for m in lean.modules() if getattr(vars(m).get("forward"), "func", None) is checkpoint
        ]
        assert len(found) == sum(type(m) in blocks for m in plain.modules()) > 2


def relative_distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.float() - exact).norm().detach() / exact.norm().detach())


@pytest.mark.parametrize("name", ["vit", "rn"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_near_as_the_packages_own(name, dtype, golden):
    exact = features_and_gradients(load_clip(str(golden / f"clip_{name}.pt"), CPU), torch.float32)
    plain = clip.model.build_model(dict(torch.load(golden / f"clip_{name}.pt"))).float().eval()
    lean = load_clip(str(golden / f"clip_{name}.pt"), CPU)
    distance = []
    for model in (plain, lean):
        with torch.autocast("cpu", dtype=dtype):
            found = features_and_gradients(model, torch.float32)
        distance.append([relative_distance(*pair) for pair in zip(found, exact[:2], strict=False)])
        weights = {p.dtype for p in model.parameters()} | {
            g.dtype for g in found[2].values() if g is not None
        }
        assert weights == {torch.float32}
    for theirs, ours in zip(*distance, strict=True):
        assert ours < 1.5 * theirs + 1e-4, distance


@pytest.mark.parametrize("name", ["vit", "rn"])
def test_a_step_keeps_less(name, golden):
    """What is kept for the backward pass in half precision, from batches at which weights count for little."""
    plain = clip.model.build_model(dict(torch.load(golden / f"clip_{name}.pt"))).float().eval()
    side = plain.visual.input_resolution
    images = torch.randn(48, 3, side, side)

    def kept(model: nn.Module) -> int:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return saved_activations(lambda: model.encode_image(images).sum().backward(), model)

    before = kept(plain)
    assert kept(make_lean(plain)) < 0.75 * before


@pytest.mark.parametrize("name", ["vit", "rn"])
def test_columns_behind_the_longest_caption_change_nothing(name, pair):
    _, lean = pair(name)
    (columns,) = clip_backbone(lean).tokenizer.columns(TOKENS.unsqueeze(0))
    assert columns == 16  # of 11 that are used
    found = []
    for tokens in (TOKENS, TOKENS[:, :columns]):
        lean.zero_grad(set_to_none=True)
        features = lean.encode_text(tokens)
        features.square().sum().backward()
        found.append((features.detach(), lean.token_embedding.weight.grad))
    for all_columns, few in zip(*found, strict=True):
        torch.testing.assert_close(few, all_columns, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["vit", "rn"])
def test_weights_that_are_folded_once_encode_the_same(name, pair):
    _, lean = pair(name)
    with torch.no_grad():
        before = lean.encode_text(TOKENS)
        with folded(lean), pytest.MonkeyPatch.context() as patch:
            patch.setattr(LeanBlock, "fold", None)  # is not asked for again
            torch.testing.assert_close(lean.encode_text(TOKENS), before, rtol=0, atol=0)
        lean.transformer.resblocks[0].attn.in_proj_weight.mul_(2)
        assert not torch.equal(lean.encode_text(TOKENS), before)


def relu_of_sum(x, weight, added, scale, bias, *shape) -> torch.Tensor:
    """What cuDNN's fused operation is."""
    return F.relu(F.conv2d(x, weight, bias, *shape[:2]) + scale * added)


@pytest.mark.parametrize("is_known", [True, False])
def test_a_fused_convolution_reads_nothing_unwritten_and_is_replaced_where_there_is_none(
    is_known, monkeypatch
):
    def refuses(*_: object) -> None:
        raise RuntimeError("GET was unable to find an engine to execute this computation")

    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 9, 9), torch.randn(4, 3, 3, 3), torch.randn(4)
    added = torch.randn(2, 4, 5, 5)
    monkeypatch.setattr(lean_clip, "has_fused_kernel", lambda _: True)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", relu_of_sum if is_known else refuses)
    # Memory that nobody wrote to, at its worst.
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **how: empty(*a, **how).fill_(torch.nan))
    for other in (None, added):
        expected = F.conv2d(x, weight, bias, 2, 1)
        expected = F.relu(expected if other is None else expected + other)
        found = convolution_then_relu(x, weight, bias, added=other, stride=2, padding=1)
        torch.testing.assert_close(found, expected)


def test_a_lack_of_memory_is_no_lack_of_an_engine(monkeypatch):
    def is_full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(lean_clip, "has_fused_kernel", lambda _: True)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", is_full)
    with pytest.raises(torch.OutOfMemoryError):
        convolution_then_relu(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 1, 1), torch.ones(1))
