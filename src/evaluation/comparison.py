"""Results side by side: methods with their seeds, whether they compare, and how sure their differences are."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import Benchmark
from benchmarks.metrics import Statistic, shown
from evaluation.result_file import Result, composed_by, read_result, stored_ranks
from models.configuration import Settings, trained_on
from runtime.choices import named
from settings.groups import FREE_FLAGS
from utils import UserError, format_metric

if TYPE_CHECKING:
    import numpy as np
    from torch import Generator, Tensor

RESAMPLED_AT_ONCE = 500
Recalls = dict[str, "Tensor"]  # score -> its value in each resample, (resamples,)


@dataclass(frozen=True, kw_only=True)
class Resampling:
    """How intervals are made, see `bootstrap`."""

    resamples: int
    confidence: float
    seed: int


@dataclass(frozen=True)
class Column:
    """One method: a result, or those of several seeds."""

    label: str
    results: list[Result]

    @property
    def protocols(self) -> list[str]:
        """The protocols of its first result."""
        return list(self.results[0]["protocols"])

    def has(self, protocol: str) -> bool:
        """Whether all of it was measured under a protocol."""
        return all(protocol in result["protocols"] for result in self.results)

    def values(self, protocol: str, metric: str) -> list[float]:
        """A metric of each seed."""
        return [result["protocols"][protocol]["metrics"][metric] for result in self.results]

    def conditions(self, protocol: str) -> dict[str, Any]:
        """What must be equal for numbers to compare beside the protocol; None where the seeds differ in it."""
        first, *others = [_conditions(result, protocol) for result in self.results]
        shared = {}
        for name, value in first.items():
            shared[name] = value if all(other[name] == value for other in others) else None
        return shared

    @property
    def trained_elsewhere(self) -> dict[str, str]:
        """What of it was trained on another benchmark than it is measured on, and on which."""
        parts: dict[str, str] = {}
        for result in self.results:
            parts.update(trained_on(result["training"]))
        measured_on = self.results[0]["dataset"]
        return {kind: dataset for kind, dataset in parts.items() if dataset != measured_on}

    def hits(self, benchmark: Benchmark, protocol: str, split: str) -> "dict[str, np.ndarray]":
        """Score -> what each query adds to it, see `Benchmark.hits`.

        Returns:
            (Q, 1), the mean over the seeds; (Q, number of seeds) of a score that is no mean.
        """
        import numpy as np

        of_seeds = []
        for result in self.results:
            of_seeds.append(benchmark.hits(stored_ranks(result, protocol, split)))
        hits = {}
        for score in of_seeds[0]:
            columns = [of_seed[score] for of_seed in of_seeds]
            if score not in benchmark.statistics:
                columns = [np.mean(columns, axis=0)]
            hits[score] = np.stack(columns, axis=1)
        return hits


def _conditions(result: Result, protocol: str) -> dict[str, Any]:
    measured = result["protocols"][protocol]
    return {
        "queries": [result["queries_sha256"], measured["queries"]],
        "text templates": measured.get("template", ""),
        "lists of queries": (result.get("query_list") or {}).get("sha256", "all"),
        "galleries": measured["gallery_images"],
        "exclusions": result["excluded_images"],
        "image files": result["images_sha256"],
    }


def result_files(places: Sequence[Path]) -> list[Path]:
    """Files of results; a folder stands for those that a training with several seeds wrote into it.

    Raises:
        UserError: a folder has none.
    """
    files = []
    for place in places:
        found = [place]
        if place.is_dir():
            found = sorted(place.glob("seed_*.json"), key=lambda file: (len(file.name), file.name))
        if not found:
            raise UserError(
                f"{place} has no seed_*.json: name the folder of a training with --seeds and --save-training, or files"
            )
        files += found
    return files


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
    stems = Counter(file.stem for file in files)
    names: list[str] = []
    for number, file in enumerate(files, start=1):
        name = file.stem if stems[file.stem] == 1 else str(file.with_suffix(""))
        names.append(f"{name} ({number})" if name in names else name)
    return names


def _seeds(result: Result) -> dict[str, Any]:
    """The seeds of the trainings that a result is of: "clip" and "combiner" -> its own."""
    configs = result["training"].items()
    return {kind: Settings.read(config).table.get("seed") for kind, config in configs}


def by_both_seeds(column: Column, protocol: str, metric: str) -> dict[str, dict[str, str]]:
    """A metric by the seeds of stage 1, rows, and of stage 2, with the mean and deviation of either.

    The last cell of the last row is of the rows' means: how far apart stage 1 alone makes them. {} where only one stage
    has several seeds.
    """
    import pandas as pd

    values: dict[tuple[Any, Any], float] = {}
    for result, value in zip(column.results, column.values(protocol, metric), strict=True):
        seeds = _seeds(result)
        values[seeds.get("clip"), seeds.get("combiner")] = value
    if any(len(set(seeds)) == 1 for seeds in zip(*values, strict=True)):
        return {}
    grid = pd.Series(values).unstack()
    table = grid.map(format_metric).where(grid.notna(), "")
    table.columns = [f"stage 2, seed {seed}" for seed in grid.columns]
    table.index = [f"stage 1, seed {seed}" for seed in grid.index]
    summary = "mean ± deviation"
    table[summary] = [shown(row.dropna().tolist()) for _, row in grid.iterrows()]
    of_columns = [shown(column.dropna().tolist()) for _, column in grid.items()]
    table.loc[summary] = [*of_columns, shown(grid.mean(axis=1).tolist())]
    return table.to_dict("index")


def _method(result: Result) -> str | None:
    """What the results of several seeds have in common: how CLIP and the Combiner were trained, but for the seeds.

    None where the checkpoint that learned last does not tell. A CLIP that does not tell is itself what they share.
    """
    training = {kind: Settings.read(config) for kind, config in result["training"].items()}
    learned_last = training.get("combiner", training.get("clip"))
    if learned_last is None or "seed" not in learned_last.flags:
        return None
    methods = {kind: _without_seed(settings) for kind, settings in training.items()}
    clip_tells = "clip" in training and "seed" in training["clip"].flags
    clip_weights = None if clip_tells else result["weights_sha256"]["clip"]
    # Results of earlier versions are all of fp32, and do not say so.
    precision = result.get("encode_precision", "fp32")
    told = [methods, composed_by(result), result["preprocessing"], precision, clip_weights]
    return json.dumps(told, sort_keys=True)


def _without_seed(settings: Settings) -> dict[str, Any]:
    """What a training computes beside its seed. The CLIP weights under a Combiner have a seed of their own."""
    not_the_method = {*FREE_FLAGS, "seed", "seeds", "verify"}
    flags = {name: value for name, value in settings.flags.items() if name not in not_the_method}
    return {
        **named({**flags, **settings.preprocessing}),
        "data": settings.data.get("data_sha256"),
        "versions": settings.versions,
    }


def unlike(base: Column, other: Column, protocol: str) -> list[str]:
    """What keeps the numbers of two columns under a protocol from comparing; nothing where they do."""
    ours = base.conditions(protocol)
    theirs = other.conditions(protocol)
    return [name for name, value in theirs.items() if value is None or value != ours[name]]


def intervals(
    benchmark: Benchmark,
    base: Column,
    other: Column,
    protocol: str,
    *,
    resampling: Resampling,
) -> dict[str, tuple[float, float]]:
    """Metric -> bounds of the difference other - base: quantiles over resamples of each split's queries.

    Every query is drawn for both columns at once (paired bootstrap), within its split. Several seeds count as the mean
    of their hits: the interval is about other queries, not about other seeds.
    """
    before: dict[str, Recalls] = {}
    after: dict[str, Recalls] = {}
    generator = _generator(resampling)
    for split in base.results[0]["queries_sha256"]:
        hits = [column.hits(benchmark, protocol, split) for column in (base, other)]
        before[split], after[split] = _drawn(benchmark, hits, resampling, generator)
    ours = _resampled_metrics(benchmark, before, resampling.resamples)
    theirs = _resampled_metrics(benchmark, after, resampling.resamples)
    differences = {metric: theirs[metric] - values for metric, values in ours.items()}
    return bounds(differences, resampling.confidence)


def own_intervals(
    benchmark: Benchmark,
    column: Column,
    protocol: str,
    *,
    resampling: Resampling,
) -> dict[str, tuple[float, float]]:
    """Metric -> bounds of its value, as `intervals` makes those of a difference."""
    hits = {}
    for split in column.results[0]["queries_sha256"]:
        hits[split] = column.hits(benchmark, protocol, split)
    return intervals_of(benchmark, hits, resampling=resampling)


def intervals_of(
    benchmark: Benchmark,
    hits: "Mapping[str, Mapping[str, np.ndarray]]",
    *,
    resampling: Resampling,
) -> dict[str, tuple[float, float]]:
    """Metric -> bounds of its value.

    Args:
        hits: split's name -> score -> what each query adds to it, (Q,), or of several seeds as `Column.hits` has it.
    """
    generator = _generator(resampling)
    resampled: dict[str, Recalls] = {}
    for split, of_split in hits.items():
        (resampled[split],) = _drawn(benchmark, [of_split], resampling, generator)
    metrics = _resampled_metrics(benchmark, resampled, resampling.resamples)
    return bounds(metrics, resampling.confidence)


def _generator(resampling: Resampling) -> "Generator":
    import torch

    return torch.Generator().manual_seed(resampling.seed)


def _drawn(
    benchmark: Benchmark,
    methods: "Sequence[Mapping[str, np.ndarray]]",
    resampling: Resampling,
    generator: "Generator",
) -> list[Recalls]:
    """The scores of a split over resamples of its queries, which are the same for several methods.

    Args:
        methods: the hits of each, see `Column.hits`.
    """
    import torch

    columns = []
    statistics: list[Statistic | None] = []
    for hits in methods:
        for score, values in hits.items():
            columns.append(torch.from_numpy(values).reshape(len(values), -1))
            statistics += [benchmark.statistics.get(score)] * columns[-1].shape[1]
    drawn = bootstrap(torch.cat(columns, 1), resampling.resamples, generator, statistics)
    parts = iter(drawn.split([column.shape[1] for column in columns], dim=1))
    return [{score: next(parts).mean(1) for score in hits} for hits in methods]


def with_interval(value: float, interval: tuple[float, float], sign: str = "") -> str:
    """A number with its bounds, as tables show it."""
    low, high = (format_metric(end, sign) for end in interval)
    return f"{format_metric(value, sign)} [{low}, {high}]"


def bounds(resampled: Recalls, confidence: float) -> dict[str, tuple[float, float]]:
    """Metric -> the quantiles between which a share of its values lies, (resamples,).

    Resamples without a query that counts are left out: of a rare kind of query there may be none. A metric that no
    query counts for has no bounds.
    """
    import torch

    tail = (1 - confidence) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    bounds = {}
    for metric, values in resampled.items():
        if not values.isnan().all():
            low, high = values.double().nanquantile(ends).tolist()
            bounds[metric] = (low, high)
    return bounds


def _resampled_metrics(
    benchmark: Benchmark, splits: Mapping[str, Recalls], resamples: int
) -> Recalls:
    """Metric -> its value in each resample (resamples,), from the recalls of the splits."""
    import torch

    lists = {}
    for split, recalls in splits.items():
        lists[split] = {recall: values.tolist() for recall, values in recalls.items()}
    metrics: dict[str, list[float]] = {}
    for number in range(resamples):
        scores = {}
        for split, recalls_of_split in lists.items():
            scores[split] = {recall: values[number] for recall, values in recalls_of_split.items()}
        for metric, value in benchmark.summary(scores).items():
            metrics.setdefault(metric, []).append(value)
    return {metric: torch.tensor(values, dtype=torch.float64) for metric, values in metrics.items()}


def bootstrap(
    hits: "Tensor",
    resamples: int,
    generator: "Generator",
    statistics: "Sequence[Statistic | None]" = (),
) -> "Tensor":
    """Scores over resamples of the queries, drawn with replacement (Efron 1979); queries are rows.

    Several systems' hits beside each other are resampled together, so that differences between columns are paired.

    Args:
        hits: (Q, M), 0 to 1, or NaN of a query that does not count.
        statistics: of each column; None, and of all where there are none, of a mean in percent.

    Returns:
        (resamples, M), NaN of a resample in which no query counts.
    """
    import torch

    queries = len(hits)
    counted = (~hits.isnan()).float()
    values = hits.nan_to_num().float()
    others = [(m, statistic) for m, statistic in enumerate(statistics) if statistic]
    scores = []
    for chunk in torch.arange(resamples).split(RESAMPLED_AT_ONCE):
        drawn = torch.randint(queries, (len(chunk), queries), generator=generator)
        counts = torch.zeros(len(chunk), queries).scatter_add_(1, drawn, torch.ones(drawn.shape))
        scores.append(100 * (counts @ values) / (counts @ counted))
        for column, statistic in others:
            of_column = [statistic(resample) for resample in hits[:, column][drawn].numpy()]
            scores[-1][:, column] = torch.tensor(of_column, dtype=torch.float64)
    return torch.cat(scores)
