"""Every flag that scripts share, spelled once: alone, as argparse parents in titled groups, and what they ask for."""

import argparse
import os

from benchmarks import BENCHMARKS, CIRCO, PROTOCOLS
from cli.flag_types import (
    concept_template,
    expert_count,
    fraction,
    in_any_case,
    learning_rate,
    model_name,
    natural_int,
    pair_place,
    path_or_auto,
    positive_float,
    positive_int,
    rows,
    seed_int,
    side_ratio,
    usable_path,
    weight,
    width,
    workers,
)
from cli.parsers import InPlaceOf, ListModels, Several
from models.configuration import ORIGINAL_DEFAULTS
from runtime.choices import (
    AUTO,
    COMBINER_TYPES,
    COMBINING_FUNCTIONS,
    DECODINGS,
    ENCODE_PRECISIONS,
    ENCODERS,
    NEGATIVES,
    PRECISIONS,
    TRANSFORMS,
    ClipChoice,
    CombinerChoice,
    PairChoice,
)
from utils import PROJECT_ROOT

Group = argparse._ArgumentGroup | argparse.ArgumentParser  # what a flag is added to


def add_dataset(group: Group, *, required: bool, help: str = "in any case") -> None:
    """--dataset."""
    names = list(BENCHMARKS)
    group.add_argument(
        "--dataset", type=in_any_case(names), choices=names, required=required, help=help
    )


def add_protocol(group: Group, *, help: str) -> None:
    """--protocol, several of them."""
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
    """--seed."""
    group.add_argument("--seed", type=seed_int, default=0, help=help)


def add_resampling(group: Group, *, resamples: int) -> None:
    """--confidence, --resamples, --seed: how intervals are made."""
    group.add_argument("--confidence", type=fraction, default=0.95, help="of the intervals")
    group.add_argument(
        "--resamples", type=positive_int, default=resamples, help="draws of the queries"
    )
    add_seed(group, help="of the resampling")


def add_k(group: Group, *, default: int, help: str = "answers") -> None:
    """--k."""
    group.add_argument("--k", type=positive_int, default=default, help=help)


def add_clip_batch_size(group: Group, *, help: str) -> None:
    """--clip-bs."""
    group.add_argument("--clip-bs", type=positive_int, default=32, help=help)


def add_workers(group: Group) -> None:
    """--num-workers."""
    processes = min(8, os.cpu_count() or 1)
    group.add_argument(
        "--num-workers", type=workers, default=processes, help="processes that decode images"
    )


def dataset_flag(required: bool = True) -> argparse.ArgumentParser:
    """--dataset, as a parent."""
    parser = argparse.ArgumentParser(add_help=False)
    add_dataset(parser.add_argument_group("benchmark"), required=required)
    return parser


def data_root_flag() -> argparse.ArgumentParser:
    """--data-root."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument_group("data").add_argument(
        "--data-root",
        type=usable_path,
        default=PROJECT_ROOT,
        metavar="DIR",
        help="holds fashionIQ_dataset/, cirr_dataset/ and the like (default: the project's root)",
    )
    return parser


def compute_flags(decodes: bool = True) -> argparse.ArgumentParser:
    """What computes.

    Args:
        decodes: many images, for which processes pay.
    """
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("machine")
    if decodes:
        add_workers(group)
    else:
        parser.set_defaults(num_workers=0)
    group.add_argument(
        "--device", metavar="DEV", help="such as cuda:1 or cpu (default: cuda where there is one)"
    )
    return parser


def machine_flags() -> argparse.ArgumentParser:
    """Where the data are, what is left out of them, and what computes."""
    parser = argparse.ArgumentParser(add_help=False, parents=[data_root_flag(), compute_flags()])
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--exclusions",
        type=usable_path,
        metavar="FILE",
        help="leave out the images of a list that check_dataset.py wrote",
    )
    group.add_argument(
        "--similarity-block",
        type=rows,
        metavar="ROWS",
        help="queries whose similarities to the gallery are in memory at a time (default: at most 1 GiB)",
    )
    return parser


def clip_flags() -> argparse.ArgumentParser:
    """Which CLIP, and how images are preprocessed. None where silent: `configuration.settle` fills in."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group(
        "CLIP", "where silent: as the weights given were trained, else the default"
    )
    default = ORIGINAL_DEFAULTS
    names = f"a name of --list-models, or a checkpoint's path (default: {default.clip_model_name})"
    group.add_argument("--clip-model-name", type=model_name, metavar="NAME", help=names)
    group.add_argument("--list-models", action=ListModels, help="print the names, and end")
    group.add_argument(
        "--transform", choices=TRANSFORMS, help=f"preprocessing (default: {default.transform})"
    )
    ratio = f"of targetpad (default: {default.target_ratio})"
    group.add_argument("--target-ratio", type=side_ratio, help=ratio)
    precision = (
        "of features that nothing learns from: validations, frozen ones, indexes (default: fp32)"
    )
    group.add_argument("--encode-precision", choices=ENCODE_PRECISIONS, help=precision)
    group.add_argument(
        "--decode",
        choices=DECODINGS,
        help=f"draft: large JPEG files at 1/2, 1/4 or 1/8: faster, other pixels (default: {default.decode})",
    )
    return parser


