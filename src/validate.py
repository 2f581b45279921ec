"""Measure a trained pair on the validation split of FashionIQ or CIRR, under every protocol in use.

    python src/validate.py --dataset FashionIQ --combining-function combiner \
        --combiner-path models_final/moe_combiner_trained_on_fiq --clip-model-path models_final/clip_finetuned_on_fiq
"""

import argparse
from pathlib import Path

import pandas as pd

from benchmarks import PROTOCOLS, Benchmark, Protocol
from cli import options, startup
from evaluation.rankings_file import make_records, write_rankings
from evaluation.result_file import make_result, write_result
from evaluation.retrieval import choose_protocols, explain_all, rank_all
from models.pair import load_and_freeze
from runtime import distributed
from runtime.files import check_file_writable
from utils import command


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags of a validation."""
    parents = [options.dataset_flag(), options.pair_flags(), options.combiner_flags(trains=False)]
    parents += [options.tuned_clip_flag(), options.clip_flags(), options.machine_flags()]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], parents=parents)
    group = parser.add_argument_group("results")
    group.add_argument(
        "--protocol",
        nargs="+",
        type=options.in_any_case(PROTOCOLS),
        choices=list(PROTOCOLS),
        help="gallery (all of the split, or the references and targets alone) and reference (default: all that apply)",
    )
    group.add_argument("--metrics-json", type=Path, metavar="FILE", help="write the metrics and how they came about")
    group.add_argument("--rankings", type=Path, metavar="FILE", help="write the answers to every query")
    group.add_argument("--rankings-k", type=options.positive_int, default=50, help="answers a query (default: 50)")
    return parser.parse_args(argv)


def table(benchmark: Benchmark, measured: dict[Protocol, dict[str, float]]) -> str:
    """Protocols by metrics, as text."""
    rows = {
        p.name: {title: metrics[name] for name, title in benchmark.titles.items()} for p, metrics in measured.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").to_string(float_format="%.2f")


@command
def main(argv: list[str] | None = None) -> None:
    """Print the metrics of the first protocol, one `name = value` a line, then a table of all."""
    args = parse(argv)
    device = startup.pick_device(args.device)
    check_file_writable({"--metrics-json": args.metrics_json, "--rankings": args.rankings})
    benchmark, reasons = startup.open_benchmark(args)
    protocols = choose_protocols(args.protocol, benchmark)
    val = benchmark.val()
    pair, frozen = load_and_freeze(benchmark, val, device, **options.pair_choice(args))
    rankings = rank_all(frozen, pair.compose, protocols, args.rankings_k if args.rankings else 0, args.similarity_block)
    if distributed.is_main():
        measured = {protocol: benchmark.metrics(of_split) for protocol, of_split in rankings.items()}
        for name, value in measured[protocols[0]].items():
            print(f"{name} = {value}")
        print(f"\n{table(benchmark, measured)}")
        if args.metrics_json or args.rankings:
            typed = startup.command_line("validate.py", argv)
            result = make_result(benchmark, val, rankings, pair.describe(), reasons, typed)
            if args.metrics_json:
                write_result(args.metrics_json, result)
            if args.rankings:
                records = make_records(benchmark, val, rankings, explain_all(frozen, pair.compose))
                write_rankings(args.rankings, result, records)
    distributed.stop()


if __name__ == "__main__":
    main()
