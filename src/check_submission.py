"""Check submission files against every rule of the servers: CIRR's two files, FashionIQ's predictions.

    python src/check_submission.py submission/CIRR/*.json

Exit code 0: all files keep all rules; 1: some break rules, each is printed with its query; 2: a file cannot be read.
"""

import argparse
from pathlib import Path

from benchmarks import Benchmark
from benchmarks.server_files import Form, form_of, parse_submission
from cli.options import data_root_flag
from utils import command


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags of the check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], parents=[data_root_flag()])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--split", choices=("val", "test"), default="test", help="what the files answer")
    return parser.parse_args(argv)


def official_counts(benchmark: Benchmark, split: str) -> str:
    """Where the annotations are not the official ones, how many queries those have."""
    notes = []
    for part, own in zip(benchmark.parts, benchmark.read(split), strict=True):
        official = benchmark.official[f"{part}.{split}"][0]
        if len(own.triplets) != official:
            notes.append(f"{own.name} has {len(own.triplets)} queries here, {official} in the official annotations")
    return "; ".join(notes)


@command
def main(argv: list[str] | None = None) -> None:
    """Print what each file breaks."""
    args = parse(argv)
    contents = {file: parse_submission(file) for file in args.files}
    forms: dict[type[Form], Form] = {}
    broken = 0
    for file, content in contents.items():
        kind = form_of(content)
        if kind not in forms:
            benchmark = kind.kind(args.data_root)
            split = benchmark.splits[1 if args.split == "val" else 2]
            forms[kind] = kind(benchmark, split)
            note = official_counts(benchmark, split)
            if note:
                print(f"note: {note}: this says little about what the server takes")
        violations = forms[kind].violations(file.name, content, file.stat().st_size)
        for violation in violations:
            print(f"{file}: {violation}")
        print(f"{file}: {len(violations)} violations" if violations else f"{file}: keeps all rules")
        broken += bool(violations)
    if broken:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
