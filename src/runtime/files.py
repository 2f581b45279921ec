"""Files: JSON read with care, files that are whole or not there, locks, checkpoints found, identities."""

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
    """Parse a JSON file; a missing, unreadable or malformed one is a UserError that names it.

    Args:
        writer: the command that writes such a file; None for files of a dataset.
    """
    try:
        return parse_json(read_text(path))
    except FileNotFoundError:
        raise missing_file(path, writer) from None
    except (OSError, ValueError) as error:
        remedy = f"write it with {writer}" if writer else "download it"
        raise UserError(
            f"{path} is not a readable JSON file ({first_line(error)}): {remedy} again"
        ) from None


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8; or a device or a pipe with a name of its own, which may never come to an end.
    """
    kind = path.stat().st_mode
    is_open = str(path).startswith(("/dev/", "/proc/"))  # as the shell's <(...) is
    if stat.S_ISCHR(kind) or stat.S_ISBLK(kind) or (stat.S_ISFIFO(kind) and not is_open):
        raise ValueError("it is a device or a pipe, not a file")
    return path.read_text(encoding="utf-8")


def missing_file(path: Path, writer: str | None = None) -> UserError:
    """Return what to raise for a JSON file that is not there, see `read_json`."""
    remedy = "put the file there, or point --data-root at its dataset"
    if writer:
        remedy = f"write it with {writer}"
    hint = Spellings(entry.name for entry in path.parent.glob("*")).hint(path.name)
    return UserError(f"{path} is missing{hint}: {remedy}")


def parse_json(text: str) -> Any:
    """Parse JSON that says each thing once, in whole characters.

    Raises:
        ValueError: malformed, nested too deeply, an object with a repeated key (of which one value would be lost), or
            half a character (a lone surrogate), which no file could be written with.
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


HALF_MADE = ".*.tmp"  # the names of `beside`, those of earlier versions among them
SURELY_OURS = ".*.clip4cir-*.tmp"  # the same, in folders where others may have hidden files too
ABANDONED = 86_400  # seconds since something half-made was last written to


def beside(path: Path) -> Path:
    """Return a name next to `path` for what will take its place; it differs each time, and nobody can foresee it."""
    return path.with_name(f".{path.name[:40]}.clip4cir-{secrets.token_hex(8)}.tmp")


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """Let `sweep` see that a file or a folder is being made, for as long as the process lives at most."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def sweep(folder: Path, names: str = SURELY_OURS, age: float = ABANDONED) -> None:
    """Delete what killed processes left half-made in a folder, by these names and so many seconds ago.

    A process that is alive holds what it makes, which other containers see too, though not its number. On Windows, and
    on file systems without locks, age alone tells.
    """
    for path in folder.glob(names):
        if _is_abandoned(path, age):
            discard(path)


@functools.cache
def _sweep_once(folder: Path) -> None:
    """`sweep` where files are made one after the other."""
    sweep(folder)


def _is_abandoned(path: Path, age: float) -> bool:
    """Check whether a temporary file or folder was abandoned by its process. Symlinks are not."""
    try:
        status = path.lstat()
        is_ours = stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
        if not is_ours or time.time() - status.st_mtime < age:
            return False
        if fcntl is None:
            return True
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # it took its name just now, or is another user's
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    finally:
        os.close(descriptor)
    return True


def discard(path: Path) -> None:
    """Delete a file, a link, or a folder with all that is in it. What a link points to stays."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextlib.contextmanager
