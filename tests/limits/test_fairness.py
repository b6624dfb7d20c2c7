"""Slots between tenants: served in turn, made room for when the queue is full, nothing kept of who has left, and each
step as short with many waiting as with few."""

from __future__ import annotations

import asyncio
import gc
import sys
import weakref
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from app import fairness
from app.errors import OVERLOADED, Overloaded
from app.limits import concurrency
from app.limits.concurrency import Slots

pytestmark = pytest.mark.anyio

LONG_S = 60.0


async def settle() -> None:
    """Let everything that is ready run."""
    for _ in range(4):
        await asyncio.sleep(0)


def taken(limit: int, queue_max: int = 10_000) -> Slots:
    slots = Slots(limit, queue_max)
    assert all(slots.take_now() for _ in range(limit))
    return slots


def releases_until(slots: Slots, turn: asyncio.Future[None]) -> int:
    """How many slots come free until this turn has one."""
    count = 0
    while not turn.done():
        assert slots.queued
        slots.release()
        count += 1
    turn.result()
    return count


def served(slots: Slots, turns: dict[str, asyncio.Future[None]]) -> list[str]:
    """The names of these turns in the order in which slots come to them."""
    order: list[str] = []
    while slots.queued:
        slots.release()
        order += [name for name, turn in turns.items() if turn.done() and name not in order]
    return order


@pytest.mark.parametrize("limit", [1, 4, 100])
async def test_a_flood_delays_another_tenants_single_call_by_one_release(limit: int) -> None:
    slots = taken(limit)
    for _ in range(1000):
        slots.wait("flood")
    assert releases_until(slots, slots.wait("other")) <= 2
    assert slots.queued >= 998


@pytest.mark.parametrize("tenants", [1, 2, 10, 50])
async def test_a_single_call_waits_for_one_release_of_each_tenant_that_waits(tenants: int) -> None:
    slots = taken(3)
    for number in range(1000):
        slots.wait(f"flood-{number % tenants}")
    for _ in range(7):
        slots.release()
    assert releases_until(slots, slots.wait("other")) == tenants + 1


async def test_calls_under_a_flood_that_never_ends_are_served_one_after_the_other() -> None:
    """As tasks, the way the executor waits: the flood keeps its queue full, and the other tenant calls 20 times."""
    slots = taken(2, queue_max=50)
    releases = 0

    async def flood() -> None:
        await slots.take(slots.wait("flood"), LONG_S)

    async def other() -> list[int]:
        waited = []
        for _ in range(20):
            before = releases
            await slots.take(slots.wait("other"), LONG_S)
            waited.append(releases - before)
        return waited

    flooding = [asyncio.create_task(flood()) for _ in range(50)]
    await settle()
    calls = asyncio.create_task(other())
    while not calls.done():
        await settle()
        flooding += [asyncio.create_task(flood()) for _ in range(50 - slots.queued)]
        await settle()
        assert slots.queued >= 49
        slots.release()
        releases += 1
    assert max(calls.result()) <= 3
    for each in flooding:
        each.cancel()
    await asyncio.wait(flooding)
    refused = sum(not each.cancelled() and each.exception() is not None for each in flooding)
    assert 1 <= refused <= 20, "for each of the other's calls at most one of the flood made room"
    assert slots.queued == 0


async def test_three_tenants_are_served_exactly_in_turn() -> None:
    slots = taken(1)
    names = ["a1", "a2", "a3", "a4", "b1", "b2", "c1", "a5", "b3"]
    turns = {name: slots.wait(name[0]) for name in names}
    assert served(slots, turns) == ["a1", "b1", "c1", "a2", "b2", "a3", "b3", "a4", "a5"]


async def test_a_tenant_that_comes_back_is_served_after_those_who_wait() -> None:
    slots = taken(1)
    turns = {name: slots.wait(name[0]) for name in ("a1", "b1", "c1", "b2", "c2")}
    slots.release()
    turns["a2"] = slots.wait("a")
    assert served(slots, turns) == ["a1", "b1", "c1", "a2", "b2", "c2"]


