"""Audit a benchmark: find the queries that image or text alone solve, and measure the queries that need both.

After the audit of Attimonelli et al. 2026 (arXiv 2605.14787), which found that one modality alone solves most queries
of some benchmarks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks import Benchmark, Split
from benchmarks.metrics import Ranks
from benchmarks.ranking import Ranking
from evaluation.comparison import (
    Clusters,
    Hits,
    Resampling,
    bootstrap,
    bounds,
    resampled_metrics,
)
from utils import UserError

ALONE = ("image", "text")  # combining functions that use one modality


def solving(benchmark: Benchmark, k: int) -> str:
    """Return the name of the recall by which a query counts as solved.

    Raises:
        UserError: the benchmark has no recall at k.
    """
    one = np.zeros(1, dtype=int)
    known = _recalls(benchmark.hits(Ranks(one, in_group=one)))
    wanted = f"recall_at{k}"
    if wanted not in known:
        raise UserError(
            f"--k {k}: {benchmark.name} has no {wanted}: choose from {', '.join(known)}"
        )
    return wanted


def _recalls(of_split: Mapping[str, np.ndarray]) -> list[str]:
    """Return the names of the scores that are binary for every query.

    This excludes precisions, and recalls that skip some queries.
    """
    return [name for name, values in of_split.items() if values.dtype == bool]


def hits_of(benchmark: Benchmark, splits: Sequence[Split], rankings: Mapping[str, Ranking]) -> Hits:
    """Return the hits of each split's queries."""
    return {split.name: benchmark.hits(rankings[split.name].ranks_in(split)) for split in splits}


def names_of(splits: Sequence[Split], chosen: Mapping[str, np.ndarray]) -> list[str]:
    """Return the names of the chosen queries, in the order of the splits.

    Args:
        chosen: split's name -> whether each query is chosen, (Q,) bool.
    """
    names = []
    for split in splits:
        own = zip(split.query_names, chosen[split.name], strict=True)
        names += [name for name, is_chosen in own if is_chosen]
    return names


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Hits of a benchmark's queries under one protocol, for each combining function.

    Attributes:
        hits: combining function -> its hits; the hits of a recall are booleans.
        clusters: the cluster of each query, for resampling.
    """

    benchmark: Benchmark
    hits: Mapping[str, Hits]
    clusters: Clusters
    resampling: Resampling

    def need_both(self, recall: str) -> dict[str, np.ndarray]:
        """Find the queries that neither image nor text alone solves: split's name -> (Q,) bool.

        Args:
            recall: the recall by which a query counts as solved, such as recall_at10.
        """
        image, text = (self.hits[function] for function in ALONE)
        return {split: ~(image[split][recall] | text[split][recall]) for split in image}

    def solved(self, recall: str) -> dict[str, Any]:
        """Count the queries of all splits that each combining function solves, and measure the gain of composition.

        The composition gap of a function that composes is its recall minus the higher recall of image and text alone,
        in percentage points. All functions are resampled together and within their splits, so that differences are
        paired.

        Returns:
            "solved": function, or "either alone" -> number of queries, their percentage and its interval.
            "gap": function that composes -> percentage points and their interval.
        """
        solvers = {}
        for function, of_function in self.hits.items():
            solvers[function] = {split: own[recall] for split, own in of_function.items()}
        neither = self.need_both(recall)
        solvers["either alone"] = {split: ~own for split, own in neither.items()}
        queries = sum(map(len, neither.values()))
        drawn = self._resampled_shares(solvers)
        shares = {}
        table = {}
        for name, interval in bounds(drawn, self.resampling.confidence).items():
            number = sum(int(own.sum()) for own in solvers[name].values())
            shares[name] = 100 * number / queries
            table[name] = {"queries": number, "value": shares[name], "interval": interval}
        best_drawn = torch.maximum(*(drawn[function] for function in ALONE))
        best = max(shares[function] for function in ALONE)
        gaps = {name: drawn[name] - best_drawn for name in self.hits if name not in ALONE}
        gap = {}
        for name, interval in bounds(gaps, self.resampling.confidence).items():
            gap[name] = {"value": shares[name] - best, "interval": interval}
        return {"solved": table, "gap": gap}

    def _resampled_shares(
        self, solvers: Mapping[str, Mapping[str, np.ndarray]]
    ) -> dict[str, torch.Tensor]:
        """Return the percentage of all queries that each solver solves, in each resample: solver -> (resamples,).

        Args:
            solvers: name -> split's name -> whether it solves each query, (Q,) bool.
        """
        generator = torch.Generator().manual_seed(self.resampling.seed)
        weighed = []
        queries = 0
        for split, own in self.clusters.items():
            solves = torch.from_numpy(np.stack([found[split] for found in solvers.values()], 1))
            drawn = bootstrap(
                solves, torch.from_numpy(own), self.resampling.resamples, generator=generator
            )
            weighed.append(len(own) * drawn)
            queries += len(own)
        shares = torch.stack(weighed).sum(0) / queries
        return dict(zip(solvers, shares.unbind(1), strict=True))

    def metrics_on(self, chosen: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
        """Return metrics on chosen queries: function -> metric -> value and interval.

        The result is {} if a split has no chosen query. A metric of one kind of query is left out if no chosen query
        has this kind.

        Args:
            chosen: split's name -> whether each query is chosen, (Q,) bool.
        """
        if not all(own.any() for own in chosen.values()):
            return {}
        clusters = {split: own[chosen[split]] for split, own in self.clusters.items()}
        kept = []
        for of_function in self.hits.values():
            of_chosen = {}
            for split, of_split in of_function.items():
                of_chosen[split] = {name: own[chosen[split]] for name, own in of_split.items()}
            kept.append(of_chosen)
        resampled = resampled_metrics(self.benchmark, kept, clusters, resampling=self.resampling)
        metrics: dict[str, dict[str, Any]] = {}
        for function, hits, drawn in zip(self.hits, kept, resampled, strict=True):
            scores = {split: self.benchmark.scores(own) for split, own in hits.items()}
            intervals = bounds(drawn, self.resampling.confidence)
            metrics[function] = {}
            for name, value in self.benchmark.summary(scores).items():
                metrics[function][name] = {"value": value, "interval": intervals[name]}
        return metrics

    def numbers(self, recall: str) -> dict[str, Any]:
        """Return all numbers of the audit in plain types.

        Args:
            recall: the recall by which a query counts as solved.
        """
        chosen = self.need_both(recall)
        first_split = next(iter(self.hits["sum"].values()))
        return {
            "queries": {split: len(own) for split, own in chosen.items()},
            "solved_by": recall,
            "need_both": {split: int(own.sum()) for split, own in chosen.items()},
            "recalls": {name: self.solved(name) for name in _recalls(first_split)},
            "metrics_where_both_are_needed": self.metrics_on(chosen),
            "resampled_by": self.resampling.by,
            "clusters": {split: len(np.unique(own)) for split, own in self.clusters.items()},
        }
