"""Counters in this process: the store of the embedded default, the fallback while Redis is away, and the model that
the Lua script is held to. Decides at once; same arithmetic, same order, same answers as scripts/admit.lua.
"""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime

from app.limits.limit import DAILY, RATE, Kind, Limit, Terms
from app.limits.store import PASSES, REFUSES, WOULD_REFUSE, Ask, Spends, Verdict, Waiter

COUNTERS_MAX = 100_000
"""About 35 MB. Past it the counters that have been there longest are forgotten, those without effect first."""

SWEPT_AT_ONCE = 32
"""Counters looked at for each one that comes when there are too many: some 10 µs."""

DAY_US = 86_400_000_000


def steady_clock() -> Callable[[], int]:
    """Unix microseconds that no change of the system's clock moves."""
    offset_us = (time.time_ns() - time.monotonic_ns()) // 1000
    return lambda: time.monotonic_ns() // 1000 + offset_us


def wall_clock() -> int:
    return time.time_ns() // 1000


def month_of(day: int) -> int:
    """Months from 1970-01 to the month that a day since 1970-01-01 is in."""
    date = datetime.fromtimestamp(day * 86_400, UTC)
    return (date.year - 1970) * 12 + date.month - 1


class MemoryStore:
    """`clock_us` drives the rates, `wall_us` says which day and month it is; both in Unix microseconds."""

    up = True
    state = "in process"
    room = None

    def __init__(
        self,
        clock_us: Callable[[], int] | None = None,
        wall_us: Callable[[], int] = wall_clock,
        counters_max: int = COUNTERS_MAX,
    ) -> None:
        self._clock_us = clock_us or steady_clock()
        self._wall_us = wall_us
        self._counters_max = counters_max
        self._counters: OrderedDict[str, tuple[int, int, int]] = OrderedDict()
        """A rate: TAT, its parts, the amount that they are parts of. A quota: period, used, minus its kind."""
        self._today = self._month = 0

    @property
    def counters(self) -> int:
        """How many are kept."""
        return len(self._counters)

    async def trouble(self) -> None:
        """Nobody but this process has these counters in hand."""

    def ask_for(self, waiter: Waiter, ask: Ask) -> Verdict:
        return self.ask(ask)

    def ask(self, ask: Ask) -> Verdict:
        now = self._clock_us()
        spends = ask.spends
        if spends is None:
            spends = ask.spends = _spends(ask)
        states = self._spent(spends, now) if spends else None
        return self._ask_all(ask, now) if states is None else _made(Verdict, (now, states))

    def _spent(self, spends: Spends, now: int) -> list[tuple[int, int, int]] | None:
        """The usual case, where all limits pass, without a call for each step of the general one. None: one of them
        refuses, and nothing was done."""
        counters = self._counters
        after: list[tuple[str, tuple[int, int, int]]] = []
        states: list[tuple[int, int, int]] = []
        for key, terms, added, added_parts in spends:
            stored = counters.get(key)
            amount = terms.amount
            if terms.kind == RATE:
                if stored is None or stored[0] < now:
                    us, parts = now + added, added_parts
                else:
                    begin, rest, _ = _rate_now(terms, stored, now)
                    us, parts = begin + added, rest + added_parts
                    if parts >= amount:
                        us, parts = us + 1, parts - amount
                window_us, window_parts = terms.window
                if (us - window_us - now) * amount + parts > window_parts:
                    return None
                after.append((key, (us, parts, amount)))
                states.append((PASSES, us, parts))
            else:
                period, used, kind = self._quota_now(terms.kind, stored)
                used += added
                if used > amount:
                    return None
                after.append((key, (period, used, kind)))
                states.append((PASSES, period, used))
        for key, state in after:
            if key not in counters and len(counters) >= self._counters_max:
                self._make_room()
            counters[key] = state
        return states

    def _ask_all(self, ask: Ask, now: int) -> Verdict:
        states, statuses, passes = [], [], True
        for limit in ask.limits:
            state = self._state(limit, now)
            status = PASSES
            if ask.cost and _refuses(limit.terms, state, ask.cost, now):
                status = WOULD_REFUSE if limit.terms.shadow else REFUSES
                passes = passes and limit.terms.shadow
            states.append(state)
            statuses.append(status)
        if passes and ask.cost:
            for position, limit in enumerate(ask.limits):
                if statuses[position] == PASSES:
                    # Read again: a limit may stand twice in one ask.
                    states[position] = self._spend(limit, self._state(limit, now), ask.cost)
                else:
                    self._keep_set_back(limit, states[position])
        elif ask.cost:
            for limit, state in zip(ask.limits, states, strict=True):
                self._keep_set_back(limit, state)
        return Verdict(now, [(status, state[0], state[1]) for status, state in zip(statuses, states, strict=True)])

    def wall_us(self, now_us: int) -> int:
        """The clock of the rates does not follow the calendar's when that is set, nor while the machine sleeps."""
        return now_us + self._wall_us() - self._clock_us()

    def give_back(self, ask: Ask) -> None:
        assert ask.spent is not None
        now = self._clock_us()
        for limit, (status, period, _) in zip(ask.limits, ask.spent.states, strict=True):
            if status != PASSES or limit.key not in self._counters:
                continue
            state = self._state(limit, now)
            given = _given_back(limit.terms, state, ask.cost, now, ask.spent.now_us, period)
            if given is None:
                self._keep_set_back(limit, state)
            else:
                self._counters[limit.key] = given

    def _state(self, limit: Limit, now: int) -> tuple[int, int, int]:
        """The counter as it counts at this moment."""
        stored, terms = self._counters.get(limit.key), limit.terms
        if terms.kind == RATE:
            return (now, 0, terms.amount) if stored is None else _rate_now(terms, stored, now)
        return self._quota_now(terms.kind, stored)

    def _quota_now(self, kind: Kind, stored: tuple[int, int, int] | None) -> tuple[int, int, int]:
        day = self._wall_us() // DAY_US
        if day != self._today:
            self._today, self._month = day, month_of(day)
        period = day if kind == DAILY else self._month
        # Never back to the period before, where a clock was set back a little; but one far ahead may be years away.
        if stored is None or not period <= stored[0] <= period + 1:
            return (period, 0, -kind)
        return stored

    def _keep_set_back(self, limit: Limit, state: tuple[int, int, int]) -> None:
        """What was ahead of the clock is written even when it refuses: from here on its time passes again."""
        stored = self._counters.get(limit.key)
        if stored is not None and stored[0] > state[0]:
            self._counters[limit.key] = state

    def _spend(self, limit: Limit, state: tuple[int, int, int], cost: int) -> tuple[int, int, int]:
        terms = limit.terms
        if terms.kind == RATE:
            us, parts = terms.span(cost)
            us, parts = state[0] + us, state[1] + parts
            if parts >= terms.amount:
                us, parts = us + 1, parts - terms.amount
            state = (us, parts, terms.amount)
        else:
            state = (state[0], state[1] + cost, state[2])
        if limit.key not in self._counters and len(self._counters) >= self._counters_max:
            self._make_room()
        self._counters[limit.key] = state
        return state

    def _make_room(self) -> None:
        """Forget counters without effect among the oldest; when there are none, the oldest."""
        now, day = self._clock_us(), self._wall_us() // DAY_US
        oldest = list(itertools.islice(self._counters.items(), SWEPT_AT_ONCE))
        idle = [key for key, state in oldest if _is_idle(state, now, day)]
        for key, _ in oldest:
            self._counters.move_to_end(key)  # so that the next look is at others
        for key in idle or [oldest[0][0]]:
            del self._counters[key]


