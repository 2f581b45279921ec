"""Commands answer at once: flags and files that are missing are looked at before anything heavy is loaded."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT, SOAK
from layers import OURS

SRC = ROOT / "src"
SCRIPTS = sorted(file.name for file in SRC.glob("*.py") if "@command" in file.read_text())
HEAVY = (
    "torch", "torchvision", "clip", "pandas", "matplotlib", "gradio", "faiss", "open_clip", "timm", "transformers",
    "torch._dynamo",
)  # fmt: skip
# Jobs in forks of one fresh Python that has loaded what all scripts load. Some of a job's streams are closed, as by a
# shell, or opened for a file that nothing can be written to. Each of its lines leaves its output, its exit code, the
# heavy packages that are loaded, and how many modules are in all.
PROBE = """
import json, os, runpy, sys
source, heavy, jobs = json.loads(sys.argv[1])
sys.path.insert(0, source)
import cli.options

folder = os.getcwd()
DESCRIPTORS = {"stdin": 0, "stdout": 1, "stderr": 2}

def set_up(streams):
    for name, opened in streams.items():
        os.close(DESCRIPTORS[name])
        if opened:
            os.open(*opened)
        else:
            setattr(sys, name, None)

def run(file, streams, script, *flags):
    for name in ("stdout", "stderr"):
        os.dup2(os.open(f"{file}.{name}", os.O_CREAT | os.O_WRONLY), DESCRIPTORS[name])
    set_up(streams)
    sys.argv = [os.path.join(source, script), *flags]
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    loaded = [name for name in heavy if name in sys.modules]
    with open(f"{file}.json", "w") as about:
        json.dump([code, loaded, len(sys.modules)], about)

for job, (streams, lines) in enumerate(jobs):
    if not os.fork():
        for number, line in enumerate(lines):
            run(f"{folder}/{job}.{number}", streams, *line)
        sys.exit()
    os.wait()
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
    """What came of a script: its exit code, the heavy packages that it loaded, how many modules, and its output."""

    code: int
    loaded: list[str]
    modules: int
    stdout: str
    stderr: str


Line = list[str]  # a script and its flags


def run(folder: Path, *jobs: list[Line], streams: Iterable[dict] = ()) -> list[list[Ended]]:
    """Run jobs, each some command lines one after the other, and each with its streams; all open without `streams`."""
    folder.mkdir(exist_ok=True)
    told = [str(SRC), HEAVY, list(zip(streams or [{}] * len(jobs), jobs, strict=True))]
    subprocess.check_call([sys.executable, "-c", PROBE, json.dumps(told)], cwd=folder)
    return [
        [ended(folder / f"{job}.{number}") for number in range(len(lines))]
        for job, lines in enumerate(jobs)
    ]


def ended(file: Path) -> Ended:
    stdout, stderr = (Path(f"{file}.{name}").read_text() for name in ("stdout", "stderr"))
    return Ended(*json.loads(Path(f"{file}.json").read_text()), stdout, stderr)


def test_help_mistyped_flags_and_missing_files_load_nothing_heavy(tmp_path):
    """All lines of a script in one fork: what the first has loaded is still there after the last."""
    codes = {"--help": 0, "--no-such-flag": 2}
    jobs = []
    for script in SCRIPTS:
        missing = [line.split() for line in MISSING if line.split()[0] == script]
        jobs.append([*([script, flag] for flag in codes), *missing])
    for lines, found in zip(jobs, run(tmp_path / "started", *jobs), strict=True):
        for line, ended in zip(lines, found, strict=True):
            assert ended.code == codes.get(line[1], 2), (line, ended.stderr)
            assert ended.loaded == [], line
            assert ended.modules < MOST_MODULES, line
            assert "Traceback" not in ended.stderr, line
            assert line[1] in codes or "nowhere" in ended.stderr, line


def test_every_script_is_tried_with_a_missing_file():
    takes_no_file = {"demo.py", "emoji_dataset.py"}
    assert {line.split()[0] for line in MISSING} == set(SCRIPTS) - takes_no_file


def test_checks_and_single_results_need_no_torch(drawn, tmp_path):
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
    (found,) = run(tmp_path / "started", lines)
    for words, ended in zip(lines, found, strict=True):
        assert "Traceback" not in ended.stderr
        assert not heavy & set(ended.loaded), words


# open_clip alone takes as long to load as all others.
MODULES = OURS if SOAK else OURS - {"models.open_clip_package"}
IMPORTS = f"""
import importlib, os, sys
import torch
for module in {sorted(MODULES)!r}:
    importlib.import_module(module)
if not os.fork():
    os._exit(torch.cuda._is_in_bad_fork())
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_a_validation_loads_no_plots_and_no_compiler_and_no_import_asks_for_a_gpu(golden, tmp_path):
    """Guards against forks that cannot use one: those of the demo, and of `gpu_check.py`."""
    words = ["validate.py", "--dataset", "CIRR", "--device", "cpu", "--num-workers", "0"]
    words += ["--clip-model-name", str(golden / "clip_vit.pt"), "--data-root", str(golden)]
    words += [*COMPOSED.split(), str(golden / "combiner_moe_cirr.pt")]
    (tmp_path / "imports.py").write_text(IMPORTS)
    ((validated, imported),) = run(tmp_path / "started", [words, [str(tmp_path / "imports.py")]])
    assert validated.code == 0, validated.stderr
    assert set(validated.loaded) & set(HEAVY) <= {"torch", "clip", "pandas"}
    assert "torch" in validated.loaded
    assert imported.code == 0, "something asked for a GPU when it was imported"


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
    """By a link from another folder, and as a module: a script finds what lies beside it."""
    link = tmp_path / "link.py"
    link.symlink_to(SRC / "validate.py")
    for words, folder in (([str(link)], tmp_path), (["-m", "validate"], SRC)):
        done = subprocess.run(
            [sys.executable, *words, "--help"], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "--combining-function" in done.stdout
