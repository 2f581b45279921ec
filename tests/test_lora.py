"""LoRA: adapters against peft's own and against their definition; what is saved, resumed and planned of them."""

import copy
import importlib.util
import json

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import clip_fine_tune
import kills
import plan
from conftest import SOAK, read_csv
from models.adapters import merged_state
from models.backbone import Backbone, choose_trained
from models.clip_model import backbone, checkpoint_gradients, load_clip
from models.encoder import load_backbone
from models.lean_clip import Folding
from runtime.tensors import load_tensors
from settings.groups import Lora
from test_backbones import FORMS, models_made, named  # noqa: F401
from test_lean_clip import assert_same, features_and_gradients, pair  # noqa: F401
from test_learning import gradient_of, in_double  # noqa: F401
from test_resume import stopped  # noqa: F401
from timing import saved_activations
from training.planning import Way
from training.stage1 import SumFeatures

peft = pytest.importorskip("peft", reason="pip install -r requirements-lora.txt")

CPU = torch.device("cpu")
LORA = Lora(lora_rank=3)


def draw(model: nn.Module) -> nn.Module:
    """The model with adapters that change something, the same wherever they are the same and in the same order."""
    generator = torch.Generator().manual_seed(5)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.copy_(torch.randn(weight.shape, generator=generator) / 8)
    return model


def adapted(model: nn.Module, encoder: str = "both", lora: Lora = LORA) -> nn.Module:
    """The same model with drawn adapters."""
    choose_trained(model, encoder, lora)
    return draw(model)


def inputs_of(about: Backbone, rows: int = 5) -> list[torch.Tensor]:
    """References, targets and tokens."""
    side = about.resolution
    images = torch.randint(
        256, (2, rows, 3, side, side), generator=torch.Generator().manual_seed(0)
    )
    return [*images.byte(), about.tokenizer([f"is red and has {i} stripes" for i in range(rows)])]


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_they_are_pefts_on_the_model_of_the_clip_package(pair):  # noqa: F811
    """Features, and the gradients of all adapters, which both have in one order.

    Left out is the projection out of attention, whose weight is read, not called: peft's own form of attention adds its
    change twice (0.21.2).
    """
    plain, lean = pair("vit")
    config = peft.LoraConfig(
        r=3,
        lora_alpha=3,
        target_modules=["c_fc", "c_proj"],
        target_parameters=["attn.in_proj_weight"],
    )
    theirs = peft.inject_adapter_in_model(config, plain)
    choose_trained(lean, "both", LORA)
    for module in lean.modules():
        if isinstance(module, nn.MultiheadAttention):
            parametrize.remove_parametrizations(module.out_proj, "weight")
    found = []
    for model in (lean, theirs):
        *features, gradients = features_and_gradients(draw(model))
        of_adapters = [gradient for name, gradient in gradients.items() if "lora_" in name]
        found.append((*features, dict(enumerate(of_adapters))))
    assert len(found[0][2]) == 2 * 3 * (2 + 2)
    assert_same(*found)


def merge_by_definition(plain: nn.Module, learned: dict[str, nn.Parameter]) -> None:
    """Give a model without adapters the weights that these make of its own: W + B A, and the norms that learn."""
    for name, weight in learned.items():
        adapter, _, part = name.partition(".lora_")
        if part.startswith("B"):
            continue  # beside its A
        if part:
            name = adapter.replace(".parametrizations", "").removesuffix(".0")
            weight = (
                plain.get_parameter(name).detach() + learned[f"{adapter}.lora_B.weight"] @ weight
            )
        path, _, last = name.rpartition(".")
        layer = plain.get_submodule(path)
        del layer._parameters[last]
        layer.__dict__[last] = weight


WAYS = ("checkpointed", "copied", "text", "with norms")
CASES = [(name, way) for name in ("vit", "rn") for way in WAYS]