async def test_a_cancelled_call_costs_its_tenant_neither_its_turn_nor_another() -> None:
    slots = taken(1)
    turns = {name: slots.wait(name[0]) for name in ("a1", "a2", "b1", "c1", "a3", "b2")}
    turns.pop("a1").cancel()  # in this very tick: its place is still there when the slot comes
    turns.pop("c1").cancel()  # the only one of its tenant
    assert served(slots, turns) == ["a2", "b1", "a3", "b2"]
    assert slots.queued == 0


async def test_who_gives_no_tenant_is_one_tenant_in_order_of_arrival() -> None:
    slots = taken(1)
    turns = {str(number): slots.wait() for number in range(5)}
    assert served(slots, turns) == ["0", "1", "2", "3", "4"]


def refused(turn: asyncio.Future[None]) -> bool:
    if not turn.done():
        return False
    error = turn.exception()
    assert isinstance(error, Overloaded) and error.kind is OVERLOADED and error.retry_after_ms
    return True


async def test_in_a_full_queue_the_newest_of_the_longest_makes_room_for_who_has_less() -> None:
    slots = taken(1, queue_max=6)
    turns = {name: slots.wait(name[0]) for name in ("a1", "b1", "a2", "b2", "a3", "a4")}
    turns["c1"] = slots.wait("c")
    assert refused(turns.pop("a4")) and slots.queued == 6
    turns["c2"] = slots.wait("c")
    assert refused(turns.pop("a3")) and slots.queued == 6
    for tenant in "abc":
        with pytest.raises(Overloaded):
            slots.wait(tenant)
    assert not any(turn.done() for turn in turns.values())
    assert served(slots, turns) == ["a1", "b1", "c1", "a2", "b2", "c2"]


async def test_a_flood_in_a_full_queue_refuses_itself() -> None:
    slots = taken(1, queue_max=100)
    first = slots.wait("other")
    flood = [slots.wait("flood") for _ in range(99)]
    for _ in range(1000):
        with pytest.raises(Overloaded):
            slots.wait("flood")
    second = slots.wait("other")
    assert refused(flood.pop()) and not any(turn.done() for turn in flood) and slots.queued == 100
    assert releases_until(slots, first) == 1 and releases_until(slots, second) == 2


async def test_a_swap_of_equals_refuses_nobody_who_waits() -> None:
    """A tenant's only call is never refused for another's, nor do two tenants drive each other out by turns."""
    slots = taken(1, queue_max=3)
    turns = [slots.wait(tenant) for tenant in ("a", "b", "b")]
    for tenant in ("a", "b"):
        with pytest.raises(Overloaded):
            slots.wait(tenant)
    assert not any(turn.done() for turn in turns)
    third = slots.wait("c")
    assert refused(turns.pop()) and not third.done()
    for tenant in ("a", "b", "c", "d"):
        with pytest.raises(Overloaded):
            slots.wait(tenant)
    assert slots.queued == 3 and not any(turn.done() for turn in (*turns, third))


@pytest.mark.parametrize("cancel_first", [True, False])
async def test_who_makes_room_and_is_cancelled_in_one_tick_leaves_nothing(cancel_first: bool) -> None:
    slots = taken(1, queue_max=2)
    stays = slots.wait("a")
    newest = slots.wait("a")
    leaving = asyncio.create_task(slots.take(newest, LONG_S))
    await settle()
    if cancel_first:
        leaving.cancel()
    arrived = slots.wait("b")
    leaving.cancel()
    await asyncio.wait({leaving})
    assert leaving.cancelled()
    assert slots.queued == 2 and not arrived.done() and not stays.done()
    assert releases_until(slots, arrived) == 2
    slots.release()
    assert (slots.running, slots.queued) == (0, 0)


class Tenant(str):
    """A name that can be watched: a plain string cannot be referred to weakly."""

    __slots__ = ("__weakref__",)


