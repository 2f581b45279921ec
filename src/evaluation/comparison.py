"""Results side by side: methods with their seeds, whether they compare, and how sure their differences are."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import Benchmark
from evaluation.result_file import read_result
from models.configuration import FREE
from utils import UserError

# What a configuration says beside the method. The weights that a Combiner was trained on have one of their own.
NOT_THE_METHOD = FREE | {"seed", "seeds", "metrics", "excluded", "clip_weights"}


@dataclass(frozen=True)
class Column:
    """One method: a result, or those of several seeds."""

    label: str
    results: list[dict[str, Any]]

    def has(self, protocol: str) -> bool:
        """Whether all of it was measured under a protocol."""
        return all(protocol in result["protocols"] for result in self.results)

    def values(self, protocol: str, metric: str) -> list[float]:
        """A metric of each seed."""
        return [result["protocols"][protocol]["metrics"][metric] for result in self.results]

    def conditions(self, protocol: str) -> dict[str, Any]:
        """What must be equal for numbers to compare beside the protocol."""
        (first, *others) = [
            {
                "queries": [result["queries_sha256"], result["protocols"][protocol]["queries"]],
                "galleries": result["protocols"][protocol]["gallery_images"],
                "exclusions": result["excluded_images"],
                "image files": result["images_sha256"],
            }
            for result in self.results
        ]
        return {name: value if all(o[name] == value for o in others) else None for name, value in first.items()}

    def hits(self, benchmark: Benchmark, protocol: str, split: str) -> dict[str, Tensor]:
        """Recall -> how often each query is a hit, (Q,), the mean over the seeds."""
        each = []
        for result in self.results:
            measured = result["protocols"][protocol]
            in_group = measured["group_ranks"].get(split)
            in_group = None if in_group is None else torch.tensor(in_group)
            each.append(benchmark.hits(torch.tensor(measured["ranks"][split]), in_group))
        return {name: torch.stack([hits[name].float() for hits in each]).mean(0) for name in each[0]}


def read_columns(files: list[Path]) -> list[Column]:
    """The results in the order of the files, those of one method with different seeds together.

    Raises:
        UserError: a file is no result, or they are of different datasets or splits.
    """
    columns: dict[str, Column] = {}
    first = None
    for number, (file, label) in enumerate(zip(files, labels(files), strict=True)):
        result = read_result(file)
        first = first or result
        if (result["dataset"], result["split"]) != (first["dataset"], first["split"]):
            raise UserError(
                f"{file} is of {result['dataset']} {result['split']}, {files[0]} of {first['dataset']} "
                f"{first['split']}: compare results of one"
            )
        key = _method(result) or f"file {number}"
        if key in columns and _seeds(result) in map(_seeds, columns[key].results):
            key = f"file {number}"  # the same seed again is no other seed
        columns.setdefault(key, Column(label, [])).results.append(result)
    return list(columns.values())


def labels(files: Sequence[Path]) -> list[str]:
    """What each file is called: its stem, its path where others have that stem, with a number where it comes again."""
    stems, names = Counter(file.stem for file in files), []
    for number, file in enumerate(files, start=1):
        name = file.stem if stems[file.stem] == 1 else str(file.with_suffix(""))
        names.append(f"{name} ({number})" if name in names else name)
    return names


def _seeds(result: dict[str, Any]) -> list[Any]:
    """The seeds of the trainings that a result is of."""
    return [config.get("seed") for config in result["training"].values()]


def _method(result: dict[str, Any]) -> str | None:
    """What the results of several seeds have in common: how CLIP and the Combiner were trained, but for the seeds.

    None where the checkpoint that learned last does not tell. A CLIP that does not tell is itself what they share.
    """
    training = result["training"]
    if "seed" not in training.get("combiner", training.get("clip", {})):
        return None
    configs = {kind: {k: v for k, v in config.items() if k not in NOT_THE_METHOD} for kind, config in training.items()}
    own = None if "seed" in training.get("clip", {}) else result["weights_sha256"]["clip"]
    return json.dumps([configs, result["preprocessing"], own], sort_keys=True)


def unlike(base: Column, other: Column, protocol: str) -> list[str]:
    """What keeps the numbers of two columns under a protocol from comparing; nothing where they do."""
    ours, theirs = base.conditions(protocol), other.conditions(protocol)
    return [name for name, value in theirs.items() if value is None or value != ours[name]]


def intervals(
    benchmark: Benchmark, base: Column, other: Column, protocol: str, resamples: int, confidence: float, seed: int
) -> dict[str, tuple[float, float]]:
    """Metric -> bounds of the difference other - base: quantiles over resamples of each split's queries.

    Every query is drawn for both columns at once (paired bootstrap), within its split. Several seeds count as the mean
    of their hits: the interval is about other queries, not about other seeds.
    """
    generator = torch.Generator().manual_seed(seed)
    sides: tuple[dict[str, dict[str, list[float]]], ...] = ({}, {})  # split -> recall -> (resamples,)
    for split in base.results[0]["queries_sha256"]:
        of_each = [column.hits(benchmark, protocol, split) for column in (base, other)]
        names = list(of_each[0])
        drawn = bootstrap(torch.stack([h[n] for h in of_each for n in names], 1), resamples, generator)
        for side, values in zip(sides, drawn.split(len(names), 1), strict=True):
            side[split] = dict(zip(names, values.T.tolist(), strict=True))
    before, after = (_summaries(benchmark, side, resamples) for side in sides)
    tail = (1 - confidence) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    return {name: tuple((after[name] - before[name]).quantile(ends).tolist()) for name in before}


def _summaries(benchmark: Benchmark, side: dict[str, dict[str, list[float]]], resamples: int) -> dict[str, Tensor]:
    """Metric -> its value in each resample (resamples,), from the recalls of the splits."""
    rows = [
        benchmark.summary({split: {name: values[row] for name, values in of.items()} for split, of in side.items()})
        for row in range(resamples)
    ]
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]}


def bootstrap(hits: Tensor, resamples: int, generator: torch.Generator) -> Tensor:
    """Percentages of hits in resamples of the queries, drawn with replacement (Efron 1979); queries are rows.

    Several systems' hits beside each other are resampled together, so that differences between columns are paired.

    Args:
        hits: (Q, M), 0 to 1.

    Returns:
        (resamples, M)
    """
    queries, rows = len(hits), []
    for chunk in torch.arange(resamples).split(500):
        drawn = torch.randint(queries, (len(chunk), queries), generator=generator)
        counts = torch.zeros(len(chunk), queries).scatter_add_(1, drawn, torch.ones(drawn.shape))
        rows.append(100 * (counts @ hits.float()) / queries)
    return torch.cat(rows)
