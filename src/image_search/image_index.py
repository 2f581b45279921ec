"""An index of any images on disk: files, features and vectors, brought up to date, never half-written.

INDEX/index.json names the other files. It is replaced when those it names are whole; then the earlier ones are
deleted. INDEX/partial/ keeps what was encoded until then, so that an interrupted run can go on.
"""

import contextlib
import functools
import hashlib
import json
import logging
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from image_search import faiss_index
from image_search.manifest import MANIFEST, REMEDY, check_index, read_manifest
from models.encoder import Encoder
from runtime.choices import named
from runtime.files import (
    file_identities,
    file_size,
    locked,
    parse_json,
    read_text,
    write_text,
    written_whole,
)
from runtime.tensors import load_tensors, save_tensors
from utils import UserError, first_line

logger = logging.getLogger(__name__)

SHARD = 1024  # images that an interruption can cost at most
# The names of an index's own files, beside the manifest. All others in its folder are the user's.
OWN = re.compile(r"(files|features|vectors)-[0-9a-f]{12}\.(json|npy|faiss)|\..*\.tmp")
PARTIAL = "partial"
OWN_SHARD = re.compile(r"[0-9a-f]{16}\.pt|\..*\.tmp")

Identity = tuple[str, int, int]  # absolute path, bytes, modification time in ns


@dataclass(frozen=True, kw_only=True)
class ImageIndex:
    """An index that can be searched.

    Attributes:
        files: the images by row: path, bytes and modification time of each.
        features: (N, D), unnormalised, in a memory map.
        vectors: the FAISS index of the normalised features.
        about: the manifest.
    """

    folder: Path
    files: list[Identity]
    features: np.ndarray
    vectors: Any
    about: dict[str, Any]

    @functools.cached_property
    def paths(self) -> list[Path]:
        """The image files by row."""
        return [Path(path) for path, _, _ in self.files]

    @functools.cached_property
    def row_of_path(self) -> dict[str, int]:
        """The row of each path."""
        return {path: row for row, (path, _, _) in enumerate(self.files)}

    @functools.cached_property
    def row_of(self) -> dict[Identity, int]:
        """The row of each file, as it was when it was encoded."""
        return {file: row for row, file in enumerate(self.files)}

    def search(self, queries: np.ndarray, k: int) -> list[faiss_index.Answers]:
        """(row, cosine similarity) of the k nearest images of each normalised query (Q, D)."""
        return faiss_index.search(self.vectors, self.features, queries, k=k)


@dataclass(frozen=True, kw_only=True)
class Update:
    """What an update of an index did: numbers of images, and the files that could not be read."""

    added: int
    kept: int
    removed: int
    unreadable: dict[str, str]


def encoder_key(encoder: Encoder) -> dict[str, Any]:
    """What features depend on beside the images: weights, preprocessing and precision, but no device."""
    precision = named({"encode_precision": encoder.precision})
    return {"weights": encoder.describe()["weights"], **encoder.preprocessing, **precision}


def open_index(folder: Path) -> ImageIndex:
    """Open an index. Raises UserError where there is none, or where it is damaged."""
    check_index(folder)
    return _opened(folder, read_manifest(folder) or {})


def _opened(folder: Path, about: dict[str, Any]) -> ImageIndex:
    """An index as its manifest describes it. That its files belong together is told by digests, and by some rows.

    Raises:
        UserError: a file is missing, damaged or of another index, or a field of the manifest is not true of it.
    """
    files = _files(folder, about)
    features = _features(folder, about)
    if not len(files) == len(features) == about["images"]:
        raise _damaged(
            folder / MANIFEST,
            f"images is {about['images']}, but there are {len(files)} files and {len(features)} features",
        )
    vectors = faiss_index.read(folder / about["vectors"])
    mismatch = faiss_index.mismatch(vectors, features, about.get("kind", "flat"))
    if mismatch:
        raise _damaged(folder / about["vectors"], mismatch)
    return ImageIndex(folder=folder, files=files, features=features, vectors=vectors, about=about)


def _damaged(file: Path, reason: str) -> UserError:
    return UserError(f"{file} is damaged or of another index ({reason}): {REMEDY}")


