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
from runtime.files import parse_json, read_text, write_text
from runtime.schema import checked
from settings.groups import Clip, PairChoice
from utils import UserError, first_line, printable

if TYPE_CHECKING:
    from models.pair import Pair

logger = logging.getLogger(__name__)

MANIFEST = "index.json"
REBUILD = "build the index again in another folder"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read what an index says of itself, None where there is none. Raises UserError where it is damaged."""
    file = folder / MANIFEST
    try:
        content = parse_json(read_text(file))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({first_line(error)}): {REBUILD}") from None
    address = FAISS
    if isinstance(content, dict) and "store" in content:
        address = checked(StoreManifest, content, file=file, remedy=REBUILD).store
        if address.partition(":")[0] not in STORES:
            raise UserError(f"{file}: store: {printable(address)} is not a store: {REBUILD}")
    checked(store_of(address).manifest, content, file=file, remedy=REBUILD)
    return content


def write_manifest(folder: Path, about: Mapping[str, Any]) -> None:
    """Write what an index says of itself, whole or not at all."""
    content = {**about, "made_here": _seal(folder, about)}
    write_text(folder / MANIFEST, json.dumps(content, indent=1) + "\n")


def is_own(folder: Path, about: Mapping[str, Any]) -> bool:
    """Return whether an index was made in this very folder of this machine, and names what it named then.

    One that was copied, fetched or edited was not: what it names outside its folder was typed by somebody else.
    """
    return about.get("made_here") == _seal(folder, about)


def _seal(folder: Path, about: Mapping[str, Any]) -> str:
    """Digest of what an index names outside its folder, and of what nobody elsewhere knows of the folder."""
    machine = Path("/etc/machine-id")
    known = [
        machine.read_text() if machine.is_file() else "",
        folder.stat().st_ino,
        about.get("store"),
        about.get("pair"),
    ]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def check_named(folder: Path, about: Mapping[str, Any], flag: str, name: str) -> None:
    """Let a folder or repository be opened that only an index names: one that was made here, and with a line."""
    if not is_own(folder, about):
        raise UserError(
            f"{folder / MANIFEST} was made on another machine and refers to {name}: pass {flag} {name} if you trust it"
        )
    logger.info("opening %s, recorded in %s", name, folder / MANIFEST)


def as_made(folder: Path, about: Mapping[str, Any], choice: PairChoice) -> PairChoice:
    """The pair that flags name; where they are silent on CLIP, an index's own.

    An index of an exported pair so has the pair's Combiner too, if the flags name none.

    Args:
        about: the index's manifest, empty where there is none.

    Raises:
        UserError: the index was made elsewhere, and only it names a folder or a repository that the pair is in.
    """
    made_with = about.get("pair", {})
    settings = {}
    for name, value in choice.clip.model_dump().items():
        settings[name] = made_with.get(name) if value is None else value
    asked = choice.clip.clip_model_name
    choice = dataclasses.replace(choice, clip=Clip(**settings))
    if choice.exported is not None:
        return choice
    exported = made_with.get("exported")
    if exported and choice.clip_path is None:
        check_named(folder, about, "--pair", exported)
        return dataclasses.replace(choice, exported=exported)
    name = choice.clip.clip_model_name or ""
    if asked is None and name.startswith((f"{FOLDER}:", f"{HUB_SCHEME}:")):
        check_named(folder, about, "--clip-model-name", name)
    if choice.clip_path is not None:
        return choice
    clip_path = made_with.get("clip_model_path")
    return dataclasses.replace(choice, clip_path=Path(clip_path) if clip_path else None)


def made_with(choice: PairChoice, pair: "Pair") -> dict[str, Any]:
    """Return what a query needs to load the same CLIP, for the manifest."""
    preprocessing = pair.encoder.preprocessing
    clip = named({name: preprocessing[name] for name in Clip.model_fields})
    clip["background"] = preprocessing["background"]  # named always, as in `encoder_key`
    if choice.exported is None:
        return {**clip, "clip_model_path": str(pair.tuned.path.resolve()) if pair.tuned else None}
    place = choice.exported
    return {**clip, "exported": str(place.resolve() if isinstance(place, Path) else place)}


def check_index(folder: Path) -> dict[str, Any]:
    """Read what an index says of itself. Raises UserError where there is none, before anything else is loaded."""
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
