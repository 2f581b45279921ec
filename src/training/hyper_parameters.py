"""Read the file that records how a run was started, and check that a resumed run has the same settings."""

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
    """Read the hyper-parameters in a run folder.

    Raises:
        UserError: the folder is not a run folder, or the file is damaged or not written by a training run.
    """
    file = folder / HYPER_PARAMETERS
    if not file.is_file():
        raise UserError(
            f"--resume {folder} is not a run folder, because it contains no {HYPER_PARAMETERS}: choose another folder"
        )
    content = read_json(file, "the script that started the run")
    remedy = "copy the run's folder again"
    settings = Settings.checked(content, file=f"--resume {file}", remedy=remedy)
    for name in ("dataset", "script"):
        if not settings.flags.get(name):
            raise UserError(f"--resume {file}: flags.{name}: field required: {remedy}")
    return settings


def started_with(folder: Path, settings: Settings) -> Settings:
    """Return the hyper-parameters that a resumed run was started with, after checking the current ones against them.

    Flags that do not affect the numbers may differ, and flags in `MOVABLE_FLAGS` get their current values. Flags that
    did not exist in the version that started the run have their defaults (see `cli.training.parse`). Other versions of
    the packages, which may round differently, cause a warning.

    Raises:
        UserError: a flag or the data differ; for a flag, the message contains both values.
    """
    started = read_hyper_parameters(folder)
    now = Settings.read(json.loads(json.dumps(settings.on_disk())))
    before = _computing(started)
    after = _computing(now)
    for name in sorted(before):
        if before[name] != after.get(name):
            raise UserError(
                f"--resume {folder}: {flag(name)} is {after.get(name)}, but the run was started with {before[name]}: "
                f"remove {flag(name)}, or set it to this value"
            )
    for name, reason in DIGESTS.items():
        if started.data.get(name) != now.data.get(name):
            raise UserError(f"--resume {folder}: {reason} since the run was started: restore them")
    if started.versions != now.versions:
        logger.warning(
            "warning: %s was started with %s, but now uses %s: results may differ slightly",
            folder,
            started.versions,
            now.versions,
        )
    moved = {name: now.flags[name] for name in MOVABLE_FLAGS if name in now.flags}
    return dataclasses.replace(started, flags={**started.flags, **moved})


def _computing(settings: Settings) -> dict[str, Any]:
    """Return the settings that affect the numbers. `UNNAMED` adds settings for which earlier versions had no flag."""
    values = {**UNNAMED, **settings.flags, **settings.preprocessing}
    return {name: value for name, value in values.items() if name not in FREE_FLAGS}
