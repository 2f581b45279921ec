"""Every difference between FashionIQ and CIRR: their files, captions, protocols and metrics."""

from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

import annotations
from annotations import check, check_known, field
from metrics import means, percentage
from protocols import ORIGINAL_KEPT, ORIGINAL_REMOVED, VAL_KEPT, VAL_REMOVED, Protocol
from rankings import Ranking
from splits import Split, Triplet, locate
from utils import UserError


class Benchmark(ABC):
    """A composed image retrieval benchmark read from its official files.

    Attributes:
        name: what `--dataset` calls it.
        run_name: what the folders of its runs call it.
        parts: what its annotation files are of: cap.{part}.{split}.json.
        splits: training, validation and test, as the files call them.
        official: "{part}.{split}" -> triplets and images of the official files.
        counts_explained: what the official counts look like, and are not; "" where they mislead nobody.
        protocols: the protocols it is measured under, that of the original implementation first.
        selection: metric -> suffix of the checkpoint that is kept for its best value.
        titles: metric -> its title in a table; the others are not in tables.

    Args:
        data_root: the folder that holds the dataset's own.
        excluded: ids of images to leave out, see `Split.without`.
    """

    name: str
    run_name: str
    parts: tuple[str, ...]
    splits: tuple[str, str, str]
    official: dict[str, tuple[int, int]]
    counts_explained: str = ""
    protocols: tuple[Protocol, ...]
    selection: dict[str, str]
    titles: dict[str, str]

    def __init__(self, data_root: Path, excluded: Collection[str] = ()) -> None:
        self.data_root = data_root
        self.excluded = excluded

    def train(self) -> Split:
        """The training triplets of all parts and the images that they use."""
        splits = self.read(self.splits[0])
        triplets = [t for split in splits for t in split.triplets]
        paths = {name: path for split in splits for name, path in split.image_paths.items()}
        used = {name: paths[name] for t in triplets for name in (t.reference, t.target)}  # in the order of first use
        images = tuple(dict.fromkeys(name for split in splits for name in split.excluded_images))
        return Split("train", triplets, used, images, sum(split.excluded_triplets for split in splits))

    def val(self) -> list[Split]:
        """The validation splits, each with its whole gallery."""
        return self.read(self.splits[1])

    def test(self) -> list[Split]:
        """The test splits, whose targets are secret."""
        return self.read(self.splits[2])

    def read(self, split: str) -> list[Split]:
        """The parts of a split, each with all images of its list, without what is excluded.

        Raises:
            UserError: a file is missing or malformed, or nothing is left of it.
        """
        return [self.read_part(part, split) for part in self.parts]

    def files(self, part: str, split: str) -> tuple[Path, Path]:
        """The files of a split's captions and of its list of images."""
        folder = self.annotation_folder()
        return folder / "captions" / f"cap.{part}.{split}.json", folder / "image_splits" / f"split.{part}.{split}.json"

    def read_part(self, part: str, split: str) -> Split:
        """One part of a split, see `read`."""
        captions_file, images_file = self.files(part, split)
        paths = self._image_paths(part, images_file)
        triplets = []
        for place, entry in enumerate(annotations.read(captions_file, list)):
            where = f"entry {place}"
            triplet = self._triplet(entry, split, captions_file, where)
            used = [triplet.reference, *triplet.group, *([] if triplet.target is None else [triplet.target])]
            check_known(used, paths, captions_file, where, images_file)
            searchable = split == self.splits[0] or triplet.reference != triplet.target
            check(searchable, captions_file, f"a target other than the reference in {where}")
            triplets.append(triplet)
        check(bool(triplets), captions_file, "at least one triplet")
        left = Split(self._part_name(part, split), triplets, paths).without(self.excluded)
        if not left.triplets:
            raise UserError(f"--exclusions leaves none of the triplets of {captions_file}: exclude fewer images")
        return left

    def metrics(self, rankings: dict[str, Ranking]) -> dict[str, float]:
        """All metrics, by the names of the CSV files, from the validation splits ranked under one protocol."""
        return self.summary({name: self.score(r.ranks, r.group_ranks) for name, r in rankings.items()})

    @abstractmethod
    def annotation_folder(self) -> Path:
        """The folder that holds captions/ and image_splits/."""

    @abstractmethod
    def image_folders(self, part: str) -> list[Path]:
        """The folders that may hold a part's images, the official one first."""

    @abstractmethod
    def _part_name(self, part: str, split: str) -> str:
        """What a part of a split is called."""

    @abstractmethod
    def _image_paths(self, part: str, images_file: Path) -> dict[str, Path]:
        """The files of the images that a list names."""

    @abstractmethod
    def _triplet(self, entry: Any, split: str, file: Path, where: str) -> Triplet:
        """An entry of a captions file."""

    @abstractmethod
    def caption(self, captions: tuple[str, ...]) -> str:
        """The text of a query at evaluation."""

    @abstractmethod
    def caption_variants(self, captions: tuple[str, ...]) -> list[str]:
        """The texts of a triplet in training, equally likely; as many for every triplet."""

    def score(self, ranks: Tensor, group_ranks: Tensor | None) -> dict[str, float]:
        """Recalls of one split, in percent, from what `hits` takes."""
        return {name: percentage(hit) for name, hit in self.hits(ranks, group_ranks).items()}

    @abstractmethod
    def hits(self, ranks: Tensor, group_ranks: Tensor | None) -> dict[str, Tensor]:
        """Each recall's queries that it counts, (Q,) bool.

        Args:
            ranks: (Q,) of the targets in the gallery.
            group_ranks: (Q,) of the targets in their groups, None without groups.
        """

    @abstractmethod
    def summary(self, scores: dict[str, dict[str, float]]) -> dict[str, float]:
        """All metrics, by the names of the CSV files, from the scores of each split."""


