"""Recipes, which `--recipe` puts in place of defaults: name -> script of a stage -> values of its flags.

Nothing else asks for a recipe: a run stores the values that came of it. A switch or a value that a recipe turns on has
`off` where it is declared, so that a flag can turn it off.
"""

from typing import Any

# Of the stages that share them. To be replaced by what is measured.
_SHARED: dict[str, Any] = {
    "mask_duplicate_targets": True,
    "cosine": True,
    "clip_grad_norm": 1.0,
    "drop_text": 0.05,
    "drop_image": 0.05,
}
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "original": {"clip_fine_tune.py": {}, "combiner_train.py": {}},
    "modern": {
        "clip_fine_tune.py": {**_SHARED, "warmup_steps": 100, "flip": 0.5, "crop": 0.8},
        "combiner_train.py": {**_SHARED, "ema_decay": 0.999, "feature_noise": 0.1},
    },
}
