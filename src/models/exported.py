"""Export of a trained pair to a folder that others can load; a folder whose files were changed is rejected."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from models.configuration import Checkpoint, Settings, read_checkpoint
from runtime.files import file_digest, read_json, write_text
from runtime.hub import HUB, fetched
from settings.groups import FREE_FLAGS
from utils import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from combiner import Composer
    from models.encoder import Encoder

PAIR_FORM = 2  # version of the folder's format, increased if earlier code cannot read it
OF_SIZES = 1  # format of pairs with OpenAI's CLIP, which is built from its sizes
PAIR_CONFIG = "config.json"
CARD = "README.md"
WEIGHT_FILES = {"clip": "clip.safetensors", "combiner": "combiner.safetensors"}
BUILT_FROM = "clip"  # subfolder with the files that any other CLIP is built from
KEYS = {"clip": "CLIP", "combiner": "Combiner"}  # part -> its key in `read_checkpoint`
COPY_AGAIN = "copy the folder again, or export it again"


@dataclass(frozen=True, kw_only=True)
class ExportedPair:
    """An exported folder in which no file is missing. `weights` reads its weights and checks their digests.

    Attributes:
        config: content of config.json.
    """

    folder: Path
    config: dict[str, Any]

    @property
    def as_checkpoint(self) -> Checkpoint:
        """Return the pair's preprocessing as a checkpoint without weights, for `resolve_clip_options`."""
        settings = Settings(flags={}, preprocessing=self.config["recipe"], data={}, versions={})
        return Checkpoint(path=self.folder / PAIR_CONFIG, state={}, config=settings.on_disk())

    def weights(self, part: str) -> Checkpoint:
        """Read the weights of a part, "clip" or "combiner".

        Raises:
            UserError: a file differs from the exported file.
        """
        file = self.folder / WEIGHT_FILES[part]
        about = self.config[part]
        _check_digest(file, about["file_sha256"], f"{part}.file_sha256")
        folder = None
        if files := about.get("files"):
            folder = self.folder / BUILT_FROM
            for name, digest in files.items():
                _check_digest(folder / name, digest, f"{part}.files.{name}")
        checkpoint = cast(Checkpoint, read_checkpoint("--pair", file, KEYS[part]))
        return dataclasses.replace(checkpoint, sizes=about["sizes"], folder=folder)


def _check_digest(file: Path, digest: str, field: str) -> None:
    if file_digest(file) != digest:
        raise UserError(
            f"--pair {file} is damaged or was edited: {field} of {PAIR_CONFIG} is the hash of another file: "
            f"{COPY_AGAIN}"
        )


def open_exported(place: Path | str) -> ExportedPair:
    """Open the pair in a folder, or in a Hub repository given as "hf-hub:ORG/REPO", which is downloaded.

    Raises:
        UserError: see `read_exported` and `fetched`.
    """
    name = str(place)
    if not name.startswith(HUB):
        return read_exported(Path(name))
    return read_exported(
        fetched(name.removeprefix(HUB), [PAIR_CONFIG, *WEIGHT_FILES.values(), f"{BUILT_FROM}/*"])
    )


def read_exported(folder: Path) -> ExportedPair:
    """Open the pair in a folder, without reading its weights.

    Raises:
        UserError: a file is missing or unknown, or config.json is damaged, edited or of a newer
            format.
    """
    file = folder / PAIR_CONFIG
    source = f"--pair {file}"
    if not file.is_file():
        raise UserError(
            f"--pair {folder} contains no {PAIR_CONFIG}: choose a folder that export.py wrote"
        )
    content = read_json(file, "export.py")
    form = content.get("form") if isinstance(content, dict) else None
    if type(form) is int and form > PAIR_FORM:
        raise UserError(
            f"{source} has format {form}, but this version reads formats up to {PAIR_FORM}: update this project"
        )

    from models.schemas import Exported
    from runtime.schema import checked

    checked(Exported, content, file=source, remedy=COPY_AGAIN)
    if content["sha256"] != _digest(content):
        raise UserError(
            f"{source} was edited, because its sha256 does not match its other fields: {COPY_AGAIN}"
        )
    needed = [name for part, name in WEIGHT_FILES.items() if content[part] is not None]
    built_from = content["clip"].get("files") or {}
    needed += [f"{BUILT_FROM}/{name}" for name in built_from]
    for name in needed:
        if not (folder / name).is_file():
            raise UserError(f"--pair {folder} contains no {name}: {COPY_AGAIN}")
    for file in _visible_files(folder / BUILT_FROM):
        if file.name not in built_from:
            raise UserError(
                f"--pair {file} is not part of the export and may change the model: remove this file"
            )
    return ExportedPair(folder=folder, config=content)


