"""Admission: a grant or a refusal that says why and until when, what holds without the store, what is counted."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable

import pytest

from app.calls import rfc3339
from app.errors import DependencyUnavailable, QuotaExceeded, RateLimited
from app.limits.admission import Admission, Asked, Grant, status
from app.limits.limit import Limit
from app.limits.memory_store import MemoryStore
from app.limits.policy import Bound, Policies
from app.limits.redis_store import RedisStore
from tests.limits.stores import (
    DAY_US,
    HOUR_US,
    SECOND_US,
    Clock,
    Counters,
    daily,
    monthly,
    rate,
    running,
    script_calls,
    unix_us,
    until_away,
    until_up,
)
from tests.proxy import FaultProxy
from tests.servers import HOST, RedisServer

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("quiet")]


async def admit(admission: Admission, *limits: Limit, cost: int = 1) -> Grant:
    """As the executor does. Raises the refusal."""
    outcome = admission.admit(Bound(limits, ()), cost)
    return await outcome.settled() if isinstance(outcome, Asked) else outcome


async def admitted(admission: Admission, *limits: Limit, tries: int) -> int:
    count = 0
    for _ in range(tries):
        try:
            await admit(admission, *limits)
        except (RateLimited, QuotaExceeded):
            continue
        count += 1
    return count


def decisions(admission: Admission) -> dict[str, dict[str, int]]:
    """By kind and outcome, without those that never were."""
    counted = {
        kind: {outcome: count for outcome, count in outcomes.items() if count}
        for kind, outcomes in admission.decisions.items()
    }
    return {kind: outcomes for kind, outcomes in counted.items() if outcomes}


@pytest.fixture
def admission(counters: Counters) -> Admission:
    """Over each store."""
    return Admission(Policies(()), counters.store)


@pytest.fixture
async def shared(one_redis: RedisServer) -> AsyncIterator[tuple[Admission, RedisStore]]:
    """Over Redis by its own clock."""
    async with running(one_redis.url) as store:
        yield Admission(Policies(()), store), store


# Refusals


async def test_a_rate_refuses_with_its_rule_its_limit_and_the_exact_wait(admission: Admission, clock: Clock) -> None:
    limit = rate(8, SECOND_US, burst=2, name="eight")
    assert await admitted(admission, limit, tries=2) == 2
    with pytest.raises(RateLimited) as refused:
        await admit(admission, limit)
    assert refused.value.as_data() == {
        "error_type": "rate_limit",
        "retryable": True,
        "retry_after_ms": 125,
        "limit": 8,
        "rule": "eight",
    }
    assert (refused.value.allowance.remaining, refused.value.allowance.reset_s) == (0, 0.25)


async def test_a_quota_refuses_until_its_day_or_month_ends(admission: Admission, clock: Clock) -> None:
    clock.us = unix_us("2028-02-28T23:00")
    for limit, reset_at, wait_ms in (
        (daily(1, name="day"), "2028-02-29T00:00:00.000Z", 3_600_000),
        (monthly(1, name="month"), "2028-03-01T00:00:00.000Z", 25 * 3_600_000),
    ):
        await admit(admission, limit)
        with pytest.raises(QuotaExceeded) as refused:
            await admit(admission, limit)
        data = refused.value.as_data()
        assert (data["reset_at"], data["retry_after_ms"], data["limit"]) == (reset_at, wait_ms, 1)


async def test_of_several_that_refuse_the_one_that_takes_longest_is_told(admission: Admission) -> None:
    limits = rate(1, name="a"), daily(1, name="b"), monthly(1, name="c"), rate(1, HOUR_US, name="d")
    await admit(admission, *limits)
    with pytest.raises(QuotaExceeded) as refused:
        await admit(admission, *limits)
    assert refused.value.data["rule"] == "c"
    for order in (1, -1):  # once remembered too, in any order
        with pytest.raises(RateLimited) as other:
            await admit(admission, *(limits[0], limits[3])[::order])
        assert other.value.data["rule"] == "d"


async def test_a_cost_that_no_wait_makes_pass_is_told_no_wait(admission: Admission) -> None:
    for limit in (rate(5), daily(5)):
        with pytest.raises((RateLimited, QuotaExceeded)) as refused:
            await admit(admission, limit, cost=6)
        assert refused.value.retry_after_ms is None
        await admit(admission, limit, cost=5)


async def test_a_call_that_waits_what_it_is_told_passes(one_redis: RedisServer) -> None:
    """By Redis's clock and by ours, with what is remembered in between."""
    async with running(one_redis.url) as store:
        admission = Admission(Policies(()), store)
        limit = rate(1, 3 * SECOND_US)
        for _ in range(2):
            await admit(admission, limit)
            with pytest.raises(RateLimited) as refused:
                await admit(admission, limit)
            assert refused.value.retry_after_ms is not None
            assert 0 < refused.value.retry_after_ms <= 3_000
            # One more than told: timers of uvloop may be half a millisecond early.
            await asyncio.sleep((refused.value.retry_after_ms + 1) / 1e3)


