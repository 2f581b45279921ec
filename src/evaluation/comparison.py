"""Compare results: methods with their seeds, whether they are comparable, and intervals of their differences."""

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import Benchmark
from benchmarks.metrics import Statistic, shown
from evaluation.result_file import Result, read_result, stored_ranks
from models.configuration import Settings, trained_on
from runtime.choices import named
from settings.groups import FREE_FLAGS
from utils import UserError, format_metric

if TYPE_CHECKING:
    import numpy as np
    from torch import Generator, Tensor

RESAMPLED_AT_ONCE = 500
BY_QUERY = "query"  # a value of --resample-by: each query is drawn by itself
# Split's name -> score -> each query's contribution to it (Q,), see `Benchmark.hits`; (Q, S) for S seeds.
Hits = Mapping[str, "Mapping[str, np.ndarray]"]
Clusters = Mapping[str, "np.ndarray"]  # split's name -> cluster of each query (Q,)
Resamples = dict[str, "Tensor"]  # metric or score -> its value in each resample, (resamples,)


@dataclass(frozen=True, kw_only=True)
class Resampling:
    """Settings of the confidence intervals, see `bootstrap`.

    Attributes:
        by: property shared by the queries that are drawn together: reference, target, or a column of own triplets.
            `BY_QUERY` draws each query by itself.
    """

    resamples: int
    confidence: float
    seed: int
    by: str = "reference"

    def clusters(self, columns: Mapping[str, Mapping[str, Sequence[int]]]) -> Clusters:
        """Return the cluster of each query of some splits, as a number.

        Args:
            columns: split's name -> its `Split.clusters`.

        Raises:
            UserError: a split does not have the column `by`.
        """
        import numpy as np

        clusters = {}
        for split, own in columns.items():
            if self.by != BY_QUERY and self.by not in own:
                raise UserError(
                    f"--resample-by {self.by}: not every query of {split} has this column: choose from "
                    f"{', '.join([BY_QUERY, *own])}"
                )
            queries = len(next(iter(own.values())))
            clusters[split] = np.array(own.get(self.by, range(queries)))
        return clusters

    def told(self, clusters: Clusters) -> str:
        """Describe the intervals: their confidence, the column that defines clusters, and the number of clusters."""
        numbers = [f"{split} has {len(set(own.tolist()))}" for split, own in clusters.items()]
        return f"{100 * self.confidence:g}% intervals, resampled by {self.by}: {', '.join(numbers)}"


@dataclass(frozen=True)
class Column:
    """One method: a result, or the results of several seeds."""

    label: str
    results: list[Result]

    @property
    def protocols(self) -> list[str]:
        """Return the protocols of the first result."""
        return list(self.results[0]["protocols"])

    def has(self, protocol: str) -> bool:
        """Check whether all results include a protocol."""
        return all(protocol in result["protocols"] for result in self.results)

    def values(self, protocol: str, metric: str) -> list[float]:
        """Return the value of a metric for each seed."""
        return [result["protocols"][protocol]["metrics"][metric] for result in self.results]

    def mean(self, protocol: str, metric: str) -> float:
        """Average a metric over the seeds."""
        return statistics.fmean(self.values(protocol, metric))

    def conditions(self, protocol: str) -> dict[str, Any]:
        """Return the conditions that comparable results share, besides the protocol; None if they differ by seed."""
        first, *others = [_conditions(result, protocol) for result in self.results]
        shared = {}
        for name, value in first.items():
            shared[name] = value if all(other[name] == value for other in others) else None
        return shared

    @property
    def trained_elsewhere(self) -> dict[str, str]:
        """Return the parts that were trained on a benchmark other than the evaluated one: part -> its benchmark."""
        parts: dict[str, str] = {}
        for result in self.results:
            parts.update(trained_on(result["training"]))
        measured_on = self.results[0]["dataset"]
        return {kind: dataset for kind, dataset in parts.items() if dataset != measured_on}

    def hits(self, benchmark: Benchmark, protocol: str) -> Hits:
        """Return each query's contribution to each score, averaged over the seeds.

        Contributions to a score that is not a mean are not averaged, but listed for each seed.
        """
        import numpy as np

        hits: dict[str, dict[str, np.ndarray]] = {}
        for split in self.results[0]["queries_sha256"]:
            of_seeds = []
            for result in self.results:
                of_seeds.append(benchmark.hits(stored_ranks(result, protocol, split)))
            hits[split] = {}
            for score in of_seeds[0]:
                columns = [of_seed[score] for of_seed in of_seeds]
                if score not in benchmark.statistics:
                    columns = [np.mean(columns, axis=0)]
                hits[split][score] = np.stack(columns, axis=1)
        return hits

    def clusters(self, resampling: Resampling) -> Clusters:
        """Return the cluster of each query, see `Resampling.clusters`."""
        return resampling.clusters(self.results[0]["clusters"])


