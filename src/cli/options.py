"""Declare the flags that several scripts share, and convert them to the choice of a trained pair."""

import argparse
from collections.abc import Mapping
from typing import Any

from benchmarks import BENCHMARKS, CIRCO, PROTOCOLS
from cli.parsers import Alias, ListModels
from image_search.stores.base import store_address
from runtime.choices import COMBINING_FUNCTIONS
from settings import groups
from settings.declaring import parent, subjects
from settings.flag_types import (
    Several,
    concept_template,
    fraction,
    in_any_case,
    pair_place,
    positive_int,
    seed_int,
    usable_path,
)
from settings.groups import PairChoice
from settings.recipes import RECIPES

Group = argparse._ArgumentGroup | argparse.ArgumentParser  # object to which flags are added


def add_dataset(
    group: Group, *, required: bool, help: str = "benchmark to use (not case-sensitive)"
) -> None:
    """Add --dataset."""
    names = list(BENCHMARKS)
    group.add_argument(
        "--dataset", type=in_any_case(names), choices=names, required=required, help=help
    )


def add_protocol(group: Group, *, help: str) -> None:
    """Add --protocol, which accepts several protocols."""
    names = list(PROTOCOLS)
    group.add_argument(
        "--protocol",
        type=in_any_case(names),
        choices=names,
        nargs="+",
        action=Several,
        help=help,
    )


def add_seed(group: Group, *, help: str) -> None:
    """Add --seed.

    Args:
        help: the rest of the help text, such as "for the resampling".
    """
    group.add_argument("--seed", type=seed_int, default=0, help=f"random seed {help}")


def add_resampling(group: Group, *, resamples: int) -> None:
    """Add the flags of bootstrap intervals: --resample-by, --confidence, --resamples and --seed."""
    group.add_argument(
        "--resample-by",
        type=str.lower,
        default="reference",
        metavar="COLUMN",
        help="resample queries with the same reference or target together, or with the same value in a column of your "
        "own triplets; with query, resample them one by one",
    )
    group.add_argument(
        "--confidence",
        type=fraction,
        default=0.95,
        help="confidence level of the intervals, between 0 and 1",
    )
    group.add_argument(
        "--resamples",
        type=positive_int,
        default=resamples,
        help="number of bootstrap resamples for the intervals",
    )
    add_seed(group, help="for the resampling")


def add_k(group: Group, *, default: int, help: str = "number of results") -> None:
    """Add --k."""
    group.add_argument("--k", type=positive_int, default=default, help=help)


def add_store(group: Group, *, help: str) -> None:
    """Add --store."""
    group.add_argument("--store", type=store_address, metavar="WHERE", help=help)


def add_clip_batch_size(group: Group, *, help: str) -> None:
    """Add --clip-bs."""
    group.add_argument("--clip-bs", type=positive_int, default=32, help=help)


def compute_flags(decodes: bool = True) -> argparse.ArgumentParser:
    """Return the flags for the device and the data-loader workers.

    Args:
        decodes: whether the script decodes many images; if not, it uses no workers.
    """
    if decodes:
        return argparse.ArgumentParser(
            add_help=False, parents=[parent(groups.Decoding), parent(groups.Device)]
        )
    parser = parent(groups.Device)
    parser.set_defaults(num_workers=0)
    return parser


def clip_flags() -> argparse.ArgumentParser:
    """Return the flags for CLIP and its preprocessing, None by default; `resolve_clip_options` replaces None."""
    parser = parent(groups.Clip)
    parser._action_groups[-1].add_argument(
        "--list-models", action=ListModels, help="print the available CLIP models and exit"
    )
    return parser


