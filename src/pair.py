"""A trained pair from flags and checkpoints: CLIP with its preprocessing, and the way to compose a query."""

import functools
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
from clip_model import feature_dim, load_clip, load_finetuned, resolution
from combiner import Compose, compose_sum, load_combiner
from data_utils import TRANSFORMS, decoded, load_image, make_preprocess
from features import Encoder, FeatureCache, FrozenSplit, freeze_queries, weights_digest
from runtime.files import find_checkpoint
from runtime.tensors import load_tensors
from utils import UserError

logger = logging.getLogger(__name__)

ORIGINAL_DEFAULTS = {"clip_model_name": "RN50x4", "transform": "targetpad", "target_ratio": 1.25}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file that was found and read: its content, and the configuration stored in it ({} if none)."""

    path: Path
    content: dict[str, Any]
    config: dict[str, Any]


def read_checkpoint(flag: str, path: Path | None, key: str) -> Checkpoint | None:
    """The checkpoint that a flag names, None where the flag is silent.

    Args:
        key: the checkpoint's key for its weights, "CLIP" or "Combiner".

    Raises:
        UserError: missing, unreadable, or of another kind.
    """
    if path is None:
        return None
    try:
        path = find_checkpoint(path)
        content = load_tensors(path)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None
    if not isinstance(content.get(key), dict):
        kinds = {"CLIP": "stage-1 weights", "Combiner": "stage-2 weights"}
        found = next((name for kind, name in kinds.items() if kind in content), "something else")
        raise UserError(f"{flag}: {path} holds {found}, not {kinds[key]}: name the right file")
    config = content.get("config")
    return Checkpoint(path, content, config if isinstance(config, dict) else {})


def settle(choice: dict[str, Any], checkpoints: list[Checkpoint | None]) -> dict[str, Any]:
    """Model name, transform and target ratio: the flag, else what the checkpoints were trained with, else the default.

    A flag that contradicts how weights were trained is obeyed, with a warning.

    Args:
        choice: what the flags say, by the names of ORIGINAL_DEFAULTS, None where silent.
        checkpoints: those given, the more telling first.
    """
    choice = choice | {"clip_model_name": _absolute(choice["clip_model_name"])}
    settled = {}
    for name, default in ORIGINAL_DEFAULTS.items():
        trained = [(c.path, c.config[name]) for c in checkpoints if c and isinstance(c.config.get(name), type(default))]
        given = choice[name]
        settled[name] = given if given is not None else trained[0][1] if trained else default
        for path, value in trained:
            if value != settled[name]:
                flag = "--" + name.replace("_", "-")
                logger.warning("warning: %s was trained with %s %s, not %s", path, flag, value, settled[name])
    if settled["transform"] not in TRANSFORMS:
        raise UserError(f"a checkpoint names the transform {settled['transform']}, which is none of {TRANSFORMS}")
    return settled


def _absolute(name: str | None) -> str | None:
    """A model's name as it is, a checkpoint's path in full: a configuration is read from other folders too."""
    if name is None or not (Path(name).exists() or Path(f"{name}.pt").exists()):
        return name
    return str(find_checkpoint(Path(name)).resolve())


def load_encoder(
    settings: dict[str, Any],
    tuned: Checkpoint | None,
    device: torch.device,
    workers: int,
    batch_size: int = 32,
    opened: Callable[[Path], Image] = decoded,
) -> Encoder:
    """CLIP in eval mode with its preprocessing.

    Args:
        settings: from `settle`.
        tuned: stage-1 weights that replace the model's own.
        opened: opens an image file.
    """
    model = load_clip(settings["clip_model_name"], device)
    if tuned:
        load_finetuned(model, tuned.content, tuned.path)
    pixels = resolution(model)
    preprocess = make_preprocess(settings["transform"], settings["target_ratio"], pixels)
    read = functools.partial(load_image, preprocess=preprocess, opened=opened)
    return Encoder(model, read, settings | {"resolution": pixels}, device, workers, batch_size)


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
