"""A name whose look-up hangs or fails, and connections by name as they are otherwise."""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from app.executor.containment import LastingLoop
from app.names import LOOKUPS_MAX, Resolver, ThreadedResolver
from tests.certificates import make_certificate
from tests.conftest import Serve
from tests.servers import RedisAt

WAIT_S_MAX = 30.0


def run(main: Coroutine[Any, Any, None], resolve: Resolver | None = None) -> None:
    """On the loop of the command line."""
    with asyncio.Runner(loop_factory=lambda: LastingLoop(resolve)) as runner:
        runner.run(main)


def answering(*addresses: str) -> Resolver:
    async def resolve(host: str, port: int) -> Sequence[str]:
        return addresses

    return resolve


@asynccontextmanager
async def listening(tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """The port of a server that sends `ok`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"ok")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls) as server:
        yield server.sockets[0].getsockname()[1]


async def asked(host: str, port: int, **options: Any) -> bytes:
    reader, writer = await asyncio.open_connection(host, port, **options)
    try:
        return await reader.read()
    finally:
        writer.close()


async def given_up(host: str) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await asked(host, 1)


Lookup = Callable[[str], list[str]]


@pytest.fixture
def look_up(monkeypatch: pytest.MonkeyPatch) -> Callable[[Lookup], None]:
    """Say what the C library says of names."""

    def use(lookup: Lookup) -> None:
        def getaddrinfo(host: str, *_: Any, **__: Any) -> list[Any]:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in lookup(host)]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    return use


def test_a_name_that_hangs_holds_up_no_other_and_has_one_thread(look_up: Callable[[Lookup], None]) -> None:
    released = threading.Event()
    looked_up: list[str] = []

    def lookup(host: str) -> list[str]:
        looked_up.append(host)
        if host == "hung.test":
            released.wait(WAIT_S_MAX)
        return ["127.0.0.1"]

    async def main() -> None:
        async with listening() as port:
            for _ in range(20):
                await given_up("hung.test")
            assert await asked("well.test", port) == b"ok"
        assert looked_up == ["hung.test", "well.test"]

    look_up(lookup)
    try:
        run(main())  # ends though the look-up does not
    finally:
        released.set()


def test_what_came_of_a_name_is_said_to_who_waits_and_to_nobody_else(look_up: Callable[[Lookup], None]) -> None:
    released = threading.Event()
    failed = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    def lookup(host: str) -> list[str]:
        if host == "hung.test":
            released.wait(WAIT_S_MAX)
        raise failed

    async def main() -> None:
        complaints: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        await given_up("hung.test")
        late = asyncio.create_task(asked("hung.test", 1))
        await asyncio.sleep(0)
        late.cancel()
        last = asyncio.create_task(asked("hung.test", 1))
        await asyncio.sleep(0)
        released.set()
        with pytest.raises(socket.gaierror):
            await last
        with pytest.raises(socket.gaierror):
            await asked("other.test", 1)
        await given_up_and_failed("third.test")
        del late, last
        gc.collect()
        assert complaints == []

    async def given_up_and_failed(host: str) -> None:
        """The look-up ends in the turn of the loop after whoever asked has gone."""
        task = asyncio.create_task(asked(host, 1))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for thread in threading.enumerate():
            if thread.name == "resolve":
                thread.join(WAIT_S_MAX)
        await asyncio.sleep(0)

    look_up(lookup)
    run(main())


def test_a_tenant_that_asks_for_many_names_lets_another_have_its_turn(look_up: Callable[[Lookup], None]) -> None:
    tenant: ContextVar[str] = ContextVar("tenant")
    answers, looked_up = threading.Semaphore(0), list[str]()

    def lookup(host: str) -> list[str]:
        looked_up.append(host)
        answers.acquire(timeout=WAIT_S_MAX)
        return ["127.0.0.1"]

    async def main() -> None:
        resolve = ThreadedResolver(tenant.get)

        async def ask(who: str, number: int) -> None:
            tenant.set(who)
            await resolve(f"{who}-{number}.test", 1)

        asking = [asyncio.create_task(ask("flood", number)) for number in range(LOOKUPS_MAX + 10)]
        await asyncio.sleep(0)
        asking.append(asyncio.create_task(ask("other", 1)))
        await asyncio.sleep(0)
        answers.release(2)
        async with asyncio.timeout(WAIT_S_MAX):
            while len(looked_up) < LOOKUPS_MAX + 2:
                await asyncio.sleep(0)
        assert "other-1.test" in looked_up
        answers.release(len(asking))
        await asyncio.gather(*asking)

    look_up(lookup)
    run(main())


def test_the_addresses_of_a_name_are_tried_in_their_order() -> None:
    async def main() -> None:
        async with listening() as port:
            assert await asked("two.test", port) == b"ok"
        with pytest.raises(ConnectionRefusedError):
            await asked("two.test", port)

    run(main(), answering("127.0.0.2", "127.0.0.1"))


def test_a_name_without_an_address_is_an_error_of_the_system() -> None:
    async def main() -> None:
        with pytest.raises(OSError, match=r"nowhere\.test has no address"):
            await asked("nowhere.test", 1)

    run(main(), answering())


def test_a_certificate_is_held_against_the_name(tmp_path: Path) -> None:
    certificate = make_certificate(tmp_path, "well.test")
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate)
    known = ssl.create_default_context(cafile=str(certificate))

    async def main() -> None:
        async with listening(tls) as port:
            assert await asked("well.test", port, ssl=known) == b"ok"
            assert await asked("other.test", port, ssl=known, server_hostname="well.test") == b"ok"
            with pytest.raises(ssl.SSLCertVerificationError):
                await asked("other.test", port, ssl=known)

    run(main(), answering("127.0.0.1"))


def test_the_service_reaches_its_redis_by_name(serve: Serve, redis: RedisAt) -> None:
    running = serve(REDIS_URL=urlsplit(redis.url)._replace(netloc=f"localhost:{redis.port}").geturl())
    assert "limits: up" in running.http.get("/readyz").text
