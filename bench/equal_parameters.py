"""Print the hidden sizes at which other Combiners have as many parameters as a mixture, as a table in Markdown.

    python bench/equal_parameters.py --clip-dim 64 --projection-dim 256 --hidden-dim 512 --num-experts 4 --top-k 2

The other Combiners are one expert, the plain Combiner, and a mixture with a shared expert. The flags are the Combiner
flags of combiner_train.py and `--clip-dim`, the dimension of CLIP's features. Optional parts of a mixture are counted.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

import torch

from combiner import build_combiner
from settings import groups
from settings.declaring import parent

ONE_EXPERT = {"combiner_type": "moe", "num_experts": 1, "top_k": 1, "shared_expert": False}
PLAIN = {"combiner_type": "clip4cir"}


def parameters(settings: Mapping[str, Any]) -> int:
    """Count the parameters of a Combiner."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_combiner(settings).parameters())


def equal_hidden_dim(mixture: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    """Return the hidden size at which another Combiner's number of parameters is nearest to a mixture's.

    Each hidden unit adds the same number of parameters.
    """
    one, two = (parameters({**mixture, **other, "hidden_dim": size}) for size in (1, 2))
    return 1 + round((parameters(mixture) - one) / (two - one))


def table(mixture: Mapping[str, Any]) -> str:
    """Return a table of Combiners with about as many parameters as a mixture: hidden sizes and parameters."""
    kinds = {"the mixture": {}, "one expert": ONE_EXPERT, "plain": PLAIN}
    if mixture["top_k"] < mixture["num_experts"]:
        fewer = {"num_experts": mixture["num_experts"] - 1, "shared_expert": True}
        kinds["one shared expert"] = fewer
    lines = ["| | `--hidden-dim` | parameters |", "|---|---:|---:|"]
    for title, other in kinds.items():
        size = equal_hidden_dim(mixture, other)
        count = parameters({**mixture, **other, "hidden_dim": size})
        lines.append(f"| {title} | {size:,} | {count:,} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], parents=[parent(groups.CombinerFlags)]
    )
    parser.add_argument("--clip-dim", type=int, required=True)
    print(table(vars(parser.parse_args(argv))))


if __name__ == "__main__":
    main()