class FashionIQ(Benchmark):
    """FashionIQ (Wu et al., CVPR 2021): a gallery for each category."""

    name = "FashionIQ"
    run_name = "fiq"
    parts = ("dress", "toptee", "shirt")
    splits = ("train", "val", "test")
    official = {
        "dress.train": (5985, 11452), "dress.val": (2017, 3817), "dress.test": (2024, 3818),
        "shirt.train": (5988, 19036), "shirt.val": (2038, 6346), "shirt.test": (2038, 6346),
        "toptee.train": (6027, 16121), "toptee.val": (1961, 5373), "toptee.test": (2056, 5374),
    }  # fmt: skip
    counts_explained = (
        "The nine official lists have 77,683 entries, which papers count as images, but 3,302 of them repeat: the "
        "complete dataset is 74,381 images, and the 3,300 that seem to be missing do not exist"
    )
    protocols = (ORIGINAL_KEPT, ORIGINAL_REMOVED, VAL_REMOVED, VAL_KEPT)
    selection = {"average_recall": "best"}
    titles = {f"{part}_recall_at{k}": f"{part} R@{k}" for part in parts for k in (10, 50)} | {
        "average_recall_at10": "mean R@10",
        "average_recall_at50": "mean R@50",
        "average_recall": "mean",
    }

    def annotation_folder(self) -> Path:
        return self.data_root / "fashionIQ_dataset"

    def image_folders(self, part: str) -> list[Path]:
        """images/ as in the official layout, or by category; an id of two categories may lie under the other one."""
        root = self.annotation_folder()
        parts = sorted(self.parts, key=lambda other: other != part)
        return [root / "images", *(root / kind / p for kind in ("images", "resized_image") for p in parts)]

    def _part_name(self, part: str, split: str) -> str:
        return part

    def _image_paths(self, part: str, images_file: Path) -> dict[str, Path]:
        names = annotations.read(images_file, list)
        check(all(isinstance(name, str) for name in names), images_file, "a list of image ids")
        check(len(set(names)) == len(names), images_file, "ids that do not repeat")
        return locate({name: f"{name}.jpg" for name in names}, self.image_folders(part))

    def _triplet(self, entry: Any, split: str, file: Path, where: str) -> Triplet:
        captions = field(entry, "captions", list, file, where)
        two = len(captions) == 2 and all(isinstance(caption, str) for caption in captions)
        check(two, file, f"two captions in {where}")
        target = None if split == self.splits[2] else field(entry, "target", str, file, where)
        return Triplet(field(entry, "candidate", str, file, where), tuple(captions), target)

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

    def hits(self, ranks: Tensor, group_ranks: Tensor | None) -> dict[str, Tensor]:
        return {f"recall_at{k}": ranks < k for k in (10, 50)}

    def summary(self, scores: dict[str, dict[str, float]]) -> dict[str, float]:
        metrics = {f"{split}_{name}": value for split, score in scores.items() for name, value in score.items()}
        at10, at50 = (sum(score[f"recall_at{k}"] for score in scores.values()) / len(scores) for k in (10, 50))
        averages = {"average_recall_at10": at10, "average_recall_at50": at50, "average_recall": (at10 + at50) / 2}
        return metrics | averages


