"""Lowest layer: errors for the user, what wraps a script, seed, and how flags and numbers are spelled."""

import contextlib
import errno
import functools
import io
import logging
import os
import platform
import random
import select
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[1]
# Lengths of features from which a direction can be told: float32 loses the squares of shorter and of longer ones.
SHORTEST_FEATURE = 1e-6
LONGEST_FEATURE = 1e18
DEBUG = "--debug"  # of every script: a fault is printed in full
BROKEN_PIPE = 128 + 13  # what shells call a program that ended since nobody reads what it prints

INTERRUPTED = ("interrupted", 130)

WORKERS_REMEDY = (
    "give a container more shared memory (docker run --shm-size=8g), or decode images without worker processes: "
    "--num-workers 0"
)
HOME_REMEDY = "set HOME to a folder that can be written to, and USER to any name"
# What the operating system refuses -> how to put it right.
REMEDIES = {
    errno.EACCES: "change its permissions, or choose another path",
    errno.EPERM: "change its permissions, or choose another path",
    errno.EROFS: "choose a folder that can be written to",
    errno.ENOSPC: "free disk space, or choose another disk",
    errno.EDQUOT: "free disk space, or choose another disk",
    errno.EMFILE: "raise the limit of open files (ulimit -n) or lower --num-workers",
    errno.ENFILE: "close other programs or lower --num-workers",
    errno.EAGAIN: "raise the limit of processes and threads (ulimit -u) or lower --num-workers",
    errno.ENOMEM: "lower --batch-size or --num-workers, or use a machine with more memory",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "remove the symlink that leads back to itself",
    errno.EBADF: "redirect stdout and stderr to where they can be written",
}
OTHER_REMEDY = "check that it exists and can be used"
# What is said, without an error number, where the same is refused -> how to put it right.
SIGNS = {
    "is killed by signal": WORKERS_REMEDY,
    "exited unexpectedly": WORKERS_REMEDY,
    "unable to allocate shared memory": WORKERS_REMEDY,
    "received 0 items of ancdata": REMEDIES[errno.EMFILE],
    "t allocate memory": REMEDIES[errno.ENOMEM],  # can't, Cannot
    "failed to map segment": REMEDIES[errno.ENOMEM],
    "can't start new thread": REMEDIES[errno.EAGAIN],
    "Resource temporarily unavailable": REMEDIES[errno.EAGAIN],
    "Too many open files": REMEDIES[errno.EMFILE],
    "No space left on device": REMEDIES[errno.ENOSPC],
    "Could not determine home directory": HOME_REMEDY,
    "uid not found": HOME_REMEDY,  # of who runs it, where there is no list of users
    "AF_UNIX path too long": "set TMPDIR to a folder with a shorter path",
    "No usable temporary directory": "set TMPDIR to a folder that can be written to",
}


class UserError(Exception):
    """Something the user can put right: one line that names the file or the flag, and the remedy.

    It stays one line whatever is in the names that it quotes.
    """

    def __init__(self, message: object) -> None:
        super().__init__(printable(message))


class DiskError(UserError):
    """A file could not be written; the earlier one is as it was."""


class Stopped(BaseException):
    """A signal asked a training to stop, and everything needed to resume it is on disk.

    Attributes:
        signal: its name.
        remedy: how to go on.
    """

    def __init__(
        self,
        signal: str,
        remedy: str = "nothing was trained yet: run the same command again",
    ):
        super().__init__(signal, remedy)
        self.signal = signal
        self.remedy = remedy


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap a script's `main`: whatever ends it is one line on stderr, and an exit code.

    0 where a signal stopped it with everything saved, 1 for a fault of ours, 2 for what the user can put right, 130 for
    Ctrl-C, 141 where nobody reads any more what it prints.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> None:
        script = Path(main.__code__.co_filename).name
        words = sys.argv[1:] if argv is None else argv
        open_closed_streams()
        speak_plainly()
        try:
            with all_printed():
                main(argv)
        except Exception as error:
            line, code = _last_words(error, script, words)
            if DEBUG in words:
                traceback.print_exc()
        except Stopped as stop:
            line, code = f"stopped by {stop.signal}; {stop.remedy}", 0
        except KeyboardInterrupt:
            line, code = INTERRUPTED
        else:
            return
        if line:
            with contextlib.suppress(OSError):  # nobody can be told that it cannot be printed
                print(f"{script}: {line}", file=sys.stderr)
        raise SystemExit(code) from None

    return run