async def test_decisions_are_counted_by_kind_and_outcome(admission: Admission) -> None:
    limits = rate(3), daily(2), monthly(1, shadow=True)
    assert await admitted(admission, *limits, tries=2) == 2
    assert decisions(admission) == {
        "rate": {"allowed": 2},
        "daily": {"allowed": 2},
        "monthly": {"allowed": 1, "would_refuse": 1},
    }
    assert await admitted(admission, *limits, tries=1) == 0
    assert decisions(admission)["daily"] == {"allowed": 2, "refused": 1}
    assert decisions(admission)["rate"] == {"allowed": 2}


async def test_a_call_that_cost_nothing_is_let_through_a_full_limit(admission: Admission) -> None:
    limit = daily(1)
    await admit(admission, limit)
    await admit(admission, limit, cost=0)


async def test_a_grant_gives_back_what_it_spent(admission: Admission) -> None:
    limits = rate(5), daily(5), monthly(1, shadow=True)
    await admit(admission, *limits)
    before = (await admission.look(limits)).verdict.states
    grant = await admit(admission, *limits, cost=3)
    grant.give_back()
    assert list((await admission.look(limits)).verdict.states) == list(before)


# What was over a moment ago


async def test_what_is_over_is_refused_without_asking_redis(
    one_redis: RedisServer, shared: tuple[Admission, RedisStore]
) -> None:
    admission, _ = shared
    limit, other = rate(1), daily(10)
    await admit(admission, limit, other)
    with pytest.raises(RateLimited):
        await admit(admission, limit, other)
    one_redis.cli("CONFIG", "RESETSTAT")
    waits = []
    for _ in range(200):
        with pytest.raises(RateLimited) as refused:
            await admit(admission, limit, other)
        waits.append(refused.value.retry_after_ms)
    assert script_calls(one_redis) == {"evalsha": 0, "eval": 0}
    assert waits == sorted(waits, reverse=True) and 0 < waits[-1] <= waits[0] <= 60_000
    assert decisions(admission)["rate"]["refused"] == 201


async def test_what_is_over_for_a_cost_is_asked_again_for_less_and_told_exactly_for_more(
    shared: tuple[Admission, RedisStore],
) -> None:
    admission, _ = shared
    limit = rate(60, HOUR_US)
    await admit(admission, limit, cost=57)
    with pytest.raises(RateLimited) as for_five:
        await admit(admission, limit, cost=5)
    with pytest.raises(RateLimited) as for_ten:
        await admit(admission, limit, cost=10)
    assert for_five.value.retry_after_ms is not None and for_ten.value.retry_after_ms is not None
    more_ms = for_ten.value.retry_after_ms - for_five.value.retry_after_ms
    assert 240_000 < more_ms <= 300_001, "five minutes, less what has passed between the two"
    with pytest.raises(RateLimited) as for_too_much:
        await admit(admission, limit, cost=61)
    assert for_too_much.value.retry_after_ms is None
    await admit(admission, limit, cost=3)


async def test_what_is_over_is_forgotten_when_the_next_call_passes(shared: tuple[Admission, RedisStore]) -> None:
    admission, _ = shared
    limit = rate(1_000, SECOND_US, burst=1)
    count = 0
    began = time.perf_counter()
    while count < 20:
        count += await admitted(admission, limit, tries=1)
        await asyncio.sleep(0)
    assert time.perf_counter() - began < 19, "a second for each but the first, were it remembered for that long"


