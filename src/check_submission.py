"""Check submission files against every rule of the servers: CIRR's two files, FashionIQ's predictions.

    python src/check_submission.py submission/CIRR/*.json

Exit code 0: all files keep all rules; 1: some break rules, each is printed with its query; 2: a file cannot be read.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks import Benchmark
from benchmarks.server_files import Form, form_of, parse_submission
from cli.flag_types import usable_path
from cli.options import data_root_flag
from cli.parsers import ScriptParser
from utils import command, printable


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags of the check."""
    parser = ScriptParser(__doc__, parents=[data_root_flag()])
    parser.add_argument("files", type=usable_path, nargs="+", metavar="FILE")
    parser.add_argument(
        "--split", choices=("val", "test"), default="test", help="what the files answer"
    )
    return parser.parse_args(argv)


def official_counts(benchmark: Benchmark, split: str) -> str:
    """Where the annotations are not the official ones, how many queries those have."""
    notes = []
    for part, records in zip(benchmark.parts, benchmark.read(split), strict=True):
        here = len(records.triplets)
        official, _ = benchmark.official.get(f"{part}.{split}", (here, None))
        if here != official:
            notes.append(
                f"{records.name} has {here} queries here, {official} in the official annotations"
            )
    return "; ".join(notes)


def open_form(kind: type[Form[Any]], data_root: Path, wanted: str) -> Form[Any]:
    """What files of a kind are checked against; says so where the annotations are not the official ones.

    Args:
        wanted: "val" or "test".
    """
    benchmark = kind.kind(data_root)
    split = benchmark.split_called(wanted)
    form = kind(benchmark, split)
    if note := official_counts(benchmark, split):
        print(f"note: {note}: this says little about what the server takes")
    return form


@command
def main(argv: list[str] | None = None) -> None:
    """Print what each file breaks."""
    args = parse(argv)
    contents = {file: parse_submission(file) for file in args.files}
    forms: dict[type[Form[Any]], Form[Any]] = {}
    all_keep_rules = True
    for file, content in contents.items():
        kind = form_of(content)
        if kind not in forms:
            forms[kind] = open_form(kind, args.data_root, args.split)
        violations = forms[kind].violations(file.name, content, file.stat().st_size)
        for violation in violations:
            print(printable(f"{file}: {violation}"))
        if violations:
            all_keep_rules = False
            print(f"{printable(file)}: {len(violations)} violations")
        else:
            print(f"{printable(file)}: keeps all rules")
    if not all_keep_rules:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