def _replacement(path: Path) -> Iterator[Path]:
    """Yield a name at which nothing is yet; the file that is made there replaces `path` at the end.

    Where `path` is a link, it replaces what the link points to.

    Raises:
        DiskError: it could not be written; nothing is left of it.
    """
    named, path = path, Path(os.path.realpath(path))
    new = beside(path)
    try:
        if named.exists() and not named.is_file():  # a pipe of the shell has no other path
            raise DiskError(f"{named} is a folder, a device or a pipe: choose a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep_once(path.parent)
        yield new
        new.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _not_written(path, error) from None
    finally:
        # There is none after the replace, nor where the folder is a file.
        with contextlib.suppress(OSError):
            new.unlink()


@contextlib.contextmanager
def made_beside(path: Path) -> Iterator[IO[bytes]]:
    """Open a new file that replaces `path` when all of it is on disk; until then an earlier `path` stays as it was.

    Raises:
        DiskError: it could not be written; nothing is left of it.
    """
    # "x": never a file or a link that is there already.
    with _replacement(path) as new, open(new, "x+b") as file, _held(new):
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """Make a new folder next to `path`, to be renamed when it is whole; else nothing is left of it.

    Raises:
        DiskError: it could not be made.
    """
    new = beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        new.mkdir()
    except OSError as error:
        raise _not_written(path, error) from None
    try:
        with _held(new):
            yield new
    finally:
        discard(new)


@contextlib.contextmanager
def folder_made_beside(path: Path) -> Iterator[Path]:
    """A new folder to write files to, which takes the name `path` at the end, of nothing or of an empty folder.

    Raises:
        DiskError: it could not be written; nothing is left of it.
    """
    path = Path(os.path.realpath(path))
    try:
        with folder_beside(path) as new:
            yield new
            _sync_folder(new)
            if path.exists():
                path.rmdir()  # Windows renames to no name that is taken
            new.rename(path)
            _sync_folder(path.parent)
    except OSError as error:
        raise _not_written(path, error) from None


# What is written to these goes where stdout and stderr go, be it a pipe, a device or a file.
STREAMS = {"/dev/stdout": 1, "/dev/fd/1": 1, "/dev/stderr": 2, "/dev/fd/2": 2}


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that replaces `path` only when all of it is on disk, see `made_beside`, or one of `STREAMS`.

    Raises:
        DiskError: it could not be written, or is another device or a pipe.
    """
    if str(path) not in STREAMS:
        with made_beside(path) as file:
            yield file
        return
    whole = io.BytesIO()  # who writes may want to go back in it, which a stream cannot
    yield whole
    try:
        print(end="", flush=True)
        with open(os.dup(STREAMS[str(path)]), "wb") as stream:
            stream.write(whole.getbuffer())
    except OSError as error:
        raise _not_written(path, error) from None


def _not_written(path: Path, error: OSError) -> DiskError:
    return DiskError(
        f"could not write {path} ({error.strerror}): free space or choose another place"
    )


def _sync_folder(folder: Path) -> None:
    """Put a rename in a folder on disk, where folders can be opened (not on Windows)."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    with written_whole(path) as file:
        file.write(content)


def write_same(path: Path, original: Path) -> None:
    """Make `path` the file `original`, whole or not at all: a hard link, or a copy where there are no links."""
    try:
        # Held from before it has the second name, since it may be old.
        with _held(original), _replacement(path) as new:
            new.hardlink_to(original)
    except (DiskError, OSError):
        with written_whole(path) as file, open(original, "rb") as content:
            shutil.copyfileobj(content, file)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    write_bytes(path, text.encode())


@contextlib.contextmanager
def locked(folder: Path, refusal: str) -> Iterator[None]:
    """Keep other processes out of a folder that they would lock too; the lock ends with the process at the latest.

    Raises:
        UserError: another process has it, in the words of `refusal`.
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
    """Fail now rather than after hours of work, if files cannot be made in a folder (which need not exist yet).

    Args:
        folders: flag -> its folder, None where nothing is to be written.
    """
    for flag, folder in folders.items():
        if folder is None:
            continue
        nearest = _nearest(folder)
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(
                f"{flag} {folder}: {nearest} is not a folder that can be written to; choose another"
            )


def _nearest(folder: Path) -> Path:
    """The folder itself, or the first above it that exists."""
    return next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())


def free_bytes(folder: Path) -> int:
    """Room on the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(_nearest(folder)).free


def check_new_or_empty(flag: str, folder: Path) -> None:
    """Reject a path that is not a folder, or is one with files, for a folder that is written as a whole."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if os.path.lexists(folder):
        raise UserError(f"{flag} {folder} exists already: choose a new or empty folder")


def check_file_writable(files: dict[str, Path | None]) -> None:
    """Fail now if files cannot be written: flag -> the file, None where none is to be written."""
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
    """Tell whether something is at the path of a checkpoint, or at the path with one of its endings."""
    return any(Path(f"{checkpoint}{ending}").exists() for ending in ("", *CHECKPOINT_ENDINGS))


def find_checkpoint(flag: str, path: Path) -> Path:
    """Find the checkpoint file that a path stands for: itself, itself with its ending, or the only one in a run folder.

    Raises:
        UserError: there is none, or a folder holds several; the flag is named.
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
    raise UserError(
        f"{flag}: no checkpoint at {path}: pass a file, or a folder with one; also looked for {path.name}.pt, *.pt in "
        "the folder, and .safetensors"
    )


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that lie in a folder; none where there is no such folder."""
    return sorted(file for file in folder.glob("*") if file.suffix in CHECKPOINT_ENDINGS)


def file_size(path: Path) -> int | None:
    """Bytes of a file, None where there is none, not even by a name that no file can have."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


SAMPLE = 4096  # bytes at the beginning, in the middle and at the end of a file


def sample_digest(path: str | Path) -> str:
    """SHA-256 of a file's size and of its first, middle and last 4 KiB, which are all of a small one."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb", buffering=0) as file:
        size = os.fstat(descriptor).st_size
        digest = hashlib.sha256(f"{size} ".encode())
        if size <= 3 * SAMPLE:
            digest.update(file.read())
        else:
            for start in (0, (size - SAMPLE) // 2, size - SAMPLE):
                file.seek(start)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()


# Of a file: absolute path, bytes, and a number that tells its modification time and content, see `stamp`.
Identity = tuple[str, int, int]


def file_identities(paths: list[Path], told_by: str = "sample") -> list[Identity]:
    """Tell files apart: another image, another identity.

    Args:
        told_by: see `stamp`.
    """
    # A folder once: resolving it again for each file takes as long as all else.
    resolved = functools.cache(Path.resolve)
    identities = []
    for path in paths:
        real = path.resolve() if path.is_symlink() else resolved(path.parent) / path.name
        status = path.stat()
        identities.append((str(real), status.st_size, stamp(path, status, told_by)))
    return identities


def stamp(path: str | Path, status: os.stat_result, told_by: str) -> int:
    """A number that is another one where a file has changed.

    Args:
        told_by: "time", its modification time alone, in ns; "sample", that and a sample of its bytes, see
            `sample_digest`; "content", that and all of its bytes. Numbers of one kind have none of another.
    """
    if told_by == "time":
        return status.st_mtime_ns
    content = file_digest(Path(path)) if told_by == "content" else sample_digest(path)
    told = f"{told_by} {status.st_mtime_ns} {content}"
    return int.from_bytes(hashlib.sha256(told.encode()).digest()[:7], "big")
