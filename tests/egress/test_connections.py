"""Connections of the way out: used again, bounded, given back whatever happens, and whose they are over TLS."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest

from app.egress import EgressClient
from app.egress.network import EXPIRED_DROPPED_MAX
from tests.egress.asking import LOOPBACK, answering, egress, failure_of, get
from tests.origin import WAIT_S_MAX, Origin, Received, Reply, origin, response

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_connection_is_used_again() -> None:
    async with origin({"/": response(b"x")}) as server, egress() as client:
        for _ in range(5):
            await get(client, server.url())
        assert server.accepted == 1


FORGED = response(b"forged")
SURPLUS = {
    "GET /short": response(b"x") + FORGED,
    "GET /unmodified": b"HTTP/1.1 304 Not Modified\r\n\r\n" + FORGED,
    "HEAD /body": response(FORGED),
    "GET /chunks": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + FORGED,
    "GET /long": response(bytes(65_536 - len(response(bytes(65_536))) + 65_536)) + FORGED,
}
"""By what is asked. The last ends where a read of httpcore does."""


@pytest.mark.parametrize("asked", SURPLUS)
async def test_what_comes_after_a_response_is_no_answer_to_the_next_request(asked: str) -> None:
    method, path = asked.split()
    async with origin({path: SURPLUS[asked], "/": response(b"honest")}) as server, egress() as client:
        await client.request(method, server.url(path), timeout_s=WAIT_S_MAX)
        assert (await get(client, server.url())).body == b"honest"
        assert (client.pool.idle, server.accepted) == (1, 2)


async def test_what_a_tenant_left_on_a_connection_does_not_swallow_the_request_of_another() -> None:
    """The server reads no body after a GET, and so takes it for the begin of the next request."""
    tenant = ContextVar("tenant", default="one")
    received: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                received.append(await reader.readuntil(b"\r\n\r\n"))
                writer.write(response())
        writer.close()

    server = await asyncio.start_server(serve, LOOPBACK, 0)
    url = f"http://{LOOPBACK}:{server.sockets[0].getsockname()[1]}/"
    async with server, egress(whose=tenant.get) as client:
        await get(client, url, body=b"GET /planted HTTP/1.1\r\nHost: x\r\nX-Swallows: ")
        tenant.set("other")
        await get(client, f"{url}own", headers={"Authorization": "Bearer others"})
    assert received[-1].startswith(b"GET /own ")


async def test_connection_that_the_server_closed_is_not_used_again() -> None:
    async def once(request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(response(b"x"))
        await writer.drain()

    async with origin({"/": once}) as server, egress() as client:
        for count in range(1, 4):
            assert (await get(client, server.url())).body == b"x"
            await server.until(lambda: server.open == 0)
            assert server.accepted == count


async def _open_and_lose(client: EgressClient, server: Origin, count: int) -> None:
    """`count` connections in the pool that the server has closed."""
    everybody = asyncio.Barrier(count)

    async def once(request: Received, writer: asyncio.StreamWriter) -> None:
        await everybody.wait()
        writer.write(response(b"x"))
        writer.close()
        await writer.wait_closed()

    server.replies["/lost"] = once
    await asyncio.gather(*(get(client, server.url("/lost")) for _ in range(count)))
    await server.until(lambda: server.open == 0)
    assert client.pool.idle == count


async def test_connections_that_servers_closed_leave_the_pool_a_few_with_each_request() -> None:
    async with origin() as one, origin({"/": response()}) as two, egress(pool_size=16) as client:
        await _open_and_lose(client, one, 10)
        for left in (6, 2, 0, 0):
            await get(client, two.url())
            assert client.pool.idle == left + 1
        assert two.accepted == 1


async def test_request_passes_over_connections_that_its_server_closed() -> None:
    async with origin({"/": response(b"new")}) as server, egress(pool_size=16) as client:
        await _open_and_lose(client, server, 10)
        assert (await get(client, server.url())).body == b"new"
        assert client.pool.idle == 10 - 2 * EXPIRED_DROPPED_MAX + 1
        assert (await get(client, server.url())).body == b"new"
        assert (client.pool.idle, server.accepted) == (1, 11)


async def test_connection_used_last_is_used_again_first() -> None:
    async with origin({"/": response()}) as server, egress() as client:
        server.gate.clear()
        calls = [asyncio.create_task(get(client, server.url())) for _ in range(3)]
        await server.until(lambda: len(server.received) == 3)
        server.gate.set()
        await asyncio.gather(*calls)
        assert client.pool.idle == 3
        await get(client, server.url())
        assert (client.pool.idle, server.accepted) == (3, 3)


async def test_pool_holds_no_more_connections_than_its_size() -> None:
    async with origin({"/": response(b"x")}) as server, egress(pool_size=3) as client:
        server.gate.clear()
        calls = [asyncio.create_task(get(client, server.url())) for _ in range(12)]
        await server.until(lambda: len(server.received) == 3)
        server.gate.set()
        assert [answer.body for answer in await asyncio.gather(*calls)] == [b"x"] * 12
        assert server.accepted == 3


async def test_a_tenant_that_waits_for_many_connections_lets_another_have_its_turn() -> None:
    tenant: ContextVar[str] = ContextVar("tenant")

    async def ask(who: str, server: Origin) -> None:
        tenant.set(who)
        await get(client, server.url(f"/{who}"))

    replies: dict[str, Reply] = {"/flood": response(), "/other": response()}
    async with origin(replies) as server, egress(pool_size=1, whose=tenant.get) as client:
        server.gate.clear()
        calls = [asyncio.create_task(ask(who, server)) for who in (*["flood"] * 12, "other")]
        await server.until(lambda: len(server.received) == 1)
        server.gate.set()
        await asyncio.gather(*calls)
    assert [request.target for request in server.received].index("/other") <= 2


async def test_idle_connections_to_other_origins_make_room() -> None:
    async with origin({"/": response()}) as one, origin({"/": response()}) as two, egress(pool_size=1) as client:
        for server in (one, two, one, two):
            await get(client, server.url())
            assert client.pool.idle == 1
        await one.until(lambda: one.open == 0)
        assert (one.accepted, two.accepted) == (2, 2)


async def test_closing_the_client_closes_its_idle_connections() -> None:
    async with origin({"/": response()}) as server:
        async with egress() as client:
            await get(client, server.url())
            assert server.open == 1
        await server.until(lambda: server.open == 0)


async def _stalled_in_lookup(server: Origin) -> dict[str, Any]:
    async def resolve(host: str, port: int) -> Sequence[str]:
        server.replies["asked"] = b""
        async with server.changed:
            server.changed.notify_all()
        await asyncio.Event().wait()
        return []

    return {"options": {"resolver": resolve}, "url": "http://hung.test/", "stalled": lambda: "asked" in server.replies}


async def _stalled_in_handshake(server: Origin) -> dict[str, Any]:
    return {"url": server.url().replace("http:", "https:"), "stalled": lambda: server.accepted == 1}


async def _stalled_before_headers(server: Origin) -> dict[str, Any]:
    async def silent(request: Received, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    server.replies["/"] = silent
    return {"url": server.url(), "stalled": lambda: len(server.received) == 1}


async def _stalled_in_body(server: Origin) -> dict[str, Any]:
    async def half(request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf")
        await asyncio.Event().wait()

    server.replies["/"] = half
    return {"url": server.url(), "stalled": lambda: len(server.received) == 1}


@pytest.mark.parametrize(
    "stall", [_stalled_in_lookup, _stalled_in_handshake, _stalled_before_headers, _stalled_in_body]
)
@pytest.mark.parametrize("turns", [0, 1, 5, 50])
async def test_cancelled_call_leaves_no_connection_and_no_slot(
    stall: Callable[[Origin], Awaitable[dict[str, Any]]], turns: int
) -> None:
    async with origin() as server:
        plan = await stall(server)
        async with egress(pool_size=1, **plan.get("options", {})) as client:
            descriptors = _open_descriptors()
            call = asyncio.create_task(get(client, plan["url"]))
            await server.until(plan["stalled"])
            for _ in range(turns):
                await asyncio.sleep(0)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await server.until(lambda: server.open == 0)
            assert (client.pool.busy, client.pool.idle) == (0, 0)
            assert _open_descriptors() <= descriptors
            server.replies["/"] = response(b"free")
            assert (await get(client, server.url())).body == b"free"


def _open_descriptors() -> int:
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


@pytest.mark.parametrize("turns", range(0, 60, 3))
async def test_calls_cancelled_at_any_moment_never_use_up_the_pool(turns: int) -> None:
    async with origin({"/": response(b"x")}) as server, origin({"/": response(b"y")}) as other:
        async with egress(pool_size=2) as client:
            await get(client, other.url())
            calls = [asyncio.create_task(get(client, target.url())) for target in (server, other) * 5]
            for _ in range(turns):
                await asyncio.sleep(0)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            assert client.pool.busy == 0
            answers = await asyncio.gather(*(get(client, target.url()) for target in (server, other) * 5))
            assert {answer.body for answer in answers} == {b"x", b"y"}
            assert client.pool.idle <= 2
        await server.until(lambda: server.open == 0)
        await other.until(lambda: other.open == 0)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Certificate and key for the name pinned.test."""
    if shutil.which("openssl") is None:
        pytest.skip("certificates are made with the openssl command")
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=pinned.test"
    extensions = ["-addext", "subjectAltName=DNS:pinned.test", "-out", str(certificate), "-keyout", str(key)]
    subprocess.run([*command.split(), *extensions], check=True, capture_output=True, timeout=60)
    return certificate, key


