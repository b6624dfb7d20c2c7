"""One connection to Redis that sends a command and hands its reply to a function: 10 µs of CPU for both.

redis-py finds the server (app/clients.py) and hiredis speaks its language; redis-py's own connection is left out
because its path is most of what a shared script call costs. Knows no limit. Never retries: a command that may have
been carried out is not sent again.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import hiredis

from app.clients import RedisEndpoint

Reply = Callable[[Any], None]

NAME = "agentcore-tools:limits"
"""What CLIENT LIST shows."""

KEEPALIVE_S = 30
"""Firewalls forget a connection that is silent for minutes, and the next call would be the one that finds out."""


class LinkLost(ConnectionError):
    """The server closed the connection, or said what is not Redis."""


class RedisLink(asyncio.Protocol):
    """Replies come in the order of the commands. `on_lost` runs once, when the connection has ended by itself."""

    def __init__(self, on_lost: Callable[[], None]) -> None:
        self._on_lost = on_lost
        self._reader = hiredis.Reader(protocolError=LinkLost, replyError=hiredis.ReplyError)
        self._waiting: deque[Reply] = deque()
        self._transport: asyncio.Transport | None = None
        self._reason = "connection to Redis lost"
        self.lost = False

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
            await link._introduce(endpoint)
        except BaseException:
            link.close()
            raise
        return link

    async def _introduce(self, endpoint: RedisEndpoint) -> None:
        if endpoint.password is not None:
            user = (endpoint.username,) if endpoint.username else ()
            await self.ask("AUTH", *user, endpoint.password)
        if endpoint.db:
            await self.ask("SELECT", str(endpoint.db))
        try:
            await self.ask("CLIENT", "SETNAME", NAME)
        except hiredis.ReplyError as error:
            # A user, or a proxy, that may do no more than what is needed.
            if not str(error).startswith(("NOPERM", "ERR unknown")):
                raise

    def send(self, command: bytes, reply: Reply) -> None:
        """Send a packed command now; `reply` gets what comes, a `hiredis.ReplyError` or LinkLost too."""
        if self.lost:
            reply(LinkLost(self._reason))
            return
        assert self._transport is not None
        self._waiting.append(reply)
        self._transport.write(command)

    async def ask(self, *command: Any) -> Any:
        """Send and wait. Raises what the server refused it with, or LinkLost."""
        return await self.answer(hiredis.pack_command(command))

    async def answer(self, command: bytes) -> Any:
        """`ask` with a packed command."""
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
        if not self.lost:
            self._end()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are no subclasses of it
        plain = transport.get_extra_info("socket")
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_KEEPIDLE"):  # not on every system
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)

    def data_received(self, data: bytes) -> None:
        try:
            self._reader.feed(data)
            while not self.lost and (value := self._reader.gets()) is not False:
                if not self._waiting:  # why it wants no connection, or a reply to nothing: the next ones would not fit
                    raise LinkLost(str(value) if isinstance(value, hiredis.ReplyError) else "a reply to no command")
                self._waiting.popleft()(value)
        except LinkLost as error:
            self._reason = str(error)
            self.connection_lost(error)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.lost:
            self._end()
            self._on_lost()

    def _end(self) -> None:
        self.lost = True
        if self._transport is not None:
            self._transport.abort()
        while self._waiting:
            self._waiting.popleft()(LinkLost(self._reason))
