"""An index of any images on disk: features, files and vectors, brought up to date, and never half-written.

INDEX/index.json names the other files; it is replaced when those it names are whole, and the earlier ones go then.
INDEX/partial/ keeps what was encoded until then, so that an interrupted run goes on.
"""

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

from image_search import vectors
from image_search.manifest import MANIFEST, check_index, read_manifest
from models.clip_model import feature_dim
from models.encoder import Encoder
from runtime.files import file_identities, file_size, locked, write_text, written_whole
from runtime.tensors import load_tensors, save_tensors
from utils import UserError

logger = logging.getLogger(__name__)

SHARD = 1024  # images that an interruption can cost at most
OWN = re.compile(
    r"(files|features|vectors)-[0-9a-f]{12}\.(json|npy|faiss)|\..*\.tmp"
)  # beside it; all else is a user's
OWN_SHARD = re.compile(r"[0-9a-f]{16}\.pt|\..*\.tmp")

Identity = tuple[str, int, int]  # absolute path, bytes, modification time in ns


@dataclass(frozen=True)
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

    def search(self, queries: np.ndarray, k: int) -> list[list[tuple[int, float]]]:
        """(row, cosine similarity) of the k nearest images of each normalised query (Q, D)."""
        return vectors.search(self.vectors, self.features, queries, k)


@dataclass(frozen=True)
class Update:
    """What bringing an index up to date did: numbers of images, and the files that could not be read."""

    added: int
    kept: int
    removed: int
    unreadable: dict[str, str]


def encoder_key(encoder: Encoder) -> dict[str, Any]:
    """What features depend on beside the images: weights and preprocessing, whatever computes."""
    about = encoder.describe()
    return {"weights": about["weights"], **{k: about[k] for k in ("transform", "target_ratio", "resolution")}}


def open_index(folder: Path) -> ImageIndex:
    """Open an index. Raises UserError where there is none, or where it is damaged."""
    check_index(folder)
    about = read_manifest(folder) or {}
    try:
        files = _files(folder, about)
        features = np.load(folder / about["features"], mmap_mode="r")
        whole = len(files) == len(features) == about["images"] and features.ndim == 2
        index = vectors.read(folder / about["vectors"])
        whole = whole and index.ntotal == len(features) and index.d == features.shape[1]
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise UserError(f"--index {folder} is damaged ({error}): build it again in another folder") from None
    if not whole:
        raise UserError(f"--index {folder} is damaged (its parts do not fit): build it again in another folder")
    return ImageIndex(folder, files, features, index, about)


def update_index(
    folder: Path, folders: Sequence[Path], images: Sequence[Path], encoder: Encoder, *, kind: str, pair: dict[str, Any]
) -> Update:
    """Make an index of images, or bring one up to date: new and changed files are encoded, vanished ones go.

    Files that could not be read are tried again. What the encoder's `between` raises ends the work, which goes on from
    the last shard the next time.

    Args:
        folders: where the images were found, for the manifest.
        kind: of the vectors, one of INDEX_KINDS.
        pair: what a query needs to load the same CLIP, for the manifest.

    Raises:
        UserError: the folder holds other files, the index is of other weights or preprocessing, no image can be read,
            or there are too few for the kind.
    """
    vectors.check(kind, len(images), feature_dim(encoder.model))
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, f"--output {folder}: another process updates it: wait for that one"):
        content = {"folders": sorted(str(path.resolve()) for path in folders), "pair": pair}
        return _update(folder, images, encoder, kind, content)


def _update(folder: Path, images: Sequence[Path], encoder: Encoder, kind: str, content: dict[str, Any]) -> Update:
    earlier, key = read_manifest(folder), encoder_key(encoder)
    if earlier is None:
        _check_own(folder)
    if earlier and earlier.get("encoder") != key:
        raise UserError(f"--output {folder} is an index of other weights or preprocessing: choose another folder")
    identities = file_identities([path for path in images if file_size(path) is not None])
    known = _known(folder, earlier, key)
    bad = _encode(folder, [i for i in identities if i not in known], encoder, key, known)
    readable = [i for i in identities if i in known]
    if not readable:
        raise UserError(f"--images: none of the {len(identities)} images can be read, the first is {identities[0][0]}")
    before = set(_files(folder, earlier)) if earlier else set()
    kept = len(before & set(readable))
    content = {"encoder": key, **content, "unreadable": {path: why for (path, _, _), why in bad.items()}}
    about = {**content, "kind": kind}
    if not earlier or set(readable) != before or any(earlier.get(k) != v for k, v in about.items()):
        _publish(folder, readable, np.stack([known[i] for i in readable]), kind, content)
    return Update(len(readable) - kept, kept, len(before) - kept, content["unreadable"])


