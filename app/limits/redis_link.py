"""One connection to Redis that sends a command and hands its reply to a function: 10 µs of CPU for both.

redis-py finds the server (app/clients.py) and hiredis speaks its language; redis-py's own connection is left out
because its path is most of what a shared script call costs. Knows no limit. Never retries: a command that may have
been carried out is not sent again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import hiredis

from app.clients import RedisEndpoint

Reply = Callable[[Any], None]

LinkError = (OSError, hiredis.HiredisError, asyncio.TimeoutError)


class LinkLost(ConnectionError):
    """The server closed the connection, or said what is not Redis."""


class RedisLink(asyncio.Protocol):
    """Replies come in the order of the commands. `on_lost` runs once, when the connection has ended by itself."""

    def __init__(self, on_lost: Callable[[], None]) -> None:
        self._on_lost = on_lost
        self._reader = hiredis.Reader(protocolError=LinkLost, replyError=hiredis.ReplyError)
        self._waiting: deque[Reply] = deque()
        self._transport: asyncio.Transport | None = None
        self._closed = False

    @classmethod
    async def connect(cls, endpoint: RedisEndpoint, on_lost: Callable[[], None]) -> RedisLink:
        """Connected, authenticated, on its database. The caller bounds the time. Raises OSError, ReplyError."""
        loop = asyncio.get_running_loop()
        _, link = await loop.create_connection(
            lambda: cls(on_lost),
            endpoint.host,
            endpoint.port,
            ssl=endpoint.ssl,
            server_hostname=endpoint.host if endpoint.ssl else None,
        )
        try:
            if endpoint.password is not None:
                user = (endpoint.username,) if endpoint.username else ()
                await link.ask("AUTH", *user, endpoint.password)
            if endpoint.db:
                await link.ask("SELECT", str(endpoint.db))
            await link.ask("CLIENT", "SETNAME", "agentcore-tools:limits")
        except BaseException:
            link.close()
            raise
        return link

    def send(self, command: tuple[Any, ...], reply: Reply) -> None:
        """Send it now; `reply` gets what comes, a `hiredis.ReplyError` too. Not called when the link is lost."""
        assert self._transport is not None
        self._waiting.append(reply)
        self._transport.write(hiredis.pack_command(command))

    async def ask(self, *command: str | int | bytes) -> Any:
        """Send and wait. Raises what the server refused it with, or LinkLost."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def take(value: Any) -> None:
            if not future.done():
                future.set_result(value)

        self.send(command, take)
        value = await future
        if isinstance(value, Exception):
            raise value
        return value

    def close(self) -> None:
        """At once; replies that are due are lost with it."""
        self._closed = True
        if self._transport is not None:
            self._transport.abort()
        self._lose_waiting()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are no subclasses of it

    def data_received(self, data: bytes) -> None:
        try:
            self._reader.feed(data)
            while (value := self._reader.gets()) is not False:
                self._waiting.popleft()(value)
        except (LinkLost, IndexError):  # not Redis, or more replies than commands: nothing fits any more
            assert self._transport is not None
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._lose_waiting()
        if not self._closed:
            self._closed = True
            self._on_lost()

    def _lose_waiting(self) -> None:
        while self._waiting:
            self._waiting.popleft()(LinkLost("connection to Redis lost"))
