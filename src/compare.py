"""Compare results of validate.py: a table for each protocol, with confidence intervals of the differences.

    python src/compare.py baseline.json ours_seed0.json ours_seed1.json ours_seed2.json

All other files are compared with the first. Files of training runs that differ only in their seeds become one column,
with mean and standard deviation; the folder of a run with --seeds stands for the files of its seeds. Intervals are
paired bootstrap intervals over the queries, which must be the same in both columns. Queries with the same reference
image are not independent, so they are drawn together.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks import BENCHMARKS, PROTOCOLS, Benchmark
from benchmarks.metrics import shown
from cli.options import add_protocol, add_resampling
from cli.parsers import ScriptParser
from evaluation.comparison import (
    Column,
    Resampling,
    by_both_seeds,
    intervals,
    read_columns,
    result_files,
    unlike,
    with_interval,
)
from reports.tables import text_table
from settings.flag_types import usable_path
from utils import UserError, command, printable


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags of a comparison."""
    parser = ScriptParser(__doc__)
    parser.add_argument(
        "files",
        type=usable_path,
        nargs="+",
        metavar="RESULT",
        help="result file of validate.py --metrics-json, or run folder of a training run with --seeds",
    )
    add_protocol(parser, help="protocols to compare (default: all)")
    add_resampling(parser, resamples=10_000)
    return parser.parse_args(argv)


def shared_protocols(columns: Sequence[Column], wanted: Sequence[str] | None) -> list[str]:
    """Return the protocols that the first column shares with another column, or all its protocols if it is alone."""
    base, *others = columns
    known = [name for name in PROTOCOLS if name in (wanted or PROTOCOLS) and base.has(name)]
    shared = []
    for name in known:
        if not others or any(other.has(name) for other in others):
            shared.append(name)
    if not shared:
        measured = "; ".join(f"{column.label}: {', '.join(column.protocols)}" for column in columns)
        raise UserError(
            f"the results do not share {' or '.join(wanted or ['a protocol'])} ({measured}): results under different "
            "protocols cannot be compared"
        )
    return shared


def print_protocol(
    benchmark: Benchmark, columns: Sequence[Column], protocol: str, *, resampling: Resampling
) -> None:
    """Print one table of metrics, with each column followed by its difference from the first, and notes below it."""
    base, *others = columns
    rows: dict[str, dict[str, str]] = {}
    notes = []
    add_values(rows, benchmark, base, protocol=protocol, label=base.label)
    if mixed := unlike(base, base, protocol):
        notes.append(
            f"the seeds of {base.label} have different {', different '.join(mixed)}, so their mean is not meaningful"
        )
    for other in others:
        if not other.has(protocol):
            notes.append(f"{other.label} was not evaluated under {protocol}")
            continue
        reasons = unlike(base, other, protocol)
        label = other.label + ("*" if reasons else "")
        add_values(rows, benchmark, other, protocol=protocol, label=label)
        if reasons:
            notes.append(
                f"* {other.label} and {base.label} have different {', different '.join(reasons)}: not a fair comparison"
            )
        if "queries" in reasons:
            continue
        bounds = intervals(benchmark, base, other, protocol=protocol, resampling=resampling)
        for metric, title in benchmark.titled(bounds).items():
            gain = other.mean(protocol, metric) - base.mean(protocol, metric)
            rows[title][f"{label} - {base.label}"] = with_interval(gain, bounds[metric], sign="+")
    about = PROTOCOLS[protocol]
    result = base.results[0]
    template = result["protocols"][protocol]["template"]
    text = f", text {template!r}" if template else ""
    print(
        f"\n{result['dataset']} {result['split']}, {protocol}: gallery {about.gallery}, reference {about.reference}"
        f"{printable(text)}"
    )
    print(text_table(rows))
    for note in notes:
        print(printable(note))


def add_values(
    rows: dict[str, dict[str, str]],
    benchmark: Benchmark,
    column: Column,
    *,
    protocol: str,
    label: str,
) -> None:
    """Add a column to a table: the value of each metric, or its mean and standard deviation over seeds."""
    metrics = column.results[0]["protocols"][protocol]["metrics"]
    for metric, title in benchmark.titled(metrics).items():
        rows.setdefault(title, {})[label] = shown(column.values(protocol, metric))


@command
def main(argv: list[str] | None = None) -> None:
    """Print a table for each protocol that the results share."""
    args = parse(argv)
    columns = read_columns(result_files(args.files))
    protocols = shared_protocols(columns, args.protocol)
    benchmark = BENCHMARKS[columns[0].results[0]["dataset"]](Path())
    resampling = Resampling(
        resamples=args.resamples,
        confidence=args.confidence,
        seed=args.seed,
        by=args.resample_by,
    )
    for protocol in protocols:
        print_protocol(benchmark, columns, protocol, resampling=resampling)
    if len(columns) > 1:
        clusters = columns[0].clusters(resampling)
        print(f"\n{printable(resampling.told(clusters))}")
    metric = next(iter(benchmark.selection or benchmark.reported))
    for column in columns:
        for kind, dataset in column.trained_elsewhere.items():
            measured_on = column.results[0]["dataset"]
            print(
                f"\n{column.label}: its {kind} was trained on {dataset}, but evaluated on {measured_on}"
            )
        if len(column.results) > 1:
            print(
                f"\n{printable(column.label)}: mean ± standard deviation of {len(column.results)} seeds"
            )
        if table := by_both_seeds(column, protocols[0], metric):
            print(f"\n{printable(column.label)}: {metric} by the seeds of both stages")
            print(text_table(table))


if __name__ == "__main__":
    main()
