"""An index in files, searched with FAISS: never half-written, and written and read in bounded memory.

INDEX/index.json lists the names of the other files. It is replaced after the new files are complete; then the previous
files are deleted. Until then, INDEX/partial/ contains the encoded features, so that an interrupted run can be resumed.
"""

import contextlib
import functools
import hashlib
import json
import logging
import random
import re
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, PositiveInt, Strict

from image_search import faiss_index, list_file
from image_search.manifest import MANIFEST, REBUILD, read_manifest, write_manifest
from image_search.schemas import Manifest
from image_search.stores.base import (
    FAISS,
    TEMPORARY,
    Counts,
    Hit,
    ImageIndex,
    IndexWriter,
    QueryError,
    VectorStore,
    check_features,
    counted,
    no_store,
)
from models.schemas import ABSENT, Count, Digest, PathText
from runtime.choices import TOLD_BY
from runtime.files import (
    Identity,
    discard,
    file_size,
    parse_json,
    write_text,
    written_whole,
)
from runtime.schema import Schema, checked
from settings.declaring import AnyText, OneOf
from utils import UserError, first_line

logger = logging.getLogger(__name__)

# Prefix of the name of an index's file -> its extension.
ENDINGS = {"files": "json", "features": "npy", "vectors": "faiss", "lists": "bin"}
# File names of the store, next to the manifest. All other files in that folder belong to the user.
INDEX_FILES = re.compile(
    rf"(files|features|vectors|lists)-[0-9a-f]{{12}}\.(json|npy|faiss|bin)|{TEMPORARY}"
)
PARTIAL = "partial"
VECTOR_KINDS = ("flat", "hnsw", "ivfpq")
OWN_SHARD = re.compile(rf"[0-9a-f]{{16}}\.pt|{TEMPORARY}")
EARLIER = -1  # shard number that stands for the published index

FeatureRows = Callable[[int, int], np.ndarray]  # features of the files from start to stop


class Recall(Schema):
    """Recall of an approximate index against exact search."""

    queries: Count
    k: Count
    recall: Annotated[float, Field(ge=0, le=1)]


class Digests(Schema):
    """SHA-256 of the complete list of files, and of some rows of the features."""

    files: Digest
    features: Digest


class FileSizes(Schema):
    """Sizes in bytes of the files that an update does not read."""

    vectors: PositiveInt
    lists: PositiveInt = ABSENT


class FilesManifest(Manifest):
    """index.json of an index in files."""

    files: Annotated[str, Field(pattern=r"^files-[0-9a-f]{12}\.json$")]
    features: Annotated[str, Field(pattern=r"^features-[0-9a-f]{12}\.npy$")]
    vectors: Annotated[str, Field(pattern=r"^vectors-[0-9a-f]{12}\.faiss$")]
    lists: Annotated[str, Field(pattern=r"^lists-[0-9a-f]{12}\.bin$")] = ABSENT
    kind: Annotated[str, OneOf(VECTOR_KINDS)]
    torch: AnyText = ABSENT
    sha256: Digests
    sizes: FileSizes
    told_by: Annotated[str, OneOf(TOLD_BY)] = ABSENT
    recall: Recall = Field(ABSENT, alias="recall against exact")


# JSON list of an image's `runtime.files.Identity` and its content digest, see `image_index.content_of`.
ListedFile = Annotated[
    tuple[PathText, Annotated[int, Field(ge=0)], int, Annotated[int, Field(ge=0)]],
    Strict(False),
]


class Files(Schema):
    """Content of files-*.json, which is the bare list."""

    files: list[ListedFile]


@dataclass(frozen=True, kw_only=True)
class FaissImages(ImageIndex):
    """An index in files, opened for search.

    Attributes:
        files: identities of the images, by row.
        features: unnormalised features (N, D), mapped into memory.
        vectors: FAISS index of the normalised features.
    """

    files: list[Identity]
    features: np.ndarray
    vectors: Any

    @functools.cached_property
    def _row_of(self) -> dict[str, int]:
        return {path: row for row, (path, _, _) in enumerate(self.files)}

    def __len__(self) -> int:
        return len(self.files)

    def row(self, path: str) -> int | None:
        return self._row_of.get(path)

    def file(self, row: int) -> Identity | None:
        return self.files[row] if 0 <= row < len(self.files) else None

    def features_of(self, row: int) -> np.ndarray:
        return np.array(self.features[row : row + 1])

    def some(self, count: int) -> list[int]:
        return random.sample(range(len(self)), min(count, len(self)))

    def search(self, queries: np.ndarray, k: int, condition: str = "") -> list[list[Hit]]:
        if condition:
            raise QueryError(
                "--filter is not supported by a file-based index: remove --filter, or create an index with --store "
                "milvus:..."
            )
        found = faiss_index.search(self.vectors, self.features, queries, k=k)
        hits = []
        for nearest in found:
            hits.append([Hit(row, Path(self.files[row][0]), near) for row, near in nearest])
        return hits


