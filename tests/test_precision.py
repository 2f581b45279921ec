"""The precision of encoding: what it computes, where it is written down, and that float32 means float32."""

import json

import pytest
import torch

import search
from cli.startup import pick_device
from models.configuration import resolve_clip_options
from models.encoder import load_encoder
from runtime import precision
from runtime.choices import ENCODE_PRECISIONS
from runtime.precision import check_encode_precision, encoding, exact_float32
from settings.groups import Clip
from utils import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
HALF = ("bf16", "fp16")


@pytest.fixture
def make_encoder(golden):
    def make(precision: str | None = None, name: str = "vit"):
        choice = Clip(clip_model_name=str(golden / f"clip_{name}.pt"), encode_precision=precision)
        return load_encoder(resolve_clip_options(choice, []), None, CPU, workers=0)

    return make


@pytest.mark.parametrize("name", ["vit", "rn"])
@pytest.mark.parametrize("half", HALF)
def test_half_precision_is_near_and_is_no_float32(half, name, golden, make_encoder):
    paths = sorted((golden / "cirr_dataset" / "dev").rglob("*.png"))[:8]
    assert len(paths) == 8
    captions = ["is red", "has more stripes"]
    exact, other = make_encoder(name=name), make_encoder(half, name)
    for ours, theirs in (
        (other.images(paths), exact.images(paths)),
        (other.captions(captions), exact.captions(captions)),
    ):
        assert ours.dtype == torch.float32
        assert not torch.equal(ours, theirs)
        assert torch.cosine_similarity(ours, theirs).min() > 0.999


def test_products_are_made_in_what_was_asked_for(make_encoder):
    pixels = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        encoder = make_encoder(name)
        made = []
        encoder.model.visual.conv1.register_forward_hook(
            lambda *call, made=made: made.append(call[2].dtype)
        )
        encoder._image_features(pixels)
        encoder.model.encode_image(encoder.backbone.normalise(pixels))
        assert made == [dtype, torch.float32]


def test_float32_rounds_nothing_but_where_tf32_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    exact_float32()

    def rounds() -> list[bool]:
        return [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]

    for name in ENCODE_PRECISIONS:
        with encoding(name, CPU):
            assert rounds() == [name == "tf32"] * 2
        assert rounds() == [False, False]
    with pytest.raises(RuntimeError), encoding("tf32", CPU):
        raise RuntimeError
    assert rounds() == [False, False]


def test_a_device_that_cannot_says_what_it_can(monkeypatch, fails, drawn):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: False)
    with pytest.raises(UserError, match="--encode-precision tf32: cuda does not support TF32"):
        check_encode_precision("tf32", GPU)
    with pytest.raises(
        UserError, match="--encode-precision bf16: this GPU does not support bfloat16"
    ):
        check_encode_precision("bf16", GPU)
    flags = ["--dataset", "CIRR", "--combining-function", "sum"]
    flags += ["--clip-model-name", drawn / "tiny_clip_vit.pt"]
    error = fails("validate", drawn, *flags, "--encode-precision", "tf32")
    assert "--encode-precision tf32: cpu does not support TF32: choose fp32" in error


def test_keys_of_caches_say_in_what_was_encoded(make_encoder):
    about = make_encoder().describe()
    assert about["precision"] == "fp32 on cpu"
    assert set(about) == {
        "clip_model_name", "transform", "target_ratio", "resolution", "weights", "precision", "versions",
    }  # fmt: skip
    half = make_encoder("fp16")
    assert half.describe() == {**about, "precision": "fp16 on cpu"}
    assert half.image_preprocessing() == make_encoder().image_preprocessing()


@pytest.mark.slow
def test_the_precision_of_training_is_that_of_validating(stage_2, run, drawn, tmp_path, caplog):
    """A Combiner that was trained on fp16 features is measured on such, unless a flag says otherwise."""
    folder = stage_2("CIRR", "--encode-precision", "fp16", "--num-epochs", 1)
    weights = folder / "saved_models" / "combiner_0.pt"
    preprocessing = torch.load(weights)["config"]["recipe"]
    assert preprocessing["encode_precision"] == "fp16"
    flags = ["--dataset", "CIRR", "--combining-function", "combiner", "--combiner-path", weights]
    for more, expected in (([], "fp16"), (["--encode-precision", "fp32"], "fp32")):
        caplog.clear()
        run("validate", drawn, *flags, *more, "--metrics-json", tmp_path / "m.json")
        assert json.loads((tmp_path / "m.json").read_text())["encode_precision"] == expected
        warned = "was trained with --encode-precision fp16, not fp32" in caplog.text
        assert warned == (expected == "fp32")


def test_an_index_keeps_to_its_precision_and_a_query_is_exact(drawn, golden, tmp_path, capsys):
    images = golden / "cirr_dataset" / "dev"
    update = ["index", "--output", str(tmp_path / "index"), "--num-workers", "0", "--device", "cpu"]
    make = [*update, "--images", str(images), "--clip-model-name", str(golden / "clip_vit.pt")]
    search.main([*make, "--encode-precision", "fp16"])
    about = json.loads((tmp_path / "index" / "index.json").read_text())
    assert about["encoder"]["encode_precision"] == "fp16"
    # Silent, the flag stands for what the index has.
    search.main(update)
    with pytest.raises(SystemExit) as stop:
        search.main([*make, "--encode-precision", "fp32"])
    assert stop.value.code == 2
    assert "with different weights, preprocessing or precision" in capsys.readouterr().err
    query = ["query", "--index", str(tmp_path / "index"), "--text", "is red", "--device", "cpu"]
    query += ["--image", str(next(images.rglob("*.png")))]
    seen = []
    real = precision.encoding
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.encoder.encoding", lambda *how: seen.append(how[0]) or real(*how))
        search.main(query)
    assert set(seen) == {"fp32"}


def test_attention_is_never_cudnns():
    """Its gradients have been NaN on GPUs of compute capability 9, where torch takes it first."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    pick_device("cpu")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
