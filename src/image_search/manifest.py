"""What an index on disk says of itself."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.exported import exported_place
from runtime.choices import ClipChoice, PairChoice, named
from runtime.files import parse_json, read_text, write_text
from utils import UserError, first_line

if TYPE_CHECKING:
    from models.pair import Pair

MANIFEST = "index.json"
REMEDY = "build the index again in another folder"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What an index says of itself, None where there is none. Raises UserError where it is damaged."""
    file = folder / MANIFEST
    try:
        content = parse_json(read_text(file))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({first_line(error)}): {REMEDY}") from None
    from image_search import schemas
    from runtime.schema import checked

    in_milvus = isinstance(content, dict) and "store" in content
    schema = schemas.MilvusManifest if in_milvus else schemas.FilesManifest
    checked(schema, content, file=file, remedy=REMEDY)
    return content


def write_manifest(folder: Path, about: Mapping[str, Any]) -> None:
    """Write what an index says of itself, whole or not at all."""
    write_text(folder / MANIFEST, json.dumps(about, indent=1) + "\n")


def as_made(about: Mapping[str, Any], choice: PairChoice) -> PairChoice:
    """The pair that flags name; where they are silent on CLIP, an index's own.

    An index of an exported pair so has the pair's Combiner too, if the flags name none.

    Args:
        about: the index's manifest, empty where there is none.
    """
    made_with = about.get("pair", {})
    settings = {}
    for name, value in dataclasses.asdict(choice.clip).items():
        settings[name] = made_with.get(name) if value is None else value
    choice = dataclasses.replace(choice, clip=ClipChoice(**settings))
    if choice.exported is not None or choice.clip_path is not None:
        return choice
    if exported := made_with.get("exported"):
        return dataclasses.replace(choice, exported=exported_place(exported))
    clip_path = made_with.get("clip_model_path")
    return dataclasses.replace(choice, clip_path=Path(clip_path) if clip_path else None)


def made_with(choice: PairChoice, pair: "Pair") -> dict[str, Any]:
    """What a query needs to load the same CLIP, for the manifest."""
    recipe = pair.encoder.recipe
    names = [field.name for field in dataclasses.fields(ClipChoice)]
    clip = named({name: recipe[name] for name in names})
    if choice.exported is None:
        return {**clip, "clip_model_path": str(pair.tuned.path.resolve()) if pair.tuned else None}
    place = choice.exported
    return {**clip, "exported": str(place.resolve() if isinstance(place, Path) else place)}


def check_index(folder: Path) -> None:
    """Raise UserError where there is no index, before anything else is loaded."""
    about = read_manifest(folder)
    if about is None:
        raise UserError(f"--index {folder} holds no {MANIFEST}: make one with search.py index")
    if "images" not in about:
        raise UserError(
            f"--index {folder} is not whole yet: go on with search.py index --output {folder}"
        )
