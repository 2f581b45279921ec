"""Record the results of every query in plain types, and write and read them as rankings files."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import Benchmark, Protocol, Split, Triplet
from evaluation.result_file import check_metrics
from runtime.files import read_json, written_whole
from utils import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.ranking import Ranking, Rankings
    from combiner import Insight

# Split's name -> its queries. Each query has a caption, a reference, targets and a group. For each protocol, it has the
# ranks of its targets (0 is the first) and the nearest images with their cosine similarities; likewise within its
# group, if it has one. From the Combiner, it has the mean of the gate, and the experts with their weights.
Record = dict[str, Any]
Records = dict[str, list[Record]]

SIMILARITY_DIGITS = 6
WEIGHT_DIGITS = 4
NAMED_AT_ONCE = 1024  # number of queries whose results are in memory as names


def make_records(
    benchmark: Benchmark,
    splits: Sequence[Split],
    rankings: "Rankings",
    *,
    insights: "Mapping[str, Insight | None]",
) -> dict[str, Iterator[Record]]:
    """Return the queries of some splits with their results. Similarities are rounded to 6 digits, weights to 4.

    Records are made while they are iterated, because names and numbers of a million queries take 20 GB. The targets and
    ranks of a test split are None.

    Args:
        insights: experts and gate of each split's queries; None for the sum.
    """
    return {
        split.name: _records(benchmark, split, rankings, insights[split.name]) for split in splits
    }


def _records(
    benchmark: Benchmark, split: Split, rankings: "Rankings", insight: "Insight | None"
) -> Iterator[Record]:
    for start in range(0, len(split.triplets), NAMED_AT_ONCE):
        rows = slice(start, start + NAMED_AT_ONCE)
        triplets = split.triplets[rows]
        queries = [_query(row, triplet, benchmark) for row, triplet in enumerate(triplets, start)]
        own = {protocol: found[split.name].part(rows) for protocol, found in rankings.items()}
        _add_answers(benchmark, split.names, queries, triplets=triplets, rankings=own)
        if insight is not None:
            _add_insight(queries, insight.gate[rows], insight.experts[rows])
        yield from queries


def _query(row: int, triplet: Triplet, benchmark: Benchmark) -> Record:
    some_have = {"kinds": list(triplet.kinds), "extended": list(triplet.extended)}
    return {
        "query": row,
        "pair_id": triplet.pair_id,
        "reference": triplet.reference,
        "target": triplet.target,
        "other_targets": list(triplet.other_targets),
        "caption": benchmark.caption(triplet.captions),
        "group": list(triplet.group),
        **{name: texts for name, texts in some_have.items() if texts},
        "protocols": {},
    }


def _add_answers(
    benchmark: Benchmark,
    names: Sequence[str],
    queries: list[Record],
    *,
    triplets: Sequence[Triplet],
    rankings: "Mapping[Protocol, Ranking]",
) -> None:
    """Add the images that each query retrieved under each protocol, and in its group, which is the same for all.

    Args:
        names: names of the gallery's images.
        triplets, rankings: triplets and rankings of these queries.
    """
    for protocol, ranking in rankings.items():
        results = _rounded(ranking.results(names))
        ranks = _as_list(ranking.ranks, len(queries))
        columns = zip(queries, ranks, ranking.known_other_ranks, results, strict=True)
        for query, rank, others, nearest in columns:
            found = {"rank": rank, "other_ranks": others, "nearest": nearest}
            query["protocols"][protocol.name] = found
        if protocol.text:
            for query, triplet in zip(queries, triplets, strict=True):
                asked = dict(
                    zip(benchmark.texts, benchmark.evaluation_texts(triplet.captions), strict=True)
                )
                query["protocols"][protocol.name]["caption"] = asked[protocol.text]
    in_group = ranking.answers_in_group(names)
    if in_group is None:
        return
    ranks = _as_list(ranking.group_ranks, len(queries))
    for query, rank, nearest in zip(queries, ranks, _rounded(in_group), strict=True):
        query["in_group"] = {"rank": rank, "nearest": nearest}


def _as_list(ranks: "Tensor | None", queries: int) -> list[int] | list[None]:
    """Return the rank of each query's target, or None for each if the targets are not public."""
    return [None] * queries if ranks is None else ranks.tolist()


def _add_insight(queries: list[Record], gates: "Tensor", experts: "Tensor") -> None:
    for query, gate, weights in zip(queries, gates.tolist(), experts.tolist(), strict=True):
        query["gate"] = round(gate, WEIGHT_DIGITS)
        if weights:
            query["experts"] = [round(weight, WEIGHT_DIGITS) for weight in weights]


