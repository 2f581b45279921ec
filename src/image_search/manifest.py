"""Read and write the manifest of an index on disk."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from image_search.schemas import StoreManifest
from image_search.stores.base import FAISS, STORES, store_of
from models.names import FOLDER, HUB_SCHEME
from runtime.choices import named
from runtime.files import parse_json, write_text
from runtime.schema import checked
from settings.groups import Clip, PairChoice
from utils import UserError, first_line, printable

if TYPE_CHECKING:
    from models.pair import Pair

logger = logging.getLogger(__name__)

MANIFEST = "index.json"
REBUILD = "build the index again in another folder"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read the manifest of an index; None if it does not exist. Raises UserError if it is damaged."""
    file = folder / MANIFEST
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({first_line(error)}): {REBUILD}") from None
    address = FAISS
    if isinstance(content, dict) and "store" in content:
        address = checked(StoreManifest, content, file=file, remedy=REBUILD).store
        if address.partition(":")[0] not in STORES:
            raise UserError(f"{file}: unknown store {printable(address)}: {REBUILD}")
    checked(store_of(address).manifest, content, file=file, remedy=REBUILD)
    return content


def write_manifest(folder: Path, about: Mapping[str, Any]) -> None:
    """Write the manifest of an index atomically."""
    content = {**about, "made_here": _seal(folder, about)}
    write_text(folder / MANIFEST, json.dumps(content, indent=1) + "\n")


def is_own(folder: Path, about: Mapping[str, Any]) -> bool:
    """Check whether an index was made in this folder on this machine, and still refers to the same store and pair.

    If not, it was copied, downloaded or edited, and somebody else may have chosen the store and the pair.
    """
    return about.get("made_here") == _seal(folder, about)


def _seal(folder: Path, about: Mapping[str, Any]) -> str:
    """Return a digest of the store and pair of an index, of the folder's inode, and of the machine's ID."""
    machine = Path("/etc/machine-id")
    known = [
        machine.read_text() if machine.is_file() else "",
        folder.stat().st_ino,
        about.get("store"),
        about.get("pair"),
    ]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def check_named(folder: Path, about: Mapping[str, Any], flag: str, name: str) -> None:
    """Raise UserError if an index from another machine refers to a resource that no flag names; else log its name."""
    if not is_own(folder, about):
        raise UserError(
            f"{folder / MANIFEST} was made on another machine and refers to {name}: pass {flag} {name} if you trust it"
        )
    logger.info("opening %s, recorded in %s", name, folder / MANIFEST)


def as_made(folder: Path, about: Mapping[str, Any], choice: PairChoice) -> PairChoice:
    """Return the pair chosen by flags, completed with the CLIP that an index was made with.

    If the index was made with an exported pair, its Combiner is used too, unless the flags choose another.

    Args:
        about: manifest of the index; empty for a new index.

    Raises:
        UserError: the index is from another machine and refers to a folder or repository that no flag names.
    """
    made_with = about.get("pair", {})
    settings = {}
    for name, value in choice.clip.model_dump().items():
        settings[name] = made_with.get(name) if value is None else value
    requested = choice.clip.clip_model_name
    choice = dataclasses.replace(choice, clip=Clip(**settings))
    if choice.exported is not None:
        return choice
    exported = made_with.get("exported")
    if exported and choice.clip_path is None:
        check_named(folder, about, "--pair", exported)
        return dataclasses.replace(choice, exported=exported)
    name = choice.clip.clip_model_name or ""
    if requested is None and name.startswith((f"{FOLDER}:", f"{HUB_SCHEME}:")):
        check_named(folder, about, "--clip-model-name", name)
    if choice.clip_path is not None:
        return choice
    clip_path = made_with.get("clip_model_path")
    return dataclasses.replace(choice, clip_path=Path(clip_path) if clip_path else None)


def made_with(choice: PairChoice, pair: "Pair") -> dict[str, Any]:
    """Return the settings with which a query loads the same CLIP, for the manifest."""
    preprocessing = pair.encoder.preprocessing
    clip = named({name: preprocessing[name] for name in Clip.model_fields})
    clip["background"] = preprocessing["background"]  # always recorded, as in `encoder_key`
    if choice.exported is None:
        return {**clip, "clip_model_path": str(pair.tuned.path.resolve()) if pair.tuned else None}
    source = choice.exported
    return {**clip, "exported": str(source.resolve() if isinstance(source, Path) else source)}


def check_index(folder: Path) -> dict[str, Any]:
    """Read the manifest of a complete index. Raises UserError if there is none. Reads no other file."""
    about = read_manifest(folder)
    if about is None:
        raise UserError(
            f"--index {folder} contains no {MANIFEST}: create an index with search.py index"
        )
    if "images" not in about:
        raise UserError(
            f"--index {folder} is incomplete: resume with search.py index --output {folder}"
        )
    return about
