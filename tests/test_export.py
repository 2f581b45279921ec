"""Exported pairs: the numbers of the weights they were made of, and a folder that is read whole or not at all."""

import dataclasses
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import string
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open

import demo_app
import export
import kills
import validate
from benchmarks import BENCHMARKS
from combiner import build_combiner
from conftest import CASES, ROOT, SOAK
from evaluation import model_card
from evaluation.comparison import Column, Resampling, bounds, intervals, resampled_metrics
from evaluation.result_file import read_result
from forks import free_port
from image_search import beside_weights
from image_search.manifest import read_manifest
from image_search.searcher import SearchQuery
from models import exported
from models.architectures import SIZES
from models.clip_model import load_clip
from models.configuration import read_checkpoint
from models.exported import (
    BUILT_FROM,
    CARD,
    KEYS,
    PAIR_CONFIG,
    PAIR_FORM,
    WEIGHT_FILES,
    read_exported,
)
from models.pair import load_pair
from original import arguments, csv_name
from runtime import files, hub
from runtime.tensors import load_tensors, save_tensors
from settings.groups import FREE_FLAGS, PairChoice
from test_every_flag import SCRIPTS, parsers
from test_stored import WRONG, at, places, refuse_each_wrong_value, refused, with_value
from utils import printable

CPU = torch.device("cpu")
MACHINE = ["--device", "cpu", "--num-workers", "0"]
SECRET = "/home/somebody"


def settings(flags: dict, **preprocessing) -> dict:
    """Settings of a training on a machine of somebody's."""
    free = {
        "data_root": SECRET,
        "output_dir": f"{SECRET}/models",
        "command": f"python {SECRET}",
        "started_in": SECRET,
    }
    return {
        "flags": {"dataset": "CIRR", "seed": 3, **free, **flags},
        "recipe": {
            "transform": "squarepad",
            "target_ratio": 1.5,
            "decode": "full",
            **preprocessing,
        },
        "data": {},
        "versions": {"torch": "2.6"},
    }


@pytest.fixture(scope="module")
def weights(drawn, tmp_path_factory) -> dict[str, list]:
    """Kind of pair -> the flags of its weights. They are random: what counts is that numbers stay."""
    folder = tmp_path_factory.mktemp("weights")
    name = drawn / "tiny_clip_vit.pt"
    torch.manual_seed(0)
    state = load_clip(str(name), CPU).state_dict()
    moved = {key: weight + 0.02 * torch.randn_like(weight) for key, weight in state.items()}
    config = settings({"learning_rate": 2e-6}, clip_model_name=str(name))
    save_tensors(folder / "clip.pt", {"CLIP": moved, "config": config})
    sizes = {"clip_dim": 64, "projection_dim": 16, "hidden_dim": 24, "num_experts": 3, "top_k": 1}
    for kind in ("moe", "clip4cir"):
        combiner = build_combiner({**sizes, "combiner_type": kind})
        config = settings({"combiner_lr": 1e-3, "top_k": 1, "combiner_type": kind})
        content = {"Combiner": combiner.state_dict(), "config": config}
        save_tensors(folder / f"{kind}.pt", content)
    tuned = ["--clip-model-path", folder / "clip.pt"]
    own = ["--clip-model-name", name]
    preprocessing = ["--transform", "squarepad", "--target-ratio", "1.5"]
    return {
        "sum": tuned,
        "own": own,
        "own, ResNet": ["--clip-model-name", drawn / "tiny_clip_resnet.pt"],
        "moe": [*tuned, "--combiner-path", folder / "moe.pt"],
        "clip4cir": [*tuned, "--combiner-path", folder / "clip4cir.pt"],
        "own, moe": [*own, *preprocessing, "--combiner-path", folder / "moe.pt"],
    }


KINDS = ("sum", "own", "own, ResNet", "moe", "clip4cir", "own, moe")


def make(flags: list, output: Path, *more: object) -> Path:
    """An exported pair."""
    export.main(list(map(str, [*flags, "--output", output, *more])))
    return output


@pytest.fixture(scope="module")
def pairs(weights, tmp_path_factory) -> dict[str, Path]:
    """Kind of pair -> its folder, which is not to be written to."""
    folder = tmp_path_factory.mktemp("pairs")
    return {kind: make(flags, folder / kind.replace(", ", "_")) for kind, flags in weights.items()}


@pytest.fixture
def own_pair(pairs, tmp_path) -> Path:
    """A pair of a mixture that a test may damage."""
    return shutil.copytree(pairs["moe"], tmp_path / "pair")


def composed(flags: list) -> list:
    """What is said beside the flags of weights, where --pair needs not say it."""
    return ["--combining-function", "combiner" if "--combiner-path" in flags else "sum"]


