"""Damaged files of every kind: never a traceback, never a silent drop. `make soak` tries many more of them.

A file either is refused with a UserError or is read in whole: as many entries as it has, weights to the last bit.
"""

import contextlib
import copy
import csv
import io
import json
import shutil
from pathlib import Path, PurePosixPath

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import check_submission
import compare
from benchmarks import BENCHMARKS, Triplets
from benchmarks.exclusions import read_exclusions
from benchmarks.image_check import inspect
from combiner import load_combiner
from conftest import CASES, SOAK
from data_utils import load_image, make_preprocess
from evaluation.comparison import Resampling, read_columns
from models.clip_model import load_clip
from models.configuration import read_checkpoint
from runtime.image_files import read_photo
from runtime.tensors import load_tensors
from test_triplets import as_table
from training.saving import Progress, load_state, save_state
from utils import UserError

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
QUIET = settings(
    max_examples=3000 if SOAK else 20,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)

FUZZED: set[str] = set()  # kinds of cases that this file counted
UNEDITED: list = []
UNDAMAGED = ("cut", [1.0], 0, b"")  # cut at the end

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=6,
)


@st.composite
def edits(draw):
    """A few steps into a JSON document, and what is done there."""
    steps = st.lists(st.integers(0, 10_000), min_size=1, max_size=4)
    how = st.sampled_from(["replace", "delete", "repeat"])
    return draw(st.lists(st.tuples(steps, how, json_values), min_size=1, max_size=3))


def edited(content, changes) -> str:
    """The text of a document after some edits, each at the place its steps lead to."""
    content = copy.deepcopy(content)
    for steps, how, value in changes:
        place = content
        for step in steps[:-1]:
            keys = keys_of(place)
            inner = place[keys[step % len(keys)]] if keys else None
            if not isinstance(inner, dict | list):
                break
            place = inner
        keys = keys_of(place)
        if not keys:
            continue
        key = keys[steps[-1] % len(keys)]
        if how == "delete":
            del place[key]
        elif how == "repeat" and isinstance(place, list):
            place.insert(key, place[key])
        elif (
            how == "repeat"
        ):  # an object cannot hold a key twice; that its keys have another order changes nothing
            place[key] = place.pop(key)
        else:
            place[key] = copy.deepcopy(value)
    return json.dumps(content)


def keys_of(place) -> list:
    return (
        list(place)
        if isinstance(place, dict)
        else list(range(len(place)))
        if isinstance(place, list)
        else []
    )


@st.composite
def damages(draw):
    """What happens to bytes: flipped bits, an end cut off, or a piece of noise."""
    kind = draw(st.sampled_from(["flip", "cut", "noise"]))
    where = draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=8))
    return kind, where, draw(st.integers(0, 7)), draw(st.binary(min_size=1, max_size=40))


def damaged(content: bytes, damage) -> bytes:
    kind, where, bit, noise = damage
    places = [int(part * len(content)) for part in where]
    if kind == "cut":
        return content[: places[0]]
    changed = bytearray(content)
    for place in places:
        if kind == "flip":
            changed[place] ^= 1 << bit
        else:
            changed[place : place + len(noise)] = noise
    return bytes(changed)


def changed(whole: bytes, change) -> bytes:
    """A JSON file after edits or damage."""
    return (
        edited(json.loads(whole), change).encode()
        if isinstance(change, list)
        else damaged(whole, change)
    )


@contextlib.contextmanager
def counted(kind: str):
    """Count a case as read or refused; anything but a UserError is what the test is about."""
    FUZZED.add(kind)
    try:
        yield
        CASES[kind, "read"] += 1
    except UserError as error:
        assert len(str(error).splitlines()) == 1
        CASES[kind, "refused"] += 1


ANNOTATIONS = [
    ("FashionIQ", "fashionIQ_dataset/captions/cap.dress.{}.json", ("train", "val", "test")),
    ("FashionIQ", "fashionIQ_dataset/image_splits/split.dress.{}.json", ("train", "val", "test")),
    ("CIRR", "cirr_dataset/cirr/captions/cap.rc2.{}.json", ("train", "val", "test1")),
    ("CIRR", "cirr_dataset/cirr/image_splits/split.rc2.{}.json", ("train", "val", "test1")),
    ("CIRCO", "circo_dataset/annotations/{}.json", ("val", "test", "val")),
    (
        "CIRCO",
        "circo_dataset/COCO2017_unlabeled/annotations/image_info_unlabeled2017.json",
        ("val", "test", "val"),
    ),
]
CAPTIONS = {"FashionIQ": "captions", "CIRR": "caption", "CIRCO": "relative_caption"}


