"""From checked addresses to a connection: the pool, and a backend that connects nowhere else.

Decides nothing about what may be reached (`rules`) and knows no redirects or bodies (`client`).
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpcore

from app.egress.targets import Address, Origin, Target
from app.fairness import FairSemaphore

CONNECT_ATTEMPTS_MAX = 4
CONNECT_ATTEMPT_S = 2.0
"""Patience with an address while there is another: long enough for one lost SYN, which is sent again after 1 s."""

KEEPALIVE_S = 4.0
"""Under the 5 s after which Node closes an idle connection: a request must not meet it half closed."""

EXPIRED_DROPPED_MAX = 4
"""Idle connections that one request looks at, oldest first, and dead ones of its own origin that it passes over. To
look polls the socket; a request leaves at most one idle connection behind, so they go faster than they come."""


_Kept = tuple[str, Origin]
"""Tenant and origin that an idle connection is for."""


class _Stream(httpcore.AsyncNetworkStream):
    """A stream that does not outlive a TLS handshake cut short by cancellation."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return await self._stream.read(max_bytes, timeout)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        try:
            return _Stream(await self._stream.start_tls(ssl_context, server_hostname, timeout))
        except BaseException:
            await self._stream.aclose()  # httpcore's own backend closes on Exception, which a cancellation is not
            raise

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)

    def holds_unread(self) -> bool:
        """Whether something was received that nobody has read, or nobody can tell. Below are streams of anyio: that of
        TLS, if there is one, and that of the socket."""
        stream: Any = getattr(self._stream, "_stream", None)
        received = getattr(stream, "_read_bio", None)
        if received is not None:
            if received.pending or stream._ssl_object.pending():
                return True
            stream = stream.transport_stream
        return bool(getattr(getattr(stream, "_protocol", None), "read_queue", True))


class PinnedBackend(httpcore.AsyncNetworkBackend):
    """Connects to the addresses that were checked, whatever name it is asked for. Has no unix sockets."""

    def __init__(self, addresses: Sequence[Address]) -> None:
        self._addresses = addresses[:CONNECT_ATTEMPTS_MAX]
        self._backend = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        for address in self._addresses[:-1]:
            try:
                return _Stream(await self._backend.connect_tcp(str(address), port, CONNECT_ATTEMPT_S))
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        return _Stream(await self._backend.connect_tcp(str(self._addresses[-1]), port))


class ConnectionPool:
    """At most `size` connections, busy and idle together, kept by tenant and origin: what one tenant left unread on a
    connection, or proved there of itself (NTLM), must not meet another's request. Tenants that wait for one get it in
    turn.

    httpcore's own pool gives away a new connection before it closes an old one; a request cancelled in between
    leaves the new one in the pool, unconnected, for ever. Here nothing is handed on until it was connected.
    """

    def __init__(self, size: int, ssl_context: ssl.SSLContext) -> None:
        self._size = size
        self._ssl_context = ssl_context
        self._slots = FairSemaphore(size)
        self._idle: list[tuple[_Kept, httpcore.AsyncHTTPConnection]] = []
        self.busy = 0
        self._closed = False

    @property
    def idle(self) -> int:
        return len(self._idle)

    @asynccontextmanager
    async def connection(
        self, target: Target, addresses: Sequence[Address], tenant: str
    ) -> AsyncIterator[httpcore.AsyncHTTPConnection]:
        """A connection for one exchange: an idle one of the same tenant and origin, else a new one to `addresses`."""
        kept_by = tenant, target.origin
        await self._slots.acquire(tenant)
        self.busy += 1
        connection = None
        try:
            connection, surplus = self._take(kept_by, addresses)
            await _close_all(surplus)
            yield connection
        finally:
            self.busy -= 1
            try:
                if connection is not None and not self._keep(kept_by, connection):
                    await connection.aclose()
            finally:
                self._slots.release()

    def _take(
        self, kept_by: _Kept, addresses: Sequence[Address]
    ) -> tuple[httpcore.AsyncHTTPConnection, list[httpcore.AsyncHTTPConnection]]:
        """The connection to use and those to close: expired ones, and the oldest where there is no room."""
        surplus = self._drop_oldest_expired()
        connection = self._take_idle(kept_by, surplus) or self._connect_to(kept_by[1], addresses)
        while self.busy + len(self._idle) > self._size:
            surplus.append(self._idle.pop(0)[1])
        return connection, surplus

    def _drop_oldest_expired(self) -> list[httpcore.AsyncHTTPConnection]:
        expired: list[httpcore.AsyncHTTPConnection] = []
        while self._idle and len(expired) < EXPIRED_DROPPED_MAX and self._idle[0][1].has_expired():
            expired.append(self._idle.pop(0)[1])
        return expired

    def _take_idle(
        self, kept_by: _Kept, surplus: list[httpcore.AsyncHTTPConnection]
    ) -> httpcore.AsyncHTTPConnection | None:
        """The connection of this tenant and origin used last, unless it and those before it are dead."""
        mine = [position for position, (whose, _) in enumerate(self._idle) if whose == kept_by]
        for position in reversed(mine[-EXPIRED_DROPPED_MAX:]):
            _, connection = self._idle.pop(position)
            if not connection.has_expired():
                return connection
            surplus.append(connection)
        return None

    def _keep(self, kept_by: _Kept, connection: httpcore.AsyncHTTPConnection) -> bool:
        if self._closed or not connection.is_available() or _holds_more(connection):
            return False
        self._idle.append((kept_by, connection))
        return True

    def _connect_to(self, origin: Origin, addresses: Sequence[Address]) -> httpcore.AsyncHTTPConnection:
        scheme, host, port = origin
        return httpcore.AsyncHTTPConnection(
            # the name stays: certificate and SNI are checked against it, and connections are kept apart by it
            origin=httpcore.Origin(scheme.encode(), host.encode(), port),
            ssl_context=self._ssl_context,
            keepalive_expiry=KEEPALIVE_S,
            network_backend=PinnedBackend(addresses),
        )

    async def aclose(self) -> None:
        """Close what is idle, now; what is busy is closed by the exchange that holds it."""
        self._closed = True
        idle, self._idle = self._idle, []
        await _close_all([connection for _, connection in idle])


def _holds_more(connection: httpcore.AsyncHTTPConnection) -> bool:
    """Whether more came than the response, or nobody can tell: it would be the answer to the next request, perhaps
    another caller's. httpcore looks at the socket alone, for what nobody has received yet."""
    http11: Any = connection._connection
    stream = getattr(http11, "_network_stream", None)
    if not isinstance(http11, httpcore.AsyncHTTP11Connection) or not isinstance(stream, _Stream):
        return True
    return bool(http11._h11_state.trailing_data[0]) or stream.holds_unread()


async def _close_all(connections: Iterable[httpcore.AsyncHTTPConnection]) -> None:
    """Close all of them, also when cancelled on the way."""
    cancelled: asyncio.CancelledError | None = None
    for connection in connections:
        try:
            await connection.aclose()
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
