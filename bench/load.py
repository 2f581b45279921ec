"""How many questions a page's server answers: so many users at once over the loopback interface, for some seconds.

    python bench/load.py --index demo/index --users 50 --seconds 30 [flags of demo_app.py]

The same is done with a server that answers one question at a time. Server and client are processes of one machine and
share its cores. Run by itself with --serve, this file is the server.
"""

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

TEXT = "is red blue larger with stripes and no sleeves at night a dog behind the house"
LONGEST_WAIT = 60  # seconds of one answer
SERVERS = {
    "together": (32, 0.01),
    "one by one": (1, 0.0),
}  # most questions of a batch, seconds waited


@dataclass
class Load:
    """What users of a server saw.

    Attributes:
        seconds: that each answered request took.
        errors: by status, or by the name of what broke.
        memory: MiB of the server before and after.
    """

    seconds: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    memory: tuple[float, float] = (0, 0)
    lasted: float = 0

    def line(self) -> str:
        """All of it in words."""
        taken = sorted(self.seconds)
        if len(taken) < 2:
            return f"{len(taken)} answers, errors {dict(self.errors)}"
        return (
            f"{self.rate:.1f} requests/s, p50 {1000 * statistics.median(taken):.0f} ms, "
            f"p95 {1000 * taken[int(0.95 * len(taken))]:.0f} ms, {len(taken)} answers, "
            f"errors {dict(self.errors) or 0}, memory {self.memory[0]:.0f} to {self.memory[1]:.0f} MiB"
        )

    @property
    def rate(self) -> float:
        """Answers per second."""
        return len(self.seconds) / self.lasted


def question(images: int, chosen: random.Random) -> bytes:
    """A request that asks with a random image and a text that nobody has asked with."""
    fields = {"row": chosen.randrange(images), "text": " ".join(chosen.choices(TEXT.split(), k=6))}
    body = "&".join(f"{name}={value}" for name, value in fields.items()).replace(" ", "+")
    head = (
        "POST /search HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return f"{head}{body}".encode()


async def answered(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    """The status and the body of an answer."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    length = next(
        int(line.split(":")[1])
        for line in head.splitlines()
        if line.lower().startswith("content-length")
    )
    return head.split()[1], await reader.readexactly(length)


async def user(number: int, port: int, images: int, *, until: float, load: Load) -> None:
    """Ask, wait for the answer, ask again."""
    chosen = random.Random(number)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while time.perf_counter() < until:
        start = time.perf_counter()
        try:
            writer.write(question(images, chosen))
            status, body = await asyncio.wait_for(answered(reader), LONGEST_WAIT)
        except (OSError, EOFError, asyncio.TimeoutError) as error:
            load.errors[type(error).__name__] += 1
            return
        if status == "200" and json.loads(body)["answers"]:
            load.seconds.append(time.perf_counter() - start)
        else:
            load.errors[status] += 1
    writer.close()


async def users(count: int, port: int, images: int, *, seconds: float, load: Load) -> None:
    """So many users for some seconds."""
    start = time.perf_counter()
    until = start + seconds
    each = (user(n, port, images, until=until, load=load) for n in range(count))
    await asyncio.gather(*each)
    load.lasted = time.perf_counter() - start


def resident(process: int) -> float:
    """MiB of a process that are in memory."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def measure(how: str, flags: list[str], count: int, seconds: float) -> Load:
    """The load of a server that is started for it, after a second of warming up."""
    words = [sys.executable, __file__, "--serve", how, *flags]
    load = Load()
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        try:
            port, images = map(int, server.stdout.readline().split())
            asyncio.run(users(count, port, images, seconds=1, load=Load()))
            before = resident(server.pid)
            asyncio.run(users(count, port, images, seconds=seconds, load=load))
            load.memory = (before, resident(server.pid))
        finally:
            server.stdin.close()
    return load


def serve(how: str, flags: list[str]) -> None:
    """Answer until stdin ends."""
    import demo_app
    from cli import options
    from cli.startup import pick_device
    from image_search.batching import Batcher
    from image_search.guard import Guard, Hosts
    from image_search.http_api import Service, build
    from image_search.searcher import load_searcher

    args = demo_app.parse(flags)
    searcher = load_searcher(args.index, options.pair_choice(args), pick_device(args.device))
    most, wait = SERVERS[how]
    bound = demo_app.bound_socket("127.0.0.1", 0)
    with (
        contextlib.closing(Batcher(searcher.answer, most, wait)) as batcher,
        contextlib.closing(Service(searcher, args.k, batcher)) as service,
    ):
        app = Guard(build(service, False), Hosts("127.0.0.1"))
        with demo_app.served(app, bound):
            print(bound.getsockname()[1], len(searcher), flush=True)
            sys.stdin.read()


def main() -> None:
    """Measure both servers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--serve", choices=SERVERS, help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args()
    if args.serve:
        serve(args.serve, flags)
        return
    loads = {}
    for how in SERVERS:
        loads[how] = measure(how, flags, args.users, args.seconds)
        print(f"{args.users} users, {how}: {loads[how].line()}", flush=True)
    print(f"ratio: {loads['together'].rate / loads['one by one'].rate:.2f} x")


if __name__ == "__main__":
    main()