def _rounded(results: list[list[tuple[str, float]]]) -> list[list[tuple[str, float]]]:
    rounded = []
    for found in results:
        rounded.append([(name, round(similarity, SIMILARITY_DIGITS)) for name, similarity in found])
    return rounded


def write_rankings(
    file: Path, result: Mapping[str, Any], records: Mapping[str, Iterable[Record]]
) -> None:
    """Write records to a file: first the result that they belong to, without its ranks, then a line for each query."""
    protocols = {}
    for name, measured in result["protocols"].items():
        protocols[name] = {key: value for key, value in measured.items() if "ranks" not in key}
    about = {**result, "protocols": protocols}
    del about["clusters"]  # redundant: the queries contain their references and targets
    with written_whole(file) as out:
        for text in _parts(about, records):
            out.write(text.encode())


def _parts(about: Mapping[str, Any], records: Mapping[str, Iterable[Record]]) -> Iterator[str]:
    """Yield the text of a rankings file, one query at a time."""
    yield "{\n"
    for name, value in about.items():
        yield f" {json.dumps(name)}: {json.dumps(value, indent=1)},\n"
    yield ' "queries": {'
    for number, (name, queries) in enumerate(records.items()):
        yield ",\n" * (number > 0) + f"{json.dumps(name)}: ["
        for row, query in enumerate(queries):
            yield ",\n" * (row > 0) or "\n"
            yield json.dumps(query)
        yield "\n]"
    yield "}\n}\n"


def read_rankings(file: Path) -> dict[str, Any]:
    """Read a rankings file: a result whose "queries" are records.

    Raises:
        UserError: the file is not a rankings file, or a metric contradicts the ranks.
    """
    from evaluation.schemas import RankingsFile
    from runtime.schema import checked

    content = read_json(file, "validate.py --rankings")
    remedy = "not a complete file of validate.py --rankings: evaluate again"
    checked(RankingsFile, content, file=file, remedy=remedy)
    for split, queries in content["queries"].items():
        for number, query in enumerate(queries):
            if query["protocols"].keys() != content["protocols"].keys():
                raise UserError(
                    f"{file}: queries.{split}.{number}.protocols: differ from the protocols of the file: evaluate again"
                )
    check_metrics(file, _with_ranks(content))
    return content


def _with_ranks(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a rankings file as a result, with the ranks of its queries."""
    protocols = {}
    for name, measured in content["protocols"].items():
        ranks = {}
        other_ranks = {}
        group_ranks = {}
        for split, queries in content["queries"].items():
            found = [query["protocols"][name] for query in queries]
            ranks[split] = [of_query["rank"] for of_query in found]
            others = [of_query.get("other_ranks", []) for of_query in found]
            if any(others):
                other_ranks[split] = others
            if all("in_group" in query for query in queries):
                group_ranks[split] = [query["in_group"]["rank"] for query in queries]
        by_kind = {"ranks": ranks, "other_ranks": other_ranks, "group_ranks": group_ranks}
        protocols[name] = {**measured, **by_kind}
    return {**content, "protocols": protocols}


def is_rankings(content: Any) -> bool:
    """Check whether parsed JSON looks like a rankings file."""
    return isinstance(content, dict) and {"protocols", "queries"} <= content.keys()


def unlike_annotations(content: Mapping[str, Any], benchmark: Benchmark) -> list[str]:
    """Find differences between the queries and images of a rankings file and a benchmark's annotations.

    Args:
        benchmark: the benchmark without the images that the file lists as excluded.
    """
    problems = []
    for split in benchmark.read(content["split"]):
        queries = content["queries"][split.name]
        if len(queries) != len(split.triplets):
            problems.append(
                f"{split.name}: {len(queries)} queries instead of {len(split.triplets)}"
            )
            continue
        if content["kinds"].get(split.name, {}) != split.queries_of_kinds:
            problems.append(f"{split.name}: kinds of queries differ from the annotations")
        for number, (query, triplet) in enumerate(zip(queries, split.triplets, strict=True)):
            where = f"{split.name} query {number}"
            annotated = _query(number, triplet, benchmark)
            for field in ("pair_id", "reference", "target", "other_targets", "caption", "group"):
                if query[field] != annotated[field]:
                    problems.append(f"{where}: {field} differs from the annotations")
            for found in query["protocols"].values():
                unknown = [name for name, _ in found["nearest"] if name not in split.row_of]
                problems += [f"{where}: {name} is not an image of the split" for name in unknown]
    return problems
