"""Write and read results: metrics under each protocol, with everything that they depend on."""

import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import BENCHMARKS, Benchmark, Protocol, Split
from benchmarks.metrics import NO_RANK, Ranks
from benchmarks.splits import images_digest, split_digest
from runtime.files import read_json, written_whole
from utils import UserError, first_line

if TYPE_CHECKING:
    from benchmarks.query_lists import QueryList
    from benchmarks.ranking import Ranking, Rankings
    from models.pair import Pair

Result = dict[str, Any]


def make_result(
    benchmark: Benchmark,
    splits: Sequence[Split],
    rankings: "Rankings",
    *,
    reasons: Mapping[str, str],
    made_by: Mapping[str, Any],
    kept: Path | None = None,
) -> Result:
    """Return a complete result in plain types.

    Args:
        splits: the validation splits, as they were searched.
        rankings: rankings of each split under each protocol; the first protocol's metrics are the result's own metrics.
        reasons: image -> the reason why it was excluded.
        made_by: model and command of the measurement, see `provenance`.
        kept: folder that caches digests of images, see `images_digest`.
    """
    protocols = {}
    for protocol, of_split in rankings.items():
        protocols[protocol.name] = _measured(benchmark, splits, protocol, rankings=of_split)
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
        "images_sha256": {split.name: images_digest(split, kept=kept) for split in splits},
        "images_sampled": {split.name: images_digest(split, sampled=True) for split in splits},
        "queries_sha256": {split.name: split_digest(split) for split in splits},
        "kinds": {split.name: split.queries_of_kinds for split in splits if split.queries_of_kinds},
        "clusters": {split.name: split.clusters for split in splits},
        **made_by,
    }


def provenance(pair: "Pair", command: str, query_list: "QueryList | None" = None) -> dict[str, Any]:
    """Return the model, versions and command of a measurement, in plain types.

    Args:
        command: the command as it was typed.
        query_list: the only queries that were measured; None for all queries.
    """
    from models.encoder import versions

    return {
        "query_list": query_list.describe() if query_list else None,
        **pair.describe(),
        "versions": {"python": platform.python_version(), **versions()},
        "command": command,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _measured(
    benchmark: Benchmark,
    splits: Sequence[Split],
    protocol: Protocol,
    *,
    rankings: "Mapping[str, Ranking]",
) -> dict[str, Any]:
    """Return the part of a result for one protocol."""
    other_ranks = {}
    group_ranks = {}
    for name, ranking in rankings.items():
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
        "metrics": benchmark.metrics(splits, rankings),
        "certain": benchmark.certain(splits, protocol),
        "ranks": {name: ranking.known_ranks.tolist() for name, ranking in rankings.items()},
        "other_ranks": other_ranks,
        "group_ranks": group_ranks,
    }


def write_result(file: Path, result: Result) -> None:
    """Write a result as indented JSON, with each list of numbers on one line."""
    with written_whole(file) as out:
        for text in _parts(result):
            out.write(text.encode())
        out.write(b"\n")


def _parts(value: Any, margin: str = "\n") -> Iterator[str]:
    """Yield the text of a value, one list of numbers at a time, because the text of a million queries takes 1 GB.

    Args:
        margin: a line break and the indentation of the value's lines.
    """
    inner = f"{margin}  "
    if isinstance(value, Mapping) and value:
        for number, (name, item) in enumerate(value.items()):
            yield f"{',' if number else '{'}{inner}{json.dumps(name)}: "
            yield from _parts(item, inner)
        yield f"{margin}}}"
    elif isinstance(value, (list, tuple)) and not all(type(item) is int for item in value):
        for number, item in enumerate(value):
            yield f"{',' if number else '['}{inner}"
            yield from _parts(item, inner)
        yield f"{margin}]"
    else:
        yield json.dumps(value, separators=(",", ":"))


def read_result(file: Path) -> Result:
    """Read a result, and check that its metrics agree with its ranks.

    Raises:
        UserError: the file is not a result, or a metric disagrees with the ranks.
    """
    from evaluation.schemas import ResultFile
    from runtime.schema import checked

    result = read_json(file, "validate.py --metrics-json")
    remedy = "not a complete result of validate.py --metrics-json: evaluate again"
    checked(ResultFile, result, file=file, remedy=remedy)
    check_metrics(file, result)
    ranks = next(iter(result["protocols"].values()))["ranks"]
    for split in ranks.keys() | result["clusters"].keys():
        lengths = {len(own) for own in result["clusters"].get(split, {}).values()}
        if lengths != {len(ranks.get(split, []))}:
            raise UserError(
                f"{file}: clusters.{split}: not a number for each query: evaluate again"
            )
    return result


def check_metrics(file: Path, result: Result) -> None:
    """Recompute the metrics of a result from its ranks, and compare.

    Raises:
        UserError: a metric differs; the message contains both values.
    """
    if result["dataset"] not in BENCHMARKS:
        raise UserError(
            f"{file}: dataset: {result['dataset']} is not a known benchmark: evaluate again"
        )
    benchmark = BENCHMARKS[result["dataset"]](Path())
    for protocol, measured in result["protocols"].items():
        scores = {}
        try:
            for split in benchmark.part_names(result["split"]):
                scores[split] = benchmark.score(stored_ranks(result, protocol, split))
            recomputed = benchmark.summary(scores)
        except (LookupError, ValueError) as error:
            raise UserError(
                f"{file}: protocols.{protocol}: incomplete ranks of {benchmark.name} {result['split']} "
                f"({first_line(error)}): evaluate again"
            ) from None
        _compare(file, f"protocols.{protocol}.metrics", measured["metrics"], recomputed=recomputed)
        if protocol == result["protocol"]:
            _compare(file, "metrics", result["metrics"], recomputed=recomputed)


def _compare(
    file: Path, field: str, stated: Mapping[str, float], *, recomputed: Mapping[str, float]
) -> None:
    """Raise UserError if a metric differs from the recomputed one."""
    for metric in {**recomputed, **stated}:
        there, due = stated.get(metric), recomputed.get(metric)
        if there is None or due is None or not math.isclose(there, due, abs_tol=1e-6):
            raise UserError(
                f"{file}: {field}.{metric}: {there} in the file, but {due} from its ranks: evaluate again"
            )


def stored_ranks(result: Mapping[str, Any], protocol: str, split: str) -> Ranks:
    """Return the ranks of a split's queries under a protocol.

    Raises:
        LookupError: the result has no ranks for the protocol and split.
    """
    import numpy as np

    measured = result["protocols"][protocol]
    in_group = measured["group_ranks"].get(split)
    others = measured["other_ranks"].get(split)
    if others is not None:
        most = max(map(len, others))
        others = np.array([found + [NO_RANK] * (most - len(found)) for found in others])
    return Ranks(
        np.array(measured["ranks"][split]),
        others=others,
        in_group=None if in_group is None else np.array(in_group),
        kinds=result["kinds"].get(split, {}),
    )
