"""Every difference between FashionIQ and CIRR: their files, captions, rules and metrics."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from torch import Tensor

from data_utils import Split, Triplet
from metrics import means, recall_at
from utils import UserError, read_json


class Benchmark(ABC):
    """A composed image retrieval benchmark read from its official files.

    Attributes:
        name: what `--dataset` calls it.
        run_name: what the folders of its runs call it.
        keeps_reference: whether a query's own reference may be retrieved.
        selection: metric -> suffix of the checkpoint that is kept for its best value.
    """

    name: str
    run_name: str
    keeps_reference: bool
    selection: dict[str, str]

    def __init__(self, data_root: Path) -> None:
        self.data_root = data_root

    @abstractmethod
    def train(self) -> Split:
        """The training triplets and the images that they use."""

    @abstractmethod
    def val(self) -> list[Split]:
        """The validation splits, each with its whole gallery."""

    @abstractmethod
    def caption(self, captions: tuple[str, ...]) -> str:
        """The text of a query at evaluation."""

    @abstractmethod
    def caption_variants(self, captions: tuple[str, ...]) -> list[str]:
        """The texts of a triplet in training, equally likely; as many for every triplet."""

    @abstractmethod
    def score(self, ranks: Tensor, group_ranks: Tensor | None) -> dict[str, float]:
        """Recalls of one split from its targets' ranks in the gallery (Q,) and, if there are groups, in them (Q,)."""

    @abstractmethod
    def summary(self, scores: dict[str, dict[str, float]]) -> dict[str, float]:
        """All metrics, by the names of the CSV files, from the scores of each split."""


class FashionIQ(Benchmark):
    """FashionIQ (Wu et al., CVPR 2021): original galleries, the reference stays in the ranking."""

    name = "FashionIQ"
    run_name = "fiq"
    keeps_reference = True
    selection = {"average_recall": "best"}
    categories = ("dress", "toptee", "shirt")

    def train(self) -> Split:
        splits = [self._split(category, "train") for category in self.categories]
        triplets = [t for split in splits for t in split.triplets]
        paths = {name: path for split in splits for name, path in split.image_paths.items()}
        return Split("train", triplets, _used(triplets, paths))

    def val(self) -> list[Split]:
        return [self._split(category, "val") for category in self.categories]

    def _split(self, category: str, split: str) -> Split:
        root = self.data_root / "fashionIQ_dataset"
        captions_file = root / "captions" / f"cap.{category}.{split}.json"
        images_file = root / "image_splits" / f"split.{category}.{split}.json"
        names = _read(images_file, list)
        _check(all(isinstance(name, str) for name in names), images_file, "a list of image ids")
        _check(len(set(names)) == len(names), images_file, "ids that do not repeat")
        paths = {name: root / "images" / f"{name}.jpg" for name in names}
        triplets = []
        for place, entry in enumerate(_read(captions_file, list)):
            where = f"entry {place}"
            captions = _field(entry, "captions", list, captions_file, where)
            two = len(captions) == 2 and all(isinstance(caption, str) for caption in captions)
            _check(two, captions_file, f"two captions in {where}")
            reference = _field(entry, "candidate", str, captions_file, where)
            target = _field(entry, "target", str, captions_file, where)
            _check_known((reference, target), paths, captions_file, where, images_file)
            triplets.append(Triplet(reference, tuple(captions), target))
        return _nonempty(Split(category, triplets, paths), captions_file)

    def caption(self, captions: tuple[str, ...]) -> str:
        return self.caption_variants(captions)[0]

    def caption_variants(self, captions: tuple[str, ...]) -> list[str]:
        first, second = (caption.strip(".?, ") for caption in captions)
        return [
            f"{first.capitalize()} and {second}",
            f"{second.capitalize()} and {first}",
            first.capitalize(),
            second.capitalize(),
        ]

    def score(self, ranks: Tensor, group_ranks: Tensor | None) -> dict[str, float]:
        return {f"recall_at{k}": recall_at(ranks, k) for k in (10, 50)}

    def summary(self, scores: dict[str, dict[str, float]]) -> dict[str, float]:
        metrics = {f"{split}_{name}": value for split, score in scores.items() for name, value in score.items()}
        at10, at50 = (sum(score[f"recall_at{k}"] for score in scores.values()) / len(scores) for k in (10, 50))
        averages = {"average_recall_at10": at10, "average_recall_at50": at50, "average_recall": (at10 + at50) / 2}
        return metrics | averages


