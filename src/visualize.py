"""Show retrieval results: a sheet of queries as a page and a picture, and a page on the queries of each expert.

The search page reads the names of experts from experts.json next to its weights: pass --output-dir models/THE_RUN.

From a trained pair:
    python src/visualize.py --dataset CIRR --combining-function combiner --combiner-path models/THE_RUN --queries worst

From a file of validate.py --rankings:
    python src/visualize.py --rankings rankings.json --queries dress:12 shirt:7

Results of a pair for test queries, whose targets are unknown:
    python src/visualize.py --dataset CIRR --combining-function sum --clip-model-path models/THE_RUN --split test
"""

import argparse
import itertools
import json
import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import BENCHMARKS, Benchmark
from benchmarks.protocols import choose_protocols
from benchmarks.splits import check_images_exist, images_digest
from cli import options
from cli.parsers import ScriptParser
from cli.startup import check_annotations, check_files, open_benchmark, pick_device
from evaluation.rankings_file import Record, Records, make_records, read_rankings
from models.names import short_name
from runtime.choices import ORIGINAL
from runtime.files import check_writable, write_bytes, write_text
from settings import groups
from settings.declaring import parent
from settings.flag_types import Several, positive_int, usable_path
from utils import PROJECT_ROOT, UserError, command, format_metric

if TYPE_CHECKING:
    from reports.sheets import Card

logger = logging.getLogger(__name__)

