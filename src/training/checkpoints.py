"""What of a run's weights is kept: the best by each of some metrics, or every validated epoch."""

from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from runtime import distributed
from runtime.files import write_same
from runtime.tensors import load_tensors, save_tensors
from training.state import REMEDY
from utils import UserError

Kept = Literal["nothing", "best", "every epoch"]


class Checkpoints:
    """What of a run's weights is kept: the best by each of some metrics, or every validated epoch, or nothing.

    Writing may take longer than an epoch, so the best ones are written with the state of the training, and before it:
    a state names no best that is not on disk. Until then they wait in the memory of the one process that writes, off
    the device: a copy of the weights for each epoch that is the best by some metric.

    Attributes:
        best: metric -> its best value.

    Args:
        folder: of the run.
        module: the module whose weights are kept.
        key: the checkpoint's key for them, "CLIP" or "Combiner".
        prefix: beginning of the file names of every epoch: `{prefix}_{epoch}.pt`.
        best_names: metric -> file name for its best value.
        config: settings in plain types that say how the weights were made.
        kept: without weights only the best values are remembered.
    """

    def __init__(
        self,
        folder: Path,
        module: nn.Module,
        *,
        key: str,
        prefix: str,
        best_names: dict[str, str],
        config: dict[str, Any],
        kept: Kept,
    ) -> None:
        self.folder = folder / "saved_models"
        self.module = module
        self.key = key
        self.prefix = prefix
        self.best_names = best_names
        self.config = config
        self.kept = kept
        self.best: dict[str, float] = {}
        # File name -> content of the best that are not on disk yet.
        self._unwritten: dict[str, dict[str, Any]] = {}
        # Weights among them that are the module's own so far.
        self._shared: dict[str, Tensor] = {}

    @property
    def saved(self) -> list[Path]:
        """The files of weights that are there."""
        return sorted(self.folder.glob("*.pt"))

    def first_choice(self, last_epoch: int) -> Path | None:
        """The weights to look at first when the training is complete, None where none are kept.

        Args:
            last_epoch: the last one that is validated.
        """
        if self.kept == "nothing":
            return None
        name = (
            next(iter(self.best_names.values()))
            if self.kept == "best"
            else f"{self.prefix}_{last_epoch}"
        )
        return self._file(name)

    def update(self, epoch: int, metrics: dict[str, float]) -> None:
        """Remember what this validation made the best, or save every epoch's weights where all are kept."""
        improved = [
            metric
            for metric in self.best_names
            if metrics[metric] > self.best.get(metric, float("-inf"))
        ]
        for metric in improved:
            self.best[metric] = metrics[metric]
        if not distributed.is_main() or self.kept == "nothing":
            return
        weights = self.module.state_dict()
        content = {
            "epoch": epoch,
            self.key: weights,
            "config": self.config,
            "metrics": {metric: metrics[metric] for metric in self.best_names},
        }
        if self.kept == "every epoch":
            save_tensors(self._file(f"{self.prefix}_{epoch}"), content)
        elif improved:
            self._shared = weights
            for metric in improved:
                self._unwritten[self.best_names[metric]] = content

    def hold(self) -> None:
        """Copy the best weights that are not on disk yet, before a step changes them."""
        for name, weight in self._shared.items():
            self._shared[name] = weight.to("cpu", copy=True)
        self._shared = {}

    def write(self) -> None:
        """Write the best weights that are not on disk yet, once for all metrics of an epoch.

        Raises:
            DiskError: a file could not be written.
        """
        files: dict[int, Path] = {}
        for name, content in self._unwritten.items():
            file = self._file(name)
            epoch = content["epoch"]
            if epoch in files:
                write_same(file, files[epoch])
            else:
                save_tensors(file, content)
                files[epoch] = file
        self._unwritten = {}
        self._shared = {}

    def rewind(self, best: dict[str, float]) -> None:
        """Go back to the best values that a saved state has.

        Weights that were saved after that state stay the best if they were: training makes them again, on a CPU to the
        last bit, and on a GPU up to its rounding.

        Raises:
            UserError: the state or best weights are those of other metrics.
        """
        for metric in best:
            if metric not in self.best_names:
                raise UserError(f"--resume: progress.best of state.pt has {metric}: {REMEDY}")
        self.best = dict(best)
        if self.kept != "best":
            return
        for metric, name in self.best_names.items():
            path = self._file(name)
            if path.exists():
                value = _metric(path, metric)
                self.best[metric] = max(value, best.get(metric, value))

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.pt"


def _metric(path: Path, name: str) -> float:
    """One of the metrics that a checkpoint was saved with; earlier versions had them among its settings.

    Raises:
        UserError: it is not there, or no number.
    """
    from runtime.schema import checked
    from training.schemas import Validated

    content = load_tensors(path)
    holder = content if "metrics" in content else content.get("config")
    remedy = "copy the run's folder again"
    metrics = checked(Validated, holder, file=f"--resume: {path}", remedy=remedy).metrics
    if name not in metrics:
        raise UserError(f"--resume: {path}: metrics has no {name}: {remedy}")
    return metrics[name]