def line_of(capsys, call, *argv: object) -> str:
    """The one line in which a command refuses."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(list(map(str, argv)))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2, lines
    assert "error: " in lines[-1]
    assert sum("error: " in line for line in lines) == 1
    assert "Traceback" not in "".join(lines)
    return lines[-1]


# The same numbers


@pytest.mark.slow
# CLIP's own preprocessing, the ResNet, both kinds of Combiner; `make soak` takes all.
@pytest.mark.parametrize("number", range(14) if SOAK else [8, 10, 11, 13])
def test_golden_numbers(number, golden, expected, tmp_path):
    """Of weights without settings, which flags say in their stead: once, when they are exported."""
    entry = expected["validate"][number]
    words = arguments(entry, golden)
    chosen = dict(zip(words[::2], words[1::2], strict=True))
    dataset = ["--dataset", chosen.pop("--dataset")]
    if chosen.pop("--combining-function") == "sum":
        del chosen["--projection-dim"], chosen["--hidden-dim"]
    flags = [word for item in chosen.items() for word in item]
    pair = make(flags, tmp_path / "pair")
    file = tmp_path / "metrics.json"
    where = ["--data-root", golden, *MACHINE, "--metrics-json", file]
    validate.main(list(map(str, [*dataset, "--pair", pair, *where])))
    metrics = json.loads(file.read_text())["metrics"]
    for name, value in entry["metrics"].items():
        assert metrics[csv_name(name)] == pytest.approx(value, abs=1e-3)


def measure(folder: Path, drawn: Path, pair: list) -> dict:
    """The result of a validation without what says where its weights lay."""
    file = folder / "result.json"
    where = ["--dataset", "CIRR", "--data-root", drawn, *MACHINE, "--metrics-json", file]
    validate.main(list(map(str, [*where, *pair])))
    result = read_result(file)
    apart = ("checkpoints", "command", "date", "training", "assumed")
    return {name: value for name, value in result.items() if name not in apart}


@pytest.mark.parametrize("kind", KINDS)
def test_a_validation_is_equal_to_the_last_bit(kind, weights, pairs, drawn, tmp_path):
    flags = weights[kind]
    pair = ["--pair", pairs[kind]]
    by_paths = measure(tmp_path, drawn, [*composed(flags), *flags])
    assert measure(tmp_path, drawn, pair) == by_paths
    if kind == "moe":
        by_sum = ["--combining-function", "sum"]
        of_clip = measure(tmp_path, drawn, [*weights["sum"], *by_sum])
        assert measure(tmp_path, drawn, [*pair, *by_sum]) == of_clip
    assert load_pair(choose(pairs[kind]), CPU).describe()["training"].keys() >= {
        part for part, flag in zip(WEIGHT_FILES, ("--clip-model-path", "--combiner-path"), strict=True)
        if flag in flags
    }  # fmt: skip


def choose(place: Path | str, **more) -> PairChoice:
    return PairChoice(
        combining_function=None, clip_path=None, combiner_path=None, exported=place, **more
    )


def submitted(script: str):
    def outcome(folder: Path, drawn: Path, pair: list, **_: object) -> dict:
        where = ["--submission-name", "x", "--output-dir", folder, "--data-root", drawn, *MACHINE]
        importlib.import_module(script).main(list(map(str, [*pair, *where])))
        return {file.name: file.read_text() for file in folder.rglob("*") if file.is_file()}

    return outcome


def sheet(folder: Path, drawn: Path, pair: list, **_: object) -> dict:
    where = ["--dataset", "CIRR", "--data-root", drawn, "--output-dir", folder, "--num", 2]
    where += MACHINE
    importlib.import_module("visualize").main(list(map(str, [*pair, *where])))
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def audited(folder: Path, drawn: Path, pair: list, **_: object) -> dict:
    where = ["--dataset", "CIRR", "--data-root", drawn, "--resamples", 20, *MACHINE]
    words = [*pair, *where, "--metrics-json", folder / "audit.json"]
    importlib.import_module("audit").main(list(map(str, words)))
    return json.loads((folder / "audit.json").read_text())["protocols"]


def clip_alone(pair: list) -> list:
    """The flags of a pair without those of composing."""
    words = map(str, pair)
    return [
        word
        for flag, value in zip(words, words, strict=True)
        if flag not in ("--combining-function", "--combiner-path")
        for word in (flag, value)
    ]


def index(folder: Path, drawn: Path, pair: list, **_: object) -> dict:
    images = drawn / "cirr_dataset" / "dev"
    words = ["index", "--images", images, "--output", folder, *MACHINE, *clip_alone(pair)]
    importlib.import_module("search").main(list(map(str, words)))
    about = json.loads((folder / "index.json").read_text())
    return {"encoder": about["encoder"], "features": np.load(folder / about["features"]).tolist()}


CAPTION = "is red"


def query(folder: Path, drawn: Path, pair: list, *, capsys) -> dict:
    index(folder, drawn, pair)
    reference = drawn / "cirr_dataset" / "dev" / "dev-0-0-img0.png"
    words = ["query", "--index", folder, "--image", reference, "--text", CAPTION, "--json"]
    capsys.readouterr()
    importlib.import_module("search").main(list(map(str, [*words, *pair, "--device", "cpu"])))
    return json.loads(capsys.readouterr().out)


def page(folder: Path, drawn: Path, pair: list, **_: object) -> dict:
    """What the page's searcher answers; the page itself is not served."""
    index(folder, drawn, pair)
    seen = []

    def application(searcher, k, **_):
        seen.append(searcher)
        raise KeyboardInterrupt

    flags = ["--index", folder, *pair, "--device", "cpu", "--port", free_port()]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(demo_app, "application", application)
        demo_app.main(list(map(str, flags)))
    (searcher,) = seen
    (found,) = searcher.search([SearchQuery(references=[searcher.image(0)], text=CAPTION, k=10)])
    return {"results": found.results, "gate": found.gate, "experts": found.experts}


