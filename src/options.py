"""Every flag, spelled once, as argparse parents in titled groups."""

import argparse
import logging
import math
import os
from pathlib import Path

import torch

import distributed
from benchmarks import BENCHMARKS
from clip_model import ENCODERS
from combiner import COMBINER_TYPES
from data_utils import TRANSFORMS
from experiment import NoTracker, make_tracker
from utils import PROJECT_ROOT, UserError, check_writable, first_line, seed_everything

DEFAULT_WORKERS = min(8, os.cpu_count() or 1)


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def natural_int(text: str) -> int:
    """A whole number of at least 0."""
    return 0 if text == "0" else positive_int(text)


def seed_int(text: str) -> int:
    """A whole number that fits 32 bits."""
    if natural_int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not below 2**32")
    return int(text)


def positive_float(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def fraction(text: str) -> float:
    """A number between 0 and 1, both excluded."""
    if positive_float(text) >= 1:
        raise argparse.ArgumentTypeError(f"{text} is not below 1")
    return float(text)


def _benchmark_name(text: str) -> str:
    """A benchmark's name in any case, as it is spelled in BENCHMARKS."""
    return next((name for name in BENCHMARKS if name.lower() == text.lower()), text)


def pick_device(name: str | None) -> torch.device:
    """The device of `--device`, else this process's GPU, else the CPU; joins the other processes, if there are any."""
    try:
        own_gpu = name == "cuda" and torch.cuda.is_available()  # not everybody's first one
        device = torch.device(distributed.local_device() if own_gpu or name is None else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch built without CUDA
        wanted = name or distributed.local_device()
        raise UserError(f"--device {wanted}: not usable here ({first_line(error)}); try --device cpu") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: choose cuda or cpu")
    if distributed.launched() and name and ":" in name:
        raise UserError(f"--device {name}: each process takes the GPU of its own number; leave the flag out")
    distributed.start(device)
    if not distributed.is_main():
        logging.getLogger().setLevel(logging.WARNING)
    return device


def start_training(args: argparse.Namespace) -> tuple[torch.device, NoTracker]:
    """Seed everything; device and tracker. Fails now, not after hours of work, if a folder cannot be written to."""
    seed_everything(args.seed)
    device = pick_device(args.device)
    written = ("output_dir", "image_cache", "feature_cache")
    check_writable({"--" + name.replace("_", "-"): getattr(args, name, None) for name in written})
    return device, make_tracker(args.api_key, args.workspace, args.experiment_name)


def dataset_flag() -> argparse.ArgumentParser:
    """--dataset."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("benchmark")
    group.add_argument("--dataset", type=_benchmark_name, choices=list(BENCHMARKS), required=True, help="in any case")
    return parser


def machine_flags() -> argparse.ArgumentParser:
    """Where the data are, and what computes."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("data and machine")
    group.add_argument(
        "--data-root",
        type=Path,
        default=PROJECT_ROOT,
        metavar="DIR",
        help="holds fashionIQ_dataset/ and cirr_dataset/ (default: the project's root)",
    )
    group.add_argument("--num-workers", type=natural_int, default=DEFAULT_WORKERS, help="processes that decode images")
    group.add_argument(
        "--similarity-block",
        type=positive_int,
        metavar="ROWS",
        help="queries whose similarities to the gallery are in memory at a time (default: at most 1 GiB)",
    )
    group.add_argument("--device", metavar="DEV", help="such as cuda:1 or cpu (default: cuda where there is one)")
    return parser


def clip_flags() -> argparse.ArgumentParser:
    """Which CLIP, and how images are preprocessed. None where silent: `pair.settle` fills in."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("CLIP", "where silent: as the weights given were trained, else the default")
    group.add_argument("--clip-model-name", metavar="NAME", help="a name or a checkpoint's path (default: RN50x4)")
    group.add_argument("--transform", choices=TRANSFORMS, help="preprocessing (default: targetpad)")
    group.add_argument("--target-ratio", type=positive_float, help="of targetpad (default: 1.25)")
    return parser


def tuned_clip_flag() -> argparse.ArgumentParser:
    """--clip-model-path."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("fine-tuned CLIP")
    group.add_argument("--clip-model-path", type=Path, metavar="PATH", help="stage-1 weights (default: none)")
    return parser


def training_flags(batch_size: int, validation_frequency: int) -> argparse.ArgumentParser:
    """What both stages of training share, with the defaults of one."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("training")
    group.add_argument("--num-epochs", type=positive_int, default=300)
    group.add_argument("--batch-size", type=positive_int, default=batch_size)
    group.add_argument("--validation-frequency", type=positive_int, default=validation_frequency, help="in epochs")
    group.add_argument("--save-training", action="store_true", help="save weights at validations")
    group.add_argument("--save-best", action="store_true", help="save only the best instead of each")
    group.add_argument("--seed", type=seed_int, default=0)
    group.add_argument("--output-dir", type=Path, default=PROJECT_ROOT / "models", metavar="DIR", help="holds the runs")
    group.add_argument(
        "--precision", choices=("amp", "bf16", "fp32"), default="amp", help="amp: fp16 on CUDA, fp32 on the CPU"
    )
    group.add_argument("--compile", action="store_true", help="torch.compile what is trained")
    optional = parser.add_argument_group("training, beyond the original", "all off by default")
    optional.add_argument(
        "--mask-duplicate-targets", action="store_true", help="rows with one target are not each other's negatives"
    )
    optional.add_argument("--warmup-steps", type=natural_int, default=0, help="linear rise of the learning rate")
    optional.add_argument("--cosine", action="store_true", help="then its fall to 0 along half a cosine")
    optional.add_argument("--clip-grad-norm", type=positive_float, metavar="NORM", help="clip the gradient to a norm")
    optional.add_argument(
        "--ema-decay", type=fraction, metavar="DECAY", help="evaluate and save a moving average of the weights"
    )
    comet = parser.add_argument_group("Comet", "tracking, when key and workspace are given")
    comet.add_argument("--api-key")
    comet.add_argument("--workspace")
    comet.add_argument("--experiment-name")
    return parser


def encoder_flags() -> argparse.ArgumentParser:
    """What learns in stage 1, and how fast."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("stage 1")
    group.add_argument("--encoder", choices=ENCODERS, default="both", help="what learns")
    group.add_argument("--learning-rate", type=positive_float, default=2e-6)
    group.add_argument(
        "--micro-batch-size", type=positive_int, metavar="N", help="rows in memory at a time; the gradient stays exact"
    )
    group.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    group.add_argument("--image-cache", type=Path, metavar="DIR", help="keep preprocessed images on disk")
    return parser


def combiner_flags(trains: bool) -> argparse.ArgumentParser:
    """Kind and sizes of the Combiner: the defaults of training, or None where they are read from a checkpoint."""
    parser = argparse.ArgumentParser(add_help=False)
    default = (lambda value: value) if trains else (lambda value: None)
    about = "" if trains else "where silent: read from the checkpoint; a flag that disagrees with it is an error"
    group = parser.add_argument_group("Combiner", about)
    group.add_argument("--combiner-type", choices=COMBINER_TYPES, default=default("moe"))
    group.add_argument("--projection-dim", type=positive_int, default=default(2560))
    group.add_argument("--hidden-dim", type=positive_int, default=default(5120))
    group.add_argument("--num-experts", type=positive_int, default=default(4), help="of the MoE")
    group.add_argument("--top-k", type=positive_int, default=default(2), help="experts a query goes to")
    return parser


def frozen_flags() -> argparse.ArgumentParser:
    """What is particular to stage 2."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("stage 2")
    group.add_argument("--combiner-lr", type=positive_float, default=2e-5, help="learning rate")
    group.add_argument("--clip-bs", type=positive_int, default=32, help="batch size of CLIP while features are made")
    group.add_argument(
        "--feature-cache", type=Path, default=PROJECT_ROOT / "features", metavar="DIR", help="keeps features on disk"
    )
    group.add_argument(
        "--no-feature-cache", dest="feature_cache", action="store_const", const=None, help="keep none on disk"
    )
    return parser


def pair_flags() -> argparse.ArgumentParser:
    """How an evaluation composes its queries."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("composition")
    group.add_argument("--combining-function", choices=("sum", "combiner"), required=True)
    group.add_argument("--combiner-path", type=Path, metavar="PATH", help="stage-2 weights, for combiner")
    return parser


def clip_choice(args: argparse.Namespace) -> dict[str, str | float | None]:
    """The values of `clip_flags`."""
    return {name: getattr(args, name) for name in ("clip_model_name", "transform", "target_ratio")}


def combiner_choice(args: argparse.Namespace) -> dict[str, str | int | None]:
    """The values of `combiner_flags`."""
    names = ("combiner_type", "projection_dim", "hidden_dim", "num_experts", "top_k")
    return {name: getattr(args, name) for name in names}
