"""Stores for the tests of limits, limits to ask them with, and a clock that only the test moves."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from app.clients import redis_locator
from app.limits.limit import DAILY, KEY_PREFIX, MONTHLY, RATE, Limit, counter_key
from app.limits.memory_store import MemoryStore
from app.limits.redis_store import RedisStore
from app.limits.store import Ask, LimitStore, StoreAway, Verdict
from tests.servers import RedisAt
from tests.waiting import SOON_S

SECOND_US = 1_000_000
MINUTE_US = 60 * SECOND_US
HOUR_US = 60 * MINUTE_US
DAY_US = 24 * HOUR_US

PATIENT_S = 10.0
"""A budget for tests that are not about it."""

PASSED, REFUSED, WOULD_BE_REFUSED = 0, 1, 2


def unix_us(text: str) -> int:
    """Of an ISO date or time in UTC."""
    moment = datetime.fromisoformat(text).replace(tzinfo=UTC)
    return round((moment - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds()) * SECOND_US


class Clock:
    """Unix microseconds."""

    def __init__(self, us: int = unix_us("2027-03-10T12:00")) -> None:
        self.us = us

    def __call__(self) -> int:
        return self.us


_names = itertools.count()


def rate(amount: int, period_us: int = MINUTE_US, burst: int | None = None, **options: Any) -> Limit:
    name = options.pop("name", f"rate {next(_names)}")
    return Limit(counter_key(name), name, RATE, amount, period_us=period_us, burst=burst or amount, **options)


def daily(amount: int, **options: Any) -> Limit:
    name = options.pop("name", f"daily {next(_names)}")
    return Limit(counter_key(name), name, DAILY, amount, **options)


def monthly(amount: int, **options: Any) -> Limit:
    name = options.pop("name", f"monthly {next(_names)}")
    return Limit(counter_key(name), name, MONTHLY, amount, **options)


class Counters:
    """A store under test, asked and awaited."""

    def __init__(self, store: LimitStore, clock: Clock) -> None:
        self.store = store
        self.clock = clock

    async def ask(self, *limits: Limit, cost: int = 1) -> Verdict:
        return await answer(self.store, Ask(limits, cost))

    async def passes(self, *limits: Limit, cost: int = 1) -> bool:
        return (await self.ask(*limits, cost=cost)).passes

    async def admitted(self, *limits: Limit, tries: int, cost: int = 1) -> int:
        """How many of so many asks pass, one after another."""
        return sum([await self.passes(*limits, cost=cost) for _ in range(tries)])

    async def look(self, *limits: Limit) -> list[tuple[int, int]]:
        """The states, without spending."""
        return [(a, b) for _, a, b in (await self.ask(*limits, cost=0)).states]

    async def give_back(self, verdict: Verdict, *limits: Limit, cost: int = 1) -> None:
        self.store.give_back(Ask(limits, cost, verdict))
        await self.look(*limits)


async def answer(store: LimitStore, ask: Ask) -> Verdict:
    """Raises StoreAway."""
    verdict = store.ask(ask)
    return verdict if isinstance(verdict, Verdict) else await asyncio.wait_for(verdict, SOON_S)


def statuses(verdict: Verdict) -> list[int]:
    return [status for status, _, _ in verdict.states]


def wait_us(limit: Limit, verdict: Verdict, cost: int = 1) -> int:
    """How long after the verdict a call of this cost passes at a rate: exact, in whole microseconds, rounded up."""
    _, us, parts = verdict.states[0]
    terms = limit.terms
    whole, part = terms.span(cost)
    window, window_part = terms.window
    due = (us + whole - window) * terms.amount + parts + part - window_part
    return -(-due // terms.amount) - verdict.now_us


@contextlib.asynccontextmanager
async def running(
    url: str,
    timeout_s: float = PATIENT_S,
    clock_us: Callable[[], int] | None = None,
    retry_s_max: float = 0.1,
    heartbeat_s: float = 3_600.0,
) -> AsyncIterator[RedisStore]:
    """A store whose background task runs, as the service has it, but for the heartbeat: commands are counted."""
    store = RedisStore(redis_locator(url, KEY_PREFIX, timeout_s), timeout_s, clock_us, retry_s_max, heartbeat_s)
    task = asyncio.create_task(store.run(), name="limit-store")
    try:
        await store.settled()
        yield store
    finally:
        task.cancel()
        await asyncio.wait([task])
        await store.close()


@contextlib.asynccontextmanager
async def counters_of(url: str | None, clock: Clock) -> AsyncIterator[Counters]:
    """Either store under the same clock."""
    if url is None:
        yield Counters(MemoryStore(clock, clock), clock)
        return
    async with running(url, clock_us=clock) as store:
        assert store.up, store.reason
        yield Counters(store, clock)


async def until_up(store: RedisStore) -> None:
    async with asyncio.timeout(SOON_S):
        while not store.up:
            await asyncio.sleep(0.002)


async def until_away(store: RedisStore) -> None:
    async with asyncio.timeout(SOON_S):
        while store.up:
            await asyncio.sleep(0.002)


async def until_answered(store: RedisStore, *limits: Limit) -> None:
    """Ask, spending nothing, until there is an answer again."""
    async with asyncio.timeout(SOON_S):
        while True:
            try:
                await answer(store, Ask(limits, 0))
            except StoreAway:
                await asyncio.sleep(0.002)
            else:
                return


def script_calls(server: RedisAt) -> dict[str, int]:
    """How often the script was called since CONFIG RESETSTAT, by command."""
    calls = {name: int(line.split(",")[0]) for name, line in _command_statistics(server)}
    return {name: calls.get(name, 0) for name in ("evalsha", "eval")}


def commands_used(server: RedisAt) -> set[str]:
    return {name for name, _ in _command_statistics(server)}


def _command_statistics(server: RedisAt) -> Iterator[tuple[str, str]]:
    for line in server.cli("INFO", "commandstats").splitlines():
        if line.startswith("cmdstat_"):
            name, _, rest = line.removeprefix("cmdstat_").partition(":calls=")
            yield name, rest


def keys(server: RedisAt) -> Sequence[str]:
    return server.cli("KEYS", "*").split()
