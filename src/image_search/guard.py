"""What the page's server lets in and gives out: hosts, addresses, sizes; and what stays of it on the disk.

Gradio is made to be shared and called by programs. This page serves private photos to one person's browser, so all that
it does not need is closed here, in front of Gradio.
"""

import asyncio
import ipaddress
import json
import os
import re
import socket
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from image_search.dialogue import MOST_BYTES
from utils import UserError

if TYPE_CHECKING:
    from image_search.messages import Event

# What Gradio's servers, links and identities are set by; the page has flags for what may be set.
SETTINGS = re.compile(r"GRADIO_.*|SPACES?_.*|SYSTEM|OAUTH_.*|OPENID_.*")
LOCAL = {"localhost", "127.0.0.1", "::1"}
ANY_ADDRESS = {"0.0.0.0", "::"}
HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\[\]:/@]+))(?::\d+)?", re.IGNORECASE)
UPLOAD = "/gradio_api/upload"
# All that a browser asks for; Gradio has some eighty addresses.
SHOWN_FILE = "/gradio_api/file="
GETS = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|manifest\.json)|/(assets|static|svelte)/[\w./@-]{1,200}"
    rf"|/gradio_api/(queue/data|heartbeat/\w{{1,64}}|upload_progress)|{SHOWN_FILE}.+"
)
POSTS = re.compile(rf"{UPLOAD}|/gradio_api/queue/join")
FRAME = 2**16  # bytes around an uploaded file in its request
MOST_MESSAGE = 2**18  # bytes of any other request
MOST_UPLOADS = 4  # at once
# Of the folder of uploads and thumbnails.
MOST_KEPT = 64 * 2**20  # bytes
KEPT_FOR = 3600  # seconds
EMPTY_FILE = 4096  # bytes that a file takes beside its content
NEW = 60  # seconds in which an empty folder may be about to be filled

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def drop_settings() -> list[str]:
    """Take out of the environment what would change whom Gradio serves and what; the names of what was there."""
    names = sorted(filter(SETTINGS.fullmatch, os.environ))
    for name in names:
        del os.environ[name]
    return names


class Refusal(Exception):
    """A request that is not passed on.

    Attributes:
        status: the code of the answer.
        message: one sentence.
    """

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Hosts:
    """The names by which the page may be asked for.

    A website can make its own name lead to this machine and then read the page as its own (DNS rebinding). Its
    browser still sends the website's name, so a request for a name that is not the page's is refused.

    Args:
        host: the address that is served; for 0.0.0.0, every address is the page's, since none can be rebound.
        names: further ones, as of a proxy.
    """

    def __init__(self, host: str, names: Collection[str] = ()) -> None:
        self.proxies = {name.lower() for name in names}
        self.names = {*LOCAL, host.strip("[]").lower(), *self.proxies}
        self.any_address = host.strip("[]") in ANY_ADDRESS
        if self.any_address:
            self.names.update([socket.gethostname().lower(), socket.getfqdn().lower()])

    def holds(self, host: str) -> bool:
        """Whether a Host header names the page."""
        found = HOST.fullmatch(host)
        if found is None:
            return False
        name = (found[1] or found[2]).lower().removesuffix(".")
        return name in self.names or (self.any_address and is_address(name))

    def is_own_origin(self, origin: str, host: str) -> bool:
        """Whether an Origin header says that the page itself sent a request to a host, or a proxy's page did."""
        try:
            parts = urlsplit(origin.lower())
            return parts.netloc == host.lower() or parts.hostname in self.proxies
        except ValueError:
            return False


