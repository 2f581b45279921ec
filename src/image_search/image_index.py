"""Create, update, open and relocate an index of images on disk, in any store, with one or several processes."""

import contextlib
import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from image_search.manifest import check_index, check_named, read_manifest
from image_search.photos import FoundImages
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
from runtime.files import Identity, file_digest, file_identities, file_size, locked
from utils import UserError

logger = logging.getLogger(__name__)

SHARD = 1024  # maximum number of images that a process encodes again after an interruption
IN_USE = "--output {}: another process is updating this index: wait until it ends"
NEVER = -1  # differs from the stamp of every file, see `runtime.files.stamp`
READERS = 4  # number of threads that read files for their digests


@dataclass(frozen=True, kw_only=True)
class Update:
    """Outcome of an update of an index: the numbers of images, and path -> reason for each unreadable file."""

    counts: Counts
    unreadable: dict[str, str]


def encoder_key(encoder: Encoder) -> dict[str, Any]:
    """Return the settings on which features depend: weights, preprocessing and precision."""
    known = {"weights": encoder.describe()["weights"], **encoder.reported_preprocessing}
    known.setdefault("background", ORIGINAL)  # always recorded
    return {**known, **named({"encode_precision": encoder.precision})}


def open_index(folder: Path, store: str | None = None) -> ImageIndex:
    """Open an index.

    Args:
        store: the store of the index as given by a flag; None without the flag.

    Raises:
        UserError: the index is missing or damaged, or is in another store.
    """
    about = check_index(folder)
    keeping = chosen_keeping(about, store, kind=None, on_disk=None)
    return store_of(keeping.store).open(folder, about, typed=keeping.typed)


def update_index(
    folder: Path,
    images: FoundImages,
    encoder: Encoder,
    *,
    keeping: Keeping,
    pair: dict[str, Any],
) -> Update | None:
    """Create or update an index of images: encode new and changed files, and drop deleted files.

    A file whose content is already indexed under another name gets the features of that file. Several processes share
    the work. Files that could not be read earlier are tried again. An exception raised by the encoder's `between` ends
    the update; the next update resumes after the last complete shard.

    Args:
        images: images found by the first process, which sends their files to the others.
        pair: settings with which a query loads the same CLIP, for the manifest.

    Returns:
        The outcome in the first process; None in the others.

    Raises:
        UserError: the folder contains other files, the index was made with other weights or preprocessing, no image is
            readable, images of a missing folder were not found elsewhere, or there are too few images for the kind.
    """
    origin = {"folders": sorted(str(path.resolve()) for path in images.folders), "pair": pair}
    if keeping.told_by != TIME:  # the default of an index that does not record it
        origin["told_by"] = keeping.told_by
    dim = encoder.backbone.dim
    store = store_of(keeping.store)
    writer = store.writer(folder, encoder_key(encoder), dim, keeping=keeping, origin=origin)
    if not distributed.is_main():
        _encode(None, encoder, writer)
        return None
    store.check(keeping.kind, len(images.files), dim)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, IN_USE.format(folder)):
        _check_may_be_updated(folder, encoder_key(encoder), keeping)
        writer.open()
        unreadable = _complete(images, encoder, writer)
        readable = [file for file in images.files if file[0] not in unreadable]
        if not readable:
            raise UserError(
                f"--images: none of the {len(images.files)} images can be read, the first is {images.files[0][0]}"
            )
        counts = writer.publish(readable, {**origin, "unreadable": unreadable})
    return Update(counts=counts, unreadable=unreadable)


def _complete(images: FoundImages, encoder: Encoder, writer: IndexWriter) -> dict[str, str]:
    """Give the writer the features of all images: copy them for known content, and encode every new content once.

    Returns:
        path -> reason, for each unreadable file.
    """
    held = writer.held()
    missing = [file for file in images.files if file not in held]
    sources = _of_same_content(missing, held, images.files, writer.keeping.told_by)
    _check_found(images.gone, held, sources)
    copies = {file: source for file, source in sources.items() if source not in held}
    writer.carry({file: source for file, source in sources.items() if source in held})
    del held
    unreadable = _encode([file for file in missing if file not in sources], encoder, writer)
    for file, source in list(copies.items()):
        if source[0] in unreadable:
            unreadable[file[0]] = unreadable[source[0]].replace(source[0], file[0])
            del copies[file]
    writer.carry(copies)
    return unreadable