async def test_a_shadow_that_is_over_is_asked_each_time(shared: tuple[Admission, RedisStore]) -> None:
    admission, _ = shared
    limit = daily(1, shadow=True)
    assert await admitted(admission, limit, tries=10) == 10
    assert decisions(admission)["daily"] == {"allowed": 1, "would_refuse": 9}


# Cancelled


async def test_a_call_that_is_cancelled_at_any_moment_leaves_nothing_spent(one_redis: RedisServer) -> None:
    """Before the command, in its middle, and in the turn in which the answer is there."""
    with FaultProxy(one_redis.port) as proxy:
        async with running(f"redis://{HOST}:{proxy.port}") as store:
            admission = Admission(Policies(()), store)
            limits = daily(1_000), rate(1_000)
            proxy.latency_s = 0.005
            for turns in range(12):
                call = asyncio.create_task(admit(admission, *limits, cost=7))
                for _ in range(turns):
                    await asyncio.sleep(0.001)
                if call.done():
                    call.result().give_back()
                else:
                    call.cancel()
                await asyncio.wait([call])
            asked = admission.admit(Bound(limits, ()), 7)
            assert isinstance(asked, Asked)
            asked.future.add_done_callback(lambda _: settling.cancel())
            settling = asyncio.create_task(asked.settled())
            await asyncio.wait([settling])
            assert settling.cancelled(), "in the very turn of the answer"
            for _ in range(2):
                left = await admission.look(limits)
            assert [state[2] for state in left.verdict.states] == [0, 0]
            assert left.allowances()[1].remaining == 1_000


# Without the store


async def test_each_limit_answers_for_itself_while_redis_is_away_and_again_when_it_is_back(
    own_redis: RedisServer,
) -> None:
    local = rate(20, on_failure="local", replicas=4, name="local")
    local_day = daily(20, on_failure="local", replicas=4, name="local day")
    opened = daily(1, on_failure="open", name="open")
    closed = daily(100, on_failure="closed", name="closed")
    shadow = daily(100, on_failure="closed", shadow=True, name="shadow")
    async with running(own_redis.url) as store:
        admission = Admission(Policies(()), store)
        assert await admitted(admission, local, closed, tries=5) == 5
        own_redis.kill()
        await until_away(store)

        assert await admitted(admission, local, tries=30) == 5, "a quarter of it for each of four replicas"
        assert await admitted(admission, local_day, tries=30) == 5
        assert await admitted(admission, opened, tries=30) == 30
        assert await admitted(admission, shadow, tries=30) == 30
        other = rate(8, on_failure="local", replicas=4)
        with pytest.raises(DependencyUnavailable) as refused:
            await admit(admission, other, opened, closed)
        assert refused.value.data["rule"] == "closed" and refused.value.retry_after_ms == 1000
        assert await admitted(admission, other, tries=5) == 2, "what `closed` refused has spent nothing"
        assert decisions(admission)["daily"] == {
            "allowed": 5 + 5,
            "refused": 25,
            "unchecked": 30 + 30 + 1,
            "unavailable": 1,
        }

        own_redis.start()
        await until_up(store)
        assert await admitted(admission, local, closed, tries=30) == 20, "Redis has forgotten what it had not saved"


@pytest.mark.parametrize("make", [rate, daily])
async def test_a_call_that_costs_more_than_the_part_of_a_replica_passes_while_nothing_of_it_is_used(
    own_redis: RedisServer, make: Callable[..., Limit]
) -> None:
    limit, other = (make(10, on_failure="local", replicas=4) for _ in range(2))
    async with running(own_redis.url) as store:
        admission = Admission(Policies(()), store)
        own_redis.kill()
        await until_away(store)
        looked = await admission.look((limit,), cost=7)
        assert status("dear", 7, looked)["policies"][0]["remaining"] == 7, "the call passes"
        await admit(admission, limit, cost=7)
        with pytest.raises((RateLimited, QuotaExceeded)) as refused:
            await admit(admission, limit, cost=7)
        assert refused.value.retry_after_ms is not None
        assert await admitted(admission, limit, tries=3) == 0, "it has spent more than the part"
        assert await admitted(admission, other, tries=9) == 2, "a part is what it was for others"
        with pytest.raises((RateLimited, QuotaExceeded)):
            await admit(admission, other, cost=7)
        with pytest.raises((RateLimited, QuotaExceeded)) as never:
            await admit(admission, make(10, on_failure="local", replicas=4), cost=11)
        assert never.value.retry_after_ms is None, "over the whole limit"


