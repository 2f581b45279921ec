"""Models of open_clip: what they compute, how images and captions reach them, and what is refused of them."""

import dataclasses
import functools
import importlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip_fine_tune
import kills
import search
from conftest import CASES, SOAK, one_of_each_kind
from data_utils import make_preprocess
from models.configuration import ORIGINAL_DEFAULTS
from models.encoder import Encoder, load_backbone, load_encoder
from models.names import check_clip, in_full, open_clip_name
from runtime.choices import OPENAI_CLIPS
from runtime.tensors import load_tensors
from utils import UserError

open_clip = pytest.importorskip("open_clip", reason="pip install -r requirements-open-clip.txt")

CPU = torch.device("cpu")
SIDE = 32
TEXT = {"vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
VIT = {"image_size": SIDE, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
RESNET = {**VIT, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
TIMM = {
    "image_size": 224, "timm_model_name": "test_vit2", "timm_pool": "", "timm_proj": "linear", "timm_drop": 0.5,
    "timm_drop_path": 0.5,
}  # fmt: skip
OPENAI = {"mean": list(open_clip.OPENAI_DATASET_MEAN), "std": list(open_clip.OPENAI_DATASET_STD)}
HALVES = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"}
# What is made -> how open_clip describes it, with its preprocessing.
FORMS = {
    "vit": ({"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT}, OPENAI),
    "quick": ({"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT, "quick_gelu": True}, OPENAI),
    "resnet": ({"embed_dim": 24, "vision_cfg": RESNET, "text_cfg": TEXT}, OPENAI),
    "custom": (
        {
            "embed_dim": 24, "vision_cfg": VIT, "text_cfg": {**TEXT, "context_length": 12}, "custom_text": True,
            "init_logit_bias": -10,
        },
        {**HALVES, "resize_mode": "squash"},
    ),
    "timm": (
        {"embed_dim": 24, "vision_cfg": TIMM, "text_cfg": TEXT, "custom_text": True},
        {**HALVES, "resize_mode": "longest"},
    ),
    "hf": (
        {
            "embed_dim": 24, "vision_cfg": VIT, "custom_text": True,
            "text_cfg": {
                **TEXT, "vocab_size": 40, "context_length": 9, "hf_tokenizer_name": "its/own", "pool_type": "last",
                "no_causal_mask": True, "tokenizer_kwargs": {"clean": "canonicalize"},
            },
        },
        {**HALVES, "resize_mode": "squash"},
    ),
}  # fmt: skip
SENTENCE = "a is red blue and has more stripes than the dress in image no sleeves"
WORDS = SENTENCE.split()


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of Hugging Face's that knows some words, in the files that it is published as."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}  # as SigLIP's pads
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)


@functools.cache  # for all files whose tests take them
def make_models(root: Path) -> Path:
    for form, (config, preprocess) in FORMS.items():
        folder = root / form
        folder.mkdir(parents=True)
        about = {"model_cfg": config, "preprocess_cfg": preprocess}
        (folder / "open_clip_config.json").write_text(json.dumps(about))
        if form == "hf":
            write_tokenizer(folder)
        torch.manual_seed(7)
        model = open_clip.create_model(f"local-dir:{folder}")
        for name, buffer in model.named_buffers():  # statistics that are some
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
        torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return root


@pytest.fixture(scope="session")
def models_made(tmp_path_factory) -> Iterator[Path]:
    """A folder for each of FORMS, as open_clip's `local-dir:` takes it, with random weights."""
    with pytest.MonkeyPatch.context() as patch:
        # Reading its vocabulary takes most of the time in which a model so small is loaded.
        once = functools.cache(open_clip.factory.SimpleTokenizer)
        patch.setattr(open_clip.factory, "SimpleTokenizer", once)
        yield make_models(tmp_path_factory.getbasetemp() / "backbones")


def named(models_made: Path, form: str) -> str:
    return f"local-dir:{models_made / form}"


def load(name: str, transform: str = "clip") -> Encoder:
    choice = ORIGINAL_DEFAULTS.model_copy(update={"clip_model_name": name, "transform": transform})
    return load_encoder(choice, None, CPU, workers=0)


encoder_of = functools.cache(load)  # not to be changed


@functools.cache
def theirs(models_made: Path, form: str):
    """Model, preprocessing and tokenizer as open_clip alone makes them."""
    name = named(models_made, form)
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    return model.eval(), preprocess, open_clip.get_tokenizer(name)


CAPTIONS = ["is Red, and has MORE stripes", "a", " ".join(WORDS * 2), "no sleeves! no dress?"]
SIZES = [(40, 40), (90, 30), (31, 77), (300, 200)]


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    paths = []
    for number, (width, height) in enumerate(SIZES):
        noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(noise).save(paths[-1])
    return paths


@pytest.mark.parametrize("form", FORMS)
def test_features_are_those_of_open_clip(form, models_made, pictures):
    encoder = encoder_of(named(models_made, form))
    model, preprocess, tokenizer = theirs(models_made, form)
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.open(path)) for path in pictures])
        images = model.encode_image(pixels)
        texts = model.encode_text(tokenizer(CAPTIONS))
    torch.testing.assert_close(encoder.images(pictures), images, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoder.captions(CAPTIONS), texts, rtol=1e-5, atol=1e-5)
    assert images.norm(dim=-1).std() > 0  # nothing is normalised
    assert encoder.backbone.dim == images.shape[1] == texts.shape[1]


@pytest.mark.parametrize("form", FORMS)
def test_state_dicts_have_open_clips_names(form, models_made):
    model = encoder_of(named(models_made, form)).model
    whole, _, _ = theirs(models_made, form)
    assert list(model.state_dict()) == list(whole.state_dict())
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("transform", ["targetpad", "squarepad"])
@pytest.mark.parametrize("form", ["vit", "custom", "timm"])
def test_padded_images_keep_their_proportions(form, transform, models_made, pictures):
    """Padded as OpenAI's, then resized as the model wants it, but never squashed."""
    encoder = encoder_of(named(models_made, form), transform)
    backbone = encoder.backbone
    padded = make_preprocess(
        transform, 1.25, backbone.resolution, interpolation=backbone.interpolation
    )
    for path in pictures:
        assert torch.equal(encoder.loader.read(path), padded(Image.open(path)))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_clips_own_preprocessing_is_open_clips(resize_mode, interpolation, mode):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    want = PreprocessCfg(
        SIDE, mean=(0, 0, 0), std=(1, 1, 1), interpolation=interpolation, resize_mode=resize_mode
    )
    ours = make_preprocess("clip", 1.25, SIDE, interpolation=interpolation, resize_mode=resize_mode)
    for width, height in SIZES:
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(noise).convert(mode)
        expected = image_transform_v2(want, is_train=False)(image)
        torch.testing.assert_close(ours(image) / 255, expected)


# Captions


@pytest.mark.parametrize("form", ["vit", "custom", "hf"])
def test_a_caption_is_cut_where_it_is_longer_than_what_is_read(form, models_made):
    """Found against the same tokenizer with room for all: what differs in the columns that are read is cut."""
    tokenizer = encoder_of(named(models_made, form)).backbone.tokenizer
    for words in range(1, tokenizer.context + 4):
        caption = " ".join(["red"] * words)
        read = tokenizer([caption])[0]
        whole = tokenizer.encode([caption], 3 * tokenizer.context)[0, : tokenizer.context]
        assert tokenizer.cuts(caption) == (not torch.equal(read, whole)), words
        CASES["captions of n words", "cut" if tokenizer.cuts(caption) else "whole"] += 1


def test_cut_captions_are_counted_and_said_once(models_made, caplog):
    tokenizer = load(named(models_made, "custom")).backbone.tokenizer
    captions = ["red " * words for words in range(1, 15)]
    cut = sum(tokenizer.cuts(caption) for caption in captions)
    for _ in range(3):
        tokenizer.warn_of_cuts(captions, tokenizer(captions))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert f"{cut} of 14 captions have more than the 12 tokens" in said[0]


def test_captions_that_fit_are_not_warned_of(models_made, caplog):
    tokenizer = encoder_of(named(models_made, "hf")).backbone.tokenizer
    captions = ["red " * 8, "a", "red " * 7]
    tokenizer.warn_of_cuts(captions, tokenizer(captions))
    assert not caplog.records


def test_captions_are_cleaned_as_the_model_was_trained(models_made):
    """SigLIP's want lower case and no punctuation."""
    tokenizer = encoder_of(named(models_made, "hf")).backbone.tokenizer
    assert torch.equal(tokenizer(["Is RED; and has, more..."]), tokenizer(["is red and has more"]))


def test_a_tokenizer_of_another_vocabulary_is_refused(models_made, tmp_path):
    folder = shutil.copytree(models_made / "hf", tmp_path / "hf")
    file = folder / "tokenizer.json"
    about = json.loads(file.read_text())
    about["model"]["vocab"]["sleeves"] = 40
    file.write_text(json.dumps(about))
    tokenizer = encoder_of(f"local-dir:{folder}").backbone.tokenizer
    with pytest.raises(UserError, match="token 40, but its text encoder has only 40 tokens"):
        tokenizer(["no sleeves"])


# The original's numbers


@functools.cache  # for all files whose tests take them
def as_open_clips(golden: Path, root: Path) -> Path:
    from models.architectures import sizes_of

    for name in ("clip_vit", "clip_rn"):
        folder = root / name
        folder.mkdir(parents=True)
        state = load_tensors(golden / f"{name}.pt")
        embedding, *sizes = sizes_of(state, source=name, remedy="")
        of_images = ("image_size", "layers", "width", "patch_size")
        of_texts = ("context_length", "vocab_size", "width", "heads", "layers")
        config = {
            "embed_dim": embedding,
            "vision_cfg": dict(zip(of_images, sizes[:4], strict=True)),
            "text_cfg": dict(zip(of_texts, sizes[4:], strict=True)),
            "quick_gelu": True,
        }
        about = {"model_cfg": config, "preprocess_cfg": OPENAI}
        (folder / "open_clip_config.json").write_text(json.dumps(about))
        torch.save(state, folder / "open_clip_pytorch_model.bin")
        # By the name of an architecture too.
        (root / f"{name}-quickgelu.json").write_text(json.dumps(config))
        (root / f"{name}.json").write_text(json.dumps({**config, "quick_gelu": False}))
        open_clip.add_model_config(root / f"{name}-quickgelu.json")
        open_clip.add_model_config(root / f"{name}.json")
    return root


@pytest.fixture(scope="session")
def openais(golden, tmp_path_factory) -> Path:
    """The golden CLIPs of the original as folders of open_clip, with QuickGELU."""
    return as_open_clips(golden, tmp_path_factory.getbasetemp() / "openais")


# CLIP's own preprocessing, the ResNet, a Combiner; `make soak` takes both layouts too.
@pytest.mark.parametrize("number", [0, 1, 2, 4, 5, 8, 10, 11, 13] if SOAK else [8, 10, 11])
def test_openais_weights_give_the_recalls_of_the_original(
    number, golden, expected, openais, run, tmp_path
):
    from original import arguments, csv_name

    entry = expected["validate"][number]
    words = arguments(entry, golden)
    place = words.index("--clip-model-name") + 1
    words[place] = f"local-dir:{openais / Path(words[place]).stem}"
    run("validate", golden, *words, "--metrics-json", tmp_path / "metrics.json")
    written = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    for name, value in entry["metrics"].items():
        assert written[csv_name(name)] == pytest.approx(value, abs=1e-3)


def test_a_file_of_openais_by_its_architecture(openais, golden, caplog):
    name = f"open_clip:clip_vit-quickgelu={golden / 'clip_vit.pt'}"
    ours, backbone = load_backbone(name, CPU)
    theirs, _ = load_backbone(f"local-dir:{openais / 'clip_vit'}", CPU)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)
    assert (
        "using OpenAI's preprocessing" in caplog.text
    )  # for no tag tells how images are preprocessed
    assert backbone.mean == pytest.approx(OPENAI["mean"])


@pytest.mark.parametrize("scheme", ["file", "folder"])
def test_openais_weights_without_quick_gelu_are_refused(scheme, openais, golden, tmp_path):
    state = torch.load(golden / "clip_vit.pt")
    state["input_resolution"] = torch.tensor(64)  # as OpenAI's own files have it
    torch.save(state, tmp_path / "openai.bin")
    config = json.loads((openais / "clip_vit" / "open_clip_config.json").read_text())
    del config["model_cfg"]["quick_gelu"]
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    name, remedy = {
        "file": (f"open_clip:clip_vit={tmp_path / 'openai.bin'}", "open_clip:clip_vit-quickgelu="),
        "folder": (f"local-dir:{tmp_path}", '"quick_gelu"'),
    }[scheme]
    with pytest.raises(UserError, match=f"QuickGELU.*{remedy}"):
        load_backbone(name, CPU)


def test_a_file_that_may_want_quick_gelu_is_warned_of(openais, golden, caplog):
    load_backbone(f"open_clip:clip_vit={golden / 'clip_vit.pt'}", CPU)
    assert "open_clip:clip_vit-quickgelu=FILE" in caplog.text


def test_no_tag_lacks_its_activation():
    """A tag has the activation that it was trained with, or names the architecture that has."""
    from models.open_clip_package import _published, known_models

    listed = {model.name for model in known_models()}
    for architecture in open_clip.list_models():
        for tag in open_clip.list_pretrained_tags_by_model(architecture):
            name = f"open_clip:{architecture}/{tag}"
            wants = open_clip.get_pretrained_cfg(architecture, tag).get("quick_gelu", False)
            has = open_clip.get_model_config(architecture).get("quick_gelu", False)
            if wants and not has:
                with pytest.raises(UserError) as error:
                    _published(open_clip_name(name), name)
                assert str(error.value).split("pass ")[-1] in listed
            else:
                assert _published(open_clip_name(name), name)
            CASES["tags of open_clip", "refused" if wants and not has else "taken"] += 1


def test_a_bare_file_is_preprocessed_as_a_tag_of_its_architecture(caplog):
    """Guards against open_clip's own answer, which is OpenAI's colours for SigLIP's weights."""
    from models.open_clip_package import PREPROCESSING, _as_tags

    for architecture in open_clip.list_models():
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        ways = []
        for tag in tags:
            published = open_clip.get_pretrained_cfg(architecture, tag)
            ways.append({name: published[name] for name in PREPROCESSING})
        caplog.clear()
        found = _as_tags(architecture, "here")
        if ways:
            assert ways.count(found) == max(map(ways.count, ways))
        # One that may be wrong is said.
        assert bool(caplog.records) == (not ways or any(way != found for way in ways))
        CASES["architectures of open_clip", "said" if caplog.records else "known"] += 1


# What is refused

REFUSED = {
    "open_clip:": "ARCH/TAG",
    "open_clip:ViT-B-32": "ARCH=FILE",
    "open_clip:/openai": "ARCH/TAG",
    "open_clip:ViT-B-32/": "ARCH/TAG",
    "open_clip:ViT-B-32=": "ARCH=FILE",
    "open_clip:ViT-B-3/openai": "similar names: ViT-B-32",
    "open_clip:vit-b-32/openai": "similar names: ViT-B-32",
    "open_clip:ViT-B-32=nowhere.pt": "nowhere.pt",
    "hf-hub:": "hf-hub:ORG/REPO",
    "hf-hub:timm": "hf-hub:ORG/REPO",
    "hf-hub:a/b/c": "hf-hub:ORG/REPO",
    "local-dir:nowhere": "no such folder",
    "openclip:ViT-B-32/openai": "open_clip:ARCH/TAG",
    "ViT-B-32": "open_clip:ARCH/TAG",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_of_nothing_is_refused_before_anything_is_loaded(name):
    with pytest.raises(UserError) as error:
        check_clip(name)
    assert "--clip-model-name" in str(error.value)
    assert REFUSED[name] in str(error.value)


@pytest.mark.parametrize("name", ["open_clip:ViT-B-32/laion2b_e16", "hf-hub:timm/x", "local-dir:x"])
def test_without_the_package_its_requirements_are_named(name, monkeypatch):
    monkeypatch.delitem(sys.modules, "open_clip")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -r requirements-open-clip\.txt"):
        check_clip(name)


def test_paths_in_names_are_written_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert in_full("local-dir:there") == f"local-dir:{tmp_path / 'there'}"
    assert in_full("open_clip:ViT-B/32=w=1.pt") == f"open_clip:ViT-B-32={tmp_path / 'w=1.pt'}"
    assert in_full("open_clip:a=~/w.pt") == f"open_clip:a={tmp_path / 'home' / 'w.pt'}"
    for name in ("RN50", "hf-hub:a/b", "open_clip:a/b"):
        assert in_full(name) == name


def test_a_tag_without_a_network_says_what_to_fetch_and_where_to_put_it(monkeypatch, tmp_path):
    from models import open_clip_package

    def offline(*_, **__):
        raise FileNotFoundError("no network")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    monkeypatch.setattr(open_clip_package, "download_pretrained_from_hf", offline)
    hub = "no network.*https://huggingface.co/{}.*local-dir:"
    whole = {"model_cfg": {"vision_cfg": {}, "text_cfg": {}}}
    for name, repository in (
        ("open_clip:ViT-B-32/laion2b_s34b_b79k", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
        ("hf-hub:laion/CLIP", "laion/CLIP"),
    ):
        with pytest.raises(UserError, match=hub.format(repository)):
            load_backbone(name, CPU)
    with monkeypatch.context() as patch:  # the configuration is in the cache, the weights are not

        def cached(_, filename=""):
            return tmp_path / filename if filename else offline()

        (tmp_path / "open_clip_config.json").write_text(json.dumps(whole))
        patch.setattr(open_clip_package, "download_pretrained_from_hf", cached)
        patch.setattr(open_clip, "get_tokenizer", lambda _: open_clip.SimpleTokenizer())
        with pytest.raises(UserError, match=hub.format("laion/CLIP")):
            load_backbone("hf-hub:laion/CLIP", CPU)
    only_a_file = {"url": "https://example.org/w.pt"}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: only_a_file)
    with pytest.raises(
        UserError, match=r"no network.*https://example.org/w.pt.*open_clip:RN50=FILE"
    ):
        load_backbone("open_clip:RN50/cc12m", CPU)


@pytest.fixture
def folder_of(models_made, tmp_path):
    """A copy of a model's folder that a test may damage; returns it and its configuration."""

    def copy(form: str) -> tuple[Path, dict]:
        folder = shutil.copytree(models_made / form, tmp_path / form)
        return folder, json.loads((folder / "open_clip_config.json").read_text())

    return copy


def refused(folder: Path, config: object, *words: str) -> None:
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        load_backbone(f"local-dir:{folder}", CPU)
    for word in ("--clip-model-name", *words):
        assert word in str(error.value)
    assert "\n" not in str(error.value)
    CASES["folders of open_clip", "refused"] += 1


def test_any_part_of_a_configuration_that_is_no_good_is_refused(folder_of):
    folder, config = folder_of("custom")
    model = config["model_cfg"]
    for content in ([], "text", None, {}, {"model_cfg": 1}, {"model_cfg": {}}):
        refused(folder, content, "model_cfg")
    for part in ("embed_dim", "vision_cfg", "text_cfg"):
        without = {name: value for name, value in model.items() if name != part}
        refused(folder, {"model_cfg": without})
    for part in ("embed_dim", "vision_cfg", "text_cfg", "unknown"):
        for value in (None, [1, 2], "text"):
            refused(folder, {"model_cfg": {**model, part: value}})
    for part in ("layers", "width", "patch_size", "image_size", "unknown"):
        for value in (0, "text", None):
            vision = {**model["vision_cfg"], part: value}
            refused(folder, {"model_cfg": {**model, "vision_cfg": vision}})


def test_any_preprocessing_that_is_no_good_is_refused(folder_of):
    folder, config = folder_of("custom")
    for part in ("mean", "std"):
        for value in ([0.5, 0.5], "text", [0.5, 0.5, "a"], {}, [[0.5] * 3]):
            refused(folder, {**config, "preprocess_cfg": {part: value}}, part)
    refused(folder, {**config, "preprocess_cfg": {"std": [0.5, 0, 0.5]}}, "std")
    for part in ("resize_mode", "interpolation"):
        for value in ("text", 3, [], ""):
            refused(folder, {**config, "preprocess_cfg": {part: value}}, part)
    refused(folder, {**config, "preprocess_cfg": 7}, "preprocess_cfg")
    grey = {"resize_mode": "longest", "fill_color": 127}
    refused(folder, {**config, "preprocess_cfg": grey}, "fill_color")


def test_a_tower_that_is_no_square_is_refused(folder_of):
    folder, config = folder_of("vit")
    config["model_cfg"]["vision_cfg"]["image_size"] = [32, 48]
    refused(folder, config, "32 x 48", "square")


def test_a_decoder_is_refused(folder_of):
    folder, config = folder_of("vit")
    config["model_cfg"]["multimodal_cfg"] = {}
    refused(folder, config, "decoder")


def test_folders_without_a_part_are_refused(folder_of):
    folder, config = folder_of("vit")
    (folder / "open_clip_pytorch_model.bin").unlink()
    refused(folder, config, "no weights")
    (folder / "open_clip_config.json").unlink()
    with pytest.raises(UserError, match=r"has no open_clip_config\.json.*open_clip:ARCH=FILE"):
        load_backbone(f"local-dir:{folder}", CPU)


def test_a_folder_without_its_tokenizer_is_refused(folder_of):
    folder, config = folder_of("hf")
    for file in folder.glob("*token*"):
        file.unlink()
    refused(folder, config, "tokenizer", "tokenizer.json")


def test_without_transformers_its_requirement_is_named(folder_of, monkeypatch):
    folder, config = folder_of("hf")
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(folder, config, "pip install transformers[sentencepiece]")


OF_ANOTHER = [
    (form, other) for form in FORMS for other in FORMS if {form, other} != {"vit", "quick"}
]


# GELU and QuickGELU have the same weights.
@pytest.mark.parametrize(
    ("form", "other"), one_of_each_kind([p for p in OF_ANOTHER if p[0] != p[1]], lambda p: p[0])
)
def test_weights_of_any_other_architecture_are_refused(form, other, models_made, folder_of):
    folder, config = folder_of(form)
    shutil.copy(models_made / other / "open_clip_pytorch_model.bin", folder)
    refused(folder, config, "does not fit the model", "choose the architecture")


def test_fine_tuned_weights_are_told_from_a_models_own(folder_of):
    folder, config = folder_of("vit")
    torch.save({"CLIP": {}}, folder / "open_clip_pytorch_model.bin")
    refused(folder, config, "--clip-model-path")


# What runs on it


def plain_recalls(models_made: Path, form: str, data_root: Path) -> dict[str, float]:
    """R@1 to R@50 of the sum on CIRR's validation split, by open_clip and nothing of ours."""
    model, preprocess, tokenizer = theirs(models_made, form)
    root = data_root / "cirr_dataset"
    places = json.loads((root / "cirr" / "image_splits" / "split.rc2.val.json").read_text())
    queries = json.loads((root / "cirr" / "captions" / "cap.rc2.val.json").read_text())
    names = list(places)
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.open(root / places[name])) for name in names])
        images = model.encode_image(pixels)
        texts = model.encode_text(tokenizer([query["caption"] for query in queries]))
    references = images[[names.index(query["reference"]) for query in queries]]
    similarities = F.normalize(references + texts, dim=-1) @ F.normalize(images, dim=-1).T
    ranks = []
    for query, row in zip(queries, similarities, strict=True):
        row[names.index(query["reference"])] = -1
        ranks.append(int((row > row[names.index(query["target_hard"])]).sum()))
    return {
        f"recall_at{k}": 100 * sum(rank < k for rank in ranks) / len(ranks) for k in (1, 5, 10, 50)
    }


