"""What every store of counters promises: exact rates, calendar quotas, all or nothing. In process and each Redis."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from app.limits.limit import KEY_PREFIX, Limit
from app.limits.memory_store import MemoryStore
from app.limits.store import Ask
from tests.limits.stores import (
    DAY_US,
    HOUR_US,
    MINUTE_US,
    PASSED,
    REFUSED,
    SECOND_US,
    WOULD_BE_REFUSED,
    Clock,
    Counters,
    counters_of,
    daily,
    monthly,
    rate,
    running,
    statuses,
    unix_us,
    wait_us,
)
from tests.servers import RedisServer

pytestmark = pytest.mark.anyio


PERIOD_US = HOUR_US
"""Of rates under a clock of the test's own: Redis forgets what is whole again by its own, which runs on meanwhile."""

# Rates


@pytest.mark.parametrize(
    ("limit", "cost"),
    [
        (rate(10, PERIOD_US), 1),
        (rate(7, PERIOD_US), 1),  # 514285714 2/7 µs a call
        (rate(7, PERIOD_US), 3),
        (rate(7, PERIOD_US, burst=1), 1),
        (rate(3, MINUTE_US, burst=20), 4),
        (rate(1, DAY_US), 1),
        (rate(1_000_000_000, SECOND_US, burst=5), 5),  # a call a nanosecond
        (rate(999_999_937, HOUR_US, burst=3), 3),
    ],
    ids=lambda value: f"{value.terms.amount} in {value.terms.period_us}" if isinstance(value, Limit) else str(value),
)
async def test_after_the_wait_that_is_told_a_call_passes_and_a_microsecond_before_it_does_not(
    counters: Counters, clock: Clock, limit: Limit, cost: int
) -> None:
    fits = limit.terms.burst // cost
    assert await counters.admitted(limit, tries=fits + 1, cost=cost) == fits
    for _ in range(3):
        refused = await counters.ask(limit, cost=cost)
        wait = wait_us(limit, refused, cost)
        assert statuses(refused) == [REFUSED] and wait > 0
        clock.us += wait - 1
        assert not await counters.passes(limit, cost=cost)
        clock.us += 1
        assert await counters.passes(limit, cost=cost)