def _vectors(folder: Path, about: dict[str, Any], *, to_grow: bool = False) -> Any:
    """Read the FAISS index of a manifest."""
    if "lists" in about:
        return list_file.read(folder / about["vectors"], folder / about["lists"])
    return faiss_index.read(folder / about["vectors"], to_grow=to_grow)


def _damaged(file: Path, reason: str) -> UserError:
    return UserError(f"{file} is damaged or belongs to another index ({reason}): {REBUILD}")


def _files(folder: Path, about: dict[str, Any]) -> dict[Identity, int]:
    """Map the files of an index, in the order of the rows, to their content digests."""
    file = folder / about["files"]
    try:
        text = file.read_text(encoding="utf-8")
        content = parse_json(text)
    except (OSError, ValueError) as error:
        raise _damaged(file, first_line(error)) from None
    if about["sha256"]["files"] != _digest(text.encode()):
        raise _damaged(file, "it has changed since it was written")
    del text
    rows = checked(Files, {"files": content}, file=file, remedy=REBUILD).files
    return {row[:3]: row[3] for row in rows}


def _features(folder: Path, about: dict[str, Any], count: int) -> np.ndarray:
    """Map the features of an index into memory, and check their shape and some of their rows."""
    from runtime.tensors import mapped_array

    file = folder / about["features"]
    try:
        features = mapped_array(file)
    except ValueError as error:
        raise _damaged(file, first_line(error)) from None
    if features.dtype != np.float32 or features.ndim != 2 or 0 in features.shape:
        raise _damaged(file, f"it contains {features.dtype} of shape {features.shape}")
    if not np.isfinite(features[faiss_index.sampled_rows(len(features))]).all():
        raise _damaged(file, "it contains values that are not finite")
    if about["sha256"]["features"] != _digest_of_rows(features):
        raise _damaged(file, "its rows have changed since they were written")
    if not count == len(features) == about["images"]:
        raise _damaged(
            folder / MANIFEST,
            f"images is {about['images']}, but there are {count} files and {len(features)} features",
        )
    return features


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _digest_of_rows(features: np.ndarray) -> str:
    """Return the SHA-256 of the shape and some rows of features (N, D); hashing all rows could take a minute."""
    rows = np.ascontiguousarray(features[faiss_index.sampled_rows(len(features))])
    return _digest(str(features.shape).encode() + rows.tobytes())


def _sizes(folder: Path, about: dict[str, Any]) -> dict[str, int | None]:
    """Return the sizes in bytes of the files that an update does not read; None for a missing file."""
    return {name: file_size(folder / about[name]) for name in ("vectors", "lists") if name in about}


