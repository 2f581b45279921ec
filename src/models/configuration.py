"""Read the settings of runs and checkpoints, and combine them with flags."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.names import in_full
from runtime.choices import ORIGINAL, UNNAMED
from runtime.files import find_checkpoint
from settings.groups import STAGES, AnyTraining, Clip
from utils import flag

logger = logging.getLogger(__name__)

# Setting that must be unchanged when a run is resumed -> message if it has changed.
DIGESTS = {
    "data_sha256": "the annotations have changed",
    "clip_weights": "the CLIP weights have changed",
    "excluded": "the excluded images have changed",
    "images": "the images have changed",
}
ORIGINAL_DEFAULTS = Clip(
    clip_model_name="RN50x4",
    transform="targetpad",
    target_ratio=1.25,
    decode="full",
    encode_precision="fp32",
    background=ORIGINAL,
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a training run in plain types for JSON and checkpoints.

    Attributes:
        flags: flag -> its value as typed, or its default; None if the value was read from a
            checkpoint instead.
        preprocessing: how images are preprocessed and features computed, resolved from flags and
            checkpoints.
        data: digests of the files that were read, and the excluded images.
        versions: versions of the packages that affect results.
    """

    flags: dict[str, Any]
    preprocessing: dict[str, Any]
    data: dict[str, Any]
    versions: dict[str, str]

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> "Settings":
        """Read settings from disk. All parts are empty for a checkpoint without settings, such as the original's."""
        parts = {name: content.get(name, {}) for name in ("flags", "data", "versions")}
        return cls(preprocessing=content.get("recipe", {}), **parts)

    @classmethod
    def checked(cls, content: Any, *, file: object, remedy: str) -> "Settings":
        """Read settings from disk, after checking that each value has the type and range of its flag.

        Args:
            file, remedy: see `runtime.schema.checked`.

        Raises:
            UserError: a value has another type or is out of range; the message names the first such
                value.
        """
        from models import schemas
        from runtime.schema import checked

        flags = content.get("flags") if isinstance(content, dict) else None
        script = flags.get("script") if isinstance(flags, dict) else None
        stage = STAGES.get(script, AnyTraining) if isinstance(script, str) else AnyTraining
        checked(schemas.StoredSettings[stage], content, file=file, remedy=remedy)  # type: ignore[valid-type]
        return cls.read(content)

    @property
    def table(self) -> dict[str, Any]:
        """Return all settings by name; a resolved value replaces the value of its flag."""
        return {**self.flags, **self.preprocessing, **self.data, "versions": self.versions}

    def with_flags(self, **flags: Any) -> "Settings":
        """Return a copy with other values for some flags."""
        return dataclasses.replace(self, flags={**self.flags, **flags})

    def on_disk(self) -> dict[str, Any]:
        """Return the four parts as they are stored in checkpoints and run folders."""
        parts = dataclasses.asdict(self)
        return {"recipe" if name == "preprocessing" else name: part for name, part in parts.items()}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint file that was found and read.

    Attributes:
        state: the weights.
        config: the settings stored next to the weights, as they are on disk; {} if there are none.
        epoch: epoch after which the weights were saved; None if unknown.
        table: the settings by name, see `Settings.table`.
        sizes: all sizes needed to build the model of an exported pair; None if the weights or
            `--clip-model-name` determine them.
        folder: folder of the files that the model of an exported pair is built from, if it is not
            built from sizes.
    """

    path: Path
    state: dict[str, Any]
    config: dict[str, Any]
    epoch: int | None = None
    sizes: Mapping[str, Any] | None = None
    folder: Path | None = None

    @property
    def table(self) -> dict[str, Any]:
        return Settings.read(self.config).table


def read_checkpoint(flag_name: str, path: Path | None, key: str) -> Checkpoint | None:
    """Read the checkpoint at the path that a flag gives; return None if the flag is not set.

    A plain state dict is accepted too (a safetensors file contains nothing else), with `config`
    next to its weights, and so are the checkpoints of other projects, see
    `weights_file.read_weights`.

    Args:
        key: the checkpoint's key for its weights, "CLIP" or "Combiner".

    Raises:
        UserError: the file is missing, unreadable or of another kind, or its settings are invalid.
    """
    from models.schemas import Beside
    from models.weights_file import read_weights
    from runtime.schema import checked

    if path is None:
        return None
    path = find_checkpoint(flag_name, path)
    source = f"{flag_name} {path}"
    remedy = "copy the file again, or retrain the model"
    found = read_weights(flag_name, path, key)
    checked(Beside, found.beside, file=source, remedy=remedy)
    config = found.beside.get("config", {})
    if config:
        Settings.checked(config, file=f"{source}: config", remedy=remedy)
    epoch = found.beside.get("epoch")
    return Checkpoint(path=path, state=found.state, config=config, epoch=epoch)


def trained_on(training: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return part of a pair -> benchmark that it was trained on; parts whose settings do not record it are left out."""
    datasets = {
        kind: Settings.read(config).table.get("dataset") for kind, config in training.items()
    }
    return {kind: dataset for kind, dataset in datasets.items() if isinstance(dataset, str)}


