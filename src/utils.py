"""Lowest layer: user-facing errors, the wrapper around every script, random seeds, formatting of flags and numbers."""

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
# Smallest and largest norm of a feature with a usable direction: beyond them, squares under- or overflow in float32.
SHORTEST_FEATURE = 1e-6
LONGEST_FEATURE = 1e18
DEBUG = "--debug"  # flag of every script: print the traceback of an error
BROKEN_PIPE = 128 + 13  # exit code by which shells report a closed output pipe

INTERRUPTED = ("interrupted", 130)

WORKERS_REMEDY = (
    "give a container more shared memory (docker run --shm-size=8g), or decode images without worker processes: "
    "--num-workers 0"
)
HOME_REMEDY = "set HOME to a folder that can be written to, and USER to any name"
# Error number of the operating system -> remedy.
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
    errno.EBADF: "redirect stdout and stderr to where they can be written",
}
OTHER_REMEDY = "check that it exists and can be used"
# Words of an error message that comes without an error number -> remedy.
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
    "uid not found": HOME_REMEDY,  # the machine has no entry for the user
    "AF_UNIX path too long": "set TMPDIR to a folder with a shorter path",
    "No usable temporary directory": "set TMPDIR to a folder that can be written to",
}


class UserError(Exception):
    """An error that the user can fix; its message is one line with the file or the flag, and the remedy.

    Line breaks and control characters in quoted names are escaped.
    """

    def __init__(self, message: object) -> None:
        super().__init__(printable(message))


class DiskError(UserError):
    """A file could not be written; its previous version is unchanged."""


class Stopped(BaseException):
    """A signal stopped a training run, after everything needed to resume the run was saved.

    Attributes:
        signal: name of the signal.
        remedy: instruction to resume the run.
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
    """Wrap a script's `main` so that every error becomes one line on stderr and an exit code.

    The code is 0 if a signal stopped the script after everything was saved, 1 for a bug in this project, 2 for an error
    that the user can fix, 130 for Ctrl-C, and 141 for a closed output pipe.
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
            with contextlib.suppress(OSError):  # a failure to print to stderr cannot be reported
                print(f"{script}: {line}", file=sys.stderr)
        raise SystemExit(code) from None

    return run


def _last_words(error: Exception, script: str, words: list[str]) -> tuple[str, int]:
    """Return the message ("" for none) and the exit code for an exception that ends a script."""
    if isinstance(error, UserError):
        return f"error: {error}", 2
    if _comes_of_ctrl_c(error):
        return INTERRUPTED
    if isinstance(error, BrokenPipeError) and _nobody_reads():
        return "", BROKEN_PIPE
    if type(error).__name__ == "OutOfMemoryError":  # torch's class, without importing torch
        remedy = "lower --batch-size, --micro-batch-size or --similarity-block, or use --gradient-checkpointing"
        return f"error: the GPU's memory is full ({first_line(error)[:80]}): {remedy}", 2
    if explained := refusal_of_the_machine(error):
        return f"error: {explained}", 2
    reason = f"{type(error).__name__}: {first_line(error)[:200]}"
    return (
        f"fault: {printable(reason)}. This is a bug in the program: please report it with {_report(script, words)}",
        1,
    )


def refusal_of_the_machine(error: Exception) -> str | None:
    """Return one line with a remedy for an error of the operating system; None for any other exception."""
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
        # An error of a worker process arrives as a message that contains its traceback.
        for line in str(error).splitlines():
            if sign in line:
                return printable(f"{line.strip().rstrip('.')[:120]}: {remedy}")
    return None


def _comes_of_ctrl_c(error: BaseException | None) -> bool:
    """Check whether an exception was caused by Ctrl-C, such as the failed import of an interrupted package."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _report(script: str, words: list[str]) -> str:
    """Write the current traceback to a new temporary file; return the file's path, or how to print the traceback.

    The file contains the flags of the command without their values, which may be secret.
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
    except OSError:  # there is no temporary folder, or its disk is full
        return f"what it prints with {DEBUG}"
    return name


def open_closed_streams() -> None:
    """Connect streams that the shell has closed (`2>&-`) to the null device.

    Otherwise the next file that is opened would get the descriptor of the stream, and packages would print into it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # It gets the lowest free descriptor, which is the descriptor of the closed stream.
            nowhere = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115 - open until the process ends
            os.set_inheritable(nowhere.fileno(), True)
            setattr(sys, name, nowhere)


def speak_plainly() -> None:
    """Send logs to stderr, one line per message, and print characters that the encoding lacks as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine())
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class OneLine(logging.Formatter):
    """Log format that consists of only the message, in one line: line breaks in its arguments are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        if isinstance(record.args, tuple):
            args = [printable(arg) if isinstance(arg, str | Path) else arg for arg in record.args]
            record = logging.makeLogRecord({**vars(record), "args": tuple(args)})
        return super().format(record)


@contextlib.contextmanager
def all_printed() -> Iterator[None]:
    """Flush stdout before the context ends, while an error can still be reported."""
    try:
        yield
    except SystemExit:
        print(end="", flush=True)
        raise
    print(end="", flush=True)


def _nobody_reads() -> bool:
    """Check whether stdout or stderr is a pipe whose reader is gone; if so, redirect it to the null device."""
    if not hasattr(select, "poll"):  # Windows
        return False
    gone = select.poll()
    for stream in (sys.stdout, sys.stderr):
        # The stream may not be a file, or may be closed or None.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            gone.register(stream.fileno(), 0)
    broken = [number for number, event in gone.poll(0) if event & select.POLLERR]
    for number in broken:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return bool(broken)


def seed_everything(seed: int) -> None:
    """Seed the random generators of Python and, on all devices, torch."""
    import torch

    random.seed(seed)
    torch.manual_seed(seed)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its type if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def printable(text: object) -> str:
    """Return a text on one line, with line breaks, control characters and lone surrogates escaped as in Python."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(text))


def flag(name: str) -> str:
    """Return a flag as it is typed, from the name of its value: "clip_bs" -> "--clip-bs"."""
    return "--" + name.replace("_", "-")


def format_metric(value: float, sign: str = "") -> str:
    """Format a metric for tables, logs and pages; with the sign "+", format a difference of metrics."""
    return f"{value:{sign}.2f}"
