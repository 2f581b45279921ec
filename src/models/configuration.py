"""What a checkpoint says of how it was made, and the settings that flags and checkpoints agree on."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_utils import TRANSFORMS
from runtime.files import find_checkpoint
from runtime.tensors import load_tensors
from utils import UserError

logger = logging.getLogger(__name__)


def plain(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Flags as plain types that JSON and a checkpoint hold, paths in full; the secret one is left out."""
    return {k: str(v.absolute()) if isinstance(v, Path) else v for k, v in flags.items() if k != "api_key"}


# What changes where or how fast a run goes on, not what it computes.
FREE = {"data_root", "output_dir", "num_workers", "device", "similarity_block", "image_cache", "feature_cache"}


FREE |= {"checkpoint_every_minutes", "command", "resume", "workspace", "experiment_name"}


MOVED = {"clip_model_path", "exclusions"}  # may lie elsewhere now: what is in them is held to what it was, see DERIVED


FREE |= MOVED


DERIVED = {
    "data_sha256": "the annotations are others",
    "clip_weights": "the CLIP weights are others",
    "excluded": "other images are left out",
}


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