def _visible_files(folder: Path) -> list[Path]:
    """Return a folder's files except hidden ones, which the system creates; empty if the folder does not exist."""
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if not file.name.startswith("."))


def _digest(config: Mapping[str, Any]) -> str:
    """Return the SHA-256 of all fields except the digest itself, whatever their order and layout in the file."""
    others = {name: value for name, value in config.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def write_exported(
    folder: Path,
    encoder: "Encoder",
    compose: "Composer",
    *,
    training: Mapping[str, Mapping[str, Any]],
    half: bool,
) -> dict[str, Any]:
    """Write the files of a pair except its model card, and return the content of config.json.

    Args:
        training: part -> settings of its training run, as they are on disk; parts without settings
            are left out.
        half: whether to store the weights in fp16.

    Raises:
        UserError: a weight is too large for fp16.
    """
    from combiner import combiner_settings
    from models.clip_model import sizes_by_name
    from models.encoder import versions

    states = {"clip": encoder.model.state_dict()}
    built_from = {}
    if write := encoder.backbone.write:
        (folder / BUILT_FROM).mkdir()
        write(folder / BUILT_FROM)
        files = _visible_files(folder / BUILT_FROM)
        built_from = {file.name: file_digest(file) for file in files}
    sizes = {"clip": None if built_from else sizes_by_name(encoder.model)}
    if combiner := compose.state_dict():
        states["combiner"] = combiner
        sizes["combiner"] = combiner_settings(combiner, {"top_k": compose.top_k}, folder)
    content: dict[str, Any] = {
        "form": PAIR_FORM if built_from else OF_SIZES,
        "recipe": encoder.preprocessing,
        "clip": None,
        "combiner": None,
    }
    for part, state in states.items():
        file = folder / WEIGHT_FILES[part]
        digests = _write_weights(file, state, shared_settings(training.get(part, {})), half=half)
        content[part] = {"sizes": sizes[part], **digests}
    if built_from:
        content["clip"]["files"] = built_from
    content["half"] = half
    content["versions"] = versions()
    config = {**content, "sha256": _digest(content)}
    write_text(folder / PAIR_CONFIG, json.dumps(config, indent=1) + "\n")
    return config


def _write_weights(
    file: Path, state: Mapping[str, "Tensor"], settings: Mapping[str, Any], *, half: bool
) -> dict[str, str]:
    """Write one part's weights with the settings of its training run; return the digests for config.json."""
    from models.encoder import weights_digest
    from runtime.tensors import save_safetensors

    stored = {}
    loaded = {}
    for name, weight in state.items():
        stored[name] = weight.half() if half and weight.is_floating_point() else weight
        loaded[name] = stored[name].to(weight.dtype)
        if not loaded[name].isfinite().all():
            raise UserError(f"--half: {name} is too large for fp16: remove --half")
    save_safetensors(file, stored, settings)
    return {"weights_sha256": weights_digest(loaded), "file_sha256": file_digest(file)}


def shared_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a training run without private ones, such as paths on its machine and account names."""
    if not config:
        return {}
    settings = Settings.read(config)
    flags = {name: value for name, value in settings.flags.items() if name not in FREE_FLAGS}
    return dataclasses.replace(settings, flags=flags).on_disk()