def tuned_clip_flag() -> argparse.ArgumentParser:
    """--clip-model-path."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("fine-tuned CLIP")
    group.add_argument(
        "--clip-model-path",
        type=usable_path,
        metavar="PATH",
        help="stage-1 weights (default: none)",
    )
    return parser


def exported_flag() -> argparse.ArgumentParser:
    """--pair."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("exported pair")
    group.add_argument(
        "--pair",
        type=pair_place,
        action=InPlaceOf,
        other="combining_function",
        metavar="DIR",
        help="a folder of export.py, or hf-hub:ORG/REPO, in place of the flags of weights; composed by its Combiner if "
        "it has one",
    )
    return parser


def add_combiner_path(group: Group, *, help: str) -> None:
    """--combiner-path."""
    group.add_argument("--combiner-path", type=usable_path, metavar="PATH", help=help)


def training_flags(batch_size: int, validation_frequency: int) -> argparse.ArgumentParser:
    """What both stages of training share, with the defaults of one."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("training")
    group.add_argument(
        "--num-epochs", type=positive_int, default=300, help="passes over the triplets"
    )
    group.add_argument(
        "--batch-size",
        type=positive_int,
        default=batch_size,
        help="triplets, of all processes together",
    )
    group.add_argument(
        "--validation-frequency", type=positive_int, default=validation_frequency, help="in epochs"
    )
    group.add_argument("--save-training", action="store_true", help="save weights at validations")
    group.add_argument(
        "--save-best", action="store_true", help="save only the best instead of each"
    )
    add_seed(group, help="of new weights, of the order of triplets and of what is dropped")
    group.add_argument(
        "--output-dir",
        type=usable_path,
        default=PROJECT_ROOT / "models",
        metavar="DIR",
        help="holds the runs",
    )
    group.add_argument(
        "--resume",
        type=usable_path,
        metavar="RUN_DIR",
        help="go on with a run; its flags come from it",
    )
    add_verify(
        group,
        help="tell changed images by all of their bytes, in caches and when the run is resumed (default: by size, "
        "modification time and the first, middle and last 4 KiB)",
    )
    group.add_argument(
        "--checkpoint-every-minutes",
        type=positive_float,
        default=10.0,
        metavar="M",
        help="what a crash may cost at most: the state is saved within epochs too",
    )
    group.add_argument(
        "--precision", choices=PRECISIONS, default="amp", help="amp: fp16 on CUDA, fp32 on the CPU"
    )
    group.add_argument("--compile", action="store_true", help="torch.compile what is trained")
    add_beyond_original(parser)
    add_comet(parser)
    return parser


def add_beyond_original(parser: argparse.ArgumentParser) -> None:
    """What the original's trainings have not."""
    optional = parser.add_argument_group("training, beyond the original", "all off by default")
    optional.add_argument(
        "--mask-duplicate-targets",
        action="store_true",
        help="rows with one target are not each other's negatives",
    )
    optional.add_argument(
        "--warmup-steps", type=natural_int, default=0, help="linear rise of the learning rate"
    )
    optional.add_argument(
        "--cosine", action="store_true", help="then its fall to 0 along half a cosine"
    )
    optional.add_argument(
        "--clip-grad-norm", type=positive_float, metavar="NORM", help="clip the gradient to a norm"
    )
    optional.add_argument(
        "--ema-decay",
        type=fraction,
        metavar="DECAY",
        help="evaluate and save a moving average of the weights",
    )