async def test_what_a_part_refuses_is_told_to_come_back_within_a_minute(own_redis: RedisServer) -> None:
    limits = daily(4, on_failure="local", replicas=4), rate(4, DAY_US, on_failure="local", replicas=4)
    async with running(own_redis.url) as store:
        admission = Admission(Policies(()), store)
        own_redis.kill()
        await until_away(store)
        for limit in limits:
            await admit(admission, limit)
            with pytest.raises((RateLimited, QuotaExceeded)) as refused:
                await admit(admission, limit)
            assert refused.value.retry_after_ms == 60_000
        own_redis.start()
        await until_up(store)
        for limit in limits:
            await admit(admission, limit)


async def test_a_budget_that_ends_is_answered_by_each_limit_too(one_redis: RedisServer) -> None:
    """Who waits when Redis goes away, and not only who comes later."""
    with FaultProxy(one_redis.port) as proxy:
        async with running(f"redis://{HOST}:{proxy.port}", timeout_s=0.05) as store:
            admission = Admission(Policies(()), store)
            proxy.stall()
            outcomes = await asyncio.gather(
                admit(admission, rate(10, on_failure="local")),
                admit(admission, daily(10, on_failure="open")),
                admit(admission, daily(10, on_failure="closed")),
                return_exceptions=True,
            )
            assert [type(outcome) for outcome in outcomes] == [Grant, Grant, DependencyUnavailable]
            proxy.heal()


async def test_what_was_over_in_redis_is_not_what_holds_without_it(own_redis: RedisServer) -> None:
    limit = rate(4, HOUR_US, on_failure="local", replicas=2)
    async with running(own_redis.url) as store:
        admission = Admission(Policies(()), store)
        assert await admitted(admission, limit, tries=6) == 4
        own_redis.kill()
        await until_away(store)
        assert await admitted(admission, limit, tries=6) == 2


async def test_what_is_given_back_without_redis_goes_to_where_it_was_spent(own_redis: RedisServer) -> None:
    limit = daily(8, on_failure="local", replicas=2)
    async with running(own_redis.url) as store:
        admission = Admission(Policies(()), store)
        own_redis.kill()
        await until_away(store)
        for _ in range(20):
            (await admit(admission, limit)).give_back()
        assert await admitted(admission, limit, tries=9) == 4


async def test_a_question_without_redis_is_answered_by_what_holds_and_counts_as_no_decision(
    own_redis: RedisServer,
) -> None:
    local = rate(20, on_failure="local", replicas=4, name="local")
    async with running(own_redis.url) as store:
        admission = Admission(Policies(()), store)
        own_redis.kill()
        await until_away(store)
        await admit(admission, local)
        before = decisions(admission)
        looked = await admission.look((local, daily(5, on_failure="open")))
        assert [(one.terms.rule, one.remaining) for one in looked.allowances()] == [("local", 4)]
        with pytest.raises(DependencyUnavailable):
            await admission.look((daily(5, on_failure="closed"),))
        assert decisions(admission) == before


# What is shown


async def test_the_status_shows_what_is_enforced_and_costs_nothing(admission: Admission, clock: Clock) -> None:
    clock.us = unix_us("2027-12-31T23:00")
    limits = (
        rate(100, name="wide"),
        rate(10, burst=3, name="narrow"),
        daily(50, name="day"),
        monthly(7, name="month"),
        monthly(1, shadow=True, name="shadow"),
    )
    await admit(admission, *limits, cost=2)
    shown = [status("echo", 1, await admission.look(limits)) for _ in range(3)]
    assert shown[0] == shown[2]
    narrow = {
        "limit": 10,
        "remaining": 1,
        "reset_at": "2027-12-31T23:00:12.000Z",
        "window_seconds": 60.0,
    }
    day = {"limit": 50, "used": 2, "remaining": 48, "reset_at": "2028-01-01T00:00:00.000Z"}
    month = {"limit": 7, "used": 2, "remaining": 5, "reset_at": "2028-01-01T00:00:00.000Z"}
    assert shown[0]["rate_limit"] == narrow
    assert shown[0]["quota"] == {"daily": day, "monthly": month}
    assert [policy["rule"] for policy in shown[0]["policies"]] == ["wide", "narrow", "day", "month"]
    assert shown[0]["policies"][1] == {"rule": "narrow", "kind": "rate", "burst": 3, **narrow}


