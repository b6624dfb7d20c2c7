"""Limits that follow the load: the algorithm, what is made of it, and the whole of it under simulated overload."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import Overloaded
from app.limits.adaptive import (
    DELAY_S_MAX,
    DELAY_S_MIN,
    FLOOD_SLOTS_MIN,
    FLOOR,
    IDLE_LOOKS,
    QUICK_LATELY_WINDOWS,
    QUICK_S,
    REFUSAL_S,
    REFUSING_PART,
    RELIEF_WINDOWS,
    RESERVE_PART,
    SAMPLE_S,
    SHEDDING_WORK_S,
    TOLERANCE,
    WINDOW_S,
    Flood,
    Gradient,
    LoadControl,
    Mode,
)
from app.limits.concurrency import QUEUE_PATIENCE_S, Slots, release_all, take_all_now
from app.limits.limit import STEPS
from tests.limits.virtual import VirtualLoop, run_virtually

TOLERATED_S = TOLERANCE * DELAY_S_MIN


# The algorithm


def test_the_limit_starts_at_its_ceiling_and_stays_there_while_nothing_is_late() -> None:
    gradient = Gradient(100)
    assert {gradient.on_sample(0.0005, in_flight, False) for in_flight in range(101)} == {100}


def test_delay_brings_the_limit_down_from_what_really_runs_and_never_below_the_floor() -> None:
    gradient = Gradient(1500)
    assert gradient.on_sample(0.1, 200, False) < 200
    for _ in range(100):
        gradient.on_sample(0.1, 200, True)
    assert FLOOR == gradient.floor <= gradient.limit <= 2 * FLOOR, "its steps end where the root of it is a fifth"


def test_a_stall_while_hardly_anything_runs_takes_no_slots_away() -> None:
    """As at the start of a process: the first burst would be refused for it."""
    gradient = Gradient(1500)
    assert {gradient.on_sample(0.2, in_flight, False) for in_flight in range(FLOOR + 1)} == {1500}
    assert gradient.on_sample(0.2, FLOOR + 1, False) < 2 * FLOOR


def test_a_limit_that_is_used_grows_back_to_its_ceiling_when_the_delay_is_gone() -> None:
    gradient = Gradient(1500)
    for _ in range(100):
        gradient.on_sample(0.1, 200, True)
    windows = 0
    while gradient.limit < 1500:
        gradient.on_sample(0.0005, gradient.limit, True)
        windows += 1
    assert windows <= 100, "10 s at ten windows a second"


def test_a_limit_that_is_not_used_does_not_grow() -> None:
    gradient = Gradient(1500)
    for _ in range(20):
        gradient.on_sample(0.1, 200, True)
    before = gradient.limit
    for _ in range(50):
        gradient.on_sample(0.0005, before // 2, False)
    assert gradient.limit == before


def test_a_machine_that_is_always_a_little_late_is_not_throttled_for_it() -> None:
    gradient = Gradient(1500)
    for _ in range(1_000):
        gradient.learn(1.5 * DELAY_S_MIN)
    assert gradient.normal_s == pytest.approx(1.5 * DELAY_S_MIN, rel=0.01)
    assert gradient.on_sample(2.5 * DELAY_S_MIN, 1500, False) == 1500


def test_what_is_normal_has_bounds() -> None:
    gradient = Gradient(1500)
    for _ in range(10_000):
        gradient.learn(0.5)
    assert gradient.normal_s == DELAY_S_MAX
    for _ in range(10_000):
        gradient.learn(0.0)
    assert gradient.normal_s == DELAY_S_MIN


@given(
    st.integers(1, 5_000),
    st.lists(st.tuples(st.floats(0, 100), st.integers(0, 10_000), st.booleans(), st.booleans())),
)
def test_whatever_is_measured_the_limit_stays_between_floor_and_ceiling(
    ceiling: int, samples: list[tuple[float, int, bool, bool]]
) -> None:
    gradient = Gradient(ceiling)
    for sample in samples:
        assert 1 <= gradient.floor <= gradient.on_sample(*sample) <= ceiling


# What is made of it


@dataclass
class Machine:
    """Time and the loop's thread's part of it, as a test says."""

    now: float = 1000.0
    cpu_s: float = 0.0

    def control(self, limit: int, mode: Mode = "enforce", **options: Any) -> LoadControl:
        return LoadControl(Slots(limit), mode, clock=lambda: self.now, cpu=lambda: self.cpu_s, **options)

    def looks(self, control: LoadControl, lag_s: float, *, busy: float = 1.0, times: int = 1) -> list[bool]:
        """Whether calls were shed after each of so many looks."""
        shed = []
        for _ in range(times):
            elapsed_s = SAMPLE_S + lag_s
            self.now += elapsed_s
            self.cpu_s += elapsed_s * busy
            control.look(lag_s)
            shed.append(control.shedding)
        return shed

    def computing(self, mode: Mode = "enforce", *, running: int = 100, work_s: float = 0.004) -> LoadControl:
        """Of a process whose calls compute for so long each."""
        control = self.control(1_000, mode)
        for _ in range(100):
            control.ended += round(0.1 * 0.5 / work_s)
            self.window(control, 0.001, running=running, busy=0.5)
        return control

    def window(
        self,
        control: LoadControl,
        delay_s: float = 0.0,
        *,
        refused: int = 0,
        running: int | None = None,
        busy: float = 1.0,
    ) -> None:
        self.now += 0.1
        self.cpu_s += 0.1 * busy
        if running is not None:
            control.slots.running = running
        control.slots.refused += refused
        control.look(delay_s)
        control.decide()


@pytest.fixture
def machine() -> Machine:
    return Machine()


def test_what_is_normal_is_learned_while_there_is_little_to_do(machine: Machine) -> None:
    """And not from low numbers of calls: those that never wait are not in flight and can still be too many."""
    control = machine.control(1500)
    for _ in range(1_000):
        machine.window(control, 0.015, busy=0.9)
    assert control.normal_s == DELAY_S_MIN
    for _ in range(1_000):
        machine.window(control, 0.015, busy=0.1)
    assert control.normal_s == pytest.approx(0.015, rel=0.01)


def test_a_limit_comes_back_while_there_is_little_to_do(machine: Machine) -> None:
    """Or the first burst after an idle night would meet the limit of yesterday's overload."""
    control = machine.control(1500)
    for _ in range(50):
        machine.window(control, 0.1, running=200)
    assert FLOOR <= control.slots.limit <= 2 * FLOOR
    for _ in range(100):
        machine.window(control, 0.0005, running=0, busy=0.1)
    assert control.slots.limit == 1500


