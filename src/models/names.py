"""Parse and check `--clip-model-name` before anything heavy is loaded."""

import difflib
import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.choices import OPENAI_CLIPS
from runtime.files import find_checkpoint, is_there, read_json
from utils import UserError

OPEN_CLIP = "open_clip"
HUB_SCHEME = "hf-hub"
FOLDER = "local-dir"
MODEL_CONFIG = "open_clip_config.json"  # architecture and preprocessing, in a folder or repository
WEIGHTS = ("*.safetensors", "*.bin", "*.pth")  # files that open_clip looks for in a folder
REQUIREMENTS = "pip install -r requirements-open-clip.txt"


@dataclass(frozen=True, kw_only=True)
class OpenClipName:
    """The parsed name of an open_clip model.

    Attributes:
        scheme: OPEN_CLIP, HUB_SCHEME or FOLDER.
        model: an architecture, ORG/REPO, or a folder.
        tag: tag of published weights of an architecture.
        weights: file of weights, in place of a tag.
    """

    scheme: str
    model: str
    tag: str = ""
    weights: Path | None = None

    @property
    def for_open_clip(self) -> str:
        """Return open_clip's name for the model."""
        return self.model if self.scheme == OPEN_CLIP else f"{self.scheme}:{self.model}"

    @property
    def short(self) -> str:
        """Return a short form without folders, for file names."""
        if self.scheme == FOLDER:
            return Path(self.model).name
        parts = (self.model, self.tag, self.weights.stem if self.weights else "")
        return "-".join(part for part in parts if part)


def open_clip_name(name: str) -> OpenClipName | None:
    """Parse the name of an open_clip model and make its paths absolute; return None for OpenAI's names and for paths.

    Raises:
        UserError: the name has a prefix of open_clip models but is incomplete.
    """
    scheme, colon, rest = name.partition(":")
    if not colon or scheme not in (OPEN_CLIP, HUB_SCHEME, FOLDER):
        return None
    if scheme == FOLDER:
        return OpenClipName(scheme=scheme, model=str(_in_full(rest)))
    if scheme == HUB_SCHEME:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", rest):
            raise UserError(f"--clip-model-name {name}: pass a repository as {HUB_SCHEME}:ORG/REPO")
        return OpenClipName(scheme=scheme, model=rest)
    architecture, equals, file = rest.partition("=")
    tag = ""
    if not equals:
        architecture, _, tag = rest.rpartition("/")
    if not architecture or not (tag or file):
        raise UserError(
            f"--clip-model-name {name}: pass published weights as {OPEN_CLIP}:ARCH/TAG, or a file of weights as "
            f"{OPEN_CLIP}:ARCH=FILE; --list-models lists them"
        )
    weights = _in_full(file) if file else None
    # open_clip writes the slash of an architecture's name, as in ViT-B/32, as a dash.
    model = architecture.replace("/", "-")
    return OpenClipName(scheme=scheme, model=model, tag=tag, weights=weights)


def _in_full(path: str) -> Path:
    return Path(path).expanduser().absolute()


def in_full(name: str) -> str:
    """Return a model's name with absolute paths, since stored settings may be read from another working directory."""
    model = open_clip_name(name)
    if model and model.weights:
        return f"{OPEN_CLIP}:{model.model}={model.weights}"
    if model:
        return model.for_open_clip if model.scheme == FOLDER else name
    if name in OPENAI_CLIPS or not is_there(Path(name)):
        return name
    return str(find_checkpoint("--clip-model-name", Path(name)).resolve())


def find_clip(name: str) -> Path | None:
    """Find the checkpoint in OpenAI's format at the path `--clip-model-name`; return None for an OpenAI model's name.

    Raises:
        UserError: the value is neither.
    """
    if name in OPENAI_CLIPS:
        return None
    if not is_there(Path(name)):
        raise UserError(
            f"--clip-model-name {name}: not a file: choose {', '.join(OPENAI_CLIPS)}, "
            f"{OPEN_CLIP}:ARCH/TAG, {OPEN_CLIP}:ARCH=FILE, {HUB_SCHEME}:ORG/REPO or {FOLDER}:FOLDER"
        )
    return find_checkpoint("--clip-model-name", Path(name))


def check_clip(name: str) -> None:
    """Raise UserError if the model of `--clip-model-name` does not exist, as far as is known without loading it."""
    model = open_clip_name(name)
    if model is None:
        find_clip(name)
        return
    if OPEN_CLIP not in sys.modules and importlib.util.find_spec(OPEN_CLIP) is None:
        raise UserError(f"--clip-model-name {name} needs open_clip: {REQUIREMENTS}")
    if model.scheme == FOLDER:
        read_config(Path(model.model))
    if model.scheme == OPEN_CLIP:
        check_architecture(model.model)
    if model.weights and not model.weights.is_file():
        raise UserError(
            f"--clip-model-name {name}: {model.weights} does not exist: choose another file"
        )


def check_architecture(architecture: str) -> None:
    """Raise UserError, with the most similar names, if open_clip has no such architecture."""
    known = architectures()
    if architecture in known:
        return
    spelled = {name.lower(): name for name in known}
    nearest = difflib.get_close_matches(architecture.lower(), spelled, n=3, cutoff=0.3)
    names = ", ".join(spelled[name] for name in nearest)
    hint = f"; similar names: {names}" if names else ""
    raise UserError(
        f"--clip-model-name {OPEN_CLIP}:{architecture}: open_clip has no such architecture{hint}; --list-models lists "
        "all"
    )


def architectures() -> list[str]:
    """Return the architectures of open_clip, from its files if it is not imported yet."""
    if OPEN_CLIP in sys.modules:
        return sys.modules[OPEN_CLIP].list_models()
    package = importlib.util.find_spec(OPEN_CLIP)
    names: list[str] = []
    for folder in (package and package.submodule_search_locations) or []:
        names += [file.stem for file in Path(folder, "model_configs").glob("*.json")]
    return sorted(names)


def read_config(folder: Path) -> dict[str, Any]:
    """Read the configuration of the model in a folder.

    Raises:
        UserError: the folder, its configuration or its weights are missing, or the configuration is
            invalid.
    """
    source = f"--clip-model-name {FOLDER}:{folder}"
    if not folder.is_dir():
        raise UserError(f"{source}: there is no such folder: choose another folder")
    if not (folder / MODEL_CONFIG).is_file():
        raise UserError(
            f"{source} has no {MODEL_CONFIG}: download it from the source of the weights, or pass {OPEN_CLIP}:ARCH=FILE"
        )
    if not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        raise UserError(f"{source} has no weights ({', '.join(WEIGHTS)}): download them too")
    return checked_config(read_json(folder / MODEL_CONFIG, "open_clip"), folder / MODEL_CONFIG)


def checked_config(content: Any, source: object) -> dict[str, Any]:
    """Return a configuration of open_clip after checking it against `schemas.OpenClipConfig`.

    The schema makes sure that a configuration cannot open arbitrary files or run code.

    Raises:
        UserError: a field is missing or invalid; the message names the first.
    """
    from models.schemas import OpenClipConfig
    from runtime.schema import checked

    remedy = "download it again; it should have model_cfg with embed_dim, vision_cfg and text_cfg"
    checked(OpenClipConfig, content, file=f"--clip-model-name: {source}", remedy=remedy)
    return content


def short_name(clip_model_name: str) -> str:
    """Return a short name of a CLIP, without folders."""
    known = open_clip_name(clip_model_name)
    if known is not None:
        return known.short
    return Path(clip_model_name).stem if clip_model_name.endswith(".pt") else clip_model_name
