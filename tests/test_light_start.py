"""Commands answer at once: flags and files that are missing are looked at before anything heavy is loaded."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

SRC = ROOT / "src"
SCRIPTS = sorted(file.name for file in SRC.glob("*.py") if "@command" in file.read_text())
HEAVY = (
    "torch", "torchvision", "clip", "pandas", "matplotlib", "gradio", "faiss", "open_clip", "timm", "transformers",
)  # fmt: skip
# What a fresh Python does, and what it then says of itself: heavy packages that it loaded, and how many modules in all.
PROBE = """
import atexit, json, runpy, sys
heavy = json.loads(sys.argv.pop(1))
report = lambda: print(json.dumps([[name for name in heavy if name in sys.modules], len(sys.modules)]))
atexit.register(report)
sys.path.insert(0, sys.argv[1].rsplit("/", 1)[0])
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# Modules, Python's own included: few are loaded in a tenth of a second, however busy the machine is. Most of them
# is what argparse, json and pathlib bring; torch alone brings over a thousand.
MOST_MODULES = 400
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
    "visualize.py --rankings nowhere",
    "search.py index --images nowhere --output demo/index",
    "search.py query --index nowhere --image a --text b",
    "demo_app.py --index nowhere",
]


def run(*words: str) -> tuple[subprocess.CompletedProcess, list[str], int]:
    """What a script says, the heavy packages that it loaded, and how many modules in all."""
    script, *flags = words
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(HEAVY), str(SRC / script), *flags],
        capture_output=True,
        text=True,
    )
    loaded, modules = json.loads(done.stdout.splitlines()[-1])
    return done, loaded, modules


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_mistyped_flags_load_nothing_heavy(script):
    for flag, code in (("--help", 0), ("--no-such-flag", 2)):
        done, loaded, modules = run(script, flag)
        assert done.returncode == code
        assert loaded == []
        assert modules < MOST_MODULES


@pytest.mark.parametrize("line", MISSING)
def test_a_missing_file_is_said_before_anything_heavy_is_loaded(line):
    done, loaded, modules = run(*line.split())
    assert done.returncode == 2
    assert loaded == []
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr
    assert modules < MOST_MODULES


def test_every_script_is_tried_with_a_missing_file():
    takes_no_file = {"demo.py", "shapes_dataset.py"}
    assert {line.split()[0] for line in MISSING} == set(SCRIPTS) - takes_no_file


def test_checks_and_single_results_need_no_torch(drawn, tmp_path, run_script=run):
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
    for words in (
        ["compare.py", str(tmp_path / "result.json")],
        ["check_submission.py", str(tmp_path / "submission.json"), "--data-root", str(drawn)],
        ["check_dataset.py", "--unofficial", "--data-root", str(drawn), "--num-workers", "0"],
    ):
        done, loaded, _ = run_script(*words)
        assert "Traceback" not in done.stderr
        assert not heavy & set(loaded), words


def test_a_validation_loads_no_plots(golden, tmp_path):
    flags = [
        "--clip-model-name",
        str(golden / "clip_vit.pt"),
        "--combining-function",
        "sum",
        "--num-workers",
        "0",
    ]
    done, loaded, _ = run(
        "validate.py", "--dataset", "CIRR", "--data-root", str(golden), "--device", "cpu", *flags
    )
    assert done.returncode == 0, done.stderr
    assert not {"matplotlib", "open_clip", "timm", "transformers"} & set(loaded)
    assert "torch" in loaded


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
