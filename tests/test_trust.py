# ruff: noqa: F401, F811
"""What a file names or says has no code run: configurations, weights, indexes and pairs that somebody else made."""

import ast
import builtins
import json
import pickle
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import clip_fine_tune
import export
import search
import validate
from conftest import ROOT
from models import exported
from models.encoder import load_backbone
from models.names import check_clip
from runtime.files import file_digest
from runtime.tensors import save_safetensors, save_tensors
from runtime.torchscript import archived_state
from test_backbones import STAGE_1, models_made
from test_export import settings
from utils import UserError

CPU = torch.device("cpu")
CODE = "from pathlib import Path\nPath({marker!r}).write_text('run')\nclass Own: pass\n"

# Calls that can run code of others -> what each of them must say.
CALLS = {
    "torch.load": ("weights_only", True),
    "HFTokenizer": ("trust_remote_code", False),
    "AutoTokenizer.from_pretrained": ("trust_remote_code", False),
    "AutoConfig.from_pretrained": ("trust_remote_code", False),
    "AutoModel.from_pretrained": ("trust_remote_code", False),
    "open_clip.create_model": ("pretrained_text", False),
    "hub.snapshot_download": ("allow_patterns", None),
}
FORBIDDEN = (
    "torch.jit.load", "torch.hub", "pickle.load", "pickle.loads", "eval", "exec", "AutoModel.from_config",
)  # fmt: skip


def test_no_call_lets_a_file_run_code():
    for file in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                check_call(ast.unparse(node.func), {word.arg: word.value for word in node.keywords})


def check_call(called: str, said: dict) -> None:
    assert not any(called == name or called.startswith(f"{name}.") for name in FORBIDDEN), called
    assert called != "np.load" or "allow_pickle" not in said  # which is False by itself
    if called in CALLS:
        name, value = CALLS[called]
        assert name in said, f"{called} without {name}"
        assert value is None or ast.literal_eval(said[name]) is value


