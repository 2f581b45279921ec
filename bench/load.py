"""Measure how many queries per second a search server handles, with several concurrent users on this machine.

    python bench/load.py --index demo/index --users 50 --seconds 30 [flags of demo_app.py]
    python bench/load.py --index demo/index --users 1 50 --upload photo.jpg --servers together plain

The server is compared with a server that handles one query at a time, and with a small application without limits, see
`twins.plain_search_app`; they take turns. Servers and client are processes on one machine and share its cores. With
--serve, this file runs as one of the servers.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

TEXT = "is red blue larger with stripes and no sleeves at night a dog behind the house"
LONGEST_WAIT = 60  # maximum seconds per response
# Server -> maximum queries per batch, and seconds to wait for them; None for the small application.
SERVERS = {"together": (32, 0.01), "one by one": (1, 0.0), "plain": None}
TICKS = os.sysconf("SC_CLK_TCK")  # ticks per second, the unit of a process's time on Linux


@dataclass
class Load:
    """Measurements of a server under load.

    Attributes:
        seconds: latency of each successful request.
        errors: HTTP status or name of an exception -> number of requests that failed with it.
        memory: memory of the server in MiB, before and after.
        lasted: duration of all rounds in seconds.
        worked: CPU-seconds of the server and its child processes.
    """

    seconds: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    memory: tuple[float, float] = (0, 0)
    lasted: float = 0
    worked: float = 0

    def row(self) -> dict[str, object]:
        """Return the row of the results."""
        taken = sorted(self.seconds) or [float("nan")]
        return {
            "responses/s": round(self.rate, 1),
            "CPU-ms each": round(1000 * self.worked / len(taken), 2),
            "p50 ms": round(1000 * statistics.median(taken)),
            "p95 ms": round(1000 * taken[int(0.95 * len(taken))]),
            "responses": len(self.seconds),
            "errors": dict(self.errors),
            "MiB": [round(memory) for memory in self.memory],
        }

    @property
    def rate(self) -> float:
        """Return the responses per second."""
        return len(self.seconds) / self.lasted


def query(images: int, chosen: random.Random, upload: bytes) -> bytes:
    """Return a request with a new text and an upload, or a random indexed image if the upload is empty."""
    text = " ".join(chosen.choices(TEXT.split(), k=6))
    if upload:
        kind = "multipart/form-data; boundary=part"
        field = 'content-disposition: form-data; name="'
        head = (
            f'--part\r\n{field}text"\r\n\r\n{text}\r\n--part\r\n{field}image"; filename="a"\r\n\r\n'
        )
        body = head.encode() + upload + b"\r\n--part--\r\n"
    else:
        kind = "application/x-www-form-urlencoded"
        body = f"row={chosen.randrange(images)}&text={text.replace(' ', '+')}".encode()
    head = (
        "POST /search HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def read_response(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    """Read a response; return its status and body."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    lengths = [line for line in head.splitlines() if line.lower().startswith("content-length")]
    # A rejected request gets a response without a length, and the connection is closed.
    length = int(lengths[0].split(":")[1]) if lengths else 0
    return head.split()[1], await reader.readexactly(length)


@dataclass
class Server:
    """A running server.

    Attributes:
        images: number of images in its index.
    """

    process: subprocess.Popen[bytes]
    port: int
    images: int

    async def user(self, number: int, until: float, upload: bytes, load: Load) -> None:
        """Send a request, wait for the response, and repeat."""
        chosen = random.Random(number)
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        while time.perf_counter() < until:
            start = time.perf_counter()
            try:
                writer.write(query(self.images, chosen, upload))
                status, body = await asyncio.wait_for(read_response(reader), LONGEST_WAIT)
            except (TimeoutError, OSError, EOFError) as error:
                load.errors[type(error).__name__] += 1
                return
            if status == "200" and json.loads(body)["results"]:
                load.seconds.append(time.perf_counter() - start)
            else:
                load.errors[status] += 1
                writer.close()  # the server closes its side too
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.close()

    async def users(self, count: int, seconds: float, upload: bytes, load: Load) -> None:
        """Run concurrent users for some seconds."""
        start = time.perf_counter()
        each = (self.user(n, start + seconds, upload, load) for n in range(count))
        await asyncio.gather(*each)
        load.lasted += time.perf_counter() - start

    def measure(self, count: int, seconds: float, upload: bytes, load: Load) -> None:
        """Add a round to the measurements of a load."""
        if not load.lasted:
            asyncio.run(self.users(count, 1, upload, Load()))  # warm-up
            load.memory = (resident(self.process.pid), 0)
        worked = processor_seconds(self.process.pid)
        asyncio.run(self.users(count, seconds, upload, load))
        load.worked += processor_seconds(self.process.pid) - worked
        load.memory = (load.memory[0], resident(self.process.pid))


