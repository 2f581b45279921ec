"""An index in Milvus: in this process with Milvus Lite, on a server, or on a cluster, all with the same client.

INDEX/index.json contains the address and the name of the collection. A row of the collection is an image: its file,
size and modification time, its path below the indexed folder, and its unnormalised features. The number of a row is
computed from the file's path, so inserting an image again replaces it. The collection's name ends with a digest of the
encoder.
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
from typing import Annotated, Any, ClassVar, TypeVar

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

TOKEN = "MILVUS_TOKEN"  # environment variable: user:password, or an API key
TIMEOUT = 60  # seconds
# The client's default, a ping every 10 seconds, makes an idle server close the connection.
SELDOM_PINGED = {"grpc.keepalive_time_ms": 600_000, "grpc.keepalive_permit_without_calls": False}
# Methods without a timeout, because their duration grows with the collection.
LASTING = ("create_index", "flush", "load_collection")
MOST_CANDIDATES = 16_384  # maximum number of rows that Milvus returns at once
AT_ONCE = 1024  # number of rows in a request that deletes or copies rows
LONGEST_TEXT = 65_535  # maximum bytes of a text field
HIGHEST_ROW = 2**63 - 1

LISTS = 1024  # number of lists of ivfflat
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
CONDITIONS = "conditions can use path, category, size and time"

Sliced = TypeVar("Sliced")


def import_pymilvus() -> Any:
    """Import pymilvus. Raises UserError if it is not installed."""
    try:
        import pymilvus
    except ImportError:
        raise UserError(
            "--store milvus:... needs pymilvus: pip install -r requirements-milvus.txt"
        ) from None
    # Errors are reported as UserError, not logged by these packages.
    for name in ("pymilvus", "milvus_lite", "grpc._server", "faiss.loader"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return pymilvus


def row_of(path: str) -> int:
    """Return the row of an image file: 63 bits of a digest of its absolute path."""
    digest = hashlib.sha256(os.fsencode(path)).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def path_below(path: str, folders: Sequence[str]) -> str:
    """Return the path of an image file below the first folder that contains it; its name if no folder does.

    Users of the page can search this path with conditions, so it does not contain the folders above.
    """
    for folder in folders:
        if path.startswith(folder.rstrip("/") + "/"):
            return path[len(folder.rstrip("/")) + 1 :]
    return path.rpartition("/")[2]


def digest_of(key: dict[str, Any]) -> str:
    """Return the digest of an encoder key that ends a collection's name."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]


def check_condition(condition: str) -> None:
    """Raise QueryError if a condition uses a field that is not in CONDITION_FIELDS: `file` is a path of the machine.

    Milvus checks the rest of the syntax. Strings may contain neither a backslash nor their own quotation mark, so that
    Milvus and this function agree about the ends of strings.
    """
    position = 0
    while position < len(condition):
        found = CONDITION.match(condition, position)
        if found is None:
            fault = f"it contains an unexpected {condition[position]!r}"
        elif found["name"] and found["name"].lower() not in CONDITION_NAMES:
            fault = f"there is no field {found['name']}"
        else:
            position = found.end()
            continue
        raise QueryError(f"--filter {condition}: {fault}: {CONDITIONS}")


class Table:
    """A Milvus collection; its errors are converted to one-line UserErrors.

    Args:
        is_new: whether to create the Milvus Lite file if it is missing, as for an incomplete index.

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
                    f"{address}, which contains the features of the index, is missing: restore it, or create the "
                    "index in another folder"
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
            fault = f"--filter {condition}: Milvus rejects it"
            raise QueryError(f"{fault} ({reason}): {CONDITIONS}", f"{fault}: {CONDITIONS}")
        raise UserError(
            f"--store {self.store}: {reason}: check that it is running, that no other process uses its file, and that "
            f"{TOKEN} is correct"
        )

    def _is_lost(self) -> bool:
        """Check whether the store no longer responds."""
        try:
            self._client.list_collections(timeout=TIMEOUT)
        except (self._milvus.MilvusException, OSError):
            return True
        return False

    def call(self, method: str, *, condition: str = "", **about: Any) -> Any:
        """Call a method of the client with the collection's name.

        Args:
            condition: condition of the user, who gets an error message if Milvus rejects it.
        """
        patience = None if method in LASTING else TIMEOUT
        with self._explained(condition):
            return getattr(self._client, method)(self.name, timeout=patience, **about)

    def exists(self) -> bool:
        """Return whether the collection exists."""
        return bool(self.call("has_collection"))

    def create(self, kind: str, dim: int) -> None:
        """Create the collection."""
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
        """Load the collection for search, and build its index again if it is of another kind."""
        about = self.call("describe_index", index_name="features")
        if (about or {}).get("index_type") != INDEX_TYPES[kind]:
            self.call("release_collection")
            if about:
                self.call("drop_index", index_name="features")
            self.call("create_index", index_params=self._index_params(kind))
        self.call("load_collection")

    def dim(self) -> int:
        """Return the dimension of the features."""
        described = self.call("describe_collection")["fields"]
        (params,) = [field["params"] for field in described if field["name"] == "features"]
        return int(params["dim"])

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the FIELDS of all rows."""
        with self._explained():
            pages = self._client.query_iterator(
                self.name, batch_size=MOST_CANDIDATES, output_fields=FIELDS, timeout=TIMEOUT
            )
            try:
                while page := pages.next():
                    yield from page
            finally:
                pages.close()