def warn_of_transfer(dataset: str, checkpoints: Sequence[Checkpoint | None]) -> None:
    """Log a warning if weights were trained on another benchmark than the one they are used on."""
    configs = {str(known.path): known.config for known in checkpoints if known is not None}
    others = []
    for path, other in trained_on(configs).items():
        if other.lower() != dataset.lower():
            others.append(f"{path} was trained on {other}")
    if others:
        logger.warning("warning: %s, but is used on %s", " and ".join(others), dataset)


def resolve_clip_options(
    choice: Clip, checkpoints: Sequence[Checkpoint | None], background: str = ORIGINAL
) -> Clip:
    """Resolve model name, preprocessing and precision: the flag, else the setting of a checkpoint, else the default.

    A flag that contradicts the settings of a checkpoint takes precedence, with a warning.

    Args:
        choice: values of the flags.
        checkpoints: checkpoints whose settings are used, the one with precedence first.
        background: default background of the images that are read.
    """
    given = Clip.of(choice).model_dump()
    given["clip_model_name"] = choice.clip_model_name and in_full(choice.clip_model_name)
    settled = {}
    defaults = {**ORIGINAL_DEFAULTS.model_dump(), "background": background}
    for name, default in defaults.items():
        trained = _trained_with(name, checkpoints)
        if given[name] is not None:
            settled[name] = given[name]
        elif trained:
            settled[name] = next(iter(trained.values()))
        else:
            settled[name] = default
        for path, value in trained.items():
            if value != settled[name]:
                asked = f"{flag(name)} {value}, not {settled[name]}"
                logger.warning("warning: %s was trained with %s", path, asked)
    return Clip(**settled)


def assumed(
    choice: Clip, settled: Clip, checkpoints: Sequence[Checkpoint | None]
) -> dict[str, Any]:
    """Return setting -> default value for the settings that the weights do not record; {} without weights.

    Settings of earlier versions lack some values because there was no choice yet; these values are
    known, not assumed.

    Args:
        settled: result of `resolve_clip_options` for the other arguments.
    """
    given = [checkpoint for checkpoint in checkpoints if checkpoint is not None]
    if not given:
        return {}
    have_settings = any(checkpoint.config for checkpoint in given)
    values = {}
    for name, value in settled.model_dump().items():
        told = getattr(choice, name) is not None or _trained_with(name, given)
        if not told and not (have_settings and UNNAMED.get(name) == value):
            values[name] = value
    if settled.transform != "targetpad":
        values.pop("target_ratio", None)
    return values


def say_assumed(values: Mapping[str, Any], checkpoints: Sequence[Checkpoint | None]) -> None:
    """Log in one line which settings are assumed because the weights do not record them, if any."""
    if values:
        files = [str(checkpoint.path) for checkpoint in checkpoints if checkpoint is not None]
        taken = ", ".join(f"{name} {value}" for name, value in values.items())
        flags = ", ".join(map(flag, values))
        logger.warning(
            "note: assumed %s, because %s does not record this; to change it, set %s",
            taken,
            " and ".join(files),
            flags,
        )


def _trained_with(name: str, checkpoints: Sequence[Checkpoint | None]) -> dict[Path, Any]:
    """Return checkpoint file -> value of a setting, for the checkpoints that record it."""
    values = {}
    for checkpoint in checkpoints:
        if checkpoint is not None:
            value = checkpoint.table.get(name)
            # Weights trained on images without a background do not prescribe one for other images.
            if value is not None and (name, value) != ("background", ORIGINAL):
                values[checkpoint.path] = value
    return values
