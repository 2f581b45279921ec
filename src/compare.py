"""Compare results of validate.py: a table for each protocol, with confidence intervals of the differences.

    python src/compare.py baseline.json ours_seed0.json ours_seed1.json ours_seed2.json

The first file is what the others are compared with. Files of one training with different seeds become one column, mean
and standard deviation. Intervals are paired bootstrap intervals over the queries, which both columns must share.
"""

import argparse
from pathlib import Path

import pandas as pd

from benchmarks import BENCHMARKS, PROTOCOLS, Benchmark
from benchmarks.metrics import mean_and_spread, shown
from cli.options import fraction, in_any_case, positive_int, seed_int
from evaluation.comparison import Column, intervals, read_columns, unlike
from utils import UserError, command


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags of a comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="RESULT", help="written by validate.py --metrics-json")
    parser.add_argument("--protocol", type=in_any_case(PROTOCOLS), choices=list(PROTOCOLS), help="(default: all)")
    parser.add_argument("--confidence", type=fraction, default=0.95, help="(default: 0.95)")
    parser.add_argument("--resamples", type=positive_int, default=10_000, help="(default: 10000)")
    parser.add_argument("--seed", type=seed_int, default=0, help="of the resampling")
    return parser.parse_args(argv)


def shared_protocols(columns: list[Column], wanted: str | None) -> list[str]:
    """The protocols that the first column and another one were measured under, or the first's where it is alone."""
    base, *others = columns
    names = [name for name in PROTOCOLS if wanted in (None, name) and base.has(name)]
    shared = [name for name in names if not others or any(other.has(name) for other in others)]
    if not shared:
        measured = "; ".join(f"{c.label}: {', '.join(c.results[0]['protocols'])}" for c in columns)
        raise UserError(f"no {wanted or 'protocol'} in common ({measured}): numbers of different ones do not compare")
    return shared


def cells(benchmark: Benchmark, column: Column, protocol: str) -> dict[str, str]:
    """Title -> value, or mean and standard deviation over the seeds."""
    return {title: shown(column.values(protocol, metric)) for metric, title in benchmark.titles.items()}


def differences(
    benchmark: Benchmark, base: Column, other: Column, protocol: str, **resampling: float
) -> dict[str, str]:
    """Title -> difference of the means with its interval."""
    bounds = intervals(benchmark, base, other, protocol, **resampling)
    found = {}
    for metric, title in benchmark.titles.items():
        before, after = (mean_and_spread(column.values(protocol, metric))[0] for column in (base, other))
        low, high = bounds[metric]
        found[title] = f"{after - before:+.2f} [{low:+.2f}, {high:+.2f}]"
    return found


def print_protocol(benchmark: Benchmark, columns: list[Column], protocol: str, **resampling: float) -> None:
    """One table: metrics by columns, and beside each column its difference from the first; notes below."""
    base, *others = columns
    table, notes = {base.label: cells(benchmark, base, protocol)}, []
    if mixed := unlike(base, base, protocol):
        notes.append(f"the seeds of {base.label} have different {', different '.join(mixed)}: no fair mean")
    for other in others:
        if not other.has(protocol):
            notes.append(f"{other.label} was not measured under {protocol}")
            continue
        reasons = unlike(base, other, protocol)
        label = other.label + ("*" if reasons else "")
        table[label] = cells(benchmark, other, protocol)
        if reasons:
            notes.append(f"* {other.label} has other {', other '.join(reasons)} than {base.label}: no fair comparison")
        if "queries" not in reasons:
            table[f"{label} - {base.label}"] = differences(benchmark, base, other, protocol, **resampling)
    about = PROTOCOLS[protocol]
    result = base.results[0]
    print(f"\n{result['dataset']} {result['split']}, {protocol}: gallery {about.gallery}, reference {about.reference}")
    print(pd.DataFrame(table).to_string())
    for note in notes:
        print(note)


@command
def main(argv: list[str] | None = None) -> None:
    """Print a table for each protocol that the results share."""
    args = parse(argv)
    columns = read_columns(args.files)
    protocols = shared_protocols(columns, args.protocol)
    benchmark = BENCHMARKS[columns[0].results[0]["dataset"]](Path())
    resampling = {"resamples": args.resamples, "confidence": args.confidence, "seed": args.seed}
    for protocol in protocols:
        print_protocol(benchmark, columns, protocol, **resampling)
    for column in columns:
        if len(column.results) > 1:
            print(f"\n{column.label}: mean ± standard deviation of {len(column.results)} seeds")


if __name__ == "__main__":
    main()
