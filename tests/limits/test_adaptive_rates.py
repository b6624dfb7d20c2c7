"""Rates with `adaptive: true`: tightened by the tenth, over the same counter, in every store."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import RateLimited
from app.limits.admission import Admission, Asked, Grant, status
from app.limits.limit import STEPS, Limit
from app.limits.limits_file import LimitsFileError, read_policies
from app.limits.memory_store import MemoryStore
from app.limits.policy import Bound, Policies, Policy, Rate
from tests.limits.stores import DAY_US, HOUR_US, MINUTE_US, SECOND_US, Clock, Counters, daily, rate

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("quiet")]


@pytest.fixture
def admission(counters: Counters) -> Admission:
    """Over each store."""
    return Admission(Policies(()), counters.store)


async def grant(admission: Admission, bound: Bound, cost: int = 1) -> Grant | None:
    """As the executor does; None: refused. What is remembered of a refusal goes by the process's clock and not by the
    test's, so it is forgotten."""
    for limit in bound.limits:
        limit.over = limit.tightened(admission.step, cost).over = None
    try:
        outcome = admission.admit(bound, cost)
        return await outcome.settled() if isinstance(outcome, Asked) else outcome
    except RateLimited:
        return None


async def admitted(admission: Admission, bound: Bound, tries: int, cost: int = 1) -> int:
    return sum([await grant(admission, bound, cost) is not None for _ in range(tries)])


def adaptive(amount: int, period_us: int = HOUR_US, **options: object) -> Bound:
    """Of an hour: Redis forgets what is full again by its own clock, which a slow machine lets pass."""
    return Bound((rate(amount, period_us, step=STEPS, **options),), ())


@pytest.mark.parametrize("step", [1, 3, 7, 9, 10])
async def test_the_rate_and_its_burst_are_held_at_so_many_tenths(admission: Admission, clock: Clock, step: int) -> None:
    bound = adaptive(100, burst=20)
    admission.step = step
    assert await admitted(admission, bound, 25) == 20 * step / STEPS
    passed = 0
    for _ in range(40):
        clock.us += HOUR_US // 20
        passed += await admitted(admission, bound, 6)
    assert passed == pytest.approx(2 * 100 * step / STEPS, abs=1)


async def test_limits_that_do_not_adapt_are_asked_as_ever(admission: Admission) -> None:
    bound = Bound((rate(10), daily(100)), ())
    admission.step = 1
    assert not bound.adaptive
    assert await admitted(admission, bound, 12) == 10
    granted = await grant(admission, Bound((rate(10),), ()))
    assert granted is not None and granted.ask.limits[0].terms.burst == 10


async def test_beside_one_that_adapts_the_others_stay_as_they_are(admission: Admission) -> None:
    plain, tight = rate(6), rate(10, step=STEPS)
    bound = Bound((plain, tight), ())
    admission.step = 5
    assert await admitted(admission, bound, 12) == 5
    granted = await grant(admission, Bound((plain,), ()))
    assert granted is not None


async def test_what_could_pass_at_all_still_does(admission: Admission) -> None:
    admission.step = 1
    assert await admitted(admission, adaptive(5, burst=1), 3) == 1
    assert await admitted(admission, adaptive(5), 3, cost=5) == 1
    assert await admitted(admission, adaptive(5), 3, cost=6) == 0


async def test_a_refused_call_passes_after_the_wait_that_it_is_told(admission: Admission, clock: Clock) -> None:
    bound = adaptive(7, burst=4)
    admission.step = 3
    assert await admitted(admission, bound, 3) == 2
    with pytest.raises(RateLimited) as caught:
        outcome = admission.admit(bound, 1)
        await outcome.settled() if isinstance(outcome, Asked) else None
    assert caught.value.retry_after_ms
    clock.us += caught.value.retry_after_ms * 1_000
    assert await admitted(admission, bound, 1) == 1


async def test_a_counter_goes_on_when_the_factor_changes(admission: Admission, clock: Clock) -> None:
    bound = adaptive(10, MINUTE_US)
    assert await admitted(admission, bound, 10) == 10
    for step in (1, 5, 10):
        admission.step = step
        assert await admitted(admission, bound, 1) == 0, "what was spent is spent"
    clock.us += MINUTE_US
    assert await admitted(admission, bound, 11) == 10


async def test_what_was_spent_under_a_factor_is_given_back_whole(admission: Admission, clock: Clock) -> None:
    bound = adaptive(10, MINUTE_US)
    admission.step = 2
    for _ in range(20):
        granted = await grant(admission, bound)
        assert granted is not None
        granted.give_back()


