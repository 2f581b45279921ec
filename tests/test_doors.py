"""The four scripts from end to end on both drawn layouts: files, determinism, configurations, checkpoints."""

import json
import re

import pytest
import torch

import cirr_test_submission
import clip_fine_tune
import combiner_train
import validate
from cli import training
from conftest import read_csv
from data_utils import ImageDataset
from kills import same
from models.clip_model import load_clip
from runtime.files import find_checkpoint
from runtime.tensors import load_tensors
from trainers import stage_1_flags
from twins import DefinedCombiner

pytestmark = pytest.mark.slow

FIQ_METRICS = [f"{c}_recall_at{k}" for c in ("dress", "toptee", "shirt") for k in (10, 50)]
FIQ_METRICS += ["average_recall_at10", "average_recall_at50", "average_recall"]
CIRR_METRICS = [f"group_recall_at{k}" for k in (1, 2, 3)] + [
    f"recall_at{k}" for k in (1, 5, 10, 50)
]
CIRR_METRICS += ["mean(R@5+R_s@1)", "arithmetic_mean", "harmonic_mean", "geometric_mean"]
METRICS = {"FashionIQ": FIQ_METRICS, "CIRR": CIRR_METRICS}
BEST = {
    ("clip", "FashionIQ"): ["tuned_clip_best"],
    ("clip", "CIRR"): ["tuned_clip_arithmetic", "tuned_clip_geometric", "tuned_clip_harmonic"],
    ("combiner", "FashionIQ"): ["combiner"],
    ("combiner", "CIRR"): ["combiner_arithmetic", "combiner_geometric", "combiner_harmonic"],
}
GUIDE = {
    clip_fine_tune: "--dataset CIRR --num-epochs 100 --clip-model-name RN50x16 --encoder both --learning-rate 2e-6 "
    "--batch-size 128 --transform targetpad --target-ratio 1.25 --save-training --save-best --validation-frequency 1",
    combiner_train: "--dataset CIRR --projection-dim 2560 --hidden-dim 5120 --num-epochs 300 --clip-model-name RN50x16 "
    "--clip-model-path clip_finetuned --combiner-lr 2e-5 --batch-size 4096 --clip-bs 32 --transform targetpad "
    "--target-ratio 1.25 --save-training --save-best --validation-frequency 1",
    cirr_test_submission: "--submission-name my_submission --combining-function combiner --combiner-path "
    "models_final/combiner_trained_on_cirr --projection-dim 2560 --hidden-dim 5120 --clip-model-name RN50x16 "
    "--clip-model-path models_final/clip_finetuned_on_cirr --target-ratio 1.25 --transform targetpad",
    validate: "--dataset FashionIQ --combining-function combiner --projection-dim 2560 --hidden-dim 5120 "
    "--clip-model-name RN50x16 --target-ratio 1.25 --transform targetpad --combiner-path "
    "models_final/moe_combiner_trained_on_fiq --clip-model-path models_final/clip_finetuned_on_fiq",
}


def saved(folder) -> list[str]:
    return sorted(file.stem for file in (folder / "saved_models").glob("*"))


def by(combiner) -> list:
    """Flags that compose with a Combiner."""
    return ["--combining-function", "combiner", "--combiner-path", combiner]


@pytest.mark.parametrize("door", GUIDE, ids=lambda door: door.__name__)
def test_the_guides_commands_parse(door):
    args = door.parse(GUIDE[door].split())
    chosen = (args.clip_model_name, args.transform, args.target_ratio)
    assert chosen == ("RN50x16", "targetpad", 1.25)


def test_defaults_are_the_originals():
    stage_1 = vars(clip_fine_tune.parse(["--dataset", "cirr"]))
    assert stage_1.items() >= {
        "dataset": "CIRR", "num_epochs": 300, "batch_size": 512, "validation_frequency": 1, "learning_rate": 2e-6,
        "encoder": "both", "save_training": False, "save_best": False,
    }.items()  # fmt: skip
    stage_2 = vars(combiner_train.parse(["--dataset", "FASHIONIQ"]))
    assert stage_2.items() >= {
        "dataset": "FashionIQ", "batch_size": 1024, "validation_frequency": 3, "projection_dim": 2560,
        "hidden_dim": 5120, "combiner_lr": 2e-5, "clip_bs": 32, "combiner_type": "moe", "num_experts": 4, "top_k": 2,
        "seed": 0,
    }.items()  # fmt: skip