OUTCOMES = {
    "audit": audited,
    "cirr_test_submission": submitted("cirr_test_submission"),
    "circo_test_submission": submitted("circo_test_submission"),
    "demo_app": page,
    "fashioniq_test_submission": submitted("fashioniq_test_submission"),
    "search index": index,
    "search query": query,
    "triplets_test_submission": submitted("triplets_test_submission"),
    "validate": lambda folder, drawn, pair, **_: measure(folder, drawn, pair),
    "visualize": sheet,
}
NO_EVALUATION = {"combiner_train", "export", "plan stage2"}


def test_every_command_that_evaluates_or_searches_takes_a_pair():
    flags = {}
    for script in SCRIPTS:
        for words, parser in parsers(script):
            flags[" ".join([script, *words])] = set(parser._option_string_actions)
    takes_weights = {name for name, known in flags.items() if "--clip-model-path" in known}
    assert {name for name, known in flags.items() if "--pair" in known} == OUTCOMES.keys()
    assert takes_weights - NO_EVALUATION == OUTCOMES.keys()


# validate: see test_a_validation_is_equal_to_the_last_bit
@pytest.mark.parametrize("command", [name for name in OUTCOMES if name != "validate"])
def test_every_command_gives_the_same_of_a_pair(command, weights, pairs, drawn, tmp_path, capsys):
    flags = weights["moe"]
    found = []
    for name, pair in (("paths", [*composed(flags), *flags]), ("pair", ["--pair", pairs["moe"]])):
        folder = tmp_path / name
        folder.mkdir()
        found.append(OUTCOMES[command](folder, drawn, pair, capsys=capsys))
    assert found[0] == found[1] != {}


def test_an_index_of_a_pair_is_asked_with_it(pairs, weights, drawn, tmp_path, capsys):
    """By default with its Combiner too, which flags replace."""
    whole = query(tmp_path / "index", drawn, ["--pair", pairs["moe"]], capsys=capsys)
    reference = drawn / "cirr_dataset" / "dev" / "dev-0-0-img0.png"
    ask = ["query", "--index", tmp_path / "index", "--image", reference, "--text", CAPTION]

    def answers(*more: object) -> dict:
        capsys.readouterr()
        importlib.import_module("search").main(
            list(map(str, [*ask, "--json", "--device", "cpu", *more]))
        )
        return json.loads(capsys.readouterr().out)

    assert answers() == whole
    assert len(whole["experts"]) == 3
    assert answers("--combining-function", "sum")["gate"] is None
    other = weights["clip4cir"][-2:]
    assert answers(*other) == answers("--pair", pairs["clip4cir"])
    assert answers(*other)["experts"] == []
    # Brought up to date without a flag, it keeps its CLIP.
    again = ["index", "--output", tmp_path / "index", *MACHINE]
    importlib.import_module("search").main(list(map(str, again)))
    assert "0 images added" in capsys.readouterr().out
    main = importlib.import_module("search").main
    assert "differ in weights" in line_of(capsys, main, *ask, "--pair", pairs["own"])


def test_an_index_whose_pair_is_no_name(pairs, drawn, tmp_path):
    index(tmp_path / "index", drawn, ["--pair", pairs["moe"]])
    file = tmp_path / "index" / "index.json"
    about = json.loads(file.read_text())
    for value in WRONG:
        file.write_text(json.dumps(with_value(about, ("pair", "exported"), value)))
        if isinstance(value, str) and value and "\0" not in value:
            read_manifest(file.parent)
        else:
            refused(lambda: read_manifest(file.parent), str(file), "pair.exported")
        CASES["fields of an index of a pair", "tried"] += 1