def read_annotations(dataset: str, root: Path, split: str, text: str) -> None:
    """What a benchmark reads must be all that its files hold."""
    benchmark = BENCHMARKS[dataset](root)
    part = benchmark.read_part(benchmark.parts[0], split)
    captions, images = (
        json.loads(f.read_text()) for f in benchmark.files(benchmark.parts[0], split)
    )
    assert len(part.triplets) == len(captions)
    if dataset == "CIRCO":
        images = [str(image["id"]) for image in images["images"]]
    assert part.names == list(images)
    for triplet, entry in zip(part.triplets, captions, strict=True):
        references = [entry.get(key) for key in ("candidate", "reference", "reference_img_id")]
        assert triplet.reference in map(str, references)
        said = entry[CAPTIONS[dataset]]
        said = said if dataset == "FashionIQ" else [said]
        assert list(triplet.captions[: len(said)]) == said
        if "gt_img_ids" in entry:
            assert sorted(map(int, triplet.targets)) == sorted(entry["gt_img_ids"])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    import shapes_dataset

    folder = tmp_path_factory.mktemp("fuzzed")
    sizes = "--train-triplets 3 --val-triplets 2 --train-groups 1 --val-groups 1 --circo-queries 9 "
    sizes += "--own-groups 1"
    shapes_dataset.main(["--output-dir", str(folder), *sizes.split()])
    return folder


def read_triplets(root: Path, split: str) -> None:
    """What is read of your own triplets must be all that their file holds."""
    part = Triplets(root).read_part("all", split)
    queries, _ = Triplets(root).files("all", split)
    rows = queries.read_text(encoding="utf-8-sig").split("\n")
    if queries.suffix == ".csv":
        # Lines without any cell are no rows, and blanks are no content, as in lines.
        _, *table = filter(None, csv.reader(io.StringIO("\n".join(rows))))
        rows = [list(map(str.strip, cells)) for cells in table]
    else:
        rows = [json.loads(row) for row in rows if row.strip()]
        assert [triplet.reference for triplet in part.triplets] == [
            str(PurePosixPath(entry["reference"].strip())) for entry in rows
        ]
    assert len(part.triplets) == sum(map(any, rows))


OWN = [("jsonl", "{}.jsonl"), ("jsonl", "gallery.{}.txt"), ("csv", "{}.csv")]


@pytest.mark.parametrize(("form", "name"), OWN)
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_files_of_your_own_triplets(form, name, split, root, tmp_path):
    shutil.copytree(root / "triplets_dataset", tmp_path / "triplets_dataset")
    lines = tmp_path / "triplets_dataset" / f"{split}.jsonl"
    entries = list(map(json.loads, lines.read_text().splitlines()))
    if form == "csv":
        lines.unlink()
        lines.with_suffix(".csv").write_text(as_table(entries, ","))
    file = tmp_path / "triplets_dataset" / name.format(split)
    whole = file.read_bytes()

    @QUIET
    @example(UNEDITED)
    @given(edits() | damages() if name == "{}.jsonl" else damages())
    def fuzz(change):
        if not isinstance(change, list):
            content = damaged(whole, change)
        elif name == "{}.jsonl":
            content = "\n".join(map(json.dumps, json.loads(edited(entries, change)))).encode()
        else:
            content = whole
        file.write_bytes(content)
        with counted("files of your own triplets"):
            read_triplets(tmp_path, split)

    fuzz()


@pytest.mark.parametrize(("dataset", "name", "splits"), ANNOTATIONS)
@pytest.mark.parametrize("number", range(3))
def test_annotation_files(dataset, name, splits, number, root):
    split = splits[number]
    file = root / name.format(split)
    whole = file.read_bytes()

    @QUIET
    @example(UNEDITED)
    @given(edits() | damages())
    def fuzz(change):
        content = changed(whole, change)
        file.write_bytes(content)
        with counted("annotation files"):
            read_annotations(dataset, root, split, content)

    try:
        fuzz()
    finally:
        file.write_bytes(whole)


def sum_in(root: Path) -> list[str]:
    """Flags of the sum of a tiny CLIP's features, on a data root."""
    clip = f"--clip-model-name {root}/tiny_clip_vit.pt --combining-function sum"
    return f"--data-root {root} {clip} --device cpu --num-workers 0".split()


@pytest.fixture(scope="module")
def submissions(root, tmp_path_factory):
    """Files that keep all rules."""
    import circo_test_submission
    import cirr_test_submission
    import fashioniq_test_submission

    folder = tmp_path_factory.mktemp("submissions")
    flags = [*sum_in(root), "--submission-name", "x", "--output-dir", str(folder)]
    for door in (cirr_test_submission, fashioniq_test_submission, circo_test_submission):
        door.main(flags)
    return sorted(folder.rglob("*.json"))


@pytest.mark.parametrize("number", range(6))
def test_submission_files(number, root, submissions, tmp_path):
    """Exit code 0 only for what answers every query with known, distinct ids; else 1 or 2 and no traceback."""
    whole = submissions[number].read_bytes()
    file = tmp_path / submissions[number].name

    @QUIET
    @example(UNEDITED)
    @given(edits() | damages())
    def fuzz(change):
        file.write_bytes(changed(whole, change))
        out, err = io.StringIO(), io.StringIO()
        code = 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                check_submission.main(["--data-root", str(root), str(file)])
            except SystemExit as stop:
                code = stop.code
        CASES["submission files", {0: "read", 1: "with violations", 2: "refused"}[code]] += 1
        if code == 0:
            assert answers_of(json.loads(file.read_text())) == answers_of(json.loads(whole))
        if code == 2:
            assert err.getvalue().count("error: ") == 1

    fuzz()


