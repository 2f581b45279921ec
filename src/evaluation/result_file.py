"""Results that say what they are: metrics under each protocol with all that they were measured on."""

import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import BENCHMARKS, Benchmark, Protocol, Split
from benchmarks.splits import images_digest, split_digest
from runtime.files import read_json, write_text
from utils import UserError

if TYPE_CHECKING:
    import numpy as np

    from benchmarks.ranking import Ranking, Rankings

Result = dict[str, Any]


def make_result(
    benchmark: Benchmark,
    splits: Sequence[Split],
    rankings: "Rankings",
    *,
    pair: Mapping[str, Any],
    reasons: Mapping[str, str],
    command: str,
    versions: Mapping[str, str],
) -> Result:
    """All of a measurement in plain types.

    Args:
        splits: the validation splits, as they were searched.
        rankings: of each split under each protocol; the metrics of the first are the result's own.
        pair: `Pair.describe` of what was measured.
        reasons: why images were excluded.
        command: what was typed.
        versions: of the packages that numbers pass through.
    """
    protocols = {}
    for protocol, of_split in rankings.items():
        protocols[protocol.name] = _measured(benchmark, splits, protocol, of_split)
    first = next(iter(protocols))
    excluded_images = {}
    for split in splits:
        excluded_images[split.name] = {name: reasons[name] for name in split.excluded_images}
    return {
        "dataset": benchmark.name,
        "split": benchmark.val_split,
        "protocol": first,
        "metrics": protocols[first]["metrics"],
        "protocols": protocols,
        "excluded_images": excluded_images,
        "excluded_triplets": {split.name: split.excluded_triplets for split in splits},
        "smaller_groups": {split.name: split.smaller_groups for split in splits},
        "images_sha256": {split.name: images_digest(split) for split in splits},
        "queries_sha256": {split.name: split_digest(split) for split in splits},
        **pair,
        "versions": {"python": platform.python_version(), **versions},
        "command": command,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _measured(
    benchmark: Benchmark,
    splits: Sequence[Split],
    protocol: Protocol,
    of_split: "Mapping[str, Ranking]",
) -> dict[str, Any]:
    """One protocol's part of a result."""
    group_ranks = {}
    for name, ranking in of_split.items():
        if ranking.group_ranks is not None:
            group_ranks[name] = ranking.group_ranks.tolist()
    return {
        "gallery": protocol.gallery,
        "reference": protocol.reference,
        "gallery_images": {split.name: protocol.gallery_size(split) for split in splits},
        "queries": {split.name: len(split.triplets) for split in splits},
        "metrics": benchmark.metrics(of_split),
        "ranks": {name: ranking.known_ranks.tolist() for name, ranking in of_split.items()},
        "group_ranks": group_ranks,
    }


def write_result(file: Path, result: Result) -> None:
    """Write a result as JSON, indented, each list of numbers on one line."""
    text = json.dumps(result, indent=2)
    write_text(file, re.sub(r"\[[\s\d,]+\]", lambda match: "".join(match[0].split()), text) + "\n")


def read_result(file: Path) -> Result:
    """A result that says how it was measured, its metrics checked against its ranks.

    A metric that is reported now and was not when the file was written is added from its ranks.

    Raises:
        UserError: the file is none, or its metrics are not those of its ranks.
    """
    result = read_json(file, "validate.py --metrics-json")
    try:
        benchmark = BENCHMARKS[result["dataset"]](Path())
        recomputed = {
            name: _recomputed(benchmark, measured) for name, measured in result["protocols"].items()
        }
        whole = bool(recomputed) and _says_what_it_is(result)
        for name, measured in result["protocols"].items():
            whole = whole and _are_metrics(measured["metrics"], recomputed[name], benchmark)
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        RuntimeError,
        ZeroDivisionError,
    ):
        whole = False
    if not whole:
        raise UserError(
            f"{file} is no result of validate.py --metrics-json, or not a whole one: measure again"
        )
    for name, measured in result["protocols"].items():
        for metric, value in measured["metrics"].items():
            if not math.isclose(value, recomputed[name][metric], abs_tol=1e-6):
                raise UserError(
                    f"{file}: {metric} under {name} is not what its ranks give: measure again"
                )
        measured["metrics"] = {**recomputed[name], **measured["metrics"]}
    return result


def _are_metrics(
    stated: Mapping[str, Any], known: Mapping[str, float], benchmark: Benchmark
) -> bool:
    """Whether these are metrics of a benchmark, those that select checkpoints among them."""
    are_numbers = all(type(value) in (int, float) for value in stated.values())
    return are_numbers and benchmark.selection.keys() <= stated.keys() <= known.keys()


def _says_what_it_is(result: Mapping[str, Any]) -> bool:
    """Whether a result has all that a comparison looks at; may raise KeyError or TypeError if not."""
    names = (result["split"], result["weights_sha256"]["clip"])
    tables = (
        "queries_sha256",
        "images_sha256",
        "excluded_images",
        "preprocessing",
        "weights_sha256",
        "training",
    )
    are_tables = all(isinstance(result[table], dict) for table in tables)
    configs = result["training"].values()
    if not are_tables or not all(isinstance(name, str) for name in names):
        return False
    splits = result["queries_sha256"].keys()
    for measured in result["protocols"].values():
        counts = {split: len(ranks) for split, ranks in measured["ranks"].items()}
        if (
            not measured["gallery_images"].keys() == counts.keys() == splits
            or measured["queries"] != counts
        ):
            return False
    return all(isinstance(config, dict) for config in configs)


def _recomputed(benchmark: Benchmark, measured: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that stored ranks give."""
    scores = {split: benchmark.score(*stored_ranks(measured, split)) for split in measured["ranks"]}
    return benchmark.summary(scores)


def stored_ranks(measured: Mapping[str, Any], split: str) -> "tuple[np.ndarray, np.ndarray | None]":
    """The ranks (Q,) of a split's targets in the gallery, and in their groups if there are any."""
    import numpy as np

    in_group = measured["group_ranks"].get(split)
    return np.array(measured["ranks"][split]), None if in_group is None else np.array(in_group)
