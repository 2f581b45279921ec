"""The file that says how a run was started, and what a resumed run must have in common with it."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from models.configuration import DIGESTS, Settings
from runtime.choices import HYPER_PARAMETERS, UNNAMED
from runtime.files import read_json
from settings.groups import FREE_FLAGS, MOVABLE_FLAGS
from utils import UserError, flag

logger = logging.getLogger(__name__)


def read_hyper_parameters(folder: Path) -> Settings:
    """The hyper-parameters of a run's folder. Raises UserError where it is none, or where they are no training's."""
    file = folder / HYPER_PARAMETERS
    if not file.is_file():
        raise UserError(
            f"--resume {folder} is not a run folder, it has no {HYPER_PARAMETERS}: choose another"
        )
    content = read_json(file, "the script that began the training")
    remedy = "copy the run's folder again"
    settings = Settings.checked(content, file=f"--resume {file}", remedy=remedy)
    for name in ("dataset", "script"):
        if not settings.flags.get(name):
            raise UserError(f"--resume {file}: flags.{name}: field required: {remedy}")
    return settings


def started_with(folder: Path, settings: Settings) -> Settings:
    """The hyper-parameters of a resumed run. Those of now must be the same, but for flags that compute nothing.

    Flags that the run never had, since it is of an earlier version, have their defaults (see `cli.training.parse`).
    Other versions of the packages, which may round otherwise, are warned of.

    Raises:
        UserError: some differ; both values are named.
    """
    started = read_hyper_parameters(folder)
    now = Settings.read(json.loads(json.dumps(settings.on_disk())))
    before = _computing(started)
    after = _computing(now)
    for name in sorted(before):
        if before[name] != after.get(name):
            raise UserError(
                f"--resume {folder}: {flag(name)} is {after.get(name)}, but the run was started with {before[name]}: "
                "remove the flag, or set this value"
            )
    for name, reason in DIGESTS.items():
        if started.data.get(name) != now.data.get(name):
            raise UserError(
                f"--resume {folder}: {reason} from those of the start of the run: restore them"
            )
    if started.versions != now.versions:
        logger.warning(
            "warning: %s was started with %s, now it is %s: numbers may differ",
            folder,
            started.versions,
            now.versions,
        )
    moved = {name: now.flags[name] for name in MOVABLE_FLAGS if name in now.flags}
    return dataclasses.replace(started, flags={**started.flags, **moved})


def _computing(settings: Settings) -> dict[str, Any]:
    """The flags and the preprocessing that change what is computed, and what was the only way in earlier versions."""
    values = {**UNNAMED, **settings.flags, **settings.preprocessing}
    return {name: value for name, value in values.items() if name not in FREE_FLAGS}
