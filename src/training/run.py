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
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from models.configuration import Settings
from models.names import open_clip_name
from reports.run_page import About, RunPage
from runtime import distributed
from runtime.files import HALF_MADE, discard, folder_beside, locked, read_json, write_text
from runtime.trackers import Account, Trackers
from training.hyper_parameters import HYPER_PARAMETERS, read_hyper_parameters
from training.state import REMEDY
from utils import UserError, first_line

logger = logging.getLogger(__name__)

STATE = "state.pt"  # there until the run is complete
BEST_METRICS = "best_metrics.json"  # there when it is complete
DELETE = f"delete {BEST_METRICS} to go on with the run, or to begin it again"

Rows = list[dict[str, float]]


class Run:
    """The folder of a training, and the trackers that mirror it.

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
        self.resume_command = about.commands["resume"]
        self.page = RunPage(folder, about)
        self.rows: dict[str, Rows] = {}
        trackers.log_parameters(about.hyper_parameters)

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
        self.trackers.log_metrics(metrics, epoch)

    def draw(self) -> None:
        """Refresh the pictures, if they are due (see `RunPage`)."""
        self.page.refresh(self.rows, complete=False)

    def rewind(self, rows: dict[str, Rows]) -> None:
        """Go back to the rows that a saved state has; what was written after it will be written again.

        Raises:
            UserError: a row lacks what the run's page shows.
        """
        needed = {
            "train": ["train_epoch_loss"],
            "loss_scaling": ["loss_scale", "skipped_steps"],
            "validation": [*self.page.about.titles, *self.page.about.chosen_by],
            "router": list(next(iter(rows.get("router", [])), {})),
        }
        for kind, names in needed.items():
            for row in rows.get(kind, []):
                missing = [name for name in names if name not in row]
                if missing:
                    place = f"progress.rows.{kind} of {self.state_file}"
                    raise UserError(f"--resume: {place} lacks {missing[0]}: {REMEDY}")
        for half_made in list(self.folder.rglob(HALF_MADE)):  # of a process that was killed
            discard(half_made)
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
        self.trackers.finish()

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
    model = re.sub(r"[^\w.@-]+", "-", short_name(clip_model_name))
    return f"{stage}_on_{benchmark}_{model}_{time.strftime('%Y-%m-%d_%H-%M-%S')}"


def short_name(clip_model_name: str) -> str:
    """What a CLIP is called where there is little room: without its folder, or without its weights."""
    known = open_clip_name(clip_model_name)
    if known is not None:
        return known.short
    return Path(clip_model_name).stem if clip_model_name.endswith(".pt") else clip_model_name


def run_title(benchmark: str, settings: Settings) -> str:
    """What a run is to a reader: dataset and method. A run of an earlier version may lack flags that came later."""
    flags = settings.flags
    clip = short_name(settings.recipe["clip_model_name"])
    if flags["script"] == "clip_fine_tune.py":
        encoder = flags.get("encoder", "both")
        encoders = "both encoders" if encoder == "both" else f"{encoder} encoder"
        return f"{benchmark}: {clip} fine-tuned, {encoders}"
    is_plain = flags.get("combiner_type") == "clip4cir"
    kind = "CLIP4Cir's Combiner" if is_plain else "MoE Combiner"
    tuned = "fine-tuned " if flags.get("clip_model_path") else ""
    seeds = flags.get("seeds") or [flags.get("seed", 0)]
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


def open_run(account: Account, trackers: Sequence[str], about: About) -> AnyRun:
    """The run in a claimed folder: the one process that writes gets it.

    Args:
        trackers: names of those that mirror it.
    """
    if not distributed.is_main():
        return NoRun(account.folder, about)
    return Run(account.folder, Trackers(trackers, account), about)


def is_complete(folder: Path) -> bool:
    """Whether the training in a run's folder came to its end; a state that it could not drop any more goes.

    That is told by its records: a file that says so may be of another run.

    Raises:
        UserError: `best_metrics.json` is of no such end, and there is no state to go on from.
    """
    if not (folder / BEST_METRICS).exists():
        return False
    flags = read_hyper_parameters(folder).flags
    if flags.get("seeds"):
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
    from runtime.schema import checked
    from training.schemas import BestMetrics

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
    for kind, every in (("train", 1), ("validation", flags.get("validation_frequency", 1))):
        expected = set(range(0, flags["num_epochs"], every))
        epochs = {row["epoch"] for row in read_rows(folder, kind)}
        if epochs != expected:
            raise UserError(
                f"{file} is not of this run: {kind}_metrics.csv has {len(epochs)} of {len(expected)} epochs: {DELETE}"
            )
    validations = read_rows(folder, "validation")
    for metric, row in best.items():
        if row != max(validations, key=lambda validation: validation.get(metric, -1)):
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
