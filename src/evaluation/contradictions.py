"""What a result or a rankings file says in several places, held against itself: an edited number contradicts others.

The types of the fields and the range of each are in `schemas.py`.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import BENCHMARKS, Benchmark, Protocol
from benchmarks.metrics import NO_RANK, Ranks
from models.configuration import trained_on
from utils import UserError

ROUNDED = 0.01  # how far the sum of a query's rounded weights of experts may be from 1
# Field of a result -> whether it may lack splits.
TABLES = {
    "queries_sha256": False,
    "images_sha256": True,
    "images_sampled": True,
    "excluded_images": True,
    "excluded_triplets": True,
    "smaller_groups": True,
    "kinds": True,
}


def fault(file: Path, field: str, problem: str) -> UserError:
    """What is wrong with a field."""
    return UserError(f"{file}: {field}: {problem}: measure again")


def check_about(file: Path, result: Mapping[str, Any]) -> Benchmark:
    """Check what a result or a rankings file says of itself; returns its benchmark, without data.

    Raises:
        UserError: fields contradict each other or the benchmark.
    """
    if result["dataset"] not in BENCHMARKS:
        raise fault(file, "dataset", f"{result['dataset']} is no benchmark known here")
    benchmark = BENCHMARKS[result["dataset"]](Path())
    if result["split"] not in benchmark.splits:
        raise fault(file, "split", f"{result['split']} is none of {', '.join(benchmark.splits)}")
    names = benchmark.part_names(result["split"])
    for table, may_lack in TABLES.items():
        if table in result or not may_lack:
            _check_names(file, table, result[table], names, may_lack=may_lack)
    for name, measured in result["protocols"].items():
        parts = (measured["gallery"], measured["reference"], measured.get("text", ""))
        if name != Protocol(*parts).name:
            raise fault(file, f"protocols.{name}", "its gallery, reference or text are of another")
        for table in ("gallery_images", "queries"):
            _check_names(file, f"protocols.{name}.{table}", measured[table], names)
    own = result.get("protocol", next(iter(result["protocols"])))
    if own not in result["protocols"]:
        raise fault(file, "protocol", f"{own} is not among its protocols")
    metrics = result["protocols"][own]["metrics"]
    stated = result.get("metrics", metrics)
    for metric in {**metrics, **stated}:
        if stated.get(metric) != metrics.get(metric):
            raise fault(file, f"metrics.{metric}", f"not protocols.{own}.metrics.{metric}")
    if result.get("trained_on", trained_on(result["training"])) != trained_on(result["training"]):
        raise fault(file, "trained_on", "not what its training says")
    return benchmark


def _check_names(
    file: Path, field: str, given: Collection[str], names: Sequence[str], *, may_lack: bool = False
) -> None:
    """Raise UserError unless a table is of a benchmark's splits."""
    if not set(given) <= set(names) or (not may_lack and set(given) != set(names)):
        raise fault(file, field, f"not of {', '.join(names)}")


def check_ranks(file: Path, result: Mapping[str, Any], benchmark: Benchmark) -> None:
    """Check ranks against galleries, and metrics against ranks; metrics that are reported since then are added.

    Raises:
        UserError: a rank is beyond its gallery, or a metric is not what the ranks give.
    """
    names = benchmark.part_names(result["split"])
    may_lack_groups = benchmark.group_size is None
    in_groups = [] if benchmark.group_size == 0 else names
    for name, measured in result["protocols"].items():
        field = f"protocols.{name}"
        others = measured.get("other_ranks", {})
        groups = measured["group_ranks"]
        _check_names(file, f"{field}.ranks", measured["ranks"], names)
        _check_names(file, f"{field}.other_ranks", others, names, may_lack=True)
        _check_names(file, f"{field}.group_ranks", groups, in_groups, may_lack=may_lack_groups)
        for split in names:
            for where, problem in _rank_problems(measured, split, benchmark.group_size):
                raise fault(file, f"{field}.{where}", problem)
            for kind, queries in result.get("kinds", {}).get(split, {}).items():
                _check_kind(file, f"kinds.{split}.{kind}", queries, measured["queries"][split])
        _check_metrics(file, result, name, benchmark)


