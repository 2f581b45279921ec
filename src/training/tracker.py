"""A mirror of a run in Comet, if flags ask for it. Failures of Comet never stop a training."""

import logging
from collections.abc import Mapping
from typing import Any

from runtime import distributed
from utils import UserError

logger = logging.getLogger(__name__)

PROJECT = "CLIP4Cir-MoE"


class NoTracker:
    """Tracks nothing. It has the methods of a real tracker, so that callers need not ask which it is."""

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Log a run's hyper-parameters."""

    def log_metrics(self, metrics: dict[str, float], epoch: int) -> None:
        """Log metrics of an epoch."""


class CometTracker(NoTracker):
    """Mirrors a run to Comet. If Comet fails, one warning says so, and the training goes on without it."""

    def __init__(self, comet_ml: Any, *, api_key: str, workspace: str, name: str | None) -> None:
        self.failures = (comet_ml.exceptions.CometException, OSError, ValueError, RuntimeError)
        self.experiment = None
        try:
            self.experiment = comet_ml.Experiment(
                api_key=api_key,
                workspace=workspace,
                project_name=PROJECT,
            )
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
    """A tracker of Comet in the main process, if both --api-key and --workspace are given; else of nothing.

    Raises:
        UserError: one without the other, or comet-ml is not installed.
    """
    if not api_key and not workspace:
        return NoTracker()
    if not (api_key and workspace):
        raise UserError(
            "--api-key and --workspace go together: give both to track with Comet, or neither"
        )
    try:
        import comet_ml
        import comet_ml.exceptions
    except ImportError:
        raise UserError(
            "--api-key: comet-ml is not installed: pip install comet-ml, or leave the flag out"
        ) from None
    if not distributed.is_main():
        return NoTracker()
    return CometTracker(comet_ml, api_key=api_key, workspace=workspace, name=name)