@pytest.mark.parametrize("kind", ["moe", "own, ResNet"])
def test_half_rounds_and_does_nothing_else(kind, weights, pairs, drawn, tmp_path):
    half = make(weights[kind], tmp_path / "half", "--half")
    for part, name in WEIGHT_FILES.items():
        if (half / name).exists():
            rounded = load_tensors(half / name)
            whole = load_tensors(pairs[kind] / name)
            for tensor_name, weight in whole.items():
                if tensor_name != "config":
                    kept = weight.half() if weight.is_floating_point() else weight
                    assert torch.equal(rounded[tensor_name], kept)
            config = rounded.pop("config", {})
            floats = {n: w.float() if w.is_floating_point() else w for n, w in rounded.items()}
            save_tensors(tmp_path / f"{part}.pt", {KEYS[part]: floats, "config": config})
    name = drawn / ("tiny_clip_resnet.pt" if "ResNet" in kind else "tiny_clip_vit.pt")
    flags = ["--clip-model-name", name, "--clip-model-path", tmp_path / "clip.pt"]
    if kind == "moe":
        flags += ["--combiner-path", tmp_path / "combiner.pt"]
    by_paths = measure(tmp_path, drawn, [*composed(flags), *flags])
    by_pair = measure(tmp_path, drawn, ["--pair", half])
    assert by_pair == by_paths
    assert read_exported(half).config["half"] is True


def test_a_weight_that_half_cannot_hold(weights, tmp_path, capsys):
    checkpoint = load_tensors(Path(weights["sum"][1]))
    checkpoint["CLIP"]["text_projection"][0, 0] = 1e6
    save_tensors(tmp_path / "clip.pt", checkpoint)
    flags = ["--clip-model-path", tmp_path / "clip.pt", "--output", tmp_path / "pair"]
    line = line_of(capsys, export.main, *flags, "--half")
    assert "text_projection is too large for fp16" in line
    assert [path.name for path in tmp_path.iterdir()] == ["clip.pt"]
    make(flags[:2], tmp_path / "pair")


# The folder


def read_all(folder: Path, parts=tuple(WEIGHT_FILES)) -> None:
    """All that is read of a pair, but for building it."""
    pair = read_exported(folder)
    for part in parts:
        if pair.config[part] is not None:
            pair.weights(part)


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_says_what_it_is(kind, weights, pairs):
    pair = pairs[kind]
    has_combiner = "--combiner-path" in weights[kind]
    there = {
        PAIR_CONFIG,
        CARD,
        "clip.safetensors",
        *(["combiner.safetensors"] if has_combiner else []),
    }
    assert {file.name for file in pair.iterdir()} == there
    assert {file.stat().st_mode & 0o444 for file in pair.iterdir()} == {0o444}
    read_all(pair)
    loaded = load_pair(choose(pair), CPU)
    config = read_exported(pair).config
    assert config["recipe"] == loaded.encoder.preprocessing
    digests = loaded.describe()["weights_sha256"]
    assert {part: config[part]["weights_sha256"] for part in digests} == digests


@pytest.mark.parametrize("file", [PAIR_CONFIG, CARD, *WEIGHT_FILES.values()])
def test_a_file_that_is_missing_truncated_or_flipped(file, own_pair):
    path = own_pair / file
    whole = path.read_bytes()
    config = read_exported(own_pair).config
    path.unlink()
    if file == CARD:  # what people read, and may change
        read_all(own_pair)
        return
    refused(lambda: read_all(own_pair), str(own_pair), file)
    generator = np.random.default_rng(0)
    parts = [part for part, name in WEIGHT_FILES.items() if name == file]
    more = generator.integers(len(whole), size=8 if SOAK else 1).tolist()
    ends = {0, 1, len(whole) // 2, len(whole) - 1, *more}
    for end in ends:
        path.write_bytes(whole[:end])
        if file == PAIR_CONFIG and end == len(whole) - 1:  # the last line's end
            read_all(own_pair, parts)
        else:
            refused(lambda: read_all(own_pair, parts), str(path))
        CASES["truncated files of an exported pair", "refused"] += 1
    path.write_bytes(whole)
    places = range(len(whole))
    if file != PAIR_CONFIG:
        in_data = generator.integers(400, len(whole), size=60 if SOAK else 4).tolist()
        places = [*range(0, 400, 7 if SOAK else 40), *in_data]
    for place in places:
        flip(path, place, bit := 1 << int(generator.integers(8)))
        outcome = "refused"
        try:
            refused(lambda: read_all(own_pair, parts), str(own_pair))
        except pytest.fail.Exception:  # where it did not raise, nothing may have changed
            assert read_exported(own_pair).config == config
            assert file == PAIR_CONFIG
            outcome = "read"
        CASES["flipped bits of an exported pair", outcome] += 1
        flip(path, place, bit)
    read_all(own_pair, parts)


def flip(path: Path, place: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ bit]))


NULLABLE = ("combiner", "num_experts", "top_k", "vision_patch_size")


@pytest.mark.slow
def test_every_field_of_every_wrong_type(own_pair):
    """With the digest of what it then says: who writes a wrong value may write its digest too."""
    path = own_pair / PAIR_CONFIG
    config = json.loads(path.read_text())

    def read(content) -> None:
        if isinstance(content, dict) and content.get("sha256") == config["sha256"]:
            content = {**content, "sha256": exported._digest(content)}
        path.write_text(json.dumps(content))
        read_exported(own_pair)

    refuse_each_wrong_value(
        "fields of an exported pair", config, read, names=(str(path),), nullable=NULLABLE
    )


