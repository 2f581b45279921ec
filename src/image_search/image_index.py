"""An index of any images on disk: brought up to date by one process or by several, and opened, wherever it lives."""

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from image_search.manifest import MANIFEST, check_index, is_own, read_manifest
from image_search.stores.base import (
    TIME,
    Counts,
    ImageIndex,
    IndexWriter,
    Keeping,
    all_stores,
    chosen_keeping,
    store_of,
)
from models.encoder import Encoder
from runtime import distributed
from runtime.choices import ORIGINAL, named
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
    known = {"weights": encoder.describe()["weights"], **encoder.reported_preprocessing}
    known.setdefault("background", ORIGINAL)  # which indexes of earlier versions do not name
    return {**known, **named({"encode_precision": encoder.precision})}


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
    return store_of(keeping.store).open(folder, about, typed=keeping.typed)


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
    dim = encoder.backbone.dim
    store = store_of(keeping.store)
    writer = store.writer(folder, encoder_key(encoder), dim, keeping=keeping, origin=origin)
    if not distributed.is_main():
        _encode(None, encoder, writer)
        return None
    store.check(keeping.kind, len(images), dim)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, f"--output {folder}: another process updates it: wait for that one"):
        earlier = read_manifest(folder)
        if earlier and earlier.get("encoder") != encoder_key(encoder):
            raise UserError(
                f"--output {folder} is an index of other weights, preprocessing or precision: choose another folder"
            )
        if earlier is None:
            _check_own_folder(folder)
        else:
            _check_trusted(folder, earlier, keeping)
        writer.open()
        held = writer.held()
        missing = [file for file in images if file not in held]
        del held
        unreadable = _encode(missing, encoder, writer)
        readable = [file for file in images if file[0] not in unreadable]
        if not readable:
            raise UserError(
                f"--images: none of the {len(images)} images can be read, the first is {images[0][0]}"
            )
        counts = writer.publish(readable, {**origin, "unreadable": unreadable})
    return Update(counts=counts, unreadable=unreadable)


def _check_own_folder(folder: Path) -> None:
    """Refuse a folder that holds other files, since an index is to have a folder of its own."""
    for file in folder.iterdir():
        if not any(store.files.fullmatch(file.name) for store in all_stores()):
            raise UserError(
                f"--output {folder} holds {file.name}, which is of no index: name an empty or a new folder"
            )


def _check_trusted(folder: Path, about: dict[str, Any], keeping: Keeping) -> None:
    """Refuse to write where only an index says, and one that was made elsewhere."""
    if "store" in about and not (keeping.typed or is_own(folder, about)):
        raise UserError(
            f"{folder / MANIFEST} was made elsewhere and names {about['store']}: name it too, as --store "
            f"{about['store']}, if you trust it"
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


def _encode(
    missing: list[Identity] | None, encoder: Encoder, writer: IndexWriter
) -> dict[str, str]:
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
            writer.keep(readable, encoded.numpy())
    with _together(encoder):
        lines = distributed.gathered_lines(unreadable)
    return dict(json.loads(line) for line in lines)