def is_address(name: str) -> bool:
    """Whether a name is an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Guard:
    """An ASGI application in front of Gradio's, which gets only the requests that the page makes.

    Args:
        events: of the page, see `messages.events_of`.
        uploads: the folder of uploads and thumbnails.
    """

    def __init__(
        self, app: App, hosts: Hosts, *, events: "Mapping[int, Event]", uploads: Path
    ) -> None:
        self.app = app
        self.events = events
        self.hosts = hosts
        self.uploads = uploads
        self.uploading = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let Gradio answer it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        try:
            self._check(scope)
            if scope["method"] == "POST":
                receive = await self._checked_body(scope, receive)
        except Refusal as refusal:
            await answer(send, refusal.status, refusal.message)
        else:
            await self.app(scope, receive, with_short_errors(send))

    def _check(self, scope: Scope) -> None:
        """Refuse what can be refused before the body is read."""
        if scope["type"] != "http":
            raise Refusal(HTTPStatus.NOT_FOUND, "not found")
        hosts = headers_of(scope, b"host")
        if len(hosts) != 1 or not self.hosts.holds(hosts[0]):
            raise Refusal(
                HTTPStatus.FORBIDDEN, "this page has another address; see --host and --allow-host"
            )
        for origin in headers_of(scope, b"origin"):
            if not self.hosts.is_own_origin(origin, hosts[0]):
                raise Refusal(HTTPStatus.FORBIDDEN, "another page sent this request")
        known = {"GET": GETS, "HEAD": GETS, "POST": POSTS}.get(scope["method"])
        if known is None:
            raise Refusal(HTTPStatus.METHOD_NOT_ALLOWED, "method not allowed")
        path = scope["path"]
        shown_file = path.removeprefix(SHOWN_FILE)
        if not known.fullmatch(path) or not (shown_file == path or self._is_ours(shown_file)):
            raise Refusal(HTTPStatus.NOT_FOUND, "not found")

    async def _checked_body(self, scope: Scope, receive: Receive) -> Receive:
        """A body that is read already and can be received again. Nothing of it is on the disk before it is checked."""
        if scope["path"] != UPLOAD:
            return received(self._cleaned(await read(receive, MOST_MESSAGE)), receive)
        if self.uploading >= MOST_UPLOADS:
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "too many uploads at once: try again")
        self.uploading += 1
        try:
            body = await read(receive, MOST_BYTES + FRAME)
            check_one_file(scope, body)
            await asyncio.to_thread(tidy, self.uploads, MOST_KEPT, KEPT_FOR)
        finally:
            self.uploading -= 1
        return received(body, receive)

    def _cleaned(self, body: bytes) -> bytes:
        """A message of the page with what Gradio needs of it."""
        from image_search.messages import cleaned

        try:
            return json.dumps(cleaned(body, self.events, self.uploads)).encode()
        except UserError as error:
            raise Refusal(HTTPStatus.BAD_REQUEST, str(error)) from None

    def _is_ours(self, path: str) -> bool:
        """Whether a path is of a file that the page shows."""
        from image_search.messages import is_in

        return is_in(self.uploads, path)


def headers_of(scope: Scope, name: bytes) -> list[str]:
    """The values of all headers of a name."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


async def read(receive: Receive, most: int) -> bytes:
    """The body of a request. What is too large is read to its end too, so that its sender hears why it is refused."""
    body = bytearray()
    too_large = False
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refusal(HTTPStatus.BAD_REQUEST, "the request broke off")
        chunk = message.get("body", b"")
        too_large = too_large or len(body) + len(chunk) > most
        if too_large:
            body.clear()
        else:
            body.extend(chunk)
        more = message.get("more_body", False)
    if too_large:
        raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {size(most)}: send less")
    return bytes(body)


def size(most: int) -> str:
    """A number of bytes, rounded down."""
    return f"{most // 2**20} MiB" if most >= 2**20 else f"{most // 2**10} KiB"


def received(body: bytes, receive: Receive) -> Receive:
    """What receives a body that was read, and then whatever follows."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> MutableMapping[str, Any]:
        return messages.pop() if messages else await receive()

    return again


def check_one_file(scope: Scope, body: bytes) -> None:
    """Refuse an upload with more parts than one."""
    kind = ";".join(headers_of(scope, b"content-type"))
    boundary = re.search(r'boundary="?([^";,\s]+)', kind)
    # No part can hold the boundary, which stands before each part and after the last one.
    if boundary is None or body.count(b"--" + boundary[1].encode("latin-1")) != 2:
        raise Refusal(HTTPStatus.BAD_REQUEST, "upload one file at a time")


async def answer(send: Send, status: int, message: str) -> None:
    """Send a short answer."""
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": message.encode()})


def with_short_errors(send: Send) -> Send:
    """A `send` that makes one sentence of every error, whatever Gradio says: paths, inputs, reports."""
    failed = False

    async def short(message: MutableMapping[str, Any]) -> None:
        nonlocal failed
        if message["type"] == "http.response.start" and message["status"] >= 400:
            failed = True
            await answer(send, message["status"], HTTPStatus(message["status"]).phrase.lower())
        elif not failed:
            await send(message)

    return short


def tidy(folder: Path, most: int, oldest: float) -> None:
    """Delete the oldest files of a folder until they take at most some bytes, and those that are old.

    Args:
        oldest: age in seconds.
    """
    now = time.time()
    files = []
    for place, folders, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # it is gone already
                file = Path(place) / name
                about = file.stat()
                files.append((about.st_ctime, about.st_size + EMPTY_FILE, file))
        for name in folders:
            with suppress(OSError):  # it is not empty, or gone
                inner = Path(place) / name
                if now - inner.stat().st_ctime > NEW:
                    inner.rmdir()
    taken = 0
    for changed, taken_by_file, file in sorted(files, reverse=True):
        taken += taken_by_file
        if taken > most or now - changed > oldest:
            with suppress(OSError):
                file.unlink()
