"""What of a run's weights is kept: the best by each of some metrics, or every validated epoch."""

from pathlib import Path
from typing import Any, Literal

from torch import nn

from runtime import distributed
from runtime.tensors import load_tensors, save_tensors

Kept = Literal["nothing", "best", "every epoch"]


class Checkpoints:
    """What of a run's weights is kept: the best by each of some metrics, or every validated epoch, or nothing.

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
        return self.folder / f"{name}.pt"

    def update(self, epoch: int, metrics: dict[str, float]) -> None:
        """Remember and save what this validation made the best, or every epoch's weights where all are kept."""
        improved = [
            metric
            for metric in self.best_names
            if metrics[metric] > self.best.get(metric, float("-inf"))
        ]
        for metric in improved:
            self.best[metric] = metrics[metric]
        if not distributed.is_main():
            return
        if self.kept == "best":
            for metric in improved:
                self._save(self.best_names[metric], epoch, {metric: metrics[metric]})
        elif self.kept == "every epoch":
            self._save(
                f"{self.prefix}_{epoch}",
                epoch,
                {metric: metrics[metric] for metric in self.best_names},
            )

    def rewind(self, best: dict[str, float]) -> None:
        """Go back to the best values that a saved state has.

        Weights that were saved after that state stay the best if they were: training makes them again, on a CPU to the
        last bit, and on a GPU up to its rounding.
        """
        self.best = dict(best)
        if self.kept != "best":
            return
        for metric, name in self.best_names.items():
            path = self.folder / f"{name}.pt"
            if path.exists():
                value = _metrics(load_tensors(path))[metric]
                self.best[metric] = max(value, best.get(metric, value))

    def _save(self, name: str, epoch: int, metrics: dict[str, float]) -> None:
        content = {
            "epoch": epoch,
            self.key: self.module.state_dict(),
            "config": self.config,
            "metrics": metrics,
        }
        save_tensors(self.folder / f"{name}.pt", content)


def _metrics(content: dict[str, Any]) -> dict[str, float]:
    """The metrics that a checkpoint was saved with; earlier versions had them among its settings."""
    return content["metrics"] if "metrics" in content else content["config"]["metrics"]
