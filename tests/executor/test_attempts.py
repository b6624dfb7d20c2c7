"""Retries: only what is safe and may help, within the deadline, and never more than a tenth of the calls."""

from __future__ import annotations

import random
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import (
    RESULT_TOO_LARGE,
    TOOL_CANCELLED,
    TOOL_CRASHED,
    TOOL_ERROR,
    TOOL_TIMEOUT,
    Failure,
    failure,
)
from app.executor.attempts import (
    BACKOFF_S_MAX,
    BACKOFF_S_MIN,
    CALLS_PER_RETRY,
    RESERVE,
    RESERVE_S,
    RETRIES_MAX,
    SAVED_MAX,
    TENANTS_MAX,
    Retries,
)
from app.tools.tool import ToolSpec

FAR = 1e9
"""A deadline that nothing reaches."""

TENANT = "one"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def retryable(retry_after_ms: int | None = None) -> Failure:
    return Failure("BUSY", TOOL_ERROR.category, "busy", True, retry_after_ms)


def retries(declared: int = 3, *, always: bool = True, chance: float = 0.5, clock: Clock | None = None) -> Retries:
    return Retries(declared, always=always, clock=clock or Clock(), chance=lambda: chance)


def spec(**declared: object) -> ToolSpec:
    return ToolSpec(id="probe", name="Probe", description="Probes.", **declared)  # type: ignore[arg-type]


def test_a_tool_that_declares_no_retries_has_nothing_to_ask() -> None:
    assert Retries.of(spec(idempotent=True)) is None


@pytest.mark.parametrize(
    ("declared", "has_key", "repeated"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"idempotent": True}, False, True),
        ({"read_only": True}, False, True),
        ({"destructive": True}, False, False),
        ({"destructive": True}, True, True),
    ],
)
def test_a_run_is_repeated_only_where_a_repeat_does_no_harm(
    declared: dict[str, bool], has_key: bool, repeated: bool
) -> None:
    of_tool = Retries.of(spec(retries=1, **declared))
    assert of_tool is not None
    assert (of_tool.wait_s(retryable(), TENANT, attempts=1, deadline=FAR, has_key=has_key) is not None) is repeated


@pytest.mark.parametrize(
    "stands",
    [
        Failure("NO_SUCH_CITY", TOOL_ERROR.category, "no such city", False),
        failure(TOOL_TIMEOUT, "out of time"),
        failure(TOOL_CANCELLED, "cancelled"),
        failure(TOOL_CRASHED, "crashed"),
        failure(RESULT_TOO_LARGE, "too large"),
    ],
)
def test_a_failure_that_a_repeat_cannot_mend_stands(stands: Failure) -> None:
    assert retries().wait_s(stands, TENANT, attempts=1, deadline=FAR) is None


def test_a_tool_is_tried_as_often_as_it_declares_and_once_more() -> None:
    of_tool = retries(2)
    waits = [of_tool.wait_s(retryable(), TENANT, attempts=attempts, deadline=FAR) for attempts in (1, 2, 3)]
    assert waits[0] is not None and waits[1] is not None and waits[2] is None


def test_no_tool_is_tried_without_end_whatever_it_declares() -> None:
    of_tool = retries(1_000_000)
    for _ in range(SAVED_MAX * CALLS_PER_RETRY):
        of_tool.begin(TENANT)
    assert of_tool.wait_s(retryable(), TENANT, attempts=RETRIES_MAX, deadline=FAR) is not None
    assert of_tool.wait_s(retryable(), TENANT, attempts=RETRIES_MAX + 1, deadline=FAR) is None


@given(st.integers(1, RETRIES_MAX), st.floats(0, 1, exclude_max=True))
def test_the_wait_is_drawn_from_all_of_a_time_that_doubles_up_to_a_cap(attempts: int, chance: float) -> None:
    wait_s = retries(RETRIES_MAX, chance=chance).wait_s(retryable(), TENANT, attempts=attempts, deadline=FAR)
    assert wait_s == pytest.approx(chance * min(BACKOFF_S_MAX, BACKOFF_S_MIN * 2 ** (attempts - 1)))


def test_the_tool_is_not_asked_again_before_it_said() -> None:
    assert retries(chance=0.0).wait_s(retryable(700), TENANT, attempts=1, deadline=FAR) == pytest.approx(0.7)
    assert retries(chance=0.5).wait_s(retryable(700), TENANT, attempts=1, deadline=FAR) == pytest.approx(0.75)


