"""Every script on your own triplets: trained, measured, shown, answered."""

import importlib
import json
from pathlib import Path

import pytest

from benchmarks import Triplets
from conftest import STAGE_1, STAGE_2
from test_every_flag import SCRIPTS, parsers

CPU = "--device cpu --num-workers 0"
DATA = "--data-root {root} --dataset Triplets"
TRAINED = "--num-epochs 1 --save-best --no-{}-cache"
CLIP = "--clip-model-name {root}/tiny_clip_vit.pt"
TUNED = f"{CLIP} --clip-model-path {{out}}/clip/*/saved_models/tuned_clip_best.pt"
PAIR = f"{TUNED} --combiner-path {{out}}/combiner/*/saved_models/combiner.pt"
SIZES = "--triplets 99 9 --images 99 9 --memory 4 --batch-size 9"
COMMANDS = [
    f"check_dataset {DATA} --num-workers 0 --write-exclusions {{out}}/none.json",
    f"plan stage1 {DATA} {CLIP} {SIZES}",
    f"clip_fine_tune {DATA} {CLIP} {CPU} {STAGE_1} {TRAINED.format('image')} --output-dir {{out}}/clip",
    f"combiner_train {DATA} {TUNED} {CPU} {STAGE_2} {TRAINED.format('feature')} --output-dir {{out}}/combiner",
    f"validate {DATA} {PAIR} {CPU} --combining-function combiner --metrics-json {{out}}/m.json "
    "--rankings {out}/r.json --exclusions {out}/none.json",
    f"audit {DATA} {PAIR} {CPU} --k 1 --resamples 20",
    "compare {out}/m.json",
    "check_submission --data-root {root} {out}/r.json --split val --metrics-json {out}/again.json",
    f"visualize {DATA} --rankings {{out}}/r.json --output-dir {{out}}/sheets {CPU}",
    f"export {PAIR.replace(CLIP, '')} --output {{out}}/pair --results {{out}}/m.json",
    f"triplets_test_submission --data-root {{root}} --pair {{out}}/pair {CPU} --submission-name x --output-dir {{out}}",
    f"triplets_test_submission --data-root {{root}} --pair {{out}}/pair {CPU} --submission-name x --output-dir {{out}} "
    "--split val",
    "check_submission --data-root {root} {out}/x.json --dataset triplets",
    "check_submission --data-root {root} {out}/val/x.json --dataset triplets --split val --metrics-json {out}/v.json",
]


def test_every_script_that_takes_a_benchmark_is_run():
    taking = set()
    for script in SCRIPTS:
        for _, parser in parsers(script):
            if any("Triplets" in (action.choices or ()) for action in parser._actions):
                taking.add(script)
    taking.remove("emoji_dataset")  # which writes benchmarks
    assert taking < {line.split()[0] for line in COMMANDS}


def run(line: str, **places: object) -> None:
    """Run a command, the stars in its paths for what is there."""
    script, *words = line.format(**places).split()
    argv = []
    for word in words:
        argv += map(str, Path("/").glob(word[1:])) if "*" in word else [word]
    importlib.import_module(script).main(argv)


@pytest.mark.long
def test_every_script_runs_on_your_own_triplets(drawn, tmp_path, capsys):
    for line in COMMANDS:
        run(line, root=drawn, out=tmp_path)
    printed = capsys.readouterr().out
    result, again = [json.loads((tmp_path / name).read_text()) for name in ("m.json", "again.json")]
    assert result["dataset"] == again["dataset"] == "Triplets"
    for name, measured in result["protocols"].items():
        assert measured["metrics"].keys() == Triplets.titles.keys()
        assert again["protocols"][name] == measured["metrics"]
        assert f"Triplets val, {name}" in printed
    assert " mAP@10 " in (tmp_path / "pair/README.md").read_text()
    (test,) = Triplets(drawn).test()
    answers = json.loads((tmp_path / "x.json").read_text())
    assert list(answers) == [triplet.pair_id for triplet in test.triplets]
    for triplet in test.triplets:
        found = answers[str(triplet.pair_id)]
        assert sorted(found) == sorted({*test.names} - {triplet.reference})
    scored = json.loads((tmp_path / "v.json").read_text())["metrics"]
    metrics = result["metrics"]
    assert scored == {name: metrics[name] for name in metrics if "group" not in name}
