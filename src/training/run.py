"""One run on disk: its folder and CSV files, its page, and what mirrors it."""

import contextlib
import csv
import errno
import io
import itertools
import json
import logging
import operator
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from reports.run_page import About, RunPage
from runtime import distributed
from runtime.files import HALF_MADE, beside, locked, write_text
from training.hyper_parameters import HYPER_PARAMETERS
from training.tracker import NoTracker
from utils import UserError

logger = logging.getLogger(__name__)

STATE = "state.pt"  # there until the run is complete
BEST_METRICS = "best_metrics.json"  # there when it is complete

Rows = list[dict[str, float]]


class Run:
    """The folder of a training, and the tracker that mirrors it.

    Every file is written whole at each change, so an interrupted run leaves all that it had.

    Attributes:
        rows: "train", "validation", "router" or "loss_scaling" -> the rows of its CSV file.
        resume_command: goes on with the training.

    Args:
        about: what its page says of it; a command "resume" is among its commands.
    """

    def __init__(self, folder: Path, tracker: NoTracker, about: About) -> None:
        self.folder = folder
        self.tracker = tracker
        self.resume_command = about.commands["resume"]
        self.page = RunPage(folder, about)
        self.rows: dict[str, Rows] = {}
        tracker.log_parameters(about.hyper_parameters)

    @property
    def state_file(self) -> Path:
        """All that is needed to go on with the training; there until it is complete."""
        return self.folder / STATE

    def locked(self) -> contextlib.AbstractContextManager:
        """Keep other processes out of the folder while this one trains in it."""
        return locked(
            self.folder,
            f"--resume {self.folder}: another process trains in it: stop that one first",
        )

    def record(self, kind: str, epoch: int, metrics: dict[str, float]) -> None:
        """Add a row to `{kind}_metrics.csv`; it takes the place of one that the epoch had before an interruption."""
        others = [row for row in self.rows.get(kind, []) if row["epoch"] != epoch]
        self.rows[kind] = [*others, {"epoch": epoch, **metrics}]
        self._write(kind)
        self.tracker.log_metrics(metrics, epoch)

    def draw(self) -> None:
        """Refresh the pictures, if they are due (see `RunPage`)."""
        self.page.refresh(self.rows, complete=False)

    def rewind(self, rows: dict[str, Rows]) -> None:
        """Go back to the rows that a saved state has; what was written after it will be written again."""
        for file in self.folder.rglob(HALF_MADE):  # of a process that was killed
            file.unlink()
        self.rows = rows
        for file in self.folder.glob("*_metrics.csv"):
            kind = file.name.removesuffix("_metrics.csv")
            if kind not in rows:
                file.unlink()
        for kind in rows:
            self._write(kind)

    def complete(self, metrics: Iterable[str]) -> None:
        """Draw, write down the best validation by each of some metrics, the first of equals, and drop the state."""
        self.page.refresh(self.rows, complete=True)
        rows = self.rows.get("validation", [])
        best = {name: max(rows, key=operator.itemgetter(name)) for name in metrics}
        write_text(self.folder / BEST_METRICS, json.dumps(best, indent=2) + "\n")
        self.state_file.unlink(missing_ok=True)

    def _write(self, kind: str) -> None:
        rows = self.rows[kind]
        names = dict.fromkeys(itertools.chain.from_iterable(rows))
        table = io.StringIO()
        writer = csv.DictWriter(table, list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.folder / f"{kind}_metrics.csv", table.getvalue())


class NoRun:
    """A run as the processes see it that leave the writing to another; it has the methods of the real one."""

    def __init__(self, folder: Path, about: About) -> None:
        self.folder = folder
        self.state_file = folder / STATE
        self.resume_command = about.commands["resume"]
        self.rows: dict[str, Rows] = {}

    def locked(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def record(self, kind: str, epoch: int, metrics: dict[str, float]) -> None: ...

    def draw(self) -> None: ...

    def rewind(self, rows: dict[str, Rows]) -> None: ...

    def complete(self, metrics: Iterable[str]) -> None: ...


AnyRun = Run | NoRun


def run_name(stage: str, benchmark: str, clip_model_name: str) -> str:
    """`{stage}_on_{benchmark}_{clip}_{time}`.

    It is that of the original without what file systems or shells trip over: `:` in the time, and `/` in `ViT-B/32` or
    in a path.
    """
    stem = Path(clip_model_name).stem if clip_model_name.endswith(".pt") else clip_model_name
    model = re.sub(r"[^\w.@-]+", "-", stem)
    return f"{stage}_on_{benchmark}_{model}_{time.strftime('%Y-%m-%d_%H-%M-%S')}"


def make_folder(parent: Path, name: str, config: Mapping[str, Any]) -> Path:
    """A new folder `name`, or `name_2` and so on, never one that exists; its hyper-parameters are in it from the start.

    It is made beside and renamed, which fails where a folder with files is, so two runs of one second share none.
    """
    new = beside(parent / name)
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    candidates = itertools.chain([name], numbered)
    try:
        write_text(new / HYPER_PARAMETERS, json.dumps(config, indent=4, sort_keys=True))
        while True:
            folder = parent / next(candidates)
            with contextlib.suppress(FileExistsError, NotADirectoryError):
                return _renamed(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def drop_half_made(parent: Path) -> None:
    """Drop what `make_folder` left in a folder where it was killed."""
    for folder in parent.glob(HALF_MADE):
        shutil.rmtree(folder, ignore_errors=True)


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


def open_run(folder: Path, tracker: NoTracker, about: About) -> AnyRun:
    """The run in a claimed folder: the one process that writes gets it."""
    return Run(folder, tracker, about) if distributed.is_main() else NoRun(folder, about)


def is_complete(folder: Path) -> bool:
    """Whether the training in a run's folder came to its end; a state that it could not drop any more goes."""
    complete = (folder / BEST_METRICS).exists()
    if complete and distributed.is_main():
        (folder / STATE).unlink(missing_ok=True)
    return complete