@given(st.floats(0, 5), st.integers(0, 5_000), st.floats(0, 1, exclude_max=True))
def test_a_wait_that_does_not_fit_into_the_deadline_is_not_begun_and_costs_nothing(
    left_s: float, retry_after_ms: int, chance: float
) -> None:
    clock = Clock()
    of_tool = retries(chance=chance, clock=clock)
    wait_s = of_tool.wait_s(retryable(retry_after_ms), TENANT, attempts=1, deadline=clock.now + left_s)
    if wait_s is None:
        assert chance * BACKOFF_S_MIN + retry_after_ms / 1e3 > left_s - 0.03
        assert spent(of_tool) == RESERVE
    else:
        assert wait_s < left_s


def test_where_everything_fails_a_tenth_of_the_calls_is_repeated() -> None:
    of_tool = retries()
    repeated = 0
    for _ in range(10_000):
        of_tool.begin(TENANT)
        attempts = count(1)
        while of_tool.wait_s(retryable(), TENANT, attempts=next(attempts), deadline=FAR) is not None:
            repeated += 1
    assert 10_000 // CALLS_PER_RETRY <= repeated <= 10_000 // CALLS_PER_RETRY + RESERVE


def spent(of_tool: Retries) -> int:
    """How many retries are left; takes them."""
    return next(n for n in count() if of_tool.wait_s(retryable(), TENANT, attempts=1, deadline=FAR) is None)


def test_what_fails_for_one_tenant_leaves_the_others_their_retries() -> None:
    of_tool = retries(1)
    got = {"failing": 0, "other": 0}
    for number in range(2_000):
        tenant = "other" if number % 20 == 0 else "failing"
        of_tool.begin(tenant)
        if tenant == "failing" or number % 400 == 0:  # of the other one, each twentieth
            got[tenant] += of_tool.wait_s(retryable(), tenant, attempts=1, deadline=FAR) is not None
    assert got["failing"] == pytest.approx(1_900 / CALLS_PER_RETRY, abs=SAVED_MAX)
    assert got["other"] == 5


def test_whose_part_is_counted_is_bounded_and_so_is_what_all_of_them_get() -> None:
    of_tool = retries(1)
    tenants = [str(number) for number in range(2 * TENANTS_MAX)]
    repeated = 0
    for tenant in tenants * 10:
        of_tool.begin(tenant)
        repeated += of_tool.wait_s(retryable(), tenant, attempts=1, deadline=FAR) is not None
    assert repeated <= 20 * TENANTS_MAX / CALLS_PER_RETRY + RESERVE
    assert len(of_tool._of_tenants) == TENANTS_MAX


def test_a_good_hour_saves_up_no_storm() -> None:
    of_tool = retries()
    for _ in range(100_000):
        of_tool.begin(TENANT)
    assert spent(of_tool) == SAVED_MAX


def test_a_tool_that_is_called_seldom_has_its_reserve_back_after_a_while() -> None:
    clock = Clock()
    of_tool = retries(clock=clock)
    assert spent(of_tool) == RESERVE
    clock.now += RESERVE_S + 0.1
    assert spent(of_tool) == 1
    clock.now += 100 * RESERVE_S
    assert spent(of_tool) == RESERVE, "time gives back the reserve and no more"


@given(st.lists(st.tuples(st.sampled_from(["call", "fail", "wait"]), st.floats(0, 30)), max_size=200))
def test_no_order_of_calls_and_failures_gets_past_the_budget(steps: list[tuple[str, float]]) -> None:
    clock = Clock()
    of_tool = retries(clock=clock)
    calls = repeated = 0
    began = clock.now
    for step, seconds in steps:
        if step == "wait":
            clock.now += seconds
        elif step == "call":
            of_tool.begin(TENANT)
            calls += 1
        else:
            repeated += of_tool.wait_s(retryable(), TENANT, attempts=1, deadline=FAR) is not None
    assert repeated <= calls / CALLS_PER_RETRY + RESERVE + (clock.now - began) / RESERVE_S + 1e-6


def test_the_spread_is_chance_where_nobody_says_otherwise() -> None:
    of_tool = Retries(3, always=True)
    for _ in range(100):
        of_tool.begin(TENANT)
    random.seed(1)
    waits = {of_tool.wait_s(retryable(), TENANT, attempts=3, deadline=FAR) for _ in range(5)}
    assert len(waits) == 5
