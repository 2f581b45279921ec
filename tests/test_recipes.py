"""Recipes: values in the place of defaults, which flags take back and runs keep."""

import json

import pytest

import clip_fine_tune
import combiner_train
from settings.recipes import RECIPES

SCRIPTS = {"clip_fine_tune.py": clip_fine_tune, "combiner_train.py": combiner_train}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_recipe_stands_in_for_defaults_and_every_value_of_it_can_be_taken_back(script, capsys):
    parse = SCRIPTS[script].parse
    plain = parse(["--dataset", "CIRR"])
    for words in ([], ["--recipe", "original"]):
        assert parse(["--dataset", "CIRR", *words]).model_copy(update={"command": ""}) == (
            plain.model_copy(update={"command": ""})
        )
    for name, values in RECIPES.items():
        told = parse(["--dataset", "CIRR", f"--recipe={name}"])
        changed = {**dict.fromkeys(type(plain).model_fields), **dict(plain), **values[script]}
        assert dict(told) == {**changed, "recipe": name, "command": told.command}
        for setting in values[script]:
            default = getattr(plain, setting)
            flag = setting.replace("_", "-")
            is_off = default is None or default is False
            word = f"--no-{flag}" if is_off else f"--{flag}={default}"
            for words in ([word, "--rec", name], ["--recipe", name, word]):
                assert getattr(parse(["--dataset", "CIRR", *words]), setting) == default


def test_a_resumed_run_has_the_recipe_it_began_with(stage_2, capsys):
    run = stage_2("CIRR", "--recipe", "modern", "--negatives", "batch", "--num-epochs", 1)
    flags = json.loads((run / "training_hyperparameters.json").read_text())["flags"]
    values = {**RECIPES["modern"]["combiner_train.py"], "negatives": "batch", "recipe": "modern"}
    assert {name: flags[name] for name in values} == values
    resumed = combiner_train.parse(["--resume", str(run)])
    assert {name: getattr(resumed, name) for name in values} == values
    (run / "best_metrics.json").unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        combiner_train.main(["--resume", str(run), "--recipe", "original"])
    assert "--recipe is original, but the run was started with modern" in capsys.readouterr().err