@pytest.mark.parametrize("form", ["vit", "custom", "timm", "hf"])
def test_a_validation_is_what_a_plain_script_measures(form, models_made, drawn, run, tmp_path):
    words = ["--dataset", "CIRR", "--combining-function", "sum", "--transform", "clip"]
    words += ["--clip-model-name", named(models_made, form)]
    file = tmp_path / "result.json"
    run("validate", drawn, *words, "--metrics-json", file)
    result = json.loads(file.read_text())
    for name, value in plain_recalls(models_made, form, drawn).items():
        assert result["metrics"][name] == pytest.approx(value, abs=1e-4)
    about = result["preprocessing"]
    assert about["mean"] == FORMS[form][1]["mean"]
    assert about["resize_mode"] == FORMS[form][1].get("resize_mode", "shortest")
    assert about["context"] == FORMS[form][0]["text_cfg"].get("context_length", 77)


STAGE_1 = {
    "vit": ["--encoder", "text"],
    "resnet": ["--encoder", "image", "--gradient-checkpointing"],
    "custom": [
        "--micro-batch-size", 5, "--ema-decay", 0.9, "--gradient-checkpointing", "--clip-grad-norm", 1
    ],
    "hf": ["--image-cache", "pixels", "--cosine"],
}  # fmt: skip