class CIRR(Benchmark):
    """CIRR rc2 (Liu et al., ICCV 2021): one gallery, without the query's own reference; groups of six images."""

    name = "CIRR"
    run_name = "cirr"
    parts = ("rc2",)
    splits = ("train", "val", "test1")
    official = {"rc2.train": (28225, 16939), "rc2.val": (4181, 2297), "rc2.test1": (4148, 2315)}
    protocols = (ORIGINAL_REMOVED,)
    selection = {"arithmetic_mean": "arithmetic", "harmonic_mean": "harmonic", "geometric_mean": "geometric"}
    titles = (
        {f"recall_at{k}": f"R@{k}" for k in (1, 5, 10, 50)}
        | {f"group_recall_at{k}": f"R_subset@{k}" for k in (1, 2, 3)}
        | {"mean(R@5+R_s@1)": "mean(R@5+R_s@1)"}
    )

    def annotation_folder(self) -> Path:
        return self.data_root / "cirr_dataset" / "cirr"

    def image_folders(self, part: str) -> list[Path]:
        root = self.data_root / "cirr_dataset"
        return [root, root / "img_raw", root / "images"]

    def _part_name(self, part: str, split: str) -> str:
        return split

    def _image_paths(self, part: str, images_file: Path) -> dict[str, Path]:
        places = annotations.read(images_file, dict)
        check(all(isinstance(place, str) for place in places.values()), images_file, "an object of id -> path")
        return locate(places, self.image_folders(part))

    def _triplet(self, entry: Any, split: str, file: Path, where: str) -> Triplet:
        reference = field(entry, "reference", str, file, where)
        captions = (field(entry, "caption", str, file, where),)
        pair_id = field(entry, "pairid", int, file, where)
        target = None if split == self.splits[2] else field(entry, "target_hard", str, file, where)
        if split == self.splits[0]:
            return Triplet(reference, captions, target, pair_id=pair_id)
        group = field(field(entry, "img_set", dict, file, where), "members", list, file, where)
        whole = all(isinstance(name, str) for name in group) and len(group) == len(set(group)) == 6
        whole = whole and reference in group and target in (None, *group)
        check(whole, file, f"six members in {where}, reference and target two of them")
        return Triplet(reference, captions, target, tuple(group), pair_id)

    def caption(self, captions: tuple[str, ...]) -> str:
        return captions[0]

    def caption_variants(self, captions: tuple[str, ...]) -> list[str]:
        return [captions[0]]

    def hits(self, ranks: Tensor, group_ranks: Tensor | None) -> dict[str, Tensor]:
        subset = {f"group_recall_at{k}": group_ranks < k for k in (1, 2, 3)}
        return subset | {f"recall_at{k}": ranks < k for k in (1, 5, 10, 50)}

    def summary(self, scores: dict[str, dict[str, float]]) -> dict[str, float]:
        (recalls,) = scores.values()
        headline = (recalls["recall_at5"] + recalls["group_recall_at1"]) / 2
        return recalls | {"mean(R@5+R_s@1)": headline} | means(list(recalls.values()))


BENCHMARKS = {benchmark.name: benchmark for benchmark in (CIRR, FashionIQ)}
