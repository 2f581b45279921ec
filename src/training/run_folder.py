"""The folder of a run: its name, CSV files and page, who may write to it, and whether it is complete."""

import contextlib
import csv
import errno
import itertools
import json
import logging
import operator
import re
import shlex
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from benchmarks import best_of
from models.configuration import Settings
from models.names import open_clip_name
from reports.run_page import About, RunPage
from runtime import distributed, torchrun
from runtime.files import HALF_MADE, discard, folder_beside, locked, read_json, write_text
from runtime.schema import Schema, checked
from runtime.trackers import Account, Trackers
from training.data import TrainingData
from training.hyper_parameters import HYPER_PARAMETERS, read_hyper_parameters
from utils import PROJECT_ROOT, UserError, first_line

logger = logging.getLogger(__name__)

STATE = "state.pt"  # there until the run is complete
BEST_METRICS = "best_metrics.json"  # there when it is complete
DELETE = f"delete {BEST_METRICS} to go on with the run, or to begin it again"

Rows = list[dict[str, float]]


class BestRow(Schema):
    """A validation."""

    __pydantic_extra__: dict[str, float]
    epoch: Annotated[int, Field(ge=0)]


class BestMetrics(Schema):
    """best_metrics.json of a run: the best validation by each of some metrics."""

    __pydantic_extra__: dict[str, BestRow]


class Run:
    """The folder of a training, and the trackers that mirror it. Of several processes the main one alone writes.

    Every file is written whole at each change, so an interrupted run leaves all that it had.

    Attributes:
        rows: "train", "validation", "router" or "loss_scaling" -> the rows of its CSV file.
        resume_command: goes on with the training.

    Args:
        about: what its page says of it; a command "resume" is among its commands.
    """

    def __init__(self, folder: Path, trackers: Trackers, about: About) -> None:
        self.folder = folder
        self.trackers = trackers
        self.writes = distributed.is_main()
        self.resume_command = about.commands["resume"]
        self.page = RunPage(folder, about)
        self.rows: dict[str, Rows] = {}
        trackers.log_parameters(about.hyper_parameters)

    @property
    def state_file(self) -> Path:
        """All that is needed to go on with the training; there until it is complete."""
        return self.folder / STATE

    def locked(self) -> contextlib.AbstractContextManager:
        """Keep other trainings out of the folder while this one trains in it."""
        if not self.writes:
            return contextlib.nullcontext()
        return locked(
            self.folder,
            f"--resume {self.folder}: another process trains in it: stop that one first",
        )

    def record(self, kind: str, epoch: int, metrics: dict[str, float]) -> None:
        """Add a row to `{kind}_metrics.csv`; it takes the place of one that the epoch had before an interruption."""
        others = [row for row in self.rows.get(kind, []) if row["epoch"] != epoch]
        self.rows[kind] = [*others, {"epoch": epoch, **metrics}]
        self._write(kind)
        self.trackers.log_metrics(metrics, epoch)

    def draw(self) -> None:
        """Refresh the pictures, if they are due (see `RunPage`)."""
        if self.writes:
            self.page.refresh(self.rows, complete=False)

    def rewind(self, rows: dict[str, Rows]) -> None:
        """Go back to the rows that a saved state has; what was written after it will be written again."""
        self.rows = rows
        if not self.writes:
            return
        for half_made in list(self.folder.rglob(HALF_MADE)):  # of a process that was killed
            discard(half_made)
        for file in self.folder.glob("*_metrics.csv"):
            if file.name.removesuffix("_metrics.csv") not in rows:
                file.unlink()
        for kind in rows:
            self._write(kind)

    def complete(self, metrics: Iterable[str]) -> None:
        """Draw, write down the best validation by each of some metrics, the first of equals, and drop the state."""
        if not self.writes:
            return
        self.page.refresh(self.rows, complete=True)
        rows = self.rows.get("validation", [])
        best = {name: best_of(name)(rows, key=operator.itemgetter(name)) for name in metrics}
        write_text(self.folder / BEST_METRICS, json.dumps(best, indent=2) + "\n")
        self.state_file.unlink(missing_ok=True)
        self.trackers.finish()

    def _write(self, kind: str) -> None:
        if not self.writes:
            return
        import pandas as pd

        # As texts: a column with gaps keeps its whole numbers, and NaN is no gap.
        spelled = []
        for row in self.rows[kind]:
            spelled.append({name: str(value) for name, value in row.items()})
        table = pd.DataFrame(spelled).to_csv(index=False, lineterminator="\n")
        write_text(self.folder / f"{kind}_metrics.csv", table)


