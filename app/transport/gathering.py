"""A connection's transport whose writes leave together when the event-loop tick ends.

What a tick answers, tens of requests under load, is sent in one row: the code that answers stays in the processor's
caches, the first write wakes the clients and the rest find them awake (5 of 31 us a call, docs/adr/0019). Order is that
of the writes, for everything on the connection writes here. Knows no HTTP; `protocol.py` puts it around each transport.
"""

from __future__ import annotations

import asyncio
from contextvars import Context
from typing import Any

GATHERED_BYTES_MAX = 65_536
"""Of one connection; more is written at once, so that the transport can say that the peer is slow."""


class Outbox:
    """The transports of one server that have something to send."""

    __slots__ = ("_context", "_transports")

    def __init__(self) -> None:
        self._transports: list[GatheringTransport] = []
        self._context = Context()  # not that of the call whose answer comes first

    def add(self, transport: GatheringTransport, loop: asyncio.AbstractEventLoop) -> None:
        if not self._transports:
            loop.call_soon(self._send, context=self._context)
        self._transports.append(transport)

    def _send(self) -> None:
        transports, self._transports = self._transports, []
        for transport in transports:
            transport.flush()


class GatheringTransport(asyncio.Transport):
    """Around a socket's transport, which calls the protocol as before."""

    __slots__ = ("_loop", "_outbox", "_transport", "_unsent")

    def __init__(self, transport: asyncio.Transport, outbox: Outbox, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._outbox = outbox
        self._loop = loop
        self._unsent = b""

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        if self._unsent:
            self._unsent += data
            if len(self._unsent) > GATHERED_BYTES_MAX:
                self.flush()
        elif len(data) > GATHERED_BYTES_MAX:
            self._transport.write(data)
        elif data:
            self._unsent = bytes(data)
            self._outbox.add(self, self._loop)

    def get_write_buffer_size(self) -> int:
        return len(self._unsent) + self._transport.get_write_buffer_size()

    def flush(self) -> None:
        """Hand over what is there; nothing to a connection that is gone."""
        unsent, self._unsent = self._unsent, b""
        if unsent and not self._transport.is_closing():
            self._transport.write(unsent)

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def abort(self) -> None:
        self._unsent = b""
        self._transport.abort()

    def write_eof(self) -> None:
        self.flush()
        self._transport.write_eof()

    def can_write_eof(self) -> bool:
        return self._transport.can_write_eof()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def is_reading(self) -> bool:
        return self._transport.is_reading()

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._transport.set_protocol(protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._transport.get_protocol()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)