@pytest.mark.parametrize("dataset", ["FashionIQ", "CIRR"])
def test_both_stages_then_validation(
    dataset, stage_1, stage_2, run, drawn, tmp_path, capsys, caplog
):
    """The path of a user: train, train, validate; the last numbers are those that the training printed."""
    caplog.set_level("INFO")
    clip = stage_1(dataset, "--save-best", "--num-epochs", 1)
    short = {"FashionIQ": "fiq", "CIRR": "cirr"}[dataset]
    assert re.fullmatch(
        rf"clip_finetuned_on_{short}_tiny_clip_vit_\d{{4}}-\d\d-\d\d_\d\d-\d\d-\d\d", clip.name
    )
    assert saved(clip) == BEST["clip", dataset]
    assert list(read_csv(clip / "train_metrics.csv")) == ["epoch", "train_epoch_loss"]
    assert list(read_csv(clip / "validation_metrics.csv")) == ["epoch", *METRICS[dataset]]
    weights = clip / "saved_models" / BEST["clip", dataset][0]
    combiner = stage_2(dataset, "--save-best", "--clip-model-path", weights)
    assert combiner.name.startswith("combiner_trained_on_")
    assert saved(combiner) == BEST["combiner", dataset]
    trained = combiner / "saved_models" / f"{BEST['combiner', dataset][0]}.pt"
    flags = ["--dataset", dataset, "--clip-model-path", weights, *by(trained)]
    run("validate", drawn, *flags, "--metrics-json", tmp_path / "m.json")
    metrics = json.loads((tmp_path / "m.json").read_text())["metrics"]
    assert list(metrics) == METRICS[dataset]
    history = read_csv(combiner / "validation_metrics.csv")
    selected = "average_recall" if dataset == "FashionIQ" else "arithmetic_mean"
    best_epoch = history[selected].index(max(history[selected]))
    assert metrics == pytest.approx({name: history[name][best_epoch] for name in METRICS[dataset]})
    assert "run: " in caplog.text
    assert f"best {selected}" in caplog.text


