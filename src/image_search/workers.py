"""Processes that decode what visitors send: a job has so many seconds and so much memory, and is ended at either.

A template loads the packages once and forks the workers, which share its memory. It is a process of its own, because
the page has threads and may have a GPU, and must not be forked. When the page ends, however it does, all of them end.
"""

import asyncio
import contextlib
import gc
import importlib
import multiprocessing
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Future
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from image_search.guard import Places
from runtime import interruption
from utils import UserError

SECONDS = 10  # of a job: many times what the largest image that is taken needs
SHORTER = 5  # times less, while another visitor waits
LOADING = 120  # seconds for the template to load the packages on a busy machine
START = """
import sys
sys.path.insert(0, sys.argv[1])
from image_search import workers
workers.fork_on_demand(int(sys.argv[2]), sys.argv[3:])
"""

Outcome = TypeVar("Outcome")


class Overrun(Exception):
    """A job took more time or memory than it has, or was the end of its worker."""


class Worker:
    """A process that does one job after another.

    Args:
        line: to the process.
        kill: ends it at once.
        is_alive: whether it can still be asked.
    """

    def __init__(
        self, line: Connection, kill: Callable[[], None], is_alive: Callable[[], bool]
    ) -> None:
        self._line = line
        self.kill = kill
        self._is_alive = is_alive

    def is_idle(self) -> bool:
        """Return whether it waits for a job: one that has ended has closed its end of the line."""
        return self._is_alive() and not self._line.poll()

    def do(self, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        """The result of a function of a module, and the UserError that it raised; one of the two is None.

        Raises:
            OSError, EOFError: the process has ended.
        """
        self._line.send((function, arguments))
        return self._line.recv()


class Template:
    """Workers that are forked from a process that has some modules loaded. It starts with the first worker."""

    def __init__(self, modules: Sequence[str]) -> None:
        self._modules = modules
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._ended: list[int] = []
        self._is_closed = False

    def worker(self, memory: int) -> Worker:
        """Fork a worker; the first one waits until the modules are loaded.

        Args:
            memory: bytes that it may have beyond what it starts with.
        """
        with self._lock:
            if self._is_closed:
                raise EOFError
            if self._process is None or self._process.poll() is not None:
                self._start()
            # A process that has ended is asked for its exit code no sooner than here, so that until then no other
            # process can have its number.
            ended = self._ended[:]
            del self._ended[: len(ended)]
            self._line.send((memory, ended))
            if not self._line.poll(LOADING):
                raise RuntimeError("the processes that decode images do not start")
            pid = self._line.recv()
            line = Connection(reduction.recv_handle(self._line))
        process = self._process

        def is_alive() -> bool:
            return process is not None and process.poll() is None

        def kill() -> None:
            if is_alive():
                os.kill(pid, signal.SIGKILL)
                self._ended.append(pid)

        return Worker(line, kill, is_alive)

    def _start(self) -> None:
        mine, theirs = socket.socketpair()
        source = str(Path(__file__).resolve().parents[1])
        words = [sys.executable, "-c", START, source, str(theirs.fileno()), *self._modules]
        # One thread each: the workers are many.
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        with theirs:
            self._process = subprocess.Popen(
                words,
                env={**os.environ, **threads},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the page
            )
        self._ended.clear()
        self._line = Connection(mine.detach())

    def close(self) -> None:
        """End the template, which ends its workers. Nothing is waited for."""
        self._is_closed = True
        if self._process is not None:
            self._process.terminate()  # heeded only while it loads
            with contextlib.suppress(OSError):
                socket.socket(fileno=os.dup(self._line.fileno())).shutdown(socket.SHUT_RDWR)


def fork_on_demand(descriptor: int, modules: Sequence[str]) -> None:
    """Be the template: load modules and fork a worker whenever one is asked for, until the page's end of the line goes.

    Args:
        descriptor: of this end of the line.
    """
    line = Connection(descriptor)
    for module in modules:
        importlib.import_module(module)
    for number in interruption.ENDING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    gc.collect()
    gc.freeze()  # what is not looked at stays shared
    children: set[int] = set()
    with contextlib.suppress(EOFError, OSError):
        while True:
            memory, ended = line.recv()
            for pid in ended:
                os.waitpid(pid, 0)
                children.remove(pid)
            mine, theirs = multiprocessing.Pipe()
            pid = os.fork()
            if pid == 0:
                line.close()
                theirs.close()
                _be_a_worker(mine, memory)
            children.add(pid)
            mine.close()
            line.send(pid)
            reduction.send_handle(line, theirs.fileno(), 0)
            theirs.close()
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _be_a_worker(line: Connection, memory: int) -> None:
    """Do jobs and end this process, with a traceback where a job has a fault."""
    try:
        interruption.heed_parent_alone()
        _limit(memory)
        work(line)
    except (EOFError, OSError, MemoryError):
        pass  # the page is gone, or the page tells the visitor
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _limit(memory: int) -> None:
    """Let this process have so many bytes more than now."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a dump would hold a visitor's image
    status = Path("/proc/self/status")
    if status.exists():
        used = re.search(r"VmData:\s+(\d+) kB", status.read_text())
        most = memory + (1024 * int(used[1]) if used else 0)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def work(line: Connection) -> None:
    """Do the jobs that come over a line. What the user can put right is an answer, any other error ends the worker."""
    while True:
        function, arguments = line.recv()
        made = refused = None
        try:
            made = function(*arguments)
        except UserError as error:
            refused = error
        line.send((made, refused))


Run = Callable[["queue.SimpleQueue[Run]"], None]
# Where threads that have no work get their next: starting one takes longer than most of the work.
_idle: list["queue.SimpleQueue[Run]"] = []


async def in_thread(function: Callable[..., Outcome], *arguments: Any) -> Outcome:
    """Return what a function returns that may take long, in a thread that the end of the page does not wait for."""
    future: Future[Outcome] = Future()
    future.set_running_or_notify_cancel()

    def run(coming: "queue.SimpleQueue[Run]") -> None:
        try:
            outcome = function(*arguments)
        except BaseException as error:  # it is raised where the result is waited for
            _idle.append(coming)
            future.set_exception(error)
        else:
            _idle.append(coming)
            future.set_result(outcome)

    if _idle:
        _idle.pop().put(run)
    else:
        threading.Thread(target=_work_on, args=(run,), daemon=True).start()
    return await asyncio.wrap_future(future)


def _work_on(run: Run) -> None:
    """Be a thread: do this and whatever comes."""
    coming: queue.SimpleQueue[Run] = queue.SimpleQueue()
    while True:
        run(coming)
        del run  # an image may be in it
        run = coming.get()


class Pool:
    """Workers for jobs of a kind, which start when they are needed and are replaced when they have ended.

    A visitor has at most half of them at once, and whoever has fewest comes next: who sends what takes long waits for
    himself. Where several visitors together have all of them, their jobs have a shorter time while others wait. It
    belongs to one event loop.

    Args:
        workers: at most, an even number.
        seconds: of a job, from when a worker has it.
        memory: bytes of a worker, beyond those that it starts with.
    """

    def __init__(
        self,
        source: Template,
        *,
        workers: int,
        seconds: float = SECONDS,
        memory: int,
    ) -> None:
        self._source = source
        self.workers = workers
        self.seconds = seconds
        self.memory = memory
        self._idle: list[Worker] = []
        self._places = Places(workers // 2)
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []
        self._crowded = asyncio.Event()  # somebody waits who may have a worker

    def prepare(self) -> None:
        """Start a worker before there is a job, unless the end comes first."""
        with contextlib.suppress(EOFError, OSError):
            self._start_worker()

    async def run(self, visitor: str, function: Callable[..., Outcome], *arguments: Any) -> Outcome:
        """Return what a function of a module returns in a worker. Whoever stops waiting for it ends the worker.

        Raises:
            Overrun: the job was ended.
            UserError: the function raised it.
        """
        async with self._turn(visitor):
            worker = await self._worker()
            is_whole = False
            try:
                made, error = await self._in_time(in_thread(worker.do, function, arguments))
                is_whole = True
            except (EOFError, OSError):
                raise Overrun from None
            finally:
                if is_whole:
                    self._idle.append(worker)
                else:
                    worker.kill()
            if error is not None:
                raise error
            return made

    async def _in_time(self, work: Coroutine[Any, Any, Outcome]) -> Outcome:
        """The result of a job. Raises Overrun where it takes more time than it has."""
        job = asyncio.ensure_future(work)
        crowded = asyncio.ensure_future(self._crowded.wait())
        shorter = self.seconds / SHORTER
        try:
            await asyncio.wait({job}, timeout=shorter)
            await asyncio.wait(
                {job, crowded},
                timeout=self.seconds - shorter,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not job.done():
                raise Overrun
            return job.result()
        finally:
            job.cancel()
            crowded.cancel()

    @contextlib.asynccontextmanager
    async def _turn(self, visitor: str) -> AsyncIterator[None]:
        """Wait until a visitor may have a worker, and have it for as long as the context lasts."""
        turn = asyncio.get_running_loop().create_future()
        waiting = (visitor, turn)
        self._waiting.append(waiting)
        self._begin_next()
        try:
            await turn
            yield
        finally:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            else:
                self._places.leave(visitor)
            self._begin_next()

    def _begin_next(self) -> None:
        """Let those begin for whom there are workers, and say whether there are others who only lack one."""
        taken = self._places.taken
        waiting = [one for one in self._waiting if not one[1].cancelled()]
        while able := [one for one in waiting if self._places.has_room(one[0])]:
            begun = min(able, key=lambda one: taken[one[0]])  # of several the first
            waiting.remove(begun)
            self._waiting.remove(begun)
            visitor, turn = begun
            self._places.take(visitor)
            turn.set_result(None)
        if any(taken[visitor] < self.workers // 2 for visitor, _ in waiting):
            self._crowded.set()
        else:
            self._crowded.clear()

    async def _worker(self) -> Worker:
        """A worker that waits for a job, a new one where there is none."""
        while True:
            while self._idle:
                worker = self._idle.pop()
                if worker.is_idle():
                    return worker
                worker.kill()
            await in_thread(self._start_worker)

    def _start_worker(self) -> None:
        self._idle.append(self._source.worker(self.memory))
