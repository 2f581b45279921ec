"""What an index on disk says of itself."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.choices import ClipChoice
from runtime.files import parse_json, read_text
from utils import UserError, first_line

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
    from image_search.schemas import Manifest
    from runtime.schema import checked

    checked(Manifest, content, file=file, remedy=REMEDY)
    return content


def as_made(
    about: Mapping[str, Any], choice: ClipChoice, clip_path: Path | None
) -> tuple[ClipChoice, Path | None]:
    """The CLIP that flags name and its fine-tuned weights; where they are silent, an index's own.

    Args:
        about: the index's manifest, empty where there is none.
    """
    pair = about.get("pair", {})
    settings = {}
    for name, value in dataclasses.asdict(choice).items():
        settings[name] = pair.get(name) if value is None else value
    if clip_path is None and pair.get("clip_model_path"):
        clip_path = Path(pair["clip_model_path"])
    return ClipChoice(**settings), clip_path


def check_index(folder: Path) -> None:
    """Raise UserError where there is no index, before anything else is loaded."""
    if read_manifest(folder) is None:
        raise UserError(f"--index {folder} holds no {MANIFEST}: make one with search.py index")
