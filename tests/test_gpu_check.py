"""The check for a GPU, rehearsed on the CPU, and what it does about cases that fail, break or hang."""

import gc
import json
import math
import os
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch

import gpu_check
import needed
import run as bench_run
from cases import CASES, Case
from conftest import ROOT, read_csv
from forks import HANG, state_of
from isolated import OUT_OF_TIME, attempt
from report import held, line
from reports import curves, run_page
from reports.tables import text_table
from timing import Setting, cost
from training.run_folder import Run

CPU = Setting(torch.device("cpu"), rehearses=True)
# What a machine with a GPU need not have. A package whose entry is None cannot be imported.
ABSENT = ["matplotlib", "comet_ml", "faiss", "gradio", "pytest", "hypothesis"]
BLOCKER = f"import sys\nsys.modules.update(dict.fromkeys({ABSENT!r}))\n"


@pytest.fixture
def bare(tmp_path) -> dict[str, str]:
    """An environment whose Python lacks what a machine with a GPU need not have."""
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "sitecustomize.py").write_text(BLOCKER)
    return os.environ | {"PYTHONPATH": str(tmp_path / "blocked"), "OMP_NUM_THREADS": "1"}


def test_the_blocker_blocks(bare):
    code = f"""
import importlib
for package in {ABSENT!r}:
    try:
        importlib.import_module(package)
    except ModuleNotFoundError:
        print(package)
"""
    done = subprocess.run([sys.executable, "-c", code], env=bare, capture_output=True, text=True)
    assert done.stdout.split() == ABSENT


def test_what_is_missing_is_named_before_anything_starts(tmp_path):
    blocker = "import sys\nsys.modules.update(dict.fromkeys(['pydantic', 'clip']))\n"
    (tmp_path / "sitecustomize.py").write_text(blocker)
    words = [sys.executable, ROOT / "bench" / "gpu_check.py", "--rehearse"]
    done = subprocess.run(
        words, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"missing: clip-anytorch pydantic: pip install them, or put their wheels into {needed.WHEELS}"
    ]


def test_a_package_is_installed_from_a_folder_of_wheels(tmp_path, monkeypatch):
    about = "onlyhere-1.0.dist-info"
    with zipfile.ZipFile(tmp_path / "onlyhere-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("onlyhere.py", "")
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: onlyhere\nVersion: 1.0\n")
        wheel.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\nRoot-Is-Purelib: true\n"
        )
        wheel.writestr(f"{about}/RECORD", "")
    monkeypatch.setattr(needed, "NEEDED", {"onlyhere": "onlyhere"})
    monkeypatch.setattr(sys, "path", sys.path[:])
    needed.install_or_leave(tmp_path)
    assert needed.missing() == []


