"""An index of any images on disk: brought up to date by one process or by several, and opened, wherever it lives."""

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from image_search import faiss_index, index_folder
from image_search.manifest import check_index, read_manifest
from image_search.stores import FAISS, TIME, Counts, ImageIndex, Keeping, Shelf, chosen_keeping
from models.encoder import Encoder
from runtime import distributed
from runtime.choices import named
from runtime.files import Identity, locked
from utils import UserError

logger = logging.getLogger(__name__)

SHARD = 1024  # images that an interruption can cost a process at most


@dataclass(frozen=True, kw_only=True)
class Update:
    """What an update of an index did: numbers of images, and the files that could not be read, with the reasons."""

    counts: Counts
    unreadable: dict[str, str]


def encoder_key(encoder: Encoder) -> dict[str, Any]:
    """What features depend on beside the images: weights, preprocessing and precision, but no device."""
    precision = named({"encode_precision": encoder.precision})
    return {"weights": encoder.describe()["weights"], **encoder.preprocessing, **precision}


def open_index(folder: Path, store: str | None = None) -> ImageIndex:
    """Open an index.

    Args:
        store: where a flag says that it lives, None where flags are silent.

    Raises:
        UserError: there is none, it is damaged, or it lives elsewhere.
    """
    check_index(folder)
    about = read_manifest(folder) or {}
    keeping = chosen_keeping(about, store, kind=None, on_disk=None)
    if "store" in about:
        from image_search import milvus_store

        return milvus_store.opened(folder, about, keeping.typed)
    return index_folder.opened(folder, about)


def update_index(
    folder: Path,
    images: Sequence[Identity],
    encoder: Encoder,
    *,
    folders: Sequence[Path],
    keeping: Keeping,
    pair: dict[str, Any],
) -> Update | None:
    """Make an index of images, or bring one up to date: encode new and changed files, drop vanished ones.

    Several processes share the work. Files that could not be read are tried again. What the encoder's `between`
    raises ends the work; the next update goes on from the last whole shard.

    Args:
        images: of the first process; others are told by it.
        folders: where the images were found.
        pair: what a query needs to load the same CLIP, for the manifest.

    Returns:
        None in all processes but the first.

    Raises:
        UserError: the folder holds other files, the index is of other weights or preprocessing, no image can
            be read, or there are too few for the kind.
    """
    origin = {"folders": sorted(str(path.resolve()) for path in folders), "pair": pair}
    if keeping.told_by != TIME:  # as in indexes of earlier versions, which do not say it
        origin["told_by"] = keeping.told_by
    shelf = _shelf(folder, encoder, keeping, origin)
    if not distributed.is_main():
        _encode(None, encoder, shelf)
        return None
    faiss_index.check(keeping.kind, len(images), encoder.backbone.dim)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, f"--output {folder}: another process updates it: wait for that one"):
        earlier = read_manifest(folder)
        if earlier and earlier.get("encoder") != encoder_key(encoder):
            raise UserError(
                f"--output {folder} is an index of other weights, preprocessing or precision: choose another folder"
            )
        shelf.open()
        held = shelf.held()
        missing = [file for file in images if file not in held]
        del held
        unreadable = _encode(missing, encoder, shelf)
        readable = [file for file in images if file[0] not in unreadable]
        if not readable:
            raise UserError(
                f"--images: none of the {len(images)} images can be read, the first is {images[0][0]}"
            )
        counts = shelf.publish(readable, {**origin, "unreadable": unreadable})
    return Update(counts=counts, unreadable=unreadable)


def _shelf(folder: Path, encoder: Encoder, keeping: Keeping, origin: dict[str, Any]) -> Shelf:
    """Where features are to be kept. Nothing is read yet."""
    key = encoder_key(encoder)
    if keeping.store == FAISS:
        return index_folder.IndexFolder(folder, key, encoder.backbone.dim, keeping)
    from image_search import milvus_store

    return milvus_store.MilvusShelf(
        folder, key, encoder.backbone.dim, keeping=keeping, origin=origin
    )


@contextlib.contextmanager
def _together(encoder: Encoder) -> Iterator[None]:
    """Let processes wait for each other; one that waits for another that has ended says so."""
    try:
        yield
    except RuntimeError as error:
        if distributed.world_size() == 1:
            raise
        encoder.between()  # where all were told to stop, that is the reason
        logger.debug("%s", error)
        raise UserError(
            "another of the processes has ended, see what it said: what was encoded is kept, go on with the same "
            "command"
        ) from None


def _encode(missing: list[Identity] | None, encoder: Encoder, shelf: Shelf) -> dict[str, str]:
    """Encode this process's part of files, shard by shard, each of which is kept before the next is begun.

    Shards are the same for any number of processes, so that batches are too, and the features to the last bit.

    Args:
        missing: the files of all processes, which the first one has.

    Returns:
        path -> why it cannot be read, of all processes.
    """
    with _together(encoder):
        files = distributed.same_object(missing)
    all_shards = [files[start : start + SHARD] for start in range(0, len(files), SHARD)]
    shards = distributed.shard(all_shards)
    paths = []
    for shard in shards:
        paths.append([Path(path) for path, _, _ in shard])
    unreadable = []
    for shard, (encoded, reasons) in zip(shards, encoder.readable_images(paths), strict=True):
        readable = []
        for file, reason in zip(shard, reasons, strict=True):
            if reason:
                unreadable.append(json.dumps([file[0], reason]))
            else:
                readable.append(file)
        if readable:
            shelf.keep(readable, encoded.numpy())
    with _together(encoder):
        lines = distributed.gathered_lines(unreadable)
    return dict(json.loads(line) for line in lines)
