"""An index in Milvus: in the process with Milvus Lite, on a server or on a cluster, by one client.

INDEX/index.json says where. A row there is an image: its file, size and modification time, where it lies below the
folder that was indexed, and its unnormalised features. Its number follows from its file's name, so that what is
inserted again replaces itself. The collection's name ends with a digest of the encoder.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import random
import re
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import Field

from image_search.faiss_index import (
    CANDIDATES_PER_RESULT,
    LEAST_CANDIDATES,
    PROBED_SHARE,
    SEARCH_EFFORT,
    normalised,
)
from image_search.manifest import MANIFEST, REBUILD, is_own, read_manifest, write_manifest
from image_search.schemas import StoreManifest
from image_search.stores.base import (
    Counts,
    Hit,
    ImageIndex,
    IndexWriter,
    QueryError,
    VectorStore,
    check_features,
    counted,
)
from runtime import torchrun
from runtime.files import Identity
from settings.declaring import OneOf
from settings.flag_types import refused, usable_path
from utils import UserError, first_line

logger = logging.getLogger(__name__)

TOKEN = "MILVUS_TOKEN"  # of the environment: user:password, or a key
TIMEOUT = 60
# The client's own 10 seconds are too many pings for a server that nobody asks for a while: it hangs up.
SELDOM_PINGED = {"grpc.keepalive_time_ms": 600_000, "grpc.keepalive_permit_without_calls": False}
# What takes as long as the collection is large.
LASTING = ("create_index", "flush", "load_collection")
MOST_CANDIDATES = 16_384  # that Milvus gives at once; rows of a page too
AT_ONCE = 1024  # rows that are deleted or carried
LONGEST_TEXT = 65_535  # bytes of a text
HIGHEST_ROW = 2**63 - 1

LISTS = 1024  # of ivfflat
INDEX_TYPES = {"flat": "FLAT", "hnsw": "HNSW", "ivfflat": "IVF_FLAT"}
BUILT = {"flat": {}, "hnsw": {"M": 32, "efConstruction": 80}, "ivfflat": {"nlist": LISTS}}
FIELDS = ["file", "size", "time", "path", "content"]
CONDITION_FIELDS = ("path", "category", "size", "time")
COMPARISONS = ("and", "or", "not", "in", "like", "is", "null", "exists", "true", "false")
MATCHES = ("text_match", "phrase_match")
CONDITION_NAMES = {*CONDITION_FIELDS, *COMPARISONS, *MATCHES}
CONDITION = re.compile(
    r"""\s+|(?P<name>[A-Za-z_$][\w$]*)|"""
    r"""(?:0[xX][\da-fA-F]+|\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)(?![\w.])|"""
    r""""[^"\\\n]*"|'[^'\\\n]*'|[-+*%/<>=!&|^~(),\[\]]""",
    re.ASCII,
)
CONDITIONS = "conditions are over path, category, size and time"

Sliced = TypeVar("Sliced")


