"""The Lua script against the store in process, step by step, and a rate against its definition in fractions."""

from __future__ import annotations

import asyncio
from fractions import Fraction

import pytest
import redis
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from app.clients import redis_locator
from app.limits.limit import DAILY, KEY_PREFIX, MONTHLY, RATE, Kind, Limit, counter_key
from app.limits.memory_store import MemoryStore, month_of
from app.limits.redis_store import RedisStore
from app.limits.store import PASSES, REFUSES, Ask, Verdict
from tests.limits.stores import DAY_US, HOUR_US, MINUTE_US, PATIENT_S, SECOND_US, Clock, running, unix_us
from tests.servers import HOST, RedisServer

COUNTERS = 5

KEPT = "for _, key in ipairs(redis.call('KEYS', '*')) do redis.call('PERSIST', key) end"
"""Keys expire by the server's clock and not by the test's: a machine that is slow for a second would lose some."""

amounts = st.one_of(st.integers(1, 12), st.sampled_from([7, 60, 997, 999_999_937, 10**9]))
periods = st.sampled_from([SECOND_US, MINUTE_US, HOUR_US, DAY_US])
costs = st.one_of(st.integers(0, 4), st.integers(0, 15), st.sampled_from([10**6, 10**20]))
steps_us = st.one_of(
    st.just(0),
    st.integers(1, 3),
    st.integers(-SECOND_US, 2 * SECOND_US),
    st.integers(-2 * HOUR_US, 2 * HOUR_US),
    st.integers(-3 * DAY_US, 3 * DAY_US),
    st.integers(-100 * DAY_US, 100 * DAY_US),
)


@st.composite
def limits(draw: st.DrawFn, number: int) -> Limit:
    """What the counter of that number is held to; its kind is always the same, as in a key."""
    kind: Kind = (RATE, RATE, RATE, DAILY, MONTHLY)[number]
    shadow = draw(st.sampled_from([False, False, True]))
    key = counter_key("model", str(number))
    if kind != RATE:
        return Limit(key, str(number), kind, draw(st.integers(1, 20)), shadow=shadow)
    amount = draw(amounts)
    burst = draw(st.one_of(st.integers(1, 12), st.just(min(amount, 300))))
    return Limit(key, str(number), RATE, amount, period_us=draw(periods), burst=burst, shadow=shadow)