def test_every_field_that_was_edited_or_is_missing(own_pair):
    """Whatever stands there instead, be it of the right kind."""
    path = own_pair / PAIR_CONFIG
    config = json.loads(path.read_text())
    for steps in places(config):
        value = at(config, steps)
        if not steps or steps == ("form",) or isinstance(value, dict | list):
            continue
        other = {bool: lambda v: not v, str: lambda v: f"{v[1:]}a", type(None): lambda v: 1}.get(
            type(value), lambda v: v + 1
        )(value)
        path.write_text(json.dumps(with_value(config, steps, other)))
        refused(lambda: read_exported(own_pair), str(path))
        inner = at(config, steps[:-1])
        less = {name: kept for name, kept in inner.items() if name != steps[-1]}
        path.write_text(json.dumps(with_value(config, steps[:-1], less)))
        refused(lambda: read_exported(own_pair), str(path))
        CASES["edited fields of an exported pair", "refused"] += 2
    path.write_text(json.dumps(config, sort_keys=True))  # another order says the same
    read_exported(own_pair)


def test_a_newer_form_and_sizes_that_are_of_no_model(own_pair):
    path = own_pair / PAIR_CONFIG
    config = json.loads(path.read_text())

    def write(content: dict) -> None:
        path.write_text(json.dumps({**content, "sha256": exported._digest(content)}))

    write({"form": PAIR_FORM + 1, "anything": "else"})
    refused(
        lambda: read_exported(own_pair),
        str(path),
        f"has format {PAIR_FORM + 1}",
        "update this project",
    )
    for name in set(SIZES) - {"transformer_heads"}:  # heads of the same width have the same shapes
        write(with_value(config, ("clip", "sizes", name), 7))
        refused(lambda: load_pair(choose(own_pair), CPU), str(own_pair / WEIGHT_FILES["clip"]))
    for name in WRONG:
        if not isinstance(name, dict):
            path.write_text(json.dumps(name))
            refused(lambda: read_exported(own_pair), str(path))


def test_it_does_not_say_where_the_files_of_a_training_lay(pairs, weights):
    for kind in ("sum", "moe", "clip4cir"):
        for file in pairs[kind].iterdir():
            assert SECRET.encode() not in file.read_bytes()
    for part, name in WEIGHT_FILES.items():
        with safe_open(pairs["moe"] / name, framework="pt") as file:
            config = json.loads(file.metadata()["config"])
        flag = {"clip": "--clip-model-path", "combiner": "--combiner-path"}[part]
        own = load_tensors(Path(weights["moe"][weights["moe"].index(flag) + 1]))["config"]
        kept = {name: value for name, value in own["flags"].items() if name not in FREE_FLAGS}
        assert config == {**own, "flags": kept}


@pytest.mark.parametrize("part", WEIGHT_FILES)
def test_a_part_is_a_checkpoint_of_its_own(part, pairs, weights):
    """So stage 2 trains on the CLIP of a pair, with the preprocessing of its training."""
    file = pairs["moe"] / WEIGHT_FILES[part]
    flag = {"clip": "--clip-model-path", "combiner": "--combiner-path"}[part]
    found = read_checkpoint(flag, file, KEYS[part])
    own = read_checkpoint(flag, Path(weights["moe"][weights["moe"].index(flag) + 1]), KEYS[part])
    assert found.table["transform"] == own.table["transform"] == "squarepad"
    assert found.state.keys() == own.state.keys()
    assert all(torch.equal(found.state[name], own.state[name]) for name in own.state)


# What is refused


@pytest.mark.parametrize("command", OUTCOMES)
@pytest.mark.parametrize("flag", ["--clip-model-name", "--clip-model-path", "--combiner-path"])
def test_flags_of_what_a_pair_holds(command, flag, pairs, tmp_path, capsys):
    script, *words = command.split()
    parser = next(p for w, p in parsers(script) if w == words)
    if flag not in parser._option_string_actions:
        return
    needs = {
        "--output": tmp_path, "--index": tmp_path, "--image": tmp_path, "--text": "red",
        "--dataset": "CIRR", "--submission-name": "x",
    }  # fmt: skip
    for name, value in needs.items():
        if name in parser._option_string_actions:
            words += [name, value]
    if script == "search" and words[0] == "index":
        words += ["--images", ROOT]
    main = importlib.import_module(script).main
    line = line_of(capsys, main, *words, "--pair", pairs["moe"], flag, tmp_path / "clip.pt")
    assert f"{flag} cannot be combined with --pair" in line


def test_a_combiner_where_there_is_none(pairs, drawn, capsys):
    words = ["--dataset", "CIRR", "--data-root", drawn, *MACHINE, "--pair", pairs["sum"]]
    line = line_of(capsys, validate.main, *words, "--combining-function", "combiner")
    assert "has no Combiner" in line
    line = line_of(capsys, validate.main, *words[:-2])
    assert "--combining-function" in line  # still needed where there is no pair


