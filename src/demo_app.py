"""Serve a web page to search an index: choose or upload a reference, type what to change, continue from a result.

    python src/demo_app.py --index photos_index --combiner-path models_final/combiner_trained

`make app` serves the demo's index and models. Programs can use the same server: with --api, /docs documents its
interface. Only this machine can connect unless --host is given. Install requirements-app.txt first.
"""

import argparse
import contextlib
import importlib.util
import logging
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

# Waiting threads sleep instead of spinning: the threads that handle requests need the cores. Torch reads this once.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from cli import options
from cli.parsers import ScriptParser
from cli.startup import check_files, pick_device
from image_search.manifest import check_index
from runtime import interruption
from settings import groups
from settings.declaring import parent
from settings.flag_types import port, usable_path
from utils import Stopped, UserError, command, first_line

if TYPE_CHECKING:
    from image_search.examples import Example
    from image_search.guard import Guard
    from image_search.searcher import Searcher

logger = logging.getLogger(__name__)

PAGE_PACKAGES = {
    "fastapi": "FastAPI",
    "pebble": "Pebble",
    "python_multipart": "python-multipart",
    "uvicorn": "uvicorn",
}
MOST_CONNECTIONS = 256  # requests above this number get status 503
SHUTDOWN_GRACE = 1  # maximum seconds for pending responses when the server stops
LONGEST_END = 5  # maximum seconds to wait for the server thread to end
LAST_SECONDS = 8  # seconds until the process exits unconditionally; a container is killed after ten
LOOKED_EVERY = 0.2  # seconds between checks for a signal


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags of the page."""
    parents = [
        *options.search_flags(),
        options.clip_flags(),
        parent(groups.TunedClip),
        options.compute_flags(False),
    ]
    parser = ScriptParser(__doc__, parents=parents)
    group = parser.add_argument_group("page")
    group.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 lets other machines connect",
    )
    group.add_argument("--port", type=port, default=7860, help="port to listen on")
    group.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="additional host name of the page, such as a proxy in front of it; may be repeated",
    )
    group.add_argument(
        "--api",
        action="store_true",
        help="serve the API documentation at /docs",
    )
    group.add_argument(
        "--examples",
        type=usable_path,
        metavar="FILE",
        help="triplets that the page offers as examples, in the form of val.jsonl of your own triplets; their "
        "images must be in the index",
    )
    options.add_k(group, default=12)
    return parser.parse_args(argv)


def check_packages() -> None:
    """Raise UserError if a package that only the page needs is missing, or if the system cannot fork processes."""
    if not hasattr(os, "fork"):
        raise UserError("the page needs a system that forks processes: start it on Linux or macOS")
    for package, name in PAGE_PACKAGES.items():
        if importlib.util.find_spec(package) is None:
            raise UserError(f"the page needs {name}: pip install -r requirements-app.txt")


@contextlib.contextmanager
def application(
    searcher: "Searcher",
    k: int,
    *,
    host: str,
    names: list[str],
    documented: bool,
    examples: "Sequence[Example]" = (),
) -> "Iterator[Guard]":
    """Build the server application, and close its processes when the context ends.

    Args:
        k: default number of results.
        host: address that is served.
        names: additional host names of the page.
        documented: whether to serve the documentation of the HTTP interface.
        examples: example queries with known targets.
    """
    from image_search.batching import Batcher
    from image_search.guard import Guard, Hosts
    from image_search.http_api import Service, build

    with (
        contextlib.closing(Batcher(searcher.search)) as batcher,
        contextlib.closing(Service(searcher, k, batcher, examples=examples)) as service,
    ):
        yield Guard(build(service, documented), Hosts(host, names))


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address. Raises UserError if the address is unknown or in use."""
    try:
        family, *_, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        # asyncio disables Nagle's algorithm, which delays small responses, only for sockets with this protocol.
        bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(
            f"--host {host} --port {port}: {reason}; choose another address or port"
        ) from None
    return bound


@contextlib.contextmanager
def served(app: "Guard", bound: socket.socket) -> Iterator[threading.Thread]:
    """Serve in a thread, which accepts connections when the context begins and is stopped when it ends."""
    import uvicorn

    config = uvicorn.Config(
        app,
        limit_concurrency=MOST_CONNECTIONS,
        log_level="warning",
        access_log=False,
        ws="none",
        proxy_headers=False,
        timeout_graceful_shutdown=SHUTDOWN_GRACE,
        server_header=False,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    try:
        while thread.is_alive() and not server.started:
            thread.join(0.01)
        if not server.started:
            raise RuntimeError("the server did not start: see the message above")
        yield thread
    finally:
        server.should_exit = True
        thread.join(LONGEST_END)


@command
def main(argv: list[str] | None = None) -> None:
    """Serve the page until a signal stops it."""
    args = parse(argv)
    check_files(args)
    check_index(args.index)
    check_packages()
    bound = bound_socket(args.host, args.port)

    from image_search.examples import read_examples
    from image_search.searcher import load_searcher

    searcher = load_searcher(
        args.index, options.pair_choice(args), pick_device(args.device), args.store
    )
    examples = read_examples(args.examples, searcher.index) if args.examples else []
    # All signals that end a process are handled, so that pending responses are sent.
    with (
        interruption.listening(interruption.heeded_endings()) as stop,
        application(
            searcher,
            args.k,
            host=args.host,
            names=args.allow_host,
            documented=args.api,
            examples=examples,
        ) as app,
        served(app, bound) as server,
    ):
        shown_host = f"[{args.host}]" if ":" in args.host.strip("[]") else args.host
        logger.info("%d images; http://%s:%d", len(searcher), shown_host, args.port)
        if args.api:
            logger.info("API documentation: http://%s:%d/docs", shown_host, args.port)
        while server.is_alive() and not stop.requested:
            server.join(LOOKED_EVERY)
        if stop.requested:
            # A thread may be waiting for a store.
            code = 130 if stop.requested == "SIGINT" else 0
            last = threading.Timer(LAST_SECONDS, os._exit, [code])
            last.daemon = True
            last.start()
    if stop.requested == "SIGINT":
        raise KeyboardInterrupt
    if not stop.requested:
        raise RuntimeError("the server stopped unexpectedly: see the message above")
    raise Stopped(stop.requested, "start it again with the same command")


if __name__ == "__main__":
    main()
