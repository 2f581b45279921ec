"""The flags that all submission scripts share, and the function that writes and checks a submission."""

import argparse
from typing import Any

from benchmarks import Benchmark
from benchmarks.protocols import choose_protocols
from benchmarks.server_files import ServerForm
from cli.options import evaluation_flags, pair_choice
from cli.parsers import ScriptParser
from cli.startup import check_annotations, check_files, open_benchmark, pick_device
from runtime.files import check_writable
from settings.flag_types import file_name, usable_path
from utils import PROJECT_ROOT


def submission_parser(about: str | None, benchmark: type[Benchmark]) -> argparse.ArgumentParser:
    """Return a parser for the flags of a submission to a benchmark's test server."""
    parser = ScriptParser(about, parents=evaluation_flags())
    parser.set_defaults(dataset=benchmark.name)
    group = parser.add_argument_group("submission")
    group.add_argument(
        "--submission-name",
        type=file_name,
        required=True,
        metavar="NAME",
        help="name of the submission, used in the file names",
    )
    val = benchmark.val_split
    test = benchmark.test_split
    group.add_argument(
        "--split",
        choices=(val, test),
        default=test,
        help=f"split of the queries; {val} is also scored",
    )
    group.add_argument(
        "--output-dir",
        type=usable_path,
        default=PROJECT_ROOT / "submission" / benchmark.name,
        metavar="DIR",
        help="folder for the submission files",
    )
    return parser


def submit_as_asked(form: type[ServerForm[Any]], args: argparse.Namespace) -> None:
    """Write and check the submission of these flags (see `submission_parser`); exit with code 1 if it breaks a rule."""
    check_files(args)
    check_writable({"--output-dir": args.output_dir, "--feature-cache": args.feature_cache})
    benchmark, _ = open_benchmark(args)
    check_annotations(benchmark, [args.split])
    wanted_names = getattr(args, "protocol", None)
    protocols = choose_protocols(wanted_names, benchmark.protocols, benchmark.name)

    from evaluation.submit import Submission, submit
    from runtime import distributed

    wanted = Submission(
        name=args.submission_name,
        split=args.split,
        protocol=protocols[0],
        folder=args.output_dir,
        block=args.similarity_block,
    )
    keeps_rules = submit(
        form, benchmark, wanted, choice=pair_choice(args), device=pick_device(args.device)
    )
    distributed.stop()
    if not keeps_rules:
        raise SystemExit(1)