def test_in_shadow_everything_is_computed_and_nothing_holds(machine: Machine) -> None:
    control = machine.control(1500, "shadow")
    for _ in range(20):
        machine.window(control, 0.1, refused=5, running=200)
    assert control.limit < 200 and control.pressed and control.step < STEPS
    assert (control.slots.limit, control.slow_slots.limit) == (1500, 1500)
    assert control.patience_s(0.01, QUEUE_PATIENCE_S) == QUEUE_PATIENCE_S
    assert not control.is_slow(10.0)


def test_adaptive_concurrency_enforce_makes_the_limit_hold(machine: Machine) -> None:
    control = machine.control(1500, "enforce")
    for _ in range(20):
        machine.window(control, 0.1, running=200)
    assert control.slots.limit == control.limit < 200


def test_slow_calls_leave_some_slots_to_quick_ones_as_long_as_there_are_any(machine: Machine) -> None:
    control = machine.control(100, "enforce")
    machine.window(control)
    assert control.slow_slots.limit == 100
    control.ran(0.0, QUICK_S / 2)
    machine.window(control)
    assert control.slow_slots.limit == 100 - int(100 * RESERVE_PART)
    assert control.is_slow(2 * QUICK_S) and not control.is_slow(QUICK_S / 2) and not control.is_slow(0.0)
    for _ in range(QUICK_LATELY_WINDOWS + 1):
        machine.window(control)
    assert control.slow_slots.limit == 100


def test_quick_calls_get_half_as_many_slots_again_as_they_take_up_to_half_of_all(machine: Machine) -> None:
    control = machine.control(100, "enforce")
    for quick, reserved in ((4, 10), (20, 30), (60, 50)):
        control.quick_seen = True
        control.slow_slots.running = 5
        machine.window(control, running=5 + quick)
        assert control.slow_slots.limit == 100 - reserved
    for _ in range(20):
        machine.window(control, running=5)
    assert control.slow_slots.limit == 90