def answers_of(content) -> dict:
    """Query -> how many distinct ids answer it."""
    if isinstance(content, list):
        return {place: len(set(entry["ranking"])) for place, entry in enumerate(content)}
    return {key: len(set(ids)) if isinstance(ids, list) else ids for key, ids in content.items()}


def equal(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return one == other


@pytest.mark.parametrize(
    "name", ["combiner_moe_cirr.pt", "combiner_clip4cir.pt", "tuned_clip_vit.pt", "clip_vit.pt"]
)
def test_checkpoints(name, golden, tmp_path):
    """What loads has every weight to the last bit; zip archives have room for flips that change nothing."""
    whole = (golden / name).read_bytes()
    content = load_tensors(golden / name)
    file = tmp_path / "checkpoint.pt"
    key = next((key for key in ("CLIP", "Combiner") if key in content), None)

    @settings(QUIET, max_examples=QUIET.max_examples // (1 if key == "Combiner" else 4))
    @example(UNDAMAGED)
    @example(("noise", [0.9955046616733106], 0, b"@"))  # the version that a ZIP file asks for
    @given(damages())
    def fuzz(damage):
        file.write_bytes(damaged(whole, damage))
        with counted("checkpoints"):
            if key is None:
                load_clip(str(file), CPU)
            else:
                found = read_checkpoint("--path", file, key)
                if key == "Combiner":
                    load_combiner(found.state, found.table, file, wanted={}, clip_dim=64)
            assert equal(load_tensors(file), content)

    fuzz()


def test_states_of_runs(tmp_path):
    """A state is put back in whole or not at all."""
    module = torch.nn.Linear(3, 2)
    progress = Progress(epoch=3, losses=[0.1])
    save_state(tmp_path / "state.pt", {"module": module}, progress, CPU)
    whole = (tmp_path / "state.pt").read_bytes()
    weight = module.weight.detach().clone()

    @QUIET
    @example(UNDAMAGED)
    @given(damages())
    def fuzz(damage):
        (tmp_path / "state.pt").write_bytes(damaged(whole, damage))
        torch.nn.init.zeros_(module.weight)
        with counted("states of runs"):
            assert load_state(tmp_path / "state.pt", {"module": module}, CPU) == progress
            assert torch.equal(module.weight, weight)

    with torch.random.fork_rng():
        fuzz()


KINDS = ["JPEG RGB", "PNG RGBA", "PNG P", "GIF P", "WEBP RGB", "BMP L", "TIFF RGB"]


@pytest.fixture(scope="module")
def pictures():
    """A file of each kind."""
    picture = Image.effect_noise((40, 30), 60).convert("RGB")
    files = {}
    for name in KINDS:
        buffer, (kind, mode) = io.BytesIO(), name.split()
        picture.convert(mode).save(buffer, kind)
        files[name] = buffer.getvalue()
    return files


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_image_files(kind, pictures, tmp_path):
    """The check of a dataset says of a file what training would: it is decoded, or it is named."""
    preprocess = make_preprocess("targetpad", 1.25, 16)
    path = tmp_path / "image.jpg"

    @QUIET
    @example(UNDAMAGED)
    @example(("flip", [0.03125], 0, b""))  # the name of a PNG's palette
    @given(damages())
    def fuzz(damage):
        path.write_bytes(damaged(pictures[kind], damage))
        found = inspect(path)
        with counted("image files"):
            try:
                load_image(path, preprocess)
            except UserError as error:
                assert found.problem, f"training refuses what the check calls whole: {error}"
                raise
            assert not found.problem, f"the check calls {found.problem} what training reads"
            load_image(path, preprocess, read_photo)

    fuzz()


def test_results_and_exclusions(root, tmp_path):
    import validate

    file = tmp_path / "r.json"
    validate.main([*sum_in(root), "--dataset", "FashionIQ", "--metrics-json", str(file)])
    whole, base = json.loads(file.read_text()), tmp_path / "base.json"
    file.rename(base)
    resampling = Resampling(resamples=5, confidence=0.9, seed=0)
    exclusions = {"dataset": "CIRR", "images": {"a": "missing", "b": "empty"}}

    @QUIET
    @example(UNEDITED)
    @given(edits())
    def fuzz(changes):
        file.write_text(edited(whole, changes))
        with counted("results"), contextlib.redirect_stdout(io.StringIO()):
            columns = read_columns([base, file])
            for protocol in compare.shared_protocols(columns, None):
                compare.print_protocol(
                    BENCHMARKS["FashionIQ"](root), columns, protocol, resampling=resampling
                )
        file.write_text(edited(exclusions, changes))
        with counted("exclusions"):
            assert read_exclusions(file, "CIRR") == json.loads(file.read_text())["images"]

    fuzz()


def test_the_fuzzing_reaches_both_outcomes():
    """Guards against edits that never damage, or always."""
    assert [kind for kind in FUZZED if min(CASES[kind, "read"], CASES[kind, "refused"]) == 0] == []
    if "annotation files" in FUZZED:
        assert min(CASES["annotation files", "read"], CASES["annotation files", "refused"]) > 20
