"""Who begins many calls at once waits while many asks are on their way, and never for anything else."""

from __future__ import annotations

import asyncio

import pytest

from app.limits.memory_store import MemoryStore
from app.limits.redis_store import RedisStore
from app.limits.room import ASKS_AT_ONCE, Room
from app.limits.store import Ask, StoreAway
from tests.limits.stores import daily, running
from tests.proxy import FaultProxy
from tests.servers import HOST, RedisServer
from tests.waiting import until

pytestmark = pytest.mark.anyio

CALLS = 20


class Asks:
    """How many are on their way, as the test says."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.room = Room(lambda: self.count)
        self.entered: list[str] = []

    def come(self, tenant: str, calls: int = CALLS) -> asyncio.Task[None]:
        async def entering() -> None:
            await self.room.enter(calls, tenant)
            self.entered.append(tenant)

        return asyncio.create_task(entering())

    async def decided(self, left: int) -> list[str]:
        """Who is let in by it."""
        before, self.count = len(self.entered), left
        self.room.decided()
        await turns()
        return self.entered[before:]


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_while_few_ask_everyone_begins_at_once() -> None:
    asks = Asks(ASKS_AT_ONCE - 1)
    for number in range(100):
        asks.come(str(number))
    await turns()
    assert len(asks.entered) == 100


async def test_while_many_ask_who_comes_waits_and_as_many_are_let_in_as_there_is_room_for() -> None:
    asks = Asks(ASKS_AT_ONCE)
    for number in range(2 * ASKS_AT_ONCE // CALLS):
        asks.come(str(number))
    await turns()
    assert asks.entered == []
    assert await asks.decided(left=ASKS_AT_ONCE) == []
    assert await asks.decided(left=ASKS_AT_ONCE - 2 * CALLS) == ["0", "1"]
    assert len(await asks.decided(left=1)) == ASKS_AT_ONCE // CALLS


async def test_who_comes_later_waits_behind_those_who_wait() -> None:
    asks = Asks(ASKS_AT_ONCE)
    asks.come("first", calls=ASKS_AT_ONCE)
    await turns()
    asks.count = 1
    asks.come("second")
    await turns()
    assert await asks.decided(left=1) == ["first"]
    assert await asks.decided(left=1) == ["second"]


async def test_tenants_are_let_in_by_turns() -> None:
    asks = Asks(ASKS_AT_ONCE)
    for tenant in ["many"] * 5 + ["one"]:
        asks.come(tenant)
    await turns()
    assert await asks.decided(left=ASKS_AT_ONCE - 2 * CALLS) == ["many", "one"]


async def test_those_let_in_who_ask_for_nothing_let_the_next_ones_in() -> None:
    asks = Asks(ASKS_AT_ONCE)
    for number in range(20):
        asks.come(str(number), calls=ASKS_AT_ONCE)
    await turns()
    asks.count = 0
    asks.room.decided()
    await until(lambda: len(asks.entered) == 20)


async def test_who_leaves_takes_no_room() -> None:
    asks = Asks(ASKS_AT_ONCE)
    leaving, staying = asks.come("leaving", ASKS_AT_ONCE), asks.come("staying")
    await turns()
    leaving.cancel()
    await asyncio.wait([leaving])
    assert await asks.decided(left=ASKS_AT_ONCE - 1) == ["staying"]
    assert staying.done()


async def asked(store: RedisStore) -> list[asyncio.Future[object]]:
    limit = daily(10**6)
    return [store.ask(Ask((limit,), 1)) for _ in range(ASKS_AT_ONCE)]  # type: ignore[misc]


async def test_asks_that_redis_decides_make_room(one_redis: RedisServer) -> None:
    async with running(one_redis.url) as store:
        asks = await asked(store)
        entering = asyncio.create_task(store.room.enter(CALLS, "acme"))
        await asyncio.sleep(0)
        assert not entering.done()
        await asyncio.gather(*asks)
        await until(entering.done)


async def test_asks_that_are_withdrawn_before_they_are_sent_make_room(one_redis: RedisServer) -> None:
    with FaultProxy(one_redis.port) as proxy:
        async with running(f"redis://{HOST}:{proxy.port}") as store:
            proxy.stall()
            sent = store.ask(Ask((daily(10**6),), 1))
            await asyncio.sleep(0)
            asks = await asked(store)
            entering = asyncio.create_task(store.room.enter(CALLS, "acme"))
            await asyncio.sleep(0)
            assert not entering.done()
            for ask in asks:
                ask.cancel()
            proxy.heal()
            await sent
            await until(entering.done)


async def test_a_redis_that_does_not_answer_holds_nobody_past_the_budget(one_redis: RedisServer) -> None:
    with FaultProxy(one_redis.port) as proxy:
        async with running(f"redis://{HOST}:{proxy.port}", timeout_s=0.05) as store:
            proxy.stall()
            asks = await asked(store)
            entering = [asyncio.create_task(store.room.enter(CALLS, "acme")) for _ in range(100)]
            outcomes = await asyncio.gather(*asks, return_exceptions=True)
            assert all(isinstance(outcome, StoreAway) for outcome in outcomes)
            await until(lambda: all(one.done() for one in entering))
            await store.room.enter(CALLS, "acme")


async def test_in_process_nobody_waits() -> None:
    assert MemoryStore().room is None
