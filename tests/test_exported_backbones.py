"""Exported pairs of open_clip's models: built from their folder alone, and from nothing that was changed in it."""

import functools
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import export
from combiner import build_combiner
from conftest import CASES, SOAK
from models import exported
from models.encoder import load_backbone
from models.exported import BUILT_FROM, PAIR_CONFIG, PAIR_FORM, read_exported
from models.pair import load_pair
from models.schemas import Exported
from runtime.schema import checked
from runtime.tensors import save_tensors
from settings.groups import PairChoice
from test_backbones import FORMS, models_made  # noqa: F401
from test_export import measure, settings
from test_stored import WRONG, refused

pytest.importorskip("open_clip", reason="pip install -r requirements-open-clip.txt")
CPU = torch.device("cpu")
SIZES = {"clip_dim": 24, "projection_dim": 8, "hidden_dim": 12, "num_experts": 3, "top_k": 1}


@pytest.fixture(scope="module")
def tuned(models_made, tmp_path_factory):  # noqa: F811
    """Form -> the flags of a fine-tuned pair of it, its model's folder, and the pair exported; not to be changed."""

    @functools.cache
    def make(form: str) -> tuple[list, Path, Path]:
        folder = tmp_path_factory.mktemp(form)
        model_folder = shutil.copytree(models_made / form, folder / form)
        name = f"local-dir:{model_folder}"
        model, backbone = load_backbone(name, CPU)
        torch.manual_seed(0)
        state = {
            key: weight + 0.02 * torch.randn_like(weight) if weight.is_floating_point() else weight
            for key, weight in model.state_dict().items()
        }
        preprocessing = {"clip_model_name": name, "transform": "squarepad", "target_ratio": 1.5}
        config = settings({}, **preprocessing, **backbone.preprocessing)
        save_tensors(folder / "clip.pt", {"CLIP": state, "config": config})
        combiner = build_combiner({**SIZES, "combiner_type": "moe"})
        content = {"Combiner": combiner.state_dict(), "config": settings({"top_k": 1})}
        save_tensors(folder / "combiner.pt", content)
        words = ["--clip-model-path", folder / "clip.pt", "--combiner-path", folder / "combiner.pt"]
        return words, model_folder, export_to(folder / f"pair_{form}", *words)

    return make


def export_to(pair: Path, *words: object) -> Path:
    export.main(list(map(str, [*words, "--output", pair])))
    return pair


@pytest.fixture
def moved(tuned, tmp_path):
    """Form -> its pair, which a test may damage."""
    return lambda form: shutil.copytree(tuned(form)[2], tmp_path / "pair")


@pytest.mark.parametrize("form", [form for form in FORMS if SOAK or form != "quick"])
def test_a_pair_needs_nothing_but_its_folder(form, tuned, drawn, tmp_path):
    words, folder, pair = tuned(form)
    before = measure(tmp_path, drawn, [*words, "--combining-function", "combiner"])
    elsewhere = folder.rename(tmp_path / "elsewhere")
    assert measure(tmp_path, drawn, ["--pair", pair]) == before
    elsewhere.rename(folder)
    names = sorted(file.name for file in (pair / BUILT_FROM).iterdir())
    assert "open_clip_config.json" in names
    assert ("tokenizer.json" in names) == (form == "hf")


