"""Limits that follow the load of this process: how many calls run at once, how long they may wait for a slot, and the
factor of rates that are declared adaptive.

`Gradient` is the algorithm, fed with samples; `LoadControl` takes the samples, and enforces what comes out of them or
only shows it. Knows no tool, no store and no HTTP; the service builds it, the executor asks it when a slot is short.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from time import perf_counter, thread_time
from typing import Literal

from app.limits.concurrency import Slots
from app.limits.lateness import Lateness
from app.limits.limit import STEPS
from app.stepping import settle

Mode = Literal["off", "shadow", "enforce"]

SAMPLE_S = 0.01
"""Between two looks at how late the loop is."""

IDLE_LOOKS = 100
"""After so many at which no slot was held, nor had been since the one before, one a window is enough until a call
comes: 100 a second take 2 % of a core that sleeps, for it has to be woken each time."""

WINDOW_S = 0.1
"""A decision so often: longer than most calls take, short beside the 10 s in which all must be well again. On a loop
that is later than that, each look brings one."""

SHEDDING_WINDOW_S = 0.03
"""While calls are shed: what was let in too much goes on for as long as it takes, and each window adds to it."""

SHEDDING_WORK_S = 0.001
"""Where calls compute for less, those of some windows are no queue that anyone would notice."""

SHEDDING_REFUSING_PART = 0.1
"""Of the time. Callers who come again at once take more of the core than what is shed gives back."""

DELAY_S_MIN = 0.002
"""A delay that is no overload on any machine: uvloop's timers alone are late by up to 1 ms."""

DELAY_S_MAX = 0.02
"""Nor is a longer one ever taken for normal, on a machine that is late without any load."""

TOLERANCE = 2.0
"""Twice what is normal may be waited before the limit goes down (Netflix's gradient2 takes 1.5 of the whole time;
here the tool's own run is not in it, so the noise is a larger part)."""

DELAY_PART = 0.05
"""Where all calls are slow, they may also be delayed by this part of what they take: nobody notices 40 ms of 800, and a
limit so tight that nobody waits leaves the loop idle between them."""

DELAY_CALLS = 3.0
"""Where calls compute for milliseconds, a queue of so many of them is no overload: a core of which six sevenths are in
use has one. In all, no longer than what is tolerated on the slowest machine."""

WORK_CALLS_MIN = 8
WORK_WEIGHT = 0.1
"""Of one window, or of as many as have so many calls, in what a call computes."""

GRADIENT_MIN = 0.8
"""One window never takes away more than a fifth of what runs: the delay of a moment may be chance, and what was let in
before goes on for a while."""

LEARNING = 0.02
"""Weight of one window in the normal delay: 5 s at ten windows a second."""

CALM_PART = 0.3
"""What is normal is learned while the loop's thread computes for less than this part of the time. Delay is no sign of
it: by that, overload would become normal."""

SMOOTHING = 0.3
"""Weight of one window in the delay that is judged: a stall of one window is not yet overload."""

SAMPLE_S_MAX = 0.25
"""A longer delay says no more: a stall of seconds would be remembered long after it is over."""

IN_USE = 0.8
"""A limit goes up only while this part of it is in use: an unused one proves nothing."""

FLOOR = 8
"""The limit never goes below: delay that the calls do not cause must not starve them. More, of calls that compute for
some milliseconds, would be a queue of its own."""

QUICK_S = 0.05
"""A tool that takes longer holds its slot for long; quicker ones give theirs back 20 times a second or more."""

RESERVE_PART = 0.1
"""Slots that only quick calls get, while there are any: a few of them carry many quick calls past the slow ones."""

RESERVE_GROWTH = 1.5
RESERVE_PART_MAX = 0.5
"""Where quick calls take more than that, they get half as many again as they take, up to half of all."""

QUICK_WEIGHT = 0.3
"""Of one window in what quick calls take, when it becomes less."""

QUICK_LATELY_WINDOWS = 100
"""10 s without a quick call, and all slots are for the slow ones."""

