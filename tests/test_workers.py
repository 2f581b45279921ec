"""Processes that decode: a job with too much time or memory is ended, and so are all jobs when the server ends."""

import asyncio
import contextlib
import os
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from conftest import ROOT
from forks import HANG, state_of

workers = pytest.importorskip("image_search.workers", reason="Pebble is not installed")

MUCH = 2**28  # bytes


@pytest.fixture
def pool():
    with contextlib.closing(workers.Pool(2, memory=MUCH, seconds=HANG)) as pool:
        yield pool


def until(happened) -> None:
    """Wait until something has happened."""
    deadline = time.monotonic() + HANG
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


ENDS = {
    "time": (time.sleep, HANG),
    "memory": (bytearray, 2 * MUCH),
    "death": (os._exit, 3),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_job_beyond_its_limits_is_ended_and_the_next_one_done(end, pool):
    async def run() -> None:
        assert await pool.run(len, bytes(MUCH // 4)) == MUCH // 4
        pool.seconds = 0.1 if end == "time" else HANG
        with pytest.raises(workers.Overrun):
            await pool.run(*ENDS[end])
        pool.seconds = HANG
        assert await pool.run(len, "abc") == 3

    asyncio.run(run())


def test_what_the_user_can_put_right_is_raised(pool):
    from image_search.stores.base import QueryError
    from image_search.uploads import checked_upload

    async def run() -> None:
        with pytest.raises(QueryError, match="is not an image"):
            await pool.run(checked_upload, "notes.txt", b"")

    asyncio.run(run())


def test_a_server_goes_on_while_the_processes_start(pool, monkeypatch):
    """The start waits for the loop here, which it would block for ever if it ran in it."""
    start, is_free = pool.start, threading.Event()

    def start_later() -> None:
        assert is_free.wait(HANG)
        start()

    monkeypatch.setattr(pool, "start", start_later)

    async def run() -> None:
        job = asyncio.create_task(pool.run(len, "abc"))
        await asyncio.sleep(0)
        is_free.set()
        assert await job == 3

    asyncio.run(run())


def test_a_pool_whose_idle_processes_were_killed_is_replaced(pool):
    async def run() -> None:
        process = await pool.run(os.getpid)
        os.kill(process, 9)
        until(lambda: state_of(process) == "Z")
        deadline = time.monotonic() + HANG
        while time.monotonic() < deadline:  # until the pool has seen it
            with contextlib.suppress(workers.Overrun):
                if await pool.run(os.getpid) != process:
                    return
        pytest.fail("the pool gives no result")

    asyncio.run(run())


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_no_process_outlives_the_server(end, tmp_path):
    """However it ends, and whatever is under way."""
    program = f"""
        import asyncio, os, sys, time
        sys.path.insert(0, {str(ROOT / "src")!r})
        from image_search.workers import Pool
        async def run():
            pool = Pool(2, memory=2**28, seconds=900)
            pool.start()
            jobs = [asyncio.ensure_future(pool.run(time.sleep, 900))]
            print(await pool.run(os.getppid), await pool.run(os.getpid), flush=True)
            await asyncio.sleep(0 if {end!r} == "exit" else 900)
            pool.close()
        if __name__ == "__main__":
            asyncio.run(run())
    """
    script = tmp_path / "server.py"
    script.write_text(textwrap.dedent(program))
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE) as server:
        processes = list(map(int, server.stdout.readline().split()))
        assert len(set(processes)) == 2
        if end == "kill":
            server.kill()
        server.wait(HANG)
    for process in processes:
        until(lambda process=process: state_of(process) == "Z")
