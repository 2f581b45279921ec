"""One run on disk: its folder, hyper-parameters, CSV files and checkpoints; Comet as a mirror when asked for."""

import itertools
import json
import logging
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

import distributed
from utils import UserError, save_tensors, write_text

logger = logging.getLogger(__name__)


def plain(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Flags as plain types that JSON and a checkpoint hold; the secret one is left out."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in flags.items() if k != "api_key"}


class Run:
    """The folder of a training, and the tracker that mirrors it.

    Every file is written whole at each change, so an interrupted run leaves all that it had.
    """

    def __init__(self, folder: Path, tracker: "NoTracker", hyper_parameters: Mapping[str, Any]) -> None:
        self.folder = folder
        self.tracker = tracker
        self.rows: dict[str, list[dict[str, float]]] = {"train": [], "validation": []}
        write_text(folder / "training_hyperparameters.json", json.dumps(hyper_parameters, indent=4, sort_keys=True))
        tracker.log_parameters(hyper_parameters)

    def record(self, kind: str, epoch: int, metrics: dict[str, float]) -> None:
        """Add a row to `{kind}_metrics.csv`, kind "train" or "validation"."""
        self.rows[kind].append({"epoch": epoch, **metrics})
        table = pd.DataFrame(self.rows[kind]).to_csv(index=False)
        write_text(self.folder / f"{kind}_metrics.csv", table)
        self.tracker.log_metrics(metrics, epoch)


class SilentRun(Run):
    """The run as a process sees it that writes nothing, beside the one that does."""

    def __init__(self) -> None:
        self.folder = Path()

    def record(self, kind: str, epoch: int, metrics: dict[str, float]) -> None:
        """Leave it to the process that writes."""


def open_run(output_dir: Path, stage: str, benchmark: str, tracker: "NoTracker", config: dict[str, Any]) -> Run:
    """Start a run in a new folder `{stage}_on_{benchmark}_{clip}_{time}` under output_dir; never one that exists.

    The name is that of the original without what file systems or shells trip over: `:` in the time, and `/` in
    `ViT-B/32` or in a path.

    Args:
        config: the hyper-parameters, `clip_model_name` among them.
    """
    if not distributed.is_main():
        return SilentRun()
    clip = config["clip_model_name"]
    model = re.sub(r"[^\w.@-]+", "-", Path(clip).stem if clip.endswith(".pt") else clip)
    stem = f"{stage}_on_{benchmark}_{model}_{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    for name in itertools.chain([stem], (f"{stem}_{number}" for number in itertools.count(2))):
        folder = output_dir / name
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"--output-dir {output_dir}: cannot make {folder} ({error.strerror})") from None
        break
    return Run(folder, tracker, config)


class Checkpoints:
    """What of a run's weights is kept: the best by each of some metrics, or every validated epoch, or nothing.

    Args:
        module: the module whose weights are kept.
        key: the checkpoint's key for them, "CLIP" or "Combiner".
        prefix: beginning of the file names: `{prefix}_{epoch}.pt` unless best_only.
        best_names: metric -> file name for its best value.
        config: plain types that say how the weights were made.
        keep: save at all; without it only the best values are remembered.
    """

    def __init__(
        self,
        run: Run,
        module: nn.Module,
        key: str,
        prefix: str,
        best_names: dict[str, str],
        config: dict[str, Any],
        keep: bool,
        best_only: bool,
    ) -> None:
        self.folder = run.folder / "saved_models"
        self.module, self.key, self.prefix = module, key, prefix
        self.best_names, self.config = best_names, config
        self.keep, self.best_only = keep and distributed.is_main(), best_only
        self.best: dict[str, float] = {}
        self.saved: list[Path] = []

    def update(self, epoch: int, metrics: dict[str, float]) -> None:
        """Remember and save what this validation made the best, or every epoch's weights where all are kept."""
        improved = [name for name in self.best_names if metrics[name] > self.best.get(name, float("-inf"))]
        self.best |= {name: metrics[name] for name in improved}
        if self.keep and self.best_only:
            for name in improved:
                self._save(self.best_names[name], epoch, {name: metrics[name]})
        elif self.keep:
            self._save(f"{self.prefix}_{epoch}", epoch, {name: metrics[name] for name in self.best_names})

    def _save(self, name: str, epoch: int, metrics: dict[str, float]) -> None:
        path = self.folder / f"{name}.pt"
        content = {"epoch": epoch, self.key: self.module.state_dict(), "config": self.config | {"metrics": metrics}}
        save_tensors(path, content)
        if path not in self.saved:
            self.saved.append(path)


class NoTracker:
    """Tracks nothing; has the methods of the real one, so that no loop asks which it is."""

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Log a run's hyper-parameters."""

    def log_metrics(self, metrics: dict[str, float], epoch: int) -> None:
        """Log metrics of an epoch."""


class CometTracker(NoTracker):
    """Mirrors a run to Comet. When Comet fails, that is said once and the training goes on without it."""

    def __init__(self, comet_ml: Any, api_key: str, workspace: str, name: str | None) -> None:
        self.failures = (comet_ml.exceptions.CometException, OSError, ValueError, RuntimeError)
        self.experiment = None
        try:
            self.experiment = comet_ml.Experiment(api_key=api_key, workspace=workspace, project_name="CLIP4Cir-MoE")
            if name:
                self.experiment.set_name(name)
        except self.failures as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        logger.warning("Comet is not reachable (%s): going on without it", error)
        self.experiment = None

    def _log(self, method: str, *args: Any, **kwargs: Any) -> None:
        if self.experiment is None:
            return
        try:
            getattr(self.experiment, method)(*args, **kwargs)
        except self.failures as error:
            self._give_up(error)

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        self._log("log_parameters", parameters)

    def log_metrics(self, metrics: dict[str, float], epoch: int) -> None:
        self._log("log_metrics", metrics, epoch=epoch)


def make_tracker(api_key: str | None, workspace: str | None, name: str | None) -> NoTracker:
    """Comet if both --api-key and --workspace are given, else nothing.

    Raises:
        UserError: one without the other, or comet-ml is not installed.
    """
    if not api_key and not workspace:
        return NoTracker()
    if not (api_key and workspace):
        raise UserError("--api-key and --workspace go together: give both to track with Comet, or neither")
    try:
        import comet_ml
        import comet_ml.exceptions
    except ImportError:
        raise UserError("--api-key: comet-ml is not installed: pip install comet-ml, or leave the flag out") from None
    return CometTracker(comet_ml, api_key, workspace, name) if distributed.is_main() else NoTracker()
