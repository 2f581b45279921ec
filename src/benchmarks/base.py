"""Define the interface of a benchmark: files, captions, protocols and metrics. Each benchmark has its own file."""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from benchmarks.entries import OFFICIAL, refuse_all
from benchmarks.metrics import NO_RANK, Metric, Ranks, Statistic, percentage
from benchmarks.places import locate
from benchmarks.protocols import ORIGINAL_KEPT, ORIGINAL_REMOVED, Protocol
from benchmarks.splits import Split, Triplet
from runtime.choices import MINED, ORIGINAL
from runtime.spelling import Spellings
from utils import UserError

if TYPE_CHECKING:
    import numpy as np

    from benchmarks.ranking import Ranking

logger = logging.getLogger(__name__)


class Benchmark(ABC):
    """A composed image retrieval benchmark read from its files.

    One with a gallery and a JSON list of queries needs its names, `folder`, `files`, `image_folders`, `image_places`,
    `queries` and `hits`; all else has a default, which is that of the simplest case.

    Attributes:
        name: what `--dataset` calls it.
        run_name: what the folders of its runs call it.
        folder: that of its own files, below the data root.
        remedy: what to do with a file of them that is not as it should be.
        parts: what has files and a gallery of its own, as a category; one that has no name elsewhere.
        train_split, val_split, test_split: what the files call them; None where there is none.
        official: "{part}.{split}" -> triplets and images of the official files; nothing of files that are anybody's.
        official_wordless: queries of the official files that have a caption without a word, as reports call them.
        counts_explained: what the official counts look like, and are not; "" where they mislead nobody.
        id_name: what its files call the id of a query.
        references_apart: a reference of its evaluation may be in no gallery; its name is its place then.
        background: what transparent images are read on where nothing is said, one of BACKGROUNDS.
        concept_template: what protocols with the concept ask, {shared_concept} and {relative_caption} in it; "" where a
            benchmark has no concepts.
        negatives_from: where hard negatives of its training triplets are from, one of HARD_NEGATIVES; mined ones are
            none of its own.
        protocols: the protocols it is measured under, that of the original implementation first.
        reported: metric -> what it is, in the order of the tables. One that is not named here is a percentage.
        statistics: score -> how it is made of the hits of a split's queries; the others are their means in percent.
        selection, titles: those of `reported` that choose checkpoints, and those of tables; see `Metric`.
        hyper_parameters: what the original's runs record of it besides the flags.

    Args:
        data_root: the folder that holds the dataset's own.
        excluded: ids of images to leave out, see `Split.without`.
    """

    name: str
    run_name: str
    folder: str
    remedy: str = OFFICIAL
    parts: tuple[str, ...] = ("all",)
    train_split: str | None = "train"
    val_split: str = "val"
    test_split: str | None = "test"
    official: Mapping[str, tuple[int, int]] = MappingProxyType({})
    official_wordless: tuple[str, ...] = ()
    counts_explained: str = ""
    id_name: str = "id"
    references_apart: bool = False
    background: str = ORIGINAL
    concept_template: str = ""
    negatives_from: str = MINED
    protocols: tuple[Protocol, ...] = (ORIGINAL_KEPT, ORIGINAL_REMOVED)
    reported: Mapping[str, Metric]
    statistics: Mapping[str, Statistic] = MappingProxyType({})
    selection: Mapping[str, str]
    titles: Mapping[str, str]
    hyper_parameters: Mapping[str, Any] = MappingProxyType({})

    def __init_subclass__(cls) -> None:
        """Sort what a benchmark reports by what it is for."""
        super().__init_subclass__()
        cls.selection = {name: m.checkpoint for name, m in cls.reported.items() if m.checkpoint}
        cls.titles = {name: m.title for name, m in cls.reported.items() if m.title}

    def __init__(self, data_root: Path, excluded: Collection[str] = ()) -> None:
        self.data_root = data_root
        self.excluded = excluded

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts that protocols ask with, see `Protocol.text`."""
        return tuple(dict.fromkeys(protocol.text for protocol in self.protocols))

    @property
    def splits(self) -> dict[str, str]:
        """Return those that there are of "train", "val" and "test", as the files call them."""
        all_three = {"train": self.train_split, "val": self.val_split, "test": self.test_split}
        return {split: called for split, called in all_three.items() if called is not None}

    def split_called(self, split: str) -> str:
        """Return what the files call "train", "val" or "test". Raises UserError where there is none."""
        if split not in self.splits:
            raise UserError(
                f"--dataset {self.name} has no {split} split, only {' and '.join(self.splits)}: choose another "
                "benchmark"
            )
        return self.splits[split]

    def train(self) -> Split:
        """The training triplets of all parts and the images that they use; one with several targets is several.

        Raises:
            UserError: there is no training split, or see `read`.
        """
        triplets: list[Triplet] = []
        paths: dict[str, Path] = {}
        excluded_images: list[str] = []
        excluded_triplets = 0
        for split in self.read(self.split_called("train")):
            for triplet in split.triplets:
                negatives = self._negatives(triplet)
                for target in triplet.targets:
                    triplets.append(
                        replace(triplet, target=target, other_targets=(), negatives=negatives)
                    )
            paths.update(split.image_paths)
            excluded_images += split.excluded_images
            excluded_triplets += split.excluded_triplets
        used: list[str] = []
        for triplet in triplets:
            used += [*triplet.images, *triplet.negatives]
        if self.negatives_from != MINED and not any(triplet.negatives for triplet in triplets):
            raise UserError(
                f"--hard-negatives-from {self.negatives_from}: no training triplet of {self.name} has any: choose "
                f"{MINED}, or see docs/recipe.md"
            )
        return Split(
            name="train",
            triplets=triplets,
            image_paths={name: paths[name] for name in used},  # in the order of first use
            excluded_images=tuple(dict.fromkeys(excluded_images)),
            excluded_triplets=excluded_triplets,
        )

    def _negatives(self, triplet: Triplet) -> tuple[str, ...]:
        """The hard negatives that a query's group or its file names: none of them its reference or a target."""
        named = {"group": triplet.group, "column": triplet.negatives}.get(self.negatives_from, ())
        return tuple(name for name in named if name not in triplet.images)

    def val(self) -> list[Split]:
        """The validation splits, each with its whole gallery."""
        return self.read(self.val_split)

    def test(self) -> list[Split]:
        """The test splits, whose targets are secret."""
        return self.read(self.split_called("test"))

    def read(self, split: str) -> list[Split]:
        """The parts of a split, each with all images of its list, without what is excluded.

        Raises:
            UserError: a file is missing or malformed, or nothing is left of it.
        """
        return [self.read_part(part, split) for part in self.parts]

    def annotation_folder(self) -> Path:
        """The folder of the benchmark's own files."""
        return self.data_root / self.folder

    def read_part(self, part: str, split: str) -> Split:
        """One part of a split, see `read`."""
        queries_file, images_file = self.files(part, split)
        paths = locate(
            self.image_places(images_file),
            self.image_folders(part),
            root=self.data_root,
            listed_in=images_file,
            remedy=self.remedy,
        )
        triplets: list[Triplet] = []
        first_with: dict[int | str, str] = {}
        faults: list[str] = []
        known = Spellings(paths)
        for where, triplet in self.queries(queries_file, split):
            faults += [
                f"{where}: {fault}" for fault in self._faults(triplet, split, known, images_file)
            ]
            own = triplet.pair_id
            if own is not None and first_with.setdefault(own, where) != where:
                faults.append(
                    f"{where}: its {self.id_name} {own} is also that of {first_with[own]}"
                )
            triplets.append(replace(triplet, place=len(triplets)))
        refuse_all(queries_file, faults, self.remedy)
        if not triplets:
            raise UserError(f"{queries_file}: no triplets: {self.remedy}")
        apart = {triplet.reference: triplet.reference for triplet in triplets}
        apart = {name: place for name, place in apart.items() if name not in paths}
        paths |= locate(
            apart,
            self.image_folders(part),
            root=self.data_root,
            listed_in=queries_file,
            remedy=self.remedy,
        )
        whole = Split(
            name=self.part_name(part, split),
            triplets=triplets,
            image_paths=paths,
            only_asked=frozenset(apart),
        )
        remaining = whole.without(self.excluded) if self.excluded else whole
        if not remaining.triplets:
            raise UserError(
                f"--exclusions leaves out all triplets of {queries_file}: exclude fewer images"
            )
        return remaining

    def _faults(
        self, triplet: Triplet, split: str, known: Spellings, images_file: Path
    ) -> list[str]:
        """Return the problems of a query that no single field shows."""
        faults = []
        apart = self.references_apart and split != self.train_split
        in_gallery = triplet.targets if apart else triplet.images
        for name in (*in_gallery, *triplet.group, *triplet.negatives):
            if name not in known.names:
                faults.append(f"the image {name} is not in {images_file}{known.hint(name)}")
        if split != self.train_split and triplet.reference in triplet.targets:
            faults.append("its target is its reference")
        if len(set(triplet.targets)) < len(triplet.targets):
            faults.append("a target is there twice")
        if not set(triplet.negatives).isdisjoint(triplet.targets):
            faults.append("a target is among its negatives")
        if triplet.group and not set(triplet.images[:2]) <= set(triplet.group):
            faults.append("its group lacks its reference or target")
        return faults

    def metrics(
        self, splits: Iterable[Split], rankings: Mapping[str, "Ranking"]
    ) -> dict[str, float]:
        """All metrics, by the names of the CSV files, from the validation splits ranked under one protocol."""
        scores = {}
        for split in splits:
            scores[split.name] = self.score(rankings[split.name].ranks_in(split))
        return self.summary(scores)

    def titled(self, metrics: Collection[str]) -> dict[str, str]:
        """Metric -> its title in a table, of those that were measured."""
        return {metric: title for metric, title in self.titles.items() if metric in metrics}

    def titles_in(self, splits: Iterable[Split]) -> dict[str, str]:
        """Metric -> its title in a table, of those that the queries of some splits have: groups, several targets."""
        scores = {split.name: self._score_all(split, 0, others=0, in_group=0) for split in splits}
        return self.titled(self.summary(scores))

    def certain(self, splits: Iterable[Split], protocol: Protocol) -> dict[str, list[str]]:
        """Split's name -> its scores that are 100 even of targets that come last: recalls at as many as there are."""
        certain = {}
        for split in splits:
            last = protocol.most_answers(split) - 1
            in_group = max(len(triplet.group) for triplet in split.triplets) - 2
            scores = self._score_all(split, last, others=NO_RANK, in_group=in_group)
            certain[split.name] = [
                name
                for name, score in scores.items()
                if name not in self.statistics and score >= 100
            ]
        return certain

    def _score_all(
        self, split: Split, named: int, *, others: int, in_group: int
    ) -> dict[str, float]:
        """The scores of a split whose queries all have the same ranks: of the named target, the others, in groups."""
        import numpy as np

        ones = np.ones(len(split.triplets), dtype=int)
        ranks = Ranks(
            named * ones,
            others=others * ones[:, None] if split.most_other_targets else None,
            in_group=in_group * ones if split.has_groups else None,
            kinds=split.queries_of_kinds,
        )
        return self.score(ranks)

    def note_certain(self, splits: Sequence[Split], protocols: Iterable[Protocol]) -> None:
        """Say which scores of some splits are certain under some protocols, in a line, if there are any."""
        found = []
        for protocol in protocols:
            for split, names in self.certain(splits, protocol).items():
                if names:
                    found.append(f"{', '.join(names)} of {split} under {protocol.name}")
        if found:
            reason = "there are no more images to choose from"
            logger.warning("note: always 100, because %s: %s", reason, "; ".join(found))

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
        """Return what the parts of a split are called."""
        return [self.part_name(part, split) for part in self.parts]

    def part_name(self, part: str, split: str) -> str:
        """Return what a part of a split is called: as the split, where there is one part."""
        return split

    @abstractmethod
    def files(self, part: str, split: str) -> tuple[Path, Path]:
        """The files of a split's queries and of its list of images. One file may be both."""

    @abstractmethod
    def image_folders(self, part: str) -> list[Path]:
        """The folders that may hold a part's images, the official one first."""

    @abstractmethod
    def image_places(self, images_file: Path) -> dict[str, str]:
        """Image name -> path relative to a folder of images, from a list of a split's images."""

    @abstractmethod
    def queries(self, queries_file: Path, split: str) -> Iterable[tuple[str, Triplet]]:
        """Read the queries of a file, in order: what an error calls each, and the query.

        Raises:
            UserError: the file is missing or malformed; it names the entry and the field.
        """

    def caption(self, captions: tuple[str, ...]) -> str:
        """The text of a query at evaluation."""
        return captions[0]

    def evaluation_texts(self, captions: tuple[str, ...]) -> list[str]:
        """Return what protocols ask a query with: a text for each of `texts`."""
        return [self.caption(captions)]

    def caption_variants(self, captions: tuple[str, ...]) -> list[str]:
        """The texts of a triplet in training, equally likely; as many for every triplet."""
        return [self.caption(captions)]

    def score(self, ranks: Ranks) -> dict[str, float]:
        """The scores of one split's queries, of all that some of them count for."""
        return self.scores(self.hits(ranks))

    def scores(self, hits: "Mapping[str, np.ndarray]") -> dict[str, float]:
        """The scores that hits make, see `score`."""
        scores = {name: self.statistics.get(name, percentage)(hits[name]) for name in hits}
        return {name: score for name, score in scores.items() if not math.isnan(score)}

    @abstractmethod
    def hits(self, ranks: Ranks) -> "dict[str, np.ndarray]":
        """Score -> what each query of a split adds to it, (Q,): a recall true or false, a precision 0 to 1.

        What one of `statistics` takes may be any number. NaN of a query that does not count, see `metrics.only`.
        """

    def summary(self, scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """All metrics, by the names of the CSV files, from the scores of each split: those of the only one.

        What selects checkpoints is made of recalls that are named there, so that one more recall in `hits` changes
        what is reported and nothing that is selected.
        """
        (of_split,) = scores.values()
        return dict(of_split)


def official_files(folder: Path, part: str, split: str) -> tuple[Path, Path]:
    """The files of a split's captions and of its list of images, as FashionIQ and CIRR call them."""
    captions = folder / "captions" / f"cap.{part}.{split}.json"
    images = folder / "image_splits" / f"split.{part}.{split}.json"
    return captions, images
