"""What both submission scripts do with their flags."""

import argparse
from pathlib import Path

from benchmarks import Benchmark
from benchmarks.server_files import Form
from cli.options import clip_flags, combiner_flags, file_name, machine_flags, pair_choice, pair_flags, tuned_clip_flag
from cli.startup import open_benchmark, pick_device
from evaluation.submit import submit
from runtime import distributed
from runtime.files import check_writable
from utils import PROJECT_ROOT


def submission_parser(description: str, benchmark: type[Benchmark]) -> argparse.ArgumentParser:
    """All flags of a submission for a benchmark's test server."""
    parents = [pair_flags(), combiner_flags(trains=False), tuned_clip_flag(), clip_flags(), machine_flags()]
    parser = argparse.ArgumentParser(description=description, parents=parents)
    parser.set_defaults(dataset=benchmark.name)
    group = parser.add_argument_group("submission")
    group.add_argument(
        "--submission-name", type=file_name, required=True, metavar="NAME", help="part of the names of what is written"
    )
    _, val, test = benchmark.splits
    group.add_argument("--split", choices=(val, test), default=test, help=f"(default: {test}); {val} is scored too")
    place = f"submission/{benchmark.name}"
    group.add_argument(
        "--output-dir", type=Path, default=PROJECT_ROOT / place, metavar="DIR", help=f"(default: {place})"
    )
    return parser


def submit_as_asked(form: type[Form], args: argparse.Namespace) -> None:
    """What a form's script does with its flags (see `submission_parser`); exit code 1 if a rule is broken."""
    device = pick_device(args.device)
    check_writable({"--output-dir": args.output_dir})
    benchmark, _ = open_benchmark(args)
    what = args.split, args.submission_name, args.output_dir
    clean = submit(form, benchmark, *what, device, args.similarity_block, pair_choice(args))
    distributed.stop()
    if not clean:
        raise SystemExit(1)