@pytest.mark.parametrize("leaves", ["served", "cancelled", "expired", "made room"])
async def test_nothing_is_kept_of_a_tenant_of_whom_nobody_waits(leaves: str) -> None:
    slots = taken(1, queue_max=3)
    patience_s = 0.0 if leaves == "expired" else LONG_S
    tenants = [Tenant("tenant") for _ in range(3)]
    traces = [weakref.ref(each) for each in tenants]
    calls = [asyncio.create_task(slots.take(slots.wait(each), patience_s)) for each in tenants]
    del tenants
    await settle()
    if leaves == "cancelled":
        assert [each.cancel() for each in calls] == [True] * 3
    if leaves == "made room":
        slots.wait("x")
        slots.wait("y")
    for _ in range(3):
        slots.release()
    ends = await asyncio.gather(*calls, return_exceptions=True)
    assert slots.queued == 0 and len(ends) == 3
    del calls, ends
    gc.collect()
    assert [trace() for trace in traces] == [None, None, None]


class VirtualLoop(asyncio.SelectorEventLoop):
    """A real event loop whose time passes when the test says so."""

    now_s = 0.0

    def time(self) -> float:
        return self.now_s


class FairModel:
    """What Slots promises, in lists: who holds a slot, and who waits, tenants in the order of their service."""

    def __init__(self, limit: int, queue_max: int) -> None:
        self.limit = limit
        self.queue_max = queue_max
        self.holding: list[int] = []
        self.queues: list[tuple[str, list[int]]] = []
        self.granted: list[int] = []
        self.came_to_length: dict[str, int] = {}
        self.steps = 0

    @property
    def waiting(self) -> list[int]:
        return [number for _, queue in self.queues for number in queue]

    def queue_of(self, tenant: str) -> list[int]:
        return next((queue for name, queue in self.queues if name == tenant), [])

    def changed(self, tenant: str) -> None:
        self.steps += 1
        self.came_to_length[tenant] = self.steps
        self.queues = [(name, queue) for name, queue in self.queues if queue]

    def arrive(self, number: int, tenant: str) -> int | None:
        """The number of the call that is refused, if one is."""
        refused = None
        if len(self.holding) < self.limit:
            self.holding.append(number)
            self.granted.append(number)
            return None
        if len(self.waiting) >= self.queue_max:
            if not self.queues:
                return number
            longest, queue = max(self.queues, key=lambda each: (len(each[1]), self.came_to_length[each[0]]))
            if len(self.queue_of(tenant)) + 1 >= len(queue):
                return number
            refused = queue.pop()
            self.changed(longest)
        if not self.queue_of(tenant):
            self.queues.append((tenant, []))
        self.queue_of(tenant).append(number)
        self.changed(tenant)
        return refused

    def remove(self, number: int) -> None:
        for tenant, queue in self.queues:
            if number in queue:
                queue.remove(number)
                self.changed(tenant)
                return

    def release(self, number: int) -> None:
        self.holding.remove(number)
        if self.queues:
            tenant, queue = self.queues.pop(0)
            self.queues.append((tenant, queue))
            self.holding.append(queue.pop(0))
            self.granted.append(self.holding[-1])
            self.changed(tenant)


