"""The files that test servers accept: their content, their rules, and their metrics if targets are known.

CIRR: two objects, pair id -> ranked ids, one for the whole gallery and one for the query's group. FashionIQ: for each
category, the list of captions with a ranking in each entry. CIRCO: one object, query id -> ranked ids.
"""

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from benchmarks.base import Benchmark
from benchmarks.circo import CIRCO
from benchmarks.cirr import CIRR
from benchmarks.fashioniq import FashionIQ
from benchmarks.metrics import NO_RANK, Ranks
from benchmarks.splits import Split, Triplet
from benchmarks.triplets import Triplets
from runtime.files import parse_json, read_json
from utils import UserError

ID_DIGITS = 12  # length of a COCO image's id in its file name
Content = TypeVar("Content", dict[str, Any], list[Any])  # parsed content of a file


@dataclass(frozen=True, kw_only=True)
class Answered:
    """The results of a split's queries: ids, the nearest first.

    Attributes:
        in_group: ids within each query's group; empty without groups.
    """

    split: Split
    nearest: list[list[str]]
    in_group: list[list[str]]


class ServerForm(ABC, Generic[Content]):
    """Format of the submission files that a server accepts for a split.

    Attributes:
        kind: the benchmark of the server.
        container: JSON type of a file, an object (dict) or a list.
        k, group_k: number of results per query, in the gallery and in its group.
        whose: end of the phrase "all rules" in messages, such as " of the server".
        slots: the slots of a submission, each of which one file fills, see `slot`.

    Args:
        benchmark: the benchmark without exclusions, because files must keep the rules for the complete split.
        split: the benchmark's name for the split.
    """

    kind: type[Benchmark]
    container: type = dict
    k: int
    group_k: int = 0
    whose: str = " of the server"
    slots: tuple[str, ...] = ("",)

    def __init__(self, benchmark: Benchmark, split: str) -> None:
        self.benchmark = benchmark
        self.split = split
        self.parts = {part.name: part for part in benchmark.read(split)}

    @property
    def whole(self) -> Split:
        """Return the split's only part."""
        (part,) = self.parts.values()
        return part

    @classmethod
    def fits(cls, content: dict[str, Any] | list[Any]) -> bool:
        """Check whether a file's content looks like this format."""
        return isinstance(content, cls.container)

    def slot(self, file: str, content: Content) -> str:
        """Return the slot that a file with this name and content fills, if it keeps the rules."""
        return ""

    @abstractmethod
    def files(self, name: str, answered: Sequence[Answered]) -> dict[str, str]:
        """Return file name -> content, from the results of each part of the split.

        Args:
            name: name of the submission.
        """

    @abstractmethod
    def violations(self, file: str, content: Content, size: int) -> list[str]:
        """Return every rule that a file with this name, content and size in bytes breaks, with the query."""

    @abstractmethod
    def metrics(self, contents: Mapping[str, Content]) -> dict[str, float]:
        """Return the metrics of files that keep the rules, for a split with known targets.

        Args:
            contents: file name -> content, with one file for each slot.
        """


class CirrForm(ServerForm[dict[str, Any]]):
    """CIRR rc2: recall_submission_{name}.json and recall_subset_submission_{name}.json."""

    kind = CIRR
    k = 50
    group_k = 3
    lengths = {"recall": k, "recall_subset": group_k}
    slots = ("recall", "recall_subset")
    version = "rc2"
    most_bytes = 5_000_000

    @classmethod
    def fits(cls, content: dict[str, Any] | list[Any]) -> bool:
        return isinstance(content, dict) and bool(content.keys() & {"version", "metric"})

    def slot(self, file: str, content: dict[str, Any]) -> str:
        return content["metric"]

    def files(self, name: str, answered: Sequence[Answered]) -> dict[str, str]:
        (answers,) = answered
        split = answers.split
        pair_ids = [str(triplet.pair_id) for triplet in split.triplets]
        files = {}
        for metric, ranked in (("recall", answers.nearest), ("recall_subset", answers.in_group)):
            content: dict[str, Any] = {"version": self.version, "metric": metric}
            content.update(zip(pair_ids, ranked, strict=True))
            files[f"{metric}_submission_{name}.json"] = json.dumps(content, sort_keys=True)
        return files

    def violations(self, file: str, content: dict[str, Any], size: int) -> list[str]:
        violations = []
        if size > self.most_bytes:
            violations.append(f"the file has {size:,} bytes, more than {self.most_bytes:,}")
        for key, allowed in (("version", [self.version]), ("metric", list(self.lengths))):
            if content.get(key) not in allowed:
                violations.append(
                    f'"{key}" is {json.dumps(content.get(key))[:80]}, not {" or ".join(allowed)}'
                )
        queries = {str(triplet.pair_id): triplet for triplet in self.whole.triplets}
        unknown = sorted(content.keys() - {"version", "metric"} - queries.keys())
        violations += [f"pairid {key}: not a query of {self.whole.name}" for key in unknown]
        for key, triplet in queries.items():
            problems = ["missing"]
            if key in content:
                problems = self._problems(content[key], triplet, content.get("metric"))
            violations += [f"pairid {key}: {problem}" for problem in problems]
        return violations

    def _problems(self, ids: Any, triplet: Triplet, metric: Any) -> list[str]:
        """Return the problems of the ids of one query."""
        if not _are_ids(ids):
            return ["not a list of image ids"]
        problems = _foreign(ids, self.whole)
        if metric in list(self.lengths):
            candidates = triplet.group if metric == "recall_subset" else self.whole.names
            all_but_the_reference = len(candidates) - 1
            length = min(self.lengths[metric], all_but_the_reference)
            if len(ids) != length:
                problems.append(f"{len(ids)} ids instead of {length}")
        if triplet.reference in ids:
            problems.append(f"the ids include its own reference {triplet.reference}")
        if metric == "recall_subset":
            problems += [
                f"{name} is not in the query's group" for name in ids if name not in triplet.group
            ]
        return problems

    def metrics(self, contents: Mapping[str, dict[str, Any]]) -> dict[str, float]:
        ranks = {}
        for content in contents.values():
            lists = [content[str(triplet.pair_id)] for triplet in self.whole.triplets]
            ranks[content["metric"]] = listed_ranks(lists, self.whole)
        in_group = ranks["recall_subset"].named
        recalls = self.benchmark.score(replace(ranks["recall"], in_group=in_group))
        return self.benchmark.summary({self.whole.name: recalls})


