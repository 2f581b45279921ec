"""What a benchmark is: its files, captions, protocols and metrics. Each has a file of its own beside this one."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from benchmarks.annotations import Entry, check, check_known, read
from benchmarks.metrics import percentage
from benchmarks.places import locate
from benchmarks.protocols import Protocol
from benchmarks.splits import Split, Triplet
from utils import UserError

if TYPE_CHECKING:
    import numpy as np

    from benchmarks.ranking import Ranking


class Benchmark(ABC):
    """A composed image retrieval benchmark read from its official files.

    Attributes:
        name: what `--dataset` calls it.
        run_name: what the folders of its runs call it.
        parts: what its annotation files are of: cap.{part}.{split}.json.
        train_split, val_split, test_split: what the files call them.
        official: "{part}.{split}" -> triplets and images of the official files.
        official_wordless: queries of the official files that have a caption without a word, as reports call them.
        counts_explained: what the official counts look like, and are not; "" where they mislead nobody.
        group_size: images in a query's group, its reference among them; 0 without groups.
        protocols: the protocols it is measured under, that of the original implementation first.
        selection: metric that selects checkpoints -> suffix of the one that is kept for its best value.
        titles: metric -> its title in a table; the others are not in tables.
        hyper_parameters: what the original's runs write down of it beside the flags.

    Args:
        data_root: the folder that holds the dataset's own.
        excluded: ids of images to leave out, see `Split.without`.
    """

    name: str
    run_name: str
    parts: tuple[str, ...]
    train_split: str
    val_split: str
    test_split: str
    official: dict[str, tuple[int, int]]
    official_wordless: tuple[str, ...] = ()
    counts_explained: str = ""
    group_size: int = 0
    protocols: tuple[Protocol, ...]
    selection: dict[str, str]
    titles: dict[str, str]
    hyper_parameters: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, data_root: Path, excluded: Collection[str] = ()) -> None:
        self.data_root = data_root
        self.excluded = excluded

    @property
    def splits(self) -> tuple[str, str, str]:
        """Training, validation and test, as the files call them."""
        return self.train_split, self.val_split, self.test_split

    def train(self) -> Split:
        """The training triplets of all parts and the images that they use."""
        triplets: list[Triplet] = []
        paths: dict[str, Path] = {}
        excluded_images: list[str] = []
        excluded_triplets = 0
        for split in self.read(self.train_split):
            triplets += split.triplets
            paths.update(split.image_paths)
            excluded_images += split.excluded_images
            excluded_triplets += split.excluded_triplets
        used: list[str] = []
        for triplet in triplets:
            used += triplet.images
        return Split(
            name="train",
            triplets=triplets,
            image_paths={name: paths[name] for name in used},  # in the order of first use
            excluded_images=tuple(dict.fromkeys(excluded_images)),
            excluded_triplets=excluded_triplets,
        )

    def val(self) -> list[Split]:
        """The validation splits, each with its whole gallery."""
        return self.read(self.val_split)

    def test(self) -> list[Split]:
        """The test splits, whose targets are secret."""
        return self.read(self.test_split)

    def read(self, split: str) -> list[Split]:
        """The parts of a split, each with all images of its list, without what is excluded.

        Raises:
            UserError: a file is missing or malformed, or nothing is left of it.
        """
        return [self.read_part(part, split) for part in self.parts]

    def files(self, part: str, split: str) -> tuple[Path, Path]:
        """The files of a split's captions and of its list of images."""
        folder = self.annotation_folder()
        captions = folder / "captions" / f"cap.{part}.{split}.json"
        images = folder / "image_splits" / f"split.{part}.{split}.json"
        return captions, images

    def read_part(self, part: str, split: str) -> Split:
        """One part of a split, see `read`."""
        captions_file, images_file = self.files(part, split)
        paths = locate(
            self._image_places(images_file),
            self.image_folders(part),
            root=self.data_root,
            listed_in=images_file,
        )
        triplets = []
        for place, content in enumerate(read(captions_file, list)):
            entry = Entry(content, captions_file, f"entry {place}")
            triplet = replace(self._triplet(entry, split), place=place)
            check_known([*triplet.images, *triplet.group], paths, entry, images_file)
            searchable = split == self.train_split or triplet.reference != triplet.target
            entry.check(searchable, "a target other than the reference")
            triplets.append(triplet)
        check(bool(triplets), captions_file, "at least one triplet")
        _check_pair_ids(triplets, captions_file)
        whole = Split(name=self._part_name(part, split), triplets=triplets, image_paths=paths)
        remaining = whole.without(self.excluded)
        if not remaining.triplets:
            raise UserError(
                f"--exclusions leaves none of the triplets of {captions_file}: exclude fewer images"
            )
        return remaining

    def metrics(self, rankings: Mapping[str, "Ranking"]) -> dict[str, float]:
        """All metrics, by the names of the CSV files, from the validation splits ranked under one protocol."""
        scores = {}
        for split, ranking in rankings.items():
            in_group = None if ranking.group_ranks is None else ranking.group_ranks.numpy()
            scores[split] = self.score(ranking.known_ranks.numpy(), in_group)
        return self.summary(scores)

    @classmethod
    def best_clips(cls) -> dict[str, str]:
        """Metric -> name of stage 1's checkpoint for its best value."""
        return {metric: f"tuned_clip_{suffix}" for metric, suffix in cls.selection.items()}

    @classmethod
    def best_combiners(cls) -> dict[str, str]:
        """Metric -> name of stage 2's checkpoint for its best value; one that is alone needs no suffix."""
        if len(cls.selection) == 1:
            return dict.fromkeys(cls.selection, "combiner")
        return {metric: f"combiner_{suffix}" for metric, suffix in cls.selection.items()}

    def part_names(self, split: str) -> list[str]:
        """What the parts of a split are called."""
        return [self._part_name(part, split) for part in self.parts]

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
    def _image_places(self, images_file: Path) -> dict[str, str]:
        """Image name -> path relative to a folder of images, from a list of a split's images."""

    @abstractmethod
    def _triplet(self, entry: Entry, split: str) -> Triplet:
        """The query of an entry of a captions file."""

    @abstractmethod
    def caption(self, captions: tuple[str, ...]) -> str:
        """The text of a query at evaluation."""

    @abstractmethod
    def caption_variants(self, captions: tuple[str, ...]) -> list[str]:
        """The texts of a triplet in training, equally likely; as many for every triplet."""

    def score(self, ranks: "np.ndarray", group_ranks: "np.ndarray | None") -> dict[str, float]:
        """Recalls of one split, in percent, from what `hits` takes."""
        return {name: percentage(hit) for name, hit in self.hits(ranks, group_ranks).items()}

    @abstractmethod
    def hits(
        self, ranks: "np.ndarray", group_ranks: "np.ndarray | None"
    ) -> "dict[str, np.ndarray]":
        """Recall -> which queries it counts, (Q,) bool.

        Args:
            ranks: (Q,) of the targets in the gallery, 0 for the first place.
            group_ranks: (Q,) of the targets in their groups, None without groups.
        """

    @abstractmethod
    def summary(self, scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """All metrics, by the names of the CSV files, from the recalls of each split.

        What selects checkpoints is made of recalls that are named there, so that one more recall in `hits` changes
        what is reported and nothing that is selected.
        """


def _check_pair_ids(triplets: Sequence[Triplet], captions_file: Path) -> None:
    """Raise UserError where two entries of a file are one query: it would be counted twice."""
    places: dict[int, int] = {}
    for place, triplet in enumerate(triplets):
        if triplet.pair_id is not None and places.setdefault(triplet.pair_id, place) != place:
            raise UserError(
                f"{captions_file}: entry {places[triplet.pair_id]} and entry {place} have the same pairid "
                f"{triplet.pair_id}: download the official annotation file again"
            )