WAIT_PART = 0.2
"""Of the time that calls usually take, under pressure: so they take little longer than without, and what cannot be
served by then is refused at once. One patience for all quick calls and one for all slow ones: those with more of it
would keep those with less out of the queue altogether."""

SLOW_HOLD_WEIGHT = 0.05
"""Of one run of a slow tool in what slow calls usually take."""

FLOOD_MIN = 1.0
"""Calls refused by some slots in a window, on average, that are a flood where they are more than those that leave. Then
nobody waits behind calls of its own tenant: who comes next takes a slot within moments, and a queue would only be work
for calls that leave it without one."""

FLOOD_SLOTS_MIN = 32
"""Of fewer, one that is free until the next call comes is a loss: a quarter of the time with two of them."""

RELIEVED_PART = 0.5
"""Of a flood, and it is over."""

RELIEF_WINDOWS = 10
"""A second without anyone waiting or refused ends the pressure; sooner, and it would come and go with each queue."""

HOLD_WEIGHT_UP, HOLD_WEIGHT_DOWN = 0.02, 0.3
"""Of one run in what a tool usually takes. A run that the load has made long says little about the tool, a short one
much: without this, a quick tool would look slow under load and then wait with the slow ones, for good."""

FACTOR_WEIGHT = 0.1
"""Of one window in the factor: from 1 to 0.2 takes 2 s."""

STEP_HYSTERESIS = 0.75
REFUSED_STRAIN = 2.0
"""Calls refused for want of a slot weigh as twice the tolerated delay."""

REFUSAL_S = 40e-6
"""What a refusal takes of the loop's thread, with the HTTP around it."""

REFUSING_PART = 0.25
"""Of the time. Past it the delay is made by callers who come again at once and not by the calls that run: fewer slots
would only mean more refusals, down to the floor and for as long as they go on."""

GROWTH_REFUSING = 0.1
"""Part of itself that the limit then grows by in one window: a thousand callers that come at one moment take it down in
two windows, and by its root it would need three seconds to come back."""

Clock = Callable[[], float]


class Gradient:
    """How many calls may run at once, from the delay that they meet (after Netflix's concurrency-limits, gradient2).

    While the delay is below what is tolerated and the limit is in use, the limit grows by the root of itself a window;
    above, it shrinks by the root of the ratio of the two, from what really runs. The two meet where the delay is a
    little over what is tolerated.
    """

    __slots__ = ("_limit", "allowed_s", "ceiling", "delay_s", "floor", "normal_s")

    def __init__(self, ceiling: int, floor: int = FLOOR) -> None:
        self.ceiling = ceiling
        self.floor = min(ceiling, floor)
        self.normal_s = DELAY_S_MIN
        self.allowed_s = 0.0
        """A delay that does not matter to the calls there are, whatever is normal."""
        self._limit = float(ceiling)
        self.delay_s = 0.0

    @property
    def limit(self) -> int:
        return int(self._limit)

    @property
    def tolerated_s(self) -> float:
        return max(TOLERANCE * self.normal_s, self.allowed_s)

    @property
    def strain(self) -> float:
        """How many times the tolerated delay is met at this time."""
        return self.delay_s / self.tolerated_s

    def on_sample(self, rtt_s: float, in_flight: int, dropped: bool, refusing: bool = False) -> int:
        """The limit after one window: its mean delay without the tools' own time, the most that ran in it, whether
        calls were refused for want of a slot, and so many that the delay comes of that."""
        self.delay_s += SMOOTHING * (min(rtt_s, SAMPLE_S_MAX) - self.delay_s)
        if refusing:
            self._grow(GROWTH_REFUSING)
        elif self.strain > 1:
            # Else it is over, and what was done about it may have been enough; or too few run to be the reason, as at
            # the start of a process, and the next ones would be refused for a stall that is none of theirs.
            if rtt_s > self.tolerated_s and in_flight > self.floor:
                self._shrink(max(GRADIENT_MIN, self.strain**-0.5), in_flight)
        elif dropped or in_flight >= IN_USE * self._limit:
            self._grow()
        return self.limit

    def _grow(self, part: float = 0.0) -> None:
        self._limit = min(self.ceiling, self._limit + max(math.sqrt(self._limit), part * self._limit))

    def learn(self, rtt_s: float) -> None:
        """A delay that was met while there was little to do: it is normal, and no reason to keep the limit down."""
        learned = self.normal_s + LEARNING * (rtt_s - self.normal_s)
        self.normal_s = min(DELAY_S_MAX, max(DELAY_S_MIN, learned))
        if self.strain <= 1:
            self._grow()

    def _shrink(self, gradient: float, in_flight: int) -> None:
        """From what really runs: a limit far above it would take long to mean anything."""
        used = min(self._limit, max(in_flight, self.floor))
        self._limit = max(self.floor, min(self._limit, (used + math.sqrt(used)) * gradient))


