"""Handle requests to stop: SIGTERM and SIGUSR1, the signals that schedulers send before they kill a job."""

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
# How workers are started. The parent of a forked worker is the process that it works for, on which `heed_parent_alone`
# relies. Fork was Python's default on Linux until 3.14.
START_METHOD = "fork" if sys.platform == "linux" else None
# Signals that end a process without a state to save; they come from a container, Ctrl-C, and a closed terminal.
ENDING_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
)
LOOK_EVERY = 5  # seconds between two checks by a worker whether its parent still exists


class StopRequest:
    """Record of a received signal. It does not interrupt code; code that can stop checks it.

    Attributes:
        requested: name of the signal; "" until a signal is received.
    """

    def __init__(self) -> None:
        self.requested = ""
        self.torchrun = os.getppid() if torchrun.launched() else None

    def signal_name(self) -> str:
        """Return the name of the signal that requests a stop; "" if there is no request.

        The end of torchrun is a request too: a signal that torchrun does not forward ends it, but
        not its processes.
        """
        if self.torchrun not in (None, os.getppid()):
            self.requested = self.requested or "the end of torchrun"
        return self.requested

    def handle(self, number: int, frame: object) -> None:
        """Record a signal; Python calls this method when it receives the signal."""
        self.requested = signal.Signals(number).name

    def check(self) -> None:
        """Raise Stopped if a signal was received. Call this only when no work would be lost.

        Processes started by torchrun do not stop here: they wait for each other, so they stop
        together between steps.
        """
        if self.torchrun is None:
            self.check_alone()

    def check_alone(self) -> None:
        """Raise Stopped if a signal was received. Call this only when no other process waits for this one."""
        if self.signal_name():
            raise Stopped(self.requested)


@contextlib.contextmanager
def listening(signals: Collection[signal.Signals] = SIGNALS) -> Iterator[StopRequest]:
    """Treat signals as requests until the end of the context, which restores the earlier handlers.

    Only the main thread can handle signals; in another thread, no request is recorded.
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
    """Return the signals that end this process, without the signals that `nohup` or a shell makes it ignore."""
    return [number for number in ENDING_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Block the signals while processes are started, since a signal would kill a process that cannot handle it yet.

    In the new processes, the signals stay blocked until `heed_parent_alone` is called.
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
    """Make a worker process end on a signal from its parent, and ignore signals from all other processes.

    Schedulers and terminals signal all processes of a job. If such a signal ended a worker, its
    parent's current step would fail before the parent could save its state. A thread waits for the
    signals, because only waiting reveals the sender; the thread also ends a worker whose parent has
    ended.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigtimedwait"):  # macOS, where no scheduler sends signals
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
    """Return this process's temporary folder for sockets, which Python makes to pass batches on; None if it has none.

    Python deletes the folder only at a normal exit, not after `os._exit`.
    """
    return getattr(multiprocessing.current_process(), "_config", {}).get("tempdir")
