"""A trained pair from flags and checkpoints: CLIP with its preprocessing, and the way to compose a query."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import nn

from benchmarks import Benchmark, Split
from benchmarks.exclusions import announce
from benchmarks.splits import check_images_exist
from combiner import Compose, compose_sum, load_combiner
from data_utils import decoded
from models.clip_model import feature_dim
from models.configuration import Checkpoint, read_checkpoint, settle
from models.encoder import Encoder, load_encoder, weights_digest
from models.features import FeatureCache, FrozenSplit, freeze_queries
from utils import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """What an evaluation needs of a trained pair: CLIP with its preprocessing, and the way to compose a query.

    Attributes:
        tuned: the stage-1 checkpoint of CLIP's weights, None for the model's own.
        trained: the Combiner's checkpoint, None for the sum.
    """

    encoder: Encoder
    compose: Compose
    tuned: Checkpoint | None
    trained: Checkpoint | None

    def describe(self) -> dict[str, Any]:
        """Weights, preprocessing and training of the pair in plain types, for a result that says what it is of."""
        recipe = self.encoder.recipe
        checkpoints = {"clip": self.tuned, "combiner": self.trained}
        states = {"clip": self.encoder.model}
        if isinstance(self.compose, nn.Module):
            states["combiner"] = self.compose
        return {
            "clip_model_name": recipe["clip_model_name"],
            "combining_function": "combiner" if self.trained else "sum",
            "checkpoints": {kind: str(c.path.resolve()) for kind, c in checkpoints.items() if c},
            "weights_sha256": {kind: weights_digest(module.state_dict()) for kind, module in states.items()},
            "preprocessing": {name: recipe[name] for name in ("transform", "target_ratio", "resolution")},
            "training": {kind: c.config for kind, c in checkpoints.items() if c},
        }


def load_pair(
    combining_function: str,
    clip_path: Path | None,
    combiner_path: Path | None,
    clip_choice: dict[str, Any],
    combiner_choice: dict[str, Any],
    device: torch.device,
    workers: int,
    opened: Callable[[Path], Image] = decoded,
) -> Pair:
    """The pair that the flags of an evaluation name.

    Args:
        combining_function: "sum" or "combiner".
        clip_choice: see `settle`.
        combiner_choice: what the user wants the Combiner to be, see `load_combiner`.
        opened: opens an image file.

    Raises:
        UserError: a combiner without its path, or whatever is wrong with the checkpoints.
    """
    composes = combining_function == "combiner"
    if composes and combiner_path is None:
        raise UserError("--combining-function combiner needs --combiner-path: the stage-2 weights to compose with")
    tuned = read_checkpoint("--clip-model-path", clip_path, "CLIP")
    trained = read_checkpoint("--combiner-path", combiner_path if composes else None, "Combiner")
    encoder = load_encoder(settle(clip_choice, [trained, tuned]), tuned, device, workers, opened=opened)
    if trained is None:
        if combiner_path:
            logger.warning("warning: --combining-function sum makes no use of --combiner-path %s", combiner_path)
        return Pair(encoder, compose_sum, tuned, None)
    if trained.config.get("clip_weights") not in (None, weights_digest(encoder.model.state_dict())):
        logger.warning(
            "warning: %s was trained on features of other CLIP weights (--clip-model-path %s then)",
            trained.path,
            trained.config.get("clip_model_path"),
        )
    combiner = load_combiner(trained.content, trained.path, combiner_choice, feature_dim(encoder.model))
    return Pair(encoder, combiner.to(device), tuned, trained)


def load_and_freeze(
    benchmark: Benchmark, splits: list[Split], device: torch.device, **choice: Any
) -> tuple[Pair, list[FrozenSplit]]:
    """A trained pair and the features that it makes of some splits, whose images must all be there.

    Args:
        choice: see `load_pair`.
    """
    announce(benchmark.excluded, splits)
    check_images_exist(splits)
    pair = load_pair(**choice, device=device)
    return pair, freeze_queries(FeatureCache(None, pair.encoder), splits, benchmark.caption, benchmark.run_name)
