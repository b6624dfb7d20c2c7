"""A real HTTP server on 127.0.0.1 for tests of what goes out: scripted answers, a record of what came in."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

WAIT_S_MAX = 20.0
"""Not a claim about speed: past it a test fails instead of hanging."""


@dataclass
class Received:
    """One request as it came over the wire."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


Reply = bytes | Callable[[Received, asyncio.StreamWriter], Awaitable[None]]
"""Bytes to send as they are, or a function that talks to the connection itself."""


@dataclass
class Origin:
    """A running server. `replies` is by path; `open` is the number of connections now, `peak` the most there were."""

    replies: dict[str, Reply] = field(default_factory=dict)
    received: list[Received] = field(default_factory=list)
    port: int = 0
    scheme: str = "http"
    open: int = 0
    peak: int = 0
    accepted: int = 0
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    """Answers made of bytes wait for it; it starts set."""

    def __post_init__(self) -> None:
        self.gate.set()

    def url(self, path: str = "/", host: str = "127.0.0.1") -> str:
        return f"{self.scheme}://{host}:{self.port}{path}"

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait for a state of the server; fails when it does not come."""
        async with asyncio.timeout(WAIT_S_MAX), self.changed:
            await self.changed.wait_for(holds)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._count(+1)
        try:
            await self._answer_all(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.transport.abort()
            await self._count(-1)

    async def _answer_all(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            request = await _read_request(reader)
            self.received.append(request)
            async with self.changed:
                self.changed.notify_all()
            reply = self.replies.get(request.target.partition("?")[0], response(b"not here", status="404 Not Found"))
            if isinstance(reply, bytes):
                await self.gate.wait()
                writer.write(reply)
                await writer.drain()
                continue
            speaking = asyncio.ensure_future(reply(request, writer))
            gone = asyncio.ensure_future(reader.read(1))  # a client sends nothing more unless it goes
            await asyncio.wait({speaking, gone}, return_when=asyncio.FIRST_COMPLETED)
            for task in (speaking, gone):
                task.cancel()
            await asyncio.gather(speaking, gone, return_exceptions=True)
            return

    async def _count(self, change: int) -> None:
        self.open += change
        self.accepted += change > 0
        self.peak = max(self.peak, self.open)
        async with self.changed:
            self.changed.notify_all()


async def _read_request(reader: asyncio.StreamReader) -> Received:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    method, target, _ = head[0].split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Received(method, target, headers, body)


@contextlib.asynccontextmanager
async def origin(
    replies: dict[str, Reply] | None = None, *, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
) -> AsyncIterator[Origin]:
    """A server for the length of a test; its connections end with it."""
    running = Origin(dict(replies or {}), scheme="https" if tls else "http")
    connections: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        task.add_done_callback(connections.discard)
        try:
            await running.serve(reader, writer)
        except asyncio.CancelledError:
            pass  # the end of the test; asyncio's own callback would log it as a failure

    server = await asyncio.start_server(serve, host, 0, ssl=tls)
    running.port = server.sockets[0].getsockname()[1]
    try:
        yield running
    finally:
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        await server.wait_closed()


def response(body: bytes = b"", *, status: str = "200 OK", **headers: str) -> bytes:
    """A whole response; `content_type="text/html"` becomes `content-type: text/html`."""
    fields = {"content-length": str(len(body)), **{name.replace("_", "-"): value for name, value in headers.items()}}
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def redirect(location: str, status: int = 302) -> bytes:
    return response(status=f"{status} Moved", location=location)