def places_of(measured: Mapping[str, Any], split: str) -> int:
    """Images that a query can retrieve."""
    return measured["gallery_images"][split] - (measured["reference"] == "removed")


def _rank_problems(
    measured: Mapping[str, Any], split: str, group_size: int | None
) -> Iterator[tuple[str, str]]:
    """Fields of the ranks of one protocol and split with what they contradict."""
    places = places_of(measured, split)
    in_group = (group_size or measured["gallery_images"][split]) - 1
    count = measured["queries"][split]
    most = {"ranks": places, "other_ranks": places, "group_ranks": in_group}
    for kind, images in most.items():
        ranks = measured.get(kind, {}).get(split)
        if ranks is None:
            continue
        if len(ranks) != count:
            yield f"{kind}.{split}", f"{len(ranks)} ranks of {count} queries"
        for query, found in enumerate(ranks):
            worst = max(found, default=0) if kind == "other_ranks" else found
            if worst >= images:
                yield f"{kind}.{split}.{query}", f"rank {worst} of {images} images"
    others = measured.get("other_ranks", {}).get(split, [])
    for query, (named, further) in enumerate(zip(measured["ranks"][split], others, strict=False)):
        if len({named, *further}) <= len(further):
            yield f"other_ranks.{split}.{query}", "two targets in one place"


def _check_kind(file: Path, field: str, queries: Sequence[int], count: int) -> None:
    """Raise UserError unless the numbers of some of a split's queries are in order, each once."""
    if sorted(set(queries)) != list(queries) or not queries or queries[-1] >= count:
        raise fault(file, field, f"no numbers of {count} queries in order")


def _check_metrics(file: Path, result: Mapping[str, Any], name: str, benchmark: Benchmark) -> None:
    """Check a protocol's metrics against its ranks, and complete them."""
    measured = result["protocols"][name]
    field = f"protocols.{name}.metrics"
    scores = {}
    for split in measured["ranks"]:
        scores[split] = benchmark.score(stored_ranks(result, name, split))
    recomputed = benchmark.summary(scores)
    stated = measured["metrics"]
    for metric in benchmark.selection:
        if metric not in stated:
            raise fault(file, field, f"{metric} is missing, so the file is not a whole one")
    for metric, value in stated.items():
        if metric not in recomputed:
            raise fault(file, f"{field}.{metric}", f"no metric of {benchmark.name}")
        if not math.isclose(value, recomputed[metric], abs_tol=1e-6):
            raise fault(file, f"{field}.{metric}", "not what its ranks give")
    measured["metrics"] = {**recomputed, **stated}


def stored_ranks(result: Mapping[str, Any], protocol: str, split: str) -> Ranks:
    """What the metrics of a protocol and a split are made of."""
    import numpy as np

    measured = result["protocols"][protocol]
    in_group = measured["group_ranks"].get(split)
    others = measured.get("other_ranks", {}).get(split)
    if others is not None:
        most = max(map(len, others))
        others = np.array([found + [NO_RANK] * (most - len(found)) for found in others])
    return Ranks(
        np.array(measured["ranks"][split]),
        others=others,
        in_group=None if in_group is None else np.array(in_group),
        kinds=result.get("kinds", {}).get(split, {}),
    )


