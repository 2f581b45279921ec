"""Log a run to one or more trackers (Comet, TensorBoard, Weights & Biases), in addition to its CSV files.

To add a tracker, write a class here and add it to TRACKERS. A tracker's package is imported on
demand.
"""

import contextlib
import hashlib
import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.choices import HYPER_PARAMETERS
from utils import UserError, first_line

logger = logging.getLogger(__name__)

PROJECT = "CLIP4Cir-MoE"


@dataclass(frozen=True, kw_only=True)
class Account:
    """Description of a run that a tracker receives at its start.

    Attributes:
        folder: run folder.
        name: name of the run in the tracker.
        api_key, workspace: Comet's key and workspace, if flags set them instead of Comet's own
            settings.
    """

    folder: Path
    name: str
    api_key: str | None = None
    workspace: str | None = None

    @property
    def key(self) -> str:
        """Return an alphanumeric ID of the run, which stays the same when it is resumed or its folder is moved."""
        started = (self.folder / HYPER_PARAMETERS).read_bytes()
        return hashlib.sha256(self.folder.name.encode() + started).hexdigest()[:40]


class Tracker:
    """Base of all trackers.

    Attributes:
        module, package: name of the module to import, and of the package that pip installs.
    """

    module: str
    package: str

    def __init__(self, account: Account) -> None:
        raise NotImplementedError

    @staticmethod
    def failures() -> tuple[type[Exception], ...]:
        """Return the exceptions that are raised if the tracker cannot be reached or denies access."""
        return OSError, ValueError, RuntimeError

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Log a run's hyper-parameters."""

    def log_metrics(self, metrics: Mapping[str, float], epoch: int) -> None:
        """Log metrics of an epoch."""

    def finish(self) -> None:
        """Send all remaining data at the end of a complete run."""


class Comet(Tracker):
    """Tracker for Comet. A resumed run continues in the same experiment."""

    module = "comet_ml"
    package = "comet-ml"

    def __init__(self, account: Account) -> None:
        import comet_ml

        self.experiment = comet_ml.start(
            api_key=account.api_key,
            workspace=account.workspace,
            project_name=PROJECT,
            experiment_key=account.key,
            mode="get_or_create",
        )
        self.experiment.set_name(account.name)

    @staticmethod
    def failures() -> tuple[type[Exception], ...]:
        import comet_ml.exceptions

        return comet_ml.exceptions.CometException, *Tracker.failures()

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        self.experiment.log_parameters(dict(parameters))

    def log_metrics(self, metrics: Mapping[str, float], epoch: int) -> None:
        self.experiment.log_metrics(dict(metrics), epoch=epoch)

    def finish(self) -> None:
        self.experiment.end()


class TensorBoard(Tracker):
    """Tracker for TensorBoard, in a subfolder of the run folder. Epochs that a resumed run repeats are replaced."""

    module = "tensorboard"
    package = "tensorboard"

    def __init__(self, account: Account) -> None:
        self.folder = account.folder / "tensorboard"
        self.writer: Any = None
        self.parameters = ""

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        rows = (f"| {name} | {value} |" for name, value in sorted(parameters.items()))
        self.parameters = "\n".join(["| flag | value |", "|---|---|", *rows])

    def log_metrics(self, metrics: Mapping[str, float], epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self.writer is None:
            self.writer = SummaryWriter(str(self.folder), purge_step=epoch)
            self.writer.add_text("hyper-parameters", self.parameters, epoch)
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()

    def finish(self) -> None:
        if self.writer is not None:
            self.writer.close()


class Wandb(Tracker):
    """Tracker for Weights & Biases. A resumed run continues in the same run."""

    module = "wandb"
    package = "wandb"

    def __init__(self, account: Account) -> None:
        import wandb

        self.run = wandb.init(
            project=PROJECT,
            name=account.name,
            id=account.key,
            resume="allow",
            dir=str(account.folder),
        )
        self.run.define_metric("*", step_metric="epoch")

    @staticmethod
    def failures() -> tuple[type[Exception], ...]:
        import wandb.errors

        return wandb.errors.Error, *Tracker.failures()

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        self.run.config.update(dict(parameters), allow_val_change=True)

    def log_metrics(self, metrics: Mapping[str, float], epoch: int) -> None:
        self.run.log({**metrics, "epoch": epoch})

    def finish(self) -> None:
        self.run.finish()


TRACKERS: dict[str, type[Tracker]] = {"comet": Comet, "tensorboard": TensorBoard, "wandb": Wandb}


class Trackers:
    """Any number of trackers as one. A tracker that fails is dropped with a warning, and training continues."""

    def __init__(self, names: Sequence[str], account: Account) -> None:
        self._trackers: dict[str, Tracker] = {}
        for name in names:
            with self._without_failing(name):
                self._trackers[name] = TRACKERS[name](account)

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Log a run's hyper-parameters."""
        self._each(lambda tracker: tracker.log_parameters(parameters))

    def log_metrics(self, metrics: Mapping[str, float], epoch: int) -> None:
        """Log metrics of an epoch."""
        self._each(lambda tracker: tracker.log_metrics(metrics, epoch))

    def finish(self) -> None:
        """Send all remaining data at the end of a complete run."""
        self._each(lambda tracker: tracker.finish())

    def _each(self, log: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            with self._without_failing(name):
                log(tracker)

    @contextlib.contextmanager
    def _without_failing(self, name: str) -> Iterator[None]:
        try:
            yield
        except TRACKERS[name].failures() as error:
            self._trackers.pop(name, None)
            logger.warning(
                "warning: --tracker %s: %s: continuing without it", name, first_line(error)
            )


def check_trackers(names: Sequence[str], api_key: str | None, workspace: str | None) -> list[str]:
    """Return the names of the trackers that flags choose; as in the original, Comet's key and workspace choose Comet.

    Raises:
        UserError: a package is missing, or only one of key and workspace is given.
    """
    if bool(api_key) != bool(workspace):
        raise UserError(
            "--api-key and --workspace go together: pass both to track with Comet, or neither"
        )
    asked = list(dict.fromkeys([*(["comet"] if api_key else []), *names]))
    for name in asked:
        tracker = TRACKERS[name]
        if importlib.util.find_spec(tracker.module) is None:
            raise UserError(
                f"--tracker {name} needs a package: pip install {tracker.package}, or remove --tracker"
            )
    return asked
