"""What a search and an update ask of the place where features live: files with FAISS, or Milvus."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from runtime.choices import INDEX_KINDS, MILVUS_KINDS
from runtime.files import Identity
from utils import UserError, printable

FAISS = "faiss"
TIME = "time"  # how images are told where nothing else is said, see `runtime.files.stamp`
# Kinds of vectors by the beginning of a store's address.
KINDS_OF = {FAISS: INDEX_KINDS, "milvus": MILVUS_KINDS}


class QuestionError(UserError):
    """A question that cannot be asked, or an image that cannot be asked with: its sender can put that right.

    The page tells it to visitors. Any other UserError is for who runs the page, since it names files and addresses.

    Attributes:
        told: what visitors are told, which names nothing of the machine.
    """

    def __init__(self, message: object, told: str | None = None) -> None:
        super().__init__(message)
        self.told = printable(message if told is None else told)


class Hit(NamedTuple):
    """An image that a search found, with its cosine similarity."""

    row: int
    path: Path
    similarity: float


class ImageIndex(Protocol):
    """Images that can be searched. A row is a number that stays an image's own until the next update.

    Attributes:
        folder: holds the manifest.
        about: the manifest.
    """

    @property
    def folder(self) -> Path: ...
    @property
    def about(self) -> dict[str, Any]: ...

    def __len__(self) -> int:
        """How many images there are."""

    def row(self, path: str) -> int | None:
        """The row of an image file by its absolute path."""

    def file(self, row: int) -> Identity | None:
        """The file of a row, as it was when it was encoded."""

    def features_of(self, row: int) -> np.ndarray:
        """Unnormalised features (1, D)."""

    def some(self, count: int) -> list[int]:
        """So many rows at random, or all there are."""

    def search(self, queries: np.ndarray, k: int, condition: str = "") -> list[list[Hit]]:
        """The k nearest images of each normalised query (Q, D), equally near ones by path.

        Args:
            condition: what images have to be, in the store's own language.

        Raises:
            QuestionError: the condition is none.
            UserError: the store cannot be asked.
        """


class Shelf(Protocol):
    """Where an update puts features. `keep` is called by all processes, the rest by one of them, `open` first."""

    def open(self) -> None:
        """See that it is as the last update left it, and of the same encoder. Raises UserError where it is not."""

    def held(self) -> Collection[Identity]:
        """The files whose features are there."""

    def keep(self, files: Sequence[Identity], features: np.ndarray) -> None:
        """Put features (n, D) there, on disk when this returns."""

    def publish(self, files: Sequence[Identity], about: dict[str, Any]) -> "Counts":
        """Let searches find these files and no others.

        Args:
            about: of the manifest, what does not depend on the store.
        """


class Counts(NamedTuple):
    """Images that searches find since a `publish`, found before too, and do not find any more."""

    added: int
    kept: int
    removed: int


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """How features are kept.

    Attributes:
        store: "faiss" or an address of Milvus.
        kind: of the vectors.
        on_disk: whether FAISS leaves its lists in a file.
        typed: whether a flag names the store, not the index alone.
        told_by: how a changed image is told, see `runtime.files.stamp`.
    """

    store: str = FAISS
    kind: str = "flat"
    on_disk: bool = False
    typed: bool = False
    told_by: str = TIME


def chosen_keeping(
    earlier: dict[str, Any],
    store: str | None,
    kind: str | None,
    on_disk: bool | None,
    *,
    verify: bool = False,
) -> Keeping:
    """How an index is to be kept: as flags say, and where they are silent as it was.

    Args:
        earlier: its manifest, empty for a new one.
        verify: tell changed images by all of their bytes.

    Raises:
        UserError: it lives elsewhere already, or the store has no such kind or knows nothing of content.
    """
    lives = earlier.get("store", FAISS if earlier else store or FAISS)
    if store not in (None, lives):
        raise UserError(
            f"--store {store}: this index lives in {lives}: leave the flag out, or name another index"
        )
    kind = kind or earlier.get("kind", "flat")
    kinds = KINDS_OF[lives.partition(":")[0]]
    if kind not in kinds:
        raise UserError(f"--index-type {kind}: --store {lives} has {', '.join(kinds)}: choose one")
    if on_disk is None:
        on_disk = kind == "ivfpq" and "lists" in earlier
    if on_disk and kind != "ivfpq":
        raise UserError(f"--on-disk is for --index-type ivfpq, not for {kind}: leave one out")
    if verify and lives != FAISS:
        raise UserError(
            f"--verify: --store {lives} tells changed images by size and time alone: leave it out"
        )
    return Keeping(
        store=lives,
        kind=kind,
        on_disk=on_disk,
        typed=store is not None,
        told_by=_told_by(earlier, lives, verify),
    )


def _told_by(earlier: dict[str, Any], lives: str, verify: bool) -> str:
    """How an index tells changed images: in Milvus by size and time alone."""
    if verify:
        return "content"
    return TIME if lives != FAISS else earlier.get("told_by", "sample")
