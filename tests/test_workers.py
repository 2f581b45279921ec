"""Processes with a budget: a job that takes too long or too much is ended, and so are all when the page ends."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from conftest import ROOT
from forks import HANG, state_of
from image_search import workers
from image_search.stores.base import QuestionError
from image_search.uploads import checked_upload
from image_search.workers import Overrun, Pool, Template, in_thread

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
MUCH = 2**28  # bytes


@pytest.fixture
def source():
    source = Template([])
    yield source
    source.close()


def pool(source, workers: int = 4, seconds: float = HANG) -> Pool:
    return Pool(source, workers=workers, seconds=seconds, memory=MUCH)


def until(happened) -> None:
    """Wait until something has happened."""
    deadline = time.monotonic() + HANG
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_gone(process: int) -> bool:
    return state_of(process) == "Z"


ENDS = {
    "time": (time.sleep, HANG),
    "memory": (bytearray, 2 * MUCH),
    "death": (os._exit, 3),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_job_beyond_its_budget_is_ended_and_the_next_one_done(end, source):
    async def run() -> None:
        jobs = pool(source, seconds=0.5 if end == "time" else HANG)
        first = await jobs.run("a", os.getpid)
        with pytest.raises(Overrun):
            await jobs.run("a", *ENDS[end])
        second = await jobs.run("a", os.getpid)
        assert second != first
        assert await jobs.run("a", os.getpid) == second
        until(lambda: is_gone(first))

    asyncio.run(run())


def test_a_job_has_the_memory_that_it_was_given(source):
    async def run() -> None:
        assert await pool(source).run("a", len, bytes(MUCH // 4)) == MUCH // 4

    asyncio.run(run())


def test_what_the_user_can_put_right_is_raised_and_ends_no_worker(source):
    async def run() -> None:
        jobs = pool(source)
        first = await jobs.run("a", os.getpid)
        with pytest.raises(QuestionError, match="is not an image"):
            await jobs.run("a", checked_upload, "notes.txt", b"")
        assert await jobs.run("a", os.getpid) == first

    asyncio.run(run())


def test_a_visitor_has_half_of_the_workers_and_others_do_not_wait_for_him(source):
    async def run() -> None:
        jobs = pool(source, workers=4)
        his = [asyncio.create_task(jobs.run("a", time.sleep, HANG)) for _ in range(5)]
        while len(jobs._waiting) != 3:
            await asyncio.sleep(0.01)
        assert jobs._places.taken == {"a": 2}
        assert await jobs.run("b", len, "abc") == 3
        assert not any(job.done() for job in his)
        for job in his:
            job.cancel()

    asyncio.run(run())


def test_several_visitors_together_do_not_keep_all_workers(monkeypatch, source):
    """Their jobs, which would have longer than this test, end for one who has no worker."""
    monkeypatch.setattr(workers, "SHORTER", 10**6, raising=False)

    async def run() -> None:
        jobs = pool(source, workers=4, seconds=10 * HANG)
        theirs = [asyncio.create_task(jobs.run(who, time.sleep, 9 * HANG)) for who in "aabb"]
        while len(jobs._crowded._waiters) != 4:  # all of them have their workers
            await asyncio.sleep(0.01)
        assert not any(job.done() for job in theirs)
        assert await asyncio.wait_for(jobs.run("c", len, "abc"), HANG) == 3
        ended = await asyncio.gather(*theirs, return_exceptions=True)
        assert all(isinstance(end, Overrun) for end in ended)

    asyncio.run(run())


def test_who_has_fewest_comes_next(source):
    async def run() -> None:
        jobs = pool(source, workers=2)
        order = []

        async def job(visitor: str) -> None:
            await jobs.run(visitor, time.sleep, 0.2)
            order.append(visitor)

        await asyncio.gather(*map(job, "aaaabb"))
        assert sorted(order[:4]) == list("aabb")

    asyncio.run(run())


def test_a_job_that_nobody_waits_for_is_not_done(source):
    """One that waits for its turn is dropped, and one that is under way is ended."""

    async def run() -> None:
        jobs = pool(source, workers=2)
        worker = await jobs.run("a", os.getpid)
        under_way = asyncio.create_task(jobs.run("a", time.sleep, HANG))
        waiting = asyncio.create_task(jobs.run("a", time.sleep, HANG))
        while not jobs._places.taken:
            await asyncio.sleep(0.01)
        waiting.cancel()
        under_way.cancel()
        await asyncio.wait([waiting, under_way])
        until(lambda: is_gone(worker))
        assert not jobs._waiting
        assert not jobs._places.taken
        assert await jobs.run("a", len, "abc") == 3

    asyncio.run(run())


def test_a_template_that_is_gone_is_replaced(source):
    async def run() -> None:
        jobs = pool(source)
        first = await jobs.run("a", os.getpid)
        source._process.kill()
        source._process.wait()
        assert await jobs.run("a", os.getpid) != first

    asyncio.run(run())


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_no_process_outlives_the_page(end, tmp_path):
    """However it ends, and whatever is under way."""
    program = f"""
        import asyncio, os, sys, threading, time
        sys.path.insert(0, {str(ROOT / "src")!r})
        from image_search.workers import Pool, Template
        async def run():
            source = Template([])
            pool = Pool(source, workers=4, memory=2**28, seconds=900)
            idle = await pool.run("a", os.getpid)
            asyncio.ensure_future(pool.run("a", time.sleep, 900))
            other = asyncio.ensure_future(pool.run("a", os.getpid))
            print(source._process.pid, idle, await other, flush=True)
            await asyncio.sleep(0 if {end!r} == "exit" else 900)
            source.close()
        asyncio.run(run())
    """
    words = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(tmp_path)}
    ) as page:
        processes = list(map(int, page.stdout.readline().split()))
        assert len(set(processes)) == 3
        if end == "kill":
            page.kill()
        page.wait(HANG)
    for process in processes:
        until(lambda process=process: is_gone(process))
    assert list(tmp_path.iterdir()) == []


def test_closing_is_not_held_up_by_a_template_that_loads():
    source = Template(["torch"])

    async def run() -> None:
        start = asyncio.create_task(in_thread(source.worker, MUCH))
        while source._process is None:
            await asyncio.sleep(0.01)
        start.cancel()

    asyncio.run(run())
    source.close()
    assert source._process.wait(HANG) == -signal.SIGTERM


def test_a_thread_takes_the_next_work_too():
    async def run() -> None:
        with pytest.raises(ZeroDivisionError):
            await in_thread(divmod, 1, 0)
        first = await in_thread(threading.current_thread)
        assert await in_thread(threading.current_thread) is first

    asyncio.run(run())


def test_a_worker_has_no_file_of_the_page_open(source):
    """Else a connection that the page has closed would stay open."""

    async def run() -> None:
        with socket.socket() as link:
            link.bind(("127.0.0.1", 0))
            link.listen()
            process = await pool(source).run("a", os.getpid)
            there = [file.readlink() for file in Path(f"/proc/{process}/fd").iterdir()]
            assert Path(f"/proc/self/fd/{link.fileno()}").readlink() not in there

    if not Path("/proc").exists():
        pytest.skip("/proc")
    asyncio.run(run())
