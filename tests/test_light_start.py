"""Commands answer at once: flags and files that are missing are looked at before anything heavy is loaded."""

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from conftest import ROOT

SRC = ROOT / "src"
SCRIPTS = sorted(file.name for file in SRC.glob("*.py") if "@command" in file.read_text())
HEAVY = (
    "torch", "torchvision", "clip", "pandas", "matplotlib", "gradio", "faiss", "open_clip", "timm", "transformers",
    "torch._dynamo",
)  # fmt: skip
# Scripts in forks of one fresh Python that has loaded what all of them load. Each says of itself at its end: the heavy
# packages that it loaded, and how many modules in all.
PROBE = """
import atexit, json, os, runpy, sys
source, heavy, lines = json.loads(sys.argv[1])
sys.path.insert(0, source)
import cli.options

folder = os.getcwd()

def lines_to_run():
    codes = []
    for number, words in enumerate(lines):
        if not os.fork():
            for descriptor, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(f"{number}.{name}", os.O_CREAT | os.O_WRONLY), descriptor)
            return number, words
        codes.append(os.waitstatus_to_exitcode(os.wait()[1]))
    print(json.dumps(codes))
    sys.exit()

def report():
    loaded = [name for name in heavy if name in sys.modules]
    with open(f"{folder}/{number}.loaded", "w") as file:
        json.dump([loaded, len(sys.modules)], file)

number, (script, *flags) = lines_to_run()
atexit.register(report)
sys.argv = [os.path.join(source, script), *flags]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# Modules, Python's own included: few are loaded in a tenth of a second, however busy the machine is. Most of them
# is what argparse, json, pathlib and pydantic (150) bring; torch alone brings over a thousand.
MOST_MODULES = 450
COMPOSED = "--combining-function combiner --combiner-path"
MISSING = [
    "clip_fine_tune.py --dataset CIRR --data-root nowhere",
    "clip_fine_tune.py --dataset CIRR --clip-model-name nowhere",
    "clip_fine_tune.py --dataset CIRR --clip-model-name local-dir:nowhere",
    "clip_fine_tune.py --dataset CIRR --clip-model-name open_clip:nowhere/openai",
    "clip_fine_tune.py --dataset CIRR --clip-model-name open_clip:ViT-B-32=nowhere",
    "clip_fine_tune.py --resume nowhere",
    "combiner_train.py --dataset FashionIQ --clip-model-path nowhere",
    "combiner_train.py --dataset FashionIQ --exclusions nowhere",
    "average.py --checkpoints nowhere elsewhere --output mean.pt",
    f"audit.py --dataset CIRR {COMPOSED} nowhere",
    f"validate.py --dataset CIRR {COMPOSED} nowhere",
    "validate.py --dataset CIRR --combining-function sum --queries nowhere",
    "validate.py --dataset CIRR --combining-function sum --data-root nowhere",
    f"cirr_test_submission.py --submission-name a {COMPOSED} nowhere",
    "fashioniq_test_submission.py --submission-name a --combining-function sum --data-root nowhere",
    "circo_test_submission.py --submission-name a --combining-function sum --data-root nowhere",
    "triplets_test_submission.py --submission-name a --combining-function sum --data-root nowhere",
    "check_submission.py nowhere",
    "compare.py nowhere",
    "convert.py --dataset CIRR --data-root nowhere --output-dir demo/converted",
    "convert.py --dataset Shoes --data-root nowhere --output-dir demo/converted",
    "validate.py --dataset CIRR --pair nowhere",
    "export.py --output pair --clip-model-path nowhere",
    "export.py --output demo/pair --results nowhere",
    "plan.py stage1 --dataset CIRR --gpu h100 --clip-model-name nowhere",
    "plan.py stage2 --dataset CIRR --gpu h100 --clip-model-path nowhere",
    "check_dataset.py --data-root nowhere",
    "get_data.py CIRR --archive nowhere",
    "visualize.py --rankings nowhere",
    "search.py index --images nowhere --output demo/index",
    "search.py query --index nowhere --image a --text b",
    "demo_app.py --index nowhere",
]


@dataclass(frozen=True)
class Ended:
    """What came of a script: its exit code and output, the heavy packages that it loaded, and how many modules."""

    code: int
    stdout: str
    stderr: str
    loaded: list[str]
    modules: int


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Callable[..., list[Ended]]:
    """Run some command lines of scripts, one after the other."""

    def run(*lines: list[str]) -> list[Ended]:
        folder = tmp_path_factory.mktemp("started")
        told = json.dumps([str(SRC), HEAVY, lines])
        codes = subprocess.check_output([sys.executable, "-c", PROBE, told], cwd=folder)
        ended = []
        for number, code in enumerate(json.loads(codes)):
            stdout, stderr = (
                (folder / f"{number}.{name}").read_text() for name in ("stdout", "stderr")
            )
            loaded, modules = json.loads((folder / f"{number}.loaded").read_text())
            ended.append(Ended(code, stdout, stderr, loaded, modules))
        return ended

    return run


@pytest.mark.parametrize(("flag", "code"), [("--help", 0), ("--no-such-flag", 2)])
def test_help_and_mistyped_flags_load_nothing_heavy(flag, code, run):
    found = run(*([script, flag] for script in SCRIPTS))
    for script, ended in zip(SCRIPTS, found, strict=True):
        assert ended.code == code, (script, ended.stderr)
        assert ended.loaded == [], script
        assert ended.modules < MOST_MODULES, script


def test_a_missing_file_is_said_before_anything_heavy_is_loaded(run):
    found = run(*(line.split() for line in MISSING))
    for line, ended in zip(MISSING, found, strict=True):
        assert ended.code == 2, line
        assert ended.loaded == [], line
        assert "nowhere" in ended.stderr, line
        assert "Traceback" not in ended.stderr, line
        assert ended.modules < MOST_MODULES, line


def test_every_script_is_tried_with_a_missing_file():
    takes_no_file = {"demo.py", "emoji_dataset.py"}
    assert {line.split()[0] for line in MISSING} == set(SCRIPTS) - takes_no_file


def test_checks_and_single_results_need_no_torch(drawn, tmp_path, run):
    """What reads and counts runs without it; a comparison of two results resamples, and needs it."""
    ranks = {"dress": [0, 20], "toptee": [3, 7], "shirt": [60, 1]}
    from benchmarks import FashionIQ
    from benchmarks.metrics import Ranks

    benchmark = FashionIQ(tmp_path)
    import numpy as np

    metrics = benchmark.summary(
        {name: benchmark.score(Ranks(np.array(of))) for name, of in ranks.items()}
    )
    measured = {
        "gallery_images": dict.fromkeys(ranks, 99),
        "queries": dict.fromkeys(ranks, 2),
        "metrics": metrics,
        "ranks": ranks,
        "group_ranks": {},
    }
    tables = ("images_sha256", "excluded_images", "preprocessing", "training")
    result = {
        "dataset": "FashionIQ",
        "split": "val",
        "protocols": {"original-kept": measured},
        "queries_sha256": dict.fromkeys(ranks, "q"),
        "weights_sha256": {"clip": "c"},
        **{name: {} for name in tables},
    }
    (tmp_path / "result.json").write_text(json.dumps(result))
    (tmp_path / "submission.json").write_text("{}")
    heavy = {"torch", "torchvision", "clip", "matplotlib"}
    lines = [
        ["compare.py", str(tmp_path / "result.json")],
        ["check_submission.py", str(tmp_path / "submission.json"), "--data-root", str(drawn)],
        ["check_dataset.py", "--unofficial", "--data-root", str(drawn), "--num-workers", "0"],
    ]
    for words, ended in zip(lines, run(*lines), strict=True):
        assert "Traceback" not in ended.stderr
        assert not heavy & set(ended.loaded), words


def test_a_validation_loads_no_plots_and_no_compiler(golden, tmp_path, run):
    flags = [
        "--clip-model-name",
        str(golden / "clip_vit.pt"),
        "--combining-function",
        "combiner",
        "--combiner-path",
        str(golden / "combiner_moe_cirr.pt"),
        "--num-workers",
        "0",
    ]
    where = ["--dataset", "CIRR", "--data-root", str(golden), "--device", "cpu"]
    (ended,) = run(["validate.py", *where, *flags])
    assert ended.code == 0, ended.stderr
    assert set(ended.loaded) & set(HEAVY) <= {"torch", "clip", "pandas"}
    assert "torch" in ended.loaded


def test_heavy_imports_stand_where_they_are_used():
    """No module that flags are parsed with imports a heavy package at its top."""
    light = [SRC / "utils.py", *(SRC / "cli").glob("*.py"), *(SRC / script for script in SCRIPTS)]
    for file in light:
        for node in ast.parse(Path(file).read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not {name.split(".")[0] for name in names} & set(HEAVY), file.name


def test_scripts_start_from_anywhere(tmp_path):
    """By path, by a link, as a module, from another folder: a script finds what lies beside it."""
    link = tmp_path / "link.py"
    link.symlink_to(SRC / "validate.py")
    starts = [
        ([str(SRC / "validate.py")], tmp_path),
        (["src/validate.py"], ROOT),
        ([str(link)], tmp_path),
        (["-m", "validate"], SRC),
    ]
    for words, folder in starts:
        done = subprocess.run(
            [sys.executable, *words, "--help"], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "--combining-function" in done.stdout