async def test_the_status_shows_what_holds_and_its_factor(admission: Admission) -> None:
    bound = Bound((rate(100, MINUTE_US, name="tight", step=STEPS), rate(50, MINUTE_US, name="plain")), ())
    whole = status("echo", 1, await admission.look(bound.limits))["policies"]
    assert [(entry["limit"], entry["burst"], entry.get("factor")) for entry in whole] == [
        (100, 100, 1.0),
        (50, 50, None),
    ]
    admission.step = 4
    held = status("echo", 1, await admission.look(bound.limits))["policies"]
    assert [(entry["remaining"], entry.get("factor")) for entry in held] == [(40, 0.4), (50, None)]
    assert held[0]["limit"] / held[0]["window_seconds"] == pytest.approx(0.4 * 100 / 60)


async def test_the_status_is_for_calls_of_the_cost_of_the_tool(admission: Admission) -> None:
    bound = adaptive(10)
    admission.step = 1
    left = [one.remaining for one in (await admission.look(bound.limits, cost=7)).allowances()]
    assert left == [7] and await admitted(admission, bound, 2, cost=7) == 1


async def test_without_the_store_a_part_of_what_holds_is_kept_in_process() -> None:
    limit = rate(100, on_failure="local", replicas=2, step=STEPS)
    held = limit.tightened(4, 1)
    assert held.fallback.terms.burst == 20
    assert held.fallback.terms.period_us / held.fallback.terms.amount == pytest.approx(
        limit.terms.period_us / 100 * 2 / 0.4
    )


@given(
    st.integers(1, 1_000),
    st.sampled_from([SECOND_US, MINUTE_US, HOUR_US, DAY_US]),
    st.integers(1, 50),
    st.lists(st.tuples(st.integers(1, STEPS), st.integers(0, 3_600_000_000), st.integers(1, 5)), max_size=60),
)
async def test_however_the_factor_moves_no_more_pass_than_the_rate_says(
    amount: int, period_us: int, burst: int, moves: list[tuple[int, int, int]]
) -> None:
    clock = Clock()
    admission = Admission(Policies(()), MemoryStore(clock_us=clock))
    bound = adaptive(amount, period_us, burst=burst)
    began, passed = clock.us, 0
    for step, after_us, calls in moves:
        admission.step = step
        clock.us += after_us
        passed += await admitted(admission, bound, calls)
        assert passed <= burst + (clock.us - began) * amount / period_us + 1e-6


async def test_a_limit_keeps_what_it_needs_for_one_step_and_no_more() -> None:
    limit = rate(1_000, step=STEPS)
    for step in range(1, STEPS):
        for cost in range(1, 50):
            assert limit.tightened(step, cost) is limit.tightened(step, cost)
    assert len(limit._tightened[1]) == 1
    assert limit.tightened(STEPS, 1) is limit


def written(folder: Path, text: str) -> Path:
    path = folder / "limits.yaml"
    path.write_text(text)
    return path


async def test_adaptive_is_said_in_the_file_of_limits(tmp_path: Path) -> None:
    text = """
policies:
- {name: tight, rate: 10/second, adaptive: true}
- {name: plain, rate: 10/second, adaptive: false}
"""
    policies = read_policies(written(tmp_path, text))
    assert policies == (
        Policy(name="tight", rate=Rate(10, SECOND_US, 10), adaptive=True),
        Policy(name="plain", rate=Rate(10, SECOND_US, 10)),
    )
    limits: tuple[Limit, ...] = Policies(policies).bind("t", "s", "", "echo").limits
    assert [limit.terms.step for limit in limits] == [STEPS, None]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("adaptive: yes", "adaptive must be true or false, in these letters and without quotes"),
        ("adaptive: 'true'", "adaptive must be true or false, in these letters and without quotes"),
        ("adaptive: 1", "adaptive must be true or false, in these letters and without quotes"),
        ("adaptiv: true", "a policy has no 'adaptiv'; did you mean adaptive?"),
    ],
)
async def test_a_mistake_about_it_is_told_with_its_line(tmp_path: Path, line: str, reason: str) -> None:
    with pytest.raises(LimitsFileError) as caught:
        read_policies(written(tmp_path, f"policies:\n- name: a\n  rate: 1/second\n  {line}\n"))
    assert str(caught.value).endswith(f":4: {reason}")


@pytest.mark.parametrize("other", ["quota: {daily: 5}", "max_concurrent: 5"])
async def test_only_a_rate_can_adapt(tmp_path: Path, other: str) -> None:
    with pytest.raises(LimitsFileError, match=":4: adaptive needs a rate; quotas and slots do not follow the load"):
        read_policies(written(tmp_path, f"policies:\n- name: a\n  {other}\n  adaptive: true\n"))
