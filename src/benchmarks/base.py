"""Every difference between FashionIQ and CIRR: their files, captions, protocols and metrics."""

from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks import annotations
from benchmarks.annotations import check, check_known
from benchmarks.metrics import percentage
from benchmarks.protocols import Protocol
from benchmarks.ranking import Ranking
from benchmarks.splits import Split, Triplet
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