class Flood:
    """Tells slots each window whether more calls are refused by them than leave them, on average."""

    __slots__ = ("_left", "_left_before", "_refused", "_refused_before", "_slots")

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._refused = self._left = 0.0
        self._refused_before, self._left_before = slots.refused, slots.left

    def look(self) -> None:
        slots = self._slots
        self._refused += SMOOTHING * (slots.refused - self._refused_before - self._refused)
        self._left += SMOOTHING * (slots.left - self._left_before - self._left)
        self._refused_before, self._left_before = slots.refused, slots.left
        flood = max(FLOOD_MIN, self._left)
        if slots.limit < FLOOD_SLOTS_MIN or self._refused <= RELIEVED_PART * flood:
            slots.flooded = False
        elif self._refused > flood:
            slots.flooded = True


class LoadControl:
    """Takes the samples, decides each window, and in mode `enforce` makes it hold. `run` must be running.

    `slots` are the process's. A slow call (`is_slow`) needs one of `slow_slots` too, taken before. `factor_changed` is
    told the step of adaptive rates, STEPS being all of them. In mode `shadow` all is computed and shown, nothing held.
    """

    def __init__(
        self,
        slots: Slots,
        mode: Mode = "shadow",
        *,
        factor_changed: Callable[[int], None] = lambda _: None,
        clock: Clock = perf_counter,
        cpu: Clock = thread_time,
        refusal_s: float = REFUSAL_S,
    ) -> None:
        self.mode = mode
        self.slots = slots
        self.slow_slots = Slots(slots.limit, clock=clock)
        self.enforces = mode == "enforce"
        self.pressed = False
        """Whether calls wait for slots, or did within the last second."""
        self.quick_seen = False
        """Set by whoever runs a quick call; what is not seen for a while has nothing reserved."""
        self.factor = 1.0
        self.step = STEPS
        self._gradient = Gradient(slots.limit)
        self._factor_changed = factor_changed
        self._clock = clock
        self._cpu = cpu
        self._refusal_s = refusal_s
        self._decided_at = clock()
        self._cpu_s = cpu()
        self._slow_hold_s = QUICK_S
        self.ended = 0
        """Runs that have ended; counted by whoever runs them, as `ran` does."""
        self._floods = Flood(self.slots), Flood(self.slow_slots)
        self._work_s = self._worked_s = 0.0
        self.shedding = False
        """Calls compute so much that the loop is late already: until it is on time, those that wait or compute are
        refused while FLOOR run."""
        self._sheds_too_much = False
        self._lateness = Lateness(self._decided_at, self._cpu_s)
        self._delays_s = 0.0
        self._delays = 0
        self._lags_s = 0.0
        self._lags = 0
        self._in_flight = 0
        self._quick = 0
        self._quick_taken = 0.0
        self._waited = False
        self._refused = 0
        self._calm_windows = RELIEF_WINDOWS
        self._windows_without_quick = QUICK_LATELY_WINDOWS

    @property
    def limit(self) -> int:
        """What is computed; what holds is `slots.limit`."""
        return self._gradient.limit

    @property
    def normal_s(self) -> float:
        """The delay that is taken for normal."""
        return self._gradient.normal_s

    @property
    def delay_s(self) -> float:
        """What a call is delayed by at this time, without its own run and its wait for a slot."""
        return self._gradient.delay_s

    def is_slow(self, hold_s: float) -> bool:
        """Whether a call of a tool that usually takes so long needs a slot of `slow_slots` first."""
        return self.enforces and hold_s > QUICK_S

    def patience_s(self, hold_s: float, patience_s: float) -> float:
        """How long a call of a tool that usually takes `hold_s` may wait for its slots."""
        if not (self.enforces and self.pressed):
            return patience_s
        return min(patience_s, WAIT_PART * (self._slow_hold_s if hold_s > QUICK_S else QUICK_S))

    def ran(self, hold_s: float, run_s: float) -> float:
        """What a tool usually takes, after one more run of it."""
        self.ended += 1
        if run_s <= QUICK_S:
            self.quick_seen = True
        if hold_s > QUICK_S:
            self._slow_hold_s = max(QUICK_S, self._slow_hold_s + SLOW_HOLD_WEIGHT * (run_s - self._slow_hold_s))
        if hold_s == 0.0:
            return run_s
        return hold_s + (HOLD_WEIGHT_UP if run_s > hold_s else HOLD_WEIGHT_DOWN) * (run_s - hold_s)

    def observe(self, delay_s: float) -> None:
        """What the framework took for one call: all of its time but the tool's run and the wait for a slot."""
        self._delays_s += delay_s
        self._delays += 1

    async def run(self) -> None:
        """Watch how late the loop is, and decide; never ends by itself."""
        now, left, unused = self._clock(), -1, 0
        while True:
            if unused < IDLE_LOOKS:
                due = now + SAMPLE_S
                await asyncio.sleep(SAMPLE_S)
                now = self._clock()
                self.look(max(0.0, now - due))
            else:
                due = now + WINDOW_S
                await self._called_within(WINDOW_S)
                now = self._clock()
                # One look is no average of ten: that the machine stood still says nothing where nobody was delayed.
                self.look(min(self.normal_s, max(0.0, now - due)))
            slots = self.slots
            unused = 0 if slots.running or slots.queued or slots.left != left else unused + 1
            left = slots.left
            if now - self._decided_at >= (SHEDDING_WINDOW_S if self.shedding else WINDOW_S):
                self.decide()

    async def _called_within(self, timeout_s: float) -> None:
        """Returns when a call has taken a slot, or after that time."""
        loop = asyncio.get_running_loop()
        self.slots.first = first = loop.create_future()
        timer = loop.call_later(timeout_s, settle, first)
        try:
            await first
        finally:
            timer.cancel()
            self.slots.first = None

    def look(self, lag_s: float) -> None:
        """One sample: how late the loop is, who runs, who waits."""
        self._lags_s += lag_s
        self._lags += 1
        self._in_flight = max(self._in_flight, self.slots.running)
        self._quick = max(self._quick, self.slots.running - self.slow_slots.running)
        self._waited = self._waited or self.slots.queued > 0 or self.slow_slots.queued > 0
        if self.enforces:
            tolerated_s = self._gradient.tolerated_s
            late = self._lateness.look(lag_s, self._work_s, tolerated_s, self._clock(), self._cpu())
            self.shedding = late and self._work_s >= SHEDDING_WORK_S and not self._sheds_too_much

    def decide(self) -> None:
        """Close the window."""
        delay_s = self._lags_s / max(1, self._lags)
        if self._delays:
            delay_s = max(delay_s, self._delays_s / self._delays)
        refused = self.slots.refused + self.slow_slots.refused
        dropped = refused != self._refused
        refusing_s = (refused - self._refused) * self._refusal_s
        now, cpu_s = self._clock(), self._cpu()
        window_s, worked_s = now - self._decided_at, cpu_s - self._cpu_s
        self._decided_at, self._cpu_s = now, cpu_s
        refusing = refusing_s > REFUSING_PART * window_s
        self._sheds_too_much = refusing_s > SHEDDING_REFUSING_PART * window_s
        if self.enforces:
            for flood in self._floods:
                flood.look()
        calm = worked_s < CALM_PART * window_s
        if calm or refusing:  # what is done besides would count as the calls' own
            self._worked_s, self.ended = 0.0, 0
        else:
            self._learn_work(max(0.0, worked_s - refusing_s))
        if calm and not dropped:
            self._gradient.learn(delay_s)
        self._gradient.allowed_s = self._allowed_s()
        limit = self._gradient.on_sample(delay_s, self._in_flight, dropped, refusing)
        self._feel_pressure(dropped)
        self._tighten(dropped)
        if self.enforces:
            self._resize(limit)
        self._refused = refused
        self._delays_s = self._lags_s = 0.0
        self._delays = self._lags = self._in_flight = self._quick = 0
        self._waited = False

    def _allowed_s(self) -> float:
        allowed_s = DELAY_CALLS * self._work_s
        if self._windows_without_quick >= QUICK_LATELY_WINDOWS:
            allowed_s = max(allowed_s, DELAY_PART * self._slow_hold_s)
        return min(TOLERANCE * DELAY_S_MAX, allowed_s)

    def _learn_work(self, worked_s: float) -> None:
        """What the loop's thread computes for a call, all that it does besides in it."""
        self._worked_s += worked_s
        if self.ended >= WORK_CALLS_MIN:
            weight = WORK_WEIGHT if self._work_s else 1.0
            self._work_s += weight * (self._worked_s / self.ended - self._work_s)
            self._worked_s, self.ended = 0.0, 0

    def _feel_pressure(self, dropped: bool) -> None:
        self._calm_windows = 0 if dropped or self._waited else self._calm_windows + 1
        self.pressed = self._calm_windows < RELIEF_WINDOWS
        self._windows_without_quick = 0 if self.quick_seen else self._windows_without_quick + 1
        self.quick_seen = False

    def _resize(self, limit: int) -> None:
        reserve = self._reserve(limit)
        of_slow = limit - reserve
        if reserve:  # slow calls that were let in before, under a higher limit, must not keep quick ones out
            limit = max(limit, min(self._gradient.ceiling, self.slow_slots.running + max(1, int(limit * RESERVE_PART))))
        if limit != self.slots.limit:
            self.slots.resize(limit)
        if of_slow != self.slow_slots.limit:
            self.slow_slots.resize(of_slow)

    def _reserve(self, limit: int) -> int:
        """Slots that slow calls do not get."""
        self._quick_taken = max(self._quick, self._quick_taken + QUICK_WEIGHT * (self._quick - self._quick_taken))
        if self._windows_without_quick >= QUICK_LATELY_WINDOWS or limit == 1:
            return 0
        wanted = max(limit * RESERVE_PART, RESERVE_GROWTH * self._quick_taken)
        return max(1, int(min(limit * RESERVE_PART_MAX, wanted)))

    def _tighten(self, dropped: bool) -> None:
        """Towards the inverse of the strain. A change of less than a step and a bit changes nothing: no flutter."""
        strain = max(self._gradient.strain, REFUSED_STRAIN if dropped else 0.0)
        wanted = min(1.0, max(1 / STEPS, 1 / strain if strain > 1 else 1.0))
        self.factor += FACTOR_WEIGHT * (wanted - self.factor)
        if abs(self.factor * STEPS - self.step) > STEP_HYSTERESIS or (wanted == 1.0 and self.factor > 0.97):
            step = min(STEPS, max(1, round(self.factor * STEPS)))
            if step != self.step:
                self.step = step
                if self.enforces:
                    self._factor_changed(step)
