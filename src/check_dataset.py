"""Check a copy of a benchmark: its annotation files and every image.

    python src/check_dataset.py --dataset FashionIQ
    python src/check_dataset.py --dataset CIRR --splits val test --write-exclusions cirr_exclusions.json

Exit code 0: clean; 1: usable, with findings; 2: unusable.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from benchmarks import BENCHMARKS, Benchmark
from benchmarks.dataset_report import as_text
from benchmarks.exclusions import write_exclusions
from benchmarks.image_check import ALL_SPLITS, check
from cli import options
from cli.parsers import ScriptParser
from runtime.files import check_file_writable
from settings import groups
from settings.declaring import parent
from settings.flag_types import Several, usable_path
from utils import UserError, command


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags of the check."""
    parser = ScriptParser(__doc__, parents=[parent(groups.Data), parent(groups.Decoding)])
    options.add_dataset(
        parser,
        required=False,
        help="benchmark to check, not case-sensitive (default: every benchmark that has a folder)",
    )
    parser.add_argument(
        "--splits",
        nargs="+",
        action=Several,
        choices=ALL_SPLITS,
        help="splits to check (default: all splits that have files)",
    )
    parser.add_argument(
        "--unofficial", action="store_true", help="do not compare counts with the official counts"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--write-exclusions",
        type=usable_path,
        metavar="FILE",
        help="output file that lists the images that cannot be decoded, for --exclusions",
    )
    args = parser.parse_args(argv)
    if args.write_exclusions and not args.dataset:
        parser.error("--write-exclusions is for one dataset: choose it with --dataset")
    return args


def chosen_benchmarks(data_root: Path, dataset: str | None) -> list[Benchmark]:
    """Return the chosen benchmark, or all benchmarks whose folder exists."""
    if dataset:
        return [BENCHMARKS[dataset](data_root)]
    benchmarks: list[Benchmark] = [kind(data_root) for kind in BENCHMARKS.values()]
    there = [benchmark for benchmark in benchmarks if benchmark.annotation_folder().is_dir()]
    if not there:
        folders = ", ".join(Path(benchmark.folder).parts[0] for benchmark in benchmarks)
        raise UserError(
            f"--data-root {data_root} contains none of {folders}: choose another folder"
        )
    return there


@command
def main(argv: list[str] | None = None) -> None:
    """Print a report on each dataset."""
    args = parse(argv)
    check_file_writable({"--write-exclusions": args.write_exclusions})
    reports = []
    for benchmark in chosen_benchmarks(args.data_root, args.dataset):
        reports.append(
            check(benchmark, args.splits, official=not args.unofficial, workers=args.num_workers)
        )
    if args.json:
        contents = [
            {**dataclasses.asdict(report), "exit_code": report.exit_code} for report in reports
        ]
        print(json.dumps(contents, indent=1))
    else:
        print("\n\n".join(as_text(report) for report in reports))
    if args.write_exclusions:
        write_exclusions(args.write_exclusions, reports[0].dataset, reports[0].bad)
    code = max(report.exit_code for report in reports)
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    main()