class FaissWriter(IndexWriter):
    """Writer of an index in files."""

    def open(self) -> None:
        # Of the features and vectors, only some rows and the file sizes are read.
        self._earlier = read_manifest(self.folder) or {}
        self._published: dict[Identity, int] = {}
        if not self._earlier:
            return
        self._published = _files(self.folder, self._earlier)
        features = _features(self.folder, self._earlier, len(self._published))
        self.dim = features.shape[1]
        for name, size in _sizes(self.folder, self._earlier).items():
            if size != self._earlier["sizes"].get(name):
                raise _damaged(self.folder / self._earlier[name], f"it has {size or 0} bytes")

    def held(self) -> Mapping[Identity, int]:
        # Location of a file's features: the number of a shard, or EARLIER, and the row in it.
        self._where = {file: (EARLIER, row) for row, file in enumerate(self._published)}
        self._contents = dict(self._published)
        self._shards = sorted(_partial(self.folder).glob("*.pt"))
        for number, shard in enumerate(self._shards):
            contents, _ = self._read(shard)
            self._contents.update(contents)
            for row, file in enumerate(contents):
                self._where[file] = (number, row)
        return self._contents

    def carry(self, sources: Mapping[Identity, Identity]) -> None:
        self.sources.update(sources)  # features are not copied until `publish`

    def keep(
        self, files: Sequence[Identity], features: np.ndarray, contents: Sequence[int]
    ) -> None:
        import torch

        from runtime.tensors import save_tensors

        check_features(files, features, self.dim)
        listed = [list(file) for file in files]
        name = _digest(json.dumps(listed).encode())[:16]
        content = {
            "key": json.dumps(self.key),
            "files": listed,
            "contents": list(contents),
            "features": torch.from_numpy(features),
        }
        save_tensors(_partial(self.folder) / f"{name}.pt", content)

    def _read(self, shard: Path) -> tuple[dict[Identity, int], np.ndarray]:
        """Read a shard of an interrupted run; nothing if it is damaged or was made with another encoder.

        Returns:
            file -> content digest, and the features in the same order.
        """
        from runtime.tensors import load_tensors

        try:
            content = load_tensors(shard)
            if content["key"] == json.dumps(self.key):
                files = [(str(path), int(size), int(time)) for path, size, time in content["files"]]
                features = content["features"].numpy()
                check_features(files, features, self.dim)
                return dict(zip(files, map(int, content["contents"]), strict=True)), features
        except (UserError, KeyError, ValueError, TypeError, AttributeError):
            logger.warning("%s is damaged: its images are encoded again", shard)
        return {}, np.empty((0, self.dim), np.float32)

    def publish(self, files: Sequence[Identity], about: dict[str, Any]) -> Counts:
        counts = counted(self._published, files, self.sources)
        kind, on_disk = self.keeping.kind, self.keeping.on_disk
        about = {**about, "encoder": self.key, "kind": kind}
        is_alike = (self._earlier.get("kind"), "lists" in self._earlier) == (kind, on_disk)
        is_said = about.items() <= self._earlier.items()
        if self._published.keys() == set(files) and is_alike and is_said:
            return counts
        self.held()  # the shards of all processes
        for file, source in self.sources.items():
            if source in self._where:
                self._where[file] = self._where[source]
                self._contents[file] = self._contents[source]
        lost = next((file for file in files if file not in self._where), None)
        if lost:
            raise UserError(
                f"the encoded features of {lost[0]} are missing: run the same command again"
            )
        grown = None
        in_place = self._in_place(files) if is_alike else None
        if in_place is not None:
            if len(files) == len(self._published):
                self._rename(in_place, about)
                return counts
            grown = self._vectors_to_grow(len(files))
            files = files if grown is None else in_place
        rows = functools.partial(self._rows, files)
        listed = {file: self._contents[file] for file in files}
        publish(self.folder, listed, rows, about=about, on_disk=on_disk, grown=grown)
        return counts

    def _in_place(self, files: Sequence[Identity]) -> list[Identity] | None:
        """Return files in the order of the earlier index's rows, then new files; None if a row is no longer used."""
        locations = np.array([self._where[file] for file in files])
        earlier = np.flatnonzero(locations[:, 0] == EARLIER)
        order = np.full(len(self._published), -1)
        order[locations[earlier, 1]] = earlier
        if not len(order) or (order < 0).any():
            return None
        others = np.setdiff1d(np.arange(len(files)), order)
        return [files[number] for number in (*order, *others)]

    def _rename(self, files: Sequence[Identity], about: dict[str, Any]) -> None:
        """Publish the same rows with new paths; features and vectors are neither read nor written."""
        text = _listed({file: self._contents[file] for file in files})
        names = {part: self._earlier[part] for part in ENDINGS if part in self._earlier}
        names["files"] = _new_names(False)["files"]
        digests = {**self._earlier["sha256"], "files": _digest(text.encode())}
        manifest = {**self._earlier, **about, **names, "sha256": digests}
        with _undone(self.folder, [names["files"]]):
            write_text(self.folder / names["files"], text)
            write_manifest(self.folder, manifest)
        _delete_all_but(names.values(), self.folder)

    def _vectors_to_grow(self, count: int) -> Any:
        """Return the earlier index's vectors if they can be extended to a number of vectors, else None."""
        if self.keeping.kind == "flat":
            return None
        vectors = _vectors(self.folder, self._earlier, to_grow=True)
        return vectors if faiss_index.can_grow(vectors, count) else None

    def _rows(self, files: Sequence[Identity], start: int, stop: int) -> np.ndarray:
        """Return the features of the files from start to stop, from shards and from the earlier index."""
        locations = np.array([self._where[file] for file in files[start:stop]])
        rows = np.empty((len(locations), self.dim), np.float32)
        for number in np.unique(locations[:, 0]):
            here = locations[:, 0] == number
            wanted = locations[here, 1]
            if number == EARLIER:
                features = np.lib.format.open_memmap(
                    self.folder / self._earlier["features"], mode="r"
                )
                rows[here] = features[wanted]
            else:
                rows[here] = self._read(self._shards[number])[1][wanted]
        return rows


def _partial(folder: Path) -> Path:
    """Return the folder for encoded shards. Raises UserError if it is a symlink."""
    partial = folder / PARTIAL
    if partial.is_symlink():
        raise UserError(
            f"{partial} is a symlink, and files in it would be deleted: remove the symlink, or choose another folder"
        )
    return partial


