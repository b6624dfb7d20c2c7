"""Admission of one call: every limit that binds it is asked at once, and the answer becomes a grant or a refusal.

Knows policies and stores; knows no HTTP and no tool but by its id. What holds while the store is away, what was over a
moment ago, what is counted and what is said in the log is decided here. Called by the executor.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from datetime import date
from time import monotonic
from typing import Any, NamedTuple

from app.calls import rfc3339
from app.errors import DependencyUnavailable, QuotaExceeded, RateLimited, ToolServiceError
from app.limits.limit import DAILY, KINDS, RATE, STEPS, Limit
from app.limits.memory_store import DAY_US, MemoryStore
from app.limits.policy import Bound, Policies
from app.limits.store import REFUSES, WOULD_REFUSE, Ask, LimitStore, StoreAway, Verdict, Waiter

logger = logging.getLogger("app.limits")

OUTCOMES = ("allowed", "refused", "would_refuse", "unchecked", "unavailable")
"""Of one limit of one call; `would_refuse` is a shadow's, the last two are `open` and `closed` without the store."""

OVER_REMEMBERED_S = 1.0
"""A counter that is over is not asked again for this long, or until it lets the next call in, if that is sooner.
Longer, and a refund or a changed limit would come late."""

AWAY_WAIT_MS_MAX = 60_000
"""What a replica's part of a limit refuses may pass once the store is back: nobody is told to wait for midnight."""

SAID_EVERY_S = 10.0
"""Between two lines of the log about one rule."""


class Allowance(NamedTuple):
    """What one limit has left, for the caller to see. `reset_s` is the time until all of it is there again."""

    limit: Limit
    remaining: int
    used: int
    reset_s: float


class Grant:
    """What one call has spent; the way to give it back, and to see what is left."""

    __slots__ = ("ask", "store", "told", "verdict")

    def __init__(self, ask: Ask, verdict: Verdict, store: LimitStore, told: tuple[int, ...] | None = None) -> None:
        self.ask = ask
        self.verdict = verdict
        self.store = store
        self.told = told

    def give_back(self) -> None:
        """The call did not run after all."""
        if self.ask.cost:
            self.store.give_back(self.ask.back(self.verdict))

    @property
    def wall_us(self) -> int:
        """What the calendar said when it was decided."""
        return self.store.wall_us(self.verdict.now_us)

    def allowance(self, limit: Limit, state: tuple[int, int, int], wall_us: int | None = None) -> Allowance:
        if limit.kind == RATE:
            return _rate_left(limit, state, self.verdict.now_us)
        return _quota_left(limit, state, self.wall_us if wall_us is None else wall_us)

    def allowances(self, wall_us: int | None = None) -> list[Allowance]:
        """One for each limit that is enforced."""
        pairs = zip(self.ask.limits, self.verdict.states, strict=True)
        return [self.allowance(limit, state, wall_us) for limit, state in pairs if not limit.shadow]

    def tightest(self) -> Allowance | None:
        """The rate with the least left; without one, the quota. Asked for every call: no list is made."""
        found: Allowance | None = None
        if self.told is not None and len(self.told) == 1:  # the usual case: one rate, and quotas or none
            place = self.told[0]
            limit = self.ask.limits[place]
            if limit.kind == RATE:
                return _rate_left(limit, self.verdict.states[place], self.verdict.now_us)
            return self.allowance(limit, self.verdict.states[place])
        for limit, state in zip(self.ask.limits, self.verdict.states, strict=True):
            if limit.shadow or (found is not None and limit.kind != RATE == found.limit.kind):
                continue
            one = self.allowance(limit, state)
            if found is None or limit.kind == RATE != found.limit.kind or one.remaining < found.remaining:
                found = one
        return found


