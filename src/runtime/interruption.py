"""Requests to stop: the signals that schedulers send before they kill, SIGTERM and SIGUSR1."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from runtime import distributed
from utils import Stopped

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
PATIENCE = 5  # seconds between two looks of a worker at whether its parent is still there


class StopRequest:
    """Whether one of the signals has come. Nothing is interrupted by it: who can stop looks here.

    Attributes:
        requested: the signal's name; "" until it has come.
    """

    def __init__(self) -> None:
        self.requested = ""
        self.parent = os.getppid() if distributed.launched() else None

    def look(self) -> str:
        """`requested`, which the end of torchrun is too: a signal that it does not pass on ends it alone."""
        if self.parent not in (None, os.getppid()):
            self.requested = self.requested or "the end of torchrun"
        return self.requested

    def handle(self, number: int, frame: object) -> None:
        """What the signals call."""
        self.requested = signal.Signals(number).name

    def check(self) -> None:
        """Raise Stopped if a signal has come, where nothing would be lost.

        Several processes wait for each other's results, so they stop together, between two steps, and not here.
        """
        if self.requested and distributed.world_size() == 1:
            raise Stopped(self.requested)


@contextlib.contextmanager
def listening() -> Iterator[StopRequest]:
    """Take the signals as requests; what they did before is put back at the end.

    Signals reach the main thread alone; in another one nothing is heard.
    """
    request = StopRequest()
    heard = SIGNALS if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, request.handle) for number in heard}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Keep the signals waiting: processes that are started meanwhile do not die of them before they can say what to do.

    What they are started with stays blocked in them until `heed_parent_alone`.
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
    """In a worker process: take SIGTERM from the process that started it, and leave the others' signals to that one.

    Schedulers and terminals signal all processes of a job. A worker that died of it would break the step that the
    parent is in, which has a state to save. A thread takes the signals, for it learns who sent them, and ends a worker
    whose parent is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigtimedwait"):  # macOS, where no scheduler signals
        return
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def take() -> None:
        sender = None
        while sender != parent and os.getppid() == parent:
            taken = signal.sigtimedwait(SIGNALS, PATIENCE)
            sender = taken.si_pid if taken else None
        os._exit(0)

    threading.Thread(target=take, daemon=True).start()