def update_index(
    folder: Path,
    folders: Sequence[Path],
    images: Sequence[Path],
    encoder: Encoder,
    *,
    kind: str,
    pair: dict[str, Any],
) -> Update:
    """Make an index of images, or bring one up to date: encode new and changed files, drop vanished ones.

    Files that could not be read are tried again. What the encoder's `between` raises ends the work; the next
    update goes on from the last whole shard.

    Args:
        folders: where the images were found, for the manifest.
        kind: of the vectors, one of INDEX_KINDS.
        pair: what a query needs to load the same CLIP, for the manifest.

    Raises:
        UserError: the folder holds other files, the index is of other weights or preprocessing, no image can
            be read, or there are too few for the kind.
    """
    faiss_index.check(kind, len(images), encoder.backbone.dim)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, f"--output {folder}: another process updates it: wait for that one"):
        origin = {"folders": sorted(str(path.resolve()) for path in folders), "pair": pair}
        return _update(folder, images, encoder, kind=kind, origin=origin)


def _update(
    folder: Path, images: Sequence[Path], encoder: Encoder, *, kind: str, origin: dict[str, Any]
) -> Update:
    """The same in a folder that is locked.

    Args:
        origin: the part of the manifest that says where the images and the encoder are from.
    """
    earlier = read_manifest(folder)
    key = encoder_key(encoder)
    if earlier is None:
        _check_own(folder)
    if earlier and earlier.get("encoder") != key:
        raise UserError(
            f"--output {folder} is an index of other weights, preprocessing or precision: choose another folder"
        )

    files = file_identities([path for path in images if file_size(path) is not None])
    features = _features_on_disk(folder, earlier, key, encoder.backbone.dim)
    new_files = [file for file in files if file not in features]
    unreadable = _encode(folder, new_files, encoder, key=key, features=features)
    readable = [file for file in files if file in features]
    if not readable:
        raise UserError(
            f"--images: none of the {len(files)} images can be read, the first is {files[0][0]}"
        )

    about = {"encoder": key, **origin, "unreadable": unreadable}
    earlier_files = set(_files(folder, earlier)) if earlier else set()
    if set(readable) != earlier_files or not _says(earlier, {**about, "kind": kind}):
        rows = np.stack([features[file] for file in readable])
        _publish(folder, readable, rows, kind=kind, about=about)
    kept = len(earlier_files & set(readable))
    return Update(
        added=len(readable) - kept,
        kept=kept,
        removed=len(earlier_files) - kept,
        unreadable=unreadable,
    )


def _check_own(folder: Path) -> None:
    """Refuse a folder that holds other files, since an index is to have a folder of its own."""
    for file in folder.iterdir():
        if not (OWN.fullmatch(file.name) or file.name == PARTIAL):
            raise UserError(
                f"--output {folder} holds {file.name}, which is of no index: name an empty or a new folder"
            )


def _says(manifest: dict[str, Any] | None, about: dict[str, Any]) -> bool:
    """Whether a manifest has all of some entries already."""
    if not manifest:
        return False
    return all(manifest.get(name) == value for name, value in about.items())


def _files(folder: Path, about: dict[str, Any]) -> list[Identity]:
    """The files of an index, by row."""
    from image_search.schemas import Files
    from runtime.schema import checked

    file = folder / about["files"]
    try:
        text = read_text(file)
        content = parse_json(text)
    except (OSError, ValueError) as error:
        raise _damaged(file, first_line(error)) from None
    checked(Files, {"files": content}, file=file, remedy=REMEDY)
    if "sha256" in about and about["sha256"]["files"] != _digest(text.encode()):
        raise _damaged(file, "it is not the list that was written")
    return [(path, size, modified) for path, size, modified in content]


def _features(folder: Path, about: dict[str, Any]) -> np.ndarray:
    """The features of an index in a memory map, of which some rows are looked at."""
    file = folder / about["features"]
    try:
        features = np.lib.format.open_memmap(file, mode="r")
    except (OSError, ValueError, OverflowError) as error:
        raise _damaged(file, first_line(error)) from None
    if features.dtype != np.float32 or features.ndim != 2 or 0 in features.shape:
        raise _damaged(file, f"it holds {features.dtype} of shape {features.shape}")
    if not np.isfinite(features[faiss_index.sampled_rows(len(features))]).all():
        raise _damaged(file, "it holds what is no number")
    if "sha256" in about and about["sha256"]["features"] != _digest_of_rows(features):
        raise _damaged(file, "its rows are not those that were written")
    return features


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _digest_of_rows(features: np.ndarray) -> str:
    """SHA-256 of the shape of features (N, D) and of some of their rows: all would take a minute of a large index."""
    rows = np.ascontiguousarray(features[faiss_index.sampled_rows(len(features))])
    return _digest(str(features.shape).encode() + rows.tobytes())


def _features_on_disk(
    folder: Path, earlier: dict[str, Any] | None, key: dict[str, Any], dim: int
) -> dict[Identity, np.ndarray]:
    """What is encoded already: in the index, and by an interrupted run."""
    features: dict[Identity, np.ndarray] = {}
    if earlier:
        index = open_index(folder)
        features.update(zip(index.files, index.features, strict=True))
    for shard in sorted((folder / PARTIAL).glob("*.pt")):
        features.update(_read_shard(shard, key, dim))
    return features


