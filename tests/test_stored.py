"""What files say of themselves, field by field, and weights from elsewhere, weight by weight: read, or named.

One field of each type, and one weight of each kind; `make soak` takes all of them.
"""

import contextlib
import hashlib
import itertools
import json
import math
import random
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import clip_fine_tune
import combiner_train
import kills
from combiner import build_combiner, load_combiner
from conftest import CASES, SOAK, one_of_each_kind
from image_search import faiss_index
from image_search.image_index import open_index
from image_search.stores import faiss
from image_search.stores.faiss import VECTOR_KINDS
from models import weights_file
from models.clip_model import load_clip, load_finetuned
from models.configuration import Settings, read_checkpoint
from runtime.tensors import load_tensors
from settings.declaring import stored
from test_fuzz import QUIET, json_values
from trainers import stage_1_flags, trainer_in
from training import saving
from training.hyper_parameters import read_hyper_parameters
from training.losses import ContrastiveLoss
from training.run_folder import best_validation
from training.saving import Progress, load_state, save_state
from training.step import MovingAverage, Task
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
    "moe with parts": {
        "combiner_type": "moe",
        "num_experts": 3,
        "top_k": 1,
        "shared_expert": True,
        "router_norm": True,
        "router_bias": True,
    },
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
    wanted = {}
    config = {**COMBINERS[kind], "top_k": 1}
    return load_combiner(state, config, path, wanted=wanted, clip_dim=12).state_dict()


def weights_of(kind: str, clip) -> dict[str, torch.Tensor]:
    model = clip if kind == "CLIP" else combiner_of(kind)
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def kind_of_weight(item: tuple[str, torch.Tensor]) -> tuple[str, int]:
    """The last part of a weight's name, and its dimensions."""
    name, weight = item
    return name.rpartition(".")[2], weight.dim()


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
    for name, weight in one_of_each_kind(weights.items(), kind_of_weight):
        if not weight.is_floating_point():
            continue
        damaged = {**weights, name: FLAWS[flaw](weight)}
        refused(lambda state=damaged: load_as(kind, state, clip), "there.pt", name)
        CASES["weights", "refused"] += 1


@pytest.mark.parametrize("kind", ["CLIP", *COMBINERS])
def test_any_weight_that_is_missing_or_extra_is_named(kind, clip):
    weights = weights_of(kind, clip)
    for name, _ in one_of_each_kind(weights.items(), kind_of_weight):
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
    refused(lambda: load_as(kind, zeros, clip), "contains only zeros")
    biases = {name: torch.zeros_like(w) if "bias" in name else w for name, w in weights.items()}
    load_as(kind, biases, clip)
    load_as(kind, weights, clip)


WRAPPERS = (
    lambda name: f"module.{name}",
    lambda name: f"_orig_mod.{name}",
    lambda name: f"module._orig_mod.{name}",
    lambda name: f"_orig_mod.module.{name}",
    lambda name: ".".join([*name.split(".")[:1], "_orig_mod", *name.split(".")[1:]]),
)
FORMS = list(itertools.product(["CLIP", *COMBINERS], [".pt", "plain", ".safetensors"]))
# Each kind in each form, and the wrappers in turn; `make soak` tries each wrapper with all of them.
WRAPPED = [(*form, wrapped) for form, wrapped in zip(FORMS, itertools.cycle(WRAPPERS))]
if SOAK:
    WRAPPED = [(*form, wrapped) for form in FORMS for wrapped in WRAPPERS]


@pytest.mark.parametrize(("kind", "form", "wrapped"), WRAPPED)
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
    config = {"flags": {"top_k": 1}, "recipe": {}, "data": {}, "versions": {}}
    if form == ".pt":
        torch.save({key: state, "config": config}, path)
    elif form == "plain":
        torch.save({**state, "config": config}, path)
    else:
        safetensors = pytest.importorskip("safetensors.torch")
        metadata = {"config": json.dumps(config)}
        safetensors.save_file(state, path, metadata=metadata)


