"""Every bad input: exit code 2, one line that names the file or flag and the remedy, nothing half-written."""

import itertools
import json
import os
import pickle
import signal
from pathlib import Path

import pytest
import torch
from torch.optim import AdamW

import data_utils
from conftest import DOORS, STAGE_1, STAGE_2

SRC = Path(__file__).parent.parent / "src"
FIQ, CIRR = ["--dataset", "FashionIQ"], ["--dataset", "CIRR"]
SUM = ["--combining-function", "sum"]


@pytest.fixture
def name(drawn):
    return ["--clip-model-name", drawn / "tiny_clip_vit.pt"]


@pytest.fixture
def train(name):
    """Flags of a short stage 2 without a cache."""
    return [*name, *STAGE_2.split(), "--no-feature-cache"]


def load(file: Path):
    """The content of an annotation file: JSON, or a list of its lines."""
    if file.suffix == ".json":
        return json.loads(file.read_text())
    lines = file.read_text().splitlines()
    return lines if file.suffix == ".txt" else list(map(json.loads, lines))


def dump(file: Path, content) -> None:
    """Write what `load` reads."""
    if file.suffix == ".json":
        file.write_text(json.dumps(content))
    else:
        lines = content if file.suffix == ".txt" else map(json.dumps, content)
        file.write_text("\n".join(lines))


def change_json(file: Path, change) -> Path:
    content = load(file)
    change(content)
    dump(file, content)
    return file


# Annotation and split files


@pytest.mark.parametrize(
    "file",
    [
        "fashionIQ_dataset/captions/cap.toptee.val.json",
        "fashionIQ_dataset/image_splits/split.dress.train.json",
        "cirr_dataset/cirr/captions/cap.rc2.train.json",
        "cirr_dataset/cirr/image_splits/split.rc2.val.json",
    ],
)
@pytest.mark.parametrize("damage", ["missing", "truncated", "other", "binary"])
def test_annotation_files(file, damage, own_drawn, train, fails):
    path = own_drawn / file
    text = path.read_text()
    path.unlink()
    if damage == "truncated":
        path.write_text(text[:100])
    if damage == "other":
        path.write_text("3")
    if damage == "binary":
        path.write_bytes(b"\xff\xfe\x00")
    dataset = FIQ if "fashionIQ" in file else CIRR
    assert str(path) in fails("combiner_train", own_drawn, *dataset, *train)


def test_a_missing_data_root(tmp_path, train, fails):
    for dataset in (FIQ, CIRR):
        error = fails("combiner_train", tmp_path / "nowhere", *dataset, *train)
        assert str(tmp_path / "nowhere") in error
        assert "--data-root" in error
    assert "--data-root" in fails(
        "cirr_test_submission", tmp_path / "nowhere", "--submission-name", "x", *SUM
    )


@pytest.mark.parametrize("key", ["candidate", "target", "captions"])
def test_a_missing_key_of_fashioniq(key, own_drawn, train, fails):
    file = own_drawn / "fashionIQ_dataset/captions/cap.shirt.train.json"
    change_json(file, lambda entries: entries[2].pop(key))
    error = fails("combiner_train", own_drawn, *FIQ, *train)
    assert str(file) in error
    assert f"entry 2: {key}: field required" in error


@pytest.mark.parametrize("key", ["reference", "target_hard", "caption", "pairid", "img_set"])
def test_a_missing_key_of_cirr(key, own_drawn, name, fails):
    file = own_drawn / "cirr_dataset/cirr/captions/cap.rc2.val.json"
    change_json(file, lambda entries: entries[5].pop(key))
    error = fails("validate", own_drawn, *CIRR, *SUM, *name)
    assert str(file) in error
    assert f"entry 5: {key}: field required" in error


@pytest.mark.parametrize(
    "change",
    [
        lambda entries: entries[0].update(captions=["one"]),
        lambda entries: entries[0].update(captions=[1, 2]),
        lambda entries: entries[0].update(target=3),
        lambda entries: entries[0].update(candidate="unknown"),
        lambda entries: entries.clear(),
        lambda entries: entries.insert(0, "text"),
    ],
)
def test_malformed_entries_of_fashioniq(change, own_drawn, name, fails):
    file = change_json(own_drawn / "fashionIQ_dataset/captions/cap.dress.val.json", change)
    assert str(file) in fails("validate", own_drawn, *FIQ, *SUM, *name)


