"""Breakers: a dead upstream costs few calls, a healed one is used again, and nobody closes a tool to others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from app.breaker import (
    ABANDONED_TO_OPEN_ALL,
    CALLS_MIN,
    CALM_S,
    CLOSED,
    FAILED,
    FORGET_S,
    HALF_OPEN,
    NO_BREAKER,
    OPEN,
    OPEN_S_MAX,
    OPEN_S_MIN,
    OPEN_SPREAD,
    PROBE_S_MAX,
    PROBES_AT_ONCE,
    PROBES_TO_CLOSE,
    SAYS_NOTHING,
    STREAK,
    SUCCEEDED,
    TENANTS_TO_OPEN_ALL,
    WINDOW_S,
    Breaker,
    BreakerTable,
    Outcome,
    Probe,
    ToolBreaker,
    outcome_of,
)
from app.errors import (
    OVERLOADED,
    RESULT_INVALID,
    TOOL_CANCELLED,
    TOOL_CRASHED,
    TOOL_ERROR,
    TOOL_TIMEOUT,
    Failure,
    Overloaded,
    ToolError,
    UpstreamFailed,
    failure,
)

HEALED_S_MAX = 10.0
"""What is healed must be used again within this time (reliability)."""


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(clock, chance=lambda: 0.5)


@pytest.fixture
def of_tool(clock: Clock) -> ToolBreaker:
    return ToolBreaker(clock, chance=lambda: 0.5)


def refused(enter: Callable[[], Probe | None]) -> int:
    """The call is refused; milliseconds after which it may come back."""
    with pytest.raises(Overloaded) as caught:
        enter()
    assert caught.value.kind is OVERLOADED
    assert caught.value.retry_after_ms is not None
    return caught.value.retry_after_ms


def call(breaker: Breaker, outcome: Outcome, clock: Clock) -> None:
    breaker.ended(clock.now, outcome, breaker.enter())


def fail_until_open(breaker: Breaker, clock: Clock) -> int:
    """How many calls it took."""
    calls = 0
    while breaker.state != OPEN:
        call(breaker, FAILED, clock)
        calls += 1
        assert calls <= 100
    return calls


def probe_of(breaker: Breaker) -> Probe:
    probe = breaker.enter()
    assert probe is not None
    return probe


def half_open(breaker: Breaker, clock: Clock) -> None:
    fail_until_open(breaker, clock)
    clock.now = breaker._until


@pytest.mark.parametrize("good_calls", [0, 3, 100_000])
def test_a_dead_upstream_opens_it_within_20_calls_however_good_it_was_before(
    breaker: Breaker, clock: Clock, good_calls: int
) -> None:
    for number in range(good_calls):
        call(breaker, FAILED if number % 100 == 7 else SUCCEEDED, clock)
    assert breaker.state == CLOSED
    assert fail_until_open(breaker, clock) <= 20


def test_half_of_the_calls_failing_opens_it_when_they_are_enough_to_say(breaker: Breaker, clock: Clock) -> None:
    for number in range(CALLS_MIN + 1):
        assert breaker.state == CLOSED
        call(breaker, SUCCEEDED if number % 2 else FAILED, clock)
    assert breaker.state == OPEN


def test_a_third_of_the_calls_failing_leaves_it_closed(breaker: Breaker, clock: Clock) -> None:
    for number in range(3_000):
        call(breaker, SUCCEEDED if number % 3 else FAILED, clock)
        clock.now += 0.01
    assert breaker.state == CLOSED


def test_failures_of_long_ago_are_not_held_against_it(breaker: Breaker, clock: Clock) -> None:
    for _ in range(CALLS_MIN):
        call(breaker, FAILED, clock)
        call(breaker, SUCCEEDED, clock)
        clock.now += 2.5 * WINDOW_S
    assert breaker.state == CLOSED


def test_good_calls_of_long_ago_do_not_hide_what_fails_now(breaker: Breaker, clock: Clock) -> None:
    call(breaker, FAILED, clock)
    for _ in range(10_000):
        call(breaker, SUCCEEDED, clock)
    clock.now += 2.5 * WINDOW_S
    for number in range(CALLS_MIN + 1):
        call(breaker, SUCCEEDED if number % 2 else FAILED, clock)
    assert breaker.state == OPEN


def test_what_says_nothing_neither_opens_nor_closes_it(breaker: Breaker, clock: Clock) -> None:
    for _ in range(100):
        call(breaker, SAYS_NOTHING, clock)
    assert breaker.state == CLOSED
    half_open(breaker, clock)
    for _ in range(100):
        call(breaker, SAYS_NOTHING, clock)
    assert breaker.state == HALF_OPEN


def test_open_it_refuses_and_says_when_it_will_not(breaker: Breaker, clock: Clock) -> None:
    fail_until_open(breaker, clock)
    wait_ms = refused(breaker.enter)
    assert OPEN_S_MIN * 1e3 <= wait_ms <= OPEN_S_MIN * (1 + 2 * OPEN_SPREAD) * 1e3
    clock.now += wait_ms / 1e3
    assert breaker.state_now == HALF_OPEN
    assert breaker.enter() is not None


def test_half_open_lets_a_few_in_at_once_and_closes_when_they_succeed(breaker: Breaker, clock: Clock) -> None:
    half_open(breaker, clock)
    probes = [probe_of(breaker) for _ in range(PROBES_AT_ONCE)]
    assert refused(breaker.enter) > 0
    for probe in probes[:PROBES_TO_CLOSE]:
        assert breaker.state == HALF_OPEN
        breaker.ended(clock.now, SUCCEEDED, probe)
    assert breaker.state == CLOSED
    assert breaker.enter() is None


def test_one_failed_probe_opens_it_again_for_longer_up_to_a_cap(breaker: Breaker, clock: Clock) -> None:
    fail_until_open(breaker, clock)
    spread = 1 + OPEN_SPREAD * 0.5
    for open_s in (1.0, 2.0, 4.0, 6.0, 6.0):
        assert breaker._until - clock.now == pytest.approx(min(open_s, OPEN_S_MAX) * spread)
        clock.now = breaker._until
        call(breaker, FAILED, clock)
        assert breaker.state == OPEN


def test_after_a_calm_time_it_opens_shortly_again(breaker: Breaker, clock: Clock) -> None:
    half_open(breaker, clock)
    call(breaker, FAILED, clock)
    clock.now = breaker._until
    for _ in range(PROBES_TO_CLOSE):
        call(breaker, SUCCEEDED, clock)
    fail_until_open(breaker, clock)
    assert breaker._until - clock.now > 2 * OPEN_S_MIN, "it closed a moment ago: it flaps"
    clock.now = breaker._until
    for _ in range(PROBES_TO_CLOSE):
        call(breaker, SUCCEEDED, clock)
    clock.now += CALM_S
    fail_until_open(breaker, clock)
    assert breaker._until - clock.now < 2 * OPEN_S_MIN


def test_a_late_success_of_a_call_from_before_does_not_close_it(breaker: Breaker, clock: Clock) -> None:
    began = clock.now
    clock.now += 1
    fail_until_open(breaker, clock)
    for _ in range(100):
        breaker.ended(began, SUCCEEDED)
    assert breaker.state == OPEN
    clock.now = breaker._until
    probe_of(breaker)
    for _ in range(100):
        breaker.ended(began, SUCCEEDED)
    assert breaker.state == HALF_OPEN


def test_late_failures_of_calls_from_before_do_not_open_it_again(breaker: Breaker, clock: Clock) -> None:
    began = clock.now
    clock.now += 1
    half_open(breaker, clock)
    for _ in range(PROBES_TO_CLOSE):
        call(breaker, SUCCEEDED, clock)
    for _ in range(100):
        breaker.ended(began, FAILED)
    assert breaker.state == CLOSED


def test_probes_that_hang_do_not_keep_the_others_out(breaker: Breaker, clock: Clock) -> None:
    half_open(breaker, clock)
    hung = [probe_of(breaker) for _ in range(PROBES_AT_ONCE)]
    clock.now += PROBE_S_MAX
    for _ in range(PROBES_TO_CLOSE):
        call(breaker, SUCCEEDED, clock)
    assert breaker.state == CLOSED
    for probe in hung:
        breaker.ended(probe.began_s, FAILED, probe)
    assert breaker.state == CLOSED, "they tell of a time that is over"


def test_what_nobody_asked_for_long_is_closed_again(breaker: Breaker, clock: Clock) -> None:
    half_open(breaker, clock)
    probe_of(breaker)
    clock.now += FORGET_S
    assert breaker.state_now == CLOSED
    assert breaker.enter() is None


@given(st.integers(0, 200), st.floats(0, 1, exclude_max=True), st.floats(0.001, 0.5))
def test_what_is_healed_is_used_again_within_ten_seconds(failures: int, chance: float, between_s: float) -> None:
    """A caller that comes all the time, whatever the chance and however long it was dead before."""
    clock = Clock()
    breaker = Breaker(clock, chance=lambda: chance)
    fail_until_open(breaker, clock)
    for _ in range(failures):
        clock.now += between_s
        try:
            probe = breaker.enter()
        except Overloaded:
            continue
        breaker.ended(clock.now, FAILED, probe)
    healed = clock.now
    while breaker.state != CLOSED:
        clock.now += between_s
        try:
            probe = breaker.enter()
        except Overloaded:
            continue
        breaker.ended(clock.now, SUCCEEDED, probe)
    assert clock.now - healed <= HEALED_S_MAX


class BreakerLife(RuleBasedStateMachine):
    """Calls that begin, end in any order, or hang, and time that passes."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.breaker = Breaker(self.clock, chance=lambda: 0.99)
        self.running: list[tuple[float, Probe | None]] = []

    @rule()
    def begin(self) -> None:
        try:
            self.running.append((self.clock.now, self.breaker.enter()))
        except Overloaded as refusal:
            assert self.breaker.state != CLOSED
            assert 0 < (refusal.retry_after_ms or 0) <= 1.5 * OPEN_S_MAX * 1e3

    @precondition(lambda self: self.running)
    @rule(data=st.data(), outcome=st.sampled_from([FAILED, FAILED, SAYS_NOTHING, SUCCEEDED]))
    def end(self, data: st.DataObject, outcome: Outcome) -> None:
        before = self.breaker.state
        began, probe = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.breaker.ended(began, outcome, probe)
        if before == OPEN:
            assert self.breaker.state == OPEN, "only time ends it"
        if before == HALF_OPEN and probe is None:
            assert self.breaker.state == HALF_OPEN, "only probes decide"

    @rule(seconds=st.floats(0.01, 20))
    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def few_probes(self) -> None:
        assert len(self.breaker._probes) <= PROBES_AT_ONCE
        assert self.breaker.state == HALF_OPEN or not self.breaker._probes