class FairSlotsMachine(RuleBasedStateMachine):
    """Slots against the model, through arrivals, cancellations of both kinds, expiries and releases in any order, and
    of those that may meet in one tick of the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualLoop()
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self.turns: dict[int, asyncio.Future[None]] = {}
        self.expires_s: dict[int, float] = {}
        self.granted: list[int] = []
        self.ended: dict[int, type[BaseException]] = {}
        """How those ended, as the model says, that were given no slot or left it."""

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        self.loop.run_until_complete(work)

    @initialize(limit=st.integers(1, 3), queue_max=st.integers(0, 7))
    def begin(self, limit: int, queue_max: int) -> None:
        self.slots = Slots(limit, queue_max)
        self.model = FairModel(limit, queue_max)

    async def hold(self, number: int, tenant: str, patience_s: float) -> None:
        """What the executor does."""
        if not self.slots.take_now():
            turn = self.turns[number] = self.slots.wait(tenant)
            await self.slots.take(turn, patience_s)
        self.granted.append(number)

    @rule(tenant=st.sampled_from("abcd"), count=st.integers(1, 4), patience_s=st.sampled_from([0.5, 2.5, 60.0]))
    def arrive(self, tenant: str, count: int, patience_s: float) -> None:
        for _ in range(count):
            number = len(self.tasks)
            self.tasks[number] = self.loop.create_task(self.hold(number, tenant, patience_s))
            self.expires_s[number] = self.loop.now_s + patience_s
            refused = self.model.arrive(number, tenant)
            if refused is not None:
                self.ended[refused] = Overloaded
        self.run(settle())

    def released(self, which: int) -> None:
        self.model.release(self.model.holding[which % len(self.model.holding)])
        self.slots.release()

    def model_expires(self) -> None:
        for number in self.model.waiting:
            if self.expires_s[number] <= self.loop.now_s:
                self.model.remove(number)
                self.ended[number] = Overloaded

    @precondition(lambda self: self.model.holding)
    @rule(which=st.integers(0, 100), count=st.integers(1, 3))
    def release(self, which: int, count: int) -> None:
        for _ in range(min(count, len(self.model.holding))):
            self.released(which)
        self.run(settle())

    @precondition(lambda self: self.model.waiting)
    @rule(which=st.integers(0, 100), by_turn=st.booleans())
    def cancel(self, which: int, by_turn: bool) -> None:
        """The request's task is cancelled, or the call by tools.cancel, which ends what it waits for."""
        self.model_cancels(which, by_turn)
        self.run(settle())

    def model_cancels(self, which: int, by_turn: bool) -> None:
        number = self.model.waiting[which % len(self.model.waiting)]
        (self.turns if by_turn else self.tasks)[number].cancel()
        self.model.remove(number)
        self.ended[number] = asyncio.CancelledError

    @precondition(lambda self: self.model.waiting and self.model.holding)
    @rule(which=st.integers(0, 100), by_turn=st.booleans())
    def cancel_and_release_in_one_tick(self, which: int, by_turn: bool) -> None:
        self.model_cancels(which, by_turn)
        self.released(which)
        self.run(settle())

    @precondition(lambda self: self.model.waiting and self.model.holding)
    @rule(which=st.integers(0, 100))
    def release_and_cancel_who_got_it_in_one_tick(self, which: int) -> None:
        """It is cancelled before it wakes: the slot goes on to the next."""
        self.released(which)
        number = self.model.holding[-1]
        self.tasks[number].cancel()
        self.model.release(number)
        self.model.granted.remove(number)
        self.ended[number] = asyncio.CancelledError
        self.run(settle())

    @rule(seconds=st.integers(1, 3))
    def pass_time(self, seconds: int) -> None:
        self.loop.now_s += seconds
        self.model_expires()
        self.run(settle())

    @precondition(lambda self: self.model.waiting and self.model.holding)
    @rule(seconds=st.integers(1, 3), which=st.integers(0, 100))
    def release_and_pass_time_in_one_tick(self, seconds: int, which: int) -> None:
        """Whoever the slot is given to has it, though its patience ends with the same tick."""
        self.loop.now_s += seconds
        self.released(which)
        self.model_expires()
        self.run(settle())

    @invariant()
    def agrees_with_the_model(self) -> None:
        if not hasattr(self, "slots"):
            return
        slots, model = self.slots, self.model
        assert slots.running <= slots.limit and slots.queued <= slots.queue_max
        assert (slots.running, slots.queued) == (len(model.holding), len(model.waiting)), "no slot and no place lost"
        assert slots.queued == 0 or slots.running == slots.limit, "nobody waits while a slot is free"
        assert self.granted == model.granted, "tenants in turn, each one's calls in order of arrival"
        waiting = model.waiting
        for number, task in self.tasks.items():
            assert task.done() == (number not in waiting)
            if task.done():
                assert how_it_ended(task) is self.ended.get(number)

    def teardown(self) -> None:
        if hasattr(self, "slots"):
            for number in self.model.waiting:
                self.tasks[number].cancel()
            self.run(settle())
            for _ in self.model.holding:
                self.slots.release()
            assert (self.slots.running, self.slots.queued) == (0, 0)
        self.loop.close()