# A ResNet has adapters in its text alone: there `make soak` tries the ways that are nothing new.
@pytest.mark.parametrize(("name", "way"), CASES if SOAK else [*CASES[:5], CASES[7]])
def test_a_weight_is_the_sum_of_its_own_and_of_a_product(name, way, pair):  # noqa: F811
    """In every module that reads it, on the clip package's model and on the lean one."""
    plain, lean = pair(name)
    lora = Lora(lora_rank=3, lora_norms=way == "with norms")
    adapted(lean, "text" if way == "text" else "both", lora)
    if way == "checkpointed":
        checkpoint_gradients(lean)
    if way == "copied":
        lean = copy.deepcopy(lean)
    learned = {n: p for n, p in lean.named_parameters() if p.requires_grad}
    merge_by_definition(plain, learned)
    found = []
    for model in (lean, plain):
        features = features_and_gradients(model)[:2]
        found.append((*features, {n: p.grad for n, p in learned.items()}))
        lean.zero_grad(set_to_none=True)
    assert all(gradient.abs().max() > 0 for gradient in found[0][2].values())
    assert_same(*found)


@pytest.mark.parametrize("encoder", ["both", "image", "text"])
@pytest.mark.parametrize("targets", ["attention,mlp", "attention", "mlp"])
def test_what_learns_is_what_the_flags_name(targets, encoder, golden):
    model = load_clip(str(golden / "clip_vit.pt"), CPU)
    choose_trained(model, encoder, Lora(lora_rank=3, lora_targets=targets))
    learned = {n for n, p in model.named_parameters() if p.requires_grad}
    wanted = set()
    for path, _ in model.named_modules():
        kind = {"attn": "attention", "out_proj": "attention", "c_fc": "mlp", "c_proj": "mlp"}
        is_named = encoder in ("both", "image" if path.startswith("visual.") else "text")
        if is_named and kind.get(path.split(".")[-1], "none") in targets:
            weight = "in_proj_weight" if path.endswith("attn") else "weight"
            for part in ("A", "B"):
                wanted.add(f"{path}.parametrizations.{weight}.0.lora_{part}.weight")
    assert learned == wanted != set()


@pytest.mark.parametrize("name", ["vit", "rn"])
def test_gradients_in_bounded_memory_equal_the_plain_steps(name, golden, in_double):  # noqa: F811
    found = []
    for micro_batch in (None, 2):
        model = adapted(load_clip(str(golden / f"clip_{name}.pt"), CPU).double())
        about = backbone(model)
        if micro_batch:
            checkpoint_gradients(model)
        step = gradient_of(SumFeatures(model, about), micro_batch=micro_batch)
        loss = step.add(inputs_of(about), torch.arange(5))
        found.append((loss, loss, gradients_of(model)))
    assert_same(*found)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_merged_weights_give_the_same_features_whatever_reads_them(form, models_made):  # noqa: F811
    """Of open_clip's, timm's and OpenAI's own layers; and every adapter learns."""
    model, about = load_backbone(named(models_made, form), CPU)
    plain = copy.deepcopy(model)
    adapted(model)
    assert merged_state(model).keys() == plain.state_dict().keys()
    changed = {
        n for n, w in merged_state(model).items() if not torch.equal(w, plain.state_dict()[n])
    }
    assert 2 * len(changed) == sum(p.requires_grad for p in model.parameters())
    plain.load_state_dict(merged_state(model))
    references, _, tokens = inputs_of(about)
    pixels = about.normalise(references)
    for encode, inputs in (("encode_image", pixels), ("encode_text", tokens)):
        getattr(model, encode)(inputs).square().sum().backward()
        with torch.no_grad():
            assert torch.equal(getattr(model, encode)(inputs), getattr(plain, encode)(inputs))
    assert all(gradient.abs().max() > 0 for gradient in gradients_of(model).values())
    assert len(gradients_of(model)) == 2 * len(changed)


