"""CIRR: its files, captions, protocol and metrics."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from benchmarks.base import Benchmark, official_files
from benchmarks.entries import Distinct, Entry, FromList, ImageName, Query, read_queries
from benchmarks.metrics import Metric, Ranks, means
from benchmarks.protocols import ORIGINAL_REMOVED
from benchmarks.splits import Triplet
from runtime.schema import read_checked

if TYPE_CHECKING:
    import numpy as np

RECALLS = (1, 5, 10, 50)
GROUP_RECALLS = (1, 2, 3)
# The seven recalls whose means select checkpoints. Reporting another recall does not change the selection.
SELECTING = (
    "group_recall_at1", "group_recall_at2", "group_recall_at3",
    "recall_at1", "recall_at5", "recall_at10", "recall_at50",
)  # fmt: skip


class CirrTrainQuery(Query):
    """An entry of `cap.rc2.train.json` without its group, which only hard negatives need."""

    pairid: int
    reference: ImageName
    caption: str
    target_hard: ImageName

    def triplet(self) -> Triplet:
        return Triplet(
            reference=self.reference,
            captions=(self.caption,),
            target=self.target_hard,
            pair_id=self.pairid,
        )


class CirrGroup(Entry):
    """Six similar images, including the query's reference and target."""

    members: Annotated[tuple[ImageName, ...], FromList, Field(min_length=6, max_length=6), Distinct]


class CirrTestQuery(Query):
    """An entry of `cap.rc2.test1.json`."""

    pairid: int
    reference: ImageName
    caption: str
    img_set: CirrGroup

    def triplet(self) -> Triplet:
        return Triplet(
            reference=self.reference,
            captions=(self.caption,),
            pair_id=self.pairid,
            group=self.img_set.members,
        )


class CirrQuery(CirrTestQuery):
    """An entry of `cap.rc2.val.json`, or of `cap.rc2.train.json` with its group."""

    target_hard: ImageName

    def triplet(self) -> Triplet:
        return replace(super().triplet(), target=self.target_hard)


class CirrExtended(Entry):
    """An entry of `cap.ext.rc2.{split}.json`: additional annotations of a pair, a text for each of four questions.

    A text that begins with a code in brackets contains no answer, such as "[cr1] Covered in query".
    """

    pairid: int
    caption_extend: dict[str, str]

    @property
    def texts(self) -> tuple[str, ...]:
        """Return the texts that contain an answer, in the order of the questions."""
        return tuple(text for text in self.caption_extend.values() if not text.startswith("["))


class CIRR(Benchmark):
    """CIRR rc2 (Liu et al., ICCV 2021): one gallery, from which a query's reference is removed; groups of six."""

    name = "CIRR"
    run_name = "cirr"
    folder = "cirr_dataset/cirr"
    parts = ("rc2",)
    test_split = "test1"
    official = {"rc2.train": (28225, 16939), "rc2.val": (4181, 2297), "rc2.test1": (4148, 2315)}
    official_wordless = ("pairid 27098",)  # its caption is a space
    id_name = "pairid"
    protocols = (ORIGINAL_REMOVED,)
    reported = {
        **{f"recall_at{k}": Metric(f"R@{k}") for k in RECALLS},
        **{f"group_recall_at{k}": Metric(f"R_subset@{k}") for k in GROUP_RECALLS},
        "mean(R@5+R_s@1)": Metric("mean(R@5+R_s@1)"),
        "arithmetic_mean": Metric(checkpoint="arithmetic"),
        "harmonic_mean": Metric(checkpoint="harmonic"),
        "geometric_mean": Metric(checkpoint="geometric"),
    }

    def files(self, part: str, split: str) -> tuple[Path, Path]:
        return official_files(self.annotation_folder(), part, split)

    def image_folders(self, part: str) -> list[Path]:
        root = self.data_root / "cirr_dataset"
        return [root, root / "img_raw", root / "images"]

    def image_places(self, images_file: Path) -> dict[str, str]:
        return read_checked(dict[ImageName, str], images_file, remedy=self.remedy)

    def queries(self, queries_file: Path, split: str) -> Iterator[tuple[str, Triplet]]:
        extended = {} if split == self.train_split else self._extended(split)
        others: dict[str | None, type[Query]] = {
            self.train_split: CirrQuery if self.negatives_from == "group" else CirrTrainQuery,
            self.test_split: CirrTestQuery,
        }
        schema = others.get(split, CirrQuery)
        for where, triplet in read_queries(schema, queries_file, remedy=self.remedy):
            yield where, replace(triplet, extended=extended.get(triplet.pair_id, ()))

    def _extended(self, split: str) -> dict[int | str | None, tuple[str, ...]]:
        """Return pairid -> the texts of its extended annotation; {} if the file does not exist."""
        file = self.annotation_folder() / "captions_ext" / f"cap.ext.rc2.{split}.json"
        if not file.exists():
            return {}
        entries = read_checked(list[CirrExtended], file, remedy=self.remedy)
        return {entry.pairid: entry.texts for entry in entries}

    def hits(self, ranks: Ranks) -> "dict[str, np.ndarray]":
        if ranks.in_group is None:
            raise ValueError("CIRR also needs ranks within the groups")
        hits = {f"group_recall_at{k}": ranks.in_group < k for k in GROUP_RECALLS}
        for k in RECALLS:
            hits[f"recall_at{k}"] = ranks.named < k
        return hits

    def summary(self, scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        (recalls,) = scores.values()
        headline = (recalls["recall_at5"] + recalls["group_recall_at1"]) / 2
        selecting = means([recalls[name] for name in SELECTING])
        return {**recalls, "mean(R@5+R_s@1)": headline, **selecting}
