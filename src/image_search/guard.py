"""Admit requests to the page's server: own hosts and origins, limited bodies, limited requests per client at once.

The server gives out a person's photos, so whatever is not asked by that person's browser or programs is closed here,
before anything is read of it. A visitor is an address: one alone takes no more than half of the places, so that others
find room whatever it sends. Behind a proxy, all are one.
"""

import asyncio
import contextlib
import ipaddress
import json
import re
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator, MutableMapping
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException

from image_search.forms import MOST_FIELDS
from image_search.uploads import MOST_BYTES

LOCAL = {"localhost", "127.0.0.1", "::1"}
ANY_ADDRESS = {"0.0.0.0", "::"}
HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\[\]:/@]+))(?::\d+)?", re.IGNORECASE)
FRAME = 2**16  # bytes around an uploaded file in its request, and of a request without one
MOST_ASKING = 64  # requests with a body at once, of a visitor; of all together twice as many
MOST_UPLOADS = 8  # of these, which are larger than FRAME
MOST_SECONDS = 30  # until a body has arrived, and until it is answered
RETRY_AFTER = "1"  # seconds
# Of every answer. The policy keeps the browser from any other host and from any script that is not the page's file.
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


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
        """Return whether a Host header names the page."""
        found = HOST.fullmatch(host)
        if found is None:
            return False
        name = (found[1] or found[2]).lower().removesuffix(".")
        return name in self.names or (self.any_address and is_address(name))

    def is_own_origin(self, origin: str, host: str) -> bool:
        """Return whether an Origin header says that the page itself, or a proxy's page, sent a request to a host."""
        try:
            parts = urlsplit(origin.lower())
            return parts.netloc == host.lower() or parts.hostname in self.proxies
        except ValueError:
            return False


