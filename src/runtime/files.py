"""Files: strict JSON, atomic writes, locks, search for checkpoints, and identities that detect changes."""

import contextlib
import functools
import hashlib
import io
import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from runtime.spelling import Spellings
from utils import DiskError, UserError, first_line

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def read_json(path: Path, writer: str | None = None) -> Any:
    """Parse a JSON file; raise UserError if it is missing, unreadable or malformed.

    Args:
        writer: the command that writes such a file; None for files of a dataset.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise missing_file(path, writer) from None
    except (OSError, ValueError) as error:
        remedy = f"write it with {writer}" if writer else "download it"
        raise UserError(
            f"{path} is not a readable JSON file ({first_line(error)}): {remedy} again"
        ) from None


def missing_file(path: Path, writer: str | None = None) -> UserError:
    """Return the error to raise for a missing JSON file, see `read_json`."""
    remedy = "put the file there, or point --data-root at its dataset"
    if writer:
        remedy = f"write it with {writer}"
    hint = Spellings(entry.name for entry in path.parent.glob("*")).hint(path.name)
    return UserError(f"{path} is missing{hint}: {remedy}")


def parse_json(text: str) -> Any:
    """Parse JSON without repeated keys or lone surrogates.

    Raises:
        ValueError: the JSON is malformed, is nested too deeply, has a repeated key (one of its
            values would be lost), or has a lone surrogate (half a character, which cannot be
            written to a file).
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key, value in pairs:
            if key in content:
                raise ValueError(f"the key {key!r} occurs twice")
            content[key] = value
        return content

    try:
        content = json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if "\\ud" in text.lower():
        json.dumps(content, ensure_ascii=False).encode()
    return content


HALF_MADE = ".*.tmp"  # temporary names of this version, see `beside`, and of earlier ones
SURELY_OURS = ".*.clip4cir-*.tmp"  # only names that no other program uses
ABANDONED = 86_400  # seconds without a write after which a temporary file is abandoned


def beside(path: Path) -> Path:
    """Return an unpredictable temporary name next to `path`, for a file or folder that will replace it."""
    return path.with_name(f".{path.name[:40]}.clip4cir-{secrets.token_hex(8)}.tmp")


def sweep(folder: Path, names: str = SURELY_OURS, age: float = ABANDONED) -> None:
    """Delete the temporary files and folders that killed processes left in a folder.

    Args:
        names: pattern of the names.
        age: minimum number of seconds since the last write.
    """
    for path in folder.glob(names):
        with contextlib.suppress(OSError):  # it was just renamed
            if time.time() - path.lstat().st_mtime >= age:
                discard(path)


# Once per folder, because many files may be written one after the other.
_sweep_once = functools.cache(sweep)


def discard(path: Path) -> None:
    """Delete a file, a link without its target, or a folder with its contents."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextlib.contextmanager
def _replacement(path: Path) -> Iterator[Path]:
    """Yield an unused temporary name; at the end, the file that was written there replaces `path`.

    If `path` is a link, the file replaces the link's target.

    Raises:
        DiskError: the file could not be written; nothing of it is left.
    """
    named, path = path, Path(os.path.realpath(path))
    new = beside(path)
    try:
        if named.exists() and not named.is_file():  # unresolved, as a shell's pipe has no real path
            raise DiskError(f"{named} is a folder, a device or a pipe: choose a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep_once(path.parent)
        yield new
        new.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _not_written(path, error) from None
    finally:
        # The temporary file no longer exists after the replacement, or never existed if the folder is a file.
        with contextlib.suppress(OSError):
            new.unlink()


@contextlib.contextmanager
def made_beside(path: Path) -> Iterator[IO[bytes]]:
    """Open a new file that replaces `path` once it is completely on disk; until then, `path` does not change.

    Raises:
        DiskError: the file could not be written; nothing of it is left.
    """
    # Mode "x" never opens an existing file or link.
    with _replacement(path) as new, open(new, "x+b") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """Yield a new temporary folder next to `path`, which is deleted at the end unless it was renamed.

    Raises:
        DiskError: the folder could not be created.
    """
    new = beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        new.mkdir()
    except OSError as error:
        raise _not_written(path, error) from None
    try:
        yield new
    finally:
        discard(new)


@contextlib.contextmanager
def folder_made_beside(path: Path) -> Iterator[Path]:
    """Yield a new folder to write files to; at the end, it is renamed to `path` and may replace an empty folder.

    Raises:
        DiskError: the folder could not be written; nothing of it is left.
    """
    path = Path(os.path.realpath(path))
    try:
        with folder_beside(path) as new:
            yield new
            _sync_folder(new)
            if path.exists():
                path.rmdir()  # Windows cannot rename to an existing name
            new.rename(path)
            _sync_folder(path.parent)
    except OSError as error:
        raise _not_written(path, error) from None


# Paths that stand for stdout and stderr, whether these are a pipe, a device or a file.
STREAMS = {"/dev/stdout": 1, "/dev/fd/1": 1, "/dev/stderr": 2, "/dev/fd/2": 2}


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """Open one of `STREAMS`, or a file that replaces `path` only once it is completely on disk, see `made_beside`.

    Raises:
        DiskError: the file could not be written, or `path` is another device or pipe.
    """
    if str(path) not in STREAMS:
        with made_beside(path) as file:
            yield file
        return
    whole = io.BytesIO()  # the writer may seek in it, which a stream does not support
    yield whole
    try:
        print(end="", flush=True)
        with open(os.dup(STREAMS[str(path)]), "wb") as stream:
            stream.write(whole.getbuffer())
    except OSError as error:
        raise _not_written(path, error) from None


def _not_written(path: Path, error: OSError) -> DiskError:
    return DiskError(
        f"could not write {path} ({error.strerror}): free disk space, or choose another path"
    )


def _sync_folder(folder: Path) -> None:
    """Flush a rename in a folder to disk, if folders can be opened (not on Windows)."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with written_whole(path) as file:
        file.write(content)


