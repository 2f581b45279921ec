"""A case in a process of its own, forked from this one: what it raises, breaks, fills or hangs costs no other case.

The process that forks must not have used a GPU: CUDA does not survive a fork.
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
A_DAY = 86_400.0  # seconds: as long as it takes
OUT_OF_TIME = "out of time"
SHOWN = 20  # lines of what a case that failed said last

Run = Callable[[Setting], Iterable[Row]]


@dataclass
class Attempt:
    """What came of a case: its finished rows, why it ended early, and the seconds it took."""

    rows: list[Row] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0


def attempt(run: Run, setting: Setting, most: float, say: Callable[[Row], object]) -> Attempt:
    """Run a case; each row is said as it is finished, and kept whatever happens later.

    Args:
        most: seconds after which the case is ended.
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
                os.killpg(process.pid, signal.SIGKILL)  # what the case started
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
    """Take rows until the case ends; why it did not end well, or nothing."""
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
    """The case's process."""
    os.setsid()
    tempfile.tempdir = folder  # emptied also where the case is ended
    sys.modules["matplotlib"] = None  # the curves of runs are not wanted: they take seconds to draw
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
    """Let a file have what this process says, and the processes that it starts."""
    sys.stdout.flush()
    sys.stderr.flush()
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # What was said last is there also where the process is killed.
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