@pytest.mark.long
def test_the_check_runs_to_its_end_without_a_gpu(bare, tmp_path):
    output = tmp_path / "results.json"
    words = ["make", "gpu-check", "REHEARSE=1", f"PYTHON={sys.executable}", f"OUTPUT={output}"]
    done = subprocess.run(words, cwd=ROOT, env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    content = json.loads(output.read_text())
    assert content["machine"]["forks may use a GPU"], (
        "something asked for a GPU when it was imported"
    )
    states = {case["case"]: case["state"] for case in content["cases"]}
    assert states == {
        name: "passed" if case.checks else "measured"
        for name, case in CASES.items()
        if "cuda" in case.on
    }
    for case in content["cases"]:
        assert case["rows"]
        assert "error" not in case
        for row in case["rows"]:
            assert row["figure"] in done.stdout


@pytest.mark.slow
@pytest.mark.long
def test_a_run_without_matplotlib_says_that_it_has_no_picture_of_its_curves(bare, drawn, tmp_path):
    flags = "--dataset CIRR --num-epochs 1 --batch-size 12 --projection-dim 16 --hidden-dim 24 --seeds 0 1"
    where = ["--data-root", drawn, "--output-dir", tmp_path / "runs", "--device", "cpu"]
    where += ["--clip-model-name", drawn / "tiny_clip_vit.pt", "--no-feature-cache"]
    words = [sys.executable, "src/combiner_train.py", *flags.split(), *map(str, where)]
    done = subprocess.run(words, cwd=ROOT, env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no training_curves.png: matplotlib is not installed") == 1
    assert "standard deviation" in done.stdout
    (folder,) = (tmp_path / "runs").iterdir()
    assert read_csv(folder / "seed_0" / "train_metrics.csv")["epoch"] == [0]
    page = (folder / "seed_0" / "index.html").read_text()
    assert "Best validations" in page
    assert '<figure class="chart">' in page
    assert not (folder / "seed_0" / "training_curves.png").exists()


def test_a_page_needs_no_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(run_page, "can_draw", curves.can_draw.__wrapped__)
    about = run_page.About(
        title="a run",
        titles={"r": "R@1"},
        chosen_by=("r",),
        hyper_parameters={"num_epochs": 1},
        commands={},
    )
    run_page.RunPage(tmp_path, about).refresh(
        {"train": [{"epoch": 0, "train_epoch_loss": 1.5}]}, {}, complete=True
    )
    assert [file.name for file in tmp_path.iterdir()] == ["index.html"]


def test_a_table_of_text():
    rows = {"seed 0": {"R@1": "10.67", "mean": "4.00"}, "mean": {"R@1": "9.00", "mean": "40.50"}}
    assert text_table(rows).splitlines() == [
        "          R@1   mean",
        "seed 0  10.67   4.00",
        "mean     9.00  40.50",
    ]


def test_a_table_of_numbers_has_them_as_python_spells_them(tmp_path):
    """Whole numbers stay so in a column with gaps, and NaN is no gap."""
    run = Run.__new__(Run)
    run.folder, run.writes = tmp_path, True
    run.rows = {
        "train": [
            {"epoch": 0, "a": 0.1 + 0.2},
            {"epoch": 1, "b,c": 3, "a": math.nan},
            {"epoch": 2, "a": 1e-7},
        ]
    }
    run._write("train")
    written = (tmp_path / "train_metrics.csv").read_bytes()
    assert written == b'epoch,a,"b,c"\n0,0.30000000000000004,\n1,nan,3\n2,1e-07,\n'


# Cases that go wrong


def row(number: int) -> dict:
    return {"figure": f"figure {number}"}


def raises(setting):
    yield row(1)
    raise ValueError("in the middle")


def fills_the_memory(setting):
    yield row(1)
    raise torch.OutOfMemoryError("CUDA out of memory")


def dies(setting):
    yield row(1)
    os.kill(os.getpid(), signal.SIGKILL)


def refuses(setting):
    yield row(1)
    print("script.py: error: the reason")
    sys.exit(2)


def hangs(setting):
    time.sleep(3600)
    yield row(1)


def leaves_a_process(setting):
    started = os.fork()
    if not started:
        time.sleep(3600)
        os._exit(0)
    yield {"figure": str(started)}
    raise ValueError("in the middle")


def goes_well(setting):
    yield held("what is wanted", 1e-6, 1e-5)


def misses(setting):
    yield held("what is wanted", float("nan"), 1e-5)
    yield held("and more", 1e-6, 1e-5)


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (raises, "ValueError: in the middle"),
        (fills_the_memory, "OutOfMemoryError: CUDA out of memory"),
        (dies, "its process died (exit code -9)"),
        (refuses, "SystemExit: 2\nscript.py: error: the reason"),
    ],
)
def test_a_case_that_goes_wrong_keeps_its_finished_rows(run, reason):
    said = []
    made = attempt(run, CPU, 3600, said.append)
    assert made.rows == said == [row(1)]
    assert made.error.startswith(reason)


def test_a_case_that_hangs_is_ended():
    made = attempt(hangs, CPU, 0.5, lambda row: None)
    assert made.error.startswith(OUT_OF_TIME)
    assert made.rows == []


def test_a_case_takes_all_that_it_started_with_it():
    made = attempt(leaves_a_process, CPU, 3600, lambda row: None)
    left = int(made.rows[0]["figure"])
    deadline = time.monotonic() + HANG
    while state_of(left) != "Z":  # gone, or only waiting to be asked how it ended
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def check(monkeypatch, tmp_path):
    """Run the check over cases of our own; returns its exit code and what it wrote."""

    def check(*flags: str, **cases: Case) -> tuple[int, dict]:
        monkeypatch.setattr(gpu_check, "CASES", cases)
        output = tmp_path / "results" / "check.json"
        with pytest.raises(SystemExit) as stop:
            gpu_check.main(["--device", "cpu", "--output", str(output), *flags])
        return stop.value.code, json.loads(output.read_text())

    return check


def states(content: dict) -> dict[str, str]:
    return {case["case"]: case["state"] for case in content["cases"]}


