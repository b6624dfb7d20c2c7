"""Writes of a tick leave together when it ends, in their order, whatever becomes of other connections."""

from __future__ import annotations

import asyncio
import contextvars
import socket
from collections.abc import AsyncIterator

import pytest

from app.transport.gathering import GATHERED_BYTES_MAX, GatheringTransport, Outbox

pytestmark = pytest.mark.anyio


class Peer:
    """One connection: our transport, and the socket of the other end."""

    def __init__(self, transport: GatheringTransport, end: socket.socket) -> None:
        self.transport = transport
        self.end = end

    def arrived(self) -> bytes:
        """What is there at this moment."""
        try:
            return self.end.recv(10_000_000)
        except BlockingIOError:
            return b""

    async def read(self, size: int) -> bytes:
        return await asyncio.wait_for(self._read(size), 30)

    async def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size and (more := await asyncio.get_running_loop().sock_recv(self.end, 1_000_000)):
            data += more
        return data


@pytest.fixture
async def peers() -> AsyncIterator[list[Peer]]:
    """Two connections of one server."""
    loop, outbox, made = asyncio.get_running_loop(), Outbox(), []
    for _ in range(2):
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        transport, _protocol = await loop.connect_accepted_socket(asyncio.Protocol, ours)
        made.append(Peer(GatheringTransport(transport, outbox, loop), theirs))
    yield made
    for peer in made:
        peer.transport.abort()
        peer.end.close()
    await asyncio.sleep(0)


async def test_writes_leave_when_the_tick_ends_and_in_their_order(peers: list[Peer]) -> None:
    for number in range(3):
        for peer in peers:
            peer.transport.write(b"%d" % number)
    assert [peer.arrived() for peer in peers] == [b"", b""]
    assert [await peer.read(3) for peer in peers] == [b"012", b"012"]


async def test_a_close_sends_what_is_there_and_an_abort_does_not(peers: list[Peer]) -> None:
    for peer in peers:
        peer.transport.write(b"last")
    peers[0].transport.close()
    peers[1].transport.abort()
    assert [await peer.read(100) for peer in peers] == [b"last", b""]


async def test_the_end_of_our_side_comes_after_what_was_written(peers: list[Peer]) -> None:
    peer = peers[0]
    peer.transport.write(b"last")
    assert peer.transport.can_write_eof()
    peer.transport.write_eof()
    assert await peer.read(100) == b"last"


async def test_much_is_written_at_once_so_that_a_slow_reader_is_noticed(peers: list[Peer]) -> None:
    whole, parts = peers
    whole.transport.write(b"x" * (GATHERED_BYTES_MAX + 1))
    assert whole.arrived()
    parts.transport.write(b"first")
    parts.transport.write(b"x" * GATHERED_BYTES_MAX)
    assert parts.arrived().startswith(b"first")


async def test_a_connection_that_is_gone_takes_nothing_from_the_others(peers: list[Peer]) -> None:
    for peer in peers:
        peer.transport.write(b"answer")
    gone = peers[0].transport
    inner = gone._transport
    inner.abort()
    assert await peers[1].read(6) == b"answer"
    gone.write(b"too late")
    assert await peers[0].read(100) == b"" and gone.is_closing()


async def test_what_is_sent_belongs_to_no_call(peers: list[Peer]) -> None:
    call: contextvars.ContextVar[str] = contextvars.ContextVar("call")
    seen = []

    class Watching(asyncio.Transport):
        def is_closing(self) -> bool:
            seen.append(call.get("none"))
            return True

    call.set("the call whose answer came first")
    GatheringTransport(Watching(), peers[0].transport._outbox, asyncio.get_running_loop()).write(b"x")
    await peers[0].read(0)
    await asyncio.sleep(0)
    assert seen == ["none"]