def write_same(path: Path, original: Path) -> None:
    """Make `path` a hard link to the file `original`, or a copy if links are not supported, atomically."""
    try:
        with _replacement(path) as new:
            new.hardlink_to(original)
    except (DiskError, OSError):
        with written_whole(path) as file, open(original, "rb") as content:
            shutil.copyfileobj(content, file)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_bytes(path, text.encode())


@contextlib.contextmanager
def locked(folder: Path, refusal: str) -> Iterator[None]:
    """Lock a folder against other processes that lock it too, until the context or the process ends.

    Raises:
        UserError: another process has locked the folder; the message is `refusal`.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(refusal) from None
        yield
    finally:
        os.close(descriptor)


def check_writable(folders: dict[str, Path | None]) -> None:
    """Raise UserError now, not after hours of work, if a folder (which need not exist yet) cannot be written to.

    Args:
        folders: flag -> its folder; None if nothing will be written.
    """
    for flag, folder in folders.items():
        if folder is None:
            continue
        nearest = _nearest(folder)
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(
                f"{flag} {folder}: {nearest} is not a writable folder: choose another folder"
            )


def _nearest(folder: Path) -> Path:
    """Return the folder itself if it exists, or its nearest existing parent."""
    return next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())


def free_bytes(folder: Path) -> int:
    """Return the free bytes on the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(_nearest(folder)).free


def check_new_or_empty(flag: str, folder: Path) -> None:
    """Raise UserError if a path exists, unless it is an empty folder."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if os.path.lexists(folder):
        raise UserError(
            f"{flag} {folder} already exists and is not an empty folder: choose a new or empty folder"
        )


def check_file_writable(files: dict[str, Path | None]) -> None:
    """Raise UserError if a file cannot be written.

    Args:
        files: flag -> its file; None if no file will be written.
    """
    folders: dict[str, Path | None] = {}
    for flag, file in files.items():
        if file is None or str(file) in STREAMS:
            continue
        if file.exists() and not file.is_file():
            kind = "a folder" if file.is_dir() else "a device or a pipe"
            raise UserError(f"{flag} {file} is {kind}: choose a file")
        folders[flag] = Path(os.path.realpath(file)).parent
    check_writable(folders)


CHECKPOINT_ENDINGS = (".pt", ".safetensors")


def is_there(checkpoint: Path) -> bool:
    """Check whether a checkpoint's path exists, as it is or with an extension added."""
    return any(Path(f"{checkpoint}{ending}").exists() for ending in ("", *CHECKPOINT_ENDINGS))


def find_checkpoint(flag: str, path: Path) -> Path:
    """Find the checkpoint at a path: the file, the path with an extension, or the only checkpoint in a run folder.

    Raises:
        UserError: there is no checkpoint, or a folder has several; the message names the flag.
    """
    for ending in ("", *CHECKPOINT_ENDINGS):
        candidate = Path(f"{path}{ending}")
        if candidate.is_file():
            return candidate
    found = _checkpoints(path) or _checkpoints(path / "saved_models")
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(file.name for file in found)
        raise UserError(
            f"{flag}: {path} contains several checkpoints ({names}): choose one of them"
        )
    seeds = sorted(path.glob("seed_*/"))
    if seeds:
        raise UserError(f"{flag}: {path} is a run of several seeds: choose one, such as {seeds[0]}")
    raise UserError(
        f"{flag}: no checkpoint at {path}: pass a file, or a folder that contains one; also looked for "
        f"{path.name}.pt, *.pt in the folder, and .safetensors"
    )


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder; empty if the folder does not exist."""
    return sorted(file for file in folder.glob("*") if file.suffix in CHECKPOINT_ENDINGS)


def file_size(path: Path) -> int | None:
    """Return the size of a file in bytes; None if it does not exist, or if its name is not valid."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


SAMPLE = 4096  # bytes that are read at the beginning, in the middle and at the end of a file


def sample_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file's size and its first, middle and last 4 KiB; a small file is read completely."""
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(f"{size} ".encode())
        if size <= 3 * SAMPLE:
            digest.update(file.read())
        else:
            for start in (0, (size - SAMPLE) // 2, size - SAMPLE):
                file.seek(start)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()


# Absolute path and size in bytes of a file, and a number for its modification time and content, see `stamp`.
Identity = tuple[str, int, int]


def file_identities(paths: list[Path], told_by: str = "sample") -> list[Identity]:
    """Return the identity of each file, which changes when the file changes.

    Args:
        told_by: see `stamp`.
    """
    # Each folder is resolved only once, because resolving it for each file would double the time.
    resolved = functools.cache(Path.resolve)
    identities = []
    for path in paths:
        real = path.resolve() if path.is_symlink() else resolved(path.parent) / path.name
        status = path.stat()
        identities.append((str(real), status.st_size, stamp(path, status, told_by)))
    return identities


def stamp(path: str | Path, status: os.stat_result, told_by: str) -> int:
    """Return a number that changes when a file changes.

    Args:
        told_by: "time", the number is the modification time in ns; "sample", it also depends on a
            sample of the bytes, see `sample_digest`; "content", it also depends on all bytes.
            Numbers of different kinds never match.
    """
    if told_by == "time":
        return status.st_mtime_ns
    content = file_digest(Path(path)) if told_by == "content" else sample_digest(path)
    told = f"{told_by} {status.st_mtime_ns} {content}"
    return int.from_bytes(hashlib.sha256(told.encode()).digest()[:7], "big")