def publish(
    folder: Path,
    files: Mapping[Identity, int],
    rows: FeatureRows,
    *,
    about: dict[str, Any],
    on_disk: bool = False,
    grown: Any = None,
) -> None:
    """Write a new generation of the files, then the manifest with their names, then delete the previous generation.

    The manifest is written after the new files have been opened successfully. On failure, the new files are deleted.

    Args:
        files: file -> content digest, in the order of the rows.
        rows: function that returns the features of the files from start to stop.
        about: fields of the manifest that are not set here, including the kind.
        on_disk: whether the lists have a separate file.
        grown: FAISS index of the first files, to which the others are added; None to build a new index.
    """
    import torch

    names = _new_names(on_disk)
    with _undone(folder, names.values()):
        listed = _listed(files)
        manifest = {**about, **names, "images": len(files), "torch": torch.__version__}
        write_text(folder / names["files"], listed)
        features = _written_features(folder / names["features"], list(files), rows)
        digests = {"files": _digest(listed.encode()), "features": _digest_of_rows(features)}
        manifest["sha256"] = digests
        del listed
        _write_vectors(folder, manifest, features, grown)
        manifest["sizes"] = _sizes(folder, manifest)
        index = FaissStore.open(folder, manifest)
        if about["kind"] != "flat":
            recall = faiss_index.recall_report(index.vectors, features)
            manifest["recall against exact"] = recall
        write_manifest(folder, manifest)
    _delete_all_but(names.values(), folder)


@contextlib.contextmanager
def _undone(folder: Path, names: Iterable[str]) -> Iterator[None]:
    """Delete new files of an index if writing them fails."""
    try:
        yield
    except BaseException:
        for name in names:
            (folder / name).unlink(missing_ok=True)
        raise


def _listed(files: Mapping[Identity, int]) -> str:
    """Return the list of files as JSON, the content of files-*.json."""
    return json.dumps([[*file, content] for file, content in files.items()])


def _new_names(on_disk: bool) -> dict[str, str]:
    """Return names for the files of a new generation."""
    generation = uuid.uuid4().hex[:12]
    names = {part: f"{part}-{generation}.{ending}" for part, ending in ENDINGS.items()}
    if not on_disk:
        del names["lists"]
    return names


def _write_vectors(folder: Path, about: dict[str, Any], features: np.ndarray, grown: Any) -> None:
    """Write the FAISS index of a manifest: build a new index, or add features to an earlier one."""
    if "lists" in about:
        index = grown or faiss_index.trained(features, about["kind"])
        list_file.fill(index, features, folder / about["lists"])
    elif grown is None:
        index = faiss_index.build(features, about["kind"])
    else:
        index = grown
        faiss_index.add(index, features)
    faiss_index.write(index, folder / about["vectors"])


def _delete_all_but(names: Collection[str], folder: Path) -> None:
    """Delete previous generations of the files, and the shards of this generation."""
    for file in folder.iterdir():
        if INDEX_FILES.fullmatch(file.name) and file.name not in names:
            discard(file)
    for file in _partial(folder).glob("*"):
        if OWN_SHARD.fullmatch(file.name):
            discard(file)


def _written_features(file: Path, files: Sequence[Identity], rows: FeatureRows) -> np.ndarray:
    """Write features to a .npy file block by block, and return them mapped into memory.

    NumPy's own function can miss that the disk is full; writing to a memory map would kill the process then.
    """
    dim = rows(0, 1).shape[1]
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)),
        "fortran_order": False,
        "shape": (len(files), dim),
    }
    with written_whole(file) as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for start in range(0, len(files), faiss_index.ADDED_AT_ONCE):
            stop = min(start + faiss_index.ADDED_AT_ONCE, len(files))
            block = np.ascontiguousarray(rows(start, stop))
            check_features(files[start:stop], block, dim)
            stream.write(block.data)
    return np.lib.format.open_memmap(file, mode="r")


class FaissStore(VectorStore):
    """Store of files in the index's folder, searched with FAISS."""

    addresses = (FAISS,)
    kinds = VECTOR_KINDS
    verifies = True
    manifest = FilesManifest
    writer = FaissWriter
    require = staticmethod(faiss_index.import_faiss)
    check = staticmethod(faiss_index.check)
    files = re.compile(f"{INDEX_FILES.pattern}|{PARTIAL}")

    @classmethod
    def resolve(cls, text: str) -> str:
        if text != FAISS:
            raise no_store(text)
        return text

    @classmethod
    def open(cls, folder: Path, about: dict[str, Any], *, typed: bool = False) -> FaissImages:
        """Open an index; digests and some rows show whether its files belong together.

        Raises:
            UserError: a file is missing, damaged or from another index, or does not match the manifest.
        """
        files = list(_files(folder, about))
        features = _features(folder, about, len(files))
        vectors = _vectors(folder, about)
        mismatch = faiss_index.mismatch(vectors, features, about["kind"])
        if mismatch:
            raise _damaged(folder / about["vectors"], mismatch)
        faiss_index.let_go(features)
        return FaissImages(
            folder=folder, files=files, features=features, vectors=vectors, about=about
        )