TestBreakerLife = BreakerLife.TestCase


def test_a_table_keeps_keys_apart_and_only_those_that_failed(clock: Clock) -> None:
    table: BreakerTable[str] = BreakerTable(clock)
    for _ in range(STREAK):
        assert table.enter("dead") is None
        table.ended("dead", clock.now, FAILED)
        table.ended("alive", clock.now, SUCCEEDED)
    assert refused(lambda: table.enter("dead")) > 0
    assert table.enter("alive") is None
    assert (len(table), table.open_now, table.state_now) == (1, 1, OPEN)


def test_a_table_is_bounded_and_forgets_who_failed_longest_ago(clock: Clock) -> None:
    table: BreakerTable[int] = BreakerTable(clock, keys_max=10)
    for key in range(1_000):
        table.ended(key, clock.now, FAILED)
        table.ended(0, clock.now, FAILED)
    assert len(table) == 10
    assert refused(lambda: table.enter(0)) > 0


def test_a_table_empties_itself(clock: Clock) -> None:
    table: BreakerTable[str] = BreakerTable(clock)
    for _ in range(STREAK):
        table.ended("dead", clock.now, FAILED)
    table.ended("unlucky", clock.now, FAILED)
    clock.now += CALM_S
    table.ended("new", clock.now, FAILED)
    assert len(table) == 2, "what is closed and calm is forgotten"
    clock.now += FORGET_S
    assert (table.open_now, len(table)) == (0, 0)