@asynccontextmanager
async def tls(certificate: tuple[Path, Path], names: list[str | None]) -> AsyncIterator[tuple[Origin, EgressClient]]:
    """A server with this certificate, the names that clients asked for, and a client that trusts it."""

    def heard(connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        names.append(name)

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    context.sni_callback = heard
    trusting = ssl.create_default_context(cafile=certificate[0])
    async with (
        origin({"/": response(b"secure")}, tls=context) as server,
        egress(resolver=answering([LOOPBACK]), ssl_context=trusting) as client,
    ):
        yield server, client


async def test_name_is_kept_for_sni_certificate_and_host(certificate: tuple[Path, Path]) -> None:
    names: list[str | None] = []
    async with tls(certificate, names) as (server, client):
        assert (await get(client, server.url(host="pinned.test"))).body == b"secure"
    assert names == ["pinned.test"]
    assert server.received[0].headers["host"] == f"pinned.test:{server.port}"


@pytest.mark.parametrize("host", ["other.test", "127.0.0.1"])
async def test_certificate_for_another_name_is_not_accepted(certificate: tuple[Path, Path], host: str) -> None:
    async with tls(certificate, []) as (server, client):
        error = await failure_of(get(client, server.url(host=host)))
    assert (error.code, error.retryable) == ("EGRESS_FAILED", False)
    assert server.received == []


async def test_connection_made_for_one_name_is_not_used_for_another(certificate: tuple[Path, Path]) -> None:
    async with tls(certificate, []) as (server, client):
        await get(client, server.url(host="pinned.test"))
        assert client.pool.idle == 1
        assert (await failure_of(get(client, server.url(host="other.test")))).code == "EGRESS_FAILED"


async def test_what_comes_after_a_response_over_tls_is_no_answer_either(certificate: tuple[Path, Path]) -> None:
    async def two_records(request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(response())
        writer.write(FORGED)
        await asyncio.Event().wait()

    async with tls(certificate, []) as (server, client):
        server.replies["/two"] = two_records
        for _ in range(3):
            await client.request("HEAD", server.url("/two", "pinned.test"), timeout_s=WAIT_S_MAX)
            for _ in range(2):
                assert (await get(client, server.url(host="pinned.test"))).body == b"secure"
        assert (client.pool.idle, server.accepted) == (1, 4)


async def test_certificate_that_nobody_vouches_for_is_not_accepted(certificate: tuple[Path, Path]) -> None:
    async with tls(certificate, []) as (server, _), egress(resolver=answering([LOOPBACK])) as client:
        error = await failure_of(get(client, server.url(host="pinned.test")))
    assert (error.code, error.retryable) == ("EGRESS_FAILED", False)
