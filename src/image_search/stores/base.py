"""Define the interface of a store of features for search and update, and list the stores.

A new store is a file here with a `VectorStore`, and its name in STORES.
"""

import argparse
import importlib
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from image_search.schemas import Manifest, StoreManifest
from runtime.files import Identity
from settings.flag_types import refused
from utils import UserError, printable

if TYPE_CHECKING:
    import numpy as np

FAISS = "faiss"
# How an address begins, which is the name of a file here -> the class in it, imported when it is asked for.
STORES = {FAISS: "FaissStore", "milvus": "MilvusStore"}
TIME = "time"  # how images are told where nothing else is said, see `runtime.files.stamp`
TEMPORARY = r"\..*\.tmp"  # files that are not whole yet


class QueryError(UserError):
    """A question that cannot be asked, or an image that cannot be asked with: its sender can put that right.

    The page tells it to visitors. Any other UserError is for who runs the page, since it names files and addresses.

    Attributes:
        told: what visitors are told, which names nothing of the machine.
    """

    def __init__(self, message: object, public_message: str | None = None) -> None:
        super().__init__(message)
        self.public_message = printable(message if public_message is None else public_message)


class Hit(NamedTuple):
    """An image that a search found, with its cosine similarity."""

    row: int
    path: Path
    similarity: float


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """Settings of the storage of features.

    Attributes:
        store: its address, see `VectorStore`.
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


@dataclass(frozen=True, kw_only=True)
class ImageIndex(ABC):
    """Images that can be searched. A row is a number that stays an image's own until the next update.

    Attributes:
        folder: holds the manifest.
        about: the manifest.
    """

    folder: Path
    about: dict[str, Any]

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abstractmethod
    def row(self, path: str) -> int | None:
        """The row of an image file by its absolute path."""

    @abstractmethod
    def file(self, row: int) -> Identity | None:
        """The file of a row, as it was when it was encoded."""

    @abstractmethod
    def features_of(self, row: int) -> "np.ndarray":
        """Unnormalised features (1, D)."""

    @abstractmethod
    def some(self, count: int) -> list[int]:
        """So many rows at random, or all there are."""

    @abstractmethod
    def search(self, queries: "np.ndarray", k: int, condition: str = "") -> list[list[Hit]]:
        """The k nearest images of each normalised query (Q, D), equally near ones by the path they were first found at.

        Args:
            condition: what images have to be, in the store's own language.

        Raises:
            QueryError: the condition is none.
            UserError: the store cannot be asked.
        """


@dataclass
class IndexWriter(ABC):
    """Writer of the features of an update. `keep` is called by all processes, the rest by one of them, `open` first.

    Attributes:
        key: what features depend on besides the images, see `image_index.encoder_key`.
        dim: the length of a feature; 0 for that of the index.
        origin: of the manifest, from where images and encoder are.
        sources: file -> the file whose features it was given.
    """

    folder: Path
    key: dict[str, Any]
    dim: int
    keeping: Keeping = field(kw_only=True)
    origin: dict[str, Any] = field(kw_only=True)
    sources: dict[Identity, Identity] = field(init=False, default_factory=dict)

    @abstractmethod
    def open(self) -> None:
        """See that it is as the last update left it, and of the same encoder. Raises UserError where it is not."""

    @abstractmethod
    def held(self) -> Mapping[Identity, int]:
        """The files whose features are there, and the content of each, see `image_index.content_of`."""

    @abstractmethod
    def keep(
        self, files: Sequence[Identity], features: "np.ndarray", contents: Sequence[int]
    ) -> None:
        """Put features (n, D) there, on disk when this returns.

        Args:
            contents: of the files.
        """

    @abstractmethod
    def carry(self, sources: Mapping[Identity, Identity]) -> None:
        """Give files the features of other files, which are there, and their content."""

    @abstractmethod
    def publish(self, files: Sequence[Identity], about: dict[str, Any]) -> "Counts":
        """Let searches find these files and no others.

        Args:
            about: of the manifest, what does not depend on the store.
        """


class Counts(NamedTuple):
    """Images that searches find since a `publish`, found before too, and do not find any more.

    Attributes:
        moved: how many of those that are kept had another path before.
    """

    added: int
    kept: int
    removed: int
    moved: int = 0


def counted(
    before: Collection[Identity],
    now: Collection[Identity],
    sources: Mapping[Identity, Identity],
) -> Counts:
    """Count what an update did to the files that searches find.

    Args:
        sources: file -> the file that its features are of, where it was not encoded.
    """
    gone = set(before).difference(now)
    new = set(now).difference(before)
    kept = len(set(now)) - len(new)
    origins = {sources[file]: file for file in new if sources.get(file) in gone}
    moved = sum(source[0] != file[0] for source, file in origins.items())
    found = len(origins)
    return Counts(len(new) - found, kept + found, len(gone) - found, moved)


class VectorStore:
    """A sort of place where features live. It keeps nothing itself: an address, as "milvus:FILE.db", says which place.

    Attributes:
        addresses: what flags may say, as people are told it.
        kinds: of vectors, the first of which is what an index has that asked for none.
        filters: whether a search takes conditions.
        verifies: whether images may be told by their bytes; if not, they are by size and time alone.
        manifest: the fields of an index's manifest.
        writer: what brings an index up to date.
        files: names of what it keeps in the index's folder besides the manifest.
    """

    addresses: ClassVar[tuple[str, ...]]
    kinds: ClassVar[tuple[str, ...]] = ("flat",)
    filters: ClassVar[bool] = False
    verifies: ClassVar[bool] = False
    manifest: ClassVar[type[Manifest]] = StoreManifest
    writer: ClassVar[type[IndexWriter]]
    files: ClassVar[re.Pattern[str]] = re.compile(TEMPORARY)

    @classmethod
    def resolve(cls, text: str) -> str:
        """Return an address that was typed as manifests have it. Raises ArgumentTypeError where it is none."""
        if not text.partition(":")[2]:
            raise no_store(text)
        return text

    @staticmethod
    def require() -> Any:
        """Raise UserError where a package that it needs is not installed."""

    @staticmethod
    def check(kind: str, count: int, dim: int) -> None:
        """Raise UserError where a kind cannot be made of so many vectors of a length."""

    @classmethod
    def open(cls, folder: Path, about: dict[str, Any], *, typed: bool = False) -> ImageIndex:
        """Open an index for searches.

        Args:
            about: its manifest.
            typed: whether a flag names the store; if not, secrets go only where `manifest.is_own` lets them.

        Raises:
            UserError: it cannot be reached, is damaged, or is not what the manifest says.
        """
        raise NotImplementedError


def check_features(files: Sequence[Identity], features: "np.ndarray", dim: int) -> None:
    """Raise UserError where there are no features of each file that can be ranked, in the type that an index holds."""
    import numpy as np
    import torch

    from models.encoder import check_lengths

    if features.dtype != np.float32 or features.shape != (len(files), dim):
        raise UserError(f"features are {features.dtype} of shape {features.shape}: encode again")
    ends = np.stack([features.min(axis=1), features.max(axis=1)])  # NaN comes through
    rows = np.flatnonzero(~np.isfinite(ends).all(axis=0))
    if len(rows):
        remedy = "choose --encode-precision fp32, or another folder for the index"
        raise UserError(f"the features of {files[rows[0]][0]} are not finite: {remedy}")
    check_lengths(torch.from_numpy(features), [file[0] for file in files])


def store_of(address: str) -> type[VectorStore]:
    """Return the store of an address."""
    scheme = address.partition(":")[0]
    module = importlib.import_module(f"image_search.stores.{scheme}")
    found: type[VectorStore] = getattr(module, STORES[scheme])
    return found


def all_stores() -> list[type[VectorStore]]:
    """Return the stores of the table."""
    return [store_of(scheme) for scheme in STORES]


def all_addresses() -> str:
    """Return what flags may say, in words."""
    *others, last = [address for store in all_stores() for address in store.addresses]
    return f"{', '.join(others)} or {last}"


def no_store(text: str) -> argparse.ArgumentTypeError:
    """Return what to raise for a text that is no address."""
    return refused(text, f"is not a store: choose {all_addresses()}")


def store_address(text: str) -> str:
    """Return an address that was typed as manifests have it. Raises ArgumentTypeError where it is none."""
    if text.partition(":")[0] not in STORES:
        raise no_store(text)
    return store_of(text).resolve(text)


def chosen_keeping(
    earlier: dict[str, Any],
    store: str | None,
    kind: str | None,
    on_disk: bool | None,
    *,
    verify: bool = False,
) -> Keeping:
    """Return how an index is to be kept: as flags say, and where they are silent as it was.

    Args:
        earlier: its manifest, empty for a new one.
        verify: tell changed images by all of their bytes.

    Raises:
        UserError: it lives elsewhere already, or the store has no such kind or knows nothing of content.
    """
    lives = earlier.get("store", FAISS if earlier else store or FAISS)
    if store not in (None, lives):
        raise UserError(
            f"--store {store}: this index is stored in {lives}: remove the flag, or choose another index"
        )
    place = store_of(lives)
    kind = kind or earlier.get("kind", place.kinds[0])
    if kind not in place.kinds:
        raise UserError(
            f"--index-type {kind} is not supported by --store {lives}: choose {' or '.join(place.kinds)}"
        )
    if on_disk is None:
        on_disk = kind == "ivfpq" and "lists" in earlier
    if on_disk and kind != "ivfpq":
        raise UserError(f"--on-disk is for --index-type ivfpq, not for {kind}: remove one of them")
    if verify and not place.verifies:
        raise UserError(
            f"--verify: --store {lives} detects changed images only by size and time: remove the flag"
        )
    told_by = TIME
    if place.verifies:
        told_by = "content" if verify else earlier.get("told_by", "sample")
    return Keeping(
        store=lives,
        kind=kind,
        on_disk=on_disk,
        typed=store is not None,
        told_by=told_by,
    )