def plant(models_made: Path, folder: Path, form: str) -> Path:
    """A model whose folder holds code, and a way to have it run; returns the file that the code would write."""
    shutil.copytree(models_made / "hf", folder)
    marker = folder.parent / "run"
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    auto_map = {"AutoTokenizer": ["own.Own", None], "AutoConfig": "own.Own", "AutoModel": "own.Own"}
    file = folder / "open_clip_config.json"
    about = json.loads(file.read_text())
    text = about["model_cfg"]["text_cfg"]
    if form in ("arguments", "tokenizer"):
        tokenizer = folder / "tokenizer_config.json"
        known = json.loads(tokenizer.read_text())
        tokenizer.write_text(json.dumps({**known, "auto_map": auto_map}))
    if form == "arguments":
        text["tokenizer_kwargs"] = {"trust_remote_code": True}
    if form == "text encoder":
        (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
        text["hf_model_name"] = "its/own"
    if form == "nested":
        inner = {"model_type": "bert", "attn_implementation": "somebody/attention"}
        (folder / "config.json").write_text(
            json.dumps({"model_type": "clip", "text_config": inner})
        )
        text["hf_model_name"] = "its/own"
    if form == "file":
        text["tokenizer_kwargs"] = {"vocab_file": "/etc/passwd"}
    if form == "folder":
        text["hf_model_name"] = str(folder)
    file.write_text(json.dumps(about))
    return marker


PLANTED = ("arguments", "tokenizer", "text encoder", "nested", "file", "folder")


@pytest.fixture
def never_asked(monkeypatch):
    """Nothing is asked on stdin."""

    def ask(*_):
        raise AssertionError("a prompt")

    monkeypatch.setattr(builtins, "input", ask)


@pytest.mark.parametrize("form", PLANTED)
def test_a_folder_that_wants_code_to_be_run_is_refused(form, models_made, tmp_path, never_asked):
    marker = plant(models_made, tmp_path / "planted", form)
    with pytest.raises(UserError, match="planted"):
        load_backbone(f"local-dir:{tmp_path / 'planted'}", CPU)
    assert not marker.exists()
    assert not any(name.endswith("own") for name in sys.modules if "transformers_modules" in name)


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_a_name_in_weights_is_said_and_has_no_code_run(
    ending, models_made, drawn, tmp_path, never_asked, capsys, caplog
):
    caplog.set_level("INFO")
    marker = plant(models_made, tmp_path / "planted", "arguments")
    name = f"local-dir:{tmp_path / 'planted'}"
    file = tmp_path / f"clip{ending}"
    state = load_backbone(f"local-dir:{models_made / 'hf'}", CPU)[0].state_dict()
    preprocessing = settings({}, clip_model_name=name)
    if ending == ".pt":
        save_tensors(file, {"CLIP": state, "config": preprocessing})
    else:
        save_safetensors(file, state, preprocessing)
    words = ["--dataset", "CIRR", "--combining-function", "sum", "--clip-model-path", file]
    with pytest.raises(SystemExit) as stop:
        validate.main(list(map(str, [*words, "--data-root", drawn, "--device", "cpu"])))
    assert stop.value.code == 2
    assert not marker.exists()
    assert f"opening {name}" in caplog.text
    assert "tokenizer_kwargs" in capsys.readouterr().err


def test_a_resumed_run_has_no_code_run(
    models_made, drawn, run, tmp_path, never_asked, capsys, caplog
):
    caplog.set_level("INFO")
    folder = shutil.copytree(models_made / "hf", tmp_path / "planted")
    name = f"local-dir:{folder}"
    flags = ["--dataset", "CIRR", "--clip-model-name", name, *STAGE_1["hf"]]
    flags += ["--num-epochs", 1, "--batch-size", 8, "--save-training"]
    out = run("clip_fine_tune", drawn, *flags)
    (started,) = out.iterdir()
    (started / "best_metrics.json").unlink(missing_ok=True)
    (started / "validation_metrics.csv").unlink()  # so that it is not complete
    shutil.rmtree(folder)
    marker = plant(models_made, folder, "arguments")
    caplog.clear()
    with pytest.raises(SystemExit) as stop:
        clip_fine_tune.main(["--resume", str(started)])
    assert stop.value.code == 2
    assert "tokenizer_kwargs" in capsys.readouterr().err
    assert not marker.exists()


@pytest.mark.parametrize("form", ["arguments", "tokenizer"])
def test_a_pair_of_somebody_else_has_no_code_run(
    form, models_made, drawn, tmp_path, never_asked, capsys
):
    """Its digests tell nothing of who made it."""
    words = ["--clip-model-name", f"local-dir:{models_made / 'hf'}", "--output", tmp_path / "pair"]
    export.main(list(map(str, words)))
    marker = plant(models_made, tmp_path / "planted", form)
    built_from = tmp_path / "pair" / exported.BUILT_FROM
    for file in (tmp_path / "planted").iterdir():
        if file.suffix != ".bin":
            shutil.copy(file, built_from)
    config = json.loads((tmp_path / "pair" / exported.PAIR_CONFIG).read_text())
    config["clip"]["files"] = {file.name: file_digest(file) for file in built_from.iterdir()}
    config["sha256"] = exported._digest(config)
    (tmp_path / "pair" / exported.PAIR_CONFIG).write_text(json.dumps(config))
    words = ["--dataset", "CIRR", "--data-root", drawn, "--device", "cpu"]
    words += ["--pair", tmp_path / "pair"]
    with pytest.raises(SystemExit) as stop:
        validate.main(list(map(str, words)))
    assert stop.value.code == 2
    assert not marker.exists()
    assert str(built_from) in capsys.readouterr().err


# Indexes


@pytest.fixture
def indexed(models_made, tmp_path, capsys):
    """An index of a `local-dir:` model that was made here; the words of a query to it."""
    folder = shutil.copytree(models_made / "hf", tmp_path / "model")
    photos = tmp_path / "photos"
    photos.mkdir()
    from PIL import Image

    for number in range(3):
        Image.new("RGB", (40, 40), (60 * number, 90, 30)).save(photos / f"{number}.png")
    words = ["index", "--images", photos, "--output", tmp_path / "index", "--device", "cpu"]
    words += ["--num-workers", 0, "--clip-model-name", f"local-dir:{folder}"]
    search.main(list(map(str, words)))

    def query(index: Path, *flags: object) -> str:
        words = ["query", "--index", index, "--image", photos / "0.png", "--text", "is red"]
        words += ["--device", "cpu"]
        capsys.readouterr()
        search.main(list(map(str, [*words, *flags])))
        return capsys.readouterr().out

    return query


def test_an_index_opens_what_it_names_where_it_was_made(indexed, tmp_path, caplog):
    caplog.set_level("INFO")
    name = f"local-dir:{tmp_path / 'model'}"
    answers = indexed(tmp_path / "index")
    assert f"opening {name}, recorded in {tmp_path / 'index' / 'index.json'}" in caplog.text
    copied = shutil.copytree(tmp_path / "index", tmp_path / "copied")
    with pytest.raises(SystemExit) as stop:
        indexed(copied)
    assert stop.value.code == 2
    assert indexed(copied, "--clip-model-name", name) == answers


def test_an_edited_index_opens_nothing_else(models_made, indexed, tmp_path, never_asked, capsys):
    marker = plant(models_made, tmp_path / "planted", "arguments")
    file = tmp_path / "index" / "index.json"
    about = json.loads(file.read_text())
    for pair in (
        {**about["pair"], "clip_model_name": f"local-dir:{tmp_path / 'planted'}"},
        {**about["pair"], "clip_model_name": "hf-hub:some/body"},
        {**about["pair"], "exported": "hf-hub:some/body"},
        {**about["pair"], "exported": str(tmp_path / "planted")},
    ):
        file.write_text(json.dumps({**about, "pair": pair}))
        with pytest.raises(SystemExit) as stop:
            indexed(tmp_path / "index")
        assert stop.value.code == 2
        assert "was made on another machine and refers to" in capsys.readouterr().err
    assert not marker.exists()


# TorchScript


class Odd(torch.nn.Module):
    """Weights at some depth, shared ones, and tensors that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2).half(), torch.nn.BatchNorm2d(3)])
        self.register_buffer("shared", self.layers[0].weight.detach())
        self.constant = torch.ones(3)
        self.names = ["a", "b"]
        self.table = {"x": torch.ones(2)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x)


@pytest.mark.filterwarnings("ignore")
def test_an_archive_is_read_as_torch_reads_it(tmp_path, monkeypatch):
    torch.jit.script(Odd()).save(str(tmp_path / "odd.pt"))
    expected = torch.jit.load(str(tmp_path / "odd.pt")).state_dict()
    monkeypatch.setattr(torch.jit, "load", None)
    found = archived_state(tmp_path / "odd.pt")
    assert list(found) == list(expected)
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype
        assert torch.equal(found[name], weight)


class Runs:
    """What a pickle runs."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.write_text, (self.marker, "run")


@pytest.mark.filterwarnings("ignore")
def test_an_archive_runs_nothing(tmp_path):
    torch.jit.script(Odd()).save(str(tmp_path / "odd.pt"))
    with (
        zipfile.ZipFile(tmp_path / "odd.pt") as whole,
        zipfile.ZipFile(tmp_path / "bad.pt", "w") as bad,
    ):
        for name in whole.namelist():
            content = whole.read(name)
            if name.endswith("/data.pkl"):
                content = pickle.dumps(Runs(tmp_path / "run"))
            bad.writestr(name, content)
    with pytest.raises(UserError, match=r"bad\.pt is not a readable TorchScript archive"):
        archived_state(tmp_path / "bad.pt")
    assert not (tmp_path / "run").exists()


def test_a_repository_is_said_and_its_configuration_checked(
    monkeypatch, tmp_path, models_made, caplog, never_asked
):
    """As `hf-hub:` fetches it."""
    from models import open_clip_package

    marker = plant(models_made, tmp_path / "planted", "arguments")
    caplog.set_level("INFO")
    monkeypatch.setattr(
        open_clip_package,
        "download_pretrained_from_hf",
        lambda model, filename=None: str(
            tmp_path / "planted" / (filename or "open_clip_pytorch_model.bin")
        ),
    )
    check_clip("hf-hub:some/body")
    with pytest.raises(UserError, match="tokenizer_kwargs"):
        load_backbone("hf-hub:some/body", CPU)
    assert "opening hf-hub:some/body" in caplog.text
    assert not marker.exists()
