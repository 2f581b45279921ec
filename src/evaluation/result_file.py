"""Results that say what they are: metrics under each protocol with all that they were measured on."""

import json
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import Benchmark, Protocol, Split
from benchmarks.splits import images_digest, split_digest
from evaluation.contradictions import check_about, check_ranks
from runtime.files import read_json, write_text

if TYPE_CHECKING:
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
    query_list: Mapping[str, Any] | None = None,
) -> Result:
    """All of a measurement in plain types.

    Args:
        splits: the validation splits, as they were searched.
        rankings: of each split under each protocol; the metrics of the first are the result's own.
        pair: `Pair.describe` of what was measured.
        reasons: why images were excluded.
        command: what was typed.
        versions: of the packages that numbers pass through.
        query_list: `QueryList.describe` of the queries that alone were measured; None where all were.
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
        "images_sampled": {split.name: images_digest(split, sampled=True) for split in splits},
        "queries_sha256": {split.name: split_digest(split) for split in splits},
        "kinds": {split.name: split.queries_of_kinds for split in splits if split.queries_of_kinds},
        "query_list": query_list,
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
    other_ranks = {}
    group_ranks = {}
    for name, ranking in of_split.items():
        if ranking.other_ranks is not None:
            other_ranks[name] = ranking.known_other_ranks
        if ranking.group_ranks is not None:
            group_ranks[name] = ranking.group_ranks.tolist()
    return {
        "gallery": protocol.gallery,
        "reference": protocol.reference,
        "text": protocol.text,
        "template": benchmark.concept_template if protocol.text else "",
        "gallery_images": {split.name: protocol.gallery_size(split) for split in splits},
        "queries": {split.name: len(split.triplets) for split in splits},
        "metrics": benchmark.metrics(splits, of_split),
        "certain": benchmark.certain(splits, protocol),
        "ranks": {name: ranking.known_ranks.tolist() for name, ranking in of_split.items()},
        "other_ranks": other_ranks,
        "group_ranks": group_ranks,
    }


def composed_by(result: Mapping[str, Any]) -> str:
    """The combining function of a result; earlier versions had two, and did not always name it."""
    has_combiner = "combiner" in result["weights_sha256"]
    return result.get("combining_function") or ("combiner" if has_combiner else "sum")


def write_result(file: Path, result: Result) -> None:
    """Write a result as JSON, indented, each list of numbers on one line."""
    text = json.dumps(result, indent=2)
    write_text(file, re.sub(r"\[[\s\d,]+\]", lambda match: "".join(match[0].split()), text) + "\n")


def read_result(file: Path) -> Result:
    """A result that says how it was measured, held against itself.

    A metric that is reported now and was not when the file was written is added from its ranks.

    Raises:
        UserError: the file is none, or contradicts itself, as when its metrics are not those of its ranks.
    """
    from evaluation.schemas import ResultFile
    from runtime.schema import checked

    result = read_json(file, "validate.py --metrics-json")
    remedy = "no result of validate.py --metrics-json, or not a whole one; measure again"
    checked(ResultFile, result, file=file, remedy=remedy)
    check_ranks(file, result, check_about(file, result))
    return result
