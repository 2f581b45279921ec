"""Results side by side: methods with their seeds, whether they compare, and how sure their differences are."""

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
BY_QUERY = "query"  # of --resample-by: each query is drawn by itself
# Split's name -> score -> what each query adds to it (Q,), see `Benchmark.hits`; (Q, S) of a score of S seeds.
Hits = Mapping[str, "Mapping[str, np.ndarray]"]
Clusters = Mapping[str, "np.ndarray"]  # split's name -> the number of each query's cluster, (Q,)
Resamples = dict[str, "Tensor"]  # metric or score -> its value in each resample, (resamples,)


@dataclass(frozen=True, kw_only=True)
class Resampling:
    """Settings of the confidence intervals, see `bootstrap`.

    Attributes:
        by: what queries that are drawn together share: reference, target, a column of own triplets; or `BY_QUERY`.
    """

    resamples: int
    confidence: float
    seed: int
    by: str = "reference"

    def clusters(self, columns: Mapping[str, Mapping[str, Sequence[int]]]) -> Clusters:
        """Number the cluster of each query of some splits.

        Args:
            columns: split's name -> its `Split.clusters`.

        Raises:
            UserError: a split has no such column.
        """
        import numpy as np

        clusters = {}
        for split, own in columns.items():
            if self.by != BY_QUERY and self.by not in own:
                raise UserError(
                    f"--resample-by {self.by}: not a column that all queries of {split} have: choose from "
                    f"{', '.join([BY_QUERY, *own])}"
                )
            queries = len(next(iter(own.values())))
            clusters[split] = np.array(own.get(self.by, range(queries)))
        return clusters

    def told(self, clusters: Clusters) -> str:
        """Say by what resamples are drawn, and how many clusters there are of it."""
        numbers = [f"{split} has {len(set(own.tolist()))}" for split, own in clusters.items()]
        return f"{100 * self.confidence:g}% intervals, resampled by {self.by}: {', '.join(numbers)}"


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
        """Check whether all results were measured under a protocol."""
        return all(protocol in result["protocols"] for result in self.results)

    def values(self, protocol: str, metric: str) -> list[float]:
        """A metric of each seed."""
        return [result["protocols"][protocol]["metrics"][metric] for result in self.results]

    def mean(self, protocol: str, metric: str) -> float:
        """Average a metric over the seeds."""
        return statistics.fmean(self.values(protocol, metric))

    def conditions(self, protocol: str) -> dict[str, Any]:
        """Return the conditions besides the protocol that must be equal to compare numbers; None where seeds differ."""
        first, *others = [_conditions(result, protocol) for result in self.results]
        shared = {}
        for name, value in first.items():
            shared[name] = value if all(other[name] == value for other in others) else None
        return shared

    @property
    def trained_elsewhere(self) -> dict[str, str]:
        """Return the parts that were trained on another benchmark than they are measured on, with its name."""
        parts: dict[str, str] = {}
        for result in self.results:
            parts.update(trained_on(result["training"]))
        measured_on = self.results[0]["dataset"]
        return {kind: dataset for kind, dataset in parts.items() if dataset != measured_on}

    def hits(self, benchmark: Benchmark, protocol: str) -> Hits:
        """Return what each query adds to a score, the mean over the seeds; of each seed, if the score is no mean."""
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
        """Number the cluster of each query, see `Resampling.clusters`."""
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
                f"{place} has no seed_*.json: pass the folder of a training run with --seeds and --save-training, or "
                "files"
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
                f"{first['split']}: compare results of one split"
            )
        key = _method(result) or f"file {number}"
        if key in columns and _seeds(result) in map(_seeds, columns[key].results):
            key = f"file {number}"  # the same seed again is no other seed
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
    """The seeds of the training runs that a result is of: "clip" and "combiner" -> its own."""
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
    """Return the settings that results of several seeds share: the training of CLIP and Combiner without the seeds.

    None where the checkpoint that learned last does not tell. A CLIP that does not tell is itself what they share.
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

    The CLIP weights under a Combiner have a seed of their own.
    """
    not_the_method = {*FREE_FLAGS, "seed", "seeds", "verify"}
    flags = {name: value for name, value in settings.flags.items() if name not in not_the_method}
    return {
        **named({**flags, **settings.preprocessing}),
        "data": settings.data.get("data_sha256"),
        "versions": settings.versions,
    }


def unlike(base: Column, other: Column, protocol: str) -> list[str]:
    """Return why the numbers of two columns under a protocol cannot be compared; nothing if they can."""
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

    Every cluster of queries is drawn for both columns at once (paired bootstrap), within its split. Several seeds count
    as the mean of their hits: the interval is about other queries, not about other seeds.
    """
    methods = [column.hits(benchmark, protocol) for column in (base, other)]
    clusters = base.clusters(resampling)
    before, after = resampled_metrics(benchmark, methods, clusters, resampling=resampling)
    differences = {metric: after[metric] - values for metric, values in before.items()}
    return bounds(differences, resampling.confidence)


def resampled_metrics(
    benchmark: Benchmark, methods: Sequence[Hits], clusters: Clusters, *, resampling: Resampling
) -> list[Resamples]:
    """Return the metrics of some methods over resamples, which are the same for all of them."""
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
    """Return metric -> the quantiles between which a share of its values lies.

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


def bootstrap(
    hits: "Tensor",
    clusters: "Tensor",
    resamples: int,
    *,
    generator: "Generator",
    statistics: "Sequence[Statistic | None]" = (),
) -> "Tensor":
    """Draw clusters of queries with replacement, as many as there are, and score each resample.

    A cluster comes with all of its queries (Field and Welsh 2007, JRSS B 69); where each query is its own, this is
    Efron's bootstrap (1979). Several systems' hits in columns are resampled together, so that their differences are
    paired.

    Args:
        hits: (Q, M), 0 to 1, or NaN of a query that does not count.
        clusters: (Q,), equal numbers of queries that are drawn together.
        statistics: of each column; None, and of all where there are none, of a mean in percent.

    Returns:
        (resamples, M), NaN of a resample in which no query counts.
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
