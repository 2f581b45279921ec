"""Look at what was retrieved: a sheet of queries as a page and a picture, and what each expert takes.

From a trained pair:
    python src/visualize.py --dataset CIRR --combining-function combiner --combiner-path models/THE_RUN --queries worst

From a file of validate.py --rankings:
    python src/visualize.py --rankings rankings.json --queries dress:12 shirt:7
"""

import argparse
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import BENCHMARKS, PROTOCOLS, Benchmark
from cli import options, startup
from evaluation.rankings_file import Records, make_records, read_rankings
from evaluation.retrieval import choose_protocols, explain_all, rank_all
from models.pair import load_and_freeze
from reports.expert_report import expert_report
from reports.sheets import Card, card, load_thumbnails, picture, sheet
from runtime.files import check_writable, write_bytes, write_text
from utils import PROJECT_ROOT, UserError, command

logger = logging.getLogger(__name__)

ABOUT = (
    "Left the reference and the caption, right what was retrieved, the nearest first, with its cosine similarity. "
    "The target is outlined."
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags of a sheet."""
    parents = [options.dataset_flag(required=False), options.pair_flags(required=False)]
    parents += [options.combiner_flags(trains=False), options.tuned_clip_flag(), options.clip_flags()]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], parents=[*parents, options.machine_flags()])
    group = parser.add_argument_group("sheet")
    group.add_argument("--rankings", type=Path, metavar="FILE", help="of validate.py, in place of a pair")
    group.add_argument("--protocol", type=options.in_any_case(PROTOCOLS), choices=list(PROTOCOLS))
    group.add_argument(
        "--queries",
        nargs="+",
        default=["worst"],
        metavar="Q",
        help="best, worst or random; or pairids of CIRR, or category:number of FashionIQ (default: worst)",
    )
    group.add_argument("--num", type=options.positive_int, default=20, help="queries of each split (default: 20)")
    group.add_argument("--k", type=options.positive_int, default=10, help="images a query (default: 10)")
    group.add_argument("--seed", type=options.seed_int, default=0, help="of --queries random")
    default = PROJECT_ROOT / "sheets"
    group.add_argument("--output-dir", type=Path, default=default, metavar="DIR", help="(default: sheets)")
    args = parser.parse_args(argv)
    if args.rankings is None and not (args.dataset and args.combining_function):
        parser.error("give --rankings FILE, or --dataset and --combining-function of a pair")
    return args


def measure(args: argparse.Namespace, benchmark: Benchmark) -> Records:
    """The records of a pair under one protocol."""
    device = startup.pick_device(args.device)
    protocols = choose_protocols(args.protocol and [args.protocol], benchmark)[:1]
    val = benchmark.val()
    pair, frozen = load_and_freeze(benchmark, val, device, **options.pair_choice(args))
    rankings = rank_all(frozen, pair.compose, protocols, args.k, args.similarity_block)
    return make_records(benchmark, val, rankings, explain_all(frozen, pair.compose))


def choose(records: Records, wanted: list[str], protocol: str, num: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Split's name -> its queries that are asked for, sorted by the target's rank where best or worst are."""
    if wanted in (["best"], ["worst"], ["random"]):
        chosen = {}
        for name, queries in records.items():
            ordered = sorted(queries, key=lambda query: query["protocols"][protocol]["rank"])
            if wanted == ["random"]:
                ordered = random.Random(seed).sample(queries, min(num, len(queries)))
            chosen[name] = (ordered[::-1] if wanted == ["worst"] else ordered)[:num]
        return chosen
    known = {label(name, query): (name, query) for name, queries in records.items() for query in queries}
    chosen = {}
    for one in wanted:
        if one not in known:
            some = ", ".join(list(known)[:3])
            raise UserError(f"--queries {one}: not best, worst, random, nor a query, as {some}: name one of them")
        name, query = known[one]
        chosen.setdefault(name, []).append(query)
    return chosen


def label(split: str, query: dict[str, Any]) -> str:
    """What a query is called: its pairid, or its split and number."""
    return f"{split}:{query['query']}" if query["pair_id"] is None else str(query["pair_id"])


def find_images(benchmark: Benchmark, cards: Sequence[Card]) -> dict[str, Path]:
    """The files of all images that cards show."""
    paths = {name: path for split in benchmark.val() for name, path in split.image_paths.items()}
    names = sorted({name for card in cards for name in card.images})
    missing = [name for name in names if name not in paths]
    if missing:
        raise UserError(f"--rankings names the image {missing[0]}, which {benchmark.name} under --data-root has not")
    return {name: paths[name] for name in names}


@command
def main(argv: list[str] | None = None) -> None:
    """Write sheet.html, sheet.png and, of a mixture, experts.html."""
    args = parse(argv)
    check_writable({"--output-dir": args.output_dir})
    stored = read_rankings(args.rankings) if args.rankings else None
    args.dataset = stored["dataset"] if stored else args.dataset
    if args.dataset not in BENCHMARKS:
        raise UserError(f"--rankings {args.rankings} is of {args.dataset}, which is no benchmark known here")
    benchmark, _ = startup.open_benchmark(args)
    records = stored["queries"] if stored else measure(args, benchmark)
    has = next(iter(records.values()))[0]["protocols"]
    protocol = args.protocol or next(iter(has))
    if protocol not in has:
        raise UserError(f"--protocol {protocol} is not in {args.rankings}, which has {', '.join(has)}: measure again")
    stored = max(len(query["protocols"][protocol]["nearest"]) for queries in records.values() for query in queries)
    if args.rankings and args.k > stored:
        logger.warning("note: %s holds the %d nearest, so no %d are shown", args.rankings, stored, args.k)
    chosen = choose(records, args.queries, protocol, args.num, args.seed)
    sections = {name: [card(label(name, q), q, protocol, args.k) for q in qs] for name, qs in chosen.items()}
    cards = [one for some in sections.values() for one in some]
    thumbnails = load_thumbnails(find_images(benchmark, cards))
    what = f"{benchmark.name} {benchmark.splits[1]}, protocol {protocol}, {' '.join(args.queries)}"
    write_text(args.output_dir / "sheet.html", sheet(what, ABOUT, sections, thumbnails))
    drawn, shown = picture(cards, thumbnails)
    write_bytes(args.output_dir / "sheet.png", drawn)
    logger.info("%s: %d queries", args.output_dir / "sheet.html", len(cards))
    logger.info("%s: %d queries", args.output_dir / "sheet.png", shown)
    if all(query.get("experts") for queries in records.values() for query in queries):
        write_text(args.output_dir / "experts.html", expert_report(f"Experts on {what.split(',')[0]}", records))
        logger.info("%s: what each expert takes", args.output_dir / "experts.html")


if __name__ == "__main__":
    main()