def test_slow_calls_that_were_let_in_before_keep_no_quick_ones_out(machine: Machine) -> None:
    control = machine.control(1000, "enforce")
    control.slow_slots.running = 400
    for _ in range(4):
        control.quick_seen = True
        machine.window(control, 0.1, running=400)
    assert control.limit < 400 and control.slow_slots.limit < 400, "no slow call comes in"
    assert control.slots.limit == 400 + int(control.limit * RESERVE_PART)
    control.slow_slots.running = 0
    control.quick_seen = True
    machine.window(control, 0.0, running=0)
    assert control.slots.limit == control.limit


def test_under_pressure_nobody_waits_for_long_beside_what_calls_take(machine: Machine) -> None:
    control = machine.control(100, "enforce")
    assert control.patience_s(0.01, 1.0) == 1.0
    machine.window(control, refused=1)
    for _ in range(500):
        control.ran(1.0, 1.0)
    assert control.patience_s(0.01, 1.0) == pytest.approx(0.2 * QUICK_S)
    assert control.patience_s(1.0, 1.0) == pytest.approx(0.2)
    assert control.patience_s(1.0, 0.05) == 0.05, "never longer than the call itself allows"
    for _ in range(RELIEF_WINDOWS + 1):
        machine.window(control)
    assert control.patience_s(0.01, 1.0) == 1.0


def flooded(slots: Slots, left: int, refused: int, windows: int) -> bool:
    """After so many windows, in each of which so many left and were refused."""
    flood = Flood(slots)
    for _ in range(windows):
        for _ in range(left):
            assert slots.take_now()
            slots.release()
        slots.refused += refused
        flood.look()
    return slots.flooded


@pytest.mark.parametrize(
    ("left", "refused", "windows", "is_flood"),
    [(10, 9, 50, False), (10, 100, 1, True), (10, 11, 50, True), (0, 5, 3, True), (0, 1, 100, False)],
    ids=["fewer than leave", "a burst", "more than leave", "calls that take long", "one now and then"],
)
def test_more_refused_than_leave_are_a_flood(left: int, refused: int, windows: int, is_flood: bool) -> None:
    assert flooded(Slots(FLOOD_SLOTS_MIN), left, refused, windows) is is_flood
    assert not flooded(Slots(FLOOD_SLOTS_MIN - 1), left, refused, windows), "a few slots have a queue as ever"


def test_a_flood_is_over_when_few_are_refused() -> None:
    slots = Slots(100)
    slots.flooded = True
    assert flooded(slots, 10, 8, 50), "not yet"
    assert not flooded(slots, 10, 4, 50)
    slots.flooded = True
    assert not flooded(slots, 0, 0, 2), "though nothing leaves"


@pytest.mark.parametrize("mode", ["enforce", "shadow"])
def test_a_flood_is_seen_where_limits_hold(machine: Machine, mode: Mode) -> None:
    control = machine.control(100, mode)
    machine.window(control, refused=100)
    assert control.slots.flooded is (mode == "enforce")
    assert not control.slow_slots.flooded, "each by its own"


def test_a_tool_that_load_makes_slow_is_known_as_quick_again_soon(machine: Machine) -> None:
    control = machine.control(100, "enforce")
    hold_s = 0.02
    for _ in range(10):
        hold_s = control.ran(hold_s, 0.1)
    assert not control.is_slow(hold_s), "a few long runs do not make it slow"
    for _ in range(1_000):
        hold_s = control.ran(hold_s, 1.0)
    assert control.is_slow(hold_s)
    for _ in range(10):
        hold_s = control.ran(hold_s, 0.02)
    assert not control.is_slow(hold_s)


def test_the_factor_follows_the_strain_in_steps_and_comes_back(machine: Machine) -> None:
    steps: list[int] = []
    control = machine.control(100, factor_changed=steps.append)
    for _ in range(100):
        machine.window(control, 4 * TOLERATED_S)
    assert control.factor == pytest.approx(0.25, abs=0.02)
    assert steps == sorted(steps, reverse=True) and steps[-1] in (2, 3)
    down = len(steps)
    for _ in range(100):
        machine.window(control)
    assert steps[down:] == sorted(steps[down:]) and control.step == STEPS
    assert len(steps) <= 2 * STEPS


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 3)), max_size=50))
def test_the_factor_stays_between_a_tenth_and_one(windows: list[tuple[float, int]]) -> None:
    machine, steps = Machine(), list[int]()
    control = machine.control(100, factor_changed=steps.append)
    for delay_s, refused in windows:
        machine.window(control, delay_s, refused=refused)
        assert 1 / STEPS <= control.factor <= 1.0
    assert all(1 <= step <= STEPS for step in steps)
    assert all(one != other for one, other in zip([STEPS, *steps], steps, strict=False))