class Asked:
    """An ask that the store has not answered yet. Cancel `future` to withdraw it."""

    __slots__ = ("_admission", "_ask", "_told", "future")

    def __init__(
        self, admission: Admission, ask: Ask, future: asyncio.Future[Verdict], told: tuple[int, ...] | None
    ) -> None:
        self._admission = admission
        self._ask = ask
        self._told = told
        self.future = future

    async def settled(self) -> Grant:
        """Raises the refusal. Cancelled, it leaves nothing spent."""
        try:
            verdict = await self.future
        except StoreAway:
            return self._admission.without_store(self._ask)
        except asyncio.CancelledError:
            self._withdraw()
            raise
        return self._admission.judged(self._ask, verdict, told=self._told)

    def _withdraw(self) -> None:
        """Cancelled in the tick in which the answer came; any later answer the store gives back itself."""
        future = self.future
        if future.done() and not future.cancelled() and future.exception() is None and future.result().passes:
            self._admission.store.give_back(self._ask.back(future.result()))


class Admission:
    """Decides for the executor. `decisions` counts what `limit_decisions_total` shows, by kind and outcome."""

    def __init__(self, policies: Policies, store: LimitStore) -> None:
        self.policies = policies
        self.store = store
        self._fallback = MemoryStore()
        self.decisions = {kind: dict.fromkeys(OUTCOMES, 0) for kind in KINDS}
        self._by_kind = tuple(self.decisions.values())
        self.step = STEPS
        """At how many tenths of their rates adaptive limits are held; whoever watches the load sets it."""
        self._said: dict[tuple[str, str], tuple[float, int]] = {}

    def bind(self, tenant: str, subject: str, limit_class: str, tool_id: str) -> Bound:
        """The limits and slots of such a call."""
        return self.policies.bind(tenant, subject, limit_class, tool_id)

    def admit(self, bound: Bound, cost: int) -> Grant | Asked:
        """Spend `cost` at every limit. Raises RateLimited, QuotaExceeded, DependencyUnavailable: nothing was spent."""
        ask = self._ask(bound, cost)
        try:
            answer = self.store.ask(ask)
        except StoreAway:
            return self.without_store(ask)
        if type(answer) is Verdict:
            return self.judged(ask, answer, told=bound.told)
        return Asked(self, ask, answer, bound.told)  # type: ignore[arg-type]

    def admit_for(self, waiter: Waiter, bound: Bound, cost: int) -> Grant | Ask:
        """`admit` for who does not await: the waiter gets the verdict of the ask, to be `judged`, or StoreAway, and
        then what holds is `without_store`."""
        ask = self._ask(bound, cost)
        try:
            verdict = self.store.ask_for(waiter, ask)
        except StoreAway:
            return self.without_store(ask)
        return ask if verdict is None else self.judged(ask, verdict, told=bound.told)

    def _ask(self, bound: Bound, cost: int) -> Ask:
        """Raises what was over a moment ago."""
        ask = bound.ask(cost) if self.step == STEPS or not bound.adaptive else bound.tightened_ask(cost, self.step)
        for limit in ask.limits:
            if limit.over is not None:
                self._refuse_what_is_over(ask)
                break
        return ask

    async def look(self, limits: tuple[Limit, ...], cost: int = 1) -> Grant:
        """What is left of each limit, for calls of this cost; costs nothing itself. Raises DependencyUnavailable."""
        ask = Ask(tuple(limit.tightened(self.step, cost) for limit in limits), 0)
        if not limits:
            return Grant(ask, Verdict(0, ()), self.store)
        try:
            answer = self.store.ask(ask)
            verdict = answer if isinstance(answer, Verdict) else await answer
        except StoreAway:
            part = Ask(self._local_part(ask, cost, count=False), 0)
            return Grant(part, self._fallback.ask(part), self._fallback)
        return Grant(ask, verdict, self.store)

    def judged(
        self, ask: Ask, verdict: Verdict, store: LimitStore | None = None, told: tuple[int, ...] | None = None
    ) -> Grant:
        """A grant, or the refusal by the limit that takes longest to let such a call in."""
        grant = Grant(ask, verdict, self.store if store is None else store, told)
        by_kind, states = self._by_kind, verdict.states
        for state in states:
            if state[0]:
                break
        else:  # the usual case
            for limit in ask.limits:
                by_kind[limit.kind]["allowed"] += 1
            return grant
        refusing = [limit for limit, state in zip(ask.limits, states, strict=True) if state[0] == REFUSES]
        if refusing:
            for limit in refusing:
                by_kind[limit.kind]["refused"] += 1
            raise self._refusal(grant, refusing)
        for limit, state in zip(ask.limits, states, strict=True):
            if state[0] == WOULD_REFUSE:
                by_kind[limit.kind]["would_refuse"] += 1
                self._say("limit would refuse", limit)
            else:
                by_kind[limit.kind]["allowed"] += 1
        return grant

    def without_store(self, ask: Ask) -> Grant:
        """What holds while the store is away: each limit's own answer. Raises as `admit` does."""
        part = Ask(self._local_part(ask, ask.cost, count=True), ask.cost)
        return self.judged(part, self._fallback.ask(part), self._fallback)

    def _local_part(self, ask: Ask, cost: int, count: bool) -> tuple[Limit, ...]:
        """The limits of an ask that the store in this process decides, for calls of this cost. Raises
        DependencyUnavailable."""
        local = []
        for limit in ask.limits:
            if limit.on_failure == "local":
                local.append(limit.alone(cost))
                continue
            closed = limit.on_failure == "closed" and not limit.shadow
            if count:
                self._by_kind[limit.kind]["unavailable" if closed else "unchecked"] += 1
            if closed:
                raise DependencyUnavailable(
                    "The store of limits is away and a policy says to wait for it", retry_after_ms=1000, rule=limit.rule
                )
        return tuple(local)

    def _refuse_what_is_over(self, ask: Ask) -> None:
        now = 0.0
        over: list[Over] = []
        for limit in ask.limits:
            if limit.over is not None:
                now = now or monotonic()
                until, cost, one = limit.over
                if now >= until:
                    limit.over = None
                elif ask.cost >= cost:
                    over.append(one)
        if over and self.store.up:
            for one in over:
                self._by_kind[one.limit.kind]["refused"] += 1
            last = max(over, key=lambda one: one.at + one.wait_s)
            self._say("limit refuses", last.limit)
            raise last.again(now, ask.cost)

    def _refusal(self, grant: Grant, refusing: Sequence[Limit]) -> ToolServiceError:
        over = [Over(grant, limit) for limit in refusing]
        last = max(over, key=lambda one: one.wait_s)
        self._say("limit refuses", last.limit)
        if grant.store is not self._fallback and not isinstance(grant.store, MemoryStore):
            for one in over:
                if 0 < one.wait_s < math.inf:
                    until = one.at + min(one.wait_s, OVER_REMEMBERED_S)
                    one.limit.over = (until, grant.ask.cost, one)
        error = last.again(last.at, grant.ask.cost)
        if grant.store is self._fallback and error.retry_after_ms is not None:
            error.retry_after_ms = min(error.retry_after_ms, AWAY_WAIT_MS_MAX)
        return error

    def _say(self, message: str, limit: Limit) -> None:
        """One line per rule and time, with the count of those that were not said."""
        now = monotonic()
        said_at, unsaid = self._said.get((message, limit.rule), (-math.inf, 0))
        if now - said_at < SAID_EVERY_S:
            self._said[message, limit.rule] = (said_at, unsaid + 1)
            return
        self._said[message, limit.rule] = (now, 0)
        logger.info(message, extra={"rule": limit.rule, "kind": KINDS[limit.kind], "unsaid": unsaid})