def add_comet(parser: argparse.ArgumentParser) -> None:
    """The flags of tracking."""
    comet = parser.add_argument_group("Comet", "tracking, when key and workspace are given")
    comet.add_argument("--api-key", help="of your account; no file keeps it")
    comet.add_argument("--workspace", help="that the run appears in")
    comet.add_argument("--experiment-name", help="what the run is called there")


def encoder_flags() -> argparse.ArgumentParser:
    """What learns in stage 1, and how fast."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("stage 1")
    group.add_argument("--encoder", choices=ENCODERS, default="both", help="what learns")
    group.add_argument("--learning-rate", type=learning_rate, default=2e-6, help="of AdamW")
    group.add_argument(
        "--micro-batch-size",
        type=positive_int,
        metavar="N",
        help="rows in memory at a time; the gradient stays exact",
    )
    group.add_argument(
        "--gradient-checkpointing", action="store_true", help="less memory, more time"
    )
    group.add_argument(
        "--image-cache",
        type=path_or_auto,
        default=AUTO,
        metavar="DIR",
        help="keep preprocessed images on disk (default: in pixels/ of the project, if it has room and repays)",
    )
    group.add_argument(
        "--no-image-cache",
        dest="image_cache",
        action="store_const",
        const=None,
        help="decode images each time",
    )
    return parser


def combiner_flags(trains: bool) -> argparse.ArgumentParser:
    """Kind and sizes of the Combiner: the defaults of training, or None where they are read from a checkpoint."""
    parser = argparse.ArgumentParser(add_help=False)
    default = (lambda value: value) if trains else (lambda value: None)
    about = "" if trains else "a flag that disagrees with the checkpoint is an error"
    silent = "" if trains else " (default: the checkpoint's)"
    group = parser.add_argument_group("Combiner", about)
    group.add_argument(
        "--combiner-type",
        choices=COMBINER_TYPES,
        default=default("moe"),
        help=f"moe: with experts; clip4cir: that of CLIP4Cir{silent}",
    )
    group.add_argument(
        "--projection-dim",
        type=width,
        default=default(2560),
        help=f"width that either feature is projected to{silent}",
    )
    group.add_argument(
        "--hidden-dim", type=width, default=default(5120), help=f"of the hidden layers{silent}"
    )
    group.add_argument(
        "--num-experts", type=expert_count, default=default(4), help=f"of the MoE{silent}"
    )
    group.add_argument(
        "--top-k", type=expert_count, default=default(2), help=f"experts a query goes to{silent}"
    )
    return parser


def frozen_flags() -> argparse.ArgumentParser:
    """What is particular to stage 2."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("stage 2")
    group.add_argument(
        "--combiner-lr", type=learning_rate, default=2e-5, help="learning rate of Adam"
    )
    group.add_argument(
        "--seeds",
        type=seed_int,
        nargs="+",
        action=Several,
        help="train one Combiner with each, in place of --seed",
    )
    group.add_argument(
        "--negatives",
        choices=NEGATIVES,
        default="batch",
        help="bank: all training targets are negatives of every query, not those of its batch alone",
    )
    group.add_argument(
        "--load-balancing-weight",
        type=weight,
        default=0.0,
        metavar="W",
        help="of the loss that spreads queries over the experts (Fedus et al. 2021), 0 in the original",
    )
    group.add_argument(
        "--router-z-weight",
        type=weight,
        default=0.0,
        metavar="W",
        help="of the loss that keeps the router's logits small (Zoph et al. 2022), 0 in the original",
    )
    add_clip_batch_size(group, help="batch size of CLIP while features are made")
    group.add_argument(
        "--feature-cache",
        type=usable_path,
        default=PROJECT_ROOT / "features",
        metavar="DIR",
        help="keeps features on disk",
    )
    group.add_argument(
        "--no-feature-cache",
        dest="feature_cache",
        action="store_const",
        const=None,
        help="keep none on disk",
    )
    return parser