def _last_words(error: Exception, script: str, words: list[str]) -> tuple[str, int]:
    """Return the message for an exception that ends a script, "" for none, and the exit code."""
    if isinstance(error, UserError):
        return f"error: {error}", 2
    if _comes_of_ctrl_c(error):
        return INTERRUPTED
    if isinstance(error, BrokenPipeError) and _nobody_reads():
        return "", BROKEN_PIPE
    if type(error).__name__ == "OutOfMemoryError":  # of torch, which is not loaded just to ask
        remedy = "lower --batch-size, --micro-batch-size or --similarity-block, or use --gradient-checkpointing"
        return f"error: the GPU's memory is full ({first_line(error)[:80]}): {remedy}", 2
    if explained := refusal_of_the_machine(error):
        return f"error: {explained}", 2
    reason = f"{type(error).__name__}: {first_line(error)[:200]}"
    return (
        f"fault: {printable(reason)}. This is a bug of the program: please report it with {_report(script, words)}",
        1,
    )


def refusal_of_the_machine(error: Exception) -> str | None:
    """One line with a remedy where the operating system refused something; None for any other exception."""
    if isinstance(error, MemoryError):
        reason = first_line(error)
        return printable(f"the memory is full ({reason[:120]}): {REMEDIES[errno.ENOMEM]}")
    if isinstance(error, OSError) and error.filename is not None:
        remedy = REMEDIES.get(error.errno or 0, OTHER_REMEDY)
        name = error.filename
        file = os.fsdecode(name) if isinstance(name, bytes) else name
        return printable(f"{file}: {error.strerror}: {remedy}")
    if isinstance(error, OSError) and error.errno in REMEDIES:
        return printable(f"{error.strerror}: {REMEDIES[error.errno]}")
    for sign, remedy in SIGNS.items():
        # A worker process sends its error as a traceback in text.
        for line in str(error).splitlines():
            if sign in line:
                return printable(f"{line.strip().rstrip('.')[:120]}: {remedy}")
    return None


def _comes_of_ctrl_c(error: BaseException | None) -> bool:
    """Check whether an exception was caused by Ctrl-C, as in a package that was interrupted while it was loaded."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _report(script: str, words: list[str]) -> str:
    """Write the exception being handled in full to a new file of the temporary folder; what to say of it.

    Of what was typed it holds the names of flags alone: values may be secret.
    """
    flags = [word.partition("=")[0] for word in words if word.startswith("-")]
    lines = [
        shlex.join([script, *flags]),
        f"Python {platform.python_version()}, {platform.platform()}",
        traceback.format_exc(),
    ]
    try:
        descriptor, name = tempfile.mkstemp(prefix="clip4cir-fault-", suffix=".txt")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("\n".join(lines))
    except OSError:  # no temporary folder, or a full one
        return f"what it prints with {DEBUG}"
    return name


def open_closed_streams() -> None:
    """Let what is read from or printed to a stream that a shell has closed (`2>&-`) come from and go to nowhere.

    Otherwise the next file that is opened gets the stream's number, and what packages print.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # It gets the lowest number that is free, which is that of the closed stream.
            nowhere = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115 - as long as the process
            os.set_inheritable(nowhere.fileno(), True)
            setattr(sys, name, nowhere)


def speak_plainly() -> None:
    """Let logs go to stderr, a line each, and print what an encoding lacks as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine())
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class OneLine(logging.Formatter):
    """The message alone; a name in it stays in its line, whatever characters it has."""

    def format(self, record: logging.LogRecord) -> str:
        if isinstance(record.args, tuple):
            args = [printable(arg) if isinstance(arg, str | Path) else arg for arg in record.args]
            record = logging.makeLogRecord({**vars(record), "args": tuple(args)})
        return super().format(record)


@contextlib.contextmanager
def all_printed() -> Iterator[None]:
    """Let what is printed reach stdout before the context ends, where it can still be said that it did not."""
    try:
        yield
    except SystemExit:
        print(end="", flush=True)
        raise
    print(end="", flush=True)


def _nobody_reads() -> bool:
    """Check whether stdout or stderr is a pipe whose reader is gone; if so, redirect further output to nowhere."""
    if not hasattr(select, "poll"):  # Windows
        return False
    gone = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # not a file, closed, None
            gone.register(stream.fileno(), 0)
    broken = [number for number, event in gone.poll(0) if event & select.POLLERR]
    for number in broken:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return bool(broken)


def seed_everything(seed: int) -> None:
    """Seed python and torch (all devices)."""
    import torch

    random.seed(seed)
    torch.manual_seed(seed)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def printable(text: object) -> str:
    """A text in one line: line breaks, escape sequences and half characters as Python spells them in a string."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(text))


def flag(name: str) -> str:
    """A flag as it is typed, from the name that its value has: "clip_bs" -> "--clip-bs"."""
    return "--" + name.replace("_", "-")


def format_metric(value: float, sign: str = "") -> str:
    """A metric as every table, log and page shows it; a difference of metrics with the sign "+"."""
    return f"{value:{sign}.2f}"
