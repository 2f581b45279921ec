"""What composition adds: which queries image or text alone solve, and how well those are solved that need both.

After the audit of Attimonelli et al. 2026 (arXiv 2605.14787), by whom most queries of some benchmarks are solved by one
modality alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import Benchmark, Split
from benchmarks.metrics import Ranks
from benchmarks.ranking import Ranking
from evaluation.comparison import Resampling, bootstrap, bounds, intervals_of
from utils import UserError

ALONE = ("image", "text")  # combining functions of one modality
# Split's name -> score -> what each query adds to it (Q,), see `Benchmark.hits`; of a recall it is true or false.
Hits = dict[str, dict[str, np.ndarray]]


def solving(benchmark: Benchmark, k: int) -> str:
    """The recall by which a query is solved.

    Raises:
        UserError: the benchmark has none at k.
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
    """The scores that a query counts for or not: no precisions, and none that some queries do not count for."""
    return [name for name, values in of_split.items() if values.dtype == bool]


def hits_of(benchmark: Benchmark, splits: Sequence[Split], rankings: Mapping[str, Ranking]) -> Hits:
    """The hits of each split's queries."""
    return {split.name: benchmark.hits(rankings[split.name].ranks_in(split)) for split in splits}


def need_both(hits: Mapping[str, Hits], recall: str) -> dict[str, np.ndarray]:
    """Split's name -> which queries neither image nor text alone solves, (Q,) bool.

    Args:
        hits: combining function -> its hits.
        recall: what solving means, such as recall_at10.
    """
    image, text = (hits[function] for function in ALONE)
    return {split: ~(image[split][recall] | text[split][recall]) for split in image}


def names_of(splits: Sequence[Split], chosen: Mapping[str, np.ndarray]) -> list[str]:
    """The names of some queries, in the order of the splits.

    Args:
        chosen: split's name -> which of its queries, (Q,) bool.
    """
    names = []
    for split in splits:
        own = zip(split.query_names, chosen[split.name], strict=True)
        names += [name for name, is_chosen in own if is_chosen]
    return names


def solved(hits: Mapping[str, Hits], recall: str, resampling: Resampling) -> dict[str, Any]:
    """How many queries of all splits each combining function solves, what needs both, and what composition adds.

    The composition gap of a function that composes is its recall less that of the better of image and text alone, in
    points. All are resampled together and within their splits, so that differences are paired.

    Returns:
        "solved": function, or "either alone" -> number of queries, their percentage and its interval.
        "gap": function that composes -> points and their interval.
    """
    neither = need_both(hits, recall)
    columns = {}
    for function, of_function in hits.items():
        columns[function] = {split: of_function[split][recall] for split in neither}
    columns["either alone"] = {split: ~own for split, own in neither.items()}
    drawn = dict(zip(columns, _resampled(columns, resampling).unbind(1), strict=True))
    queries = sum(map(len, neither.values()))
    table = {}
    recalls = {}
    for name, interval in bounds(drawn, resampling.confidence).items():
        number = sum(int(own.sum()) for own in columns[name].values())
        recalls[name] = 100 * number / queries
        table[name] = {"queries": number, "value": recalls[name], "interval": interval}
    composed = [function for function in hits if function not in ALONE]
    best_drawn = torch.maximum(*(drawn[function] for function in ALONE))
    best = max(recalls[function] for function in ALONE)
    gaps = bounds({name: drawn[name] - best_drawn for name in composed}, resampling.confidence)
    gap = {name: {"value": recalls[name] - best, "interval": gaps[name]} for name in composed}
    return {"solved": table, "gap": gap}


def _resampled(columns: Mapping[str, Mapping[str, np.ndarray]], resampling: Resampling) -> Tensor:
    """Percentages of all splits' queries together, (resamples, number of columns)."""
    generator = torch.Generator().manual_seed(resampling.seed)
    weighed = []
    queries = 0
    for split in next(iter(columns.values())):
        own = torch.stack([torch.from_numpy(column[split]) for column in columns.values()], 1)
        weighed.append(len(own) * bootstrap(own, resampling.resamples, generator))
        queries += len(own)
    return torch.stack(weighed).sum(0) / queries


def metrics_on(
    benchmark: Benchmark, hits: Hits, chosen: Mapping[str, np.ndarray], resampling: Resampling
) -> dict[str, dict[str, Any]]:
    """Metric -> its value on some queries alone, and its interval; nothing where a split has none of them.

    A metric of a kind of query that none of them is of is left out.

    Args:
        chosen: split's name -> which of its queries, (Q,) bool.
    """
    if not all(own.any() for own in chosen.values()):
        return {}
    kept = {}
    for split, of_split in hits.items():
        kept[split] = {name: own[chosen[split]] for name, own in of_split.items()}
    scores = {split: benchmark.scores(of_split) for split, of_split in kept.items()}
    intervals = intervals_of(benchmark, kept, resampling=resampling)
    values = benchmark.summary(scores)
    return {name: {"value": values[name], "interval": intervals[name]} for name in values}


def audit(
    benchmark: Benchmark, hits: Mapping[str, Hits], recall: str, resampling: Resampling
) -> dict[str, Any]:
    """All numbers under one protocol, in plain types.

    Args:
        hits: combining function -> its hits.
        recall: by which queries need both.
    """
    chosen = need_both(hits, recall)
    recalls = _recalls(next(iter(hits["sum"].values())))
    on_those = {}
    for function, of_function in hits.items():
        on_those[function] = metrics_on(benchmark, of_function, chosen, resampling)
    return {
        "queries": {split: len(own) for split, own in chosen.items()},
        "solved_by": recall,
        "need_both": {split: int(own.sum()) for split, own in chosen.items()},
        "recalls": {name: solved(hits, name, resampling) for name in recalls},
        "metrics_where_both_are_needed": on_those,
    }
