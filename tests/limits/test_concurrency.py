"""Slots: a limit, a bounded queue in order of arrival, a bounded patience, and no slot ever lost."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
import uvloop
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from app.errors import OVERLOADED, Overloaded
from app.limits.concurrency import QUEUE_PATIENCE_S, Slots

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
    assert refused.value.retry_after_ms == QUEUE_PATIENCE_S * 1000
    assert (slots.running, slots.queued) == (1, 0)


def test_as_many_may_wait_as_may_run_unless_it_is_said_otherwise() -> None:
    assert Slots(7).queue_max == 7
    assert Slots(7, queue_max=3).queue_max == 3


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