@pytest.mark.parametrize(
    "change",
    [
        lambda entries: entries[0]["img_set"].update(members=["a"] * 6),
        lambda entries: entries[0]["img_set"].update(members=[]),
        lambda entries: entries[0]["img_set"].update(members=[[], {}, 1, 2, 3, 4]),
        lambda entries: entries[0].update(target_hard="unknown"),
        lambda entries: entries[0].update(pairid="one"),
        lambda entries: entries[0].update(target_hard=entries[0]["reference"]),
    ],
)
def test_malformed_entries_of_cirr(change, own_drawn, name, fails):
    file = change_json(own_drawn / "cirr_dataset/cirr/captions/cap.rc2.val.json", change)
    assert str(file) in fails("validate", own_drawn, *CIRR, *SUM, *name)


def test_an_id_without_a_path(own_drawn, name, fails):
    file = own_drawn / "cirr_dataset/cirr/image_splits/split.rc2.val.json"
    lost = []
    change_json(file, lambda paths: lost.append(paths.popitem()[0]))
    error = fails("validate", own_drawn, *CIRR, *SUM, *name)
    assert lost[0] in error
    assert str(file) in error


def test_a_repeated_id(own_drawn, name, fails):
    file = own_drawn / "fashionIQ_dataset/image_splits/split.dress.val.json"
    change_json(file, lambda names: names.append(names[0]))
    assert str(file) in fails("validate", own_drawn, *FIQ, *SUM, *name)


# Images


DAMAGES = ("missing", "empty", "truncated", "text")
# Each damage in each split, decoded here, and two that another process decodes.
IMAGES = [
    *itertools.product(["train", "val"], DAMAGES, [0]),
    ("train", "truncated", 2),
    ("val", "text", 2),
]


@pytest.mark.slow
@pytest.mark.parametrize(("split", "damage", "workers"), IMAGES)
def test_images(split, damage, workers, own_drawn, train, fails, tmp_path):
    folder = own_drawn / "cirr_dataset" / {"train": "train/0", "val": "dev"}[split]
    used = {"train": "train-0-0-img0.png", "val": "dev-0-0-img3.png"}[split]
    path = folder / used
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "truncated": content[:-40], "text": b"404"}[damage])
    assert used in fails("combiner_train", own_drawn, *CIRR, *train, "--num-workers", workers)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.csv"))


def test_a_process_that_dies_while_it_decodes(golden, name, fails, monkeypatch):
    real = data_utils.load_image

    def killed(path, **how):
        if torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, **how)

    monkeypatch.setattr("models.encoder.load_image", killed)
    error = fails("validate", golden, *CIRR, *SUM, *name, "--num-workers", 1)
    assert "--shm-size" in error
    assert "--num-workers 0" in error


def test_images_are_checked_before_stage_1_trains(own_drawn, name, fails, tmp_path):
    (own_drawn / "cirr_dataset/dev/dev-1-0-img2.png").unlink()
    error = fails("clip_fine_tune", own_drawn, *CIRR, *name, *STAGE_1.split())
    assert "dev-1-0-img2.png" in error
    assert "1 of " in error
    assert not (tmp_path / "out").exists()


# Checkpoints


