"""One request and its response, between uvicorn's cycle and the connection: fewer and larger steps.

uvicorn writes head and body apart, two of the three system calls of a small request; here they are one. A door that
has its whole answer can hand it over at once by the ASGI extension `EXTENSION`; everyone else uses ASGI as it is.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from app.transport.access_log import AsgiLine
from app.transport.turns import LARGE_BODY_BYTES

EXTENSION = "agentcore.exchange"
"""Key in the scope's `extensions`; the value is the request's Exchange."""


class DefaultHead:
    """uvicorn's default headers as bytes; it makes a new list of them once a second."""

    __slots__ = ("_head", "_headers")

    def __init__(self) -> None:
        self._headers: list[tuple[bytes, bytes]] | None = None
        self._head = b""

    def of(self, headers: list[tuple[bytes, bytes]]) -> bytes:
        if headers is not self._headers:
            self._headers = headers
            self._head = b"".join(b"%b: %b\r\n" % header for header in headers)
        return self._head


class Exchange:
    """What a cycle writes to instead of its transport.

    Keeps the first write, the head, until the second, or until the connection is to be closed: an application that
    starts a response and sends its first bytes much later has its head sent with them.
    """

    __slots__ = ("_cycle", "_default_head", "_held", "_line", "_tasks", "_transport", "_wrote")

    def __init__(
        self,
        cycle: RequestResponseCycle,
        transport: asyncio.Transport,
        default_head: DefaultHead,
        tasks: set[asyncio.Task[None]],
        line: AsgiLine | None = None,
    ) -> None:
        self._cycle = cycle
        self._line = line
        self._tasks = tasks
        self._transport = transport
        self._default_head = default_head
        self._held = b""
        self._wrote = False

    # For the cycle

    def write(self, piece: bytes) -> None:
        if self._wrote:
            self._transport.write(self._held + piece if self._held else piece)
            self._held = b""
        else:
            self._held = piece
            self._wrote = True

    def close(self) -> None:
        if self._held:
            self._transport.write(self._held)
            self._held = b""
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def ended(self, task: asyncio.Task[None]) -> None:
        """Let go of one another: left in a circle, requests would wait for the garbage collector, 12 times a second
        for some 10 ms at 20,000 requests/s."""
        self._tasks.discard(task)
        self._cycle.transport = self._transport
        del self._cycle

    # For a door

    @property
    def client_gone(self) -> bool:
        """Whether the client has closed the connection."""
        return self._cycle.disconnected

    def body(self) -> bytes | None:
        """The request's body when all of it is there, and it is small; None: read it by `receive`."""
        cycle = self._cycle
        if cycle.more_body or cycle.disconnected or len(cycle.body) > LARGE_BODY_BYTES:
            return None
        body = bytes(cycle.body)
        cycle.body = bytearray()
        return body

    def answer(self, status: int, headers: bytes, body: bytes) -> bool:
        """Send a whole response; `headers` are lines that end in CRLF. False, and nothing sent: use `send`, which waits
        for a slow reader and knows what to do when the client has gone."""
        cycle = self._cycle
        if cycle.flow.write_paused or cycle.disconnected or cycle.response_started:
            return False
        cycle.response_started = cycle.response_complete = True
        close = b"" if cycle.keep_alive else b"connection: close\r\n"
        default = self._default_head.of(cycle.default_headers)
        self._transport.write(b"".join((STATUS_LINE[status], default, headers, close, b"\r\n", body)))
        if self._line is not None:
            self._line.answered(status, len(body))
        cycle.message_event.set()
        if not cycle.keep_alive:
            self._transport.close()
        cycle.on_response()
        return True
