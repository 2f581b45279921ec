"""Requests to stop: the signals that schedulers send before they kill, SIGTERM and SIGUSR1."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Collection, Iterator

from runtime import torchrun
from utils import Stopped

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
# How worker processes are started: where they are forked, their parent is the process that they work for, which
# `heed_parent_alone` needs. It was Python's own choice on Linux until 3.14.
START_METHOD = "fork" if sys.platform == "linux" else None
# What ends a process that saves nothing: a container, a terminal, a terminal that is closed.
ENDING_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
)
LOOK_EVERY = 5  # seconds between two looks of a worker at whether its parent is still there


class StopRequest:
    """Record of a received signal. It interrupts nothing: code that can stop checks it.

    Attributes:
        requested: the signal's name; "" until it has come.
    """

    def __init__(self) -> None:
        self.requested = ""
        self.torchrun = os.getppid() if torchrun.launched() else None

    def signal_name(self) -> str:
        """The name of the signal that asks for a stop, "" for none.

        The end of torchrun asks for one too: a signal that it does not pass on ends it, and leaves its processes alive.
        """
        if self.torchrun not in (None, os.getppid()):
            self.requested = self.requested or "the end of torchrun"
        return self.requested

    def handle(self, number: int, frame: object) -> None:
        """Note a signal; Python calls this when it comes."""
        self.requested = signal.Signals(number).name

    def check(self) -> None:
        """Raise Stopped if a signal has come. Called where nothing would be lost.

        Several processes wait for each other's results, so they stop together, between two steps, and not here.
        """
        if self.torchrun is None:
            self.check_alone()

    def check_alone(self) -> None:
        """Raise Stopped if a signal has come where no process waits for another's results."""
        if self.signal_name():
            raise Stopped(self.requested)


@contextlib.contextmanager
def listening(signals: Collection[signal.Signals] = SIGNALS) -> Iterator[StopRequest]:
    """Take signals as requests until the end of the context, which restores what they did before.

    Signals reach the main thread alone; in another thread nothing is heard.
    """
    request = StopRequest()
    heard = signals if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, request.handle) for number in heard}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def heeded_endings() -> list[signal.Signals]:
    """The signals that end this process; those that `nohup` or a shell lets it ignore are not among them."""
    return [number for number in ENDING_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Hold the signals back while processes are started, which would die of one before they can handle it.

    The signals stay blocked in those processes until they call `heed_parent_alone`.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def heed_parent_alone() -> None:
    """In a worker process: end by a signal of the process that started it, and ignore everybody else's.

    Schedulers and terminals signal all processes of a job. A worker that died of that would break the step of its
    parent, which has a state to save. A thread waits for the signals, because a thread that waits learns who sent
    them; it also ends a worker whose parent is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigtimedwait"):  # macOS, where no scheduler signals
        return
    parent = os.getppid()
    of_parent = socket_folder()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def take() -> None:
        sender = None
        while sender != parent and os.getppid() == parent:
            taken = signal.sigtimedwait(SIGNALS, LOOK_EVERY)
            sender = taken.si_pid if taken else None
        own = socket_folder()
        if own and own != of_parent:
            shutil.rmtree(own, ignore_errors=True)
        os._exit(0)

    threading.Thread(target=take, daemon=True).start()


def socket_folder() -> str | None:
    """Return this process's folder in the temporary directory, which Python makes where batches are handed over.

    Python deletes it at an end of its own alone, and `os._exit` is none.
    """
    return getattr(multiprocessing.current_process(), "_config", {}).get("tempdir")