def how_it_ended(task: asyncio.Task[None]) -> type[BaseException] | None:
    if task.cancelled():
        return asyncio.CancelledError
    error = task.exception()
    return None if error is None else type(error)


TestFairSlotsMachine = FairSlotsMachine.TestCase
TestFairSlotsMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


class CountedTurn(asyncio.Future[None]):
    """A future that counts how often one is compared with another: a search that no line of ours shows."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        CountedTurn.compared += 1
        return self is other

    __hash__ = asyncio.Future.__hash__


class CountingLoop(asyncio.SelectorEventLoop):
    def create_future(self) -> asyncio.Future[None]:
        return CountedTurn(loop=self)


class Steps:
    """Counts the lines of ours that run and the comparisons of turns; keeps the most of any one step."""

    def __init__(self) -> None:
        self.most = 0
        self.count = 0

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in (concurrency.__file__, fairness.__file__):
            return None
        self.count += event == "line"
        return self.trace

    @contextmanager
    def one(self) -> Iterator[None]:
        self.count, CountedTurn.compared = 0, 0
        before = sys.gettrace()
        sys.settrace(self.trace)
        try:
            yield
        finally:
            sys.settrace(before)
            self.most = max(self.most, self.count + CountedTurn.compared)


Wait = Coroutine[Any, Any, None]


def throw(wait: Wait) -> None:
    with pytest.raises(asyncio.CancelledError):
        wait.throw(asyncio.CancelledError())


def served_all(slots: Slots, waits: list[Wait], steps: Steps) -> None:
    while slots.queued:
        with steps.one():
            slots.release()
    for wait in waits:
        wait.close()


def cancelled_oldest_first(slots: Slots, waits: list[Wait], steps: Steps) -> None:
    for wait in waits:
        with steps.one():
            throw(wait)


def cancelled_newest_first(slots: Slots, waits: list[Wait], steps: Steps) -> None:
    cancelled_oldest_first(slots, waits[::-1], steps)


def refused_for_others(slots: Slots, waits: list[Wait], steps: Steps) -> None:
    for number in range(len(waits)):
        with steps.one():
            try:
                slots.wait(f"other-{number}").cancel()
            except Overloaded:
                pass  # where each has one already
    for wait in waits:
        wait.close()


WAYS = [served_all, cancelled_oldest_first, cancelled_newest_first, refused_for_others]


def most_steps(way: Callable[[Slots, list[Wait], Steps], None], waiting: int, tenants: int) -> tuple[int, int]:
    """The most of any one arrival, and of any one departure, with so many waiting."""
    arriving, leaving = Steps(), Steps()

    async def measured() -> None:
        slots = taken(1, queue_max=waiting)
        waits: list[Wait] = []
        for number in range(waiting):
            with arriving.one():
                waits.append(slots.take(slots.wait(f"tenant-{number % tenants}"), LONG_S))
                waits[-1].send(None)
        assert slots.queued == waiting
        way(slots, waits, leaving)

    loop = CountingLoop()
    try:
        loop.run_until_complete(measured())
    finally:
        loop.close()
    return arriving.most, leaving.most


@pytest.mark.parametrize("tenants", ["one", "ten", "all different"])
@pytest.mark.parametrize("way", WAYS)
def test_a_step_is_as_short_with_thousands_waiting_as_with_a_few(
    way: Callable[[Slots, list[Wait], Steps], None], tenants: str
) -> None:
    few, many = (most_steps(way, n, {"one": 1, "ten": 10}.get(tenants, n)) for n in (40, 2000))
    for with_few, with_many in zip(few, many, strict=True):
        assert 0 < with_few < 100 and with_many <= with_few + 2
