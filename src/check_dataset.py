"""Check a copy of FashionIQ or CIRR: its files, every image, and what is wrong with them.

    python src/check_dataset.py --dataset FashionIQ
    python src/check_dataset.py --dataset CIRR --splits val test --write-exclusions cirr_exclusions.json

Exit code 0: clean; 1: usable, with findings; 2: unusable.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from benchmarks import BENCHMARKS, Benchmark, dataset_report
from benchmarks.dataset_report import Report
from benchmarks.exclusions import write_exclusions
from benchmarks.image_check import inspect_all
from cli import options
from runtime.files import check_file_writable
from utils import UserError, command

SPLITS = ("train", "val", "test")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags of the check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], parents=[options.data_root_flag()])
    names = list(BENCHMARKS)
    parser.add_argument(
        "--dataset", type=options.in_any_case(names), choices=names, help="(default: all whose folder is there)"
    )
    parser.add_argument("--splits", nargs="+", choices=SPLITS, help="(default: all that are there)")
    parser.add_argument("--unofficial", action="store_true", help="do not compare counts with the official ones")
    parser.add_argument("--num-workers", type=options.natural_int, default=options.DEFAULT_WORKERS)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument(
        "--write-exclusions",
        type=Path,
        metavar="FILE",
        help="write the images that cannot be decoded, for --exclusions",
    )
    args = parser.parse_args(argv)
    if args.write_exclusions and not args.dataset:
        parser.error("--write-exclusions is for one dataset: name it with --dataset")
    return args


def check(benchmark: Benchmark, splits: list[str] | None, official: bool, workers: int) -> Report:
    """Everything about a copy of a benchmark."""
    report = Report(benchmark.name)
    names = [name for kind, name in zip(SPLITS, benchmark.splits, strict=True) if kind in (splits or SPLITS)]
    parts = dataset_report.read_parts(benchmark, names, official, splits is not None, report)
    dataset_report.remark_on_annotations(benchmark, parts, report)
    paths = [p for (_, split), own in parts.items() for p in dataset_report.needed(benchmark, split, own).values()]
    dataset_report.remark_on_images(benchmark, parts, inspect_all(list(dict.fromkeys(paths)), workers), report)
    return report


@command
def main(argv: list[str] | None = None) -> None:
    """Print a report of each dataset."""
    args = parse(argv)
    check_file_writable({"--write-exclusions": args.write_exclusions})
    benchmarks = [kind(args.data_root) for name, kind in BENCHMARKS.items() if args.dataset in (None, name)]
    if not args.dataset:
        benchmarks = [b for b in benchmarks if b.annotation_folder().is_dir()]
    if not benchmarks:
        raise UserError(f"--data-root {args.data_root} holds neither fashionIQ_dataset nor cirr_dataset: name another")
    reports = [check(benchmark, args.splits, not args.unofficial, args.num_workers) for benchmark in benchmarks]
    if args.json:
        print(json.dumps([dataclasses.asdict(r) | {"exit_code": r.exit_code} for r in reports], indent=1))
    else:
        print("\n\n".join(dataset_report.text(report) for report in reports))
    if args.write_exclusions:
        write_exclusions(args.write_exclusions, reports[0].dataset, reports[0].bad)
    code = max(report.exit_code for report in reports)
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    main()
