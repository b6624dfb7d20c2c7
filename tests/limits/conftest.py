"""What tests of limits share: a server of each kind at hand, and both stores under one clock."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests.limits.stores import Clock, Counters, counters_of
from tests.servers import RedisServer, redis_binaries

FLAVOURS = sorted(redis_binaries())


@pytest.fixture(scope="session")
def servers() -> Iterator[dict[str, RedisServer]]:
    """Redis and Valkey, as far as they are at hand, for tests that leave them as they were."""
    with contextlib.ExitStack() as stack:
        yield {flavour: stack.enter_context(RedisServer(flavour)) for flavour in FLAVOURS}


@pytest.fixture(params=FLAVOURS)
def each_redis(request: pytest.FixtureRequest, servers: dict[str, RedisServer]) -> RedisServer:
    """Each of them, empty."""
    server = servers[request.param]
    server.cli("FLUSHALL")
    server.cli("CONFIG", "RESETSTAT")
    return server


@pytest.fixture
def one_redis(servers: dict[str, RedisServer]) -> RedisServer:
    """The first of them, empty."""
    server = servers[FLAVOURS[0]]
    server.cli("FLUSHALL")
    server.cli("CONFIG", "RESETSTAT")
    return server


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["memory", *FLAVOURS])
async def counters(
    request: pytest.FixtureRequest, clock: Clock, servers: dict[str, RedisServer]
) -> AsyncIterator[Counters]:
    """Each store, empty, under a clock that only the test moves."""
    server = servers.get(request.param)
    if server is not None:
        server.cli("FLUSHALL")
    async with counters_of(None if server is None else server.url, clock) as opened:
        yield opened


@pytest.fixture
async def quiet(caplog: pytest.LogCaptureFixture) -> AsyncIterator[None]:
    """No exception that nobody handled, none of asyncio's complaints, and nothing of ours over a warning."""
    unhandled: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
    yield
    await asyncio.sleep(0)
    assert unhandled == []
    noisy = [one for one in caplog.records if one.name == "asyncio" or one.levelno >= logging.ERROR]
    assert [one.getMessage() for one in noisy] == []
