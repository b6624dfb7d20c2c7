"""Slots: a limit, a bounded queue in order of arrival, a bounded patience, and no slot ever lost.

What holds between tenants is in test_fairness.py.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Coroutine
from typing import Any

import pytest
import uvloop
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from app.errors import OVERLOADED, Overloaded
from app.limits.concurrency import QUEUE_PATIENCE_S, Slots, SlotTable, release_all, take_all_now

pytestmark = pytest.mark.anyio

LONG_S = 60.0


async def wait_for_slot(slots: Slots, patience_s: float = LONG_S) -> None:
    """What the executor does."""
    if not slots.take_now():
        await slots.take(slots.wait(), patience_s)


async def turn() -> None:
    """Let everything that is ready run."""
    for _ in range(3):
        await asyncio.sleep(0)


async def test_as_many_as_the_limit_run_and_the_rest_wait_in_their_order() -> None:
    slots = Slots(2)
    order: list[int] = []

    async def caller(number: int) -> None:
        await wait_for_slot(slots)
        order.append(number)

    assert slots.take_now() and slots.take_now() and not slots.take_now()
    callers = [asyncio.create_task(caller(number)) for number in range(2)]
    await turn()
    assert (slots.running, slots.queued, order) == (2, 2, [])
    slots.release()
    assert not slots.take_now(), "a slot that came free is its next owner's already"
    await turn()
    assert (slots.running, slots.queued, order) == (2, 1, [0])
    slots.release()
    await asyncio.wait(callers)
    assert (slots.running, slots.queued, order) == (2, 0, [0, 1])
    slots.release()
    slots.release()
    assert slots.running == 0


async def test_a_full_queue_refuses_at_once_and_says_when_to_try_again() -> None:
    slots = Slots(1, queue_max=0)
    assert slots.take_now()
    with pytest.raises(Overloaded) as refused:
        slots.wait()
    assert refused.value.kind is OVERLOADED
    assert refused.value.retry_after_ms and refused.value.retry_after_ms >= QUEUE_PATIENCE_S * 1000
    assert (slots.running, slots.queued) == (1, 0)


def test_as_many_may_wait_as_may_run_unless_it_is_said_otherwise() -> None:
    assert Slots(7).queue_max == 7
    assert Slots(7, queue_max=3).queue_max == 3


async def test_in_a_flood_a_tenant_does_not_wait_behind_itself_and_tenants_are_served_in_turn() -> None:
    slots = Slots(2)
    assert slots.take_now() and slots.take_now()
    slots.flooded = True
    first = slots.wait("one")  # nobody was refused yet
    with pytest.raises(Overloaded, match="No slot is free"):
        slots.wait("one")
    second = slots.wait("two")
    with pytest.raises(Overloaded):
        slots.wait("two")
    slots.release()
    slots.release()
    assert first.done() and second.done() and slots.queued == 0
    with pytest.raises(Overloaded):
        slots.wait("two")  # the last that was refused, and nobody else wants slots
    assert slots.no_place("one", 1.0) is None and slots.no_place("one", 1.0) is None, "asked twice, the same"
    slots.flooded = False
    assert slots.wait("two") and slots.queued == 1


@pytest.mark.parametrize("patience_s", [0.0, -1.0, 0.01])
async def test_patience_ends_the_wait_and_leaves_the_place_in_the_queue(patience_s: float) -> None:
    slots = Slots(1)
    assert slots.take_now()
    with pytest.raises(Overloaded) as refused:
        await slots.take(slots.wait(), patience_s)
    assert refused.value.retry_after_ms
    assert (slots.running, slots.queued) == (1, 0)
    slots.release()
    assert slots.running == 0


async def test_who_lost_patience_has_no_place_any_more_before_it_wakes() -> None:
    slots = Slots(1)
    assert slots.take_now()
    place = slots.wait()
    waiting = slots.take(place, 0.0)
    waiting.send(None)
    await asyncio.wait({place})
    assert slots.queued == 0
    with pytest.raises(Overloaded):
        waiting.send(None)
    assert (slots.running, slots.queued) == (1, 0)


async def test_a_slot_that_comes_with_the_cancellation_goes_to_the_next() -> None:
    slots = Slots(1, queue_max=2)
    assert slots.take_now()
    first, second = (asyncio.create_task(wait_for_slot(slots)) for _ in range(2))
    await turn()
    slots.release()
    first.cancel()
    await turn()
    assert first.cancelled() and second.done() and second.exception() is None
    assert (slots.running, slots.queued) == (1, 0)


@pytest.mark.parametrize("turns", range(5))
async def test_a_slot_that_comes_free_around_the_tick_of_the_expiry_is_not_lost(turns: int) -> None:
    slots = Slots(1)
    assert slots.take_now()
    waiting = slots.wait()
    expired = asyncio.create_task(slots.take(waiting, 0.0))
    for _ in range(turns):
        await asyncio.sleep(0)
    slots.release()
    await asyncio.wait({expired})
    if expired.exception() is None:
        slots.release()
    assert (slots.running, slots.queued) == (0, 0)
    assert slots.take_now()


@pytest.mark.parametrize("queue_max", [0, 1])
async def test_a_wait_that_begins_while_a_slot_is_free_has_it_at_once(queue_max: int) -> None:
    slots = Slots(1, queue_max)
    await slots.take(slots.wait(), LONG_S)
    assert (slots.running, slots.queued, slots.take_now()) == (1, 0, False)
    slots.release()
    assert slots.running == 0


async def test_a_wait_that_is_closed_and_not_cancelled_leaves_its_place_too() -> None:
    slots = Slots(1)
    assert slots.take_now()
    waiting = slots.take(slots.wait(), LONG_S)
    waiting.send(None)
    assert slots.queued == 1
    waiting.close()
    assert slots.queued == 0
    slots.release()
    assert slots.running == 0


async def test_a_call_that_is_cancelled_before_it_begins_to_wait_leaves_nothing() -> None:
    """tools.cancel that came first: the turn is cancelled between `wait` and `take`."""
    slots = Slots(1)
    assert slots.take_now()
    cancelled = slots.wait()
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await slots.take(cancelled, LONG_S)
    assert (slots.running, slots.queued) == (1, 0)
    slots.release()
    assert slots.running == 0


class SlotsMachine(RuleBasedStateMachine):
    """Slots against a model that is two lists: who holds a slot, and who waits, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = uvloop.new_event_loop()
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self.holding: list[int] = []
        self.waiting: list[int] = []
        self.got: list[int] = []
        self.expected: list[int] = []
        self.number = 0

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        self.loop.run_until_complete(work)

    @initialize(limit=st.integers(1, 3), queue_max=st.integers(0, 3))
    def begin(self, limit: int, queue_max: int) -> None:
        self.slots = Slots(limit, queue_max)

    async def hold(self, number: int) -> None:
        await wait_for_slot(self.slots)
        self.got.append(number)

    def model_grants(self) -> None:
        while self.waiting and len(self.holding) < self.slots.limit:
            self.holding.append(self.waiting.pop(0))
            self.expected.append(self.holding[-1])

    @rule()
    def arrive(self) -> None:
        number = self.number = self.number + 1
        task = self.tasks[number] = self.loop.create_task(self.hold(number))
        if len(self.holding) < self.slots.limit or len(self.waiting) < self.slots.queue_max:
            self.waiting.append(number)
            self.model_grants()
            self.run(turn())
            assert not task.done() or task.exception() is None
        else:
            self.run(turn())
            assert isinstance(task.exception(), Overloaded)

    @precondition(lambda self: self.holding)
    @rule(which=st.integers(0, 100))
    def leave(self, which: int) -> None:
        self.holding.pop(which % len(self.holding))
        self.slots.release()
        self.model_grants()
        self.run(turn())

    @precondition(lambda self: self.waiting)
    @rule(which=st.integers(0, 100))
    def give_up(self, which: int) -> None:
        self.tasks[self.waiting.pop(which % len(self.waiting))].cancel()
        self.run(turn())

    @rule(limit=st.integers(1, 4))
    def resize(self, limit: int) -> None:
        """Calls that run beyond it run to their end; those that wait get what is new at once."""
        self.slots.resize(limit)
        self.model_grants()
        self.run(turn())

    @precondition(lambda self: self.holding and self.waiting)
    @rule()
    def leave_and_give_up_in_one_tick(self) -> None:
        """The slot is given to a waiter that is cancelled before it wakes."""
        self.holding.pop()
        self.slots.release()
        self.tasks[self.waiting.pop(0)].cancel()
        self.model_grants()
        self.run(turn())

    @invariant()
    def agrees_with_the_model(self) -> None:
        if self.number:
            assert (self.slots.running, self.slots.queued) == (len(self.holding), len(self.waiting))
            assert self.got == self.expected, "in order of arrival"

    def teardown(self) -> None:
        for number in self.waiting:
            self.tasks[number].cancel()
        self.run(turn())
        for _ in self.holding:
            self.slots.release()
        if self.number:
            assert (self.slots.running, self.slots.queued) == (0, 0)
        self.loop.close()


