"""Ground floor: errors for the user, seed, logging, and files that are whole or not there."""

import contextlib
import functools
import json
import logging
import os
import pickle
import random
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PROJECT_ROOT = Path(__file__).resolve().parents[1]


# What reading a damaged checkpoint raises.
LOADING_ERRORS = (OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError, OverflowError, MemoryError)
LOADING_ERRORS += (NotImplementedError, struct.error, zlib.error, zipfile.BadZipFile)


class UserError(Exception):
    """Something the user can put right: one line that names the file or the flag, and the remedy.

    It stays one line whatever is in the names that it quotes.
    """

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).splitlines()))


class DiskError(UserError):
    """A file could not be written; the earlier one is as it was."""


class Stopped(BaseException):
    """A signal asked a training to stop, and what is needed to go on with it is on disk.

    Attributes:
        signal: its name.
        remedy: how to go on.
    """

    def __init__(self, signal: str, remedy: str = "nothing was trained yet: start it again with the same command"):
        super().__init__(signal, remedy)
        self.signal, self.remedy = signal, remedy


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap a script's `main`: a UserError becomes one line on stderr and exit code 2, Ctrl-C 130, a stop signal 0."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> None:
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        script = Path(main.__code__.co_filename).name
        try:
            main(argv)
        except UserError as error:
            print(f"{script}: error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except torch.OutOfMemoryError as error:
            remedy = "lower --batch-size, --micro-batch-size or --similarity-block, or use --gradient-checkpointing"
            print(f"{script}: error: the GPU's memory is full ({first_line(error)[:80]}): {remedy}", file=sys.stderr)
            raise SystemExit(2) from None
        except Stopped as stop:
            print(f"{script}: stopped by {stop.signal}; {stop.remedy}", file=sys.stderr)
            raise SystemExit(0) from None
        except KeyboardInterrupt:
            print(f"{script}: interrupted; the files written so far are whole", file=sys.stderr)
            raise SystemExit(130) from None

    return run


def seed_everything(seed: int) -> None:
    """Seed python and torch (all devices)."""
    random.seed(seed)
    torch.manual_seed(seed)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def read_json(path: Path, writer: str | None = None) -> Any:
    """Parse a JSON file; a missing, unreadable or malformed one is a UserError that names it.

    Args:
        writer: the command that writes such a file; None for files of a dataset.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        remedy = f"write it with {writer}" if writer else "put the file there, or point --data-root at its dataset"
        raise UserError(f"{path} is missing: {remedy}") from None
    except (OSError, ValueError) as error:
        remedy = f"write it with {writer}" if writer else "download it"
        raise UserError(f"{path} is not a readable JSON file ({first_line(error)}): {remedy} again") from None


def parse_json(text: str) -> Any:
    """Parse JSON that says each thing once, in whole characters.

    Raises:
        ValueError: malformed, nested too deeply, an object with a repeated key (of which one value would be lost), or
            half a character (a lone surrogate), which no file could be written with.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
        return content

    try:
        content = json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if "\\ud" in text.lower():
        json.dumps(content, ensure_ascii=False).encode()
    return content


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that replaces `path` only when all of it is on disk; until then an earlier `path` stays as it was."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise DiskError(f"could not write {path} ({error.strerror}): free space or choose another folder") from None
    finally:
        with contextlib.suppress(OSError):  # there is none after the replace, nor where the folder is a file
            beside.unlink()


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
        nearest = next(p for p in [folder.absolute(), *folder.absolute().parents] if p.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"{flag} {folder}: {nearest} is not a folder that can be written to; choose another")


def check_file_writable(files: dict[str, Path | None]) -> None:
    """The same for files: flag -> the file, None where none is to be written."""
    for flag, file in files.items():
        if file is not None and file.is_dir():
            raise UserError(f"{flag} {file} is a folder: name a file")
    check_writable({flag: file and file.parent for flag, file in files.items()})


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    """`torch.save`, whole or not at all. Raises UserError where the disk refuses it."""
    with written_whole(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # what torch makes of a full disk, and of Ctrl-C
            if isinstance(error.__context__, KeyboardInterrupt):
                raise error.__context__ from None
            raise OSError(0, f"the disk refused it: {first_line(error)}") from None


def _check_sums(path: Path) -> None:
    """Raise BadZipFile where a checkpoint's parts are not what was written, which `torch.load` does not look at."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


def load_tensors(path: Path) -> dict[str, Any]:
    """`torch.load` on the CPU of a dict of tensors and plain types; code in a pickle is refused, never run.

    Raises:
        UserError: the file is missing, truncated, not a checkpoint, or holds more than tensors and plain types.
    """
    try:
        _check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except LOADING_ERRORS as error:
        raise UserError(f"{path} is not a readable checkpoint ({first_line(error)}): copy or train it again") from None
    except (pickle.UnpicklingError, AttributeError, TypeError):
        raise UserError(
            f"{path} is damaged or holds objects other than tensors and plain types, which could run code: refused; "
            "save it again as a dict of tensors"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dict: it is not a checkpoint of this project")
    return content


def find_checkpoint(path: Path) -> Path:
    """The checkpoint file that a path stands for: itself, itself with `.pt`, or the only one in a run folder.

    Raises:
        UserError: there is none, or a folder holds several.
    """
    candidates = [path, Path(f"{path}.pt")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    found = sorted(path.glob("*.pt")) or sorted(path.glob("saved_models/*.pt"))
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{path} holds several checkpoints ({', '.join(f.name for f in found)}): name one of them")
    raise UserError(f"no checkpoint at {path}: looked for it, for {candidates[1].name} and for *.pt in a folder of it")