async def test_seven_an_hour_are_seven_in_every_hour_for_days(counters: Counters, clock: Clock) -> None:
    """A seventh of a microsecond that is rounded away is a call too many in the end."""
    limit = rate(7, PERIOD_US)
    start = clock.us
    assert await counters.admitted(limit, tries=8) == 7
    for call in range(1, 400):
        # The first whole microsecond at which call / 7 hours have passed.
        clock.us = start - (-call * PERIOD_US // 7)
        assert await counters.admitted(limit, tries=2) == 1, call


async def test_a_burst_comes_back_as_a_whole_after_its_window_and_never_grows(counters: Counters, clock: Clock) -> None:
    limit = rate(10, PERIOD_US, burst=25)
    assert await counters.admitted(limit, tries=30) == 25
    clock.us += PERIOD_US * 5 // 2 - 1
    assert await counters.admitted(limit, tries=30) == 24
    clock.us += DAY_US
    assert await counters.admitted(limit, tries=30) == 25


async def test_a_cost_counts_as_so_many_calls(counters: Counters) -> None:
    limits = rate(10), daily(10), monthly(10)
    assert await counters.passes(*limits, cost=6)
    refused = await counters.ask(*limits, cost=5)
    assert statuses(refused) == [REFUSED] * 3
    assert await counters.passes(*limits, cost=4)
    assert not await counters.passes(*limits, cost=1)


@pytest.mark.parametrize("cost", [11, 10**9, 10**30])
async def test_a_cost_over_the_whole_limit_never_passes_and_breaks_nothing(
    counters: Counters, clock: Clock, cost: int
) -> None:
    limits = rate(10), daily(10), monthly(10, shadow=True)
    assert statuses(await counters.ask(*limits, cost=cost)) == [REFUSED, REFUSED, WOULD_BE_REFUSED]
    clock.us += 40 * DAY_US
    assert statuses(await counters.ask(*limits, cost=cost)) == [REFUSED, REFUSED, WOULD_BE_REFUSED]
    assert await counters.admitted(*limits, tries=11) == 10


# Quotas


@pytest.mark.parametrize(
    ("last_day", "month_ends"),
    [
        ("2027-03-10", False),
        ("2027-01-31", True),
        ("2027-02-28", True),
        ("2028-02-28", False),
        ("2028-02-29", True),
        ("2100-02-28", True),
        ("2000-02-28", False),
        ("2027-04-30", True),
        ("2027-12-31", True),
        ("2028-12-31", True),
    ],
)
async def test_a_day_and_a_month_end_at_midnight_of_utc(
    counters: Counters, clock: Clock, last_day: str, month_ends: bool
) -> None:
    midnight = unix_us(last_day) + DAY_US
    day, month = daily(2), monthly(2)
    clock.us = midnight - DAY_US
    assert await counters.admitted(day, tries=3) == 2
    assert await counters.admitted(month, tries=3) == 2
    clock.us = midnight - 1
    assert not await counters.passes(day) and not await counters.passes(month)
    clock.us = midnight
    assert await counters.admitted(day, tries=3) == 2
    assert await counters.admitted(month, tries=3) == (2 if month_ends else 0)


async def test_a_quota_is_counted_across_the_days_of_its_month(counters: Counters, clock: Clock) -> None:
    day, month = daily(3), monthly(8)
    clock.us = unix_us("2028-02-27")
    admitted = []
    for _ in range(4):
        admitted.append(await counters.admitted(day, month, tries=5))
        clock.us += DAY_US
    assert admitted == [3, 3, 2, 3], "the fourth day is the first of March"


# All or nothing


async def test_a_refusal_by_one_limit_leaves_every_other_as_it_was(counters: Counters) -> None:
    per_minute, day, month = rate(100), daily(100), monthly(5)
    await counters.admitted(month, tries=5)
    before = await counters.look(per_minute, day, month)
    refused = await counters.ask(per_minute, day, month)
    assert statuses(refused) == [PASSED, PASSED, REFUSED]
    assert await counters.look(per_minute, day, month) == before
    assert [(a, b) for _, a, b in refused.states] == before


async def test_every_order_of_limits_refuses_alike(counters: Counters) -> None:
    full, free = daily(1), [rate(10), monthly(10)]
    await counters.passes(full)
    for limits in ([full, *free], [free[0], full, free[1]], [*free, full]):
        before = await counters.look(*free)
        assert not await counters.passes(*limits)
        assert await counters.look(*free) == before


async def test_a_question_costs_nothing_and_passes_where_all_is_spent(counters: Counters) -> None:
    limits = rate(2), daily(2), monthly(2)
    await counters.admitted(*limits, tries=2)
    before = await counters.look(*limits)
    assert await counters.admitted(*limits, tries=20, cost=0) == 20
    assert await counters.look(*limits) == before


async def test_limits_of_no_name_in_common_do_not_meet(counters: Counters) -> None:
    one, other = daily(1), daily(1)
    assert await counters.passes(one) and await counters.passes(other)


async def test_an_ask_with_no_limit_passes(counters: Counters) -> None:
    verdict = await counters.ask()
    assert verdict.passes and list(verdict.states) == []


# Shadows


async def test_a_shadow_tells_what_it_would_refuse_and_refuses_nothing(counters: Counters) -> None:
    shadows = rate(2, shadow=True), daily(2, shadow=True), monthly(2, shadow=True)
    enforced = daily(4)
    seen = [statuses(await counters.ask(*shadows, enforced)) for _ in range(5)]
    assert seen[:2] == [[PASSED] * 4] * 2
    assert seen[2:4] == [[WOULD_BE_REFUSED] * 3 + [PASSED]] * 2
    assert seen[4] == [WOULD_BE_REFUSED] * 3 + [REFUSED]


async def test_a_shadow_counts_what_passes_and_not_what_it_would_have_refused(counters: Counters, clock: Clock) -> None:
    shadow = rate(2, PERIOD_US, shadow=True)
    for _ in range(50):
        await counters.ask(shadow)
    clock.us += PERIOD_US // 2
    assert statuses(await counters.ask(shadow)) == [PASSED]
    assert statuses(await counters.ask(shadow)) == [WOULD_BE_REFUSED]


async def test_what_a_limit_refuses_its_shadow_does_not_count(counters: Counters) -> None:
    enforced, shadow = daily(1), daily(10, shadow=True)
    await counters.passes(enforced)
    before = await counters.look(shadow)
    assert statuses(await counters.ask(enforced, shadow)) == [REFUSED, PASSED]
    assert await counters.look(shadow) == before


# Giving back


async def test_what_is_given_back_at_once_was_never_spent(counters: Counters) -> None:
    limits = rate(7, PERIOD_US), daily(5), monthly(5)
    await counters.passes(*limits, cost=2)
    before = await counters.look(*limits)
    spent = await counters.ask(*limits, cost=3)
    await counters.give_back(spent, *limits, cost=3)
    assert await counters.look(*limits) == before


async def test_what_time_has_given_back_is_not_given_twice(counters: Counters, clock: Clock) -> None:
    limit = rate(10, PERIOD_US)
    cost_us, passed_us = PERIOD_US // 10, PERIOD_US // 25
    spent = [await counters.ask(limit) for _ in range(10)]
    clock.us += passed_us  # of what each of them cost
    for verdict in spent:
        await counters.give_back(verdict, limit)
    assert await counters.look(limit) == [(clock.us + PERIOD_US - passed_us - 10 * (cost_us - passed_us), 0)]
    clock.us += PERIOD_US
    late = await counters.ask(limit)
    clock.us += cost_us
    before = await counters.look(limit)
    await counters.give_back(late, limit)
    assert await counters.look(limit) == before


async def test_a_quota_is_given_back_in_the_day_in_which_it_was_spent_alone(counters: Counters, clock: Clock) -> None:
    day, month = daily(5), monthly(5)
    clock.us = unix_us("2027-03-10T23:59")
    spent = await counters.ask(day, month)
    clock.us += 2 * MINUTE_US
    await counters.admitted(day, month, tries=2)
    await counters.give_back(spent, day, month)
    assert [used for _, used in await counters.look(day, month)] == [2, 2]


async def test_what_a_shadow_did_not_count_it_does_not_give_back(counters: Counters) -> None:
    shadow, enforced = daily(1, shadow=True), daily(5)
    await counters.ask(shadow)
    spent = await counters.ask(shadow, enforced)
    assert statuses(spent) == [WOULD_BE_REFUSED, PASSED]
    await counters.give_back(spent, shadow, enforced)
    assert [used for _, used in await counters.look(shadow, enforced)] == [1, 0]


async def test_giving_back_lets_no_more_in_than_the_limit(counters: Counters, clock: Clock) -> None:
    """In no stretch of time did more run than the burst and the rate allow, whatever was given back when."""
    chance = random.Random(1)
    limit, day = rate(7, MINUTE_US, burst=5), daily(40)
    ran: list[tuple[int, int]] = []
    open_ones = []
    for _ in range(600):
        clock.us += int(chance.expovariate(12 / MINUTE_US))
        cost = chance.choice([1, 1, 1, 2, 5])
        if open_ones and chance.random() < 0.4:
            spent, of = open_ones.pop(chance.randrange(len(open_ones)))
            ran.remove((spent.now_us, of))
            await counters.give_back(spent, limit, day, cost=of)
        verdict = await counters.ask(limit, day, cost=cost)
        if verdict.passes:
            open_ones.append((verdict, cost))
            ran.append((verdict.now_us, cost))
    assert len(ran) > 20
    assert sum(cost for _, cost in ran) <= 40
    for first, (began, _) in enumerate(ran):
        used = 0
        for at, cost in ran[first:]:
            used += cost
            assert used <= 5 + Fraction(7 * (at - began), MINUTE_US)


# Clocks


async def test_a_rate_goes_on_after_the_clock_was_set_back_a_day(counters: Counters, clock: Clock) -> None:
    limit = rate(10, PERIOD_US)
    assert await counters.admitted(limit, tries=11) == 10
    clock.us -= DAY_US
    assert await counters.admitted(limit, tries=5) == 0, "what is spent is spent"
    clock.us += PERIOD_US // 10
    assert await counters.admitted(limit, tries=5) == 1
    clock.us += PERIOD_US
    assert await counters.admitted(limit, tries=15) == 10


async def test_a_clock_set_back_gives_no_more_than_the_limit(counters: Counters, clock: Clock) -> None:
    limit = rate(10, PERIOD_US)
    admitted = 0
    for _ in range(20):
        admitted += await counters.admitted(limit, tries=20)
        clock.us -= DAY_US
    assert admitted == 10


async def test_a_clock_that_went_a_day_ahead_and_back_costs_one_limit_at_most(counters: Counters, clock: Clock) -> None:
    limit = rate(10, PERIOD_US)
    assert await counters.admitted(limit, tries=11) == 10
    clock.us += DAY_US
    assert await counters.admitted(limit, tries=11) == 10
    clock.us -= DAY_US
    assert await counters.admitted(limit, tries=11) == 0
    clock.us += PERIOD_US // 5
    assert await counters.admitted(limit, tries=11) == 2


async def test_a_quota_keeps_its_count_when_the_clock_crosses_midnight_back_and_forth(
    counters: Counters, clock: Clock
) -> None:
    day, month = daily(5), monthly(5)
    clock.us = unix_us("2027-03-01T00:30")
    assert await counters.admitted(day, month, tries=3) == 3
    for step in (-HOUR_US, HOUR_US, -HOUR_US):
        clock.us += step
        assert [used for _, used in await counters.look(day, month)] == [3, 3]
    assert await counters.admitted(day, month, tries=5) == 2


async def test_a_quota_comes_back_after_the_clock_was_years_ahead(counters: Counters, clock: Clock) -> None:
    day, month = daily(2), monthly(2)
    now = clock.us
    clock.us += 3650 * DAY_US
    assert await counters.admitted(day, month, tries=3) == 2
    clock.us = now
    assert await counters.admitted(day, month, tries=3) == 2
    assert await counters.admitted(day, month, tries=3) == 0


# Policies that change


async def test_a_changed_policy_goes_on_with_its_counter(counters: Counters, clock: Clock) -> None:
    assert await counters.admitted(daily(10, name="quota"), tries=6) == 6
    assert await counters.admitted(daily(8, name="quota"), tries=5) == 2
    assert await counters.admitted(daily(20, name="quota"), tries=20) == 12

    assert await counters.admitted(rate(6, name="rate"), tries=7) == 6
    wider = rate(7, name="rate")  # other parts of a microsecond
    assert await counters.admitted(wider, tries=7) <= 1
    clock.us += MINUTE_US + 1
    assert await counters.admitted(wider, tries=8) == 7
    narrower = rate(60, MINUTE_US, burst=1, name="rate")
    assert await counters.admitted(narrower, tries=2) == 0
    clock.us += SECOND_US
    assert await counters.admitted(narrower, tries=2) == 1, "a burst that is smaller now is what has to come back"


# Keys of Redis


async def test_every_key_has_the_hash_tag_and_an_expiry_and_questions_write_none(
    each_redis: RedisServer, clock: Clock
) -> None:
    clock.us = unix_us("2027-02-27T18:00")
    limits = rate(10, MINUTE_US, burst=30), daily(5), monthly(5), rate(5, SECOND_US, shadow=True)
    async with counters_of(each_redis.url, clock) as counters:
        before = set(each_redis.cli("KEYS", "*").split())
        assert all(key.startswith(KEY_PREFIX) for key in before), "the probe's"
        await counters.ask(*limits, cost=0)
        assert set(each_redis.cli("KEYS", "*").split()) == before
        spent = await counters.ask(*limits, cost=2)
        left_ms = [int(each_redis.cli("PTTL", limit.key)) for limit in limits]
        await counters.give_back(spent, *limits, cost=2)
        assert all(int(each_redis.cli("PTTL", limit.key)) > 0 for limit in limits)
    assert all(key.startswith(KEY_PREFIX) for key in each_redis.cli("KEYS", "*").split())
    assert all(int(each_redis.cli("PTTL", key)) > 0 for key in each_redis.cli("KEYS", "*").split())
    spoken_ms = [12_000, 6 * 3_600_000, 30 * 3_600_000, 400]
    for left, spoken in zip(left_ms, spoken_ms, strict=True):
        assert spoken - 10_000 < left <= spoken + 60_000, "not before it has no effect, and not long after"


async def test_a_rate_that_has_come_back_whole_leaves_no_key(each_redis: RedisServer) -> None:
    """On the server's own clock: idle callers cost no memory."""
    async with running(each_redis.url) as store:
        counters = Counters(store, Clock())
        limit = rate(1_000, SECOND_US)
        assert await counters.passes(limit)
        left_ms = int(each_redis.cli("PTTL", limit.key))
        assert left_ms <= 1_001 and left_ms != -1, "-2 were one that has gone already, -1 one that never goes"


# Memory of this process


async def test_a_full_store_in_process_forgets_what_has_no_effect_and_then_what_is_oldest(clock: Clock) -> None:
    store = MemoryStore(clock, clock, counters_max=300)

    def used(limit: Limit) -> int:
        return store.ask(Ask((limit,), 0)).states[0][2]

    quotas = [daily(5) for _ in range(100)]
    idle = [rate(10, SECOND_US) for _ in range(200)]
    for limit in (*quotas, *idle):
        store.ask(Ask((limit,), 1))
    clock.us += MINUTE_US
    more = [daily(5) for _ in range(190)]
    for limit in more:
        store.ask(Ask((limit,), 1))
    kept = sum(used(limit) for limit in quotas)
    assert kept >= 90, "while there are rates that have come back whole, quotas stay"
    assert all(used(limit) == 1 for limit in more)
    for _ in range(300):
        store.ask(Ask((daily(5),), 1))
    assert store.counters == 300 and sum(used(limit) for limit in quotas) < 10
