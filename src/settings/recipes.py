"""Recipes, which `--recipe` puts in place of defaults: name -> script of a stage -> values of its flags.

Nothing else asks for a recipe: a run stores the values that came of it. A switch or a value that a recipe turns on has
`off` where it is declared, so that a flag can turn it off.
"""

from typing import Any

RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "original": {"clip_fine_tune.py": {}, "combiner_train.py": {}},
    # The parts that held together in bench/recipe_study.py, see docs/recipe.md.
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
