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

    A benchmark with one gallery and a JSON list of queries must define its names, `folder`, `files`, `image_folders`,
    `image_places`, `queries` and `hits`; everything else has a default for this simplest case.

    Attributes:
        name: value of `--dataset`.
        run_name: name in the names of run folders.
        folder: folder of the benchmark's files, below the data root.
        remedy: remedy in error messages about these files.
        parts: parts with their own files and gallery, such as categories; ("all",) if the files are not divided.
        train_split, val_split, test_split: names of the splits in the files; None for a split that does not exist.
        official: "{part}.{split}" -> number of triplets and of images in the official files; empty if there are none.
        official_wordless: queries in the official files that have a caption without words, named as in reports.
        counts_explained: explanation of official counts that seem wrong; "" if none is needed.
        id_name: name of a query's id in the files.
        references_apart: whether a reference at evaluation may be in no gallery; its name is then its path.
        background: background of transparent images unless a flag sets it, one of BACKGROUNDS.
        concept_template: query of protocols with the concept, containing {shared_concept} and {relative_caption}; ""
            for a benchmark without concepts.
        negatives_from: source of the hard negatives of training triplets, one of HARD_NEGATIVES; mined negatives are
            not read from files.
        protocols: protocols for evaluation, the original implementation's first.
        reported: metric -> its description, in the order of the tables. A metric that is not listed is a percentage.
        statistics: score -> function that computes it from the hits of a split; other scores are mean hits in percent.
        selection, titles: metrics in `reported` -> suffix of their checkpoints, and their titles in tables; see
            `Metric`.
        hyper_parameters: values that runs of the original implementation record in addition to the flags.

    Args:
        data_root: folder that contains `folder`.
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
        """Derive `selection` and `titles` from `reported`."""
        super().__init_subclass__()
        cls.selection = {name: m.checkpoint for name, m in cls.reported.items() if m.checkpoint}
        cls.titles = {name: m.title for name, m in cls.reported.items() if m.title}

    def __init__(self, data_root: Path, excluded: Collection[str] = ()) -> None:
        self.data_root = data_root
        self.excluded = excluded

    @property
    def texts(self) -> tuple[str, ...]:
        """Return the query texts that the protocols use, see `Protocol.text`."""
        return tuple(dict.fromkeys(protocol.text for protocol in self.protocols))

    @property
    def splits(self) -> dict[str, str]:
        """Return the existing splits: "train", "val" or "test" -> its name in the files."""
        all_three = {"train": self.train_split, "val": self.val_split, "test": self.test_split}
        return {split: called for split, called in all_three.items() if called is not None}

    def split_called(self, split: str) -> str:
        """Return the name of "train", "val" or "test" in the files. Raises UserError if the split does not exist."""
        if split not in self.splits:
            raise UserError(
                f"--dataset {self.name} has no {split} split, only {' and '.join(self.splits)}: choose another "
                "benchmark"
            )
        return self.splits[split]

    def train(self) -> Split:
        """Return the training triplets of all parts and their images, with a triplet for each target of a query.

        Raises:
            UserError: there is no training split, hard negatives are missing, or see `read`.
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
                f"--hard-negatives-from {self.negatives_from}: no training triplet of {self.name} has such "
                f"negatives: choose {MINED}, or see docs/recipe.md"
            )
        return Split(
            name="train",
            triplets=triplets,
            image_paths={name: paths[name] for name in used},  # keeps the order of first use
            excluded_images=tuple(dict.fromkeys(excluded_images)),
            excluded_triplets=excluded_triplets,
        )

    def _negatives(self, triplet: Triplet) -> tuple[str, ...]:
        """Return the hard negatives in a query's group or file, except its reference and targets."""
        named = {"group": triplet.group, "column": triplet.negatives}.get(self.negatives_from, ())
        return tuple(name for name in named if name not in triplet.images)

    def val(self) -> list[Split]:
        """Return the validation splits, each with its complete gallery."""
        return self.read(self.val_split)

    def test(self) -> list[Split]:
        """Return the test splits, whose targets are not public."""
        return self.read(self.split_called("test"))

    def read(self, split: str) -> list[Split]:
        """Return the parts of a split, each with all images of its list, without excluded images.

        Raises:
            UserError: a file is missing or malformed, or exclusions leave no triplets.
        """
        return [self.read_part(part, split) for part in self.parts]

    def annotation_folder(self) -> Path:
        """Return the folder of the benchmark's files."""
        return self.data_root / self.folder

    def read_part(self, part: str, split: str) -> Split:
        """Return one part of a split, see `read`."""
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
                    f"{where}: its {self.id_name} {own} is already used by {first_with[own]}"
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
                f"--exclusions excludes all triplets of {queries_file}: exclude fewer images"
            )
        return remaining

    def _faults(
        self, triplet: Triplet, split: str, known: Spellings, images_file: Path
    ) -> list[str]:
        """Return the problems of a query that involve several fields."""
        faults = []
        apart = self.references_apart and split != self.train_split
        in_gallery = triplet.targets if apart else triplet.images
        for name in (*in_gallery, *triplet.group, *triplet.negatives):
            if name not in known.names:
                faults.append(f"the image {name} is not in {images_file}{known.hint(name)}")
        if split != self.train_split and triplet.reference in triplet.targets:
            faults.append("its target is also its reference")
        if len(set(triplet.targets)) < len(triplet.targets):
            faults.append("a target is listed twice")
        if not set(triplet.negatives).isdisjoint(triplet.targets):
            faults.append("a target is among its negatives")
        if triplet.group and not set(triplet.images[:2]) <= set(triplet.group):
            faults.append("its group lacks its reference or target")
        return faults

    def metrics(
        self, splits: Iterable[Split], rankings: Mapping[str, "Ranking"]
    ) -> dict[str, float]:
        """Return all metrics, named as in the CSV files, of validation splits that were ranked under one protocol."""
        scores = {}
        for split in splits:
            scores[split.name] = self.score(rankings[split.name].ranks_in(split))
        return self.summary(scores)

    def titled(self, metrics: Collection[str]) -> dict[str, str]:
        """Return metric -> title in a table, for the given metrics that have a title."""
        return {metric: title for metric, title in self.titles.items() if metric in metrics}

    def titles_in(self, splits: Iterable[Split]) -> dict[str, str]:
        """Return metric -> title in a table, for the metrics that these splits have, with or without groups."""
        scores = {split.name: self._score_all(split, 0, others=0, in_group=0) for split in splits}
        return self.titled(self.summary(scores))

    def certain(self, splits: Iterable[Split], protocol: Protocol) -> dict[str, list[str]]:
        """Return split's name -> scores that are always 100, because the k of a recall covers all images."""
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
        """Return the scores of a split if all queries have the same ranks.

        Args:
            named: rank of the annotated target.
            others: rank of the other targets.
            in_group: rank of the annotated target in the group.
        """
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
        """Log one line with the scores that are always 100 for these splits and protocols, if there are any."""
        found = []
        for protocol in protocols:
            for split, names in self.certain(splits, protocol).items():
                if names:
                    found.append(f"{', '.join(names)} of {split} under {protocol.name}")
        if found:
            reason = "they count at least as many results as there are candidates"
            logger.warning(
                "note: these scores are always 100, because %s: %s", reason, "; ".join(found)
            )

    @classmethod
    def best_clips(cls) -> dict[str, str]:
        """Return metric -> name of stage 1's checkpoint with its best value."""
        return {metric: f"tuned_clip_{suffix}" for metric, suffix in cls.selection.items()}

    @classmethod
    def best_combiners(cls) -> dict[str, str]:
        """Return metric -> name of stage 2's checkpoint with its best value; a single checkpoint needs no suffix."""
        if len(cls.selection) == 1:
            return dict.fromkeys(cls.selection, "combiner")
        return {metric: f"combiner_{suffix}" for metric, suffix in cls.selection.items()}

    def part_names(self, split: str) -> list[str]:
        """Return the names of the parts of a split."""
        return [self.part_name(part, split) for part in self.parts]

    def part_name(self, part: str, split: str) -> str:
        """Return the name of a part of a split; if it is the only part, the name of the split."""
        return part if len(self.parts) > 1 else split

    @abstractmethod
    def files(self, part: str, split: str) -> tuple[Path, Path]:
        """Return the file of a split's queries and the file with its list of images, which may be the same file."""

    @abstractmethod
    def image_folders(self, part: str) -> list[Path]:
        """Return the folders that may contain a part's images, the official folder first."""

    @abstractmethod
    def image_places(self, images_file: Path) -> dict[str, str]:
        """Return image name -> path relative to a folder of images, from a split's list of images."""

    @abstractmethod
    def queries(self, queries_file: Path, split: str) -> Iterable[tuple[str, Triplet]]:
        """Read the queries of a file, in order: the name of each one in error messages, and the query.

        Raises:
            UserError: the file is missing or malformed; the message contains the entry and the field.
        """

    def caption(self, captions: tuple[str, ...]) -> str:
        """Return the text of a query at evaluation."""
        return captions[0]

    def evaluation_texts(self, captions: tuple[str, ...]) -> list[str]:
        """Return the query texts at evaluation, one for each of `texts`."""
        return [self.caption(captions)]

    def caption_variants(self, captions: tuple[str, ...]) -> list[str]:
        """Return the texts of a triplet in training, which are equally likely; all triplets have equally many."""
        return [self.caption(captions)]

    def score(self, ranks: Ranks) -> dict[str, float]:
        """Return the scores of one split, without scores for which no query counts."""
        return self.scores(self.hits(ranks))

    def scores(self, hits: "Mapping[str, np.ndarray]") -> dict[str, float]:
        """Return the scores computed from hits, see `score`."""
        scores = {name: self.statistics.get(name, percentage)(hits[name]) for name in hits}
        return {name: score for name, score in scores.items() if not math.isnan(score)}

    @abstractmethod
    def hits(self, ranks: Ranks) -> "dict[str, np.ndarray]":
        """Return score -> each query's contribution to it (Q,): a boolean for a recall, 0 to 1 for a precision.

        Contributions to a score in `statistics` may be any numbers. NaN marks queries that do not count, see
        `metrics.only`.
        """

    def summary(self, scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Return all metrics, named as in the CSV files, from the scores of each split.

        By default, these are the scores of the only split. Metrics that select checkpoints use only recalls listed
        by name, so that adding a recall to `hits` changes the reports but not the selection.
        """
        (of_split,) = scores.values()
        return dict(of_split)


def by_part(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the scores of all parts, named after part and score."""
    metrics = {}
    for part, of_part in scores.items():
        metrics.update({f"{part}_{name}": value for name, value in of_part.items()})
    return metrics


def official_files(folder: Path, part: str, split: str) -> tuple[Path, Path]:
    """Return the files of a split's captions and of its list of images, as FashionIQ and CIRR name them."""
    captions = folder / "captions" / f"cap.{part}.{split}.json"
    images = folder / "image_splits" / f"split.{part}.{split}.json"
    return captions, images
