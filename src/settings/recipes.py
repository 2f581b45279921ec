"""Recipes, sets of flag values that `--recipe` uses as defaults: name -> training script -> flag values.

Only the parsing of flags reads recipes: a run stores the resulting values. A switch or value that a recipe turns on
needs `off` in its declaration, so that a flag can turn it off again.
"""

from typing import Any

RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "original": {"clip_fine_tune.py": {}, "combiner_train.py": {}},
    # The parts whose combination improved recall in bench/recipe_study.py, see docs/recipe.md.
    "modern": {
        "clip_fine_tune.py": {
            "mask_duplicate_targets": True,
            "clip_grad_norm": 1.0,
            "ema_decay": 0.98,
            "hard_negatives": 1,
        },
        "combiner_train.py": {"negatives": "bank"},
    },
}
