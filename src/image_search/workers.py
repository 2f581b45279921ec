"""Processes that decode uploads and images, each with a limit on time and memory.

They are forked from a process that has loaded the packages and shares their memory; the server itself has threads and
may use a GPU, so it must not be forked.
"""

import asyncio
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable
from concurrent.futures import TimeoutError as OutOfTime
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, TypeVar

from pebble import ProcessExpired, ProcessPool

SECONDS = 10  # per job: many times what the largest accepted image needs
LOADED = ["__main__", "data_utils", "image_search.uploads"]  # before processes are forked

Outcome = TypeVar("Outcome")


class Overrun(Exception):
    """A job exceeded its time or memory, or ended its process."""


class Pool:
    """A pool of processes that start with the first job and are replaced when they end.

    Args:
        workers: number of processes.
        memory: bytes that a process may allocate beyond those it starts with.
        seconds: time limit of a job.
    """

    def __init__(self, workers: int, *, memory: int, seconds: float = SECONDS) -> None:
        self.memory = memory
        self.seconds = seconds
        self._workers = workers
        self._pool = self._new_pool()

    def _new_pool(self) -> ProcessPool:
        return ProcessPool(
            self._workers,
            initializer=_begin,
            initargs=[self.memory],
            context=multiprocessing.get_context("forkserver"),
        )

    def prepare(self) -> None:
        """Start the processes, which takes seconds, before there is a job."""
        _load_packages()
        self._pool.schedule(os.getpid)

    async def run(self, function: Callable[..., Outcome], *arguments: Any) -> Outcome:
        """Return the result of a module-level function that runs in a process.

        Raises:
            Overrun: the job exceeded its limits.
            UserError: the function raised it.
        """
        if not self._pool.active:  # an idle process was killed from outside
            self.close()
            self._pool = self._new_pool()
        job = self._pool.schedule(function, args=arguments, timeout=self.seconds)
        # A request is cancelled only when the server ends, which ends its job too.
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        job.add_done_callback(lambda _: loop.is_closed() or loop.call_soon_threadsafe(done.set))
        await done.wait()
        try:
            return job.result()
        except (OutOfTime, MemoryError, ProcessExpired, BrokenProcessPool):
            raise Overrun from None

    def close(self) -> None:
        """End the processes and their jobs."""
        self._pool.stop()
        self._pool.join()


def _load_packages() -> None:
    """Start the process that others are forked from; before Python 3.14 it finds modules only through PYTHONPATH."""
    forkserver.set_forkserver_preload(LOADED)
    source = str(Path(__file__).resolve().parents[1])
    earlier = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = source if earlier is None else f"{source}{os.pathsep}{earlier}"
    try:
        forkserver.ensure_running()
    finally:
        if earlier is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = earlier


def _begin(memory: int) -> None:
    """Prepare a process: limit its memory, and use one thread, since processes are many."""
    import resource

    import torch

    signal.signal(
        signal.SIGTERM, signal.SIG_DFL
    )  # Pebble's handler would wait for the decoder to return
    threading.Thread(target=_end_with_server, daemon=True).start()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would contain a user's image
    status = Path("/proc/self/status")
    if status.exists():
        used = re.search(r"VmData:\s+(\d+) kB", status.read_text())
        most = memory + (1024 * int(used[1]) if used else 0)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _end_with_server() -> None:
    """End this process when the server is gone, even if that was killed while a job is under way."""
    server = multiprocessing.parent_process()
    if server is not None:
        server.join()
        os._exit(1)
