"""Worker processes that decode uploads and images, each with limits on time and memory.

Workers are forked from a process that has loaded the packages, and share its memory. The server itself must not be
forked, because it has threads and may use a GPU.
"""

import asyncio
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, TypeVar

from pebble import ProcessExpired, ProcessPool

SECONDS = 10  # time limit of a job; the largest accepted image needs a fraction of it
# Modules that are imported before processes are forked.
LOADED = ["__main__", "data_utils", "image_search.uploads"]
# All pools share the process that workers are forked from, and the environment that it starts in.
STARTING = threading.Lock()

Outcome = TypeVar("Outcome")


class Overrun(Exception):
    """Error for a job that exceeded its time or memory, or that ended its process."""


class Pool:
    """A pool of processes that start with the first job and are replaced when they end.

    Args:
        workers: number of processes.
        memory: maximum number of bytes that a process may allocate in addition to its initial memory.
        seconds: time limit of a job.
    """

    def __init__(self, workers: int, *, memory: int, seconds: float = SECONDS) -> None:
        self.memory = memory
        self.seconds = seconds
        self._workers = workers
        self._pool: ProcessPool | None = None

    def start(self) -> None:
        """Start the processes, unless they are running. It takes seconds, so a server calls it in a thread."""
        with STARTING:
            if self._is_running():
                return
            self.close()  # a pool breaks when another program kills an idle process
            _load_packages()
            pool = ProcessPool(
                self._workers,
                initializer=_begin,
                initargs=[self.memory],
                context=multiprocessing.get_context("forkserver"),
            )
            pool.schedule(os.getpid)  # a pool forks its processes at its first job
            self._pool = pool

    def _is_running(self) -> bool:
        return self._pool is not None and self._pool.active

    async def run(self, function: Callable[..., Outcome], *arguments: Any) -> Outcome:
        """Run a module-level function in a process, and return its result.

        Raises:
            Overrun: the job exceeded its limits.
            UserError: the function raised it.
        """
        if not self._is_running():
            await asyncio.to_thread(self.start)
        assert self._pool is not None
        job = self._pool.schedule(function, args=arguments, timeout=self.seconds)
        # A request is cancelled only when the server ends, which also ends the request's job.
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        job.add_done_callback(lambda _: loop.is_closed() or loop.call_soon_threadsafe(done.set))
        await done.wait()
        try:
            return job.result()
        except (TimeoutError, MemoryError, ProcessExpired, BrokenProcessPool):
            raise Overrun from None

    def close(self) -> None:
        """End the processes and their jobs."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()


def _load_packages() -> None:
    """Start the process that workers are forked from; before Python 3.14, it finds modules only through PYTHONPATH."""
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
    """Prepare a process: limit its memory, and use one thread, because several processes share the cores."""
    import resource

    import torch

    # Pebble's own handler would wait for the decoder to return.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_server, daemon=True).start()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would contain a user's image
    status = Path("/proc/self/status")
    if status.exists():
        used = re.search(r"VmData:\s+(\d+) kB", status.read_text())
        most = memory + (1024 * int(used[1]) if used else 0)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _end_with_server() -> None:
    """Exit this process when the server ends, even if the server is killed during a job."""
    server = multiprocessing.parent_process()
    if server is not None:
        server.join()
        os._exit(1)
