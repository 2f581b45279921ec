"""Results that say what they are: metrics under each protocol with all that they were measured on."""

import json
import math
import platform
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import BENCHMARKS, Benchmark, Protocol, Split
from benchmarks.protocols import Rankings
from benchmarks.ranking import Ranking
from benchmarks.splits import images_digest, split_digest
from models.encoder import versions
from runtime.files import read_json, write_text
from utils import UserError


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
        "smaller_groups": {s.name: s.smaller_groups for s in splits},
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
    result = read_json(file, "validate.py --metrics-json")
    try:
        benchmark = BENCHMARKS[result["dataset"]](Path())
        metrics = {name: (m["metrics"], _recomputed(benchmark, m)) for name, m in result["protocols"].items()}
        whole = _says_what_it_is(result) and all(
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


def _says_what_it_is(result: Mapping[str, Any]) -> bool:
    """Whether a result has all that a comparison looks at; may raise KeyError or TypeError if not."""
    tables = ("queries_sha256", "images_sha256", "excluded_images", "preprocessing", "weights_sha256", "training")
    named = [*(result[name] for name in tables), *result["training"].values()]
    names = result["split"], result["weights_sha256"]["clip"]
    splits = result["queries_sha256"].keys()
    return (
        all(isinstance(name, str) for name in names)
        and all(isinstance(table, dict) for table in named)
        and all(m["gallery_images"].keys() == m["ranks"].keys() == splits for m in result["protocols"].values())
        and all(m["queries"] == {s: len(r) for s, r in m["ranks"].items()} for m in result["protocols"].values())
    )


def _recomputed(benchmark: Benchmark, measured: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that stored ranks give."""
    scores = {}
    for name, ranks in measured["ranks"].items():
        in_group = measured["group_ranks"].get(name)
        scores[name] = benchmark.score(torch.tensor(ranks), None if in_group is None else torch.tensor(in_group))
    return benchmark.summary(scores)
