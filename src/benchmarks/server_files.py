"""The files that test servers take: their content, the rules they must keep, their metrics where answers are known.

CIRR: two objects pair id -> ranked ids, one of the whole gallery and one of the query's group. FashionIQ: for each
category the list of captions with a ranking in each entry.
"""

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import annotations
from benchmarks.base import Benchmark
from benchmarks.cirr import CIRR
from benchmarks.fashioniq import FashionIQ
from benchmarks.ranking import Ranking, answers
from benchmarks.splits import Split, Triplet
from runtime.files import parse_json
from utils import UserError

Content = dict[str, Any] | list[Any]


class Form(ABC):
    """What a server takes for a split.

    Attributes:
        kind: the benchmark it is for.
        k, group_k: answers a query, in the gallery and in its group.

    Args:
        benchmark: without exclusions: files must keep the rules of the whole.
        split: as the benchmark calls it.
    """

    kind: type[Benchmark]
    k: int
    group_k: int

    def __init__(self, benchmark: Benchmark, split: str) -> None:
        self.benchmark, self.split = benchmark, split
        self.splits = {split.name: split for split in benchmark.read(split)}

    @abstractmethod
    def files(self, name: str, rankings: dict[str, tuple[Split, Ranking]]) -> dict[str, str]:
        """File name -> content, from each split as it was ranked.

        Args:
            name: of the submission.
        """

    @abstractmethod
    def violations(self, file: str, content: Content, size: int) -> list[str]:
        """Every rule that a file of that name, content and size in bytes breaks, each with its query."""

    @abstractmethod
    def metrics(self, contents: dict[str, Content]) -> dict[str, float]:
        """The metrics of files that keep the rules, by file name, for a split whose answers are known."""


class CirrForm(Form):
    """CIRR rc2: recall_submission_{name}.json and recall_subset_submission_{name}.json."""

    kind = CIRR
    lengths = {"recall": 50, "recall_subset": 3}
    k, group_k = lengths.values()
    version = "rc2"
    most_bytes = 5_000_000

    def files(self, name: str, rankings: dict[str, tuple[Split, Ranking]]) -> dict[str, str]:
        ((split, ranking),) = rankings.values()
        ids = [str(triplet.pair_id) for triplet in split.triplets]
        if len(set(ids)) != len(ids):
            raise UserError(f"the {split.name} captions repeat a pairid: download the official annotation file again")
        nearest = answers(split.names, ranking.nearest, ranking.similarities)
        in_group = answers(split.names, ranking.nearest_in_group, ranking.group_similarities)
        files = {}
        for metric, found in zip(self.lengths, (nearest, in_group), strict=True):
            ranked = {pair_id: [image for image, _ in row] for pair_id, row in zip(ids, found, strict=True)}
            content = {"version": self.version, "metric": metric} | ranked
            files[f"{metric}_submission_{name}.json"] = json.dumps(content, sort_keys=True)
        return files

    def violations(self, file: str, content: Content, size: int) -> list[str]:
        (split,) = self.splits.values()
        found = [f"the file has {size:,} bytes, more than {self.most_bytes:,}"] if size > self.most_bytes else []
        for key, allowed in (("version", [self.version]), ("metric", list(self.lengths))):
            if content.get(key) not in allowed:
                found.append(f'"{key}" is {json.dumps(content.get(key))[:80]}, not {" or ".join(allowed)}')
        queries = {str(triplet.pair_id): triplet for triplet in split.triplets}
        unknown = sorted(content.keys() - {"version", "metric"} - queries.keys())
        found += [f"pairid {key}: no query of {split.name}" for key in unknown]
        for key, triplet in queries.items():
            problems = self._problems(content[key], triplet, content.get("metric")) if key in content else ["missing"]
            found += [f"pairid {key}: {problem}" for problem in problems]
        return found

    def _problems(self, ids: Any, triplet: Triplet, metric: Any) -> list[str]:
        """What is wrong with the ids of one query."""
        (split,) = self.splits.values()
        if not _are_texts(ids):
            return ["not a list of image ids"]
        found = _foreign(ids, split)
        if metric in list(self.lengths):
            candidates = triplet.group if metric == "recall_subset" else split.names
            length = min(self.lengths[metric], len(candidates) - 1)  # all but the reference, where they are so few
            found += [f"{len(ids)} ids instead of {length}"] if len(ids) != length else []
        if triplet.reference in ids:
            found.append(f"its own reference {triplet.reference} is among the ids")
        if metric == "recall_subset":
            found += [f"{name} is not in the query's group" for name in ids if name not in triplet.group]
        return found

    def metrics(self, contents: dict[str, Content]) -> dict[str, float]:
        ((name, split),) = self.splits.items()
        ranks = {
            content["metric"]: listed_ranks([content[str(t.pair_id)] for t in split.triplets], split)
            for content in contents.values()
        }
        return self.benchmark.summary({name: self.benchmark.score(ranks["recall"], ranks["recall_subset"])})