def _check_own(folder: Path) -> None:
    """Refuse a folder that something else is in: what an index does not name is dropped from it."""
    for file in folder.iterdir():
        if not (OWN.fullmatch(file.name) or file.name == "partial"):
            raise UserError(f"--output {folder} holds {file.name}, which is of no index: name an empty or a new folder")


def _files(folder: Path, about: dict[str, Any]) -> list[Identity]:
    """The files of an index, by row."""
    return [(str(path), int(size), int(when)) for path, size, when in json.loads((folder / about["files"]).read_text())]


def _known(folder: Path, earlier: dict[str, Any] | None, key: dict[str, Any]) -> dict[Identity, np.ndarray]:
    """What is encoded already: in the index, and by an interrupted run."""
    known: dict[Identity, np.ndarray] = {}
    if earlier:
        index = open_index(folder)
        known |= zip(index.files, index.features, strict=True)
    for shard in sorted((folder / "partial").glob("*.pt")):
        known |= _shard(shard, key)
    return known


def _shard(file: Path, key: dict[str, Any]) -> dict[Identity, np.ndarray]:
    """What an interrupted run encoded, if it was with the same encoder."""
    try:
        content = load_tensors(file)
        if content["key"] == json.dumps(key):
            return dict(zip(map(tuple, content["files"]), content["features"].numpy(), strict=True))
    except (UserError, KeyError, ValueError, TypeError, AttributeError):
        logger.warning("%s is damaged: its images are encoded again", file)
    return {}


def _encode(
    folder: Path,
    new: list[Identity],
    encoder: Encoder,
    key: dict[str, Any],
    known: dict[Identity, np.ndarray],
) -> dict[Identity, str]:
    """Add the features of files to `known`, shard by shard; returns those that cannot be read, and why."""
    bad: dict[Identity, str] = {}
    for start in range(0, len(new), SHARD):
        shard = new[start : start + SHARD]
        what = f"images {start + 1} to {start + len(shard)} of {len(new)}"
        features, reasons = encoder.readable_images([Path(path) for path, _, _ in shard], what)
        read_ones = [one for one, reason in zip(shard, reasons, strict=True) if not reason]
        bad |= {one: reason for one, reason in zip(shard, reasons, strict=True) if reason}
        features = features.cpu()
        known |= zip(read_ones, features.numpy(), strict=True)
        name = hashlib.sha256(json.dumps(shard).encode()).hexdigest()[:16]
        content = {"key": json.dumps(key), "files": [list(one) for one in read_ones], "features": features}
        if read_ones:
            save_tensors(folder / "partial" / f"{name}.pt", content)
    return bad


def _publish(folder: Path, files: list[Identity], features: np.ndarray, kind: str, content: dict[str, Any]) -> None:
    """Write a new generation of the files, then the manifest that names them, then drop what it does not name."""
    generation = uuid.uuid4().hex[:12]
    names = {"files": f"files-{generation}.json", "features": f"features-{generation}.npy"}
    names["vectors"] = f"vectors-{generation}.faiss"
    write_text(folder / names["files"], json.dumps(files))
    with written_whole(folder / names["features"]) as features_file:
        np.save(features_file, features)
    index = vectors.build(features, kind)
    vectors.write(index, folder / names["vectors"])
    report = {} if kind == "flat" else {"recall against exact": vectors.recall_report(index, features)}
    about = {**content, **names, **report, "kind": kind, "images": len(files), "torch": torch.__version__}
    write_text(folder / MANIFEST, json.dumps(about, indent=1) + "\n")
    for file in folder.iterdir():
        if OWN.fullmatch(file.name) and file.name not in names.values():
            file.unlink()
    for file in (folder / "partial").glob("*"):
        if OWN_SHARD.fullmatch(file.name):
            file.unlink()
