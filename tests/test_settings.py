"""Settings: one that is declared once is parsed, bounded, stored, checked when a run is resumed, and shown."""

import json
from typing import Annotated

import pytest
from pydantic import Field

import clip_fine_tune
import combiner_train
from models.clip_model import clip
from models.configuration import Settings
from runtime.choices import OPENAI_CLIPS
from settings import groups
from settings.declaring import names_where, setting, stored, subjects
from settings.groups import FREE_FLAGS, MOVABLE_FLAGS, AnyTraining
from utils import UserError

TRAININGS = {clip_fine_tune: groups.Stage1, combiner_train: groups.Stage2}


class Own(groups.Flags):
    """Settings of somebody's own."""

    title = "my own"
    share: Annotated[float, Field(ge=0.25, le=4)] = setting(1.5, "of something")
    notes: Annotated[int, Field(ge=0, le=9)] = setting(2, "that change nothing", where="free")


class OwnStage(Own, groups.Stage2):
    """Stage 2 with them."""


@pytest.fixture
def own(monkeypatch):
    """Stage 2 takes two settings more, which are declared above and nowhere else."""
    monkeypatch.setitem(groups.STAGES, "combiner_train.py", OwnStage)
    monkeypatch.setattr(combiner_train, "Stage2", OwnStage)


def refused(capsys, call) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.slow
def test_a_setting_is_declared_once(own, stage_2, capsys):
    with pytest.raises(SystemExit):
        combiner_train.parse(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "my own: --share SHARE of something (default: 1.5)" in told
    for text in ("0.2", "5", "nan", "x"):
        line = refused(
            capsys, lambda text=text: combiner_train.parse(["--dataset=CIRR", f"--share={text}"])
        )
        assert "--share" in line
        assert "from 0.25 to 4" in line
    folder = stage_2("CIRR", "--share", 3, "--notes", 1)
    file = folder / "training_hyperparameters.json"
    content = json.loads(file.read_text())
    assert (content["flags"]["share"], content["flags"]["notes"]) == (3.0, 1)
    assert "share" in (folder / "index.html").read_text()
    (folder / "best_metrics.json").unlink()
    again = ["--resume", str(folder)]
    line = refused(capsys, lambda: combiner_train.main([*again, "--share", "2"]))
    assert "--share is 2.0, but the run was started with 3.0" in line
    assert combiner_train.parse(again).share == 3
    assert combiner_train.parse([*again, "--notes", "5"]).notes == 5
    for wrong in (5, "2", None):
        content["flags"]["share"] = wrong
        file.write_text(json.dumps(content))
        assert "flags.share" in refused(capsys, lambda: combiner_train.main(again))


@pytest.mark.parametrize("script", TRAININGS)
def test_every_flag_of_a_training_is_a_setting_of_its_stage(script):
    stage = TRAININGS[script]
    args = script.parse(["--dataset", "CIRR"])
    assert type(args) is stage
    declared = set()
    for subject in subjects(stage):
        declared |= subject.__annotations__.keys()
    assert declared | {"script", "command", "started_in"} == stage.model_fields.keys()
    content = json.loads(json.dumps(stored(args)))
    assert "api_key" not in content
    settings = {"flags": content, "recipe": {}, "data": {}, "versions": {}}
    read = Settings.checked(settings, file="it", remedy="")
    assert stage(**read.flags) == args.model_copy(update={"api_key": None})


def test_what_counts_where():
    assert {"clip_model_path", "exclusions"} == MOVABLE_FLAGS
    assert MOVABLE_FLAGS <= FREE_FLAGS
    assert {"api_key", "tracker", "device", "num_workers", "output_dir"} <= FREE_FLAGS
    assert names_where(AnyTraining, "secret") == {"api_key"}
    assert {"loss", "seed", "top_k", "transform"} <= names_where(AnyTraining, "computes")


@pytest.mark.parametrize("flags", [["--top-k", "5"], ["--seeds", "1", "2", "1"]], ids=" ".join)
def test_settings_that_do_not_fit_each_other(flags, capsys):
    line = refused(capsys, lambda: combiner_train.parse(["--dataset", "CIRR", *flags]))
    assert flags[0] in line


def test_a_seed_twice_on_disk_is_refused():
    flags = stored(combiner_train.parse(["--dataset", "CIRR"]))
    content = {"flags": {**flags, "seeds": [1, 1]}, "recipe": {}, "data": {}, "versions": {}}
    with pytest.raises(UserError, match=r"flags\.seeds"):
        Settings.checked(content, file="it", remedy="")


def test_openais_names_are_those_of_the_clip_package():
    assert list(OPENAI_CLIPS) == clip.available_models()


def test_the_combining_function_is_taken_in_any_case():
    import validate

    args = validate.parse(["--dataset", "CIRR", "--combining-function", "Sum"])
    assert args.combining_function == "sum"


def test_lists_may_be_given_again():
    args = combiner_train.parse(["--dataset", "CIRR", "--seeds", "1", "--seeds", "2", "3"])
    assert args.seeds == [1, 2, 3]
