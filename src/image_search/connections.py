"""Connections to the page: so many of a visitor, closed when a request does not arrive or an answer is not taken."""

import asyncio
import functools
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from image_search.guard import Places, visitor_of

MOST_CONNECTIONS = 256  # of a visitor; of all together twice as many
LONGEST_HEAD = 2**15  # bytes of a request's line and headers; a link holds a text, percent-encoded
MOST_LINES = 100  # of them
ARRIVING = (h11.IDLE, h11.SEND_BODY)  # states of a sender whose request is not there yet


class Requests(h11.Connection):
    """Requests of a client, as events of h11, limited in the data that arrive at once."""

    def next_event(self) -> Any:
        """The next event. Raises RemoteProtocolError at a head of many lines or bytes, and at a body in chunks.

        Each line and each chunk takes its time, however small it is; a body whose length is said is one piece.
        """
        if self.their_state is h11.IDLE:
            received, _ = self.trailing_data
            ends = [received.find(blank) for blank in (b"\n\r\n", b"\n\n")]
            length = min((end for end in ends if end >= 0), default=len(received))
            if length > LONGEST_HEAD or received.count(b"\n", 0, length) > MOST_LINES:
                raise h11.RemoteProtocolError("the head is too large", 431)
        event = super().next_event()
        headers = event.headers if isinstance(event, h11.Request) else []
        if any(name == b"transfer-encoding" for name, _ in headers):
            raise h11.RemoteProtocolError("the length of the body is not said", 411)
        return event


class Connection(H11Protocol):
    """A connection over HTTP/1.1.

    The head of a request has so many seconds to arrive, and then its body, whether the page reads that or not. An
    answer has as many from when the visitor stops taking it. What is idle between two requests is closed by uvicorn.

    Args:
        seconds: for each of them.
        places: of connections, which all of them share.
    """

    def __init__(self, *args: Any, seconds: float, places: Places, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = Requests(h11.SERVER)
        self._seconds = seconds
        self._places = places
        self._visitor = ""
        self._arrival: asyncio.TimerHandle | None = None
        self._taking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request, if the visitor has not too many connections."""
        super().connection_made(transport)
        self._visitor = visitor_of({"client": self.client})
        has_room = self._places.has_room(self._visitor)
        self._places.take(self._visitor)  # until it is lost, as one that is closed here is, too
        if not has_room:
            transport.abort()
            return
        self._arrival = self._closing(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._places.leave(self._visitor)
        for timer in (self._arrival, self._taking):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take a part of a request."""
        if self._arrival is None:
            self._arrival = self._closing(self.transport)
        had_head = self.conn.their_state is h11.SEND_BODY
        super().data_received(data)
        has_head = self.conn.their_state is h11.SEND_BODY
        if self.conn.their_state not in ARRIVING or (has_head and not had_head):
            self._arrival.cancel()
            self._arrival = None
        if has_head and not had_head:
            # The page itself says that a body is too slow, and then this is the end.
            self._arrival = self._closing(self.transport, 1)

    def pause_writing(self) -> None:
        """Begin to wait for the visitor to take more of an answer."""
        super().pause_writing()
        self._taking = self._closing(self.transport)

    def resume_writing(self) -> None:
        """Write on."""
        super().resume_writing()
        if self._taking is not None:
            self._taking.cancel()

    def _closing(self, transport: asyncio.Transport, later: float = 0) -> asyncio.TimerHandle:
        return self.loop.call_later(self._seconds + later, transport.abort)


def protocol(seconds: float) -> Any:
    """Return what uvicorn makes a connection of, see `Connection`."""
    return functools.partial(Connection, seconds=seconds, places=Places(MOST_CONNECTIONS))