class BothStores(RuleBasedStateMachine):
    """Asks, gifts back, clocks that jump and policies that change, in one schedule for both."""

    server: RedisServer

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock(unix_us("2028-02-28T22:00"))
        self.admin = redis.Redis(host=HOST, port=self.server.port)
        self.admin.flushall()
        self.runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self.runner.run(self.open())
        self.memory = MemoryStore(self.clock, self.clock)
        self.limits: list[Limit] = []
        self.spent: list[Ask] = []

    async def open(self) -> None:
        locate = redis_locator(self.server.url, KEY_PREFIX, PATIENT_S)
        self.redis = RedisStore(locate, PATIENT_S, self.clock)
        self.task = asyncio.create_task(self.redis.run())
        await self.redis.settled()
        assert self.redis.up, self.redis.reason

    def teardown(self) -> None:
        async def close() -> None:
            self.task.cancel()
            await asyncio.wait([self.task])
            await self.redis.close()

        self.runner.run(close())
        self.runner.close()
        self.admin.close()

    @initialize(data=st.data())
    def choose_limits(self, data: st.DataObject) -> None:
        self.limits = [data.draw(limits(number)) for number in range(COUNTERS)]

    def answers(self, asks: list[Ask]) -> list[Verdict | None]:
        """Of Redis, to asks that were made in one turn of the loop; None for what was given back."""

        async def ask_all() -> list[Verdict | None]:
            futures = []
            for ask in asks:
                if ask.spent is None:
                    futures.append(self.redis.ask(ask))
                else:
                    self.redis.give_back(ask)
                    futures.append(None)
            answers = [future and await future for future in futures]
            await self.redis.ask(Ask(tuple(self.limits), 0))  # after it, all before is done
            return answers

        answers = self.runner.run(ask_all())
        self.admin.eval(KEPT, 0)
        return answers

    def compare(self, asks: list[Ask]) -> None:
        for ask, answer in zip(asks, self.answers(asks), strict=True):
            if ask.spent is not None:
                self.memory.give_back(ask)
                continue
            assert answer is not None
            expected = self.memory.ask(ask)
            assert (answer.now_us, list(answer.states)) == (expected.now_us, list(expected.states))
            if ask.cost and answer.passes:
                self.spent.append(ask.back(answer))

    @rule(data=st.data(), count=st.integers(1, 6))
    def ask(self, data: st.DataObject, count: int) -> None:
        asks = []
        for _ in range(count):
            if self.spent and data.draw(st.sampled_from([False, False, True])):
                asks.append(self.spent.pop(data.draw(st.integers(0, len(self.spent) - 1))))
            else:
                some = data.draw(st.lists(st.sampled_from(self.limits), unique=True, min_size=1))
                asks += [Ask(tuple(some), data.draw(costs))] * data.draw(st.integers(1, 3))  # as one caller's calls do
        self.compare(asks)

    @rule(which=st.integers(0, 2), cost=st.integers(1, 3))
    def ask_until_it_refuses_and_at_the_moment_it_passes(self, which: int, cost: int) -> None:
        limit = self.limits[which]
        terms = limit.terms
        if terms.shadow or cost > terms.burst:
            return
        for _ in range(30):
            verdict = self.memory.ask(Ask((limit,), 0))
            _, us, parts = verdict.states[0]
            whole, part = terms.span(cost)
            due = (us + whole - terms.window[0]) * terms.amount + parts + part - terms.window[1]
            if due > verdict.now_us * terms.amount:
                self.clock.us = -(-due // terms.amount) - 1
                self.compare([Ask((limit,), cost)])
                self.clock.us += 1
                self.compare([Ask((limit,), cost)])
                return
            self.compare([Ask((limit,), cost)])

    @rule(us=steps_us)
    def time_passes(self, us: int) -> None:
        self.clock.us += us

    @rule(last=st.sampled_from([-1, 0]))
    def a_day_ends(self, last: int) -> None:
        self.clock.us = (self.clock.us // DAY_US + 1) * DAY_US + last

    @rule(last=st.sampled_from([-1, 0]))
    def a_month_ends(self, last: int) -> None:
        day = self.clock.us // DAY_US
        month = month_of(day)
        while month_of(day) == month:
            day += 1
        self.clock.us = day * DAY_US + last

    @rule(data=st.data(), number=st.integers(0, COUNTERS - 1))
    def a_policy_changes(self, data: st.DataObject, number: int) -> None:
        """Whoever had spent at the one before has restarted with it: a process has one limit for a counter."""
        before = self.limits[number]
        self.limits[number] = data.draw(limits(number))
        self.spent = [ask for ask in self.spent if before not in ask.limits]

    @precondition(lambda self: self.limits)
    @invariant()
    def every_counter_is_the_same(self) -> None:
        self.compare([Ask(tuple(self.limits), 0)])


def test_both_stores_agree_step_by_step(each_redis: RedisServer) -> None:
    machine = type("BothStoresOn", (BothStores,), {"server": each_redis})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )


schedules = st.lists(
    st.tuples(
        st.one_of(st.just(0), st.integers(0, 3), st.integers(0, 2 * SECOND_US), st.integers(0, HOUR_US)),
        st.integers(1, 8),
    ),
    min_size=5,
    max_size=60,
)


@given(amount=amounts, period_us=periods, burst=st.integers(1, 10), schedule=schedules)
@settings(deadline=None)
def test_a_rate_is_what_its_definition_says(
    amount: int, period_us: int, burst: int, schedule: list[tuple[int, int]]
) -> None:
    """ITU-T I.371 in fractions: a call conforms when it comes no earlier than its arrival time less the tolerance."""
    clock = Clock()
    store = MemoryStore(clock, clock)
    limit = Limit(counter_key("one"), "one", RATE, amount, period_us=period_us, burst=burst)
    interval = Fraction(period_us, amount)
    arrival = Fraction(clock.us)
    admitted: list[tuple[int, int]] = []
    for step, cost in schedule:
        clock.us += step
        arrival = max(arrival, Fraction(clock.us))
        conforms = arrival + cost * interval - burst * interval <= clock.us
        verdict = store.ask(Ask((limit,), cost))
        if conforms:
            arrival += cost * interval
            admitted.append((clock.us, cost))
        status, us, parts = verdict.states[0]
        assert status == (PASSES if conforms else REFUSES)
        assert Fraction(us) + Fraction(parts, amount) == arrival
    for first, (began, _) in enumerate(admitted):
        for last in range(first, len(admitted)):
            used = sum(cost for _, cost in admitted[first : last + 1])
            assert used <= burst + (admitted[last][0] - began) / interval


@pytest.mark.parametrize("year", [1970, 1999, 2000, 2027, 2028, 2100, 2254])
def test_the_script_counts_months_as_the_calendar_does(one_redis: RedisServer, year: int) -> None:
    """On every first and last day of a month. Microseconds stay under 2**53 until 2255."""
    clock = Clock()
    store = MemoryStore(clock, clock)
    limit = Limit(counter_key("months", str(year)), "months", MONTHLY, 10)

    async def compare() -> None:
        async with running(one_redis.url, clock_us=clock) as redis_store:
            for month in range(1, 13):
                first = unix_us(f"{year}-{month:02}-01")
                for clock.us in (max(0, first - 1), first):
                    expected = [(PASSES, month_of(clock.us // DAY_US), 0)]
                    assert (await redis_store.ask(Ask((limit,), 0))).states == expected
                    assert list(store.ask(Ask((limit,), 0)).states) == expected

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(compare())