def _checked_table(folder: Path, about: dict[str, Any], typed: bool) -> Table:
    """Return the collection of a manifest. Raises UserError if it was made with another encoder.

    Args:
        typed: whether a flag gives the store; if not, and it is only in an index from another machine, no token is
            sent to it.
    """
    store, name = about["store"], about["collection"]
    if not name.endswith(f"_{digest_of(about['encoder'])}"):
        raise UserError(
            f"{folder / MANIFEST}: the collection {name} was made with a different encoder than the manifest: {REBUILD}"
        )
    token = os.environ.get(TOKEN, "")
    if token and not typed and not is_own(folder, about):
        token = ""
        logger.warning(
            "warning: %s was made on another machine: %s is not sent to %s unless you pass --store %s",
            folder / MANIFEST,
            TOKEN,
            store,
            store,
        )
    return Table(store, name, token, is_new="images" not in about)


class MilvusManifest(StoreManifest):
    """index.json of an index in Milvus."""

    store: Annotated[str, Field(pattern=r"^milvus:\S")]
    collection: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]
    kind: Annotated[str, OneOf(tuple(INDEX_TYPES))]


@dataclass(frozen=True, kw_only=True)
class MilvusImages(ImageIndex):
    """An index in Milvus, opened for search."""

    is_remote: ClassVar[bool] = True
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
        # Row numbers are digests, so the rows after a random number are a random sample.
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
        # Milvus proposes candidates, which are then ranked by exact similarity.
        check_condition(condition)
        if k > MOST_CANDIDATES:
            raise UserError(
                f"--k {k}: Milvus returns at most {MOST_CANDIDATES:,} results: choose a smaller --k"
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
    """Return the k nearest of Milvus's candidates for a normalised query (D,), ties by path."""
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
    """Writer of an index in Milvus."""

    _found: dict[Identity, int] = field(init=False, default_factory=dict)
    # Files whose path for conditions has changed.
    _misplaced: set[Identity] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        if "://" not in self.keeping.store and torchrun.launched():
            raise UserError(
                f"--store {self.keeping.store}: only one process can open the file: start a milvus-lite server and "
                "pass its address, or run without torchrun"
            )

    def open(self) -> None:
        # The manifest is written first, so that an interrupted run can be resumed.
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
        """Return the collection; each process opens its own connection."""
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
            shown = path_below(path, self.origin["folders"])
            row = {
                "row": row_of(path),
                "file": path,
                "path": shown,
                "category": shown.partition("/")[0] if "/" in shown else "",
                "size": size,
                "time": time,
                "content": content,
                "features": values,
            }
            rows.append(row)
        self._table.call("upsert", data=rows)

    def carry(self, sources: Mapping[Identity, Identity]) -> None:
        # Rows that later upserts replace are read before the first upsert.
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
        """Return row -> its features and content digest."""
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
    """Return a unique name for a collection, with the folder's name for readability and the encoder's digest."""
    shown = re.sub(r"\W", "_", folder.resolve().name, flags=re.ASCII)[:60]
    return f"clip4cir_{shown}_{uuid.uuid4().hex[:12]}_{digest_of(key)}"


class MilvusStore(VectorStore):
    """Store of collections in Milvus, in a file with Milvus Lite or on a server."""

    addresses = ("milvus:FILE.db", "milvus:http://HOST:19530")
    kinds = tuple(INDEX_TYPES)
    filters = True
    manifest = MilvusManifest
    writer = MilvusWriter
    require = staticmethod(import_pymilvus)

    @classmethod
    def resolve(cls, text: str) -> str:
        """Return an address; a path becomes absolute. No message repeats an HTTP address: it may contain a secret."""
        location = super().resolve(text).partition(":")[2]
        if re.match(r"https?://", location):
            if not re.fullmatch(r"https?://[^\s/@?#]+/?", location):
                raise refused(
                    "the address", f"is not just http://HOST:PORT: set a token in {TOKEN}"
                )
            return f"milvus:{location.rstrip('/')}"
        if not location.endswith(".db"):
            raise refused(text, "is not a file of Milvus Lite: choose a name that ends with .db")
        return f"milvus:{usable_path(location).resolve()}"

    @classmethod
    def open(cls, folder: Path, about: dict[str, Any], *, typed: bool = False) -> MilvusImages:
        """Open an index.

        Raises:
            UserError: Milvus cannot be reached, or the collection is missing or was made with another encoder.
        """
        table = _checked_table(folder, about, typed)
        if not table.exists():
            raise UserError(
                f"--index {folder}: {about['store']} has no collection {table.name}: create the index in another folder"
            )
        table.load(about["kind"])
        return MilvusImages(folder=folder, about=about, table=table)
