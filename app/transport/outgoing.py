"""One write for a response's head and body: uvicorn makes two, and each is a system call of about 5 µs.

Stands between a request and its connection; knows no HTTP beyond that the first write is a head.
"""

from __future__ import annotations

import asyncio


class HeldHead:
    """What a request writes to. Keeps the first write until the second, or until the connection is to be closed.

    An application that starts a response and sends its first bytes much later has its head sent with them.
    """

    __slots__ = ("_head", "_transport", "_wrote")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""
        self._wrote = False

    def write(self, piece: bytes) -> None:
        if self._wrote:
            self._transport.write(self._head + piece if self._head else piece)
            self._head = b""
        else:
            self._head = piece
            self._wrote = True

    def close(self) -> None:
        if self._head:
            self._transport.write(self._head)
            self._head = b""
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()