class Evil:
    """Leaves a file where it is unpickled with code allowed."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def checkpoints(tmp_path, golden) -> dict[str, Path]:
    """Files that are no good as a checkpoint, by what is wrong with them."""
    good = (golden / "combiner_moe_cirr.pt").read_bytes()
    content = torch.load(golden / "combiner_moe_cirr.pt")
    files = {
        what: tmp_path / f"{what}.pt"
        for what in ("truncated", "empty", "text", "list", "evil", "other", "torn")
    }
    files["truncated"].write_bytes(good[: len(good) // 2])
    files["empty"].write_bytes(b"")
    files["text"].write_text("<html>not found</html>")
    torch.save([1, 2], files["list"])
    evil = Evil(tmp_path / "code_ran")
    torch.save({"CLIP": evil, "Combiner": evil}, files["evil"])
    torch.save({"weights": {}}, files["other"])
    torch.save(
        {"Combiner": {"output_layer.weight": content["Combiner"]["output_layer.weight"]}},
        files["torn"],
    )
    return files | {"missing": tmp_path / "missing.pt"}


@pytest.mark.parametrize(
    "what", ["missing", "truncated", "empty", "text", "list", "evil", "other", "torn"]
)
def test_combiner_checkpoints(what, checkpoints, golden, fails):
    flags = ["--clip-model-name", golden / "clip_vit.pt", "--combining-function", "combiner"]
    error = fails("validate", golden, *CIRR, *flags, "--combiner-path", checkpoints[what])
    assert str(checkpoints[what]) in error
    assert "--combiner-path" in error


@pytest.mark.parametrize("what", ["missing", "truncated", "empty", "text", "list", "evil", "other"])
def test_clip_checkpoints(what, checkpoints, golden, fails):
    name = ["--clip-model-name", golden / "clip_vit.pt"]
    for door, flags in (("validate", SUM), ("combiner_train", STAGE_2.split())):
        error = fails(door, golden, *CIRR, *name, *flags, "--clip-model-path", checkpoints[what])
        assert str(checkpoints[what]) in error
        assert "--clip-model-path" in error


@pytest.mark.parametrize("what", ["truncated", "empty", "text", "list", "evil", "other"])
def test_clip_models(what, checkpoints, golden, fails):
    error = fails("validate", golden, *CIRR, *SUM, "--clip-model-name", checkpoints[what])
    assert str(checkpoints[what]) in error


def test_code_in_a_pickle_never_runs(checkpoints, golden, fails, tmp_path):
    with pytest.raises(pickle.UnpicklingError):
        torch.load(checkpoints["evil"], weights_only=True)
    flags = ["--clip-model-name", golden / "clip_vit.pt", *SUM]
    assert "could run code" in fails(
        "validate", golden, *CIRR, *flags, "--clip-model-path", checkpoints["evil"]
    )
    assert not (tmp_path / "code_ran").exists()
    torch.load(checkpoints["evil"], weights_only=False)
    assert (tmp_path / "code_ran").exists()  # the trap was armed


def test_checkpoints_of_the_wrong_kind(golden, fails):
    name = ["--clip-model-name", golden / "clip_vit.pt"]
    tuned, combiner = golden / "tuned_clip_vit.pt", golden / "combiner_moe_cirr.pt"
    error = fails("validate", golden, *CIRR, *name, *SUM, "--clip-model-path", combiner)
    assert "contains stage-2 weights, not stage-1 weights" in error
    flags = ["--combining-function", "combiner", "--combiner-path", tuned]
    assert "contains stage-1 weights, not stage-2 weights" in fails(
        "validate", golden, *CIRR, *name, *flags
    )
    assert "--clip-model-path" in fails("validate", golden, *CIRR, *SUM, "--clip-model-name", tuned)


@pytest.mark.parametrize(
    ("flag", "value", "has"),
    [
        ("--projection-dim", 2560, 64),
        ("--hidden-dim", 5120, 128),
        ("--num-experts", 8, 4),
        ("--top-k", 1, 2),
        ("--combiner-type", "clip4cir", "moe"),
    ],
)
def test_flags_that_disagree_with_the_checkpoint(flag, value, has, golden, fails, tmp_path):
    """Its k is in its settings alone; the original's has none, and takes the flag's."""
    content = torch.load(golden / "combiner_moe_cirr.pt")
    config = {"flags": {"top_k": 2}, "recipe": {}, "data": {}, "versions": {}}
    torch.save({**content, "config": config}, tmp_path / "moe.pt")
    pair = ["--combining-function", "combiner", "--combiner-path", tmp_path / "moe.pt"]
    name = ["--clip-model-name", golden / "clip_vit.pt"]
    for door, flags in (("validate", CIRR), ("cirr_test_submission", ["--submission-name", "x"])):
        error = fails(door, golden, *flags, *pair, *name, flag, value)
        assert f"{flag} {value}" in error
        assert f"differs from the value {has}" in error


def test_fine_tuned_weights_of_another_architecture(golden, fails):
    name = ["--clip-model-name", golden / "clip_rn.pt"]
    tuned = ["--clip-model-path", golden / "tuned_clip_vit.pt"]
    error = fails("validate", golden, *CIRR, *SUM, *name, *tuned)
    assert "ViT of width 64, 16 patches, embedding 64" in error
    assert "ResNet of width 8, 4 patches, embedding 64" in error


def test_a_combiner_for_another_feature_length(golden, fails, tmp_path):
    from combiner import Combiner

    torch.save({"epoch": 0, "Combiner": Combiner(32, 8, 8).state_dict()}, tmp_path / "other.pt")
    flags = ["--combining-function", "combiner", "--combiner-path", tmp_path / "other.pt"]
    error = fails("validate", golden, *CIRR, "--clip-model-name", golden / "clip_vit.pt", *flags)
    assert "dimension 32" in error
    assert "gives 64" in error


def test_a_folder_with_several_checkpoints(golden, tmp_path, fails):
    for stem in ("a", "b"):
        (tmp_path / "saved_models").mkdir(exist_ok=True)
        (tmp_path / "saved_models" / f"{stem}.pt").write_bytes(b"x")
    error = fails("validate", golden, *CIRR, *SUM, "--clip-model-path", tmp_path)
    assert "a.pt, b.pt" in error


def test_a_combiner_without_its_path(golden, fails):
    for door, flags in (("validate", CIRR), ("cirr_test_submission", ["--submission-name", "x"])):
        assert "--combiner-path" in fails(door, golden, *flags, "--combining-function", "combiner")


# Flags


@pytest.mark.parametrize(
    "flags",
    [
        ["--dataset", "COCO"],
        ["--transform", "squarpad"],
        ["--combiner-type", "mlp"],
        ["--batch-size", "0"],
        ["--num-epochs", "-1"],
        ["--combiner-lr", "nan"],
        ["--seed", "-1"],
        ["--device", "abacus"],
        ["--device", "cuda:77"],
        ["--device", "meta"],
        ["--clip-model-path", "."],
        ["--api-key", "x"],
        ["--clip-model-name", "RN51"],
        ["--projection-dim", "18"],
        ["--top-k", "9"],
        ["--seeds", "1", "2", "1"],
        ["--checkpoint-every-minutes", "0"],
        ["--exclusions", "nowhere.json"],
        ["--resume", "nowhere"],
    ],
    ids=" ".join,
)
def test_flags(flags, drawn, train, fails):
    error = fails("combiner_train", drawn, *CIRR, *train, *flags)
    assert flags[0] in error


@pytest.mark.parametrize("blank", [" ", "\t "])
def test_a_blank_behind_a_backslash(blank, drawn, fails):
    """As of `\\ ` at the end of a line that is copied: the shell passes the blank as a word."""
    error = fails("validate", drawn, *CIRR, blank, *SUM)
    assert "unrecognized arguments" in error
    assert "whitespace after the \\" in error


@pytest.mark.parametrize("door", ["clip_fine_tune", "combiner_train"])
def test_a_batch_larger_than_the_training_set(door, drawn, name, fails):
    error = fails(door, drawn, *CIRR, *name, "--batch-size", 41)
    assert "--batch-size 41" in error
    assert "40 triplets" in error


@pytest.mark.parametrize("door", ["clip_fine_tune", "combiner_train"])
def test_a_batch_of_one_teaches_nothing(door, drawn, name, fails):
    error = fails(door, drawn, *CIRR, *name, "--batch-size", 1)
    assert "--batch-size 1: no query has a negative in its batch" in error


@pytest.mark.parametrize(
    "sizes",
    [
        ["--hidden-dim", 100_000, "--projection-dim", 100_000],
        ["--num-experts", 4096, "--hidden-dim", 100_000],
        ["--combiner-type", "clip4cir", "--hidden-dim", 100_000, "--projection-dim", 100_000],
    ],
)
def test_a_combiner_that_no_memory_holds_is_refused_before_it_takes_any(sizes, drawn, name, fails):
    flags = [*name, "--no-feature-cache", "--num-epochs", 1, "--batch-size", 12, *sizes]
    error = fails("combiner_train", drawn, *CIRR, *flags)
    assert "--hidden-dim" in error
    assert "GiB" in error


def test_submission_names_stay_in_their_folder(drawn, name, fails):
    assert "--submission-name" in fails(
        "cirr_test_submission", drawn, "--submission-name", "../x", *SUM, *name
    )


# Output


@pytest.mark.parametrize("door", ["clip_fine_tune", "combiner_train", "cirr_test_submission"])
def test_an_output_folder_that_cannot_be_written_to(door, tmp_path, drawn):
    (tmp_path / "file").write_text("")
    flags = {"cirr_test_submission": ["--submission-name", "x", *SUM]}.get(door, CIRR)
    with pytest.raises(SystemExit) as stop:
        DOORS[door](
            [*flags, "--data-root", str(drawn), "--output-dir", str(tmp_path / "file" / "below")]
        )
    assert stop.value.code == 2


def test_metrics_cannot_be_written_below_a_file(tmp_path, golden, fails, name):
    (tmp_path / "file").write_text("")
    assert "--metrics-json" in fails(
        "validate", golden, *CIRR, *SUM, *name, "--metrics-json", tmp_path / "file" / "m"
    )


@pytest.mark.slow
def test_a_full_disk_leaves_the_earlier_checkpoint_whole(tmp_path, tmp_path_factory, start):
    """With the kernel refusing files above a size, as a full disk refuses them."""
    code = """
