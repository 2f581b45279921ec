"""Admit requests to the page's server: own hosts and origins only, and bodies of limited size.

The server gives out a person's photos, so a request that did not come from that person's browser or programs is
rejected before any of it is read. It is a server for one machine or a trusted network: on the open internet, put a
proxy in front that limits slow clients and requests per client.
"""

import asyncio
import contextlib
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

from image_search.uploads import MOST_BYTES

LOCAL = {"localhost", "127.0.0.1", "::1"}
ANY_ADDRESS = {"0.0.0.0", "::"}
HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\[\]:/@]+))(?::\d+)?", re.IGNORECASE)
FRAME = 2**16  # bytes of a request besides an uploaded file
# Headers of every response. The policy blocks scripts from other origins and requests to other hosts.
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
    """Host names under which the page may be requested.

    A website can make its own name resolve to this machine and then read the page as same-origin (DNS rebinding). The
    user's browser still sends the website's name, so requests for other names than the page's are rejected.

    Args:
        host: address that is served; with 0.0.0.0, every IP address is accepted, since an address cannot be rebound.
        names: additional host names, such as a proxy's.
    """

    def __init__(self, host: str, names: Collection[str] = ()) -> None:
        self.proxies = {name.lower() for name in names}
        self.names = {*LOCAL, host.strip("[]").lower(), *self.proxies}
        self.any_address = host.strip("[]") in ANY_ADDRESS
        if self.any_address:
            self.names.update([socket.gethostname().lower(), socket.getfqdn().lower()])

    def holds(self, host: str) -> bool:
        """Check whether a Host header contains a name of the page."""
        found = HOST.fullmatch(host)
        if found is None:
            return False
        name = (found[1] or found[2]).lower().removesuffix(".")
        if self.any_address:
            with contextlib.suppress(ValueError):
                ipaddress.ip_address(name)
                return True
        return name in self.names

    def is_own_origin(self, origin: str, host: str) -> bool:
        """Check whether an Origin header is the page's own origin or has an additional host name."""
        try:
            parts = urlsplit(origin.lower())
            return parts.netloc == host.lower() or parts.hostname in self.proxies
        except ValueError:
            return False


class Guard:
    """An ASGI middleware that passes only admitted requests to an application."""

    def __init__(self, app: App, hosts: Hosts) -> None:
        self.app = app
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request to the application or reject it, and add HEADERS to the response."""
        is_begun = False

        async def sent(message: MutableMapping[str, Any]) -> None:
            nonlocal is_begun
            is_begun = True
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = self._refusal(Headers(scope=scope)) if scope["type"] == "http" else None
        if refusal is None:
            try:
                await self.app(scope, receive, sent)
                return
            except asyncio.CancelledError:
                if is_begun:
                    raise
                refusal = HTTPStatus.SERVICE_UNAVAILABLE, "the server is stopping: try again later"
        status, reason = refusal
        if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            # Read the body: otherwise the connection would break before the browser reads the response.
            while (await receive()).get("more_body"):
                pass
        await JSONResponse({"error": reason}, status)(scope, receive, sent)

    def _refusal(self, headers: Headers) -> tuple[HTTPStatus, str] | None:
        """Return the status and the reason to reject a request; None to admit it."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self.hosts.holds(hosts[0]):
            return (
                HTTPStatus.FORBIDDEN,
                "the server does not accept this address; see --host and --allow-host",
            )
        # Requests for images and scripts have no Origin header. Any website may contain a link to this page.
        sites = set(headers.getlist("sec-fetch-site"))
        is_link = headers.getlist("sec-fetch-mode") == ["navigate"]
        is_foreign = not is_link and bool({"cross-site", "same-site"} & sites)
        origins = headers.getlist("origin")
        if is_foreign or not all(self.hosts.is_own_origin(one, hosts[0]) for one in origins):
            return HTTPStatus.FORBIDDEN, "another page sent this request"
        if "transfer-encoding" in headers:
            return HTTPStatus.LENGTH_REQUIRED, "send the request with a Content-Length"
        if int(headers.get("content-length", 0)) > MOST_BYTES + FRAME:
            most = f"the request has more than {MOST_BYTES // 2**20} MiB: send less"
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE, most
        return None