def import_pymilvus() -> Any:
    """pymilvus, which an index in Milvus needs."""
    try:
        import pymilvus
    except ImportError:
        raise UserError(
            "--store milvus:... needs pymilvus: pip install -r requirements-milvus.txt"
        ) from None
    # Errors are said in a line of our own.
    for name in ("pymilvus", "milvus_lite", "grpc._server", "faiss.loader"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return pymilvus


def row_of(path: str) -> int:
    """The row of an image file: 63 bits of a digest of its absolute path."""
    digest = hashlib.sha256(os.fsencode(path)).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def path_below(path: str, folders: Sequence[str]) -> str:
    """Return where an image file lies below the first folder that holds it; its name where none does.

    Conditions of the page's visitors are over it, so it tells nothing of what is above.
    """
    for folder in folders:
        if path.startswith(folder.rstrip("/") + "/"):
            return path[len(folder.rstrip("/")) + 1 :]
    return path.rpartition("/")[2]


def digest_of(key: dict[str, Any]) -> str:
    """Return what a collection's name says of its encoder."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]


def check_condition(condition: str) -> None:
    """Raise QueryError where a condition names anything but CONDITION_FIELDS: `file` is a path of the machine.

    Milvus alone knows whether the rest is its language. A text ends at its next quotation mark, so it holds none and
    no backslash: what is outside of it here is outside of it for Milvus.
    """
    place = 0
    while place < len(condition):
        found = CONDITION.match(condition, place)
        if found is None:
            said = f"it has a {condition[place]!r} that is not understood"
        elif found["name"] and found["name"].lower() not in CONDITION_NAMES:
            said = f"there is no {found['name']}"
        else:
            place = found.end()
            continue
        raise QueryError(f"--filter {condition}: {said}: {CONDITIONS}")


class Table:
    """A collection, asked one question at a time; every refusal is one line.

    Args:
        is_new: make the file of Milvus Lite where there is none, as an index does that is not whole yet.

    Raises:
        UserError: the store cannot be reached or opened.
    """

    def __init__(self, store: str, name: str, token: str, *, is_new: bool) -> None:
        self.name = name
        self.store = store
        self._milvus = import_pymilvus()
        address = store.partition(":")[2]
        if not address.startswith("http"):
            file = Path(address)
            is_there = any(file.iterdir()) if file.is_dir() else file.exists()
            if not (is_there or is_new):
                raise UserError(
                    f"{address} is missing, which holds the features of the index: put it back, or index into "
                    "another folder"
                )
            file.parent.mkdir(parents=True, exist_ok=True)
        with self._explained():
            self._client = self._milvus.MilvusClient(
                uri=address, token=token, timeout=TIMEOUT, grpc_options=SELDOM_PINGED
            )

    @contextlib.contextmanager
    def _explained(self, condition: str = "") -> Iterator[None]:
        try:
            yield
        except self._milvus.MilvusException as error:
            reason = str(error.message).strip().split("\n")[0][:160]
        except OSError as error:
            reason = first_line(error)[:160]
        else:
            return
        if condition and not self._is_lost():
            told = f"--filter {condition}: Milvus refuses it"
            raise QueryError(f"{told} ({reason}): {CONDITIONS}", f"{told}: {CONDITIONS}")
        raise UserError(
            f"--store {self.store}: {reason}: check that it is running, that no other process uses its file, and that "
            f"{TOKEN} is correct"
        )

    def _is_lost(self) -> bool:
        """Check whether the store no longer answers queries."""
        try:
            self._client.list_collections(timeout=TIMEOUT)
        except (self._milvus.MilvusException, OSError):
            return True
        return False

    def call(self, method: str, *, condition: str = "", **about: Any) -> Any:
        """Ask the client's method of that name about the collection.

        Args:
            condition: of the user, who is told where Milvus refuses it.
        """
        patience = None if method in LASTING else TIMEOUT
        with self._explained(condition):
            return getattr(self._client, method)(self.name, timeout=patience, **about)

    def exists(self) -> bool:
        """Return whether the collection is there."""
        return bool(self.call("has_collection"))

    def create(self, kind: str, dim: int) -> None:
        """Make the collection."""
        types = self._milvus.DataType
        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("row", types.INT64, is_primary=True)
        for name in ("file", "path", "category"):
            schema.add_field(name, types.VARCHAR, max_length=LONGEST_TEXT)
        for name in ("size", "time", "content"):
            schema.add_field(name, types.INT64)
        schema.add_field("features", types.FLOAT_VECTOR, dim=dim)
        params = self._index_params(kind)
        self.call(
            "create_collection", schema=schema, index_params=params, consistency_level="Strong"
        )

    def _index_params(self, kind: str) -> Any:
        params = self._client.prepare_index_params()
        params.add_index(
            "features", index_type=INDEX_TYPES[kind], metric_type="COSINE", params=BUILT[kind]
        )
        return params

    def load(self, kind: str) -> None:
        """Let the collection be searched, by an index of a kind."""
        about = self.call("describe_index", index_name="features")
        if (about or {}).get("index_type") != INDEX_TYPES[kind]:
            self.call("release_collection")
            if about:
                self.call("drop_index", index_name="features")
            self.call("create_index", index_params=self._index_params(kind))
        self.call("load_collection")

    def dim(self) -> int:
        """The length of a feature."""
        described = self.call("describe_collection")["fields"]
        (params,) = [field["params"] for field in described if field["name"] == "features"]
        return int(params["dim"])

    def rows(self) -> Iterator[dict[str, Any]]:
        """FIELDS of all rows."""
        with self._explained():
            pages = self._client.query_iterator(
                self.name, batch_size=MOST_CANDIDATES, output_fields=FIELDS, timeout=TIMEOUT
            )
            try:
                while page := pages.next():
                    yield from page
            finally:
                pages.close()


def _token(folder: Path, about: dict[str, Any], typed: bool) -> str:
    """The token of the environment, "" for an address that nobody typed here.

    Args:
        typed: whether a flag names the store.
    """
    token = os.environ.get(TOKEN, "")
    if not token or typed or is_own(folder, about):
        return token
    store = about["store"]
    logger.warning(
        "warning: %s was made on another machine: %s is not sent to %s unless you pass --store %s",
        folder / MANIFEST,
        TOKEN,
        store,
        store,
    )
    return ""


def _checked_table(folder: Path, about: dict[str, Any], typed: bool) -> Table:
    """The collection that a manifest names, if it is of its encoder."""
    name = about["collection"]
    if not name.endswith(f"_{digest_of(about['encoder'])}"):
        raise UserError(
            f"{folder / MANIFEST}: the collection {name} was made with another encoder than the manifest: {REBUILD}"
        )
    token = _token(folder, about, typed)
    return Table(about["store"], name, token, is_new="images" not in about)


class MilvusManifest(StoreManifest):
    """index.json of an index in Milvus."""

    store: Annotated[str, Field(pattern=r"^milvus:\S")]
    collection: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]
    kind: Annotated[str, OneOf(tuple(INDEX_TYPES))]


@dataclass(frozen=True, kw_only=True)
class MilvusImages(ImageIndex):
    """An index in Milvus that can be searched."""

    table: Table

    def __len__(self) -> int:
        return self.about["images"]

    def row(self, path: str) -> int | None:
        row = row_of(path)
        file = self.file(row)
        return row if file is not None and file[0] == path else None

    def file(self, row: int) -> Identity | None:
        if not 0 <= row <= HIGHEST_ROW:
            return None
        for found in self.table.call("get", ids=[row], output_fields=FIELDS):
            return _identity(found)
        return None

    def features_of(self, row: int) -> np.ndarray:
        found = self.table.call("get", ids=[row], output_fields=["features"])
        return np.array([found[0]["features"]], dtype=np.float32)

    def some(self, count: int) -> list[int]:
        # Rows are digests: those above a random one are a random choice.
        least = random.randrange(HIGHEST_ROW)
        rows: list[int] = []
        for condition in (f"row >= {least}", f"row < {least}"):
            if len(rows) < count:
                limit = min(count, MOST_CANDIDATES) - len(rows)
                found = self.table.call(
                    "query", filter=condition, limit=limit, output_fields=["row"]
                )
                rows += [one["row"] for one in found]
        return rows

    def search(self, queries: np.ndarray, k: int, condition: str = "") -> list[list[Hit]]:
        # Milvus proposes many, which are ranked exactly.
        check_condition(condition)
        if k > MOST_CANDIDATES:
            raise UserError(
                f"--k {k}: Milvus returns at most {MOST_CANDIDATES:,} results: choose fewer"
            )
        proposed = min(max(LEAST_CANDIDATES, CANDIDATES_PER_RESULT * k), MOST_CANDIDATES)
        effort = {"ef": max(SEARCH_EFFORT, proposed), "nprobe": round(LISTS * PROBED_SHARE)}
        wanted = {"hnsw": "ef", "ivfflat": "nprobe"}.get(self.about["kind"])
        proposals = self.table.call(
            "search",
            condition=condition,
            data=queries.tolist(),
            filter=condition,
            limit=proposed,
            output_fields=["file", "features"],
            search_params={"params": {wanted: effort[wanted]} if wanted else {}},
        )
        return [_ranked(found, query, k) for found, query in zip(proposals, queries, strict=True)]


def _ranked(found: Sequence[Mapping[str, Any]], query: np.ndarray, k: int) -> list[Hit]:
    """The k nearest of what Milvus proposes for a normalised query (D,), equally near ones by path."""
    if not found:
        return []
    found = sorted(found, key=lambda hit: hit["entity"]["file"])
    features = np.array([hit["entity"]["features"] for hit in found], dtype=np.float32)
    similarities = normalised(features) @ query
    hits = []
    for proposed in np.argsort(-similarities, kind="stable")[:k]:
        file = Path(found[proposed]["entity"]["file"])
        hits.append(Hit(found[proposed]["row"], file, float(similarities[proposed])))
    return hits


def _identity(row: dict[str, Any]) -> Identity:
    return row["file"], row["size"], row["time"]


@dataclass
class MilvusWriter(IndexWriter):
    """An index in Milvus that is brought up to date."""

    _found: dict[Identity, int] = field(init=False, default_factory=dict)
    _misplaced: set[Identity] = field(init=False, default_factory=set)  # for conditions

    def __post_init__(self) -> None:
        if "://" not in self.keeping.store and torchrun.launched():
            raise UserError(
                f"--store {self.keeping.store}: only one process can open the file: start milvus-lite server and "
                "pass its address, or run without torchrun"
            )

    def open(self) -> None:
        # Where the index will be is written first, so that an interrupted run is gone on with.
        about = read_manifest(self.folder)
        if about is None:
            about = {
                "store": self.keeping.store,
                "collection": _new_name(self.folder, self.key),
                "kind": self.keeping.kind,
                "encoder": self.key,
                **self.origin,
            }
            write_manifest(self.folder, about)
        table = self._table
        if not table.exists():
            if "images" in about:
                raise UserError(
                    f"--output {self.folder}: {about['store']} no longer has the collection {table.name}: choose "
                    f"another folder"
                )
            table.create(self.keeping.kind, self.dim)
        self.dim = table.dim()
        table.load(self.keeping.kind)

    @functools.cached_property
    def _table(self) -> Table:
        """The collection, which each process opens for itself."""
        about = read_manifest(self.folder) or {}
        return _checked_table(self.folder, about, self.keeping.typed)

    def held(self) -> Mapping[Identity, int]:
        for row in self._table.rows():
            file = _identity(row)
            self._found[file] = row["content"]
            if row["path"] != path_below(row["file"], self.origin["folders"]):
                self._misplaced.add(file)
        return self._found

    def keep(
        self, files: Sequence[Identity], features: np.ndarray, contents: Sequence[int]
    ) -> None:
        check_features(files, features, self.dim)
        rows = []
        for (path, size, time), values, content in zip(files, features, contents, strict=True):
            place = path_below(path, self.origin["folders"])
            row = {
                "row": row_of(path),
                "file": path,
                "path": place,
                "category": place.partition("/")[0] if "/" in place else "",
                "size": size,
                "time": time,
                "content": content,
                "features": values,
            }
            rows.append(row)
        self._table.call("upsert", data=rows)

    def carry(self, sources: Mapping[Identity, Identity]) -> None:
        # Rows that are replaced on the way are read before.
        self.sources.update(sources)
        pairs = [(file, row_of(source[0])) for file, source in sources.items()]
        replaced = {row_of(path) for path, _, _ in sources}
        ahead = self._read({row for _, row in pairs if row in replaced})
        for some in _parts(pairs):
            read = ahead | self._read({row for _, row in some} - ahead.keys())
            rows = [read[row] for _, row in some]
            features = np.array([row["features"] for row in rows], dtype=np.float32)
            contents = [row["content"] for row in rows]
            self.keep([file for file, _ in some], features, contents)

    def _read(self, rows: Collection[int]) -> dict[int, dict[str, Any]]:
        """Row -> its features and content."""
        fields = ["row", "content", "features"]
        read = {}
        for some in _parts(list(rows)):
            for found in self._table.call("get", ids=some, output_fields=fields):
                read[found["row"]] = found
        return read

    def publish(self, files: Sequence[Identity], about: dict[str, Any]) -> Counts:
        table = self._table
        self.carry({file: file for file in self._misplaced.intersection(files)})
        now = {path for path, _, _ in files}
        gone = [row_of(path) for path, _, _ in self._found if path not in now]
        for some in _parts(gone):
            table.call("delete", ids=some)
        counts = counted(self._found, files, self.sources)
        if counts.added or self.sources or gone:
            table.call("flush")
        earlier = read_manifest(self.folder) or {}
        changed = {**about, "kind": self.keeping.kind, "images": len(files)}
        write_manifest(self.folder, {**earlier, **changed})
        return counts


def _parts(rows: Sequence[Sliced]) -> Iterator[Sequence[Sliced]]:
    for start in range(0, len(rows), AT_ONCE):
        yield rows[start : start + AT_ONCE]


def _new_name(folder: Path, key: dict[str, Any]) -> str:
    """A collection's name: nobody else's, with the folder's name for people and the encoder's digest."""
    shown = re.sub(r"\W", "_", folder.resolve().name, flags=re.ASCII)[:60]
    return f"clip4cir_{shown}_{uuid.uuid4().hex[:12]}_{digest_of(key)}"


class MilvusStore(VectorStore):
    """A collection of Milvus, in a file by Milvus Lite or on a server."""

    addresses = ("milvus:FILE.db", "milvus:http://HOST:19530")
    kinds = tuple(INDEX_TYPES)
    filters = True
    manifest = MilvusManifest
    writer = MilvusWriter
    require = staticmethod(import_pymilvus)

    @classmethod
    def resolve(cls, text: str) -> str:
        """Return an address with a file's name made absolute. It is repeated in no message: a secret may be in it."""
        place = super().resolve(text).partition(":")[2]
        if re.match(r"https?://", place):
            if not re.fullmatch(r"https?://[^\s/@?#]+/?", place):
                raise refused(
                    "the address", f"is not just http://HOST:PORT: set a token in {TOKEN}"
                )
            return f"milvus:{place.rstrip('/')}"
        if not place.endswith(".db"):
            raise refused(text, "is not a file of Milvus Lite: choose a name that ends with .db")
        return f"milvus:{usable_path(place).resolve()}"

    @classmethod
    def open(cls, folder: Path, about: dict[str, Any], *, typed: bool = False) -> MilvusImages:
        """Open an index.

        Raises:
            UserError: Milvus cannot be reached or lacks the collection, or that is of another encoder.
        """
        table = _checked_table(folder, about, typed)
        if not table.exists():
            raise UserError(
                f"--index {folder}: {about['store']} has no collection {table.name}: index into another folder"
            )
        table.load(about["kind"])
        return MilvusImages(folder=folder, about=about, table=table)