def tool_call(of_tool: ToolBreaker, tenant: str, outcome: Outcome, clock: Clock, abandoned: int = 0) -> None:
    """What the executor does."""
    probe = None if of_tool.quiet else of_tool.enter(tenant)
    if outcome != SUCCEEDED or not of_tool.quiet:
        of_tool.ended(tenant, clock.now, outcome, probe, abandoned)


def test_a_tool_whose_upstream_is_dead_is_refused_within_20_calls_and_closes_by_itself(
    of_tool: ToolBreaker, clock: Clock
) -> None:
    for _ in range(1_000):
        tool_call(of_tool, "a", SUCCEEDED, clock)
    assert of_tool.quiet
    for _ in range(STREAK):
        tool_call(of_tool, "a", FAILED, clock)
    assert of_tool.state_now == OPEN
    clock.now += refused(lambda: of_tool.enter("a")) / 1e3
    assert of_tool.state_now == HALF_OPEN
    for _ in range(PROBES_TO_CLOSE):
        tool_call(of_tool, "a", SUCCEEDED, clock)
    assert of_tool.state_now == CLOSED
    clock.now += CALM_S
    assert of_tool.state_now == CLOSED
    assert of_tool.quiet


def test_one_tenant_cannot_close_a_tool_to_another(of_tool: ToolBreaker, clock: Clock) -> None:
    for _ in range(1_000):
        try:
            tool_call(of_tool, "hostile", FAILED, clock)
        except Overloaded:
            clock.now += 0.01
        tool_call(of_tool, "other", SAYS_NOTHING, clock)
    assert of_tool.enter("other") is None


