"""List the names that `--clip-model-name` accepts, for `--list-models`."""

import importlib.util

from models.architectures import ARCHITECTURES
from models.names import FOLDER, HUB_SCHEME, OPEN_CLIP, REQUIREMENTS
from reports.tables import text_table


def model_list() -> str:
    """Return a table of the published models: feature dimension, image side in pixels, context length in tokens."""
    rows = {}
    for name, (dim, pixels, *_, tokens, _, _, _, _) in ARCHITECTURES.items():
        rows[name] = _row(dim, pixels, tokens)
    others = f"{HUB_SCHEME}:ORG/REPO, {FOLDER}:FOLDER and {OPEN_CLIP}:ARCH=FILE are accepted too"
    if importlib.util.find_spec(OPEN_CLIP) is None:
        return f"{text_table(rows)}\n{others}; for these and many more names: {REQUIREMENTS}"

    from models.open_clip_package import known_models

    for model in known_models():
        rows[model.name] = _row(model.dim, model.pixels, model.context)
    return f"{text_table(rows)}\n{others}"


def _row(dim: int, pixels: int, tokens: int) -> dict[str, str]:
    return {"features": str(dim), "pixels": str(pixels), "tokens": str(tokens)}