@pytest.mark.slow
@pytest.mark.parametrize("look", [1, 2, 3] if SOAK else [2])
def test_a_stopped_run_ends_like_one_that_never_was(look, stage_1, stopped, drawn, run, tmp_path):  # noqa: F811
    """With all that goes with adapters; what is saved is a plain CLIP, and measured as it was in the training."""
    flags = ["CIRR", "--lora-rank", 2, "--lora-norms", "--ema-decay", 0.5, "--micro-batch-size", 5]
    flags += ["--gradient-checkpointing", "--learning-rate", 1e-2, "--num-epochs", 1]
    whole, part = stage_1(*flags, output="whole"), stopped(look, *flags, train=stage_1)
    assert any("lora_A" in name for name in load_tensors(part / "state.pt")["parts"]["module"])
    clip_fine_tune.main(["--resume", str(part)])
    assert kills.differences(whole, part) == []
    saved = load_tensors(whole / "saved_models" / "tuned_clip_0.pt")
    assert saved["config"]["flags"]["lora_rank"] == 2
    before = load_tensors(drawn / "tiny_clip_vit.pt")
    assert saved["CLIP"].keys() == before.keys()
    changed = {n for n, w in saved["CLIP"].items() if not torch.equal(w, before[n].float())}
    matrices = {n for n, w in before.items() if "resblocks" in n and w.dim() == 2}
    assert changed == matrices | {n for n in before if "ln_" in n}
    measured = tmp_path / "metrics.json"
    words = ["--dataset", "CIRR", "--combining-function", "sum", "--metrics-json", measured]
    run("validate", drawn, *words, "--clip-model-path", whole / "saved_models" / "tuned_clip_0.pt")
    metrics = json.loads(measured.read_text())["metrics"]
    recorded = read_csv(whole / "validation_metrics.csv")
    assert metrics == {name: recorded[name][-1] for name in metrics} != {}


def test_a_plan_counts_gradients_and_averages_of_adapters_alone(drawn):
    name = str(drawn / "tiny_clip_vit.pt")
    words = ["stage1", "--clip-model-name", name, "--triplets", 64, 8, "--images", 64, 8]
    words += ["--memory", 1, "--batch-size", 16, "--precision", "fp32", "--lora-rank", 3]
    args = plan.parse([*map(str, words)])
    training = plan.planned_training(args, plan.planned_gpu(args))
    model = adapted(load_clip(name, CPU))
    adapters = sum(4 * p.numel() for n, p in model.named_parameters() if "lora_" in n)
    lasting = training.lasting()
    assert lasting["weights"] == sum(4 * p.numel() for p in model.parameters())
    assert (lasting["gradients"], lasting["optimizer"]) == (adapters, 2 * adapters)
    about = backbone(model)
    step = gradient_of(SumFeatures(model, about))
    inputs = inputs_of(about, rows=16)
    kept = saved_activations(lambda: step.add(inputs, torch.arange(16)), model)
    planned = training.clip.activations(Way(batch_size=16), "fp32")
    # Pixels are there in float32 too; the frozen layers that take them keep nothing.
    pixels = 4 * (inputs[0].numel() + inputs[1].numel())
    assert planned == pytest.approx(kept + pixels, rel=0.1)
    folds = [
        weight
        for module in model.modules()
        if isinstance(module, Folding)
        for weight in module.fold()
    ]
    whole = sum(4 * weight.numel() for weight in folds)
    with_gradients = sum(4 * weight.numel() for weight in folds if weight.requires_grad)
    assert training.clip.shared == whole + with_gradients - adapters


def test_what_cannot_be_done_is_said_in_a_line(fails, drawn, monkeypatch):
    clip = ["--dataset", "CIRR", "--clip-model-name", drawn / "tiny_clip_resnet.pt"]
    for words in (["--lora-norms"], ["--lora-targets", "mlp"]):
        assert "pass --lora-rank" in fails("clip_fine_tune", drawn, *clip, *words)
    words = ["--lora-rank", 2, "--lora-targets", "mlp", "--encoder", "image", "--batch-size", 4]
    assert "--lora-targets mlp: " in fails("clip_fine_tune", drawn, *clip, *words)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    told = fails("clip_fine_tune", drawn, *clip, "--lora-rank", 2)
    assert "pip install -r requirements-lora.txt" in told