def check_queries(file: Path, content: Mapping[str, Any], benchmark: Benchmark) -> None:
    """Check the queries of a rankings file: the answers to each, and that their ranks give its metrics.

    Raises:
        UserError: the first query and field that contradicts another.
    """
    _check_names(file, "queries", content["queries"], benchmark.part_names(content["split"]))
    experts = {len(query.get("experts", [])) for query in _all(content["queries"])}
    if len(experts) > 1:
        raise fault(file, "queries", "their numbers of experts differ")
    for split, queries in content["queries"].items():
        pair_ids = [query["pair_id"] for query in queries if query["pair_id"] is not None]
        if len(set(pair_ids)) < len(pair_ids):
            raise fault(file, f"queries.{split}", "a pair_id is there twice")
        for place, query in enumerate(queries):
            for field, problem in _query_problems(
                query, place, split, content, benchmark=benchmark
            ):
                raise fault(file, f"queries.{split}.{place}.{field}", problem)
    check_ranks(file, with_ranks(content), benchmark)


def _all(queries: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[Mapping[str, Any]]:
    for of_split in queries.values():
        yield from of_split


def _query_problems(
    query: Mapping[str, Any],
    place: int,
    split: str,
    content: Mapping[str, Any],
    *,
    benchmark: Benchmark,
) -> Iterator[tuple[str, str]]:
    """Fields of a query with what they contradict."""
    if query["query"] != place:
        yield "query", f"it is number {place}"
    if not isinstance(query["pair_id"], benchmark.id_types):
        yield "pair_id", f"missing, or nothing that {benchmark.name} has"
    if query["protocols"].keys() != content["protocols"].keys():
        yield "protocols", "not those of the file"
        return
    targets = [query["target"], *query.get("other_targets", [])]
    if len(set(targets)) < len(targets):
        yield "other_targets", "a target is there twice"
    for name, found in query["protocols"].items():
        measured = content["protocols"][name]
        barred = query["reference"] if measured["reference"] == "removed" else None
        most = places_of(measured, split)
        for field, problem in _found_problems(found, targets, barred, most=most):
            yield f"protocols.{name}.{field}", problem
    has_groups = "in_group" in query if benchmark.group_size is None else benchmark.group_size > 0
    if ("in_group" in query) != has_groups:
        yield "in_group", f"missing, or nothing that {benchmark.name} has"
    elif "in_group" in query:
        most = (benchmark.group_size or len(query["group"])) - 1
        found = query["in_group"]
        for field, problem in _found_problems(found, targets[:1], query["reference"], most=most):
            yield f"in_group.{field}", problem
        if not {name for name, _ in found["nearest"]} <= set(query["group"]):
            yield "in_group.nearest", "images of another group"
    if "experts" in query and abs(sum(query["experts"]) - 1) > ROUNDED:
        yield "experts", f"the weights sum to {sum(query['experts']):.4g}, not to 1"


def _found_problems(
    found: Mapping[str, Any], targets: Sequence[str], barred: str | None, *, most: int
) -> Iterator[tuple[str, str]]:
    """Fields of what a query found that contradict each other.

    Args:
        targets: whose ranks it has, the named one first.
        barred: an image that may not be retrieved.
        most: images that can be.
    """
    names = [name for name, _ in found["nearest"]]
    similarities = [similarity for _, similarity in found["nearest"]]
    ranks = [found["rank"], *found.get("other_ranks", [])]
    if len(ranks) != len(targets):
        yield "other_ranks", f"{len(ranks) - 1} ranks of {len(targets) - 1} other targets"
    if len(set(ranks)) < len(ranks):
        yield "other_ranks", "two targets in one place"
    if len(set(names)) < len(names):
        yield "nearest", "an image is there twice"
    if barred in names:
        yield "nearest", "the reference is there, which cannot be retrieved"
    if sorted(similarities, reverse=True) != similarities:
        yield "nearest", "the similarities rise"
    for target, rank in zip(targets, ranks, strict=False):
        field = "rank" if target == targets[0] else "other_ranks"
        if rank >= most:
            yield field, f"{rank} of {most} images"
        place = names.index(target) if target in names else None
        if place != (rank if rank < len(names) else None):
            yield field, f"{rank} is not where the target is among the nearest"


def with_ranks(content: Mapping[str, Any]) -> dict[str, Any]:
    """A rankings file as a result, with the ranks of its queries."""
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
