"""Audit a benchmark with a pair: find the queries that image or text alone solve, and the queries that need both.

    python src/audit.py --dataset CIRR --clip-model-path models/THE_RUN --combiner-path models/THE_OTHER_RUN \
        --write-queries need_both.json
    python src/validate.py --dataset CIRR --combining-function sum --queries need_both.json

A query needs both if neither its image nor its text alone ranks the target among the first k results (after arXiv
2605.14787).
"""

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import Benchmark, Protocol
from benchmarks.protocols import choose_protocols
from benchmarks.query_lists import write_query_list
from cli import options
from cli.parsers import ScriptParser
from cli.startup import check_annotations, check_files, command_line, open_benchmark, pick_device
from evaluation.comparison import Resampling, with_interval
from reports.tables import text_table
from runtime.files import check_file_writable, write_text
from settings import groups
from settings.declaring import parent
from settings.flag_types import usable_path
from utils import command

if TYPE_CHECKING:
    from benchmarks.ranking import Rankings
    from models.features import FrozenSplit
    from models.pair import Pair

logger = logging.getLogger(__name__)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags of an audit."""
    parents = [parent(groups.Dataset), *options.evaluation_flags(needs_pair=False)]
    parser = ScriptParser(__doc__, parents=parents)
    group = parser.add_argument_group("audit")
    options.add_protocol(group, help="protocols to audit (default: all of the benchmark)")
    options.add_k(
        group,
        default=10,
        help="cut-off: a query counts as solved if its target is among the first k results",
    )
    group.add_argument(
        "--write-queries",
        type=usable_path,
        metavar="FILE",
        help="output file that lists the queries that need both image and text under the first protocol, for "
        "validate.py --queries",
    )
    group.add_argument(
        "--metrics-json",
        type=usable_path,
        metavar="FILE",
        help="output file for all numbers of the audit (JSON)",
    )
    options.add_resampling(group, resamples=2000)
    return parser.parse_args(argv)


def print_audit(benchmark: Benchmark, protocol: str, numbers: Mapping[str, Any]) -> None:
    """Print two tables: the queries that each composition solves, and all metrics on the queries that need both."""
    queries = sum(numbers["queries"].values())
    print(
        f"\n{benchmark.name} {benchmark.val_split}, {protocol}: {queries} queries, number solved and share in %"
    )
    rows: dict[str, dict[str, str]] = {}
    for name, of_recall in numbers["recalls"].items():
        rows[name] = {}
        for column, found in of_recall["solved"].items():
            share = with_interval(found["value"], found["interval"])
            rows[name][column] = f"{found['queries']}: {share}"
        for function, gap in of_recall["gap"].items():
            rows[name][f"gap of {function}"] = with_interval(**gap, sign="+")
    print(text_table(rows))
    needed = sum(numbers["need_both"].values())
    print(f"\n{needed} of the queries need both, at {numbers['solved_by']}")
    lacking = [split for split, own in numbers["need_both"].items() if not own]
    if lacking:
        print(f"no metrics for the queries that need both: there are none in {', '.join(lacking)}")
        return
    rows = {}
    for function, metrics in numbers["metrics_where_both_are_needed"].items():
        for name, title in benchmark.titled(metrics).items():
            rows.setdefault(title, {})[function] = with_interval(**metrics[name])
    print(text_table(rows))


def ranked(
    pair: "Pair",
    frozen: "Sequence[FrozenSplit]",
    protocols: Sequence[Protocol],
    *,
    block: int | None,
) -> "dict[str, Rankings]":
    """Return the rankings of each combining function: image only, text only, their sum, and the pair's own."""
    from combiner import UNLEARNED, Composer
    from evaluation.retrieval import rank_all

    composers: dict[str, Composer] = {name: kind().eval() for name, kind in UNLEARNED.items()}
    composers[pair.compose.combining_function] = pair.compose
    rankings = {}
    for name, compose in composers.items():
        rankings[name] = rank_all(frozen, compose, protocols, k=0, block=block)
    return rankings


def write_queries(
    file: Path, benchmark: Benchmark, names: Sequence[str], *, chosen_by: str
) -> None:
    """Write the list of the queries that need both; if there are none, log a warning instead."""
    if not names:
        logger.warning(
            "warning: %s is not written, because no query needs both image and text", file
        )
        return
    write_query_list(file, benchmark, names, chosen_by=chosen_by)


@command
def main(argv: list[str] | None = None) -> None:
    """Print the audit, and write the files that the flags request."""
    args = parse(argv)
    check_files(args)
    outputs = {"--metrics-json": args.metrics_json, "--write-queries": args.write_queries}
    check_file_writable(outputs)
    benchmark, _ = open_benchmark(args)
    protocols = choose_protocols(args.protocol, benchmark.protocols, benchmark.name)
    check_annotations(benchmark, [benchmark.val_split])
    val = benchmark.val()

    from evaluation.auditing import Audit, hits_of, names_of, solving
    from evaluation.result_file import provenance
    from models.pair import load_and_freeze
    from runtime import distributed

    recall = solving(benchmark, args.k)
    resampling = Resampling(
        resamples=args.resamples,
        confidence=args.confidence,
        seed=args.seed,
        by=args.resample_by,
    )
    clusters = resampling.clusters({split.name: split.clusters for split in val})
    device = pick_device(args.device)
    pair, frozen = load_and_freeze(benchmark, val, device, options.pair_choice(args))
    rankings = ranked(pair, frozen, protocols, block=args.similarity_block)
    if distributed.is_main():
        numbers = {}
        for protocol in protocols:
            hits = {name: hits_of(benchmark, val, own[protocol]) for name, own in rankings.items()}
            audit = Audit(benchmark=benchmark, hits=hits, clusters=clusters, resampling=resampling)
            numbers[protocol.name] = audit.numbers(recall)
            print_audit(benchmark, protocol.name, numbers[protocol.name])
            if args.write_queries and protocol == protocols[0]:
                names = names_of(val, audit.need_both(recall))
                reason = f"neither image nor text alone has a {recall} under {protocol.name}"
                write_queries(args.write_queries, benchmark, names, chosen_by=reason)
        print(f"\n{resampling.told(clusters)}")
        if args.metrics_json:
            content = {
                "dataset": benchmark.name,
                "split": benchmark.val_split,
                "protocols": numbers,
                **provenance(pair, command_line("audit.py", argv)),
            }
            write_text(args.metrics_json, json.dumps(content, indent=1) + "\n")
    distributed.stop()


if __name__ == "__main__":
    main()
