"""Define the interface of a store of features for search and update, and list the stores.

To add a store, write a module in this folder with a subclass of `VectorStore`, and add its name to STORES.
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
# Scheme of an address, which is the name of a module in this folder -> the class in it, imported when it is needed.
STORES = {FAISS: "FaissStore", "milvus": "MilvusStore"}
TIME = "time"  # default method to detect changed images, see `runtime.files.stamp`
TEMPORARY = r"\..*\.tmp"  # names of incomplete files


class QueryError(UserError):
    """Error for an invalid query or an invalid image in it, which the sender of the query can correct.

    Users of the page see its message. Any other UserError is shown only to the operator of the server, because its
    message contains paths and addresses.

    Attributes:
        public_message: message for users, without paths and addresses of the machine.
    """

    def __init__(self, message: object, public_message: str | None = None) -> None:
        super().__init__(message)
        self.public_message = printable(message if public_message is None else public_message)


class Hit(NamedTuple):
    """An image that a search found, with its cosine similarity to the query."""

    row: int
    path: Path
    similarity: float


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """Settings of the storage of features.

    Attributes:
        store: address of the store, see `VectorStore`.
        kind: type of the vector index.
        on_disk: whether FAISS keeps its lists in a file instead of memory.
        typed: whether a flag gives the store; False if only the index refers to it.
        told_by: method to detect changed images, see `runtime.files.stamp`.
    """

    store: str = FAISS
    kind: str = "flat"
    on_disk: bool = False
    typed: bool = False
    told_by: str = TIME


@dataclass(frozen=True, kw_only=True)
class ImageIndex(ABC):
    """An index opened for search. A row is an image's number; it does not change until the next update.

    Attributes:
        folder: folder that contains the manifest.
        about: the manifest.
    """

    folder: Path
    about: dict[str, Any]

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abstractmethod
    def row(self, path: str) -> int | None:
        """Return the row of an image file with an absolute path; None if it is not in the index."""

    @abstractmethod
    def file(self, row: int) -> Identity | None:
        """Return the identity that the file of a row had when it was encoded; None if the row does not exist."""

    @abstractmethod
    def features_of(self, row: int) -> "np.ndarray":
        """Return the unnormalised features (1, D) of a row."""

    @abstractmethod
    def some(self, count: int) -> list[int]:
        """Return a number of random rows, or all rows if there are fewer."""

    @abstractmethod
    def search(self, queries: "np.ndarray", k: int, condition: str = "") -> list[list[Hit]]:
        """Return the k nearest images of each normalised query (Q, D), ties by the path at which they were first found.

        Args:
            condition: condition on the images, in the store's own language.

        Raises:
            QueryError: the condition is invalid.
            UserError: the store cannot be reached.
        """


@dataclass
class IndexWriter(ABC):
    """Writer of the features of an update.

    All processes call `keep`; only one process calls the other methods, beginning with `open`.

    Attributes:
        key: settings, besides the images, on which features depend, see `image_index.encoder_key`.
        dim: dimension of the features; 0 to use the dimension of the index.
        origin: fields of the manifest that describe the sources of the images and the encoder.
        sources: file -> file from which its features were copied.
    """

    folder: Path
    key: dict[str, Any]
    dim: int
    keeping: Keeping = field(kw_only=True)
    origin: dict[str, Any] = field(kw_only=True)
    sources: dict[Identity, Identity] = field(init=False, default_factory=dict)

    @abstractmethod
    def open(self) -> None:
        """Open the index, or prepare a new one. Raises UserError if it is damaged or has another encoder."""

    @abstractmethod
    def held(self) -> Mapping[Identity, int]:
        """Map each file that has features to the digest of its content, see `image_index.content_of`."""

    @abstractmethod
    def keep(
        self, files: Sequence[Identity], features: "np.ndarray", contents: Sequence[int]
    ) -> None:
        """Store the features (n, D) of files; they are on disk when this method returns.

        Args:
            contents: digests of the files' contents.
        """

    @abstractmethod
    def carry(self, sources: Mapping[Identity, Identity]) -> None:
        """Copy the features and content digests of stored files to other files."""

    @abstractmethod
    def publish(self, files: Sequence[Identity], about: dict[str, Any]) -> "Counts":
        """Publish an index of exactly these files for searches.

        Args:
            about: fields of the manifest that do not depend on the store.
        """


class Counts(NamedTuple):
    """Numbers of images that an update added to an index, kept in it, and removed from it.

    Attributes:
        moved: number of kept images that had another path before.
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
    """Count the images that an update added, kept, removed and moved.

    Args:
        sources: file -> file from which its features were copied.
    """
    gone = set(before).difference(now)
    new = set(now).difference(before)
    kept = len(set(now)) - len(new)
    origins = {sources[file]: file for file in new if sources.get(file) in gone}
    moved = sum(source[0] != file[0] for source, file in origins.items())
    found = len(origins)
    return Counts(len(new) - found, kept + found, len(gone) - found, moved)


