"""Names of hosts, looked up so that one that hangs holds up nobody who asks for another.

`getaddrinfo` cannot be interrupted. Here every name has a thread, however many ask for it. uvloop has two threads for
all names, goes on in them with what nobody waits for any more, and logs how that ended. Knows nothing of who connects.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import uvloop

from app.fairness import FairSemaphore

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
"""Host and port in, addresses as text out; empty or OSError when there are none."""

LOOKUPS_MAX = 32
"""Threads that may hang in the C library at once. One per name, however many calls wait for that name."""


def nobody() -> str:
    """Who asks, where that makes no difference."""
    return ""


class ThreadedResolver:
    """`getaddrinfo` in threads of its own. Raises OSError.

    It cannot be interrupted, so a hung look-up keeps its thread until the C library gives up. The threads are
    daemons: an executor would join them when the process exits. `whose` names the tenant that asks: a thread that
    comes free goes to tenants in turn.
    """

    def __init__(self, whose: Callable[[], str] = nobody) -> None:
        self._whose = whose
        self._free = FairSemaphore(LOOKUPS_MAX)
        self._running: dict[str, asyncio.Future[list[str]]] = {}

    async def __call__(self, host: str, port: int) -> list[str]:
        if host not in self._running:
            await self._free.acquire(self._whose())
            if host in self._running:  # begun by another while this one waited
                self._free.release()
            else:
                self._begin(host)
        running = self._running[host]
        await asyncio.wait({running})  # not asyncio.shield: from Python 3.14 on it tells of failures nobody waits for
        return running.result()

    def _begin(self, host: str) -> None:
        loop = asyncio.get_running_loop()
        try:
            threading.Thread(target=self._look_up, args=(host, loop), name="resolve", daemon=True).start()
        except RuntimeError as error:  # the process may have no more threads
            self._free.release()
            raise OSError("no thread to resolve in") from error
        self._running[host] = loop.create_future()

    def _look_up(self, host: str, loop: asyncio.AbstractEventLoop) -> None:
        found: list[str] | OSError
        try:
            answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
            found = [str(sockaddr[0]) for *_, sockaddr in answers]
        except OSError as error:
            found = error
        except UnicodeError:
            found = OSError("not the name of a host")
        try:
            loop.call_soon_threadsafe(self._finish, host, found)
        except RuntimeError:
            pass  # the loop was closed while the C library waited; nobody is left to tell

    def _finish(self, host: str, found: list[str] | OSError) -> None:
        self._free.release()
        running = self._running.pop(host)
        if isinstance(found, list):
            running.set_result(found)
        else:
            running.set_exception(found)
            running.exception()  # whoever asked may have gone


class ResolvingLoop(uvloop.Loop):
    """A loop that connects to names by a resolver of its own: connections of pools, of Redis and of drivers alike."""

    def __init__(self, resolve: Resolver | None = None) -> None:
        super().__init__()
        self._resolve = resolve or ThreadedResolver()

    async def create_connection(
        self,
        protocol_factory: Callable[[], asyncio.BaseProtocol],
        host: Any = None,
        port: Any = None,
        *,
        ssl: Any = None,
        server_hostname: str | None = None,
        **options: Any,
    ) -> tuple[Any, Any]:
        """As uvloop's. A name's addresses are tried in their order; certificates are held against the name."""
        if not host or port is None or _is_address(host):
            return await super().create_connection(
                protocol_factory, host, port, ssl=ssl, server_hostname=server_hostname, **options
            )
        if ssl and server_hostname is None:
            server_hostname = host
        failed = OSError(f"{host} has no address")
        for address in await self._resolve(host, port):
            try:
                return await super().create_connection(
                    protocol_factory, address, port, ssl=ssl, server_hostname=server_hostname, **options
                )
            except OSError as error:
                failed = error
        raise failed


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
