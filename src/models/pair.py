"""Load a trained pair from flags and checkpoints: CLIP with its preprocessing, and the composition of queries."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import Benchmark, Split
from benchmarks.exclusions import announce
from benchmarks.splits import check_images_exist
from combiner import UNLEARNED, Composer, assumed_top_k, load_combiner
from models.configuration import (
    Checkpoint,
    assumed,
    read_checkpoint,
    resolve_clip_options,
    say_assumed,
    trained_on,
    warn_of_transfer,
)
from models.encoder import Encoder, load_encoder, weights_digest
from models.exported import ExportedPair, open_exported
from models.features import FeatureCache, FrozenSplit, freeze_queries
from runtime import distributed
from runtime.choices import ORIGINAL, WHITE
from settings.groups import PairChoice
from utils import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A trained pair for evaluation: CLIP with its preprocessing, and the composition of queries.

    Attributes:
        compose: function that composes queries, in eval mode.
        tuned: stage-1 checkpoint of CLIP's weights; None for the model's own weights.
        trained: checkpoint of the Combiner; None for a composition without weights.
        assumed: setting -> assumed value, for settings given by neither the flags nor the weights.
    """

    encoder: Encoder
    compose: Composer
    tuned: Checkpoint | None
    trained: Checkpoint | None
    assumed: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Return weights, preprocessing and training of the pair in plain types, for results to record."""
        weights = {"clip": weights_digest(self.encoder.model.state_dict())}
        if state := self.compose.state_dict():
            weights["combiner"] = weights_digest(state)
        parts = {"clip": self.tuned, "combiner": self.trained}
        checkpoints = {kind: checkpoint for kind, checkpoint in parts.items() if checkpoint}
        training = {kind: checkpoint.config for kind, checkpoint in checkpoints.items()}
        return {
            "clip_model_name": self.encoder.preprocessing["clip_model_name"],
            "combining_function": self.compose.combining_function,
            "checkpoints": {
                kind: str(checkpoint.path.resolve()) for kind, checkpoint in checkpoints.items()
            },
            "weights_sha256": weights,
            "encode_precision": self.encoder.precision,
            "preprocessing": self.encoder.reported_preprocessing,
            "training": training,
            "trained_on": trained_on(training),
            "assumed": self.assumed,
        }


def load_pair(
    choice: PairChoice,
    device: torch.device,
    background: str = ORIGINAL,
    formats: tuple[str, ...] | None = None,
) -> Pair:
    """Load the pair that an evaluation needs.

    Args:
        background: background of the images if neither flags nor weights set it.
        formats: see `load_encoder`.

    Raises:
        UserError: a Combiner is chosen without its path, or a checkpoint is invalid.
    """
    composed_by, tuned, trained, told_by = _weights(choice)
    settings = resolve_clip_options(choice.clip, told_by, background)
    taken = assumed(choice.clip, settings, told_by)
    if trained is not None:
        known = {**trained.table, **(trained.sizes or {})}
        taken |= assumed_top_k(trained.state, known, choice.combiner.model_dump())
    say_assumed(taken, told_by)
    encoder = load_encoder(settings, tuned, device, workers=choice.workers, formats=formats)
    if trained is None:
        compose: Composer = UNLEARNED[composed_by]().eval()
    else:
        if trained.sizes is None:
            _warn_of_other_weights(trained, encoder)
        dim = encoder.backbone.dim
        wanted = choice.combiner.model_dump()
        compose = load_combiner(trained.state, known, trained.path, wanted=wanted, clip_dim=dim)
    return Pair(
        encoder=encoder, compose=compose.to(device), tuned=tuned, trained=trained, assumed=taken
    )


def open_pair(
    exported: Path | str | None = None,
    *,
    clip_path: Path | None = None,
    combiner_path: Path | None = None,
    device: str = "cpu",
    background: str = WHITE,
) -> Pair:
    """Load a trained model for use from Python. It composes queries by its Combiner if it has one, else by the sum.

    Args:
        exported: a folder of export.py or "hf-hub:ORG/REPO", in place of the two paths.
        clip_path, combiner_path: weights of stage 1 and stage 2, each a checkpoint or a run folder.
        background: background of transparent images, one of BACKGROUNDS.

    Raises:
        UserError: see `load_pair`.
    """
    choice = PairChoice(
        combining_function=None,
        clip_path=clip_path,
        combiner_path=combiner_path,
        exported=exported,
    )
    return load_pair(choice, torch.device(device), background)


def _weights(
    choice: PairChoice,
) -> tuple[str, Checkpoint | None, Checkpoint | None, list[Checkpoint | None]]:
    """Return the combining function, the checkpoints of CLIP and Combiner, and the checkpoints that record settings.

    The checkpoints of CLIP and Combiner are None without fine-tuned CLIP weights or without a
    Combiner.

    Raises:
        UserError: see `load_pair`.
    """
    exported = None
    if choice.exported is not None:
        with distributed.first_on_machine():
            exported = open_exported(choice.exported)
    composed_by = _composed_by(choice, exported)
    if exported is None:
        tuned = read_checkpoint("--clip-model-path", choice.clip_path, "CLIP")
    else:
        tuned = exported.weights("clip")
    if composed_by != "combiner":
        trained = None
    elif exported is None or choice.combiner_path:
        trained = read_checkpoint("--combiner-path", choice.combiner_path, "Combiner")
    else:
        trained = exported.weights("combiner")
    return composed_by, tuned, trained, [exported.as_checkpoint] if exported else [trained, tuned]


def _composed_by(choice: PairChoice, exported: ExportedPair | None) -> str:
    """Return the combining function: the flag's value, else "combiner" if there is a Combiner, else "sum"."""
    has_combiner = exported is not None and exported.config["combiner"] is not None
    has_combiner = has_combiner or choice.combiner_path is not None
    if choice.combining_function is None:
        return "combiner" if has_combiner else "sum"
    if choice.combining_function == "combiner" and not has_combiner:
        if exported is not None:
            raise UserError(
                f"--combining-function combiner: --pair {exported.folder} has no Combiner: remove --combining-function"
            )
        raise UserError(
            "--combining-function combiner needs --combiner-path: the stage-2 weights to compose with"
        )
    if choice.combining_function != "combiner" and choice.combiner_path:
        logger.warning(
            "warning: --combining-function %s does not use --combiner-path %s",
            choice.combining_function,
            choice.combiner_path,
        )
    return choice.combining_function


def _warn_of_other_weights(trained: Checkpoint, encoder: Encoder) -> None:
    """Log a warning if a Combiner was trained on features of other CLIP weights."""
    settings = trained.table
    known = {
        "clip_weights": weights_digest(encoder.model.state_dict()),
        **encoder.backbone.preprocessing,
    }
    if any(settings.get(name) not in (None, value) for name, value in known.items()):
        logger.warning(
            "warning: %s was trained on features of other CLIP weights, from --clip-model-path %s",
            trained.path,
            settings.get("clip_model_path"),
        )


def load_and_freeze(
    benchmark: Benchmark, splits: list[Split], device: torch.device, choice: PairChoice
) -> tuple[Pair, list[FrozenSplit]]:
    """Load a trained pair and compute its features for some splits, all of whose images must exist."""
    announce(benchmark.excluded, splits)
    check_images_exist(splits)
    pair = load_pair(choice, device, benchmark.background)
    warn_of_transfer(benchmark.name, [pair.tuned, pair.trained])
    cache = FeatureCache(choice.feature_cache, pair.encoder, told_by=choice.told_by)
    return pair, freeze_queries(cache, splits, benchmark, benchmark.run_name)