class CIRR(Benchmark):
    """CIRR rc2 (Liu et al., ICCV 2021): one gallery, without the query's own reference; groups of six images."""

    name = "CIRR"
    run_name = "cirr"
    keeps_reference = False
    selection = {"arithmetic_mean": "arithmetic", "harmonic_mean": "harmonic", "geometric_mean": "geometric"}

    def train(self) -> Split:
        split = self._split("train")
        return Split("train", split.triplets, _used(split.triplets, split.image_paths))

    def val(self) -> list[Split]:
        return [self._split("val")]

    def test1(self) -> Split:
        """The test split, whose targets only the server knows."""
        return self._split("test1")

    def _split(self, split: str) -> Split:
        root = self.data_root / "cirr_dataset"
        captions_file = root / "cirr" / "captions" / f"cap.rc2.{split}.json"
        images_file = root / "cirr" / "image_splits" / f"split.rc2.{split}.json"
        names = _read(images_file, dict)
        _check(all(isinstance(place, str) for place in names.values()), images_file, "an object of id -> path")
        paths = {name: root / place for name, place in names.items()}
        triplets = []
        for place, entry in enumerate(_read(captions_file, list)):
            triplet = self._triplet(entry, split, captions_file, f"entry {place}")
            used = [triplet.reference, *triplet.group, *([triplet.target] if triplet.target else [])]
            _check_known(used, paths, captions_file, f"entry {place}", images_file)
            triplets.append(triplet)
        return _nonempty(Split(split, triplets, paths), captions_file)

    def _triplet(self, entry: Any, split: str, file: Path, where: str) -> Triplet:
        reference = _field(entry, "reference", str, file, where)
        caption = _field(entry, "caption", str, file, where)
        pair_id = _field(entry, "pairid", int, file, where)
        if split == "train":
            return Triplet(reference, (caption,), _field(entry, "target_hard", str, file, where), pair_id=pair_id)
        target = _field(entry, "target_hard", str, file, where) if split == "val" else None
        group = _field(_field(entry, "img_set", dict, file, where), "members", list, file, where)
        whole = (
            len(set(map(str, group))) == 6 and reference in group and target in (None, *group) and target != reference
        )
        _check(whole, file, f"six members in {where}, reference and target two of them")
        return Triplet(reference, (caption,), target, tuple(map(str, group)), pair_id)

    def caption(self, captions: tuple[str, ...]) -> str:
        return captions[0]

    def caption_variants(self, captions: tuple[str, ...]) -> list[str]:
        return [captions[0]]

    def score(self, ranks: Tensor, group_ranks: Tensor | None) -> dict[str, float]:
        subset = {f"group_recall_at{k}": recall_at(group_ranks, k) for k in (1, 2, 3)}
        return subset | {f"recall_at{k}": recall_at(ranks, k) for k in (1, 5, 10, 50)}

    def summary(self, scores: dict[str, dict[str, float]]) -> dict[str, float]:
        (recalls,) = scores.values()
        headline = (recalls["recall_at5"] + recalls["group_recall_at1"]) / 2
        return recalls | {"mean(R@5+R_s@1)": headline} | means(list(recalls.values()))


BENCHMARKS = {benchmark.name: benchmark for benchmark in (CIRR, FashionIQ)}


def _read(file: Path, kind: type) -> Any:
    content = read_json(file)
    _check(isinstance(content, kind), file, f"a JSON {'list' if kind is list else 'object'}")
    return content


def _check(holds: bool, file: Path, expected: str) -> None:
    if not holds:
        raise UserError(f"{file}: expected {expected}; download the official annotation file again")


def _field(entry: Any, key: str, kind: type, file: Path, where: str) -> Any:
    """A value of an annotation, checked to be there and of its type."""
    _check(isinstance(entry, dict) and isinstance(entry.get(key), kind), file, f'"{key}" ({kind.__name__}) in {where}')
    return entry[key]


def _check_known(names: tuple | list, paths: dict[str, Path], file: Path, where: str, images_file: Path) -> None:
    """Every image that an annotation names must be in the split's list of images."""
    for name in names:
        if name not in paths:
            raise UserError(f"{file}: {where} names the image {name}, which is not in {images_file}: get both anew")


def _used(triplets: list[Triplet], paths: dict[str, Path]) -> dict[str, Path]:
    """Only the images that triplets use, in the order of their first use: the others need not be read."""
    return {name: paths[name] for t in triplets for name in (t.reference, t.target)}


def _nonempty(split: Split, file: Path) -> Split:
    _check(bool(split.triplets), file, "at least one triplet")
    return split