_made = tuple.__new__
"""A NamedTuple's own way to be made takes twice as long."""


def _spends(ask: Ask) -> Spends:
    """Empty for a question, and where a counter stands twice in an ask: then each step has to see the one before."""
    keys = {limit.key for limit in ask.limits}
    if not ask.cost or len(keys) < len(ask.limits):
        return ()
    return tuple((limit.key, limit.terms, *limit.terms.spending(ask.cost)) for limit in ask.limits)


def _is_idle(state: tuple[int, int, int], now: int, day: int) -> bool:
    if state[2] > 0:
        return state[0] < now
    return state[0] < (day if state[2] == -DAILY else month_of(day))


def _rate_now(terms: Terms, stored: tuple[int, int, int], now: int) -> tuple[int, int, int]:
    us, parts, amount = stored
    if amount != terms.amount:  # the policy has changed: its parts of a microsecond are other ones
        us, parts = us + 1, 0
    window_us, window_parts = terms.window
    if us > now + window_us + 1:  # the clock was set back: what was spent is spent, and no more than all of it
        us, parts = now + window_us, window_parts
    return (us, parts, terms.amount) if us >= now else (now, 0, terms.amount)


def _refuses(terms: Terms, state: tuple[int, int, int], cost: int, now: int) -> bool:
    if terms.kind != RATE:
        return state[1] + cost > terms.amount
    us, parts = terms.span(cost)
    us, parts = state[0] + us - terms.window[0], state[1] + parts - terms.window[1]
    if parts < 0:
        us, parts = us - 1, parts + terms.amount
    elif parts >= terms.amount:
        us, parts = us + 1, parts - terms.amount
    return us > now or (us == now and parts > 0)


def _given_back(
    terms: Terms, state: tuple[int, int, int], cost: int, now: int, spent_us: int, period: int
) -> tuple[int, int, int] | None:
    """The state without what a call cost; None when there is nothing to give back any more."""
    if terms.kind != RATE:
        return (period, max(0, state[1] - cost), state[2]) if state[0] == period else None
    # Time that has passed since has given a part back already: only the rest may be, or calls are let in twice.
    us, parts = terms.span(cost)
    us -= max(0, now - spent_us)
    if us < 0 or (us == 0 and parts == 0):
        return None
    us, parts = state[0] - us, state[1] - parts
    if parts < 0:
        us, parts = us - 1, parts + terms.amount
    return (us, parts, terms.amount) if us >= now else (now, 0, terms.amount)
