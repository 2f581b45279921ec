"""Every script on your own triplets, and on a fourth benchmark that is one short file: trained, measured, shown."""

import importlib
import json
from pathlib import Path

import pytest

import fourth_benchmark
from benchmarks import BENCHMARKS, Triplets
from conftest import STAGE_1, STAGE_2
from fourth_benchmark import Fourth
from test_every_flag import SCRIPTS, parsers

CPU = "--device cpu --num-workers 0"
DATA = "--data-root {root} --dataset {name}"
TRAINED = "--num-epochs 1 --save-best --no-{}-cache"
CLIP = "--clip-model-name {root}/tiny_clip_vit.pt"
TUNED = f"{CLIP} --clip-model-path {{out}}/clip/*/saved_models/tuned_clip_best.pt"
PAIR = f"{TUNED} --combiner-path {{out}}/combiner/*/saved_models/combiner.pt"
SIZES = "--triplets 99 9 --images 99 9 --memory 4 --batch-size 9"
COMMANDS = [
    f"check_dataset {DATA} --unofficial --num-workers 0 --write-exclusions {{out}}/none.json",
    f"plan stage1 {DATA} {CLIP} {SIZES}",
    f"clip_fine_tune {DATA} {CLIP} {CPU} {STAGE_1} {TRAINED.format('image')} --output-dir {{out}}/clip",
    f"plan stage2 {DATA} {CLIP} {SIZES} --projection-dim 8 --hidden-dim 8",
    f"combiner_train {DATA} {TUNED} {CPU} {STAGE_2} {TRAINED.format('feature')} --output-dir {{out}}/combiner",
    f"validate {DATA} {PAIR} {CPU} --combining-function combiner --metrics-json {{out}}/m.json "
    "--rankings {out}/r.json --exclusions {out}/none.json",
    "compare {out}/m.json",
    "check_submission --data-root {root} {out}/r.json --split val --metrics-json {out}/again.json",
    f"visualize {DATA} --rankings {{out}}/r.json --output-dir {{out}}/sheets {CPU}",
    f"export {PAIR.replace(CLIP, '')} --output {{out}}/pair --results {{out}}/m.json",
]
# What there is of your own triplets alone, and needs no training.
OF_TRIPLETS = [
    f"triplets_test_submission --data-root {{root}} --pair {{out}}/pair {CPU} --submission-name x --output-dir {{out}}",
    f"triplets_test_submission --data-root {{root}} --pair {{out}}/pair {CPU} --submission-name x --output-dir {{out}} "
    "--split val",
    "check_submission --data-root {root} {out}/x.json --dataset triplets",
    "check_submission --data-root {root} {out}/val/x.json --dataset triplets --split val --metrics-json {out}/v.json",
]


def test_the_fourth_benchmark_is_one_short_file():
    assert len(Path(fourth_benchmark.__file__).read_text().splitlines()) <= 60


def test_every_script_that_takes_a_benchmark_is_run():
    taking = set()
    for script in SCRIPTS:
        for _, parser in parsers(script):
            if any("--dataset" in action.option_strings for action in parser._actions):
                taking.add(script)
    assert taking <= {line.split()[0] for line in COMMANDS}


@pytest.fixture(scope="module")
def root(drawn, tmp_path_factory) -> Path:
    """The drawn data with the files of the fourth benchmark."""
    root = tmp_path_factory.mktemp("root")
    for place in drawn.iterdir():
        (root / place.name).symlink_to(place)
    fourth_benchmark.draw(root)
    return root


def run(line: str, **places: object) -> None:
    """Run a command, the stars in its paths for what is there."""
    script, *words = line.format(**places).split()
    argv = []
    for word in words:
        argv += map(str, Path("/").glob(word[1:])) if "*" in word else [word]
    importlib.import_module(script).main(argv)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Triplets, Fourth])
def test_every_script_runs_on_any_benchmark(kind, root, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(BENCHMARKS, kind.name, kind)
    for line in COMMANDS:
        run(line, root=root, name=kind.name, out=tmp_path)
    printed = capsys.readouterr().out
    result, again = [json.loads((tmp_path / name).read_text()) for name in ("m.json", "again.json")]
    assert result["dataset"] == again["dataset"] == kind.name
    assert list(result["protocols"]) == [protocol.name for protocol in kind.protocols]
    for name, measured in result["protocols"].items():
        assert set(kind.selection) <= measured["metrics"].keys() <= {*kind.titles}
        assert again["protocols"][name] == measured["metrics"]
        assert f"{kind.name} val, {name}" in printed
    assert kind.titles[next(iter(kind.selection))] in (tmp_path / "pair/README.md").read_text()
    if kind is Triplets:
        answers_of_a_test_split(root, tmp_path, result["metrics"])


def answers_of_a_test_split(root: Path, out: Path, metrics: dict[str, float]) -> None:
    """As many as there are, of each query by its id; those of val score as validate.py measures."""
    for line in OF_TRIPLETS:
        run(line, root=root, out=out)
    (test,) = Triplets(root).test()
    answers = json.loads((out / "x.json").read_text())
    assert list(answers) == [triplet.pair_id for triplet in test.triplets]
    for triplet in test.triplets:
        found = answers[str(triplet.pair_id)]
        assert sorted(found) == sorted({*test.names} - {triplet.reference})
    scored = json.loads((out / "v.json").read_text())["metrics"]
    of_gallery = {name: value for name, value in metrics.items() if "group" not in name}
    assert scored == pytest.approx(of_gallery)