class Over:
    """One limit that refused, kept for as long as it goes on refusing."""

    __slots__ = ("_now_us", "_state", "allowance", "at", "limit", "reset_at", "wait_s")

    def __init__(self, grant: Grant, limit: Limit) -> None:
        wall_us = grant.wall_us
        state = next(
            state
            for one, state in zip(grant.ask.limits, grant.verdict.states, strict=True)
            if one is limit and state[0] == REFUSES
        )
        self._state = state
        self._now_us = grant.verdict.now_us if limit.kind == RATE else wall_us
        self.limit = limit
        self.at = monotonic()
        self.allowance = grant.allowance(limit, state, wall_us)
        self.wait_s = _wait_s(limit, state, grant.ask.cost, self._now_us)
        self.reset_at = rfc3339(wall_us / 1e6 + self.allowance.reset_s)

    def again(self, now: float, cost: int) -> ToolServiceError:
        """The error for a call of this cost, as of `now` (seconds of `monotonic`)."""
        limit, passed_s = self.limit, now - self.at
        wait_s = _wait_s(limit, self._state, cost, self._now_us)
        wait_ms = None if wait_s == math.inf else max(1, math.ceil((wait_s - passed_s) * 1e3))
        error: ToolServiceError
        if limit.kind == RATE:
            error = RateLimited(limit.rule, limit.amount, wait_ms)
        else:
            error = QuotaExceeded(limit.rule, limit.amount, self.reset_at, wait_ms)
        error.allowance = self.allowance._replace(reset_s=max(0.0, self.allowance.reset_s - passed_s))
        return error


