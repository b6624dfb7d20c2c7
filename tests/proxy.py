"""A TCP proxy that goes wrong on demand, to stand between the code under test and a real server.

It runs on an event loop and a thread of its own, so tests call it from anywhere. A fault holds, for connections that
are open and for new ones, until `heal`. Knows nothing of what goes through it.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Self

CHUNK_BYTES = 65_536

CHUNKS_MAX = 64
"""Read but not yet forwarded, of one direction of one connection; more stay with the sender."""

CONNECTIONS_MAX = 1_000

WAIT_S_MAX = 10.0

LINGER_NOT = struct.pack("ii", 1, 0)
"""SO_LINGER that makes closing a socket send RST instead of FIN (socket(7))."""


class FaultProxy:
    """Forwards 127.0.0.1:`port` to `target_port`; `latency_s` is added to every answer, read anew for each."""

    def __init__(self, target_port: int, target_host: str = "127.0.0.1") -> None:
        self.latency_s = 0.0
        self._target = (target_host, target_port)
        self._links: set[Link] = set()
        self._resets = self._half_closes = False
        started: Future[int] = Future()
        self._thread = threading.Thread(target=self._run, args=(started,), name="proxy", daemon=True)
        self._thread.start()
        self.port = started.result(WAIT_S_MAX)

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._links)

    def stall(self) -> None:
        """Accept and read, but forward nothing; what was sent meanwhile arrives after `heal`."""
        self._call(self._flowing.clear)

    def hold_answers(self) -> None:
        """What is sent arrives; what comes back does after `heal`."""
        self._call(self._answering.clear)

    def reset(self) -> None:
        """RST to every client, and to those that come."""
        self._call(self._reset)

    def half_close(self) -> None:
        """FIN to every client, and to those that come, while what they send still reaches the server."""
        self._call(self._half_close)

    def point_at(self, target_port: int) -> None:
        """For connections that come; those that are open stay where they are."""
        self._target = (self._target[0], target_port)

    def heal(self) -> None:
        """No fault any more. Connections that were reset or half-closed stay lost."""
        self._call(self._heal)

    def close(self) -> None:
        """End every connection and the proxy."""
        if self._thread.is_alive():
            self._call(self._closing.set)
        self._thread.join(WAIT_S_MAX)
        assert not self._thread.is_alive(), "the proxy did not end"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, function: Callable[[], object]) -> None:
        """On the loop's thread; returns when it is done."""
        done: Future[None] = Future()

        def run() -> None:
            try:
                function()
            except BaseException as error:
                done.set_exception(error)
            else:
                # In the next turn of the loop, when a socket that was aborted is closed.
                self._loop.call_soon(done.set_result, None)

        self._loop.call_soon_threadsafe(run)
        done.result(WAIT_S_MAX)

    # All below runs on the proxy's loop.

    def _reset(self) -> None:
        self._resets = True
        for link in self._links:
            link.reset()

    def _half_close(self) -> None:
        self._half_closes = True
        for link in self._links:
            link.outlet.end()

    def _heal(self) -> None:
        self.latency_s = 0.0
        self._resets = self._half_closes = False
        self._flowing.set()
        self._answering.set()

    def _run(self, started: Future[int]) -> None:
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.run(self._serve(started))

    async def _serve(self, started: Future[int]) -> None:
        self._loop = asyncio.get_running_loop()
        self._closing, self._flowing, self._answering = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._flowing.set()
        self._answering.set()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        started.set_result(server.sockets[0].getsockname()[1])
        await self._closing.wait()
        server.close()
        tasks = [link.task for link in self._links]
        for link in self._links:
            link.reset()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        link = Link(task, reader, writer)
        self._links.add(link)
        try:
            await self._forward(link)
        except* (OSError, asyncio.CancelledError):
            # Nobody listens behind, an end went away, or a reset is wanted: RST tells the client.
            link.abort()
        finally:
            self._links.discard(link)

    async def _forward(self, link: Link) -> None:
        """Until both directions have ended."""
        if self._resets or len(self._links) > CONNECTIONS_MAX:
            raise ConnectionResetError
        if self._half_closes:
            link.outlet.end()
        async with asyncio.timeout(WAIT_S_MAX):
            from_server, to_server = await asyncio.open_connection(*self._target)
        try:
            async with asyncio.TaskGroup() as group:
                requests: Chunks = asyncio.Queue(CHUNKS_MAX)
                answers: Chunks = asyncio.Queue(CHUNKS_MAX)
                group.create_task(self._take(link.reader, requests, lambda: 0.0))
                group.create_task(self._give(requests, Outlet(to_server), self._flowing))
                group.create_task(self._take(from_server, answers, lambda: self.latency_s))
                group.create_task(self._give(answers, link.outlet, self._flowing, self._answering))
            link.writer.close()
        finally:
            to_server.close()

    async def _take(self, reader: asyncio.StreamReader, chunks: Chunks, latency_s: Callable[[], float]) -> None:
        """Each chunk with the moment at which it is due at the other end; the last is empty."""
        chunk = b"-"
        while chunk:
            chunk = await reader.read(CHUNK_BYTES)
            await chunks.put((self._loop.time() + latency_s(), chunk))

    async def _give(self, chunks: Chunks, outlet: Outlet, *opened: asyncio.Event) -> None:
        chunk = b"-"
        while chunk:
            due, chunk = await chunks.get()
            await asyncio.sleep(due - self._loop.time())
            for gate in opened:
                await gate.wait()
            await outlet.send(chunk)


Chunks = asyncio.Queue[tuple[float, bytes]]


@dataclass
class Outlet:
    """Where one direction ends. What comes after the end of the stream is dropped."""

    writer: asyncio.StreamWriter
    is_ended: bool = False

    async def send(self, chunk: bytes) -> None:
        if not chunk:
            self.end()
        elif not self.is_ended:
            self.writer.write(chunk)
            await self.writer.drain()

    def end(self) -> None:
        """FIN."""
        if not self.is_ended:
            self.is_ended = True
            self.writer.write_eof()


class Link:
    """A client's connection, and the task that serves it."""

    def __init__(self, task: asyncio.Task[Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.task = task
        self.reader = reader
        self.writer = writer
        self.outlet = Outlet(writer)

    def reset(self) -> None:
        self.abort()
        self.task.cancel()

    def abort(self) -> None:
        """RST; the server behind sees its connection close."""
        if not self.writer.transport.is_closing():
            self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT)
            self.writer.transport.abort()
