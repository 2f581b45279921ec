"""Evaluate a trained pair on the validation split of a benchmark, under every protocol in use.

    python src/validate.py --dataset FashionIQ --combining-function combiner \
        --combiner-path models_final/moe_combiner_trained_on_fiq --clip-model-path models_final/clip_finetuned_on_fiq
"""

import argparse
from collections.abc import Mapping

from benchmarks import Benchmark, Protocol
from benchmarks.protocols import choose_protocols
from benchmarks.query_lists import read_query_list, restricted
from cli import options
from cli.parsers import ScriptParser
from cli.startup import check_annotations, check_files, command_line, open_benchmark, pick_device
from reports.tables import text_table
from runtime.files import check_file_writable, check_writable
from settings import groups
from settings.declaring import parent
from settings.flag_types import positive_int, usable_path
from utils import command, format_metric


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags of a validation."""
    parents = [parent(groups.Dataset), *options.evaluation_flags()]
    parser = ScriptParser(__doc__, parents=parents)
    group = parser.add_argument_group("results")
    group.add_argument(
        "--queries",
        type=usable_path,
        metavar="FILE",
        help="evaluate only the queries in FILE, written by audit.py --write-queries; galleries are not restricted",
    )
    options.add_protocol(
        group,
        help="protocols to measure; they differ in the gallery (all images of the split, or only references and "
        "targets), in whether the reference may be retrieved, and in the text of CIRCO's queries (default: all of the "
        "benchmark)",
    )
    group.add_argument(
        "--metrics-json",
        type=usable_path,
        metavar="FILE",
        help="output file for the metrics and their settings (JSON), for compare.py",
    )
    group.add_argument(
        "--rankings",
        type=usable_path,
        metavar="FILE",
        help="output file for the results of every query (JSON)",
    )
    group.add_argument(
        "--rankings-k",
        type=positive_int,
        default=50,
        help="number of results per query in the --rankings file",
    )
    return parser.parse_args(argv)


def print_metrics(benchmark: Benchmark, measured: Mapping[Protocol, Mapping[str, float]]) -> None:
    """Print the first protocol's metrics as lines of the form `name = value`, then a table of all protocols."""
    first = next(iter(measured.values()))
    for name, value in first.items():
        print(f"{name} = {value}")
    rows = {}
    for protocol, metrics in measured.items():
        rows[protocol.name] = {
            title: format_metric(metrics[name]) for name, title in benchmark.titled(metrics).items()
        }
    print(f"\n{text_table(rows)}")


@command
def main(argv: list[str] | None = None) -> None:
    """Print the metrics, and write the files that the flags request."""
    args = parse(argv)
    check_files(args)
    check_writable({"--feature-cache": args.feature_cache})
    check_file_writable({"--metrics-json": args.metrics_json, "--rankings": args.rankings})
    benchmark, reasons = open_benchmark(args)
    protocols = choose_protocols(args.protocol, benchmark.protocols, benchmark.name)
    listed = read_query_list(args.queries, benchmark.name, benchmark.val_split)
    check_annotations(benchmark, [benchmark.val_split])
    val = benchmark.val()
    if listed:
        val = restricted(benchmark, val, listed)

    from evaluation.rankings_file import make_records, write_rankings
    from evaluation.result_file import make_result, provenance, write_result
    from evaluation.retrieval import explain_all, rank_all
    from models.pair import load_and_freeze
    from runtime import distributed

    device = pick_device(args.device)
    pair, frozen = load_and_freeze(benchmark, val, device, options.pair_choice(args))
    k = args.rankings_k if args.rankings else 0
    rankings = rank_all(frozen, pair.compose, protocols, k=k, block=args.similarity_block)
    if distributed.is_main():
        print_metrics(
            benchmark,
            {protocol: benchmark.metrics(val, found) for protocol, found in rankings.items()},
        )
        benchmark.note_certain(val, protocols)
    if distributed.is_main() and (args.metrics_json or args.rankings):
        result = make_result(
            benchmark,
            val,
            rankings,
            reasons=reasons,
            made_by=provenance(pair, command_line("validate.py", argv), listed),
            kept=args.feature_cache,
        )
        if args.metrics_json:
            write_result(args.metrics_json, result)
        if args.rankings:
            insights = explain_all(frozen, pair.compose, protocols[0].text)
            records = make_records(benchmark, val, rankings, insights=insights)
            write_rankings(args.rankings, result, records)
    distributed.stop()


if __name__ == "__main__":
    main()
