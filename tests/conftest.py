"""Fixtures: the original's golden files unpacked, a small drawn benchmark, and scripts run in process."""

import gc
import importlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from forks import ROOT as ROOT
from forks import Script, cool_down
from reports import run_page
from runtime.files import file_digest

# Before torch is loaded: two threads wait for each other at tensors so small.
os.environ["OMP_NUM_THREADS"] = "1"
os.fsync = lambda descriptor: None  # no test cuts the power
SOAK = os.environ.get("SOAK") == "1"  # `make soak`: many more cases
CASES: Counter[tuple[str, str]] = Counter()  # (what was tried, outcome) -> cases
# A busy machine fails no test.
settings.register_profile("anywhere", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("anywhere")


def one_of_each_kind(cases: Iterable, kind: Callable[..., Hashable]) -> list:
    """The first case of each kind; `make soak` takes all of them."""
    if SOAK:
        return list(cases)
    first: dict[Hashable, object] = {}
    for case in cases:
        first.setdefault(kind(case), case)
    return list(first.values())


def door(script: str) -> Callable[[list[str]], None]:
    """A script's main, imported when it is run: most tests need few of them."""
    return lambda argv: importlib.import_module(script).main(argv)


SCRIPTS = (
    "clip_fine_tune combiner_train validate cirr_test_submission fashioniq_test_submission circo_test_submission "
    "triplets_test_submission "
    "shapes_dataset"
)
DOORS = {script: door(script) for script in SCRIPTS.split()}


@pytest.fixture(scope="session", autouse=True)
def quick_to_see_dead_workers():
    """Let a DataLoader look for dead workers ten times a second; its own five seconds are only waited for."""
    from torch.utils.data import _utils, dataloader

    get = dataloader._MultiProcessingDataLoaderIter._try_get_data
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
        patch.setattr(get, "__defaults__", (0.1,))
        yield


def pytest_collection_finish():
    """Leave what is loaded out of all collections: trainings collect often, and would go through it each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    cool_down()


def pytest_sessionfinish(session):
    """A process among several sends its counts to the one that reports."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["cases"] = list(CASES.items())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Add up the counts of the processes."""
    for what, cases in getattr(node, "workeroutput", {}).get("cases", []):
        CASES[tuple(what)] += cases


def pytest_terminal_summary(terminalreporter):
    """Say how many damaged files were tried, and how many kills."""
    for (kind, outcome), cases in sorted(CASES.items()):
        terminalreporter.write_line(f"{kind}: {cases} {outcome}")


@pytest.fixture(autouse=True)
def curves_where_they_matter(request, monkeypatch):
    """Runs of other tests have pages without curves: drawing takes longer than all else of so small a training."""
    if request.node.get_closest_marker("draws") is None:
        monkeypatch.setattr(run_page, "can_draw", lambda: False)


@pytest.fixture(scope="session")
def golden(tmp_path_factory) -> Path:
    """Inputs and outputs of the original implementation, unpacked."""
    from original import unpack

    return unpack(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="session")
def expected(golden) -> dict:
    return json.loads((golden / "expected.json").read_text())


def digests(folder: Path) -> dict[Path, str]:
    """Files of a folder, by their path in it -> a digest of what they hold."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {file.relative_to(folder): file_digest(file) for file in files}


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> Iterator[Path]:
    """A data root with a small drawn benchmark and two tiny CLIPs. Not to be written to: see `own_drawn`."""
    folder = tmp_path_factory.mktemp("drawn")
    sizes = (
        "--train-triplets 12 --val-triplets 6 --train-groups 4 --val-groups 3 --circo-queries 8 "
    )
    sizes += "--own-groups 3"
    DOORS["shapes_dataset"](["--output-dir", str(folder), *sizes.split()])
    as_drawn = digests(folder)
    yield folder
    assert digests(folder) == as_drawn, "a test has changed what others read"


@pytest.fixture
def own_drawn(drawn, tmp_path) -> Path:
    """A copy of `drawn` whose annotations a test may damage, and which it may take images from: see `own_images`."""

    def copy_or_link(source: str, target: str) -> None:
        put = os.link if source.endswith((".jpg", ".png", ".pt")) else shutil.copy2
        put(source, target)

    return shutil.copytree(drawn, tmp_path / "data", copy_function=copy_or_link)


@pytest.fixture
def own_images(drawn, tmp_path) -> Path:
    """A copy of `drawn` in which a test may write into images too; copying all takes ten times as long."""
    return shutil.copytree(drawn, tmp_path / "data")


@pytest.fixture
def run(tmp_path):
    """Run a script's main in process, on the CPU without workers, with a data root; returns the output folder."""

    def run(door: str, data_root: Path, *flags: object, output: str = "out") -> Path:
        folder = tmp_path / output
        argv = [
            "--data-root",
            str(data_root),
            "--device",
            "cpu",
            "--num-workers",
            "0",
            *map(str, flags),
        ]
        DOORS[door](argv if door == "validate" else ["--output-dir", str(folder), *argv])
        return folder

    return run


@pytest.fixture
def fails(run, capsys):
    """Run a script that must refuse: exit code 2 and one line on stderr, which is returned."""

    def fails(door: str, data_root: Path, *flags: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(door, data_root, *flags)
        lines = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2
        errors = [line for line in lines if ": error: " in line]
        assert len(errors) == 1, lines
        assert lines[-1] == errors[0]
        assert not any("Traceback" in line for line in lines)
        return errors[0]

    return fails


@pytest.fixture
def index(drawn, tmp_path, capsys):
    """Bring an index up to date; returns what was printed."""

    def index(
        *folders, output=tmp_path / "index", name=drawn / "tiny_clip_vit.pt", flags=()
    ) -> str:
        words = [
            "index",
            "--images",
            *folders,
            "--output",
            output,
            "--clip-model-name",
            name,
            *flags,
        ]
        capsys.readouterr()
        importlib.import_module("search").main(
            list(map(str, [*words, "--num-workers", 0, "--device", "cpu"]))
        )
        return capsys.readouterr().out

    return index


@pytest.fixture
def ask(tmp_path, capsys):
    """Ask an index; returns what was printed."""

    def ask(image, text, *flags, of=tmp_path / "index") -> str:
        words = ["query", "--index", of, "--image", image, "--text", text, "--device", "cpu"]
        capsys.readouterr()
        importlib.import_module("search").main(list(map(str, [*words, *flags])))
        return capsys.readouterr().out

    return ask


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """How many images each batch had that was encoded."""
    from models import backbone

    sizes: list[int] = []
    real = backbone.normalise

    def normalise(pixels, *colours):
        sizes.append(len(pixels))
        return real(pixels, *colours)

    monkeypatch.setattr(backbone, "normalise", normalise)
    return sizes


@pytest.fixture
def start(tmp_path_factory):
    """Start Python with arguments as a process (see `Script`), which is gone after the test however that ends."""
    started = []

    def start(*words: object, fresh: bool = False, hold: int | None = None) -> Script:
        started.append(Script(words, tmp_path_factory.mktemp("process"), fresh, hold))
        return started[-1]

    yield start
    for process in started:
        process.end()


STAGE_1 = (
    "--num-epochs 2 --learning-rate 1e-4 --batch-size 12 --validation-frequency 1 --save-training"
)
STAGE_2 = (
    "--num-epochs 2 --combiner-lr 1e-3 --batch-size 12 --validation-frequency 1 --save-training "
    "--projection-dim 16 --hidden-dim 24"
)


@pytest.fixture
def stage_1(run, drawn):
    """Train stage 1 briefly on a drawn benchmark; returns the run folder."""

    def stage_1(
        dataset: str, *flags: object, data_root: Path = drawn, output: str = "clip"
    ) -> Path:
        name = ["--clip-model-name", drawn / "tiny_clip_vit.pt"]
        folder = run(
            "clip_fine_tune",
            data_root,
            "--dataset",
            dataset,
            *name,
            *STAGE_1.split(),
            *flags,
            output=output,
        )
        (only,) = folder.iterdir()
        return only

    return stage_1


@pytest.fixture
def stage_2(run, drawn, tmp_path):
    """Train stage 2 briefly on a drawn benchmark; returns the run folder."""

    def stage_2(
        dataset: str, *flags: object, data_root: Path = drawn, output: str = "combiner"
    ) -> Path:
        fixed = [
            "--clip-model-name",
            drawn / "tiny_clip_vit.pt",
            "--feature-cache",
            tmp_path / "features",
        ]
        folder = run(
            "combiner_train",
            data_root,
            "--dataset",
            dataset,
            *fixed,
            *STAGE_2.split(),
            *flags,
            output=output,
        )
        (only,) = folder.iterdir()
        return only

    return stage_2


def read_csv(file: Path) -> dict[str, list[float]]:
    """Columns of a CSV file."""
    from runs import columns

    return columns(file)


@pytest.fixture
def check(drawn, capsys):
    """Check files of submissions; returns exit code and output."""
    import check_submission

    def check(*words, root=drawn) -> tuple[int, str]:
        capsys.readouterr()
        try:
            check_submission.main(["--data-root", str(root), *map(str, words)])
        except SystemExit as stop:
            return stop.code, "".join(capsys.readouterr())
        return 0, capsys.readouterr().out

    return check