def test_a_factor_at_the_edge_of_a_step_does_not_flutter(machine: Machine) -> None:
    steps: list[int] = []
    control = machine.control(100, factor_changed=steps.append)
    for number in range(400):
        machine.window(control, TOLERATED_S * (2.1 if number % 2 else 1.9))
    assert len(steps) <= STEPS / 2


def test_calls_that_are_refused_for_want_of_a_slot_tighten_rates_too(machine: Machine) -> None:
    control = machine.control(100)
    for _ in range(100):
        machine.window(control, refused=1)
    assert control.factor == pytest.approx(0.5, abs=0.02)


def test_where_calls_compute_for_long_a_short_queue_of_them_is_no_overload(machine: Machine) -> None:
    limits = []
    for ended in (100, 20):  # 0.1 s of the core each window: calls of 1 ms, then of 5 ms
        control = machine.control(1_000)
        for _ in range(100):
            control.ended += ended
            machine.window(control, 2 * 0.005, running=1_000)
        limits.append(control.slots.limit)
    assert limits[0] < 100 and limits[1] == 1_000


def test_where_calls_compute_a_loop_that_is_late_sheds_within_half_a_second(machine: Machine) -> None:
    """The limit needs several windows; what is let in until then keeps everyone waiting for a second."""
    control = machine.computing()
    assert not any(machine.looks(control, 0.001, busy=0.7, times=20))
    began = machine.now
    for lag_s in (0.03, 0.06, 0.09, 0.12):  # twice as much as there is time for
        machine.looks(control, lag_s)
    assert control.shedding and machine.now - began < 0.5
    assert not machine.looks(control, 0.001, times=5)[-1], "and lets calls in as soon as it is on time"


def test_a_machine_that_stands_still_sheds_nobody(machine: Machine) -> None:
    control = machine.computing()
    assert not any(machine.looks(control, 0.1, busy=0.2, times=20))


def test_a_single_call_that_is_long_sheds_nobody(machine: Machine) -> None:
    control = machine.computing()
    for _ in range(5):
        assert not any(machine.looks(control, 0.2) + machine.looks(control, 0.001, times=5))


def test_what_is_tolerated_on_a_machine_that_is_always_late_sheds_nobody(machine: Machine) -> None:
    control = machine.computing(work_s=0.002)
    for _ in range(300):
        machine.window(control, 0.015, busy=0.1)
    assert control.normal_s == pytest.approx(0.015, rel=0.05)
    machine.looks(control, 0.12, times=3)
    assert not machine.looks(control, 0.015, times=20)[-1]


def test_refusals_that_keep_the_loop_late_shed_nobody(machine: Machine) -> None:
    control = machine.computing()
    machine.looks(control, 0.1, times=3)
    assert control.shedding
    machine.window(control, 0.1, refused=10 * REFUSED_TOO_MANY, running=100)
    assert not any(machine.looks(control, 0.1, times=3))


def test_what_a_call_computes_is_not_learned_from_refusals_nor_from_quiet_times(machine: Machine) -> None:
    control = machine.computing()
    for refused, busy in ((5_000, 1.0), (0, 0.2)):
        for _ in range(50):
            control.ended += 1
            machine.window(control, 0.001, refused=refused, running=100, busy=busy)
        control.ended += 8
    machine.looks(control, 0.05, times=5)
    assert control.shedding, "past ten calls of 4 ms"


@pytest.mark.parametrize(
    "of",
    [{"mode": "shadow"}, {"mode": "off"}, {"work_s": SHEDDING_WORK_S / 2}],
    ids=["shadow", "off", "calls compute little"],
)
def test_nobody_is_shed_where_it_would_not_help(machine: Machine, of: dict[str, Any]) -> None:
    control = machine.computing(**of)
    assert not any(machine.looks(control, 0.1, times=20))


def test_a_short_queue_of_calls_that_compute_sheds_nobody_unless_it_is_what_is_left_of_a_long_one(
    machine: Machine,
) -> None:
    control = machine.computing()
    short_s = 7 * 0.004
    assert not any(machine.looks(control, short_s, times=20))
    assert machine.looks(control, 20 * 0.004, times=5)[-1]
    assert machine.looks(control, short_s, times=50)[-1]
    assert not any(machine.looks(control, 0.001, busy=0.5, times=100)[5:])
    assert not any(machine.looks(control, short_s, times=20)), "it is over for a second"