def stage_1_flags(*, dataset_required: bool = True) -> list[argparse.ArgumentParser]:
    """All that fine-tuning CLIP takes."""
    return [
        dataset_flag(dataset_required),
        encoder_flags(),
        clip_flags(),
        training_flags(batch_size=512, validation_frequency=1),
        machine_flags(),
    ]


def stage_2_flags(*, dataset_required: bool = True) -> list[argparse.ArgumentParser]:
    """All that training a Combiner takes."""
    return [
        dataset_flag(dataset_required),
        frozen_flags(),
        combiner_flags(trains=True),
        tuned_clip_flag(),
        clip_flags(),
        training_flags(batch_size=1024, validation_frequency=3),
        machine_flags(),
    ]


def pair_flags(required: bool = True, silent: str = "") -> argparse.ArgumentParser:
    """How queries are composed.

    Args:
        silent: says what holds without --combining-function, where that is something.
    """
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("composition")
    group.add_argument(
        "--combining-function",
        type=in_any_case(COMBINING_FUNCTIONS),
        choices=COMBINING_FUNCTIONS,
        required=required,
        help=f"what makes a query of the two features, or one of them alone{silent}",
    )
    add_combiner_path(group, help="stage-2 weights, for combiner")
    return parser


def measuring_flags() -> argparse.ArgumentParser:
    """How a benchmark is measured with a pair."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("measuring")
    group.add_argument(
        "--feature-cache",
        type=usable_path,
        metavar="DIR",
        help="keep features on disk, with which an interrupted encoding goes on (default: keep none)",
    )
    add_verify(
        group,
        help="tell changed images by all of their bytes (default: by size, modification time and the first, middle and "
        "last 4 KiB)",
    )
    group.add_argument(
        "--concept-template",
        type=concept_template,
        metavar="TEXT",
        help=f"text of CIRCO's protocols with the concept (default: {CIRCO.concept_template})",
    )
    return parser


def evaluation_flags(*, needs_pair: bool = True) -> list[argparse.ArgumentParser]:
    """A trained pair, and where and with what it is measured; the benchmark's name is a flag of its own."""
    return [
        exported_flag(),
        pair_flags(required=needs_pair),
        combiner_flags(trains=False),
        tuned_clip_flag(),
        clip_flags(),
        measuring_flags(),
        machine_flags(),
    ]


def search_flags() -> list[argparse.ArgumentParser]:
    """An index, and how its queries are composed: with the index's CLIP, and the sum unless a Combiner is named."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("index")
    group.add_argument(
        "--index", type=usable_path, required=True, metavar="INDEX", help="made by search.py index"
    )
    composition = pair_flags(required=False, silent=" (default: combiner if there is one)")
    return [parser, exported_flag(), composition, combiner_flags(trains=False)]


def add_verify(group: Group, *, help: str) -> None:
    """--verify."""
    group.add_argument("--verify", action="store_true", help=help)


def clip_choice(args: argparse.Namespace) -> ClipChoice:
    """What `clip_flags` ask for."""
    return ClipChoice(
        clip_model_name=args.clip_model_name,
        transform=args.transform,
        target_ratio=args.target_ratio,
        decode=args.decode,
        encode_precision=args.encode_precision,
    )


def combiner_choice(args: argparse.Namespace) -> CombinerChoice:
    """What `combiner_flags` ask for."""
    return CombinerChoice(
        combiner_type=args.combiner_type,
        projection_dim=args.projection_dim,
        hidden_dim=args.hidden_dim,
        num_experts=args.num_experts,
        top_k=args.top_k,
    )


def pair_choice(args: argparse.Namespace) -> PairChoice:
    """The pair that `pair_flags` and the flags beside them ask for."""
    return PairChoice(
        combining_function=args.combining_function,
        clip_path=args.clip_model_path,
        combiner_path=args.combiner_path,
        exported=args.pair,
        clip=clip_choice(args),
        combiner=combiner_choice(args),
        workers=args.num_workers,
        feature_cache=getattr(args, "feature_cache", None),
        told_by=told_by(args),
    )


def told_by(args: argparse.Namespace) -> str:
    """How caches tell a changed image, see `runtime.files.stamp`; by a sample where a script has no --verify."""
    return "content" if getattr(args, "verify", False) else "sample"