def test_a_folder_that_is_taken(weights, tmp_path, capsys, monkeypatch):
    taken = tmp_path / "taken"
    make(weights["sum"], taken)
    before = {file: file.read_bytes() for file in taken.iterdir()}
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for output in (taken, tmp_path / "file", tmp_path / "link"):
        line = line_of(capsys, export.main, *weights["sum"], "--output", output)
        assert f"--output {output} already exists" in line
    assert before == {file: file.read_bytes() for file in taken.iterdir()}
    (tmp_path / "empty").mkdir()
    read_all(make(weights["sum"], tmp_path / "empty"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    make(weights["sum"], Path())
    read_all(tmp_path / "here")
    assert "--pair here" in (tmp_path / "here" / CARD).read_text()


@pytest.mark.parametrize("fails_at", range(4) if SOAK else [0, 3])
def test_nothing_is_left_of_what_could_not_be_written(
    fails_at, weights, tmp_path, capsys, monkeypatch
):
    """Two files of weights, config.json and the card."""
    written = []
    sync = files.os.fsync

    def full(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) > fails_at:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    (tmp_path / "pairs").mkdir()
    output = tmp_path / "pairs" / "pair"
    assert "No space left" in line_of(capsys, export.main, *weights["moe"], "--output", output)
    assert list(output.parent.iterdir()) == []
    assert len(written) > fails_at


# The card


@pytest.fixture(scope="module")
def results(weights, drawn, tmp_path_factory) -> dict[str, Path]:
    """Kind of pair -> a result of it."""
    folder = tmp_path_factory.mktemp("results")
    for kind in ("sum", "moe", "own"):
        flags = weights[kind]
        where = ["--data-root", drawn, *MACHINE, "--metrics-json", folder / f"{kind}.json"]
        words = ["--dataset", "CIRR", *composed(flags), *flags, *where]
        validate.main(list(map(str, words)))
    return {file.stem: file for file in folder.iterdir()}


@pytest.mark.parametrize("half", [False, True])
def test_the_card_has_every_number(half, weights, results, tmp_path):
    given = [results["moe"], results["sum"]]
    pair = make(weights["moe"], tmp_path / "pair", *["--half"] * half, "--results", *given)
    card = (pair / CARD).read_text()
    benchmark = BENCHMARKS["CIRR"](Path())
    for file in given:
        for protocol, measured in read_result(file)["protocols"].items():
            rows = [line for line in card.splitlines() if line.startswith(f"| {protocol} |")]
            values = [f"| {measured['metrics'][metric]:.2f} [" for metric in benchmark.titles]
            assert any(all(value in row for value in values) for row in rows)
    assert "CIRR val, combiner" in card
    assert ("before the weights of the combiner were rounded" in card) is half
    assert "CIRR val, sum" in card
    assert "--learning-rate 2e-06" in card
    assert "--combiner-lr 0.001" in card
    assert "trained on CIRR" in card
    assert "python src/validate.py --dataset CIRR --pair pair" in card
    assert all(printable(line) == line for line in card.splitlines())
    said = beside_weights.measured(load_pair(by_path(exported=pair), CPU))  # on the search page
    recalls = read_result(results["moe"])["metrics"]
    assert said.startswith("CIRR val, combiner")
    ten, fifty = (recalls[f"recall_at{k}"] for k in (10, 50))
    assert said.endswith(f": R@10 {ten:.2f}, R@50 {fifty:.2f}")


def by_path(**paths) -> PairChoice:
    return PairChoice(
        **{"combining_function": None, "clip_path": None, "combiner_path": None, **paths}
    )


def test_the_search_page_knows_what_lies_beside_weights(weights, tmp_path):
    """The recall of their epoch, and what their experts take, but not of other weights."""
    (tmp_path / "saved_models").mkdir()
    content = {**load_tensors(weights["moe"][-1]), "epoch": 3}
    save_tensors(tmp_path / "saved_models" / "combiner.pt", content)
    pair = load_pair(by_path(clip_path=weights["sum"][1], combiner_path=tmp_path), CPU)
    assert beside_weights.measured(pair) == "" and beside_weights.experts_of(pair) == []
    validations = "epoch,recall_at10,recall_at50\n0,1,2\n3,41.666,50\n"
    (tmp_path / "validation_metrics.csv").write_text(validations)
    assert beside_weights.measured(pair) == "CIRR val: R@10 41.67, R@50 50.00"
    experts = [{"takes": ["colour"], "is_idle": False}] * 3
    digest = pair.describe()["weights_sha256"]["combiner"]
    for of_weights, known in ((digest, experts), ("0" * 64, [])):
        report = {"of_weights": of_weights, "experts": experts}
        (tmp_path / "experts.json").write_text(json.dumps(report))
        assert [expert.model_dump() for expert in beside_weights.experts_of(pair)] == known


HOSTILE = "<img src=x onerror=alert(1)> [a](http://b) `c` ``d`` **e** _f_ | &amp; # ~g~ \\ \n\n# h\n```\n<b>"


def test_what_files_say_is_no_markup_in_a_card(pairs, results, monkeypatch):
    """Names of files and folders, versions, fields of results and settings: text, whatever characters they have."""
    markdown = pytest.importorskip("markdown_it").MarkdownIt().enable("table")
    few = dataclasses.replace(model_card.CARD_RESAMPLING, resamples=10)
    monkeypatch.setattr(model_card, "CARD_RESAMPLING", few)

    def kinds(said: str) -> list[str]:
        config = dict(read_exported(pairs["own"]).config)
        config["recipe"] = {**config["recipe"], "clip_model_name": f"{said}.pt", "transform": said}
        config["versions"] = {said: said}
        measured = {**read_result(results["own"]), "combining_function": said}
        measured["encode_precision"] = said
        flags = {"dataset": said, said: said}
        training = {"clip": {"flags": flags, "recipe": {}, "data": {}, "versions": {}}}
        exporting = model_card.Exporting(config=config, training=training, place=said)
        card = model_card.model_card(exporting, [measured])
        assert all(printable(line) == line for line in card.splitlines())
        found = []
        for token in markdown.parse(card):
            found += [token.type, *(inner.type for inner in token.children or ())]
        return found

    assert kinds(HOSTILE) == kinds("plain")
    for character in string.punctuation if SOAK else "*`|<[\\":
        assert kinds(f"a{character}b {character}c{character} d") == kinds("plain")


def test_openais_licence_is_named_where_the_weights_are_openais(pairs):
    config = dict(read_exported(pairs["own"]).config)
    config["recipe"] = {**config["recipe"], "clip_model_name": "ViT-B/32"}
    exporting = model_card.Exporting(config=config, training={}, place="pair")
    card = model_card.model_card(exporting, [])
    assert "OpenAI's CLIP `ViT-B/32`, which is under the MIT licence" in card
    assert "MIT" not in (pairs["own"] / CARD).read_text()


def test_results_of_others_are_refused(weights, results, tmp_path, capsys):
    def refusal(kind: str, file: Path, *more: object) -> str:
        words = [*weights[kind], "--output", tmp_path / "pair", "--results", file, *more]
        line = line_of(capsys, export.main, *words)
        assert f"--results {file}" in line or str(file) in line
        assert not (tmp_path / "pair").exists()
        return line

    for exporting, measured in (("sum", "own"), ("sum", "moe"), ("clip4cir", "moe")):
        assert "is not the hash of the exported weights" in refusal(exporting, results[measured])
    line = refusal("sum", results["sum"], "--transform", "clip")
    assert "preprocessing.transform is squarepad" in line
    (tmp_path / "none.json").write_text("{}")
    refusal("sum", tmp_path / "none.json")


def test_own_intervals_are_those_of_the_difference_from_nothing(results):
    result = read_result(results["moe"])
    nothing = json.loads(json.dumps(result))
    for measured in nothing["protocols"].values():
        for kind in ("ranks", "group_ranks"):
            measured[kind] = {split: [10**6] * len(of) for split, of in measured[kind].items()}
    benchmark = BENCHMARKS["CIRR"](Path())
    how = Resampling(resamples=300, confidence=0.9, seed=5)
    for protocol in result["protocols"]:
        column = Column("", [result])
        hits = column.hits(benchmark, protocol)
        (drawn,) = resampled_metrics(benchmark, [hits], column.clusters(how), resampling=how)
        own = bounds(drawn, how.confidence)
        difference = intervals(
            benchmark, Column("", [nothing]), column, protocol=protocol, resampling=how
        )
        assert own == difference
        for metric, (low, high) in own.items():
            assert low <= result["protocols"][protocol]["metrics"][metric] <= high
            assert low < high or low in (0, 100)


# The Hub


class HubError(RuntimeError, OSError):
    """What the stub raises: an error of its own and of what it reaches the network with."""


@pytest.fixture
def stub(monkeypatch, tmp_path) -> SimpleNamespace:
    """A package huggingface_hub that keeps repositories in a folder; `offline` ends that."""
    known = SimpleNamespace(root=tmp_path / "hub", offline=None)

    def reach(repository: str) -> Path:
        if known.offline:
            raise known.offline
        return known.root / repository

    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        folder = reach(repository)
        if not folder.is_dir():
            raise HubError(f"404: {repository} is not there\nsee the documentation")
        assert {PAIR_CONFIG, *WEIGHT_FILES.values(), f"{BUILT_FROM}/*"} == set(allow_patterns)
        return str(folder)

    package = SimpleNamespace(
        errors=SimpleNamespace(HfHubHTTPError=HubError),
        snapshot_download=snapshot_download,
        create_repo=lambda repository, exist_ok: reach(repository),
        upload_folder=lambda repo_id, folder_path: shutil.copytree(folder_path, reach(repo_id)),
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", package)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", package.errors)
    return known


def test_a_pair_goes_to_the_hub_and_comes_back(stub, weights, pairs, drawn, tmp_path, capsys):
    make(weights["moe"], tmp_path / "pair", "--push", "some/pair.1")
    read_all(stub.root / "some/pair.1")
    assert "--pair hf-hub:some/pair.1" in (tmp_path / "pair" / CARD).read_text()
    place = ["--pair", "hf-hub:some/pair.1"]
    assert measure(tmp_path, drawn, place) == measure(tmp_path, drawn, ["--pair", pairs["moe"]])
    # An index remembers the name, and not where the Hub's cache was.
    answers = query(tmp_path / "index", drawn, place, capsys=capsys)
    about = json.loads((tmp_path / "index" / "index.json").read_text())
    assert about["pair"]["exported"] == "hf-hub:some/pair.1"
    reference = drawn / "cirr_dataset" / "dev" / "dev-0-0-img0.png"
    ask = ["query", "--index", tmp_path / "index", "--image", reference, "--text", CAPTION]
    importlib.import_module("search").main(list(map(str, [*ask, "--json", "--device", "cpu"])))
    assert json.loads(capsys.readouterr().out) == answers


def test_an_upload_without_a_network(stub, weights, tmp_path, capsys):
    stub.offline = HubError("no network")
    output = tmp_path / "pair"
    line = line_of(capsys, export.main, *weights["sum"], "--output", output, "--push", "some/pair")
    assert "--push some/pair: no network" in line
    assert f"hf upload some/pair {output}" in line
    read_all(output)


OFFLINE = [
    HubError("no network"),
    RuntimeError("what the network's own package says"),
    OSError(101, "Network is unreachable"),
    ValueError("no such revision"),
]


@pytest.mark.parametrize("error", OFFLINE, ids=lambda error: type(error).__name__)
def test_a_download_without_a_network(error, stub, drawn, capsys):
    stub.offline = error
    words = ["--dataset", "CIRR", "--data-root", drawn, *MACHINE, "--pair", "hf-hub:some/pair"]
    line = line_of(capsys, validate.main, *words)
    assert f"hf-hub:some/pair could not be fetched ({error})" in line


def test_without_the_package(weights, drawn, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    output = tmp_path / "pair"
    line = line_of(capsys, export.main, *weights["sum"], "--output", output, "--push", "some/pair")
    assert "pip install huggingface_hub" in line
    assert not output.exists()
    words = ["--dataset", "CIRR", "--data-root", drawn, *MACHINE, "--pair", "hf-hub:some/pair"]
    assert "pip install huggingface_hub" in line_of(capsys, validate.main, *words)


def test_the_real_packages_errors_are_caught():
    pytest.importorskip("huggingface_hub")
    package = hub.import_hub()
    caught = hub._errors(package)
    assert issubclass(package.errors.RepositoryNotFoundError, caught)
    assert issubclass(package.errors.LocalEntryNotFoundError, caught)
    assert issubclass(package.errors.HFValidationError, caught)


NO_NAMES = (
    "", "x", "a/b/c", "a/", "/b", "../b", "a/..", "a/b\n", "a/-b", "a--b/c", "é/b", "a b/c",
    "a/" + "b" * 100,
)  # fmt: skip


@pytest.mark.parametrize("name", NO_NAMES, ids=ascii)
def test_what_is_no_name_of_a_repository(name, tmp_path, capsys):
    line = line_of(capsys, export.main, "--output", tmp_path / "pair", f"--push={name}")
    assert "--push" in line
    line = line_of(capsys, validate.main, "--dataset", "CIRR", f"--pair=hf-hub:{name}")
    assert "--pair" in line


def test_only_one_file_imports_the_hub():
    importers = [
        f.stem for f in (ROOT / "src").rglob("*.py") if "import huggingface_hub." in f.read_text()
    ]
    assert importers == ["hub"]


# A kill


@pytest.mark.parametrize("door", ["export", "convert"])
def test_what_makes_a_folder_goes_on_after_a_kill(door, weights, drawn, tmp_path, monkeypatch):
    """In a container, where the process that goes on has the number of the one that was killed."""
    words = {
        "export": [*weights["moe"], "--output", tmp_path / "pair"],
        "convert": ["--dataset", "CIRR", "--data-root", drawn, "--output-dir", tmp_path],
    }
    argv = list(map(str, words[door]))
    arguments = (door, argv, tmp_path / "log", 0)
    process = multiprocessing.get_context("fork").Process(target=kills.work, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    (left,) = tmp_path.glob(".*")
    assert any(left.iterdir())
    os.utime(left, (1, 1))
    monkeypatch.setattr(os, "getpid", lambda: process.pid)
    importlib.import_module(door).main(argv)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "log",
        {"export": "pair", "convert": "triplets_dataset"}[door],
    ]