class FashionIQForm(ServerForm[list[Any]]):
    """FashionIQ: {category}.{split}.pred.json."""

    kind = FashionIQ
    container = list
    k = 50
    slots = FashionIQ.parts

    def slot(self, file: str, content: list[Any]) -> str:
        return _category(file)

    def files(self, name: str, answered: Sequence[Answered]) -> dict[str, str]:
        files = {}
        for answers in answered:
            category = answers.split.name
            captions_file, _ = self.benchmark.files(category, self.split)
            entries = read_json(captions_file)
            content = [
                {**entry, "ranking": ids}
                for entry, ids in zip(entries, answers.nearest, strict=True)
            ]
            files[f"{name}/{category}.{self.split}.pred.json"] = json.dumps(content)
        return files

    def violations(self, file: str, content: list[Any], size: int) -> list[str]:
        split = self.parts.get(_category(file))
        if split is None:
            return [f"the file name does not begin with a category ({' or '.join(self.parts)})"]
        if len(content) != len(split.triplets):
            return [f"{len(content)} entries instead of {len(split.triplets)}"]
        violations = []
        for place, (entry, triplet) in enumerate(zip(content, split.triplets, strict=True)):
            problems = self._problems(entry, triplet, split)
            violations += [
                f"entry {place} (candidate {triplet.reference}): {problem}" for problem in problems
            ]
        return violations

    def _problems(self, entry: Any, triplet: Triplet, split: Split) -> list[str]:
        """Return the problems of one entry."""
        query = {"candidate": triplet.reference, "captions": list(triplet.captions)}
        if not isinstance(entry, dict) or any(
            entry.get(key) != value for key, value in query.items()
        ):
            return ["not the entry at this position in the captions file"]
        ids: Any = entry.get("ranking")
        if not _are_ids(ids):
            return ['"ranking" is not a list of image ids']
        problems = _foreign(ids, split)
        length = min(self.k, len(split.names))
        if len(ids) < length:
            problems.append(f"{len(ids)} ids, fewer than {length}")
        return problems

    def metrics(self, contents: Mapping[str, list[Any]]) -> dict[str, float]:
        scores = {}
        for file, content in contents.items():
            category = _category(file)
            ranks = listed_ranks([entry["ranking"] for entry in content], self.parts[category])
            scores[category] = self.benchmark.score(ranks)
        return self.benchmark.summary(scores)


def _category(file: str) -> str:
    return Path(file).name.split(".")[0]


