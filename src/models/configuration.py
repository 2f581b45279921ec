"""Read the settings of runs and checkpoints, which have four parts, and combine them with flags."""

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

# What a resumed run must find as it was -> what to say if it does not.
DIGESTS = {
    "data_sha256": "the annotations differ",
    "clip_weights": "the CLIP weights differ",
    "excluded": "the excluded images differ",
    "images": "the images differ",
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
        flags: as they were typed, or their defaults; None where one was silent and a checkpoint spoke.
        preprocessing: what images and features are made with, as flags and checkpoints agreed on it.
        data: digests of what was read, and what was left out of it.
        versions: of the packages that numbers pass through.
    """

    flags: dict[str, Any]
    preprocessing: dict[str, Any]
    data: dict[str, Any]
    versions: dict[str, str]

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> "Settings":
        """Settings from disk; of a checkpoint that has none, as the original's, all parts are empty."""
        parts = {name: content.get(name, {}) for name in ("flags", "data", "versions")}
        return cls(preprocessing=content.get("recipe", {}), **parts)

    @classmethod
    def checked(cls, content: Any, *, file: object, remedy: str) -> "Settings":
        """Settings from disk, each value of the type and in the range that its flag takes.

        Args:
            file, remedy: see `runtime.schema.checked`.

        Raises:
            UserError: the first value that is not is named.
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
        """All values by name; what was agreed on stands for the flag that asked for it."""
        return {**self.flags, **self.preprocessing, **self.data, "versions": self.versions}

    def with_flags(self, **flags: Any) -> "Settings":
        """Return the same with other values of some flags."""
        return dataclasses.replace(self, flags={**self.flags, **flags})

    def on_disk(self) -> dict[str, Any]:
        """The four parts as a checkpoint and a run's file hold them."""
        parts = dataclasses.asdict(self)
        return {"recipe" if name == "preprocessing" else name: part for name, part in parts.items()}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint file that was found and read.

    Attributes:
        state: the weights.
        config: the settings stored beside them, as they are on disk; {} if there are none.
        epoch: after which the weights were saved, None where nothing tells.
        table: the settings by name, see `Settings.table`.
        sizes: of the model that an exported pair's weights are of, all that is needed to build it; None where the
            weights or `--clip-model-name` tell them.
        folder: of the files that such a model is built from where sizes do not tell it, as of open_clip's.
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
    """The checkpoint that a flag names, None where the flag is silent.

    A plain state dict, which is all that a safetensors file can hold, is taken too, with `config` beside its weights,
    and checkpoints of other code, see `weights_file.read_weights`.

    Args:
        key: the checkpoint's key for its weights, "CLIP" or "Combiner".

    Raises:
        UserError: missing, unreadable, of another kind, or with settings that no training has.
    """
    from models.schemas import Beside
    from models.weights_file import read_weights
    from runtime.schema import checked

    if path is None:
        return None
    path = find_checkpoint(flag_name, path)
    source = f"{flag_name} {path}"
    remedy = "copy it again, or train it again"
    found = read_weights(flag_name, path, key)
    checked(Beside, found.beside, file=source, remedy=remedy)
    config = found.beside.get("config", {})
    if config:
        Settings.checked(config, file=f"{source}: config", remedy=remedy)
    epoch = found.beside.get("epoch")
    return Checkpoint(path=path, state=found.state, config=config, epoch=epoch)


def trained_on(training: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The benchmark that each part of a pair was trained on, from their settings; nothing of a part that is silent."""
    datasets = {
        kind: Settings.read(config).table.get("dataset") for kind, config in training.items()
    }
    return {kind: dataset for kind, dataset in datasets.items() if isinstance(dataset, str)}


def warn_of_transfer(dataset: str, checkpoints: Sequence[Checkpoint | None]) -> None:
    """Say so, in one line, where weights were trained on another benchmark than the one they are used on."""
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
    """Name, preprocessing and precision: the flag, else what the checkpoints were trained with, else the default.

    A flag that contradicts how weights were trained is obeyed, with a warning.

    Args:
        choice: what the flags say.
        checkpoints: those given, the more telling first.
        background: the default of the images that are read.
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
    """Return what was taken by default for weights that tell nothing of it: setting -> value; {} without weights.

    What there was no choice of when earlier versions wrote their settings is not assumed, but known.

    Args:
        settled: what `resolve_clip_options` makes of the others.
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
    """Say in one line what is assumed of weights that say nothing of it, if anything is."""
    if values:
        files = [str(checkpoint.path) for checkpoint in checkpoints if checkpoint is not None]
        taken = ", ".join(f"{name} {value}" for name, value in values.items())
        flags = ", ".join(map(flag, values))
        logger.warning(
            "note: assumed %s, which %s does not record; set it with %s",
            taken,
            " and ".join(files),
            flags,
        )


def _trained_with(name: str, checkpoints: Sequence[Checkpoint | None]) -> dict[Path, Any]:
    """Checkpoint's file -> its value of a setting, for those that have one."""
    values = {}
    for checkpoint in checkpoints:
        if checkpoint is not None:
            value = checkpoint.table.get(name)
            # What was trained as the original reads images says nothing of other images.
            if value is not None and (name, value) != ("background", ORIGINAL):
                values[checkpoint.path] = value
    return values
