"""Trackers: what they are told, that none stops a training, and that a resumed run goes on in the same one."""

import json
import sys
import types
from pathlib import Path

import pytest

import combiner_train
from conftest import read_csv
from runtime import trackers
from runtime.trackers import Account, Tracker, Trackers, check_trackers
from trainers import run_in
from training.run_folder import Run
from utils import UserError

ROWS = [("train", {"train_epoch_loss": 1.5}), ("validation", {"recall": 40.0})]


def account(folder: Path, name: str = "a run") -> Account:
    folder.mkdir(exist_ok=True)
    (folder / "training_hyperparameters.json").write_text("{}")
    return Account(folder=folder, name=name, api_key="key", workspace="workspace")


def record(folder: Path, names: list[str], epochs: range) -> Run:
    """A run of some epochs, mirrored by trackers."""
    run = run_in(folder, Trackers(names, account(folder)))
    for epoch in epochs:
        for kind, metrics in ROWS:
            run.record(kind, epoch, metrics)
    run.trackers.finish()
    return run


class Recorded:
    """What packages of trackers give out, and what was asked of it; some of it fails."""

    def __init__(self, error: type[Exception], fails_in: str = "") -> None:
        self.calls: list[tuple] = []
        self.error = error
        self.fails_in = fails_in

    def __getattr__(self, method: str):
        def called(*values, **named):
            self.calls.append((method, values, named))
            if method == self.fails_in:
                raise self.error(f"{method} failed")
            return self

        return called


def stand_in(monkeypatch, name: str, fails_in: str = "") -> Recorded:
    """A package that records what is asked of it."""
    failure = type("Failure", (Exception,), {})
    recorded = Recorded(failure, fails_in)
    recorded.config = recorded
    if name == "comet":
        package, errors = "comet_ml", "comet_ml.exceptions"
        made = types.SimpleNamespace(start=recorded.start)
        monkeypatch.setitem(sys.modules, errors, types.SimpleNamespace(CometException=failure))
        made.exceptions = sys.modules[errors]
    else:
        package, errors = "wandb", "wandb.errors"
        made = types.SimpleNamespace(init=recorded.init)
        monkeypatch.setitem(sys.modules, errors, types.SimpleNamespace(Error=failure))
        made.errors = sys.modules[errors]
    monkeypatch.setitem(sys.modules, package, made)
    return recorded


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("comet", ["start", "set_name", "log_parameters", *["log_metrics"] * 4, "end"]),
        ("wandb", ["init", "define_metric", "update", *["log"] * 4, "finish"]),
    ],
)
def test_a_run_is_mirrored(name, asked, monkeypatch, tmp_path):
    recorded = stand_in(monkeypatch, name)
    record(tmp_path / "run", [name], range(2))
    assert [method for method, _, _ in recorded.calls] == asked
    begun = recorded.calls[0][2]
    if name == "comet":
        assert (begun["api_key"], begun["workspace"]) == ("key", "workspace")
        assert recorded.calls[-2][1:] == (({"recall": 40.0},), {"epoch": 1})
    else:
        assert recorded.calls[-2][1:] == (({"recall": 40.0, "epoch": 1},), {})
    # A resumed run, and a moved one, are the same to a tracker.
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").rename(tmp_path / "elsewhere" / "run")
    again = stand_in(monkeypatch, name)
    record(tmp_path / "elsewhere" / "run", [name], range(2, 3))
    key = "experiment_key" if name == "comet" else "id"
    assert again.calls[0][2][key] == begun[key]
    assert account(tmp_path / "other").key != begun[key]


@pytest.mark.parametrize(
    ("name", "fails_in"),
    [
        ("comet", "start"),
        ("comet", "set_name"),
        ("comet", "log_parameters"),
        ("comet", "log_metrics"),
        ("comet", "end"),
        ("wandb", "init"),
        ("wandb", "log"),
        ("wandb", "finish"),
    ],
)
def test_an_outage_never_stops_a_training(name, fails_in, monkeypatch, tmp_path, caplog):
    other = stand_in(monkeypatch, "wandb" if name == "comet" else "comet")
    stand_in(monkeypatch, name, fails_in)
    names = ["comet", "wandb", "tensorboard"]
    record(tmp_path / "run", names, range(3))
    assert caplog.text.count(f"--tracker {name}: {fails_in} failed: continuing without it") == 1
    assert len(read_csv(tmp_path / "run" / "validation_metrics.csv")["epoch"]) == 3
    assert len([method for method, _, _ in other.calls if method.startswith("log")]) >= 6


def test_tensorboard_goes_on_in_the_same_run(tmp_path):
    pytest.importorskip("tensorboard", reason="pip install -r requirements-trackers.txt")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record(tmp_path / "run", ["tensorboard"], range(4))
    record(tmp_path / "run", ["tensorboard"], range(2, 5))  # as after a state of epoch 2
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["recall", "train_epoch_loss"]
    recorded = [(event.step, event.value) for event in events.Scalars("train_epoch_loss")]
    assert recorded == [(epoch, 1.5) for epoch in range(5)]


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="pip install -r requirements-trackers.txt")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for epochs in (range(2), range(2, 3)):
        record(tmp_path / "run", ["wandb"], epochs)
    key = account(tmp_path / "run").key
    assert len(list((tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{key}.wandb"))) == 2


def test_comet_offline(tmp_path, monkeypatch):
    pytest.importorskip("comet_ml", reason="pip install -r requirements-trackers.txt")
    monkeypatch.setenv("COMET_START_ONLINE", "0")
    monkeypatch.setenv("COMET_OFFLINE_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("COMET_DISABLE_AUTO_LOGGING", "1")
    record(tmp_path / "run", ["comet"], range(2))
    (archive,) = tmp_path.glob("*.zip")
    assert archive.name.startswith(account(tmp_path / "run").key)


class Own(Tracker):
    """A tracker of somebody's own."""

    module = "json"
    package = "json"
    told: list = []

    def __init__(self, account: Account) -> None:
        self.told.append(account.name)

    def log_metrics(self, metrics, epoch) -> None:
        self.told.append((epoch, sorted(metrics)))


@pytest.mark.slow
def test_a_new_tracker_is_a_class_and_a_line(stage_2, monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "own", Own)
    folder = stage_2("CIRR", "--tracker", "own", "--num-epochs", 1, "--experiment-name", "mine")
    assert Own.told[0] == "mine"
    assert (0, ["train_epoch_loss"]) in Own.told
    written = json.loads((folder / "training_hyperparameters.json").read_text())
    assert written["flags"]["tracker"] == ["own"]


def test_flags_of_tracking(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: name != "wandb" or None)
    assert check_trackers([], None, None) == []
    assert check_trackers(["tensorboard"], "key", "workspace") == ["comet", "tensorboard"]
    assert check_trackers(["comet", "comet"], None, None) == ["comet"]
    with pytest.raises(UserError, match=r"--tracker wandb needs a package: pip install wandb"):
        check_trackers(["wandb"], None, None)
    with pytest.raises(UserError, match="--api-key and --workspace go together"):
        check_trackers([], "key", None)


def test_a_missing_package_is_said_before_anything_is_read(monkeypatch, capsys):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        combiner_train.main(["--dataset", "CIRR", "--data-root", "nowhere", "--tracker", "wandb"])
    assert stop.value.code == 2
    assert "pip install wandb" in capsys.readouterr().err
