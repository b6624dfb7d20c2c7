"""What the connections of one server share: their bounds, the drain flag, counters, and one timer for all deadlines.

Owns no socket and knows no HTTP. `protocol.py` calls it; the server's builder makes one, sets `draining` on it and
reads `refused`.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import islice
from typing import Any

from app.transport.access_log import AccessLog
from app.transport.exchange import DefaultHead
from app.transport.gathering import Outbox
from app.transport.room import Room

log = logging.getLogger(__name__)

Expire = Callable[[float], None]
"""Takes the loop's time; cuts what is overdue."""

LOG_INTERVAL_S = 1.0
"""Peers decide how often something is refused, so the log gets one line in this time with the number of them."""

COLLECTED_AFTER_BYTES = 33_554_432
"""Of large bodies that were let go. The garbage collector counts objects and no bytes: where something of a call leads
back to itself, hundreds with a megabyte each would wait for it. It takes milliseconds, these bodies half a second."""

LOOKED_AT_MAX = 256
"""Of the connections that leave answers unread, each time that there is no room: some 0.1 ms."""

READ_BYTES_MIN = 65_536
"""Less may have gone into the system's buffers and to nobody."""

SWEEP_INTERVAL_MAX_S = 1.0
"""Deadlines fire at most this much late. One sweep over 10,000 connections takes about 10 ms."""


@dataclass(frozen=True, slots=True)
class HttpBounds:
    """What one connection may cost. Deadlines fire by up to `sweep_interval_s` late, never early."""

    header_bytes_max: int = 32_768
    """Request line and headers together; also trailers and other chunk framing beyond the length of the body."""

    headers_max: int = 100

    url_bytes_max: int = 8_192
    """RFC 9110, section 4.1, asks for at least 8000."""

    request_bytes_max: int = 1_048_576

    requests_bytes_max: int = 268_435_456
    """Of the bodies over LARGE_BODY_BYTES of all connections together, from the first byte to the end of the call."""

    responses_bytes_max: int = 268_435_456
    """Of the answers of all connections together that their peers have not read. One alone may be larger."""

    header_read_timeout_s: float = 10.0
    """From the first byte of a head, or from the answer before it, to its last byte."""

    body_read_timeout_s: float = 10.0
    """For the whole body from the end of the head; stands still while it is we who do not read."""

    idle_timeout_s: float = 75.0
    """Before the first byte and between requests. Longer than the 60 s after which nginx and ALB drop their end, so
    that they do not send into a closing connection. uvicorn's `timeout_keep_alive` has no effect."""

    write_timeout_s: float = 30.0
    """How long a peer may keep our write buffer above its high-water mark, or a closed connection from flushing."""

    linger_timeout_s: float = 2.0
    linger_bytes_max: int = 4_194_304
    """After a refusal we read and forget this much: closing on unread bytes is a reset, which destroys the answer."""

    pipelined_max: int = 32
    """Requests that wait behind a running one. Reading stops at the first, but one read can hold thousands."""

    connections_max: int = 10_000

    @property
    def sweep_interval_s(self) -> float:
        deadlines = (
            self.header_read_timeout_s,
            self.body_read_timeout_s,
            self.idle_timeout_s,
            self.write_timeout_s,
            self.linger_timeout_s,
        )
        return min(SWEEP_INTERVAL_MAX_S, min(deadlines) / 4)


class Reason(StrEnum):
    """Why a peer was refused or cut; the label of a counter."""

    MALFORMED = "malformed"
    HOST = "host"
    FRAMING = "framing"
    VERSION = "version"
    HEAD_TOO_LARGE = "head_too_large"
    URL_TOO_LONG = "url_too_long"
    BODY_TOO_LARGE = "body_too_large"
    HEAD_TOO_SLOW = "head_too_slow"
    BODY_TOO_SLOW = "body_too_slow"
    READER_TOO_SLOW = "reader_too_slow"
    ANSWERS_FULL = "answers_full"
    IDLE = "idle"
    PIPELINE_FULL = "pipeline_full"
    BODIES_FULL = "bodies_full"
    CONNECTIONS_FULL = "connections_full"
    CLIENT_GONE = "client_gone"
    """Not a refusal: the application raised after its client had gone."""