def is_address(name: str) -> bool:
    """Return whether a name is an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def visitor_of(scope: Scope) -> str:
    """Whom a request or a connection is of: an IPv4 address, or a network of IPv6, of which one person has 2**64."""
    host = (scope.get("client") or ("",))[0]
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))


class Places:
    """So many places, of which a visitor takes at most half.

    Args:
        each: what a visitor may have; all together may have twice as many.

    Attributes:
        taken: by each visitor.
    """

    def __init__(self, each: int) -> None:
        self.taken: Counter[str] = Counter()
        self._each = each

    def has_room(self, visitor: str) -> bool:
        """Return whether there is a place for a visitor."""
        return self.taken[visitor] < self._each and self.taken.total() < 2 * self._each

    def take(self, visitor: str) -> None:
        """Count a place as taken, whether or not there is room."""
        self.taken[visitor] += 1

    def leave(self, visitor: str) -> None:
        """Give a place back."""
        self.taken[visitor] -= 1
        self.taken += Counter()  # forgets who has none

    @contextlib.contextmanager
    def place(self, visitor: str) -> Iterator[None]:
        """A place that is taken for as long as the context lasts."""
        self.take(visitor)
        try:
            yield
        finally:
            self.leave(visitor)


class Guard:
    """An ASGI application in front of another, which gets only what is let in, with bodies that have arrived whole.

    Work for a visitor who has left is given up.

    Attributes:
        asking: requests with a body that are there.
        uploading: those of them that are larger than FRAME.
    """

    def __init__(self, app: App, hosts: Hosts) -> None:
        self.app = app
        self.hosts = hosts
        self.asking = Places(MOST_ASKING)
        self.uploading = Places(MOST_UPLOADS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let the application answer it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        sending = Sending(send)
        try:
            self._check(scope)
            if scope["method"] == "POST":
                await self._posted(scope, receive, sending)
            else:
                await self._answered(scope, b"", receive, sending=sending)
        except HTTPException as refusal:
            await answer(send, refusal.status_code, refusal.detail)
        except asyncio.CancelledError:
            if sending.is_begun:
                raise
            await answer(send, HTTPStatus.SERVICE_UNAVAILABLE, "the page ends: try again later")

    def _check(self, scope: Scope) -> None:
        """Reject what another page sends, and what asks for another host."""
        if scope["type"] != "http":
            raise HTTPException(HTTPStatus.NOT_FOUND, "not found")
        hosts = headers_of(scope, b"host")
        if len(hosts) != 1 or not self.hosts.holds(hosts[0]):
            raise HTTPException(
                HTTPStatus.FORBIDDEN, "this page has another address; see --host and --allow-host"
            )
        for origin in headers_of(scope, b"origin"):
            if not self.hosts.is_own_origin(origin, hosts[0]):
                raise HTTPException(HTTPStatus.FORBIDDEN, "another page sent this request")
        if scope.get("query_string", b"").count(b"&") >= MOST_FIELDS:
            raise HTTPException(
                HTTPStatus.BAD_REQUEST, f"more than {MOST_FIELDS} fields: send fewer"
            )
        # Images and scripts are asked for without an origin. A link that leads here may be anybody's.
        sites = headers_of(scope, b"sec-fetch-site")
        is_link = headers_of(scope, b"sec-fetch-mode") == ["navigate"]
        if not is_link and {"cross-site", "same-site"} & set(sites):
            raise HTTPException(HTTPStatus.FORBIDDEN, "another page sent this request")

    async def _posted(self, scope: Scope, receive: Receive, sending: "Sending") -> None:
        """Let the application answer a request whose body has arrived, unless there are too many at once."""
        lengths = headers_of(scope, b"content-length")
        is_upload = not (lengths and lengths[0].isdecimal() and int(lengths[0]) <= FRAME)
        visitor = visitor_of(scope)
        has_room = self.asking.has_room(visitor)
        if is_upload:
            has_room = has_room and self.uploading.has_room(visitor)
        if not has_room:
            raise HTTPException(
                HTTPStatus.TOO_MANY_REQUESTS, "too many requests at once: try again"
            )
        with contextlib.ExitStack() as places:
            places.enter_context(self.asking.place(visitor))
            if is_upload:
                places.enter_context(self.uploading.place(visitor))
            try:
                body = await asyncio.wait_for(read(receive, MOST_BYTES + FRAME), MOST_SECONDS)
            except asyncio.TimeoutError:
                raise HTTPException(
                    HTTPStatus.REQUEST_TIMEOUT, "the request came too slowly"
                ) from None
            await self._answered(scope, body, receive, sending=sending)

    async def _answered(
        self, scope: Scope, body: bytes, receive: Receive, *, sending: "Sending"
    ) -> None:
        """Let the application answer for as long as somebody waits for that."""
        leaving = asyncio.ensure_future(left(receive))
        request = received(body, leaving)
        answering = asyncio.ensure_future(self.app(scope, request, with_headers(sending)))
        try:
            first = asyncio.FIRST_COMPLETED
            await asyncio.wait({answering, leaving}, timeout=MOST_SECONDS, return_when=first)
            if not (answering.done() or leaving.done() or sending.is_begun):
                raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, "no answer in time: try again")
            await asyncio.wait({answering, leaving}, return_when=first)
            if answering.done() or sending.is_whole:
                await answering
        finally:
            answering.cancel()
            leaving.cancel()


class Sending:
    """A `send` that knows how far an answer is."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.is_begun = False
        self.is_whole = False

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        """Send a part of an answer."""
        self.is_begun = True
        await self._send(message)
        is_body = message["type"] == "http.response.body"
        self.is_whole = is_body and not message.get("more_body")


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
            raise HTTPException(HTTPStatus.BAD_REQUEST, "the request broke off")
        chunk = message.get("body", b"")
        too_large = too_large or len(body) + len(chunk) > most
        if too_large:
            body.clear()
        else:
            body.extend(chunk)
        more = message.get("more_body", False)
    if too_large:
        raise HTTPException(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {most // 2**20} MiB: send less"
        )
    return bytes(body)


async def left(receive: Receive) -> None:
    """Wait until the sender of a request has left."""
    while (await receive())["type"] != "http.disconnect":
        await asyncio.sleep(0)


def received(body: bytes, leaving: "asyncio.Future[None]") -> Receive:
    """Return what receives a body that was read, and then that its sender has left."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> MutableMapping[str, Any]:
        if not messages:
            await asyncio.wait({leaving})
            return {"type": "http.disconnect"}
        return messages.pop()

    return again


def with_headers(send: Send) -> Send:
    """A `send` that adds HEADERS to an answer."""
    added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

    async def sent(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *added]}
        await send(message)

    return sent


async def answer(send: Send, status: int, message: str) -> None:
    """Send a short answer, as the application's own errors are."""
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        headers.append((b"retry-after", RETRY_AFTER.encode()))
    start = {"type": "http.response.start", "status": status, "headers": headers}
    await with_headers(send)(start)
    body = json.dumps({"error": message}).encode()
    await send({"type": "http.response.body", "body": body})