SHEET_LEGEND = "Left: reference and caption. Right: retrieved images with cosine similarities, most similar first."
OUTLINED = "Targets are outlined."
SORTINGS = ("best", "worst", "random")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags of a sheet."""
    parents = [
        parent(groups.Dataset, groups.AnyTraining),
        *options.evaluation_flags(needs_pair=False),
    ]
    parser = ScriptParser(__doc__, parents=parents)
    group = parser.add_argument_group("sheet")
    group.add_argument(
        "--rankings",
        type=usable_path,
        metavar="FILE",
        help="file of validate.py --rankings to show, instead of ranking with a model",
    )
    group.add_argument(
        "--split",
        choices=("val", "test"),
        default="val",
        help="split of the queries; targets of test are unknown",
    )
    options.add_protocol(
        group, help="protocol to show (default: the first of the benchmark or file)"
    )
    group.add_argument(
        "--queries",
        nargs="+",
        action=Several,
        metavar="Q",
        help="queries to show: best, worst or random; or ids (CIRR, CIRCO), or category:number (FashionIQ) (default: "
        "worst; random for test)",
    )
    group.add_argument("--num", type=positive_int, default=20, help="number of queries per split")
    options.add_k(group, default=10, help="number of results shown per query")
    options.add_seed(group, help="for --queries random")
    group.add_argument(
        "--output-dir",
        type=usable_path,
        default=PROJECT_ROOT / "sheets",
        metavar="DIR",
        help="output folder for the sheet",
    )
    args = parser.parse_args(argv)
    if args.protocol and len(args.protocol) > 1:
        parser.error("--protocol: a sheet shows one protocol: choose one")
    is_test = args.split == "test"
    args.queries = args.queries or ["random" if is_test else "worst"]
    if is_test and (args.rankings or args.queries in (["best"], ["worst"])):
        parser.error(
            "--split test has no known targets: pass a model, and --queries random or query names"
        )
    names_pair = args.combining_function or args.pair
    if args.rankings is None and not (args.dataset and names_pair):
        parser.error("pass --rankings FILE, or --dataset and --combining-function")
    return args


@dataclass(frozen=True, kw_only=True)
class Retrieved:
    """Results of queries, and the model that retrieved them.

    Attributes:
        model: description of the model: combining function and CLIP.
        metrics: protocol -> metrics over all queries; empty if the targets are unknown.
        background: background on which transparent images were encoded.
        weights: part of the pair -> digest of its weights.
    """

    records: Records
    benchmark: Benchmark
    model: str
    metrics: Mapping[str, Mapping[str, float]]
    background: str
    weights: Mapping[str, str]

    def measured(self, protocol: str) -> str:
        """Return a line with the model, its metrics under a protocol, and the number of queries."""
        words = [self.model]
        metrics = self.metrics.get(protocol, {})
        for metric, title in self.benchmark.titled(metrics).items():
            words.append(f"{title} {format_metric(metrics[metric])}")
        number = len(list(all_queries(self.records)))
        return f"{', '.join(words)}; {number:,} queries"


def stored_records(args: argparse.Namespace) -> Retrieved:
    """Return the queries and results in the file --rankings."""
    content = read_rankings(args.rankings)
    args.dataset = content["dataset"]
    benchmark, _ = open_benchmark(args)
    check_same_images(args, content)
    return Retrieved(
        records=content["queries"],
        benchmark=benchmark,
        model=f"{content['combining_function']} on {short_name(content['clip_model_name'])}",
        metrics={name: of_it["metrics"] for name, of_it in content["protocols"].items()},
        background=content["preprocessing"].get("background", ORIGINAL),
        weights=content["weights_sha256"],
    )


def check_same_images(args: argparse.Namespace, content: Mapping[str, Any]) -> None:
    """Reject a gallery whose images differ from the images that were ranked.

    With --verify, the whole content of each file is compared, otherwise a sample.

    Args:
        content: content of the file --rankings.
    """
    excluded = set(itertools.chain.from_iterable(content["excluded_images"].values()))
    ranked = BENCHMARKS[content["dataset"]](args.data_root, excluded)
    for split in ranked.read(content["split"]):
        check_images_exist([split])
        known = content["images_sha256" if args.verify else "images_sampled"]
        if images_digest(split, sampled=not args.verify) != known.get(split.name):
            raise UserError(
                f"--rankings {args.rankings}: the images of {split.name} under --data-root are not the images that "
                f"were ranked: restore them, or run validate.py again"
            )


def measured_records(args: argparse.Namespace) -> Retrieved:
    """Return the queries of --split with the results of a pair under one protocol."""
    check_files(args)
    benchmark, _ = open_benchmark(args)
    protocols = choose_protocols(args.protocol, benchmark.protocols, benchmark.name)[:1]
    split = benchmark.split_called(args.split)
    check_annotations(benchmark, [split])
    splits = benchmark.read(split)

    from evaluation.retrieval import explain_all, rank_all
    from models.pair import load_and_freeze

    pair, frozen = load_and_freeze(
        benchmark, splits, pick_device(args.device), options.pair_choice(args)
    )
    rankings = rank_all(frozen, pair.compose, protocols, k=args.k, block=args.similarity_block)
    insights = explain_all(frozen, pair.compose, protocols[0].text)
    made = make_records(benchmark, splits, rankings, insights=insights)
    records = {name: list(queries) for name, queries in made.items()}
    metrics = {}
    if args.split != "test":
        metrics = {of.name: benchmark.metrics(splits, found) for of, found in rankings.items()}
    preprocessing = pair.encoder.preprocessing
    return Retrieved(
        records=records,
        benchmark=benchmark,
        model=f"{pair.compose.combining_function} on {short_name(preprocessing['clip_model_name'])}",
        metrics=metrics,
        background=preprocessing["background"],
        weights=pair.describe()["weights_sha256"],
    )


def all_queries(records: Records) -> Iterator[Record]:
    """Iterate over the queries of all splits."""
    return itertools.chain.from_iterable(records.values())


def choose_protocol(records: Records, wanted: Sequence[str] | None, file: Path | None) -> str:
    """Return the protocol to show: the wanted protocol, or by default the first protocol in the records."""
    known = list(next(iter(records.values()))[0]["protocols"])
    if wanted is None:
        return known[0]
    if wanted[0] not in known:
        raise UserError(
            f"--protocol {wanted[0]} is not in {file}, which has {', '.join(known)}: choose one of these, or "
            "evaluate again"
        )
    return wanted[0]


def choose_queries(
    records: Records, wanted: Sequence[str], protocol: str, *, num: int, seed: int
) -> Records:
    """Choose the queries of each split to show; best and worst queries are sorted by the rank of their target."""
    if len(wanted) == 1 and wanted[0] in SORTINGS:
        order = wanted[0]
        return {
            name: _some(queries, order, protocol, num=num, seed=seed)
            for name, queries in records.items()
        }
    known = {}
    for name, queries in records.items():
        for query in queries:
            known[label(name, query)] = (name, query)
    chosen: Records = {}
    for wanted_label in wanted:
        if wanted_label not in known:
            some = ", ".join(list(known)[:3])
            raise UserError(
                f"--queries {wanted_label}: pass best, worst, random, or a query name such as {some}"
            )
        name, query = known[wanted_label]
        chosen.setdefault(name, []).append(query)
    return chosen


def _some(
    queries: Sequence[Record], order: str, protocol: str, *, num: int, seed: int
) -> list[Record]:
    """Return the best, worst or random queries of a split."""
    if order == "random":
        return random.Random(seed).sample(queries, min(num, len(queries)))
    by_rank = sorted(queries, key=lambda query: query["protocols"][protocol]["rank"])
    return (by_rank[::-1] if order == "worst" else by_rank)[:num]


def label(split: str, query: Record) -> str:
    """Return the label of a query: its pairid, or its split and index, such as dress:12."""
    return f"{split}:{query['query']}" if query["pair_id"] is None else str(query["pair_id"])


def find_images(benchmark: Benchmark, split: str, cards: "Iterable[Card]") -> dict[str, Path]:
    """Return the files of all images on the cards of a split."""
    paths: dict[str, Path] = {}
    for part in benchmark.read(split):
        paths.update(part.image_paths)
    names = set(itertools.chain.from_iterable(card.images for card in cards))
    return {name: paths[name] for name in sorted(names)}


def write_sheet(
    args: argparse.Namespace,
    title: str,
    sections: "Mapping[str, Sequence[Card]]",
    *,
    found: Retrieved,
    measured: str,
) -> None:
    """Write sheet.html and sheet.png.

    Args:
        measured: line with the model and its metrics.
    """
    from reports.sheet_picture import picture
    from reports.sheets import load_thumbnails, sheet

    cards = list(itertools.chain.from_iterable(sections.values()))
    split = found.benchmark.split_called(args.split)
    thumbnails = load_thumbnails(find_images(found.benchmark, split, cards), found.background)
    legend = SHEET_LEGEND if args.split == "test" else f"{SHEET_LEGEND} {OUTLINED}"
    page = sheet(title, sections, thumbnails, about=[measured, legend])
    folder = args.output_dir
    write_text(folder / "sheet.html", page)
    png, number_drawn = picture(cards, thumbnails, head=[title, measured])
    write_bytes(folder / "sheet.png", png)
    logger.info("%s: %d queries", folder / "sheet.html", len(cards))
    logger.info("%s: %d queries", folder / "sheet.png", number_drawn)


def write_expert_report(folder: Path, about: str, found: Retrieved) -> None:
    """Write experts.html and experts.json if all queries were routed to experts.

    Args:
        about: benchmark and split.
    """
    from models.schemas import EXPERTS
    from reports.expert_report import expert_names, expert_report

    queries = list(all_queries(found.records))
    if all(query.get("experts") for query in queries):
        write_text(folder / "experts.html", expert_report(f"Experts on {about}", found.records))
        named = {"of_weights": found.weights["combiner"], "experts": expert_names(queries)}
        write_text(folder / EXPERTS, json.dumps(named, indent=1) + "\n")
        logger.info("%s: what each expert is used for", folder / "experts.html")


@command
def main(argv: list[str] | None = None) -> None:
    """Write sheet.html and sheet.png and, for a mixture of experts, experts.html and experts.json."""
    args = parse(argv)
    check_writable({"--output-dir": args.output_dir, "--feature-cache": args.feature_cache})
    find = stored_records if args.rankings else measured_records
    found = find(args)
    records, benchmark = found.records, found.benchmark
    protocol = choose_protocol(records, args.protocol, args.rankings)
    chosen = choose_queries(records, args.queries, protocol, num=args.num, seed=args.seed)
    held = max(len(query["protocols"][protocol]["nearest"]) for query in all_queries(records))
    if args.rankings and args.k > held:
        logger.warning(
            "note: %s contains only the %d nearest images, so fewer than %d are shown",
            args.rankings,
            held,
            args.k,
        )

    from reports.sheets import make_card

    sections = {}
    for name, queries in chosen.items():
        sections[name] = [
            make_card(label(name, query), query, protocol, k=args.k) for query in queries
        ]
    about = f"{benchmark.name} {benchmark.split_called(args.split)}"
    title = f"{about}, protocol {protocol}, {' '.join(args.queries)}"
    write_sheet(args, title, sections, found=found, measured=found.measured(protocol))
    write_expert_report(args.output_dir, about, found)


if __name__ == "__main__":
    main()
