"""The answers to every query in plain types, and the rankings files that hold them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import PROTOCOLS, Benchmark, Split, Triplet
from runtime.files import read_json, write_text
from utils import UserError

if TYPE_CHECKING:
    from benchmarks.ranking import Rankings
    from combiner import Insight

# Split's name -> its queries. A query has its caption, reference, target and group, under each protocol the rank of its
# target (0 is the first place) and the nearest images with their cosine similarities, the same in its group if it has
# one, and what the Combiner did: the mean of the gate, and the experts with their weights.
Record = dict[str, Any]
Records = dict[str, list[Record]]

SIMILARITY_DIGITS = 6
WEIGHT_DIGITS = 4


def make_records(
    benchmark: Benchmark,
    splits: Sequence[Split],
    rankings: "Rankings",
    insights: "Mapping[str, Insight | None]",
) -> Records:
    """The queries of some splits with their answers. Similarities are rounded to 6 digits, weights to 4.

    Args:
        insights: what the Combiner did with each split's queries; None for the sum.
    """
    records = {}
    for split in splits:
        queries = [_query(row, triplet, benchmark) for row, triplet in enumerate(split.triplets)]
        _add_answers(queries, split, rankings)
        insight = insights[split.name]
        if insight is not None:
            _add_insight(queries, insight)
        records[split.name] = queries
    return records


def _query(row: int, triplet: Triplet, benchmark: Benchmark) -> Record:
    return {
        "query": row,
        "pair_id": triplet.pair_id,
        "reference": triplet.reference,
        "target": triplet.target,
        "caption": benchmark.caption(triplet.captions),
        "group": list(triplet.group),
        "protocols": {},
    }


def _add_answers(queries: list[Record], split: Split, rankings: "Rankings") -> None:
    """What each query retrieved under each protocol, and in its group, where every protocol gives the same."""
    for protocol, by_split in rankings.items():
        ranking = by_split[split.name]
        answers = _rounded(ranking.answers(split.names))
        for query, rank, nearest in zip(
            queries, ranking.known_ranks.tolist(), answers, strict=True
        ):
            query["protocols"][protocol.name] = {"rank": rank, "nearest": nearest}
    in_group = ranking.answers_in_group(split.names)
    if in_group is None or ranking.group_ranks is None:
        return
    for query, rank, nearest in zip(
        queries, ranking.group_ranks.tolist(), _rounded(in_group), strict=True
    ):
        query["in_group"] = {"rank": rank, "nearest": nearest}


def _add_insight(queries: list[Record], insight: "Insight") -> None:
    for query, gate, weights in zip(
        queries, insight.gate.tolist(), insight.experts.tolist(), strict=True
    ):
        query["gate"] = round(gate, WEIGHT_DIGITS)
        if weights:
            query["experts"] = [round(weight, WEIGHT_DIGITS) for weight in weights]


def _rounded(answers: list[list[tuple[str, float]]]) -> list[list[tuple[str, float]]]:
    rounded = []
    for found in answers:
        rounded.append([(name, round(similarity, SIMILARITY_DIGITS)) for name, similarity in found])
    return rounded


def write_rankings(file: Path, result: Mapping[str, Any], records: Records) -> None:
    """Write records to a file: the result that they belong to, without its ranks, then a line for each query."""
    protocols = {}
    for name, measured in result["protocols"].items():
        protocols[name] = {key: value for key, value in measured.items() if "ranks" not in key}
    about = {**result, "protocols": protocols}
    splits = []
    for name, queries in records.items():
        lines = ",\n".join(map(json.dumps, queries))
        splits.append(f"{json.dumps(name)}: [\n{lines}\n]")
    fields = [
        f" {json.dumps(name)}: {json.dumps(value, indent=1)}" for name, value in about.items()
    ]
    fields.append(' "queries": {' + ",\n".join(splits) + "}")
    write_text(file, "{\n" + ",\n".join(fields) + "\n}\n")


def read_rankings(file: Path) -> dict[str, Any]:
    """A rankings file: a result whose "queries" are records.

    Raises:
        UserError: it is none, or not a whole one.
    """
    content = read_json(file, "validate.py --rankings")
    try:
        whole = isinstance(content["dataset"], str) and _are_records(content["queries"])
    except (KeyError, TypeError, AttributeError, ValueError):
        whole = False
    if not whole:
        raise UserError(
            f"{file} is no file of validate.py --rankings, or not a whole one: measure again"
        )
    return content


def _are_records(records: Records) -> bool:
    """Whether these are the queries of some splits; raises KeyError, TypeError or ValueError if they are not."""
    if not records or not all(records.values()):
        return False
    queries: list[Record] = []
    for of_split in records.values():
        queries += of_split
    return all(map(_is_record, queries)) and len(set(map(_shape, queries))) == 1


def _shape(query: Record) -> tuple[frozenset[str], int]:
    """What all queries of a file have in common: the protocols, and the number of experts."""
    return frozenset(query["protocols"]), len(query.get("experts", []))


def _is_record(query: Record) -> bool:
    """Whether a query has all that the sheets show of it; raises KeyError, TypeError or ValueError if not."""
    texts = [query["reference"], query["target"], query["caption"]]
    numbers = [query["query"], query.get("gate", 0), *query.get("experts", [])]
    rankings = [ranking for name, ranking in query["protocols"].items() if name in PROTOCOLS]
    if "in_group" in query:
        rankings.append(query["in_group"])
    for ranking in rankings:
        numbers.append(ranking["rank"])
        for name, similarity in ranking["nearest"]:
            texts.append(name)
            numbers.append(similarity)
    are_numbers = all(
        isinstance(number, int | float) and not isinstance(number, bool) for number in numbers
    )
    are_texts = all(isinstance(text, str) for text in texts)
    return bool(query["protocols"]) and "pair_id" in query and are_numbers and are_texts