def test_while_calls_are_shed_the_limit_follows_more_often() -> None:
    async def main(loop: VirtualLoop, *, shedding: bool) -> int:
        control = LoadControl(Slots(1_000, clock=loop.time), "shadow", clock=loop.time, cpu=lambda: loop.burned_s)
        control.shedding = shedding  # in shadow nothing else sets it
        control.slots.running = 1_000
        watching = asyncio.create_task(control.run())
        limits, until = {control.limit}, loop.time() + 0.5
        while loop.time() < until:
            loop.burn(0.005)
            await asyncio.sleep(0)
            limits.add(control.limit)
        watching.cancel()
        return len(limits) - 1

    usual, more = (run_virtually(partial(main, shedding=shedding)) for shedding in (False, True))
    assert more >= 2 * usual > 0


class Looks(LoadControl):
    """When it looked, and how late it took the loop for."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__(Slots(8, clock=loop.time), "enforce", clock=loop.time, cpu=lambda: loop.burned_s)
        self._loop = loop
        self.seen: list[tuple[float, float]] = []

    def look(self, lag_s: float) -> None:
        self.seen.append((self._loop.time(), lag_s))
        super().look(lag_s)

    def gaps_s(self) -> list[float]:
        return [after - before for (before, _), (after, _) in pairwise(self.seen)]


@pytest.mark.parametrize("alone", [True, False])
def test_where_no_call_comes_the_loop_is_woken_once_a_window_and_a_call_brings_the_next_look(alone: bool) -> None:
    """Whether it needs a slot of the process alone, or those of slow calls, of its tool or of a policy too."""

    async def main(loop: VirtualLoop) -> Looks:
        control = Looks(loop)
        watching = asyncio.create_task(control.run())
        await asyncio.sleep(5.0)
        idle = control.gaps_s()
        assert idle[:IDLE_LOOKS] == pytest.approx([SAMPLE_S] * IDLE_LOOKS)
        assert idle[IDLE_LOOKS:] == pytest.approx([WINDOW_S] * (len(idle) - IDLE_LOOKS)) and len(idle) > IDLE_LOOKS
        await asyncio.sleep(0.3 * WINDOW_S)
        before = len(control.seen)
        wanted = [control.slots] if alone else [control.slow_slots, control.slots]
        assert control.slots.take_now() if alone else take_all_now(wanted)
        came = loop.time()
        release_all(wanted)  # as a call that waits for nothing
        await asyncio.sleep(10.5 * SAMPLE_S)
        after = control.seen[before:]
        assert after[0] == (came, 0.0), "being woken early is no delay"
        assert len(after) == 11
        watching.cancel()
        return control

    assert run_virtually(main).slots.first is None


def test_a_call_that_stays_is_looked_at_all_the_time() -> None:
    async def main(loop: VirtualLoop) -> list[float]:
        control = Looks(loop)
        assert control.slots.take_now()
        watching = asyncio.create_task(control.run())
        await asyncio.sleep(3.0)
        watching.cancel()
        return control.gaps_s()

    assert max(run_virtually(main)) == pytest.approx(SAMPLE_S)


def test_a_machine_that_stands_still_while_nobody_calls_takes_no_slots_away() -> None:
    async def main(loop: VirtualLoop) -> Looks:
        control = Looks(loop)
        watching = asyncio.create_task(control.run())
        await asyncio.sleep(2.0)
        for _ in range(100):
            loop.burn(0.2)
            await asyncio.sleep(WINDOW_S)
        watching.cancel()
        return control

    control = run_virtually(main)
    assert control.limit == 8 and control.normal_s == DELAY_S_MIN


def test_a_delay_that_refusals_make_takes_no_slots_away(machine: Machine) -> None:
    """Callers who come again at once keep the loop busy: with fewer slots they would keep it busier."""
    control = machine.control(1_000)
    for refused in (REFUSED_TOO_MANY, REFUSED_TOO_MANY - 100):
        for _ in range(50):
            machine.window(control, 10 * TOLERATED_S, refused=refused, running=1_000)
        assert (control.slots.limit == 1_000) is (refused == REFUSED_TOO_MANY)
    for _ in range(100):
        machine.window(control, 10 * TOLERATED_S, refused=REFUSED_TOO_MANY, running=20)
    assert control.slots.limit == 1_000, "and gives back what was taken"


REFUSED_TOO_MANY = int(REFUSING_PART * 0.1 / REFUSAL_S) + 1
"""In a window of a tenth of a second."""


def test_a_limit_that_makes_most_of_the_refusals_comes_back_within_two_seconds(machine: Machine) -> None:
    control = machine.control(1500)
    machine.window(control, 0.2, running=700)
    machine.window(control, 0.2, running=700)
    assert control.slots.limit < 600
    for _ in range(20):
        machine.window(control, 0.1, refused=REFUSED_TOO_MANY, running=control.slots.limit)
    assert control.slots.limit == 1500


# All of it, under simulated load


@dataclass
class Kind:
    """A tool: what it burns of the loop, and how long it waits."""

    name: str
    burns_s: float
    waits_s: float
    hold_s: float = 0.0


REFUSAL_BURNS_S = 2e-6
"""A model: a five-hundredth of a call. What it is for the service, `load/` measures."""

CAPACITY = 1000.0
"""Calls a second, at 1 ms each."""


@dataclass
class World:
    """Calls that come whether or not the earlier ones are done, as many of each kind; does with slots what the
    executor does."""

    loop: VirtualLoop
    control: LoadControl
    of: tuple[str, ...]
    random: random.Random = field(default_factory=lambda: random.Random(8))
    ended: list[tuple[float, str, float]] = field(default_factory=list)
    """When, of which kind, how long after it came."""
    refused: list[float] = field(default_factory=list)
    limits: list[tuple[float, int]] = field(default_factory=list)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.began = self.loop.time()
        kinds = [Kind("quick", 0.001, 0.04), Kind("slow", 0.001, 0.8)]
        self.kinds = [kind for kind in kinds if kind.name in self.of]

    async def call(self, kind: Kind, came: float) -> None:
        control, loop = self.control, self.loop
        slots = [control.slow_slots, control.slots] if control.is_slow(kind.hold_s) else [control.slots]
        if control.shedding and control.slots.running >= FLOOR:
            loop.burn(REFUSAL_BURNS_S)
            control.slots.refused_for("busy")
            self.refused.append(loop.time() - self.began)
            return
        if not take_all_now(slots) and not await self.wait_for(slots, control.patience_s(kind.hold_s, 1.0)):
            self.refused.append(loop.time() - self.began)
            return
        began = loop.time()
        loop.burn(kind.burns_s / 2)
        await asyncio.sleep(kind.waits_s * self.random.uniform(0.8, 1.2))
        loop.burn(kind.burns_s / 2)
        kind.hold_s = control.ran(kind.hold_s, loop.time() - began)
        release_all(slots)
        self.ended.append((loop.time() - self.began, kind.name, loop.time() - came))

    async def wait_for(self, slots: list[Slots], patience_s: float) -> bool:
        self.loop.burn(REFUSAL_BURNS_S)
        until, held = self.loop.time() + patience_s, []
        try:
            for each in slots:
                left_s = max(0.0, until - self.loop.time())
                if not each.take_now():
                    await each.take(each.wait("", left_s if self.control.enforces else math.inf), left_s)
                held.append(each)
        except Overloaded:
            release_all(held)
            return False
        return True

    def arrivals(self, phases: tuple[tuple[float, float], ...]) -> Iterator[float]:
        at = until = self.began
        for per_s, seconds in phases:
            at, until = until, until + seconds
            while (at := at + self.random.expovariate(per_s)) < until:
                yield at

    async def run(self, phases: tuple[tuple[float, float], ...]) -> None:
        watching = asyncio.create_task(self.control.run())
        for at in self.arrivals(phases):
            while at > self.loop.time():
                self.limits.append((self.loop.time() - self.began, self.control.slots.limit))
                await asyncio.sleep(at - self.loop.time())
            task = asyncio.create_task(self.call(self.random.choice(self.kinds), at))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        while self.tasks:
            await asyncio.sleep(0.1)
        watching.cancel()

    def goodput(self, since: float, until: float) -> float:
        return sum(since <= at < until for at, _, _ in self.ended) / (until - since)

    def p95_s(self, name: str, since: float, until: float) -> float:
        took = sorted(took for at, kind, took in self.ended if kind == name and since <= at < until)
        return took[int(0.95 * len(took))]


@cache
def simulated(
    mode: Mode, *phases: tuple[float, float], of: tuple[str, ...] = ("quick", "slow"), slots: int = 1500
) -> World:
    """What happened; phases are (calls a second, seconds)."""

    async def main(loop: VirtualLoop) -> World:
        control = LoadControl(
            Slots(slots, clock=loop.time),
            mode,
            clock=loop.time,
            cpu=lambda: loop.burned_s,
            refusal_s=REFUSAL_BURNS_S,
        )
        world = World(loop, control, of)
        await world.run(phases)
        assert (world.control.slots.running, world.control.slots.queued) == (0, 0)
        assert (world.control.slow_slots.running, world.control.slow_slots.queued) == (0, 0)
        return world

    return run_virtually(main)


def unloaded_s(name: str) -> float:
    return simulated("enforce", (0.3 * CAPACITY, 6)).p95_s(name, 1, 6)


def peak() -> float:
    """The most that it can serve, whatever the times."""
    return max(simulated("off", (part * CAPACITY, 6)).goodput(3, 6) for part in (0.9, 1.0, 1.1))


def test_a_load_that_can_be_served_is_served() -> None:
    world = simulated("enforce", (0.8 * CAPACITY, 6))
    assert not world.refused
    assert world.goodput(1, 6) == pytest.approx(0.8 * CAPACITY, rel=0.05)


def test_without_it_overload_makes_quick_tools_slow() -> None:
    """The simulation is worth something: what it shows to be mended does break."""
    assert simulated("off", (2 * CAPACITY, 6)).p95_s("quick", 3, 6) > 10 * unloaded_s("quick")


@pytest.mark.parametrize("times", [2, 10])
def test_overload_keeps_nine_tenths_of_the_peak_and_quick_tools_quick(times: int) -> None:
    world = simulated("enforce", (times * CAPACITY, 6))
    assert world.goodput(4, 6) >= 0.9 * peak()
    assert world.p95_s("quick", 4, 6) <= 2 * unloaded_s("quick")
    assert world.p95_s("slow", 4, 6) <= 2 * unloaded_s("slow")


def test_the_first_seconds_of_overload_keep_quick_tools_quick_too() -> None:
    """Until the limit is down, what is let in too much is shed."""
    world = simulated("enforce", (0.5 * CAPACITY, 4), (2 * CAPACITY, 6))
    for second in (4, 5, 6):
        assert world.p95_s("quick", second, second + 1) <= 2 * unloaded_s("quick")
    assert world.goodput(4, 10) >= 0.9 * peak()


@pytest.mark.parametrize("kind", ["quick", "slow"])
def test_it_holds_for_tools_of_one_kind_too(kind: str) -> None:
    world = simulated("enforce", (2 * CAPACITY, 6), of=(kind,))
    assert world.goodput(4, 6) >= 0.9 * peak()
    assert world.p95_s(kind, 4, 6) <= 2 * unloaded_s(kind)


def test_where_slots_are_what_is_short_quick_tools_find_some() -> None:
    """40 slots are full of slow calls at 50 a second; the loop has nothing to do with it."""
    load = (150.0, 8)
    without, world = simulated("off", load, slots=40), simulated("enforce", load, slots=40)
    assert world.p95_s("quick", 3, 8) <= 2 * unloaded_s("quick") < without.p95_s("quick", 3, 8)
    assert world.goodput(3, 8) >= 0.9 * without.goodput(3, 8)


def test_after_overload_all_is_as_before_within_ten_seconds() -> None:
    world = simulated("enforce", (10 * CAPACITY, 4), (0.5 * CAPACITY, 14))
    assert max(world.refused) < 4 + 10
    assert world.p95_s("quick", 8, 18) <= 1.3 * unloaded_s("quick")
    assert world.control.step == STEPS and not world.control.pressed


def test_at_a_steady_overload_the_limit_is_steady() -> None:
    world = simulated("enforce", (2 * CAPACITY, 12))
    limits = [limit for at, limit in world.limits if at > 5]
    mean = sum(limits) / len(limits)
    assert 0.6 * mean < min(limits) and max(limits) < 1.5 * mean
    by_second = [world.goodput(second, second + 1) for second in range(5, 12)]
    assert min(by_second) >= 0.85 * peak()


def test_adaptive_concurrency_off_and_shadow_let_everything_go_as_without() -> None:
    phases = ((2 * CAPACITY, 4),)
    assert simulated("shadow", *phases).ended == simulated("off", *phases).ended