import resource, sys, torch
from pathlib import Path
from runtime.tensors import save_tensors
from utils import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_tensors(Path(sys.argv[1]), {"CLIP": {"weight": torch.ones(200_000)}})
except UserError as error:
    sys.exit(f"refused: {error}")
"""
    path = tmp_path / "combiner.pt"
    torch.save({"weight": torch.zeros(3)}, path)
    script = tmp_path_factory.mktemp("script") / "saves.py"
    script.write_text(code)
    done = start(script, path)
    done.wait()
    assert done.stderr.startswith(f"refused: could not write {path}")
    assert "free disk space" in done.stderr
    assert torch.equal(torch.load(path)["weight"], torch.zeros(3))
    assert [file.name for file in tmp_path.iterdir()] == ["combiner.pt"]


# Divergence and interruption


def test_a_loss_that_is_not_finite_stops_the_run(own_drawn, name, fails, monkeypatch):
    from training import stage1

    # Beyond the bounds of --learning-rate.
    beyond = lambda learned, lr, **how: AdamW(learned, lr=1e30, **how)  # noqa: E731
    monkeypatch.setattr(stage1, "AdamW", beyond)
    error = fails("clip_fine_tune", own_drawn, *CIRR, *name, *STAGE_1.split())
    assert "nan at epoch" in error
    assert "step" in error


def test_a_similarity_that_is_not_finite_stops_the_evaluation(golden, tmp_path, fails):
    content = torch.load(golden / "tuned_clip_vit.pt")
    content["CLIP"]["visual.proj"][0, 0] = float("nan")
    torch.save(content, tmp_path / "nan.pt")
    flags = ["--clip-model-name", golden / "clip_vit.pt", "--clip-model-path", tmp_path / "nan.pt"]
    assert "not finite" in fails("validate", golden, *CIRR, *SUM, *flags)


@pytest.mark.slow
def test_ctrl_c_leaves_whole_files(drawn, name, tmp_path, start):
    flags = [*CIRR, *name, *STAGE_2.split(), "--no-feature-cache", "--data-root", drawn]
    flags += ["--num-epochs", 100_000]
    process = start(SRC / "combiner_train.py", *flags, "--output-dir", tmp_path / "runs")
    process.wait_for(lambda: len(list(tmp_path.glob("runs/*/saved_models/combiner_*.pt"))) >= 3)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    stderr = process.stderr
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1] == "combiner_train.py: interrupted"
    (run,) = (tmp_path / "runs").iterdir()
    rows = (run / "validation_metrics.csv").read_text().splitlines()
    assert len({row.count(",") for row in rows}) == 1
    saved = list((run / "saved_models").glob("*"))
    assert len(saved) >= 3
    assert all(torch.load(file, weights_only=True)["Combiner"] for file in saved)