def test_a_text_encoder_of_hugging_faces_is_in_the_pair_too(models_made, drawn, tmp_path):  # noqa: F811
    """Its configuration is a repository's, which a pair does not open."""
    transformers = pytest.importorskip("transformers")
    import open_clip

    folder = shutil.copytree(models_made / "hf", tmp_path / "bert")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "vocab_size": 40, "max_position_embeddings": 12}
    transformers.BertConfig(**sizes).save_pretrained(folder)
    file = folder / "open_clip_config.json"
    about = json.loads(file.read_text())
    about["model_cfg"]["text_cfg"] = {
        "hf_model_name": "its/own",
        "hf_tokenizer_name": "its/own",
        "hf_proj_type": "mlp",
        "hf_pooler_type": "mean_pooler",
        "context_length": 9,
    }
    file.write_text(json.dumps(about))
    (folder / "open_clip_pytorch_model.bin").unlink()
    named = {**about["model_cfg"]["text_cfg"], "hf_model_name": str(folder)}
    named["hf_model_pretrained"] = False
    model = open_clip.create_model(f"local-dir:{folder}", text_cfg=named)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    words = ["--clip-model-name", f"local-dir:{folder}"]
    pair = export_to(tmp_path / "pair", *words)
    before = measure(tmp_path, drawn, [*words, "--combining-function", "sum"])
    shutil.rmtree(folder)
    assert measure(tmp_path, drawn, ["--pair", pair]) == before
    (pair / BUILT_FROM / "config.json").unlink()
    config = json.loads((pair / PAIR_CONFIG).read_text())
    del config["clip"]["files"]["config.json"]
    config["sha256"] = exported._digest(config)
    (pair / PAIR_CONFIG).write_text(json.dumps(config))
    refused(
        lambda: load_pair(
            PairChoice(combining_function="sum", clip_path=None, combiner_path=None, exported=pair),
            CPU,
        ),
        "contains no config.json from its/own",
    )


def test_half_precision_and_the_card(tuned, drawn, tmp_path):
    pair = export_to(tmp_path / "pair", *tuned("custom")[0], "--half")
    card = (pair / "README.md").read_text()
    assert "# Composed image retrieval: custom with a Combiner (moe)" in card
    assert str(tmp_path) not in card
    measure(tmp_path, drawn, ["--pair", pair])


def read(pair: Path):
    read_exported(pair).weights("clip")


def test_each_file_that_it_is_built_from_is_there_and_unchanged(moved):
    pair = moved("hf")
    files = sorted((pair / BUILT_FROM).iterdir())
    assert len(files) >= 2
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        refused(lambda: read(pair), str(file), "damaged or was edited")
        file.unlink()
        refused(lambda: read(pair), f"{BUILT_FROM}/{file.name}")
        file.write_bytes(whole)
        CASES["files that an exported pair is built from", "refused"] += 2
    other = pair / BUILT_FROM / "added_tokens.json"  # which a tokenizer would read
    other.write_text("{}")
    refused(lambda: read(pair), str(other), "remove this file")
    other.rename(other.with_name(".hidden"))
    read(pair)


def test_a_clip_has_sizes_or_files(moved):
    pair = moved("vit")
    config = json.loads((pair / PAIR_CONFIG).read_text())
    assert config["form"] == PAIR_FORM
    assert config["clip"]["sizes"] is None

    def check(clip: dict) -> None:
        content = {**config, "clip": {**config["clip"], **clip}}
        checked(Exported, content, file=pair / PAIR_CONFIG, remedy="copy it again")

    check({})
    for files in [{}, {"../x": "0" * 64}, {"/x": "0" * 64}, {"a/b": "0" * 64}, {"x": "0"}, *WRONG]:
        refused(lambda files=files: check({"files": files}), str(pair / PAIR_CONFIG), "clip")
        CASES["files of an exported pair", "refused"] += 1


def test_weights_of_another_model(moved):
    """With digests of their own: who changes a file may change what is said of it."""
    pair = moved("custom")
    folder = pair / BUILT_FROM
    config = json.loads((pair / PAIR_CONFIG).read_text())
    about = json.loads((folder / "open_clip_config.json").read_text())
    about["model_cfg"]["vision_cfg"]["width"] = 48
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    config["clip"]["files"]["open_clip_config.json"] = exported.file_digest(
        folder / "open_clip_config.json"
    )
    config["sha256"] = exported._digest(config)
    (pair / PAIR_CONFIG).write_text(json.dumps(config))
    choice = PairChoice(combining_function=None, clip_path=None, combiner_path=None, exported=pair)
    refused(lambda: load_pair(choice, CPU), "--pair", "clip.safetensors")


def test_without_the_package_its_requirements_are_named(moved, monkeypatch):
    pair = moved("vit")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.delitem(sys.modules, "models.open_clip_package", raising=False)
    monkeypatch.delattr("models.open_clip_package", raising=False)
    choice = PairChoice(combining_function=None, clip_path=None, combiner_path=None, exported=pair)
    refused(lambda: load_pair(choice, CPU), "open_clip", "requirements-open-clip.txt")
