"""Export a trained pair to one folder that others can load, with a model card, and optionally upload it.

    python src/export.py --clip-model-path models/THE_RUN --combiner-path models/THE_OTHER_RUN --output my_pair \
        --results fiq.json

Scripts with the flags `--clip-model-path` and `--combiner-path` accept `--pair my_pair` instead. Without
--combiner-path, the pair composes queries by the sum; without --clip-model-path, it has the pretrained weights of CLIP.
"""

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path

from cli import options
from cli.parsers import ScriptParser
from cli.startup import check_files
from evaluation.result_file import Result, read_result
from runtime.files import check_new_or_empty, check_writable, folder_made_beside, write_text
from runtime.hub import HUB, import_hub, upload
from settings import groups
from settings.declaring import parent
from settings.flag_types import Several, repository, usable_path
from settings.groups import PairChoice
from utils import command

logger = logging.getLogger(__name__)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags of an export."""
    parents = [
        parent(groups.TunedClip),
        options.clip_flags(),
        parent(groups.WantedCombiner),
    ]
    parser = ScriptParser(__doc__, parents=parents)
    options.add_combiner_path(
        parser,
        help="stage-2 weights, a checkpoint or a run folder (default: none; queries are composed by the sum)",
    )
    group = parser.add_argument_group("export")
    group.add_argument(
        "--output",
        type=usable_path,
        required=True,
        metavar="DIR",
        help="output folder for the pair, new or empty",
    )
    group.add_argument(
        "--half", action="store_true", help="store weights rounded to fp16, in half the disk space"
    )
    group.add_argument(
        "--results",
        type=usable_path,
        nargs="+",
        action=Several,
        default=[],
        metavar="FILE",
        help="result files of validate.py --metrics-json for the model card",
    )
    group.add_argument(
        "--push",
        type=repository,
        metavar="ORG/REPO",
        help="upload the pair to the Hugging Face Hub",
    )
    return parser.parse_args(argv)


def export(args: argparse.Namespace, results: Mapping[Path, Result]) -> None:
    """Load the pair, and write it with its model card.

    Args:
        results: file -> result of the pair, for the model card.
    """
    import torch

    from evaluation.model_card import Exporting, check_results, model_card
    from models.exported import CARD, write_exported
    from models.pair import load_pair

    choice = PairChoice(
        combining_function=None,
        clip_path=args.clip_model_path,
        combiner_path=args.combiner_path,
        clip=groups.Clip.of(args),
        combiner=groups.WantedCombiner.of(args),
    )
    pair = load_pair(choice, torch.device("cpu"))
    about = pair.describe()
    with folder_made_beside(args.output) as folder:
        config = write_exported(
            folder, pair.encoder, pair.compose, training=about["training"], half=args.half
        )
        stored = {part: config[part]["weights_sha256"] for part in about["weights_sha256"]}
        check_results(results, [about["weights_sha256"], stored], about["preprocessing"])
        place = f"{HUB}{args.push}" if args.push else args.output.name
        exporting = Exporting(config=config, training=about["training"], place=place)
        write_text(folder / CARD, model_card(exporting, list(results.values())))
    logger.info(
        "%s: %s", args.output, ", ".join(sorted(file.name for file in args.output.iterdir()))
    )


@command
def main(argv: list[str] | None = None) -> None:
    """Write the folder, and upload it if requested."""
    args = parse(argv)
    check_files(args)
    args.output = args.output.absolute()  # so that even "." has a name for the model card
    check_new_or_empty("--output", args.output)
    check_writable({"--output": args.output.parent})
    results = {file: read_result(file) for file in args.results}
    if args.push:
        import_hub()  # a missing package is reported before the pair is loaded
    export(args, results)
    if args.push:
        upload(args.output, args.push)
        logger.info("%s: https://huggingface.co/%s", args.output, args.push)


if __name__ == "__main__":
    main()