def _conditions(result: Result, protocol: str) -> dict[str, Any]:
    measured = result["protocols"][protocol]
    return {
        "queries": [result["queries_sha256"], measured["queries"]],
        "text templates": measured["template"],
        "lists of queries": (result["query_list"] or {"sha256": "all"})["sha256"],
        "galleries": measured["gallery_images"],
        "exclusions": result["excluded_images"],
        "image files": result["images_sha256"],
    }


def result_files(places: Sequence[Path]) -> list[Path]:
    """Return files of results. A folder stands for the results of a training run with several seeds in it.

    Raises:
        UserError: a folder contains no results.
    """
    files = []
    for place in places:
        found = [place]
        if place.is_dir():
            found = sorted(place.glob("seed_*.json"), key=lambda file: (len(file.name), file.name))
        if not found:
            raise UserError(
                f"{place} contains no seed_*.json: pass the folder of a training run with --seeds and "
                "--save-training, or files"
            )
        files += found
    return files


def read_columns(files: list[Path]) -> list[Column]:
    """Read results as columns, in the order of the files; results of one method with different seeds share a column.

    Raises:
        UserError: a file is not a result, or the results have different datasets or splits.
    """
    columns: dict[str, Column] = {}
    first = None
    for number, (file, label) in enumerate(zip(files, labels(files), strict=True)):
        result = read_result(file)
        first = first or result
        if (result["dataset"], result["split"]) != (first["dataset"], first["split"]):
            raise UserError(
                f"{file} has results for {result['dataset']} {result['split']}, but {files[0]} for "
                f"{first['dataset']} {first['split']}: compare results for the same split"
            )
        key = _method(result) or f"file {number}"
        if key in columns and _seeds(result) in map(_seeds, columns[key].results):
            key = f"file {number}"  # a repeated seed gets a column of its own
        columns.setdefault(key, Column(label, [])).results.append(result)
    return list(columns.values())


def labels(files: Sequence[Path]) -> list[str]:
    """Return the label of each file: its stem, its path if others have the same stem, a number if it is repeated."""
    stems = Counter(file.stem for file in files)
    names: list[str] = []
    for number, file in enumerate(files, start=1):
        name = file.stem if stems[file.stem] == 1 else str(file.with_suffix(""))
        names.append(f"{name} ({number})" if name in names else name)
    return names


def _seeds(result: Result) -> dict[str, Any]:
    """Return the seeds of the training runs behind a result, by part: "clip" and "combiner"."""
    configs = result["training"].items()
    return {kind: Settings.read(config).table.get("seed") for kind, config in configs}