def test_the_check_goes_on_after_each_failure(check, capsys):
    code, content = check(
        first=Case(run=raises),
        second=Case(run=misses, checks=True),
        third=Case(run=dies, checks=True),
        last=Case(run=goes_well, checks=True),
    )
    assert code == 1
    assert states(content) == {
        "first": "failed", "second": "failed", "third": "failed", "last": "passed",
    }  # fmt: skip
    assert [len(case["rows"]) for case in content["cases"]] == [1, 2, 1, 1]
    assert "in the middle" in content["cases"][0]["error"]
    assert {"torch", "python", "device"} <= set(content["machine"])
    printed = capsys.readouterr().out
    assert printed.count("FAILED") == 1
    assert "**last: passed**" in printed


def test_the_check_passes_where_all_checks_pass(check):
    code, content = check(a=Case(run=goes_well, checks=True), b=Case(run=goes_well))
    assert code == 0
    assert states(content) == {"a": "passed", "b": "measured"}
    code, content = check("--only", "b", a=Case(run=raises), b=Case(run=goes_well))
    assert code == 0
    assert list(states(content)) == ["b"]


def test_what_no_longer_fits_is_not_run(check):
    """A figure may be left over, a check may not."""
    fits = Case(run=goes_well, seconds=0.9e6, checks=True)
    too_long = Case(run=goes_well, seconds=1.1e6)
    code, content = check("--budget", "1e6", a=too_long, b=fits)
    assert code == 0
    assert states(content) == {"a": "not run", "b": "passed"}
    code, content = check("--budget", "1e6", a=Case(run=goes_well, seconds=1.1e6, checks=True))
    assert code == 1


def test_a_figure_out_of_time_breaks_nothing_and_a_check_does(check):
    assert check(a=Case(run=hangs, seconds=0.5))[0] == 0
    assert check(a=Case(run=hangs, seconds=0.5, checks=True))[0] == 1


def test_a_case_without_rows_has_failed(check):
    assert check(a=Case(run=lambda setting: []))[0] == 1


def test_results_are_written_after_each_case(check, tmp_path):
    output = tmp_path / "results" / "check.json"

    def looks(setting):
        yield {"figure": ", ".join(states(json.loads(output.read_text())))}

    _, content = check(a=Case(run=goes_well), b=Case(run=raises), c=Case(run=looks))
    assert content["cases"][2]["rows"] == [{"figure": "a, b"}]


def test_the_benchmark_keeps_finished_rows_too(monkeypatch, tmp_path, capsys):
    """Guards against a case whose rows were lost where a later one did not fit the memory."""
    output = tmp_path / "cpu.json"
    on = frozenset({"cpu"})
    cases = {"a": Case(run=fills_the_memory, on=on), "b": Case(run=goes_well, on=on)}
    cases["c"] = Case(run=raises, on=frozenset({"cuda"}))
    monkeypatch.setattr(bench_run, "CASES", cases)
    bench_run.main(["--output", str(output)])
    figures = json.loads(output.read_text())["figures"]
    assert [row["figure"] for row in figures] == ["figure 1", "a", "what is wanted"]
    assert figures[1]["note"] == "OutOfMemoryError: CUDA out of memory"
    with pytest.raises(SystemExit):
        bench_run.main(["--only", "c"])
    assert "choose from a b" in capsys.readouterr().err


@pytest.fixture
def quick_to_collect():
    """Leave what the process has loaded to itself when garbage is collected, which else takes half a second."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("quick_to_collect")
def test_a_model_is_freed_before_the_next_is_made():
    """Guards against two models in memory at a time, of which one alone would fit."""
    alive = []

    class Model:
        def __init__(self):
            assert alive == []
            alive.append(self.__class__)

        def __del__(self):
            alive.clear()

    def make():
        model = Model()
        return lambda: model

    assert cost(make, CPU) is not None
    assert cost(make, CPU) is not None
    assert alive == []

    def too_large():
        model = Model()
        raise torch.OutOfMemoryError(f"{model} is too large")

    assert cost(too_large, CPU) is None
    assert alive == []


def test_lines_of_the_table():
    assert line({"figure": "a", "ours": 2.0, "twin": 6.0, "must": "2 x", "note": "b"}) == (
        "| a | 2 s | 6 s | 3.0 x | 2 x | b |"
    )
    assert line(held("a", 0.5, 0.1, "b")) == "| a |  |  |  | at most 0.1 | 0.5; b |"
    assert not held("a", float("nan"), 1)["passed"]
    assert held("a", 0, 0)["passed"]