def run_name(stage: str, benchmark: str, clip_model_name: str) -> str:
    """`{stage}_on_{benchmark}_{clip}_{time}`.

    It is that of the original without what file systems or shells trip over: `:` in the time, and `/` in `ViT-B/32` or
    in a path.
    """
    model = re.sub(r"[^\w.@-]+", "-", short_name(clip_model_name))
    return f"{stage}_on_{benchmark}_{model}_{time.strftime('%Y-%m-%d_%H-%M-%S')}"


def short_name(clip_model_name: str) -> str:
    """What a CLIP is called where there is little room: without its folder, or without its weights."""
    known = open_clip_name(clip_model_name)
    if known is not None:
        return known.short
    return Path(clip_model_name).stem if clip_model_name.endswith(".pt") else clip_model_name


def run_title(benchmark: str, settings: Settings) -> str:
    """What a run is to a reader: dataset and method."""
    flags = settings.flags
    clip = short_name(settings.preprocessing["clip_model_name"])
    if flags["script"] == "clip_fine_tune.py":
        encoder = flags["encoder"]
        encoders = "both encoders" if encoder == "both" else f"{encoder} encoder"
        return f"{benchmark}: {clip} fine-tuned, {encoders}"
    is_plain = flags["combiner_type"] == "clip4cir"
    kind = "CLIP4Cir's Combiner" if is_plain else "MoE Combiner"
    tuned = "fine-tuned " if flags["clip_model_path"] else ""
    seeds = flags["seeds"] or [flags["seed"]]
    named = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    return f"{benchmark}: {kind} on {tuned}{clip}, {named}"


def make_folder(parent: Path, name: str, config: Mapping[str, Any]) -> Path:
    """A new folder `name`, or `name_2` and so on, never one that exists; its hyper-parameters are in it from the start.

    It is made beside and renamed, which fails where a folder with files is, so two runs of one second share none.
    """
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    candidates = itertools.chain([name], numbered)
    with folder_beside(parent / name) as new:
        write_text(new / HYPER_PARAMETERS, json.dumps(config, indent=4, sort_keys=True))
        while True:
            folder = parent / next(candidates)
            with contextlib.suppress(FileExistsError, NotADirectoryError):
                return _renamed(new, folder)


def drop_half_made(parent: Path) -> None:
    """Drop what `make_folder` left where it was killed, in a folder that nobody else makes folders in."""
    for folder in parent.glob(HALF_MADE):
        discard(folder)


def _renamed(new: Path, folder: Path) -> Path:
    try:
        return new.rename(folder)
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise FileExistsError from None
        if isinstance(error, FileExistsError | NotADirectoryError):
            raise
        raise UserError(
            f"--output-dir {folder.parent}: cannot make {folder} ({error.strerror})"
        ) from None


def claim_folder(parent: Path, name: str, config: Mapping[str, Any], resumed: Path | None) -> Path:
    """The folder of a run, on every process: the one that is resumed, else a new one (see `make_folder`)."""
    if resumed:
        return resumed
    made = str(make_folder(parent, name, config)) if distributed.is_main() else ""
    return Path(distributed.same_text(made))


def open_run(folder: Path, about: About, flags: Any) -> Run:
    """Return the run in a claimed folder, mirrored by the trackers that its flags name."""
    account = Account(
        folder=folder,
        name=flags.experiment_name or folder.name,
        api_key=flags.api_key,
        workspace=flags.workspace,
    )
    return Run(folder, Trackers(flags.tracker if distributed.is_main() else [], account), about)


def about_run(
    data: TrainingData, settings: Settings, folder: Path, validated: Mapping[str, Any]
) -> About:
    """Return what the page of a run says, and how it is resumed.

    Args:
        folder: what `--resume` takes.
        validated: flags of `validate.py` for the weights to look at, without their dashes; None where there are none.
    """
    flags = settings.flags
    titles = data.benchmark.titles_in(data.val)
    scripts = PROJECT_ROOT / "src"
    resume = shlex.join([str(scripts / flags["script"]), "--resume", str(folder.absolute())])
    commands = {"resume": f"{torchrun.command()} {resume}"}
    if None not in validated.values():
        words = ["python", str(scripts / "validate.py"), "--dataset", data.benchmark.name]
        words += ["--data-root", flags["data_root"]]
        for name, value in validated.items():
            absolute = value.absolute() if isinstance(value, Path) else value
            words += [f"--{name}", str(absolute)]
        commands["validate"] = shlex.join(words)
    commands["reproduce"] = reproducing(flags)
    return About(
        title=run_title(data.benchmark.name, settings),
        titles=titles,
        units={metric: known.unit for metric, known in data.benchmark.reported.items()},
        chosen_by=tuple(data.benchmark.selection),
        hyper_parameters=settings.table,
        commands=commands,
    )