class Wire:
    """Shared by all connections of one server, on its event loop's thread.

    The timer runs while there are connections, so nobody has to start it. A connection is known by its `expire(now)`.
    """

    def __init__(self, bounds: HttpBounds | None = None, access_log: AccessLog | None = None) -> None:
        self.bounds = bounds or HttpBounds()
        self.access_log = access_log
        self.draining = False
        """While set, the answer to every request that arrives says `Connection: close`."""
        self.refused = dict.fromkeys(Reason, 0)
        self.connections: set[Expire] = set()
        self.room = Room(self.bounds.requests_bytes_max, partial(self.count, Reason.BODIES_FULL, "of one tenant"))
        self._let_go_bytes = 0
        self._unread: dict[asyncio.WriteTransport, int] = {}
        """Of each connection whose peer reads slowly, bytes that it had not read when it was noted; who has read
        nothing for longest comes first."""
        self.unread_bytes = 0
        self.gone_log = _GoneLog(self)
        self.default_head = DefaultHead()
        self.outbox = Outbox()
        self._timer: asyncio.TimerHandle | None = None
        self._unlogged = 0
        self._log_after = 0.0

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def admit(self, expire: Expire, loop: asyncio.AbstractEventLoop) -> bool:
        """Whether there is room for one more connection; from now on its deadlines are watched."""
        if len(self.connections) >= self.bounds.connections_max:
            self.count(Reason.CONNECTIONS_FULL)
            return False
        self.connections.add(expire)
        if self._timer is None:
            self._arm(loop)
        return True

    def forget(self, expire: Expire) -> None:
        self.connections.discard(expire)
        if not self.connections:
            self.close()

    def note_let_go(self, body_bytes: int, loop: asyncio.AbstractEventLoop) -> None:
        """So much of large bodies, which have given their room back."""
        self._let_go_bytes += body_bytes
        if self._let_go_bytes >= COLLECTED_AFTER_BYTES:
            self._let_go_bytes = 0
            loop.call_soon(gc.collect)

    def note_unread(self, transport: asyncio.WriteTransport) -> None:
        """Its peer has left so much unread that it takes no more. Past the bound who has read nothing for
        longest is cut."""
        self.note_read(transport)
        self._unread[transport] = unread_bytes = transport.get_write_buffer_size()
        self.unread_bytes += unread_bytes
        if self.unread_bytes > self.bounds.responses_bytes_max:
            self._look_who_reads(transport)
        while self.unread_bytes > self.bounds.responses_bytes_max and len(self._unread) > 1:
            slowest = next(one for one in self._unread if one is not transport)
            self.note_read(slowest)
            self.count(Reason.ANSWERS_FULL)
            slowest.abort()

    def _look_who_reads(self, newest: asyncio.WriteTransport) -> None:
        """Whoever has read on since it was noted waits from now on, with what is left: a slow reader is not cut for
        those who do not read at all."""
        for transport in list(islice(self._unread, LOOKED_AT_MAX)):
            unread_bytes = transport.get_write_buffer_size()
            if transport is not newest and unread_bytes <= self._unread[transport] - READ_BYTES_MIN:
                self.note_read(transport)
                self._unread[transport] = unread_bytes
                self.unread_bytes += unread_bytes

    def note_read(self, transport: asyncio.WriteTransport) -> None:
        """Or it is gone."""
        self.unread_bytes -= self._unread.pop(transport, 0)

    def count(self, reason: Reason, detail: str = "") -> None:
        self.refused[reason] += 1
        if reason is Reason.IDLE:
            return
        self._unlogged += 1
        now = time.monotonic()
        if now >= self._log_after:
            facts = {"requests": self._unlogged, "reason": reason.value, "detail": detail}
            log.warning("requests refused or cut", extra=facts)
            self._unlogged = 0
            self._log_after = now + LOG_INTERVAL_S

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = loop.call_later(self.bounds.sweep_interval_s, self._sweep, loop)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        self._arm(loop)
        now = loop.time()
        for expire in list(self.connections):
            expire(now)


class _GoneLog(logging.Logger):
    """Stands in for uvicorn's logger in a request whose client has gone. Frameworks raise then, and uvicorn would print
    the traceback: 60 lines for each peer that sends a bad chunk or hangs up in mid-body."""

    def __init__(self, wire: Wire) -> None:
        super().__init__(f"{__name__}.gone")
        self._wire = wire

    def error(self, msg: object, *args: object, **kwargs: Any) -> None:
        exc = kwargs.get("exc_info")
        self._wire.count(Reason.CLIENT_GONE, f"after which the application raised {type(exc).__name__}" if exc else "")
