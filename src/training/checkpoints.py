"""What of a run's weights is kept: the best by each of some metrics, or every validated epoch."""

from pathlib import Path
from typing import Any

from torch import nn

from runtime import distributed
from runtime.tensors import load_tensors, save_tensors


class Checkpoints:
    """What of a run's weights is kept: the best by each of some metrics, or every validated epoch, or nothing.

    Args:
        folder: of the run.
        module: the module whose weights are kept.
        key: the checkpoint's key for them, "CLIP" or "Combiner".
        prefix: beginning of the file names: `{prefix}_{epoch}.pt` unless best_only.
        best_names: metric -> file name for its best value.
        config: plain types that say how the weights were made.
        keep: save at all; without it only the best values are remembered.
    """

    def __init__(
        self,
        folder: Path,
        module: nn.Module,
        key: str,
        prefix: str,
        best_names: dict[str, str],
        config: dict[str, Any],
        keep: bool,
        best_only: bool,
    ) -> None:
        self.folder = folder / "saved_models"
        self.module, self.key, self.prefix = module, key, prefix
        self.best_names, self.config = best_names, config
        self.keep, self.best_only = keep and distributed.is_main(), best_only
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
        name = next(iter(self.best_names.values())) if self.best_only else f"{self.prefix}_{last_epoch}"
        return self.folder / f"{name}.pt" if self.keep else None

    def update(self, epoch: int, metrics: dict[str, float]) -> None:
        """Remember and save what this validation made the best, or every epoch's weights where all are kept."""
        improved = [name for name in self.best_names if metrics[name] > self.best.get(name, float("-inf"))]
        self.best |= {name: metrics[name] for name in improved}
        if self.keep and self.best_only:
            for name in improved:
                self._save(self.best_names[name], epoch, {name: metrics[name]})
        elif self.keep:
            self._save(f"{self.prefix}_{epoch}", epoch, {name: metrics[name] for name in self.best_names})

    def rewind(self, best: dict[str, float]) -> None:
        """Go back to the best values that a saved state has.

        Weights that were saved after it stay the best if they were: training gives them again, on a CPU to the last
        bit, and on a GPU up to its rounding.
        """
        self.best = dict(best)
        for metric, name in self.best_names.items() if self.keep and self.best_only else ():
            path = self.folder / f"{name}.pt"
            if path.exists():
                value = load_tensors(path)["config"]["metrics"][metric]
                self.best[metric] = max(value, best.get(metric, value))

    def _save(self, name: str, epoch: int, metrics: dict[str, float]) -> None:
        content = {"epoch": epoch, self.key: self.module.state_dict(), "config": self.config | {"metrics": metrics}}
        save_tensors(self.folder / f"{name}.pt", content)