class ListsForm(ServerForm[dict[str, Any]]):
    """{name}.json: one object, query id -> retrieved images, for a benchmark with one part."""

    def image(self, value: Any) -> str | None:
        """Return the benchmark's name for an image in a file; None if the value cannot be an image."""
        return value if isinstance(value, str) else None

    def written(self, image: str) -> Any:
        """Return the value that stands for an image in a file."""
        return image

    def files(self, name: str, answered: Sequence[Answered]) -> dict[str, str]:
        (answers,) = answered
        content = {}
        for key, images in zip(_keys(answers.split), answers.nearest, strict=True):
            content[key] = [self.written(image) for image in images]
        return {f"{name}.json": json.dumps(content)}

    def violations(self, file: str, content: dict[str, Any], size: int) -> list[str]:
        keys = _keys(self.whole)
        violations = [f"id {key}: not a query" for key in sorted(content.keys() - set(keys))]
        for key, triplet in zip(keys, self.whole.triplets, strict=True):
            problems = self._problems(content[key], triplet) if key in content else ["missing"]
            violations += [f"id {key}: {problem}" for problem in problems]
        return violations

    def _problems(self, listed: Any, triplet: Triplet) -> list[str]:
        """Return the problems of the images of one query."""
        images = list(map(self.image, listed)) if isinstance(listed, list) else [None]
        if None in images:
            return ["not a list of image ids"]
        problems = _foreign([str(image) for image in images], self.whole)
        # A gallery smaller than k is listed completely, except for a reference that may not be retrieved.
        length = min(self.k, len(self.whole.names) - (triplet.reference not in images))
        if len(images) != length:
            problems.append(f"{len(images)} ids instead of {length}")
        return problems

    def metrics(self, contents: Mapping[str, dict[str, Any]]) -> dict[str, float]:
        (content,) = contents.values()
        lists = []
        for key in _keys(self.whole):
            lists.append([str(self.image(value)) for value in content[key]])
        scores = self.benchmark.score(listed_ranks(lists, self.whole))
        return self.benchmark.summary({self.whole.name: scores})


def _keys(split: Split) -> list[str]:
    """Return the key of each query in a file: its id, or its index if it has none."""
    keys = []
    for number, triplet in enumerate(split.triplets):
        keys.append(str(number if triplet.pair_id is None else triplet.pair_id))
    return keys


class CircoForm(ListsForm):
    """CIRCO: ids are whole numbers; the server converts texts to numbers."""

    kind = CIRCO
    k = 50

    def image(self, value: Any) -> str | None:
        is_number = isinstance(value, int) and not isinstance(value, bool)
        is_digits = isinstance(value, str) and value.isascii() and value.isdigit()
        return str(int(value)) if is_number or (is_digits and len(value) <= ID_DIGITS) else None

    def written(self, image: str) -> Any:
        return int(image)


class TripletsForm(ListsForm):
    """Your own triplets: no server, and only the general rules for lists."""

    kind = Triplets
    k = 50
    whose = ""


# The first format that matches is used. A file for your own triplets looks like a file for CIRCO; only --dataset
# distinguishes them.
FORMS: tuple[type[ServerForm[Any]], ...] = (CirrForm, FashionIQForm, CircoForm, TripletsForm)


def parse_submission(file: Path) -> dict[str, Any] | list[Any]:
    """Return the content of a submission file: an object for CIRR and CIRCO, a list for FashionIQ.

    Raises:
        UserError: the file does not exist, or is not JSON of these types.
    """
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} is not a readable JSON file ({error}): write the submission again"
        ) from None
    if not isinstance(content, dict | list):
        raise UserError(
            f"{file} contains a {type(content).__name__}, not an object (CIRR, CIRCO) or a list (FashionIQ): choose a "
            "submission file"
        )
    return content


def form_of(
    file: Path, content: dict[str, Any] | list[Any], dataset: str | None = None
) -> type[ServerForm[Any]]:
    """Return the format of a submission file, judging by its content.

    Args:
        dataset: the benchmark that the file is for, if it is known.

    Raises:
        UserError: no format of the benchmark has this type of content.
    """
    forms = [form for form in FORMS if dataset in (None, form.kind.name)]
    alike = [form for form in forms if isinstance(content, form.container)]
    if not alike:
        raise UserError(
            f"{file} contains a {type(content).__name__}, but no submission to {dataset} does: set --dataset to the "
            "file's benchmark"
        )
    return next((form for form in alike if form.fits(content)), alike[0])


def listed_ranks(lists: Sequence[list[str]], split: Split) -> Ranks:
    """Return the ranks of the targets in lists of ids. A target that is not listed ranks behind the whole gallery."""
    import numpy as np

    most = 1 + split.most_other_targets
    ranks = np.full((len(lists), most), NO_RANK)
    for row, (ids, triplet) in enumerate(zip(lists, split.triplets, strict=True)):
        for column, target in enumerate(triplet.targets):
            ranks[row, column] = ids.index(target) if target in ids else len(split.names)
    others = ranks[:, 1:] if most > 1 else None
    return Ranks(ranks[:, 0], others=others, kinds=split.queries_of_kinds)


def _are_ids(ids: Any) -> bool:
    return isinstance(ids, list) and all(isinstance(name, str) for name in ids)


def _foreign(ids: list[str], split: Split) -> list[str]:
    """Return the problems of ids that repeat or are not in the split, with a hint if they are paths or file names."""
    counts = Counter(ids)
    problems = [f"{name} occurs {count} times" for name, count in counts.items() if count > 1]
    for name in counts:
        if name not in split.image_paths:
            bare = Path(name).stem
            hint = (
                f": write {bare}, without path and extension" if bare in split.image_paths else ""
            )
            problems.append(f"{name} is not an image of {split.name}{hint}")
    return problems