def by_both_seeds(column: Column, protocol: str, metric: str) -> dict[str, dict[str, str]]:
    """Tabulate a metric by the seeds of stage 1 (rows) and of stage 2 (columns), with means and deviations.

    The last cell of the last row is computed from the means of the rows: its deviation is due to stage 1 alone. The
    table is {} unless both stages have several seeds.
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
    """Return the settings shared by results that differ only in seeds: CLIP's and the Combiner's training settings.

    Return None if the checkpoint that was trained last does not record them. A CLIP that does not record them is
    identified by its weights.
    """
    training = {kind: Settings.read(config) for kind, config in result["training"].items()}
    learned_last = training.get("combiner", training.get("clip"))
    if learned_last is None or "seed" not in learned_last.flags:
        return None
    methods = {kind: _without_seed(settings) for kind, settings in training.items()}
    clip_tells = "clip" in training and "seed" in training["clip"].flags
    clip_weights = None if clip_tells else result["weights_sha256"]["clip"]
    shared = [result[name] for name in ("combining_function", "preprocessing", "encode_precision")]
    return json.dumps([methods, *shared, clip_weights], sort_keys=True)


def _without_seed(settings: Settings) -> dict[str, Any]:
    """Return the settings of a training run that change its numbers, without the seed.

    The path of the CLIP weights under a Combiner is left out, too, because it depends on the seed of stage 1.
    """
    not_the_method = {*FREE_FLAGS, "seed", "seeds", "verify"}
    flags = {name: value for name, value in settings.flags.items() if name not in not_the_method}
    return {
        **named({**flags, **settings.preprocessing}),
        "data": settings.data.get("data_sha256"),
        "versions": settings.versions,
    }


def unlike(base: Column, other: Column, protocol: str) -> list[str]:
    """Return the conditions that differ between two columns under a protocol, and so prevent a fair comparison."""
    ours = base.conditions(protocol)
    theirs = other.conditions(protocol)
    return [name for name, value in theirs.items() if value is None or value != ours[name]]


def with_interval(value: float, interval: tuple[float, float], sign: str = "") -> str:
    """Format a number with its bounds, as tables show it."""
    low, high = (format_metric(end, sign) for end in interval)
    return f"{format_metric(value, sign)} [{low}, {high}]"


def intervals(
    benchmark: Benchmark, base: Column, other: Column, *, protocol: str, resampling: Resampling
) -> dict[str, tuple[float, float]]:
    """Return metric -> bounds of the difference other - base.

    Clusters of queries are drawn for both columns together (paired bootstrap), within each split. Several seeds count
    as the mean of their hits: the interval reflects the choice of queries, not of seeds.
    """
    methods = [column.hits(benchmark, protocol) for column in (base, other)]
    clusters = base.clusters(resampling)
    before, after = resampled_metrics(benchmark, methods, clusters, resampling=resampling)
    differences = {metric: after[metric] - values for metric, values in before.items()}
    return bounds(differences, resampling.confidence)


def resampled_metrics(
    benchmark: Benchmark, methods: Sequence[Hits], clusters: Clusters, *, resampling: Resampling
) -> list[Resamples]:
    """Return the metrics of some methods in each resample; all methods share the resamples."""
    import torch

    generator = torch.Generator().manual_seed(resampling.seed)
    scores: list[dict[str, Resamples]] = [{} for _ in methods]
    for split, own_clusters in clusters.items():
        columns = []
        kinds: list[Statistic | None] = []
        for method in methods:
            for score, values in method[split].items():
                columns.append(torch.from_numpy(values).reshape(len(values), -1))
                kinds += [benchmark.statistics.get(score)] * columns[-1].shape[1]
        drawn = bootstrap(
            torch.cat(columns, 1),
            torch.from_numpy(own_clusters),
            resampling.resamples,
            generator=generator,
            statistics=kinds,
        )
        parts = iter(drawn.split([column.shape[1] for column in columns], dim=1))
        for method, of_splits in zip(methods, scores, strict=True):
            of_splits[split] = {score: next(parts).mean(1) for score in method[split]}
    return [_summaries(benchmark, of_splits) for of_splits in scores]


def _summaries(benchmark: Benchmark, splits: Mapping[str, Resamples]) -> Resamples:
    """Return the metrics of each resample, from the scores of the splits."""
    import torch

    drawn = {}
    for split, scores in splits.items():
        rows = zip(*(values.tolist() for values in scores.values()), strict=True)
        drawn[split] = [dict(zip(scores, row, strict=True)) for row in rows]
    metrics: dict[str, list[float]] = {}
    for of_splits in zip(*drawn.values(), strict=True):
        for metric, value in benchmark.summary(dict(zip(drawn, of_splits, strict=True))).items():
            metrics.setdefault(metric, []).append(value)
    return {metric: torch.tensor(values, dtype=torch.float64) for metric, values in metrics.items()}


def bounds(resampled: Resamples, confidence: float) -> dict[str, tuple[float, float]]:
    """Return metric -> the quantiles that enclose the central fraction `confidence` of its values.

    A resample may contain no query of a rare kind; its metrics for this kind are left out. A metric for which no query
    counts has no bounds.
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


def bootstrap(
    hits: "Tensor",
    clusters: "Tensor",
    resamples: int,
    *,
    generator: "Generator",
    statistics: "Sequence[Statistic | None]" = (),
) -> "Tensor":
    """Draw as many clusters of queries as there are, with replacement, and score each resample.

    A drawn cluster contributes all of its queries (Field and Welsh 2007, JRSS B 69); if each query is its own cluster,
    this is Efron's bootstrap (1979). Several systems' hits in columns are resampled together, so that their differences
    are paired.

    Args:
        hits: (Q, M), 0 to 1, NaN for a query that does not count.
        clusters: (Q,), equal numbers for queries that are drawn together.
        statistics: the statistic of each column, None for the mean in percent; empty if all are means.

    Returns:
        (resamples, M), NaN for a resample in which no query counts.
    """
    import torch

    names, clusters = clusters.unique(return_inverse=True)
    number = len(names)
    counted = torch.zeros(number, hits.shape[1]).index_add_(0, clusters, (~hits.isnan()).float())
    sums = torch.zeros(number, hits.shape[1]).index_add_(0, clusters, hits.nan_to_num().float())
    others = [(m, statistic) for m, statistic in enumerate(statistics) if statistic]
    scores = []
    for chunk in torch.arange(resamples).split(RESAMPLED_AT_ONCE):
        drawn = torch.randint(number, (len(chunk), number), generator=generator)
        times = torch.zeros(len(chunk), number).scatter_add_(1, drawn, torch.ones(drawn.shape))
        scores.append(100 * (times @ sums) / (times @ counted))
        for column, statistic in others:
            for row, own in enumerate(times[:, clusters].long()):
                resample = hits[:, column].repeat_interleave(own)
                scores[-1][row, column] = statistic(resample.numpy())
    return torch.cat(scores)
