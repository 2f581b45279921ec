"""Average the weights of several checkpoints into one: different epochs of a run, or different seeds of stage 1.

    python src/average.py --checkpoints models/THE_RUN/saved_models/tuned_clip_8.pt \
        models/THE_RUN/saved_models/tuned_clip_9.pt --output soup.pt

Inference with such a "model soup" (Wortsman et al. 2022, arXiv 2203.05482) costs no more than with a single checkpoint.
All checkpoints must come from the same initial weights, as CLIPs of different seeds do, but not Combiners.
"""

import argparse
import logging
from pathlib import Path
from typing import Any, cast

from cli.parsers import ScriptParser
from cli.startup import command_line
from models.configuration import Checkpoint, Settings, read_checkpoint
from runtime.files import check_writable, find_checkpoint
from settings.flag_types import Several, usable_path
from utils import UserError, command

logger = logging.getLogger(__name__)

FLAG = "--checkpoints"
# Part of the model in a checkpoint -> settings that all averaged checkpoints must share, besides their preprocessing.
SHARED: dict[str, tuple[str, ...]] = {
    "CLIP": (),
    "Combiner": ("clip_weights", "combiner_type", "top_k", "seed"),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags of an average."""
    parser = ScriptParser(__doc__)
    parser.add_argument(
        FLAG,
        type=usable_path,
        nargs="+",
        action=Several,
        required=True,
        metavar="FILE",
        help="checkpoints to average, at least two of the same stage",
    )
    parser.add_argument(
        "--output",
        type=usable_path,
        required=True,
        metavar="FILE",
        help="output file for the averaged checkpoint",
    )
    return parser.parse_args(argv)


def averaged(files: list[Path], made_by: str) -> dict[str, Any]:
    """Return the content of a checkpoint with the mean weights of several checkpoints and the settings of the first.

    Args:
        made_by: command to be recorded in the settings.

    Raises:
        UserError: a file is not a checkpoint, or belongs to a different model than the first.
    """
    from runtime.tensors import load_tensors

    kind = next((kind for kind in SHARED if kind in load_tensors(files[0])), "CLIP")
    first = read(files[0], kind)
    total = {name: weight.double() for name, weight in first.state.items()}
    for file in files[1:]:
        other = read(file, kind)
        check_same_model(first, other, SHARED[kind])
        for name, weight in other.state.items():
            total[name] += weight
    mean = {}
    for name, weight in first.state.items():
        mean[name] = (total[name] / len(files)).to(weight.dtype)
    settings = Settings.read(first.config).with_flags(command=made_by)
    return {kind: mean, "config": settings.on_disk()}


def read(file: Path, kind: str) -> Checkpoint:
    """Read a checkpoint. Raises UserError if the file is not a checkpoint, or belongs to the other stage."""
    return cast(Checkpoint, read_checkpoint(FLAG, file, kind))


def check_same_model(first: Checkpoint, other: Checkpoint, names: tuple[str, ...]) -> None:
    """Reject a checkpoint if its model or its initial weights differ from those of the first checkpoint."""
    for name in [*Settings.read(first.config).preprocessing, *names]:
        ours = first.table.get(name)
        theirs = other.table.get(name)
        if ours != theirs:
            raise UserError(
                f"{FLAG} {other.path}: {name} is {theirs}, but {ours} in {first.path}: choose checkpoints of one model"
            )
    if _shapes(first) != _shapes(other):
        raise UserError(
            f"{FLAG} {other.path} and {first.path} have weights with different names or shapes: choose checkpoints "
            "of one model"
        )


def _shapes(checkpoint: Checkpoint) -> dict[str, Any]:
    return {name: weight.shape for name, weight in checkpoint.state.items()}


@command
def main(argv: list[str] | None = None) -> None:
    """Write the averaged checkpoint."""
    args = parse(argv)
    files = [find_checkpoint(FLAG, path) for path in args.checkpoints]
    if len(files) < 2:
        raise UserError(f"{FLAG}: one checkpoint cannot be averaged: pass at least two")
    check_writable({"--output": args.output.parent})

    from runtime.tensors import save_tensors

    save_tensors(args.output, averaged(files, command_line("average.py", argv)))
    logger.info("%s: the mean of %d checkpoints", args.output, len(files))


if __name__ == "__main__":
    main()