def _check_may_be_updated(folder: Path, key: dict[str, Any], keeping: Keeping) -> None:
    """Raise UserError if a folder has other files, or an index with another encoder or an untrusted store."""
    earlier = read_manifest(folder)
    if earlier is None:
        for file in folder.iterdir():
            if not any(store.files.fullmatch(file.name) for store in all_stores()):
                raise UserError(
                    f"--output {folder} contains {file.name}, which does not belong to an index: choose an empty or "
                    "new folder"
                )
        return
    if earlier.get("encoder") != key:
        raise UserError(
            f"--output {folder} contains an index made with different weights, preprocessing or precision: choose "
            "another folder"
        )
    _check_trusted(folder, earlier, keeping)


def _check_trusted(folder: Path, about: dict[str, Any], keeping: Keeping) -> None:
    """Raise UserError if an index from another machine refers to a store that no flag names."""
    if "store" in about and not keeping.typed:
        check_named(folder, about, "--store", about["store"])


def _of_same_content(
    missing: Sequence[Identity],
    held: Mapping[Identity, int],
    images: Sequence[Identity],
    told_by: str,
) -> dict[Identity, Identity]:
    """Map files without features to files of the same size and content that have features, or will have them.

    Files that no longer exist are preferred, each for one new file, so that moved files are recognised.
    """
    sizes = Counter(size for _, size, _ in missing)
    if not sizes:
        return {}
    there = set(images)
    vanished: dict[tuple[int, int], dict[str, Identity]] = {}
    of_content: dict[tuple[int, int], Identity] = {}
    for file, content in held.items():
        path, size, _ = file
        if size in sizes and content:
            sizes[size] += 1
            of_content.setdefault((size, content), file)
            if file not in there:
                vanished.setdefault((size, content), {})[path] = file
    alike = [file for file in missing if sizes[file[1]] > 1]
    sources = {}
    for file, content in zip(alike, _contents(alike, told_by), strict=True):
        path, size, _ = file
        again = vanished.get((size, content))
        if again:
            sources[file] = again.pop(path) if path in again else again.popitem()[1]
        elif (size, content) in of_content:
            sources[file] = of_content[size, content]
        elif content:
            of_content[size, content] = file
    return sources


def _check_found(
    gone: Sequence[Path], held: Mapping[Identity, int], sources: Mapping[Identity, Identity]
) -> None:
    """Raise UserError if images of a missing folder are not found elsewhere: its disk may be unmounted."""
    found = set(sources.values())
    for folder in gone:
        lost = [
            path
            for path, size, stamped in held
            if Path(path).is_relative_to(folder) and (path, size, stamped) not in found
        ]
        if lost:
            raise UserError(
                f"--images {folder} no longer exists, and {len(lost)} of its images (such as {lost[0]}) were not found "
                f"elsewhere: restore the folder, or remove it from the index with --forget {folder}"
            )


def content_of(file: Identity, told_by: str) -> int:
    """Return 63 bits of the digest of a file's bytes; 0 if it cannot be read or has changed since it was listed."""
    try:
        digest = file_digest(Path(file[0]))
    except OSError:
        return 0
    return int(digest[:16], 16) >> 1 if _identity_now(file[0], told_by) == file else 0


def _contents(files: Sequence[Identity], told_by: str) -> list[int]:
    with ThreadPoolExecutor(READERS) as threads:
        return list(threads.map(content_of, files, itertools.repeat(told_by)))


@dataclass(frozen=True, kw_only=True)
class Relocated:
    """Outcome of moving images: the number of rewritten paths, and the paths of changed and of missing images."""

    count: int
    changed: list[str]
    missing: list[str]