def resident(process: int) -> float:
    """Return the resident memory of a process in MiB."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def processor_seconds(process: int) -> float:
    """Return the CPU-seconds of a process and its descendants, which are in sessions of their own."""
    seconds = {}
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            columns = file.read_text().rpartition(")")[2].split()
            parents[int(file.parent.name)] = int(columns[1])
            seconds[int(file.parent.name)] = sum(map(int, columns[11:13])) / TICKS
    family = {process}
    while grown := {child for child, parent in parents.items() if parent in family} - family:
        family |= grown
    return sum(seconds[member] for member in family)


@contextlib.contextmanager
def started(how: str, flags: list[str]) -> Iterator[Server]:
    """Start a server for the duration of the context."""
    words = [sys.executable, __file__, "--serve", how, *flags]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            port, images = map(int, process.stdout.readline().split())
            yield Server(process, port, images)
        finally:
            process.stdin.close()


def serve(how: str, flags: list[str]) -> None:
    """Run a server until stdin ends."""
    import demo_app
    from cli import options
    from cli.startup import pick_device
    from image_search.searcher import load_searcher

    args = demo_app.parse(flags)
    searcher = load_searcher(args.index, options.pair_choice(args), pick_device(args.device))
    bound = demo_app.bound_socket("127.0.0.1", 0)
    with contextlib.ExitStack() as stack:
        if SERVERS[how] is None:
            serve_plainly(searcher, args.k, bound)
        else:
            stack.enter_context(ours(searcher, args.k, bound, SERVERS[how]))
        print(bound.getsockname()[1], len(searcher), flush=True)
        sys.stdin.read()


@contextlib.contextmanager
def ours(searcher, k: int, bound: socket.socket, batches: tuple[int, float]) -> Iterator[None]:
    """Serve as demo_app.py does, with other limits on batches."""
    import demo_app
    from image_search.batching import Batcher
    from image_search.guard import Guard, Hosts
    from image_search.http_api import Service, build

    with (
        contextlib.closing(Batcher(searcher.search, *batches)) as batcher,
        contextlib.closing(Service(searcher, k, batcher)) as service,
        demo_app.served(Guard(build(service, False), Hosts("127.0.0.1")), bound),
    ):
        yield


def serve_plainly(searcher, k: int, bound: socket.socket) -> None:
    """Serve the small application until the process ends."""
    import uvicorn

    from twins import plain_search_app

    config = uvicorn.Config(plain_search_app(searcher, k), log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    threading.Thread(target=server.run, args=([bound],), daemon=True).start()
    while not server.started:
        time.sleep(0.01)


def main() -> None:
    """Measure the servers in turns, and print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, nargs="+", default=[50])
    parser.add_argument("--seconds", type=float, default=30, help="of each server, all rounds")
    parser.add_argument("--rounds", type=int, default=3, help="in which the servers take turns")
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS))
    parser.add_argument("--upload", type=Path, help="also measure queries with this image")
    parser.add_argument("--output", type=Path, help="a JSON file for the rows")
    parser.add_argument("--serve", choices=SERVERS, help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args()
    if args.serve:
        serve(args.serve, flags)
        return
    rows = []
    uploads = [b"", args.upload.read_bytes()] if args.upload else [b""]
    with contextlib.ExitStack() as stack:
        servers = {how: stack.enter_context(started(how, flags)) for how in args.servers}
        for upload, users in itertools.product(uploads, args.users):
            loads = {how: Load() for how in servers}
            for _ in range(args.rounds):
                for how, server in servers.items():
                    server.measure(users, args.seconds / args.rounds, upload, loads[how])
            for how, load in loads.items():
                rows.append({"server": how, "users": users, "upload": bool(upload), **load.row()})
                rows[-1]["first / this"] = round(loads[args.servers[0]].rate / load.rate, 2)
                print(rows[-1], flush=True)
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
