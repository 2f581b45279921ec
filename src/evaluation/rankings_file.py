"""The answers to every query in plain types, and the rankings files that hold them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks import PROTOCOLS, Benchmark, Split
from benchmarks.protocols import Rankings
from benchmarks.ranking import answers
from combiner import Insight
from runtime.files import read_json, write_text
from utils import UserError

# Split's name -> its queries. A query has its caption, reference, target and group, under each protocol the rank of its
# target (0 is the first place) and the nearest images with their cosine similarities, the same in its group if it has
# one, and what the Combiner did: the mean of the gate, and the experts with their weights.
Records = dict[str, list[dict[str, Any]]]


def make_records(
    benchmark: Benchmark, splits: Sequence[Split], rankings: Rankings, insights: Mapping[str, Insight | None]
) -> Records:
    """The queries of some splits with their answers. Similarities are rounded to 6 digits, weights to 4.

    Args:
        insights: what the Combiner did with each split's queries; None for the sum.
    """
    records = {}
    for split in splits:
        queries = records[split.name] = [
            {"query": row, "pair_id": t.pair_id, "reference": t.reference, "target": t.target}
            | {"caption": benchmark.caption(t.captions), "group": list(t.group), "protocols": {}}
            for row, t in enumerate(split.triplets)
        ]
        for protocol, by_split in rankings.items():
            ranking = by_split[split.name]
            found = _rounded(split.names, ranking.nearest, ranking.similarities)
            for query, rank, nearest in zip(queries, ranking.ranks.tolist(), found, strict=True):
                query["protocols"][protocol.name] = {"rank": rank, "nearest": nearest}
        if ranking.group_ranks is not None:  # the same under every protocol
            found = _rounded(split.names, ranking.nearest_in_group, ranking.group_similarities)
            for query, rank, nearest in zip(queries, ranking.group_ranks.tolist(), found, strict=True):
                query["in_group"] = {"rank": rank, "nearest": nearest}
        _add_insight(queries, insights[split.name])
    return records


def _add_insight(queries: list[dict[str, Any]], insight: Insight | None) -> None:
    if insight is None:
        return
    for query, gate, weights in zip(queries, insight.gate.tolist(), insight.experts.tolist(), strict=True):
        query["gate"] = round(gate, 4)
        if weights:
            query["experts"] = [round(weight, 4) for weight in weights]


def _rounded(names: Sequence[str], rows: Tensor, similarities: Tensor) -> list[list[tuple[str, float]]]:
    return [[(name, round(s, 6)) for name, s in row] for row in answers(names, rows, similarities)]


def write_rankings(file: Path, result: Mapping[str, Any], records: Records) -> None:
    """Write records to a file: the result that they belong to, without its ranks, then a line for each query."""
    about = {name: {k: v for k, v in m.items() if "ranks" not in k} for name, m in result["protocols"].items()}
    header = json.dumps({**result, "protocols": about}, indent=1)
    parts = []
    for name, queries in records.items():
        lines = ",\n".join(map(json.dumps, queries))
        parts.append(f"{json.dumps(name)}: [\n{lines}\n]")
    write_text(file, header[: header.rindex("}")].rstrip() + ',\n "queries": {' + ",\n".join(parts) + "}\n}\n")


def read_rankings(file: Path) -> dict[str, Any]:
    """A rankings file: a result whose "queries" are records.

    Raises:
        UserError: it is none, or not a whole one.
    """
    content = read_json(file, "validate.py --rankings")
    try:
        queries = [query for split in content["queries"].values() for query in split]
        whole = bool(queries) and all(map(_is_record, queries)) and isinstance(content["dataset"], str)
        whole = whole and all(content["queries"].values()) and len(set(map(_shape, queries))) == 1
    except (KeyError, TypeError, AttributeError, ValueError):
        whole = False
    if not whole:
        raise UserError(f"{file} is no file of validate.py --rankings, or not a whole one: measure again")
    return content


def _shape(query: dict[str, Any]) -> tuple[frozenset[str], int]:
    """What all queries of a file have in common: the protocols, and the number of experts."""
    return frozenset(query["protocols"]), len(query.get("experts", []))


def _is_record(query: dict[str, Any]) -> bool:
    """Whether a query has all that the sheets show of it; raises KeyError, TypeError or ValueError if not."""
    names = [query["reference"], query["target"], query["caption"]]
    found = [query["protocols"][name] for name in query["protocols"] if name in PROTOCOLS]
    found += [query["in_group"]] if "in_group" in query else []
    numbers = [query["query"], query.get("gate", 0), *query.get("experts", [])]
    for answer in found:
        numbers.append(answer["rank"])
        for name, similarity in answer["nearest"]:
            names.append(name)
            numbers.append(similarity)
    real = all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers)
    return bool(query["protocols"]) and "pair_id" in query and real and all(isinstance(name, str) for name in names)