def test_weights_twice_or_without_a_name(tmp_path):
    torch.save({"CLIP": {"a": torch.ones(1), "module.a": torch.ones(1)}}, tmp_path / "a.pt")
    refused(
        lambda: read_checkpoint("--path", tmp_path, "CLIP"), "a.pt contains a twice", "module.a"
    )
    torch.save({"CLIP": {3: torch.ones(1)}}, tmp_path / "a.pt")
    refused(
        lambda: read_checkpoint("--path", tmp_path, "CLIP"),
        "a.pt: 3 is not a valid weight name",
    )


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
    monkeypatch.setattr(weights_file, "load_tensors", lambda _: dict(content))
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


# Files of fields


WRONG = [
    None, True, -1, 0, 2**70, 0.5, -0.5, math.nan, math.inf, 1e300, "", "one", "a\0b", "../x", [], [None], ["one"],
    {}, {"one": None}, {"1": [1]},
]  # fmt: skip


def places(content, steps=()):
    """Every place in a document, from the outside in, as the keys that lead there."""
    yield steps
    if isinstance(content, dict | list | tuple):
        for key in content if isinstance(content, dict) else range(len(content)):
            yield from places(content[key], (*steps, key))


def with_value(content, steps, value):
    """A document with another value at a place."""
    if not steps:
        return value
    items = dict(content) if isinstance(content, dict) else dict(enumerate(content))
    items[steps[0]] = with_value(items[steps[0]], steps[1:], value)
    return items if isinstance(content, dict) else type(content)(items.values())


def at(content, steps):
    for step in steps:
        content = content[step]
    return content


def is_of_kind(value, other) -> bool:
    """Whether a value could stand for another: numbers for numbers, texts for texts."""
    both = (type(value), type(other))
    return both in {(int, float), (float, int)} or type(value) is type(other)