class VectorStore:
    """A type of store for features. It has no state: an address such as "milvus:FILE.db" identifies a store.

    Attributes:
        addresses: forms of address that flags accept, for messages.
        kinds: types of vector index; the first one is the default.
        filters: whether a search supports conditions.
        verifies: whether changed images can be detected by content; if not, only by size and time.
        manifest: schema of an index's manifest.
        writer: class that updates an index.
        files: pattern for the names of the store's files in the index's folder, besides the manifest.
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
        """Return an address from a flag in the form of the manifest. Raises ArgumentTypeError if it is invalid."""
        if not text.partition(":")[2]:
            raise no_store(text)
        return text

    @staticmethod
    def require() -> Any:
        """Raise UserError if a package that the store needs is not installed."""

    @staticmethod
    def check(kind: str, count: int, dim: int) -> None:
        """Raise UserError if an index of a kind cannot be built for a number of vectors of a dimension."""

    @classmethod
    def open(cls, folder: Path, about: dict[str, Any], *, typed: bool = False) -> ImageIndex:
        """Open an index for searches.

        Args:
            about: manifest of the index.
            typed: whether a flag gives the store; if not, secrets are sent only if `manifest.is_own` allows it.

        Raises:
            UserError: the store cannot be reached, or the index is damaged or does not match the manifest.
        """
        raise NotImplementedError


def check_features(files: Sequence[Identity], features: "np.ndarray", dim: int) -> None:
    """Raise UserError unless every file has features that can be ranked, float32 of the right dimension."""
    import numpy as np
    import torch

    from models.encoder import check_lengths

    if features.dtype != np.float32 or features.shape != (len(files), dim):
        raise UserError(f"features are {features.dtype} of shape {features.shape}: encode again")
    ends = np.stack([features.min(axis=1), features.max(axis=1)])  # NaN propagates
    rows = np.flatnonzero(~np.isfinite(ends).all(axis=0))
    if len(rows):
        remedy = "choose --encode-precision fp32, or another folder for the index"
        raise UserError(f"the features of {files[rows[0]][0]} are not finite: {remedy}")
    check_lengths(torch.from_numpy(features), [file[0] for file in files])


def store_of(address: str) -> type[VectorStore]:
    """Return the class of the store at an address."""
    scheme = address.partition(":")[0]
    module = importlib.import_module(f"image_search.stores.{scheme}")
    found: type[VectorStore] = getattr(module, STORES[scheme])
    return found


def all_stores() -> list[type[VectorStore]]:
    """Return the classes of all stores."""
    return [store_of(scheme) for scheme in STORES]


def all_addresses() -> str:
    """Return the forms of address that flags accept, as text."""
    *others, last = [address for store in all_stores() for address in store.addresses]
    return f"{', '.join(others)} or {last}"


def no_store(text: str) -> argparse.ArgumentTypeError:
    """Return the error for a string that is not a store address."""
    return refused(text, f"is not a store: choose {all_addresses()}")


def store_address(text: str) -> str:
    """Return an address from a flag in the form of the manifest. Raises ArgumentTypeError if it is invalid."""
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
    """Return the storage settings of an index: from flags, else from its manifest, else the defaults.

    Args:
        earlier: manifest of the index; empty for a new index.
        store: address in a flag; None without the flag.
        kind: type of the vector index in a flag; None without the flag.
        verify: whether to detect changed images by all of their bytes.

    Raises:
        UserError: the index is in another store, or the store does not support the kind or `verify`.
    """
    address = earlier.get("store", FAISS if earlier else store or FAISS)
    if store not in (None, address):
        raise UserError(
            f"--store {store}: this index is stored in {address}: remove --store, or choose another index"
        )
    chosen = store_of(address)
    kind = kind or earlier.get("kind", chosen.kinds[0])
    if kind not in chosen.kinds:
        raise UserError(
            f"--index-type {kind} is not supported by --store {address}: choose {' or '.join(chosen.kinds)}"
        )
    if on_disk is None:
        on_disk = kind == "ivfpq" and "lists" in earlier
    if on_disk and kind != "ivfpq":
        raise UserError(
            f"--on-disk needs --index-type ivfpq, not {kind}: remove --on-disk, or choose ivfpq"
        )
    if verify and not chosen.verifies:
        raise UserError(
            f"--verify: --store {address} detects changed images only by size and time: remove --verify"
        )
    told_by = TIME
    if chosen.verifies:
        told_by = "content" if verify else earlier.get("told_by", "sample")
    return Keeping(
        store=address,
        kind=kind,
        on_disk=on_disk,
        typed=store is not None,
        told_by=told_by,
    )