def relocate(folder: Path, old: Path, new: Path, *, store: str | None) -> Relocated:
    """Rewrite the paths of an index after its images were moved to another folder, without encoding any image.

    The paths of missing and changed images are rewritten too: the next update drops or encodes those images.

    Args:
        store: the store of the index as given by a flag; None without the flag.

    Raises:
        UserError: there is no complete index, it has no image below the old folder, or the new folder has none of them.
    """
    about = read_manifest(folder) or {}
    if "images" not in about:
        raise UserError(f"--output {folder} is not a complete index: choose another folder")
    if not new.is_dir():
        raise UserError(
            f"--relocate {old} {new}: {new} is not a folder: pass the folder that contains the images now"
        )
    old, new = old.parent.resolve() / old.name, new.resolve()
    keeping = chosen_keeping(about, store, kind=None, on_disk=None)
    _check_trusted(folder, about, keeping)
    told_by = about.get("told_by", TIME)
    folders = sorted({_moved(name, old, new) for name in about.get("folders", [])})
    unreadable = {
        _moved(path, old, new): reason.replace(path, _moved(path, old, new))
        for path, reason in about.get("unreadable", {}).items()
    }
    origin: dict[str, Any] = {"folders": folders, "unreadable": unreadable}
    origin |= {name: about[name] for name in ("pair", "told_by") if name in about}
    writer = store_of(keeping.store).writer(
        folder, about["encoder"], 0, keeping=keeping, origin=origin
    )
    with locked(folder, IN_USE.format(folder)):
        writer.open()
        held = writer.held()
        staying = [file for file in held if _moved(file[0], old, new) == file[0]]
        paths = {path for path, _, _ in staying}
        sources: dict[Identity, Identity] = {}
        changed, missing = [], []
        for file, content in held.items():
            path, size, stamped = _moved(file[0], old, new), *file[1:]
            if path in paths:  # the file is not moved, or the index already contains its new path
                continue
            now = _identity_now(path, told_by)
            if now is None:
                missing.append(path)
                sources[path, size, stamped] = file
            elif now[1] == size and content and content_of(now, told_by) == content:
                sources[now] = file
            else:
                changed.append(path)
                sources[path, size, NEVER] = file
        if len(missing) == len(sources):
            reason = f"no image of the index is in the {'new' if sources else 'old'} folder"
            raise UserError(
                f"--relocate {old} {new}: {reason}; {folder} indexes {', '.join(about.get('folders', []))}"
            )
        writer.carry(sources)
        writer.publish(sorted([*staying, *sources]), origin)
    return Relocated(count=len(sources), changed=changed, missing=missing)


def _identity_now(path: str, told_by: str) -> Identity | None:
    """Return the present identity of a file; None if it is not a file or cannot be read."""
    try:
        return None if file_size(Path(path)) is None else file_identities([Path(path)], told_by)[0]
    except OSError:
        return None


def _moved(path: str, old: Path, new: Path) -> str:
    """Replace the old folder in a path by the new folder; return other paths unchanged."""
    if path == str(old):
        return str(new)
    below = str(old).rstrip(os.sep) + os.sep
    return (
        f"{str(new).rstrip(os.sep)}{os.sep}{path[len(below) :]}" if path.startswith(below) else path
    )


@contextlib.contextmanager
def _together(encoder: Encoder) -> Iterator[None]:
    """Convert the error of waiting for a process that has ended to UserError."""
    try:
        yield
    except RuntimeError as error:
        if distributed.world_size() == 1:
            raise
        encoder.between()  # raises if all processes were told to stop, which is the reason then
        logger.debug("%s", error)
        raise UserError(
            "another process failed (see its message above). Encoded features are kept: run the same command again to "
            "resume"
        ) from None


def _encode(
    missing: list[Identity] | None, encoder: Encoder, writer: IndexWriter
) -> dict[str, str]:
    """Encode this process's share of the files, shard by shard; each shard is saved before the next begins.

    Shards, and therefore batches, do not depend on the number of processes, so neither does any bit of the features.

    Args:
        missing: the files of all processes, in the first process; None in the others.

    Returns:
        path -> reason, for each unreadable file of all processes.
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
            writer.keep(readable, encoded.numpy(), _contents(readable, writer.keeping.told_by))
    with _together(encoder):
        lines = distributed.gathered_lines(unreadable)
    return dict(json.loads(line) for line in lines)