def refuse_each_wrong_value(kind: str, content, read, *, names=(), nullable=(), free=()) -> None:
    """Put wrong values at each place of a document: they are named with file and field, or are like what was there.

    Args:
        read: reads a document.
        names: words of every refusal.
        nullable: fields that may be None.
        free: fields that nothing is asked of.
    """

    def attempt(steps, value) -> None:
        try:
            read(with_value(content, steps, value))
        except UserError as error:
            told = str(error)
            assert len(told.splitlines()) == 1
            assert all(name in told for name in names), told
            # The field, what it is in, or the last that has a name and not a number.
            fields = [*steps[-2:], *[step for step in steps if isinstance(step, str)][-1:]]
            assert not steps or any(str(step) in told for step in fields), (steps, told)
            CASES[kind, "refused"] += 1
        else:
            earlier = at(content, steps)
            silent = steps and str(steps[-1]) in nullable and None in (value, earlier)
            assert silent or is_of_kind(value, earlier), (steps, value)
            CASES[kind, "read"] += 1

    read(content)
    everywhere = [steps for steps in places(content) if not set(steps) & set(free)]

    def kind_of_place(steps: tuple) -> tuple:
        """What a field is in, its type, and whether it may be None."""
        around = tuple(step if isinstance(step, str) else "*" for step in steps[:-1])
        may_be_none = bool(steps) and str(steps[-1]) in nullable
        return around, type(at(content, steps)), may_be_none

    for steps in one_of_each_kind(everywhere, kind_of_place):
        for value in WRONG:
            attempt(steps, value)
    fuzz = given(st.sampled_from(everywhere), json_values)(attempt)
    settings(QUIET, max_examples=QUIET.max_examples // 3)(fuzz)()


# Indexes


def write_index(folder: Path, count: int = 40, kind: str = "flat", dim: int = 16) -> None:
    """An index of images that are nowhere."""
    features = np.random.default_rng(count).normal(size=(count, dim)).astype(np.float32)
    files = [(f"/photos/{row}.png", 100 + row, 10**18 + row) for row in range(count)]
    folder.mkdir(exist_ok=True)
    preprocessing = {"transform": "targetpad", "target_ratio": 1.25, "background": "white"}
    about = {
        "encoder": {"weights": "0" * 64, **preprocessing, "resolution": 32, "decode": "draft"},
        "folders": ["/photos"],
        "pair": {**preprocessing, "clip_model_name": "RN50x4", "clip_model_path": "/w.pt"},
        "unreadable": {"/photos/x.png": "it is empty"},
    }
    rows = lambda start, stop: features[start:stop]  # noqa: E731
    listed = dict.fromkeys(files, 0)
    faiss.publish(folder, listed, rows, about={**about, "kind": kind})


def part(folder: Path, name: str) -> Path:
    (file,) = folder.glob(f"{name}*")
    return file


def test_each_field_of_an_index(tmp_path):
    write_index(tmp_path, kind="hnsw")
    file = tmp_path / "index.json"

    def read(content) -> None:
        file.write_text(json.dumps(content))
        open_index(tmp_path)

    content = json.loads(file.read_text())
    refuse_each_wrong_value(
        "fields of index.json", content, read, names=[str(tmp_path)], nullable=["clip_model_path"]
    )
    for later in ("unreadable", "folders", "torch", "recall against exact"):
        read({name: value for name, value in content.items() if name != later})
    read({**content, "of a later version": 3})


def test_each_field_of_the_files_of_an_index(tmp_path):
    write_index(tmp_path, count=3)
    about = json.loads((tmp_path / "index.json").read_text())
    file = part(tmp_path, "files")

    def read(content) -> None:
        file.write_text(json.dumps(content))
        # Else every change is refused by that.
        about["sha256"]["files"] = hashlib.sha256(file.read_bytes()).hexdigest()
        (tmp_path / "index.json").write_text(json.dumps(about))
        open_index(tmp_path)

    content = json.loads(file.read_text())
    names = [str(tmp_path)]
    refuse_each_wrong_value("fields of files-*.json", content, read, names=names)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda rows: with_row(rows, math.nan), "values that are not finite"),
        (lambda rows: with_row(rows, math.inf), "values that are not finite"),
        (lambda rows: rows[::-1], "have changed since they were written"),
        (lambda rows: np.roll(rows, 1, axis=0), "have changed since they were written"),
        (lambda rows: rows + 1, "have changed since they were written"),
        (lambda rows: rows[1:], "features"),
        (lambda rows: rows[:, 1:], "have changed since they were written"),
        (lambda rows: rows.astype(np.float64), "float64"),
        (lambda rows: rows.astype(np.float16), "float16"),
        (lambda rows: rows.astype(object), ""),
        (lambda rows: rows.astype(complex), "complex"),
        (lambda rows: rows[0], "of shape (16,)"),
        (lambda rows: rows[:0], "of shape (0, 16)"),
        (lambda rows: rows[None], "of shape (1, 40, 16)"),
    ],
)
@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_features_that_are_no_index_of_the_files(damage, reason, kind, tmp_path):
    write_index(tmp_path, kind=kind)
    file = part(tmp_path, "features")
    np.save(file, damage(np.load(file)), allow_pickle=True)
    assert reason in refused(lambda: open_index(tmp_path), str(tmp_path))
    CASES["parts of an index", "refused"] += 1


NPY = "{{'descr': {}, 'fortran_order': {}, 'shape': {}}}"


HEADERS = [
    "{", "'", '\"\"\"', "x", "(" * 200, "-" * 9000 + "1", "{'descr': 1, 2: 3}", "{**1}", "\0", " \n  a\n b", "007",
    *(NPY.format("'<f4'", False, shape) for shape in ("(-40, 16)", "(40, -16)", "(2**9, 1)", "(40.0, 16)", "None")),
    *(NPY.format("'<f4'", False, shape) for shape in (f"({2**64}, 16)", f"({2**62}, 4)", f"({10**13}, 16)")),
    *(NPY.format(kind, False, "(40, 16)") for kind in ("'|O'", "None", "5", "('<f4', (2,))", "'x'", "b'<f4'")),
    NPY.format("'<f4'", 5, "(40, 16)"),
]  # fmt: skip


