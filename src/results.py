"""Results that say what they are: metrics under each protocol with all that they were measured on, and rankings."""

import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import BENCHMARKS, Benchmark
from features import versions
from protocols import Protocol
from rankings import Ranking, answers
from splits import Split, images_digest, split_digest
from utils import UserError, read_json, write_text

Rankings = dict[Protocol, dict[str, Ranking]]  # protocol -> split's name -> its ranking


def make_result(
    benchmark: Benchmark,
    splits: list[Split],
    rankings: Rankings,
    pair: dict[str, Any],
    reasons: Mapping[str, str],
    command: str,
) -> dict[str, Any]:
    """All of a measurement in plain types.

    Args:
        splits: the validation splits, as they were searched.
        rankings: of each split under each protocol; the metrics of the first are the result's own.
        pair: `Pair.describe` of what was measured.
        reasons: why images were excluded.
        command: what was typed.
    """
    protocols = {p.name: _measured(benchmark, splits, p, of_split) for p, of_split in rankings.items()}
    first = next(iter(protocols))
    return {
        "dataset": benchmark.name,
        "split": benchmark.splits[1],
        "protocol": first,
        "metrics": protocols[first]["metrics"],
        "protocols": protocols,
        "excluded_images": {s.name: {name: reasons[name] for name in s.excluded_images} for s in splits},
        "excluded_triplets": {s.name: s.excluded_triplets for s in splits},
        "images_sha256": {s.name: images_digest(s) for s in splits},
        "queries_sha256": {s.name: split_digest(s) for s in splits},
        **pair,
        "versions": {"python": platform.python_version(), **versions()},
        "command": command,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _measured(
    benchmark: Benchmark, splits: list[Split], protocol: Protocol, of_split: dict[str, Ranking]
) -> dict[str, Any]:
    """One protocol's part of a result."""
    in_groups = {name: r.group_ranks.tolist() for name, r in of_split.items() if r.group_ranks is not None}
    return {
        "gallery": protocol.gallery,
        "reference": protocol.reference,
        "gallery_images": {s.name: protocol.gallery_size(s) for s in splits},
        "queries": {s.name: len(s.triplets) for s in splits},
        "metrics": benchmark.metrics(of_split),
        "ranks": {name: r.ranks.tolist() for name, r in of_split.items()},
        "group_ranks": in_groups,
    }


def write_result(file: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON, indented, each list of numbers on one line."""
    text = json.dumps(result, indent=2)
    write_text(file, re.sub(r"\[[\s\d,]+\]", lambda match: "".join(match[0].split()), text) + "\n")


def read_result(file: Path) -> dict[str, Any]:
    """A result that says how it was measured, its metrics checked against its ranks.

    Raises:
        UserError: the file is none, or its metrics are not those of its ranks.
    """
    result = read_json(file)
    try:
        benchmark = BENCHMARKS[result["dataset"]](Path())
        metrics = {name: (m["metrics"], _recomputed(benchmark, m)) for name, m in result["protocols"].items()}
        whole = all(
            stated.keys() == own.keys() and set(map(type, stated.values())) <= {int, float}
            for stated, own in metrics.values()
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, ZeroDivisionError):
        whole = False
    if not whole or not metrics:
        raise UserError(f"{file} is no result of validate.py --metrics-json, or not a whole one: measure again")
    for protocol, (stated, own) in metrics.items():
        for name, value in own.items():
            if not math.isclose(value, stated[name], abs_tol=1e-6):
                raise UserError(f"{file}: {name} under {protocol} is not what its ranks give: measure again")
    return result


def _recomputed(benchmark: Benchmark, measured: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that stored ranks give."""
    scores = {}
    for name, ranks in measured["ranks"].items():
        in_group = measured["group_ranks"].get(name)
        scores[name] = benchmark.score(torch.tensor(ranks), None if in_group is None else torch.tensor(in_group))
    return benchmark.summary(scores)


def write_rankings(
    file: Path, result: dict[str, Any], benchmark: Benchmark, splits: list[Split], rankings: Rankings
) -> None:
    """Write the answers to every query: the result without its ranks, then a line for each query.

    A query has, under each protocol, the rank of its target (0 is the first place) and the nearest images with their
    cosine similarities, rounded to 6 digits; and the same in its group, if it has one.
    """
    about = {name: {k: v for k, v in m.items() if "ranks" not in k} for name, m in result["protocols"].items()}
    header = json.dumps(result | {"protocols": about}, indent=1)
    parts = []
    for split in splits:
        of_split = {protocol.name: by_split[split.name] for protocol, by_split in rankings.items()}
        lines = ",\n".join(json.dumps(query) for query in _queries(benchmark, split, of_split))
        parts.append(f"{json.dumps(split.name)}: [\n{lines}\n]")
    write_text(file, header[: header.rindex("}")].rstrip() + ',\n "queries": {' + ",\n".join(parts) + "}\n}\n")


def _queries(benchmark: Benchmark, split: Split, of_split: dict[str, Ranking]) -> list[dict[str, Any]]:
    """A split's queries with their answers."""
    queries = [
        {"query": row, "pair_id": t.pair_id, "reference": t.reference, "target": t.target}
        | {"caption": benchmark.caption(t.captions), "group": list(t.group), "protocols": {}}
        for row, t in enumerate(split.triplets)
    ]
    for name, ranking in of_split.items():
        found = _rounded(split.names, ranking.nearest, ranking.similarities)
        for query, rank, nearest in zip(queries, ranking.ranks.tolist(), found, strict=True):
            query["protocols"][name] = {"rank": rank, "nearest": nearest}
        if ranking.group_ranks is not None:
            found = _rounded(split.names, ranking.nearest_in_group, ranking.group_similarities)
            for query, rank, nearest in zip(queries, ranking.group_ranks.tolist(), found, strict=True):
                query["in_group"] = {"rank": rank, "nearest": nearest}
    return queries


def _rounded(names: Sequence[str], rows: torch.Tensor, similarities: torch.Tensor) -> list[list[tuple[str, float]]]:
    return [[(name, round(s, 6)) for name, s in row] for row in answers(names, rows, similarities)]