class FashionIQForm(Form):
    """FashionIQ: {category}.{split}.pred.json."""

    kind = FashionIQ
    k, group_k = 50, 0

    def files(self, name: str, rankings: dict[str, tuple[Split, Ranking]]) -> dict[str, str]:
        files = {}
        for category, (split, ranking) in rankings.items():
            entries = annotations.read(self.benchmark.files(category, self.split)[0], list)
            found = answers(split.names, ranking.nearest, ranking.similarities)
            ranked = [e | {"ranking": [image for image, _ in row]} for e, row in zip(entries, found, strict=True)]
            files[f"{name}/{category}.{self.split}.pred.json"] = json.dumps(ranked)
        return files

    def violations(self, file: str, content: Content, size: int) -> list[str]:
        split = self.splits.get(self._category(file))
        if split is None:
            return [f"the file's name does not begin with a category, as {' or '.join(self.splits)}"]
        if len(content) != len(split.triplets):
            return [f"{len(content)} entries instead of {len(split.triplets)}"]
        found = []
        for place, (entry, triplet) in enumerate(zip(content, split.triplets, strict=True)):
            problems = self._problems(entry, triplet, split)
            found += [f"entry {place} (candidate {triplet.reference}): {problem}" for problem in problems]
        return found

    def _problems(self, entry: Any, triplet: Triplet, split: Split) -> list[str]:
        """What is wrong with one entry."""
        query = {"candidate": triplet.reference, "captions": list(triplet.captions)}
        if not isinstance(entry, dict) or any(entry.get(key) != value for key, value in query.items()):
            return ["not the entry that the captions file has in this place"]
        ids = entry.get("ranking")
        if not _are_texts(ids):
            return ['"ranking" is not a list of image ids']
        length = min(self.k, len(split.names))
        return _foreign(ids, split) + ([f"{len(ids)} ids, fewer than {length}"] if len(ids) < length else [])

    def metrics(self, contents: dict[str, Content]) -> dict[str, float]:
        scores = {}
        for file, content in contents.items():
            category = self._category(file)
            ranks = listed_ranks([entry["ranking"] for entry in content], self.splits[category])
            scores[category] = self.benchmark.score(ranks, None)
        return self.benchmark.summary(scores)

    def _category(self, file: str) -> str:
        return Path(file).name.split(".")[0]


def parse_submission(file: Path) -> Content:
    """The content of a submission file: an object for CIRR, a list for FashionIQ.

    Raises:
        UserError: there is no file, or it is no JSON of these kinds.
    """
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is no JSON file that can be read ({error}): write the submission again") from None
    if not isinstance(content, dict | list):
        raise UserError(f"{file} holds a {type(content).__name__}, neither an object (CIRR) nor a list (FashionIQ)")
    return content


def form_of(content: Content) -> type[Form]:
    """The form that a file's content has."""
    return CirrForm if isinstance(content, dict) else FashionIQForm


def listed_ranks(lists: Sequence[list[str]], split: Split) -> Tensor:
    """Ranks (Q,) of the targets in lists of ids; one that is not listed counts as the last of the gallery."""
    beyond = len(split.names)
    pairs = zip(lists, split.triplets, strict=True)
    return torch.tensor([ids.index(t.target) if t.target in ids else beyond for ids, t in pairs])


def _are_texts(ids: Any) -> bool:
    return isinstance(ids, list) and all(isinstance(name, str) for name in ids)


def _foreign(ids: list[str], split: Split) -> list[str]:
    """Ids that repeat or are not of the split; a path or an extension is named as what it is."""
    counts = Counter(ids)
    found = [f"{name} occurs {count} times" for name, count in counts.items() if count > 1]
    for name in counts:
        if name not in split.image_paths:
            bare = Path(name).stem
            hint = f": write {bare}, without path and extension" if bare in split.image_paths else ""
            found.append(f"{name} is no image of {split.name}{hint}")
    return found