def _read_shard(file: Path, key: dict[str, Any], dim: int) -> dict[Identity, np.ndarray]:
    """What an interrupted run encoded, if it was with the same encoder."""
    try:
        content = load_tensors(file)
        if content["key"] == json.dumps(key):
            files = [(str(path), int(size), int(time)) for path, size, time in content["files"]]
            features = content["features"].numpy()
            _check_features(files, features, dim)
            return dict(zip(files, features, strict=True))
    except (UserError, KeyError, ValueError, TypeError, AttributeError):
        logger.warning("%s is damaged: its images are encoded again", file)
    return {}


def _encode(
    folder: Path,
    files: list[Identity],
    encoder: Encoder,
    *,
    key: dict[str, Any],
    features: dict[Identity, np.ndarray],
) -> dict[str, str]:
    """Encode files, shard by shard, each of which is on disk before the next is begun.

    Args:
        features: the features of the files are added to it.

    Returns:
        path -> why it cannot be read.
    """
    unreadable: dict[str, str] = {}
    shards = [files[start : start + SHARD] for start in range(0, len(files), SHARD)]
    paths = []
    for shard in shards:
        paths.append([Path(path) for path, _, _ in shard])
    for shard, (encoded, reasons) in zip(shards, encoder.readable_images(paths), strict=True):
        readable = []
        for file, reason in zip(shard, reasons, strict=True):
            if reason:
                unreadable[file[0]] = reason
            else:
                readable.append(file)
        if readable:
            _check_features(readable, encoded.numpy(), encoder.backbone.dim)
            features.update(zip(readable, encoded.numpy(), strict=True))
            name = hashlib.sha256(json.dumps(shard).encode()).hexdigest()[:16]
            content = {
                "key": json.dumps(key),
                "files": [list(file) for file in readable],
                "features": encoded,
            }
            save_tensors(folder / PARTIAL / f"{name}.pt", content)
    return unreadable


def _check_features(files: Sequence[Identity], features: np.ndarray, dim: int) -> None:
    """Raise UserError where there are no finite features of each file, in the type that an index holds."""
    if features.dtype != np.float32 or features.shape != (len(files), dim):
        raise UserError(f"features are {features.dtype} of shape {features.shape}: encode again")
    ends = np.stack([features.min(axis=1), features.max(axis=1)])  # NaN comes through
    rows = np.flatnonzero(~np.isfinite(ends).all(axis=0))
    if len(rows):
        remedy = "choose --encode-precision fp32, or another folder for the index"
        raise UserError(f"the features of {files[rows[0]][0]} are not finite: {remedy}")


def _publish(
    folder: Path, files: list[Identity], features: np.ndarray, *, kind: str, about: dict[str, Any]
) -> None:
    """Write a new generation of the files, then the manifest that names them; then delete the earlier ones.

    The manifest is written when what it names could be opened again. Else nothing is left of the generation.
    """
    _check_features(files, features, features.shape[1])
    generation = uuid.uuid4().hex[:12]
    names = {
        "files": f"files-{generation}.json",
        "features": f"features-{generation}.npy",
        "vectors": f"vectors-{generation}.faiss",
    }
    with contextlib.ExitStack() as undo:
        for name in names.values():
            undo.callback((folder / name).unlink, missing_ok=True)
        listed = json.dumps(files)
        digests = {"files": _digest(listed.encode()), "features": _digest_of_rows(features)}
        manifest = {**about, **names, "kind": kind, "images": len(files), "sha256": digests}
        manifest["torch"] = torch.__version__
        write_text(folder / names["files"], listed)
        _write_features(folder / names["features"], features)
        faiss_index.write(faiss_index.build(features, kind), folder / names["vectors"])
        index = _opened(folder, manifest)
        if kind != "flat":
            recall = faiss_index.recall_report(index.vectors, features)
            manifest["recall against exact"] = recall
        write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        undo.pop_all()
    for file in folder.iterdir():
        if OWN.fullmatch(file.name) and file.name not in names.values():
            file.unlink()
    for file in (folder / PARTIAL).glob("*"):
        if OWN_SHARD.fullmatch(file.name):
            file.unlink()


def _write_features(file: Path, features: np.ndarray) -> None:
    """Write a .npy file. NumPy's own writing passes over a disk that is full at the last bytes."""
    with written_whole(file) as stream:
        header = np.lib.format.header_data_from_array_1_0(features)
        np.lib.format.write_array_header_1_0(stream, header)
        stream.write(features.data)