@pytest.mark.parametrize("encoder", ["both", "text", "image"])
def test_only_the_chosen_encoder_learns(encoder, stage_1, drawn):
    folder = stage_1("CIRR", "--encoder", encoder, "--num-epochs", 1)
    assert saved(folder) == ["tuned_clip_0"]
    before = load_clip(str(drawn / "tiny_clip_vit.pt"), torch.device("cpu")).state_dict()
    after = torch.load(folder / "saved_models" / "tuned_clip_0.pt")["CLIP"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    visual = {name for name in changed if name.startswith("visual.")}
    assert bool(visual) == (encoder != "text")
    assert bool(changed - visual) == (encoder != "image")


def test_the_resnet_trains_with_the_transform_of_clip(stage_1, drawn):
    name = ["--clip-model-name", drawn / "tiny_clip_resnet.pt"]
    folder = stage_1("CIRR", "--transform", "clip", "--num-epochs", 1, *name)
    config = torch.load(folder / "saved_models" / "tuned_clip_0.pt")["config"]
    assert config["recipe"]["transform"] == "clip"


def test_one_seed_gives_the_same_files_byte_for_byte_whatever_the_workers(stage_1, stage_2):
    """Of CIRR that is seen where several seeds are trained in one command."""
    for stage, workers in ((stage_1, 2), (stage_2, 0)):
        once = ["FashionIQ", "--num-epochs", 1]
        first = stage(*once, output=f"{stage}1")
        second = stage(*once, "--num-workers", workers, output=f"{stage}2")
        for name in ("train_metrics.csv", "validation_metrics.csv"):
            assert (first / name).read_bytes() == (second / name).read_bytes()
        other = stage(*once, "--seed", 1, output=f"{stage}3")
        name = "train_metrics.csv"
        assert (first / name).read_bytes() != (other / name).read_bytes()


@pytest.mark.draws
def test_nothing_is_saved_without_save_training(run, drawn, tmp_path):
    flags = "--num-epochs 1 --batch-size 12 --projection-dim 16 --hidden-dim 24 --no-feature-cache"
    name = ["--clip-model-name", drawn / "tiny_clip_vit.pt"]
    (folder,) = run("combiner_train", drawn, "--dataset", "CIRR", *name, *flags.split()).iterdir()
    files = sorted(file.name for file in folder.iterdir())
    csv = [
        "router_metrics.csv",
        "train_metrics.csv",
        "training_hyperparameters.json",
        "validation_metrics.csv",
    ]
    assert files == ["best_metrics.json", "index.html", *csv[:2], "training_curves.png", *csv[2:]]


def test_validation_frequency(stage_2):
    folder = stage_2("CIRR", "--num-epochs", 5, "--validation-frequency", 2)
    assert read_csv(folder / "validation_metrics.csv")["epoch"] == [0, 2, 4]
    assert read_csv(folder / "train_metrics.csv")["epoch"] == [0, 1, 2, 3, 4]
    assert saved(folder) == ["combiner_0", "combiner_2", "combiner_4"]


@pytest.mark.parametrize("stage", ["stage_1", "stage_2"])
def test_the_last_epoch_is_validated_and_epochs_are_saved_if_asked_for(stage, request):
    """What is saved without a validation is what a validation of that epoch would save."""
    train = request.getfixturevalue(stage)
    key, prefix = {"stage_1": ("CLIP", "tuned_clip"), "stage_2": ("Combiner", "combiner")}[stage]
    few = train(
        *("CIRR", "--num-epochs", 4, "--validation-frequency", 2, "--validate-last"),
        *("--save-best", "--save-every", 2),
    )
    all_of_them = train("CIRR", "--num-epochs", 4, output="all")
    assert read_csv(few / "validation_metrics.csv")["epoch"] == [0, 2, 3]
    every = [f"{prefix}_{epoch}" for epoch in (1, 3)]
    best = [f"{prefix}_{mean}" for mean in ("arithmetic", "geometric", "harmonic")]
    assert saved(few) == sorted([*every, *best])
    for name in every:
        of_few, of_all = (
            load_tensors(run / "saved_models" / f"{name}.pt") for run in (few, all_of_them)
        )
        assert of_few["epoch"] == of_all["epoch"]
        assert same(of_few[key], of_all[key])
        assert of_few["metrics"] == (of_all["metrics"] if name.endswith("3") else {})


@pytest.mark.parametrize(
    ("flags", "lost"),
    [
        (["--num-epochs", 4, "--validation-frequency", 10], "epochs 1 to 3 will be"),
        (["--num-epochs", 4, "--validation-frequency", 2], "epoch 3 will be"),
        (["--num-epochs", 4, "--validation-frequency", 2, "--validate-last"], None),
        (["--num-epochs", 7, "--validation-frequency", 10, "--save-every", 3], "epoch 6 will be"),
        (["--num-epochs", 4, "--validation-frequency", 3], None),
    ],
)
def test_epochs_that_are_neither_validated_nor_saved_are_named(flags, lost, caplog):
    training.warn_of_lost_epochs(stage_1_flags(*flags))
    said = f"warning: {lost} neither validated nor saved: add --validate-last, or --save-every"
    assert caplog.messages == ([said] if lost else [])


def test_epochs_of_stage_2_open_no_image_and_run_no_clip(stage_2, monkeypatch):
    """Guards against the original's encoding of everything in every epoch."""
    opened = []
    real = ImageDataset.__getitem__
    monkeypatch.setattr(
        ImageDataset, "__getitem__", lambda self, row: opened.append(row) or real(self, row)
    )
    stage_2("FashionIQ", "--num-epochs", 1, output="short")
    assert opened
    once = len(opened)
    stage_2("FashionIQ", "--num-epochs", 4, "--no-feature-cache", output="long")
    assert len(opened) == 2 * once
    stage_2("FashionIQ", output="cached")
    assert len(opened) == 2 * once


def test_hyper_parameters_hold_no_secret(stage_2, monkeypatch):
    monkeypatch.setattr(training, "check_trackers", lambda *_: [])
    folder = stage_2("CIRR", "--api-key", "secret", "--workspace", "w")
    for file in folder.rglob("*"):
        assert file.is_dir() or b"secret" not in file.read_bytes()
    written = json.loads((folder / "training_hyperparameters.json").read_text())
    assert written["flags"]["projection_dim"] == 16


def test_checkpoints_carry_a_plain_configuration(stage_1, stage_2):
    clip = torch.load(
        stage_1("FashionIQ", "--save-best", "--num-epochs", 1)
        / "saved_models"
        / "tuned_clip_best.pt",
        weights_only=True,
    )
    assert set(clip) == {"epoch", "CLIP", "config", "metrics"}
    assert set(clip["config"]) == {"flags", "recipe", "data", "versions"}
    assert (
        clip["config"]["flags"].items()
        >= {"dataset": "FashionIQ", "seed": 0, "transform": None}.items()
    )
    preprocessing = {"transform": "targetpad", "target_ratio": 1.25, "resolution": 32}
    assert clip["config"]["recipe"].items() >= preprocessing.items()
    assert clip["config"]["data"]["train_dress_types"] == ["dress", "toptee", "shirt"]
    assert {"torch", "torchvision", "pillow"} <= set(clip["config"]["versions"])
    assert set(clip["metrics"]) == {"average_recall"}
    combiner = torch.load(stage_2("CIRR") / "saved_models" / "combiner_1.pt", weights_only=True)
    sizes = {
        "projection_dim": 16,
        "hidden_dim": 24,
        "num_experts": 4,
        "top_k": 2,
        "combiner_type": "moe",
    }
    assert combiner["config"]["flags"].items() >= sizes.items()
    assert combiner["config"]["recipe"]["clip_dim"] == 64


def test_our_checkpoints_load_in_a_model_with_the_originals_names(stage_2):
    content = torch.load(stage_2("CIRR") / "saved_models" / "combiner_1.pt", weights_only=True)
    loaded = DefinedCombiner(64, 16, 24).load_state_dict(content["Combiner"])
    assert loaded.missing_keys == loaded.unexpected_keys == []


def test_evaluation_follows_the_configuration_and_warns_of_contradictions(
    stage_1, run, drawn, caplog, tmp_path
):
    """Guards against weights trained with one preprocessing and measured, silently, with another."""
    clip = stage_1("CIRR", "--transform", "squarepad", "--num-epochs", 1)
    flags = ["--dataset", "CIRR", "--combining-function", "sum"]
    flags += ["--clip-model-path", clip / "saved_models/tuned_clip_0"]
    run("validate", drawn, *flags, "--metrics-json", tmp_path / "silent.json")
    assert "warning" not in caplog.text
    history = read_csv(clip / "validation_metrics.csv")
    silent = json.loads((tmp_path / "silent.json").read_text())["metrics"]
    assert silent == pytest.approx(
        {name: values[0] for name, values in history.items() if name != "epoch"}
    )
    run("validate", drawn, *flags, "--transform", "clip", "--metrics-json", tmp_path / "loud.json")
    assert "was trained with --transform squarepad, not clip" in caplog.text
    assert silent != json.loads((tmp_path / "loud.json").read_text())["metrics"]


def test_a_combiner_with_other_clip_weights_is_warned_of(stage_1, stage_2, run, drawn, caplog):
    """Guards against a Combiner measured, silently, on features that it was not trained on."""
    once = ["--num-epochs", 1]
    clip = stage_1("CIRR", *once) / "saved_models" / "tuned_clip_0.pt"
    weights = stage_2("CIRR", *once, "--clip-model-path", clip) / "saved_models" / "combiner_0.pt"
    flags = ["--dataset", "CIRR", *by(weights)]
    run("validate", drawn, *flags, "--clip-model-path", clip)
    assert "warning" not in caplog.text
    run("validate", drawn, *flags)
    assert f"other CLIP weights, from --clip-model-path {clip}" in caplog.text
    run("validate", drawn, *flags, "--combining-function", "sum", "--clip-model-path", clip)
    assert "sum does not use --combiner-path" in caplog.text


def test_k_is_read_from_the_configuration(stage_2, run, drawn, fails):
    folder = stage_2("CIRR", "--top-k", 1, "--num-experts", 3, "--num-epochs", 1)
    pair = ["--dataset", "CIRR", *by(folder / "saved_models/combiner_0")]
    run("validate", drawn, *pair, "--top-k", 1, "--num-experts", 3)
    assert "--top-k 2 differs" in fails("validate", drawn, *pair, "--top-k", 2)


@pytest.mark.parametrize("kind", ["moe", "clip4cir"])
def test_submission(kind, stage_2, run, drawn):
    weights = stage_2("CIRR", "--combiner-type", kind) / "saved_models" / "combiner_1.pt"
    flags = ["--submission-name", "mine", *by(weights)]
    folder = run("cirr_test_submission", drawn, *flags, output="submission")
    captions = json.loads((drawn / "cirr_dataset/cirr/captions/cap.rc2.test1.json").read_text())
    for stem, metric, length in (("recall", "recall", 17), ("recall_subset", "recall_subset", 3)):
        content = json.loads((folder / f"{stem}_submission_mine.json").read_text())
        assert (content.pop("version"), content.pop("metric")) == ("rc2", metric)
        assert set(content) == {str(entry["pairid"]) for entry in captions}
        for entry in captions:
            names = content[str(entry["pairid"])]
            assert len(set(names)) == len(names) == length
            assert entry["reference"] not in names
            assert metric == "recall" or set(names) < set(entry["img_set"]["members"])


def test_paths_stand_for_the_checkpoint_in_them(tmp_path):
    file = tmp_path / "saved_models" / "combiner.pt"
    file.parent.mkdir()
    file.touch()
    for path in (tmp_path, file.parent, file.with_suffix(""), file):
        assert find_checkpoint("--combiner-path", path) == file


def test_runs_started_in_one_second_have_folders_of_their_own(stage_2, run, drawn):
    flags = "--dataset CIRR --num-epochs 1 --batch-size 12 --projection-dim 16 --hidden-dim 24 --no-feature-cache"
    name = ["--clip-model-name", drawn / "tiny_clip_vit.pt"]
    for _ in range(3):
        folder = run("combiner_train", drawn, *flags.split(), *name)
    assert len(list(folder.iterdir())) == 3