def test_what_several_tenants_see_fail_is_closed_to_all(of_tool: ToolBreaker, clock: Clock) -> None:
    tenants = [f"tenant-{number}" for number in range(TENANTS_TO_OPEN_ALL)]
    for number in range(STREAK):
        tool_call(of_tool, tenants[number % len(tenants)], FAILED, clock)
    assert refused(lambda: of_tool.enter("somebody else")) > 0
    clock.now += 2 * OPEN_S_MIN
    for _ in range(PROBES_TO_CLOSE):
        tool_call(of_tool, "somebody else", SUCCEEDED, clock)
    assert of_tool.enter(tenants[0]) is None and of_tool.quiet


def test_a_success_of_anyone_shows_that_the_tool_is_not_dead(of_tool: ToolBreaker, clock: Clock) -> None:
    for number in range(STREAK - 1):
        tool_call(of_tool, f"tenant-{number}", FAILED, clock)
    tool_call(of_tool, "lucky", SUCCEEDED, clock)
    for number in range(STREAK - 1):
        tool_call(of_tool, f"tenant-{number}", FAILED, clock)
    assert of_tool.enter("somebody else") is None


def test_runs_that_hang_close_the_tool_to_all(of_tool: ToolBreaker, clock: Clock) -> None:
    for abandoned in range(1, ABANDONED_TO_OPEN_ALL):
        tool_call(of_tool, "a", FAILED, clock, abandoned)
    assert of_tool.enter("b") is None
    tool_call(of_tool, "a", FAILED, clock, ABANDONED_TO_OPEN_ALL)
    assert refused(lambda: of_tool.enter("b")) > 0


def test_an_open_breaker_that_is_refused_on_the_way_to_others_holds_no_probe(
    of_tool: ToolBreaker, clock: Clock
) -> None:
    for _ in range(STREAK):
        tool_call(of_tool, "a", FAILED, clock)
    clock.now += 2 * OPEN_S_MIN
    for _ in range(10 * PROBES_AT_ONCE):
        of_tool.ended("a", clock.now, SAYS_NOTHING, of_tool.enter("a"))
    assert of_tool.enter("a") is not None


def test_enable_circuit_breakers_false_lets_everything_through(clock: Clock) -> None:
    for _ in range(1_000):
        tool_call(NO_BREAKER, "a", FAILED, clock, abandoned=100)
    assert NO_BREAKER.quiet and NO_BREAKER.enter("a") is None


UPSTREAM = Failure("EGRESS_FAILED", TOOL_ERROR.category, "connection failed", True)
IN_DOUBT = UPSTREAM._replace(retryable=False)


@pytest.mark.parametrize(
    ("failed", "error", "parameters", "outcome"),
    [
        (failure(TOOL_TIMEOUT, ""), None, {}, FAILED),
        (failure(TOOL_CRASHED, ""), RuntimeError(), {}, FAILED),
        (failure(TOOL_CANCELLED, ""), None, {}, SAYS_NOTHING),
        (failure(RESULT_INVALID, ""), None, {}, SAYS_NOTHING),
        (Failure("NO_CITY", TOOL_ERROR.category, "", False), ToolError(""), {}, SAYS_NOTHING),
        (Failure("BUSY", TOOL_ERROR.category, "", True), ToolError(""), {}, FAILED),
        (UPSTREAM, UpstreamFailed("", "wiki.test", code="EGRESS_FAILED"), {"query": "x"}, FAILED),
        (IN_DOUBT, UpstreamFailed("", "wiki.test", code="EGRESS_FAILED"), {"query": "x"}, FAILED),
        (IN_DOUBT, UpstreamFailed("", "wiki.test", code="EGRESS_FAILED"), {"url": "http://wiki.test/"}, SAYS_NOTHING),
        (UPSTREAM, UpstreamFailed("", "dead.test", code="EGRESS_FAILED"), {"url": "http://Dead.test/"}, SAYS_NOTHING),
        (UPSTREAM, UpstreamFailed("", "dead.test", code="X"), {"body": [{"at": "Dead.test", "n": [1]}]}, SAYS_NOTHING),
        (UPSTREAM, UpstreamFailed("", "dead.test", code="X"), {"of no door": {"Dead.test"}}, SAYS_NOTHING),
        (UPSTREAM, UpstreamFailed("", "wiki.test", code="X", asked=False), {"query": "x"}, SAYS_NOTHING),
    ],
)
def test_only_what_is_not_the_callers_doing_is_held_against_a_tool(
    failed: Failure, error: BaseException | None, parameters: Any, outcome: Outcome
) -> None:
    assert outcome_of(failed, error, parameters, cut_short=False) == outcome


def test_a_timeout_that_the_caller_asked_for_says_nothing() -> None:
    assert outcome_of(failure(TOOL_TIMEOUT, ""), None, {}, cut_short=True) == SAYS_NOTHING