def of_version_or_first(case: tuple[str, int]) -> tuple:
    """Each header in the first version of the format, and the first header in each version."""
    _, version = case
    return case if version == 1 else (HEADERS[0], version)


@pytest.mark.parametrize(
    ("header", "version"),
    one_of_each_kind(itertools.product(HEADERS, [1, 2, 3, 4]), of_version_or_first),
)
def test_features_with_a_damaged_header(header, version, tmp_path):
    write_index(tmp_path, kind="flat")
    file = part(tmp_path, "features")
    size = len(header).to_bytes(2 if version == 1 else 4, "little")
    file.write_bytes(b"\x93NUMPY" + bytes([version, 0]) + size + header.encode() + bytes(40 * 64))
    assert str(file) in refused(lambda: open_index(tmp_path), str(tmp_path))


def test_features_that_are_an_archive(tmp_path):
    write_index(tmp_path, kind="flat")
    file = part(tmp_path, "features")
    rows = np.load(file)
    with open(file, "wb") as stream:
        np.savez(stream, rows=rows)
    assert str(file) in refused(lambda: open_index(tmp_path), str(tmp_path))


def with_row(rows: np.ndarray, value: float) -> np.ndarray:
    changed = rows.copy()
    changed[7, 3] = value
    return changed


@pytest.mark.parametrize("kind", VECTOR_KINDS)
def test_vectors_of_other_features(kind):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(10_000 if kind == "ivfpq" else 50, 16)).astype(np.float32)
    index = faiss_index.build(features, kind)
    assert faiss_index.mismatch(index, features, kind) == ""
    repeated = np.repeat(features[:10], len(features) // 10, axis=0)  # many images that are equal
    assert faiss_index.mismatch(faiss_index.build(repeated, kind), repeated, kind) == ""
    assert "other features" in faiss_index.mismatch(index, rng.permutation(features), kind)
    assert "vectors of dimension 16" in faiss_index.mismatch(index, features[1:], kind)
    for other in set(VECTOR_KINDS) - {kind}:
        assert faiss_index.mismatch(index, features, other) == f"it is not a {other} index"


def test_files_of_two_indexes(tmp_path):
    for name, count in (("a", 40), ("b", 40)):
        write_index(tmp_path / name, count, dim=16 if name == "a" else 8)
    for name in ("files", "features", "vectors"):
        file = part(tmp_path / "a", name)
        whole = file.read_bytes()
        file.write_bytes(b"")
        refused(lambda: open_index(tmp_path / "a"), file.name)
        file.write_bytes(part(tmp_path / "b", name).read_bytes())
        if name != "files":  # which are the same
            refused(lambda: open_index(tmp_path / "a"), str(tmp_path / "a"))
        file.write_bytes(whole)
    files = part(tmp_path / "a", "files")
    files.write_text(json.dumps(json.loads(files.read_text())[::-1]))
    refused(lambda: open_index(tmp_path / "a"), files.name, "it has changed since it was written")


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The kernel refuses files above a size in bytes, as a full disk does; Python ignores its signal SIGXFSZ."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_a_disk_that_is_full_at_any_byte_leaves_the_earlier_index(kind, tmp_path):
    """FAISS and NumPy pass over the last bytes."""
    write_index(tmp_path, 300, kind=kind)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    for name in ("index", "files", "features", "vectors"):
        size = part(tmp_path, name).stat().st_size
        for short in (1, 100, 5000, size // 2):
            with files_of_at_most(max(size - short, 0)):
                refused(lambda: write_index(tmp_path, 300, kind=kind), "could not write")
            assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
            open_index(tmp_path)
            CASES["full disks", "refused"] += 1


# Settings of checkpoints and runs


def settings_of(script) -> Settings:
    """Settings as a training of a script writes them, with a value for each flag that may be silent."""
    flags = json.loads(
        json.dumps(stored(script.parse(["--dataset", "CIRR", "--clip-model-name", "RN50"])))
    )
    spoken = {
        "exclusions": "/list.json", "resume": "/run", "image_cache": "/pixels", "device": "cpu", "similarity_block": 8,
        "workspace": "w", "experiment_name": "e", "clip_model_path": "/w.pt", "transform": "clip", "target_ratio": 1.5,
        "decode": "full", "encode_precision": "fp32", "background": "white", "micro_batch_size": 4,
        "clip_grad_norm": 1.0, "ema_decay": 0.9, "seeds": [1, 2], "feature_cache": "/features", "save_every": 5,
        "lora_rank": 4,
    }  # fmt: skip
    for name, value in flags.items():
        flags[name] = spoken[name] if value is None else value
    clip = {
        "transform": "clip",
        "target_ratio": 1.5,
        "decode": "full",
        "encode_precision": "fp32",
        "background": "white",
    }
    digests = {"data_sha256": "0" * 64, "clip_weights": "1" * 64}
    return Settings(
        flags=flags,
        preprocessing={"clip_model_name": "RN50", **clip, "resolution": 224, "clip_dim": 1024},
        data={**digests, "excluded": {"val": {"images": 0}}},
        versions={"torch": "2.6"},
    )


TRAININGS = {"stage 1": clip_fine_tune, "stage 2": combiner_train}
SILENT = {
    "exclusions", "resume", "image_cache", "feature_cache", "device", "similarity_block", "workspace",
    "experiment_name", "clip_model_name", "clip_model_path", "transform", "target_ratio", "decode",
    "background", "encode_precision", "micro_batch_size", "clip_grad_norm", "ema_decay", "seeds", "save_every",
    "excluded", "lora_rank",
    "versions", "started_in",
}  # fmt: skip


@pytest.mark.parametrize("script", TRAININGS)
def test_each_field_of_a_runs_settings(script, tmp_path):
    """What is not refused here reaches the flags of a resumed run, and must be good there too."""
    content = settings_of(TRAININGS[script]).on_disk()
    file = tmp_path / "training_hyperparameters.json"

    def read(content) -> None:
        file.write_text(json.dumps(content))
        read_hyper_parameters(tmp_path)

    refuse_each_wrong_value(
        "settings of runs",
        content,
        read,
        names=["--resume", str(file)],
        nullable=SILENT,
        free=["excluded"],
    )
    read({**content, "of a later version": [math.nan]})
    for name in set(content["flags"]) - {"dataset", "script"}:  # of a later version
        rest = {other: value for other, value in content["flags"].items() if other != name}
        read({**content, "flags": rest})
    refused(lambda: read({}), str(file), "flags")


def test_each_field_of_a_checkpoint(tmp_path, monkeypatch):
    config = settings_of(combiner_train).on_disk()
    weights = {"output_layer.weight": torch.ones(2, 2)}
    content = {"epoch": 3, "config": config, "metrics": {"recall": 50.0}}
    path = tmp_path / "combiner.pt"
    torch.save({"Combiner": weights, **content}, path)
    assert read_checkpoint("--combiner-path", path, "Combiner").config == config

    def read(beside) -> None:
        held = {"Combiner": weights, **beside} if isinstance(beside, dict) else {"config": beside}
        monkeypatch.setattr(weights_file, "load_tensors", lambda _: held)
        read_checkpoint("--combiner-path", path, "Combiner")

    refuse_each_wrong_value(
        "settings of checkpoints",
        content,
        read,
        names=["--combiner-path", str(path)],
        nullable=SILENT,
        free=["excluded"],
    )
    read({})
    read({"config": {}})
    assert read_checkpoint("--combiner-path", path, "Combiner").table["versions"] == {}


# Runs


def test_damaged_records_of_a_run_are_named(tmp_path):
    for text in ("epoch,recall\n0,x\n", "epoch,loss\n0,1\n", ""):
        (tmp_path / "validation_metrics.csv").write_text(text)
        refused(lambda: best_validation(tmp_path, "recall"), "validation_metrics.csv", "delete")


# States


def parts_of(module: torch.nn.Module) -> dict:
    """All that a training can have, of a module."""
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    return {
        "module": module,
        "optimizer": optimizer,
        "schedule": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5),
        "scaler": torch.amp.GradScaler("cpu"),
        "average": MovingAverage(module, 0.9),
    }


PROGRESS = {
    "epoch": 1,
    "losses": [0.5, math.inf],
    "skipped": [1],
    "skipped_in_a_row": 1,
    "rows": {
        "train": [{"epoch": 0, "train_epoch_loss": 0.5}],
        "loss_scaling": [{"epoch": 0, "loss_scale": 4.0, "skipped_steps": 1}],
    },
    "best": {"recall": 50.0},
    "began": 1.8e9,
    "seconds": 75.5,
    "most_memory": 2**31,
}


@pytest.fixture
def state(tmp_path):
    """A state after a step, in a file."""
    parts = parts_of(torch.nn.Linear(3, 2))
    parts["module"](torch.ones(1, 3)).sum().backward()
    parts["optimizer"].step()
    parts["schedule"].step()
    save_state(tmp_path / "state.pt", parts, Progress(**PROGRESS), CPU)
    numbers = random.getstate()
    with torch.random.fork_rng():
        yield tmp_path / "state.pt"
    random.setstate(numbers)


def test_each_field_of_the_progress_of_a_state(state, monkeypatch):
    content = load_tensors(state)
    parts = parts_of(torch.nn.Linear(3, 2))

    def read(progress) -> None:
        monkeypatch.setattr(saving, "load_tensors", lambda _: {**content, "progress": progress})
        assert load_state(state, parts, CPU) == Progress(**progress)

    assert content["progress"] == PROGRESS
    refuse_each_wrong_value(
        "fields of state.pt", PROGRESS, read, names=["--resume", str(state), "delete it"]
    )


def test_a_state_puts_everything_back(state):
    """Types too, of which the bytes of CSV files are made."""
    parts = parts_of(torch.nn.Linear(3, 2))
    progress = load_state(state, parts, CPU)
    assert repr(progress.model_dump()) == repr(PROGRESS)
    save_state(state.with_name("again.pt"), parts, progress, CPU)
    assert kills.same(load_tensors(state.with_name("again.pt")), load_tensors(state))


OTHERS = {
    "of another size": parts_of(torch.nn.Linear(4, 2)),
    "with other names": parts_of(torch.nn.Sequential(torch.nn.Linear(3, 2))),
    "with fewer weights that learn": {
        **parts_of(torch.nn.Linear(3, 2)),
        "optimizer": torch.optim.Adam([torch.nn.Parameter(torch.ones(2, 3))]),
    },
    "with a loss that learns": {**parts_of(torch.nn.Linear(3, 2)), "loss": torch.nn.Linear(1, 1)},
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_state_of_another_training_is_refused(other, state):
    refused(
        lambda: load_state(state, OTHERS[other], CPU), "--resume", f"{state} cannot be", "delete it"
    )


@pytest.mark.parametrize("missing", ["parts", "random", "progress"])
def test_a_state_without_a_part_is_refused(missing, state):
    content = load_tensors(state)
    del content[missing]
    torch.save(content, state)
    parts = parts_of(torch.nn.Linear(3, 2))
    refused(lambda: load_state(state, parts, CPU), f"{missing}' is missing", "delete it")


@pytest.mark.parametrize(
    "progress", [{"epoch": 10}, {"losses": [0.5] * 4}, {"best": {"another": 1.0}}]
)
def test_a_state_of_a_longer_or_another_training_is_refused(progress, tmp_path):
    """As the trainer knows it."""
    model = torch.nn.Linear(3, 2)
    task = Task(
        batches=lambda epoch, first: [],
        steps=3,
        model=model,
        module=model,
        loss=ContrastiveLoss(),
        optimizer=torch.optim.SGD(model.parameters()),
        validate=lambda measured: {},
    )
    trainer = trainer_in(tmp_path, task, stage_1_flags("--num-epochs", 9), best={"recall": "best"})
    save_state(tmp_path / "state.pt", trainer.stepper.parts, Progress(**progress), CPU)
    refused(trainer.resume, "--resume", "state.pt", "delete it")