TestSlotsMachine = SlotsMachine.TestCase
TestSlotsMachine.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


class Clock:
    """Time as the test says."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


async def told_ms(slots: Slots) -> int:
    """What a call is told that the full queue refuses."""
    with pytest.raises(Overloaded) as refused:
        slots.wait()
    assert refused.value.retry_after_ms is not None
    return refused.value.retry_after_ms


async def filled(limit: int, queue_max: int, clock: Clock) -> tuple[Slots, list[asyncio.Future[None]]]:
    slots = Slots(limit, queue_max, clock)
    assert all(slots.take_now() for _ in range(limit))
    return slots, [slots.wait() for _ in range(queue_max)]


async def served_one_by_one(slots: Slots, count: int, every_s: float, clock: Clock) -> None:
    """So many slots come free, one after each interval, and the queue fills up again."""
    for _ in range(count):
        clock.now_s += every_s
        slots.release()
        slots.wait()


@pytest.mark.parametrize(("every_s", "queue_max"), [(0.01, 20), (0.05, 39), (0.1, 9), (0.2, 15)])
async def test_a_refused_call_is_told_how_long_the_queue_takes_at_the_pace_that_is_seen(
    every_s: float, queue_max: int
) -> None:
    clock = Clock()
    slots, _ = await filled(10, queue_max, clock)
    await served_one_by_one(slots, 100, every_s, clock)
    takes_ms = (queue_max + 1) * every_s * 1000
    assert 0.99 * takes_ms <= await told_ms(slots) <= 1.26 * takes_ms


async def test_a_pace_that_changes_is_followed() -> None:
    clock = Clock()
    slots, _ = await filled(10, 9, clock)
    for every_s in (0.01, 0.3, 0.02):
        await served_one_by_one(slots, 100, every_s, clock)
        assert 9_900 * every_s <= await told_ms(slots) <= 12_600 * every_s


async def test_time_in_which_slots_were_free_does_not_count_as_slow() -> None:
    clock = Clock()
    slots, turns = await filled(10, 9, clock)
    await served_one_by_one(slots, 100, 0.01, clock)
    await told_ms(slots)
    for _ in range(10 + len(turns)):
        slots.release()
    assert (slots.running, slots.queued) == (0, 0)
    clock.now_s += 3600
    assert all(slots.take_now() for _ in range(10))
    for _ in range(9):
        slots.wait()
    assert await told_ms(slots) <= 130


async def test_where_nothing_comes_free_the_wait_that_is_told_grows_with_the_time() -> None:
    """Also when those who wait give up and others come: the slots stay taken in between."""
    clock = Clock()
    slots, (turn_,) = await filled(1, 1, clock)
    first = await told_ms(slots)
    clock.now_s += 1.5
    turn_.cancel()
    with pytest.raises(asyncio.CancelledError):
        await slots.take(turn_, LONG_S)
    slots.wait()
    assert await told_ms(slots) >= 3000 > first


@pytest.mark.parametrize(("every_s", "bounds"), [(0.001, (50, 63)), (60.0, (4000, 5000))])
async def test_what_is_told_is_bounded_and_spread_within_its_bounds(every_s: float, bounds: tuple[int, int]) -> None:
    clock = Clock()
    slots, _ = await filled(10, 10, clock)
    await served_one_by_one(slots, 1000, every_s, clock)
    told = [await told_ms(slots) for _ in range(100)]
    assert bounds[0] <= min(told) and max(told) <= bounds[1]
    assert len(set(told)) >= 10, "refused together, not back together"


async def test_who_would_wait_too_long_is_refused_on_arrival() -> None:
    clock = Clock()
    slots, _ = await filled(1, 100, clock)
    slots.queue_max = 1000
    await served_one_by_one(slots, 10, 0.01, clock)
    assert slots.expected_wait_s() == pytest.approx(0.01 * (slots.queued + 1))
    with pytest.raises(Overloaded) as refused:
        slots.wait(patience_s=0.5)
    assert "would" in str(refused.value) and refused.value.retry_after_ms
    assert slots.wait(patience_s=1.5) in slots._waiting.turns
    assert slots.wait("other tenant", patience_s=0.5) in slots._waiting.turns, "it is served in turn, not last"


async def test_nobody_is_refused_on_arrival_by_a_guess() -> None:
    """Neither before a pace is seen, nor by that of an earlier queue."""
    clock = Clock()
    slots, _ = await filled(1, 5, clock)
    assert slots.expected_wait_s() == 0.0
    await served_one_by_one(slots, 5, 2.0, clock)
    assert slots.expected_wait_s() > 1.0
    while slots.running:
        slots.release()
    assert slots.take_now()
    slots.wait(patience_s=0.1)
    slots.wait(patience_s=0.1)
    assert slots.queued == 2


def test_a_key_has_one_limit_of_its_own() -> None:
    table = SlotTable()
    free, paid = table.of("free", 1), table.of("paid", 2)
    assert free.take_now() and not table.of("free", 1).take_now()
    assert paid.take_now() and table.of("paid", 2).take_now() and not table.of("paid", 2).take_now()
    assert len(table) == 2


def test_a_key_is_forgotten_once_nobody_runs_waits_or_is_about_to() -> None:
    table = SlotTable()
    for number in range(10_000):
        slots = table.of(f"tenant-{number}", 1)
        assert slots.take_now()
        slots.release()
    assert len(table) == 1
    in_hand = slots
    del slots
    assert table.of("tenant-9999", 1) is in_hand, "still in hand, though nothing runs in it"
    del in_hand
    assert len(table) == 0


async def test_a_key_outlives_whoever_made_it_while_others_run_or_wait() -> None:
    table = SlotTable()

    async def call(leave: asyncio.Event) -> None:
        slots = table.of("key", 1)
        if not slots.take_now():
            await slots.take(slots.wait("tenant"), LONG_S)
        await leave.wait()
        slots.release()

    leave = [asyncio.Event() for _ in range(3)]
    first, second, third = (asyncio.create_task(call(each)) for each in leave)
    await turn()
    assert (len(table), table.queued) == (1, 1), "as many may wait as may run: the third is refused"
    assert isinstance(third.exception(), Overloaded)
    leave[0].set()
    await asyncio.wait({first})
    assert (len(table), table.queued) == (1, 0)
    second.cancel()
    await asyncio.wait({second})
    del third, first, second
    gc.collect()  # the refusal's traceback holds a frame
    assert (len(table), table.queued) == (0, 0)


def test_several_are_taken_together_or_not_at_all() -> None:
    tool, tenant, process = Slots(3), Slots(1), Slots(3)
    several = (tool, tenant, process)
    assert take_all_now(several)
    assert [each.running for each in several] == [1, 1, 1]
    assert not take_all_now(several), "the one in the middle is taken"
    assert [each.running for each in several] == [1, 1, 1]
    release_all(several)
    assert [each.running for each in several] == [0, 0, 0]
    assert take_all_now(())


async def test_released_together_each_goes_to_who_waits_for_it() -> None:
    tool, process = Slots(1), Slots(1)
    assert take_all_now((tool, process))
    turns = tool.wait(), process.wait()
    release_all((tool, process))
    assert all(each.done() for each in turns)
    assert (tool.running, process.running, tool.queued, process.queued) == (1, 1, 0, 0)
