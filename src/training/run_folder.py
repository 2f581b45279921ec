"""Manage run folders: their names, CSV files and pages, the lock, and whether a run is complete."""

import contextlib
import csv
import errno
import gc
import itertools
import json
import logging
import operator
import platform
import re
import shlex
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import best_of
from models.configuration import Settings
from models.names import short_name
from reports.run_page import About, RunPage
from runtime import distributed, torchrun
from runtime.files import HALF_MADE, discard, folder_beside, locked, write_text
from runtime.trackers import Account, Trackers
from training.data import TrainingData
from training.hyper_parameters import HYPER_PARAMETERS
from utils import PROJECT_ROOT, UserError, first_line, flag

logger = logging.getLogger(__name__)

STATE = "state.pt"  # exists until the run is complete
BEST_METRICS = "best_metrics.json"  # exists when the run is complete
DELETE = f"delete {BEST_METRICS} to resume the run, or to restart it"

CsvRows = list[dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Folder and settings of one training run.

    Attributes:
        folder: the run folder, which contains the hyper-parameters.
        resumed_by: value of `--resume`: the same folder, or the folder of all seeds.
        settings: settings of the training run.
    """

    folder: Path
    resumed_by: Path
    settings: Settings

    @property
    def seed(self) -> int:
        """Return the seed of the training run."""
        return int(self.settings.flags["seed"])


class Run:
    """A run folder, and the trackers that mirror it. Of several processes, only the main one writes.

    Every change rewrites the complete file, so an interrupted run keeps all of its records.

    Attributes:
        rows: "train", "validation", "router" or "loss_scaling" -> the rows of its CSV file.
        resume_command: command that resumes the training run.

    Args:
        about: content of the run's page; its commands include "resume".
    """

    def __init__(self, folder: Path, trackers: Trackers, about: About) -> None:
        self.folder = folder
        self.trackers = trackers
        self.writes = distributed.is_main()
        self.resume_command = about.commands["resume"]
        self.page = RunPage(folder, about)
        self.rows: dict[str, CsvRows] = {}
        trackers.log_parameters(about.hyper_parameters)

    @property
    def state_file(self) -> Path:
        """Return the file with everything needed to resume the training run; it exists until the run is complete."""
        return self.folder / STATE

    def locked(self) -> contextlib.AbstractContextManager:
        """Return a context that keeps other training runs out of the folder."""
        if not self.writes:
            return contextlib.nullcontext()
        return locked(
            self.folder,
            f"--resume {self.folder}: another process is training in this folder: stop that process first",
        )

    def record(self, kind: str, epoch: int, metrics: dict[str, float]) -> None:
        """Add a row to `{kind}_metrics.csv`, in place of any row that the epoch had before an interruption."""
        others = [row for row in self.rows.get(kind, []) if row["epoch"] != epoch]
        self.rows[kind] = [*others, {"epoch": epoch, **metrics}]
        self._write(kind)
        self.trackers.log_metrics(metrics, epoch)

    def draw(self, spent: Mapping[str, str]) -> None:
        """Refresh the pictures if they are due (see `RunPage`)."""
        if self.writes:
            self.page.refresh(self.rows, spent, complete=False)

    def rewind(self, rows: dict[str, CsvRows]) -> None:
        """Restore the rows of a saved state. Later rows are dropped, and training writes them again."""
        self.rows = rows
        if not self.writes:
            return
        for half_made in list(self.folder.rglob(HALF_MADE)):  # left by a killed process
            discard(half_made)
        for file in self.folder.glob("*_metrics.csv"):
            if file.name.removesuffix("_metrics.csv") not in rows:
                file.unlink()
        for kind in rows:
            self._write(kind)

    def complete(self, metrics: Iterable[str], spent: Mapping[str, str]) -> None:
        """Draw the page, write the best validation by each metric, and delete the state.

        If several validations are equally good, the first one is the best.
        """
        if not self.writes:
            return
        self.page.refresh(self.rows, spent, complete=True)
        rows = self.rows.get("validation", [])
        best = {name: best_of(name)(rows, key=operator.itemgetter(name)) for name in metrics}
        write_text(self.folder / BEST_METRICS, json.dumps(best, indent=2) + "\n")
        self.state_file.unlink(missing_ok=True)
        self.trackers.finish()

    def _write(self, kind: str) -> None:
        if not self.writes:
            return
        import pandas as pd

        # Write values as text: pandas would turn whole numbers in a column with gaps into floats, and NaN into a gap.
        spelled = []
        for row in self.rows[kind]:
            spelled.append({name: str(value) for name, value in row.items()})
        table = pd.DataFrame(spelled).to_csv(index=False, lineterminator="\n")
        write_text(self.folder / f"{kind}_metrics.csv", table)


def run_name(stage: str, benchmark: str, clip_model_name: str) -> str:
    """Return `{stage}_on_{benchmark}_{clip}_{time}`.

    This is the original implementation's name without characters that cause trouble in file systems or shells: `:` in
    the time, and `/` in `ViT-B/32` or in a path.
    """
    model = re.sub(r"[^\w.@-]+", "-", short_name(clip_model_name))
    return f"{stage}_on_{benchmark}_{model}_{time.strftime('%Y-%m-%d_%H-%M-%S')}"


def run_title(benchmark: str, settings: Settings) -> str:
    """Return the title of a run: dataset and method."""
    flags = settings.flags
    clip = short_name(settings.preprocessing["clip_model_name"])
    seeds = flags.get("seeds") or [flags["seed"]]
    named = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    if flags["script"] == "clip_fine_tune.py":
        encoder = flags["encoder"]
        encoders = "both encoders" if encoder == "both" else f"{encoder} encoder"
        by_seed = f", {named}" if flags.get("seeds") else ""
        return f"{benchmark}: {clip} fine-tuned, {encoders}{by_seed}"
    titles = {"moe": "MoE Combiner", "clip4cir": "CLIP4Cir's Combiner"}
    kind = titles.get(flags["combiner_type"], f"Combiner {flags['combiner_type']}")
    tuned = "fine-tuned " if flags["clip_model_path"] else ""
    return f"{benchmark}: {kind} on {tuned}{clip}, {named}"


def make_folder(parent: Path, name: str, config: Mapping[str, Any]) -> Path:
    """Create a new folder `name`, or `name_2` and so on if that exists, with its hyper-parameters already in it.

    The folder is created under a temporary name and renamed. Renaming fails if a folder with files has that name, so
    two runs that start in the same second get different folders.
    """
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    candidates = itertools.chain([name], numbered)
    with folder_beside(parent / name) as new:
        write_text(new / HYPER_PARAMETERS, json.dumps(config, indent=4, sort_keys=True))
        while True:
            folder = parent / next(candidates)
            with contextlib.suppress(FileExistsError, NotADirectoryError):
                return _renamed(new, folder)


def _renamed(new: Path, folder: Path) -> Path:
    try:
        return new.rename(folder)
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise FileExistsError from None
        if isinstance(error, FileExistsError | NotADirectoryError):
            raise
        raise UserError(
            f"--output-dir {folder.parent}: cannot create {folder} ({error.strerror})"
        ) from None


def claim_place(stage: str, benchmark: str, settings: Settings, flags: Any) -> Place:
    """Return the place of a training run on every process: the run to resume, or a new folder, see `make_folder`.

    Args:
        stage, benchmark: see `run_name`.
    """
    folder = flags.resume
    if not folder:
        name = run_name(stage, benchmark, settings.preprocessing["clip_model_name"])
        made = ""
        if distributed.is_main():
            made = str(make_folder(flags.output_dir, name, settings.on_disk()))
        folder = Path(distributed.same_object(made))
    return Place(folder=folder, resumed_by=folder, settings=settings)


def seed_places(whole: Place) -> list[Place]:
    """Return the place of each seed's training run, below the folder of all seeds; empty without `--seeds`."""
    places = []
    for seed in whole.settings.flags.get("seeds") or []:
        settings = whole.settings.with_flags(seed=seed, seeds=None)
        folder = whole.folder / f"seed_{seed}"
        places.append(Place(folder=folder, resumed_by=whole.folder, settings=settings))
    return places


def places_to_train(whole: Place) -> Iterator[Place]:
    """Yield the only place, or the place of each seed that is not complete.

    The folder of a seed is created when its turn comes.
    """
    places = seed_places(whole)
    if not places:
        yield whole
        return
    if distributed.is_main():
        for folder in whole.folder.glob(HALF_MADE):  # a seed's folder, left by a killed process
            discard(folder)
    for place in places:
        if distributed.is_main() and not place.folder.exists():
            make_folder(whole.folder, place.folder.name, place.settings.on_disk())
        distributed.wait_for_all()
        if is_complete(place.folder):
            logger.info("seed %d is complete", place.seed)
        else:
            yield place
            gc.collect()  # free the optimizer's memory before the next seed
    distributed.wait_for_all()


def open_run(place: Place, data: TrainingData, flags: Any, *, weights: Path | None) -> Run:
    """Open the run in a folder, and mirror it to the trackers that its flags list.

    Args:
        weights: weights for the `validate.py` command on the page; None if none are saved.
    """
    account = Account(
        folder=place.folder,
        name=flags.experiment_name or place.folder.name,
        api_key=flags.api_key,
        workspace=flags.workspace,
    )
    trackers = Trackers(flags.tracker if distributed.is_main() else [], account)
    return Run(place.folder, trackers, about_run(place, data, weights))


def about_run(place: Place, data: TrainingData, weights: Path | None) -> About:
    """Return the content of a run's page, including the command to resume the run."""
    flags = place.settings.flags
    benchmark = data.benchmark
    titles = benchmark.titles_in(data.val)
    scripts = PROJECT_ROOT / "src"
    resume = [str(scripts / flags["script"]), "--resume", str(place.resumed_by.absolute())]
    commands = {"resume": f"{torchrun.command()} {shlex.join(resume)}"}
    if weights:
        words = ["python", str(scripts / "validate.py"), "--dataset", benchmark.name]
        words += ["--data-root", flags["data_root"]]
        for name, value in pair_with(weights.absolute(), flags).items():
            words += [flag(name), str(value)]
        commands["validate"] = shlex.join(words)
    commands["reproduce"] = reproducing(flags)
    return About(
        title=run_title(benchmark.name, place.settings),
        titles=titles,
        units={metric: known.unit for metric, known in benchmark.reported.items()},
        chosen_by=tuple(benchmark.selection),
        hyper_parameters=place.settings.table,
        commands=commands,
        made_by={"host": platform.node(), "commit": commit()},
        overview="" if place.folder == place.resumed_by else "../index.html",
    )


def commit() -> str:
    """Return the commit of the code, with "-dirty" if files differ from it, or "unknown" if git fails."""
    # Otherwise git would describe a repository that contains the project's folder.
    words = ["git", f"--git-dir={PROJECT_ROOT / '.git'}", f"--work-tree={PROJECT_ROOT}"]
    words += ["describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def pair_with(weights: Path, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags of validate.py, by name, that evaluate a training run's weights."""
    if flags["script"] == "clip_fine_tune.py":
        return {"combining_function": "sum", "clip_model_path": weights}
    pair = {"combining_function": "combiner", "combiner_path": weights}
    if flags["clip_model_path"]:
        pair["clip_model_path"] = Path(flags["clip_model_path"])
    return pair


def reproducing(flags: Mapping[str, Any]) -> str:
    """Return the command that started a run, preceded by the command to change to the folder it was started in.

    Args:
        flags: flags of the run; `started_in` is None if the folder has a name that cannot be written to a file.
    """
    python, script, rest = flags["command"].partition(f"src/{flags['script']}")
    if flags["started_in"] is None or not script:
        return flags["command"]
    at = shlex.quote(str(PROJECT_ROOT / script))
    return f"cd {shlex.quote(flags['started_in'])} && {python}{at}{rest}"


def is_complete(folder: Path) -> bool:
    """Check whether the run in a folder is complete: its best metrics are written, and its state is deleted."""
    return (folder / BEST_METRICS).exists() and not (folder / STATE).exists()


def best_validation(folder: Path, metric: str) -> dict[str, float]:
    """Return a run's best validation by a metric, the first one if several are equal.

    Raises:
        UserError: the records are damaged.
    """
    rows = [row for row in read_rows(folder, "validation") if metric in row]
    if not rows:
        raise UserError(f"{folder}: no validation in validation_metrics.csv has {metric}: {DELETE}")
    best = best_of(metric)(rows, key=operator.itemgetter(metric))
    return {**best, "epoch": int(best["epoch"])}


def read_rows(folder: Path, kind: str) -> CsvRows:
    """Return the rows of a run's CSV file, or an empty list if the file does not exist.

    Raises:
        UserError: the file is damaged.
    """
    file = folder / f"{kind}_metrics.csv"
    try:
        with open(file, newline="", encoding="utf-8") as lines:
            texts = list(csv.DictReader(lines))
        rows = []
        for row in texts:
            rows.append({name: float(text) for name, text in row.items() if text})
        return rows
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{file} is damaged ({first_line(error)}): {DELETE}") from None
