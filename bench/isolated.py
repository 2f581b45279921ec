"""Run a case in a forked process, so that an error, a crash, full memory or a hang does not affect other cases.

The process that forks must not have used a GPU, because CUDA does not survive a fork.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

from timing import Row, Setting

FORK = multiprocessing.get_context("fork")
A_DAY = 86_400.0  # seconds, in effect no time limit
OUT_OF_TIME = "out of time"
SHOWN = 20  # number of the last lines of a failed case's output that are shown

Run = Callable[[Setting], Iterable[Row]]


@dataclass
class Attempt:
    """Result of a case: its finished rows, the error that ended it early, and its duration in seconds."""

    rows: list[Row] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0


def attempt(run: Run, setting: Setting, most: float, say: Callable[[Row], object]) -> Attempt:
    """Run a case. Its finished rows are kept even if it fails later.

    Args:
        most: seconds after which the case is ended.
        say: function that is called with each row as soon as the row is finished.
    """
    start = time.monotonic()
    made = Attempt()
    ours, theirs = FORK.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        process = FORK.Process(target=_work, args=(run, setting, theirs, folder))
        process.start()
        theirs.close()
        try:
            made.error = _listen(ours, process, start + most, made.rows, say)
        finally:
            process.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # processes that the case started
            process.join()
            ours.close()
        if made.error:
            said = _log(folder).read_text(errors="replace").strip().splitlines()
            made.error = "\n".join([made.error, *said[-SHOWN:]])
    made.seconds = round(time.monotonic() - start, 1)
    return made


def _listen(
    ours: Connection,
    process: multiprocessing.Process,
    deadline: float,
    rows: list[Row],
    say: Callable[[Row], object],
) -> str:
    """Receive rows until the case ends; return the reason if it failed, else ""."""
    while ready := wait([ours, process.sentinel], max(0.0, deadline - time.monotonic())):
        try:
            if ours not in ready:
                raise EOFError
            kind, content = ours.recv()
        except EOFError:
            process.join()
            return f"its process died (exit code {process.exitcode})"
        if kind == "end":
            return content
        rows.append(content)
        say(content)
    return OUT_OF_TIME


def _work(run: Run, setting: Setting, theirs: Connection, folder: str) -> None:
    """Run a case in its own process, and send its rows to the parent process."""
    os.setsid()
    tempfile.tempdir = folder  # the parent deletes it, even if it ends the case
    sys.modules["matplotlib"] = None  # runs then draw no curves, which would take seconds
    write_to(_log(folder))
    try:
        for row in run(setting):
            theirs.send(("row", row))
        theirs.send(("end", ""))
    except BaseException as error:
        traceback.print_exc()
        theirs.send(("end", f"{type(error).__name__}: {error}"))


def _log(folder: str) -> Path:
    return Path(folder) / "log"


def write_to(log: Path) -> None:
    """Redirect the output of this process, and of the processes that it starts, to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # Line buffering keeps the last lines even if the process is killed.
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