def reproducing(flags: Mapping[str, Any]) -> str:
    """Return the command that began a run, from any folder: what it names is found from where it was typed.

    Args:
        flags: of the run; `started_in` is None where no file can hold the name of that folder.
    """
    python, script, rest = flags["command"].partition(f"src/{flags['script']}")
    if flags["started_in"] is None or not script:
        return flags["command"]
    at = shlex.quote(str(PROJECT_ROOT / script))
    return f"cd {shlex.quote(flags['started_in'])} && {python}{at}{rest}"


def is_complete(folder: Path) -> bool:
    """Whether the training in a run's folder came to its end; a state that it could not drop any more goes.

    That is told by its records: a file that says so may be of another run.

    Raises:
        UserError: `best_metrics.json` is of no such end, and there is no state to go on from.
    """
    if not (folder / BEST_METRICS).exists():
        return False
    flags = read_hyper_parameters(folder).flags
    if flags.get("seeds"):  # of stage 2
        return _seeds_are_complete(folder, flags["seeds"])
    try:
        _check_end(folder, flags)
    except UserError as error:
        if not (folder / STATE).exists():
            raise
        logger.warning("warning: %s; going on from %s", error, STATE)
        return False
    if distributed.is_main():
        (folder / STATE).unlink(missing_ok=True)
    return True


def seed_folder(folder: Path, seed: int) -> Path:
    """The folder of one seed's run below that of all."""
    return folder / f"seed_{seed}"


def read_best(folder: Path) -> dict[str, dict[str, float]]:
    """Metric -> the best validation by it, of a run that is complete. Raises UserError where the file is damaged."""
    file = folder / BEST_METRICS
    content = read_json(file, "the training")
    checked(BestMetrics, content, file=file, remedy=DELETE)
    return content


def best_validation(folder: Path, metric: str) -> dict[str, float]:
    """The best validation by a metric, of a run that is complete. Raises UserError where it is not written down."""
    best = read_best(folder)
    if metric not in best:
        raise UserError(f"{folder / BEST_METRICS}: {metric}: field required: {DELETE}")
    return best[metric]


def _seeds_are_complete(folder: Path, seeds: list[int]) -> bool:
    """Whether every seed's training came to its end, and the summary is of these."""
    folders = {str(seed): seed_folder(folder, seed) for seed in seeds}
    if not all(is_complete(of_seed) for of_seed in folders.values()):
        return False
    summary = read_json(folder / BEST_METRICS, "the training")
    if not isinstance(summary, dict):
        return False
    metric = str(summary.get("chosen_by"))
    best = {seed: read_best(of_seed).get(metric) for seed, of_seed in folders.items()}
    return summary.get("seeds") == best


def _check_end(folder: Path, flags: Mapping[str, Any]) -> None:
    """Raise UserError where `best_metrics.json` is not what the records of a whole training say."""
    file = folder / BEST_METRICS
    best = read_best(folder)
    if not best:
        raise UserError(f"{file} names no metric: {DELETE}")
    for kind, every in (("train", 1), ("validation", flags["validation_frequency"])):
        expected = set(range(0, flags["num_epochs"], every))
        epochs = {row["epoch"] for row in read_rows(folder, kind)}
        if epochs != expected:
            raise UserError(
                f"{file} is not of this run: {kind}_metrics.csv has {len(epochs)} of {len(expected)} epochs: {DELETE}"
            )
    validations = read_rows(folder, "validation")
    for metric, row in best.items():
        measured = [validation for validation in validations if metric in validation]
        if not measured or row != best_of(metric)(measured, key=operator.itemgetter(metric)):
            raise UserError(
                f"{file} is not of this run: {metric} is not the best of validation_metrics.csv: {DELETE}"
            )


def read_rows(folder: Path, kind: str) -> Rows:
    """The rows of a CSV file of a run; none where there is no such file.

    Raises:
        UserError: it is damaged.
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