@pytest.mark.parametrize("ahead_us", [7 * HOUR_US, -5 * HOUR_US])
async def test_in_process_a_calendar_that_was_set_is_what_is_told(ahead_us: int) -> None:
    """As where a machine slept, or started before it knew the time; rates go on by a clock of their own."""
    steady, calendar = Clock(unix_us("2027-03-10T12:00")), Clock(unix_us("2027-03-10T12:00"))
    admission = Admission(Policies(()), MemoryStore(steady, calendar))
    a_rate, day = rate(1, name="rate"), daily(1, name="day")
    await admit(admission, a_rate)
    calendar.us += ahead_us
    await admit(admission, day)
    with pytest.raises(QuotaExceeded) as refused:
        await admit(admission, day)
    left_s = 12 * 3_600 - ahead_us / 1e6
    data = refused.value.as_data()
    assert (data["reset_at"], data["retry_after_ms"]) == ("2027-03-11T00:00:00.000Z", left_s * 1e3)
    assert refused.value.allowance.reset_s == left_s
    shown = status("echo", 1, await admission.look((a_rate, day)))
    assert [one["reset_at"] for one in shown["policies"]] == [
        rfc3339(calendar.us / 1e6 + 60),
        "2027-03-11T00:00:00.000Z",
    ]


async def test_the_end_of_a_quota_is_told_to_the_millisecond() -> None:
    """By the clocks of the machine, which are read one after the other."""
    admission = Admission(Policies(()), MemoryStore())
    limits = daily(1), monthly(1)
    for _ in range(200):
        shown = status("echo", 1, await admission.look(limits))
        assert all(one["reset_at"].endswith("T00:00:00.000Z") for one in shown["policies"])


async def test_the_status_of_a_tool_without_limits_asks_nobody(one_redis: RedisServer) -> None:
    async with running(one_redis.url) as store:
        looked = await Admission(Policies(()), store).look(())
        shown = status("echo", 1, looked)
        assert (shown["rate_limit"], shown["quota"], shown["policies"]) == (None, None, [])
        assert store.up


@pytest.mark.parametrize(("cost", "remaining"), [(0, 5), (1, 4), (5, 0)])
async def test_what_remains_is_what_passes(admission: Admission, cost: int, remaining: int) -> None:
    limits = rate(7, burst=5), daily(5), monthly(5)
    if cost:
        await admit(admission, *limits, cost=cost)
    assert [one.remaining for one in (await admission.look(limits)).allowances()] == [remaining] * 3
    for limit in limits:
        assert await admitted(admission, limit, tries=8) == remaining


async def test_the_tightest_is_the_rate_with_the_least_left_and_else_the_quota(admission: Admission) -> None:
    limits = daily(2), rate(10), rate(5), monthly(50)
    grant = await admit(admission, *limits)
    tightest = grant.tightest()
    assert tightest is not None and (tightest.terms, tightest.remaining) == (limits[2].terms, 4)
    quota = (await admit(admission, *limits[3:])).tightest()
    assert quota is not None and quota.terms is limits[3].terms
    assert (await admit(admission, daily(1, shadow=True))).tightest() is None


async def test_what_refuses_is_said_once_in_a_while_with_the_count_of_the_rest(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "app.limits")
    clock = Clock()
    admission = Admission(Policies(()), MemoryStore(clock, clock))
    limits = rate(1, name="one"), rate(1, name="shadow", shadow=True)
    assert await admitted(admission, *limits, tries=500) == 1
    said = [(record.getMessage(), vars(record)["rule"]) for record in caplog.records]
    assert said == [("limit refuses", "one")]


async def test_every_decision_is_counted_from_zero() -> None:
    counted = Admission(Policies(()), MemoryStore()).decisions
    outcomes = dict.fromkeys(("allowed", "refused", "would_refuse", "unchecked", "unavailable"), 0)
    assert counted == dict.fromkeys(("rate", "daily", "monthly"), outcomes)
