"""Write the two files that CIRR's evaluation server takes, from the test1 split.

    python src/cirr_test_submission.py --submission-name my_submission --combining-function combiner \
        --combiner-path models_final/combiner_trained_on_cirr --clip-model-path models_final/clip_finetuned_on_cirr
"""

import argparse
import json
import logging
import re
from pathlib import Path

import distributed
import options
from benchmarks import CIRR
from data_utils import Split, check_images_exist
from features import FeatureCache
from pair import load_pair
from retrieval import freeze_queries, top_k
from utils import PROJECT_ROOT, UserError, check_writable, command, write_text

RECALL_LENGTH, SUBSET_LENGTH = 50, 3  # names a query, as the server wants them
logger = logging.getLogger(__name__)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags of a submission."""
    parents = [options.pair_flags(), options.combiner_flags(trains=False), options.tuned_clip_flag()]
    parents += [options.clip_flags(), options.machine_flags()]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], parents=parents)
    group = parser.add_argument_group("submission")
    group.add_argument("--submission-name", required=True, metavar="NAME", help="end of the files' names")
    default = PROJECT_ROOT / "submission" / "CIRR"
    group.add_argument("--output-dir", type=Path, default=default, metavar="DIR", help="(default: submission/CIRR)")
    return parser.parse_args(argv)


def write_submission(path: Path, metric: str, split: Split, names: list[list[str]]) -> None:
    """Write the ranked names of each query under its pair id, sorted and compact."""
    ranked = {str(triplet.pair_id): row for triplet, row in zip(split.triplets, names, strict=True)}
    if len(ranked) != len(split.triplets):
        raise UserError(f"the {split.name} captions repeat a pairid: download the official annotation file again")
    write_text(path, json.dumps({"version": "rc2", "metric": metric} | ranked, sort_keys=True))
    logger.info("%s: %d queries", path, len(ranked))


@command
def main(argv: list[str] | None = None) -> None:
    """Rank test1's gallery for every query, and each query's group."""
    args = parse(argv)
    device = options.pick_device(args.device)
    if not re.fullmatch(r"[\w.@+-]+", args.submission_name):
        raise UserError(f"--submission-name {args.submission_name}: use letters, digits and . _ @ + - only")
    check_writable({"--output-dir": args.output_dir})
    split = CIRR(args.data_root).test1()
    check_images_exist([split])
    paths = args.clip_model_path, args.combiner_path
    choices = options.clip_choice(args), options.combiner_choice(args)
    encoder, compose = load_pair(args.combining_function, *paths, *choices, device, args.num_workers)
    frozen = freeze_queries(FeatureCache(None, encoder), CIRR(args.data_root), split, "cirr-test1")
    nearest, nearest_in_group = top_k(frozen, compose, RECALL_LENGTH, SUBSET_LENGTH, args.similarity_block)
    folder, name = args.output_dir, args.submission_name
    if distributed.is_main():
        write_submission(folder / f"recall_submission_{name}.json", "recall", split, nearest)
        write_submission(folder / f"recall_subset_submission_{name}.json", "recall_subset", split, nearest_in_group)
    distributed.stop()


if __name__ == "__main__":
    main()