@pytest.mark.parametrize("form", STAGE_1)
def test_stage_1_trains_what_it_is_asked_to(form, models_made, stage_1, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = named(models_made, form)
    folder = stage_1("CIRR", "--clip-model-name", name, *STAGE_1[form], "--num-epochs", 1)
    before = torch.load(models_made / form / "open_clip_pytorch_model.bin")
    trained = load_tensors(folder / "saved_models" / "tuned_clip_0.pt")
    after = trained["CLIP"]
    assert list(after) == list(before)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    asked = STAGE_1[form][1] if "--encoder" in STAGE_1[form] else "both"
    assert not moved & {"logit_scale", "logit_bias"}
    assert not any("running_" in name for name in moved)
    assert any(name.startswith("visual.") for name in moved) == (asked != "text")
    assert any(not name.startswith("visual.") for name in moved) == (asked != "image")
    preprocessing = trained["config"]["recipe"]
    assert preprocessing["mean"] == FORMS[form][1]["mean"]
    assert len(preprocessing["architecture"]) == 64
    assert bool(list(tmp_path.glob("pixels/*.npy"))) == (form == "hf")


@pytest.mark.parametrize("form", ["vit", "resnet", "custom", "timm"])
def test_gradients_by_checkpoints_are_the_same(form, models_made):
    """And blocks are computed twice, in the ResNet too."""
    model, backbone = load_backbone(named(models_made, form), CPU)
    side = backbone.resolution
    pixels = torch.linspace(-1, 1, 2 * 3 * side * side).view(2, 3, side, side)
    tokens = backbone.tokenizer(["is red", "a dress"])

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        (model.encode_image(pixels).sum() + model.encode_text(tokens).square().sum()).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    backbone.checkpoint_gradients(model)
    again = gradients()
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_stopped_training_goes_on_as_if_it_had_not_been(
    models_made, stage_1, tmp_path, monkeypatch
):
    name = ["--clip-model-name", named(models_made, "custom"), "--ema-decay", 0.9]
    whole = stage_1("CIRR", *name, output="whole")
    real = Encoder._image_features

    def interrupted(encoder, pixels):
        os.kill(os.getpid(), signal.SIGUSR1)
        return real(encoder, pixels)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(Encoder, "_image_features", interrupted)
        stage_1("CIRR", *name, output="stopped")
    assert stop.value.code == 0
    (run,) = (tmp_path / "stopped").iterdir()
    clip_fine_tune.main(["--resume", str(run)])
    assert kills.differences(whole, run) == []


def test_both_stages_a_submission_and_a_search(
    models_made, drawn, run, stage_1, stage_2, tmp_path, caplog, capsys
):
    """The name is given once; what was trained knows it from then on."""
    name = named(models_made, "custom")
    briefly = ["--clip-model-name", name, "--save-best", "--num-epochs", 1]
    clip = stage_1("CIRR", *briefly)
    tuned = ["--clip-model-path", next((clip / "saved_models").glob("*.pt"))]
    combiner = stage_2("CIRR", *tuned, *briefly)
    pair = [*tuned, "--combiner-path", next((combiner / "saved_models").glob("*.pt"))]
    composed = [*pair, "--combining-function", "combiner"]
    run("validate", drawn, "--dataset", "CIRR", *composed)
    written = run("cirr_test_submission", drawn, "--submission-name", "a", *composed)
    assert len(list(written.glob("*.json"))) == 2
    assert "more than the 12 tokens" in caplog.text
    # An index, and a query that finds the reference that it was made with.
    index = tmp_path / "index"
    photos = drawn / "cirr_dataset" / "dev"
    words = ["index", "--images", photos, "--output", index, "--clip-model-name", name]
    search.main(list(map(str, [*words, "--device", "cpu", "--num-workers", 0])))
    image = next(photos.rglob("*.png"))
    ask = ["query", "--index", index, "--image", image, "--device", "cpu", "--text"]
    capsys.readouterr()
    search.main(list(map(str, [*ask, "red " * 20, "--json"])))
    found = json.loads(capsys.readouterr().out)
    assert found["note"] == "the text has more than 12 tokens: the rest was ignored"
    # Another model with features of the same length is no model of this index, nor of this Combiner.
    other = ["--clip-model-name", named(models_made, "vit")]
    assert " and the query differ in " in exits(
        lambda: search.main(list(map(str, [*ask, "a", *other]))), capsys
    )
    caplog.clear()
    run("validate", drawn, "--dataset", "CIRR", *composed[2:], *other)
    assert "features of other CLIP weights" in caplog.text


def exits(call, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_weights_alone_do_not_tell_a_model(models_made, tmp_path, pictures, capsys):
    """GELU and QuickGELU have the same weights, and other features."""
    photos = pictures[0].parent
    quick = shutil.copytree(models_made / "quick", tmp_path / "quick_of_vit")
    shutil.copy(models_made / "vit" / "open_clip_pytorch_model.bin", quick)
    names = [named(models_made, "vit"), f"local-dir:{quick}"]
    keys = [encoder_of(name).describe() for name in names]
    assert keys[0]["weights"] == keys[1]["weights"]
    assert keys[0]["architecture"] != keys[1]["architecture"]
    index = ["index", "--images", photos, "--output", tmp_path / "index"]
    index += ["--device", "cpu", "--num-workers", 0]
    search.main(list(map(str, [*index, "--clip-model-name", names[0]])))
    again = lambda: search.main(list(map(str, [*index, "--clip-model-name", names[1]])))  # noqa: E731
    assert "index made with different weights" in exits(again, capsys)


def test_another_tokenizer_is_another_model(folder_of, models_made):
    folder, _ = folder_of("hf")
    file = folder / "tokenizer.json"
    about = json.loads(file.read_text())
    vocabulary = about["model"]["vocab"]
    vocabulary["red"], vocabulary["blue"] = vocabulary["blue"], vocabulary["red"]
    file.write_text(json.dumps(about))
    architectures = set()
    for name in (named(models_made, "hf"), named(models_made, "hf"), f"local-dir:{folder}"):
        encoder = load(name)
        encoder.backbone.tokenizer(["is red"] * 3)  # leaves no trace in it
        architectures.add(encoder.backbone.architecture)
    assert len(architectures) == 2


def test_openais_models_say_nothing_new(drawn):
    """Keys of caches and indexes, preprocessings of checkpoints and results are those of earlier versions."""
    encoder = encoder_of(str(drawn / "tiny_clip_vit.pt"))
    assert set(encoder.reported_preprocessing) == {"transform", "target_ratio", "resolution"}
    assert list(encoder.preprocessing) == [
        "clip_model_name", "transform", "target_ratio", "encode_precision", "decode", "background",
        "resolution",
    ]  # fmt: skip


def test_models_are_listed(capsys):
    """Each name that is printed is one, with the sizes that open_clip has."""
    for script in ("validate", "clip_fine_tune"):
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(script).main(["--list-models"])
        assert stop.value.code == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    listed = {line[0]: line[1:] for line in lines if len(line) == 4}
    assert {"RN50x4": ["640", "288", "77"]}.items() <= listed.items()
    assert set(OPENAI_CLIPS) <= set(listed)
    for name in set(listed) - set(OPENAI_CLIPS):
        check_clip(name)
        config = open_clip.get_model_config(open_clip_name(name).model)
        assert listed[name][0] == str(config["embed_dim"])
    assert listed["open_clip:ViT-B-16-SigLIP2/webli"] == ["768", "224", "64"]
    assert listed["open_clip:PE-Core-B-16/meta"] == ["1024", "224", "32"]


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_is_near(form, models_made, pictures):
    """Autocast finds nothing in open_clip's encoders that it cannot compute."""
    exact = encoder_of(named(models_made, form))
    half = dataclasses.replace(
        exact, preprocessing={**exact.preprocessing, "encode_precision": "bf16"}
    )
    for ours, theirs in (
        (half.images(pictures), exact.images(pictures)),
        (half.captions(CAPTIONS), exact.captions(CAPTIONS)),
    ):
        assert not torch.equal(ours, theirs)
        assert torch.cosine_similarity(ours, theirs).min() > 0.99