_made = tuple.__new__
"""A NamedTuple's own way to be made takes twice as long."""


def _quota_left(limit: Limit, state: tuple[int, int, int], wall_us: int) -> Allowance:
    _, period, used = state
    left_s = max(0.0, (_period_end_us(limit, period) - wall_us) / 1e6)
    return Allowance(limit, max(0, limit.amount - used), used, left_s)


def _rate_left(limit: Limit, state: tuple[int, int, int], now_us: int) -> Allowance:
    _, a, b = state
    window_us, window_parts = limit.window
    remaining = ((now_us + window_us - a) * limit.amount + window_parts - b) // limit.period_us
    if remaining < 0:
        remaining = 0
    elif remaining > limit.burst:
        remaining = limit.burst
    return _made(Allowance, (limit, remaining, limit.burst - remaining, (a - now_us) / 1e6))


def _wait_s(limit: Limit, state: tuple[int, int, int], cost: int, now_us: int) -> float:
    """Until a call of this cost passes; infinite when it never will. `now_us` of a quota is the calendar's."""
    _, a, b = state
    if limit.kind != RATE:
        return math.inf if cost > limit.amount else max(0.001, (_period_end_us(limit, a) - now_us) / 1e6)
    if cost > limit.burst:
        return math.inf
    us, parts = limit.span(cost)
    us = a + us - limit.window[0] - now_us
    return (us + math.ceil((b + parts - limit.window[1]) / limit.amount)) / 1e6


def _period_end_us(limit: Limit, period: int) -> int:
    """Unix microseconds of the end of a day or month that is given by its number since 1970."""
    if limit.kind == DAILY:
        return (period + 1) * DAY_US
    return first_day(period + 1) * DAY_US


def first_day(month: int) -> int:
    """Days since 1970-01-01 to the first day of a month, given in months since 1970-01."""
    return (date(1970 + month // 12, month % 12 + 1, 1) - date(1970, 1, 1)).days


def status(tool_id: str, cost: int, grant: Grant) -> dict[str, Any]:
    """The result of tools.get_rate_limit_status: what is enforced, and only that."""
    wall_us = grant.wall_us  # read once: a quota ends at midnight and not a microsecond before
    shown = [(one, _shown(one, wall_us)) for one in grant.allowances(wall_us)]

    def tightest(kind: int) -> dict[str, Any] | None:
        of_kind = [(one.remaining, position) for position, (one, _) in enumerate(shown) if one.limit.kind == kind]
        return None if not of_kind else shown[min(of_kind)[1]][1]

    rate, daily, monthly = (tightest(kind) for kind in range(len(KINDS)))
    return {
        "tool_id": tool_id,
        "cost": cost,
        "rate_limit": rate and {name: rate[name] for name in ("limit", "remaining", "reset_at", "window_seconds")},
        "quota": None
        if daily is None and monthly is None
        else {
            name: one and {key: one[key] for key in ("limit", "used", "remaining", "reset_at")}
            for name, one in (("daily", daily), ("monthly", monthly))
        },
        "policies": [entry for _, entry in shown],
    }


def _shown(one: Allowance, wall_us: int) -> dict[str, Any]:
    limit = one.limit
    entry: dict[str, Any] = {
        "rule": limit.rule,
        "kind": KINDS[limit.kind],
        "limit": limit.amount,
        "remaining": one.remaining,
        "reset_at": rfc3339(wall_us / 1e6 + one.reset_s),
    }
    if limit.kind == RATE:
        entry.update(window_seconds=limit.period_us / 1e6, burst=limit.burst)
        if limit.step is not None:
            entry["factor"] = limit.step / STEPS
    else:
        entry["used"] = one.used
    return entry
