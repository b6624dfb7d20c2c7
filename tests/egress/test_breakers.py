"""Breakers on the way out: by tenant and origin, over real connections."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from app.breaker import OPEN_S_MIN, PROBES_TO_CLOSE, STREAK, BreakerTable
from app.egress import EgressClient, OriginBreakers
from app.egress.client import SLOW_S
from app.errors import ToolError, UpstreamFailed
from tests.egress.asking import answering, egress, failure_of, get
from tests.origin import Origin, Received, Reply, origin, redirect, response

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class World:
    """Breakers with a clock of the test, and who calls."""

    now: float = 1000.0
    tenant: str = "a"
    breakers: OriginBreakers = field(init=False)

    def __post_init__(self) -> None:
        self.breakers = BreakerTable(lambda: self.now, chance=lambda: 0.5)


@pytest.fixture
def world() -> World:
    return World()


def guarded(world: World, **options: object):  # type: ignore[no-untyped-def]
    return egress(breakers=world.breakers, whose=lambda: world.tenant, pool_size=32, **options)


@pytest.fixture
def dead_url() -> Iterator[str]:
    """Nobody listens there, and nobody else will while the test runs."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/"


async def is_refused(client: EgressClient, url: str) -> bool:
    """Whether a request is not even sent."""
    try:
        await get(client, url)
    except ToolError as error:
        return error.code == "EGRESS_UPSTREAM_FAILING"
    return False


async def fail_until_refused(client: EgressClient, url: str) -> int:
    """How many requests went out before."""
    sent = 0
    while not await is_refused(client, url):
        sent += 1
        assert sent <= 20
    return sent


async def test_dead_origin_is_not_asked_after_some_failures_and_the_others_are(world: World, dead_url: str) -> None:
    async with origin({"/": response(b"fine")}) as alive, guarded(world) as client:
        assert await fail_until_refused(client, dead_url) == STREAK
        error = await failure_of(get(client, dead_url))
        assert isinstance(error, UpstreamFailed) and not error.asked
        assert error.retryable and error.retry_after_ms and "upstream is failing" in str(error)
        for _ in range(3):
            assert (await get(client, alive.url())).body == b"fine"
        assert world.breakers.open_now == 1


async def test_origin_that_is_well_again_is_asked_again(world: World) -> None:
    async with origin({"/": response(status="503 Unavailable")}) as server, guarded(world) as client:
        for _ in range(STREAK):
            assert (await get(client, server.url())).status_code == 503
        assert await is_refused(client, server.url())
        assert len(server.received) == STREAK
        server.replies["/"] = response(b"well")
        world.now += 2 * OPEN_S_MIN
        for _ in range(PROBES_TO_CLOSE):
            assert (await get(client, server.url())).body == b"well"
        assert world.breakers.open_now == 0


async def test_one_tenant_does_not_close_an_origin_to_another(world: World) -> None:
    replies: dict[str, Reply] = {"/broken": response(status="500 Oops"), "/": response(b"fine")}
    async with origin(replies) as server, guarded(world) as client:
        world.tenant = "hostile"
        await fail_until_refused(client, server.url("/broken"))
        assert await is_refused(client, server.url("/"))
        world.tenant = "other"
        assert (await get(client, server.url("/"))).body == b"fine"


async def test_redirect_is_held_against_where_it_leads_and_not_against_who_sends_it(
    world: World, dead_url: str
) -> None:
    async with origin({"/": redirect(dead_url), "/fine": response(b"fine")}) as server, guarded(world) as client:
        for _ in range(STREAK):
            error = await failure_of(get(client, server.url()))
            assert isinstance(error, UpstreamFailed) and error.host == "127.0.0.1" and error.asked
        assert await is_refused(client, server.url()), "the way leads to what is not asked"
        assert await is_refused(client, dead_url)
        assert (await get(client, server.url("/fine"))).body == b"fine"


async def test_error_names_the_host_that_was_asked_for_and_not_the_one_behind_a_redirect(world: World) -> None:
    async with origin({"/": redirect("http://behind.test:1/")}) as server:
        resolver = answering(["127.0.0.1"])
        async with guarded(world, resolver=resolver) as client:
            error = await failure_of(get(client, server.url(host="first.test")))
    assert isinstance(error, UpstreamFailed) and error.host == "first.test"


@pytest.mark.parametrize("status", ["400 Bad Request", "404 Not Found", "429 Too Many", "501 Not Implemented"])
async def test_answer_that_is_about_the_request_says_nothing_against_the_origin(world: World, status: str) -> None:
    async with origin({"/": response(status=status)}) as server, guarded(world) as client:
        for _ in range(3 * STREAK):
            await get(client, server.url())
    assert world.breakers.open_now == 0


async def never(received: Received, writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def time_out(client: EgressClient, server: Origin, world: World, waited_s: float) -> None:
    """Requests that have waited so long, by the breakers' clock, when their time ends."""
    before = len(server.received)
    calls = [asyncio.create_task(failure_of(get(client, server.url(), timeout_s=2.0))) for _ in range(STREAK)]
    await server.until(lambda: len(server.received) == before + STREAK)
    world.now += waited_s
    assert {error.code for error in await asyncio.gather(*calls)} == {"EGRESS_TIMEOUT"}


async def test_origin_that_does_not_answer_is_not_asked_again_at_once(world: World) -> None:
    async with origin({"/": never}) as server, guarded(world) as client:
        await time_out(client, server, world, SLOW_S / 2)
        assert world.breakers.open_now == 0, "so little time is the caller's choice"
        await time_out(client, server, world, SLOW_S)
        assert world.breakers.open_now == 1


async def test_cancelled_requests_say_nothing(world: World) -> None:
    async with origin({"/": never}) as server, guarded(world) as client:
        calls = [asyncio.create_task(get(client, server.url())) for _ in range(2 * STREAK)]
        await server.until(lambda: len(server.received) == 2 * STREAK)
        world.now += 10 * SLOW_S
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
    assert len(world.breakers) == 0


async def test_what_is_refused_says_nothing(world: World) -> None:
    async with egress("", breakers=world.breakers) as client:
        for _ in range(2 * STREAK):
            assert (await failure_of(get(client, "http://127.0.0.1/"))).code == "EGRESS_REFUSED"
    assert len(world.breakers) == 0


async def test_without_breakers_everything_is_asked(dead_url: str) -> None:
    async with egress() as client:
        for _ in range(3 * STREAK):
            assert (await failure_of(get(client, dead_url))).code == "EGRESS_FAILED"