def exported_flag() -> argparse.ArgumentParser:
    """Return the flag --pair."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("exported pair")
    group.add_argument(
        "--pair",
        type=pair_place,
        action=Alias,
        other="combining_function",
        metavar="DIR",
        help="exported CLIP, with or without a Combiner: a folder from export.py, or hf-hub:ORG/REPO; replaces "
        "--clip-model-path and --combiner-path; if there is a Combiner, it composes the queries",
    )
    return parser


def add_combiner_path(group: Group, *, help: str) -> None:
    """Add --combiner-path."""
    group.add_argument("--combiner-path", type=usable_path, metavar="PATH", help=help)


def training_flags(stage: type[groups.BothStages]) -> list[argparse.ArgumentParser]:
    """Return all flags of a stage, in the order of its subjects."""
    parents = []
    for group in subjects(stage):
        parents.append(clip_flags() if group is groups.Clip else parent(group, stage))
    return parents


def parse_with_recipe(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    stages: Mapping[str, argparse.ArgumentParser],
) -> argparse.Namespace:
    """Parse the flags of training; the values of `--recipe` replace the defaults of flags that are not given.

    Args:
        stages: training script -> parser of its flags.
    """
    recipe = RECIPES[parser.parse_args(argv).recipe]
    for script, stage in stages.items():
        stage.set_defaults(**recipe[script])
    return parser.parse_args(argv)


def pair_flags(required: bool = True, silent: str = "") -> argparse.ArgumentParser:
    """Return the flags for the composition of queries.

    Args:
        silent: end of the help of --combining-function, which describes the default if there is one.
    """
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("composition")
    group.add_argument(
        "--combining-function",
        type=in_any_case(COMBINING_FUNCTIONS),
        choices=COMBINING_FUNCTIONS,
        required=required,
        help="composition of a query; combiner: Combiner; sum: image feature + text feature; image, text: that feature "
        f"alone{silent}",
    )
    add_combiner_path(group, help="stage-2 weights for combiner: a checkpoint, or a run folder")
    return parser


def measuring_flags() -> argparse.ArgumentParser:
    """Return the flags that are needed only to evaluate a pair on a benchmark."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("measuring")
    group.add_argument(
        "--feature-cache",
        type=usable_path,
        metavar="DIR",
        help="folder for cached features, so that interrupted encoding can resume (default: no cache)",
    )
    add_verify(
        group,
        help="detect changed images by hashing whole files (default: by size, modification time and the first, "
        "middle and last 4 KiB)",
    )
    group.add_argument(
        "--concept-template",
        type=concept_template,
        metavar="TEXT",
        help=f"template of the query text in CIRCO's protocols with the concept (default: {CIRCO.concept_template})",
    )
    return parser


def evaluation_flags(*, needs_pair: bool = True) -> list[argparse.ArgumentParser]:
    """Return the flags for a trained pair, the data and the device of an evaluation, without --dataset."""
    return [
        exported_flag(),
        pair_flags(required=needs_pair),
        parent(groups.WantedCombiner),
        parent(groups.TunedClip),
        clip_flags(),
        measuring_flags(),
        parent(groups.Data),
        compute_flags(),
        parent(groups.Evaluation),
    ]


def search_flags() -> list[argparse.ArgumentParser]:
    """Return the flags for an index and for the composition of its queries; CLIP is determined by the index."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("index")
    group.add_argument(
        "--index",
        type=usable_path,
        required=True,
        metavar="INDEX",
        help="index folder written by search.py index",
    )
    add_store(
        group,
        help="store of the index (default: the one recorded in the index); pass the address of a Milvus server to "
        "allow sending MILVUS_TOKEN to it, which is not needed if the index was made on this machine",
    )
    composition = pair_flags(required=False, silent=" (default: combiner if there is one)")
    return [parser, exported_flag(), composition, parent(groups.WantedCombiner)]


def add_verify(group: Group, *, help: str) -> None:
    """Add --verify."""
    group.add_argument("--verify", action="store_true", help=help)


def pair_choice(args: argparse.Namespace) -> PairChoice:
    """Return the pair that `pair_flags` and related flags choose."""
    return PairChoice(
        combining_function=args.combining_function,
        clip_path=args.clip_model_path,
        combiner_path=args.combiner_path,
        exported=args.pair,
        clip=groups.Clip.of(args),
        combiner=groups.WantedCombiner.of(args),
        workers=args.num_workers,
        feature_cache=getattr(args, "feature_cache", None),
        told_by=told_by(args),
    )


def told_by(args: Any) -> str:
    """Return the value of `told_by` for `runtime.files.stamp`: "content" with --verify, "sample" without it."""
    return "content" if getattr(args, "verify", False) else "sample"
