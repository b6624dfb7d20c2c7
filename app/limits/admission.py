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
from app.limits.limit import DAILY, KINDS, RATE, STEPS, Limit, Terms
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

    terms: Terms
    remaining: int
    used: int
    reset_s: float


class Grant:
    """What one call has spent; the way to give it back, and to see what is left."""

    __slots__ = ("ask", "store", "verdict")

    def __init__(self, ask: Ask, verdict: Verdict, store: LimitStore) -> None:
        self.ask = ask
        self.verdict = verdict
        self.store = store

    def give_back(self) -> None:
        """The call did not run after all."""
        if self.ask.cost:
            self.store.give_back(self.ask.back(self.verdict))

    @property
    def wall_us(self) -> int:
        """What the calendar said when it was decided."""
        return self.store.wall_us(self.verdict.now_us)

    def allowance(self, terms: Terms, state: tuple[int, int, int], wall_us: int | None = None) -> Allowance:
        if terms.kind == RATE:
            return _rate_left(terms, state, self.verdict.now_us)
        return _quota_left(terms, state, self.wall_us if wall_us is None else wall_us)

    def allowances(self, wall_us: int | None = None) -> list[Allowance]:
        """One for each limit that is enforced."""
        pairs = zip(self.ask.limits, self.verdict.states, strict=True)
        return [self.allowance(limit.terms, state, wall_us) for limit, state in pairs if not limit.terms.shadow]

    def tightest(self) -> Allowance | None:
        """The rate with the least left; without one, the quota. Asked for every call: no list is made."""
        told = self.ask.form.told
        if told is not None:  # the usual case: one rate, and quotas or none
            place, terms = told
            if terms.kind == RATE:
                return _rate_left(terms, self.verdict.states[place], self.verdict.now_us)
            return self.allowance(terms, self.verdict.states[place])
        found: Allowance | None = None
        for limit, state in zip(self.ask.limits, self.verdict.states, strict=True):
            terms = limit.terms
            if terms.shadow or (found is not None and terms.kind != RATE == found.terms.kind):
                continue
            one = self.allowance(terms, state)
            if found is None or terms.kind == RATE != found.terms.kind or one.remaining < found.remaining:
                found = one
        return found


class Asked:
    """An ask that the store has not answered yet. Cancel `future` to withdraw it."""

    __slots__ = ("_admission", "_ask", "future")

    def __init__(self, admission: Admission, ask: Ask, future: asyncio.Future[Verdict]) -> None:
        self._admission = admission
        self._ask = ask
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
        return self._admission.judged(self._ask, verdict)

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
        self._over_until = 0.0
        """Until when some limit may be over; 0: none is, and no call need look at its own."""

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
            return self.judged(ask, answer)
        return Asked(self, ask, answer)  # type: ignore[arg-type]

    def admit_for(self, waiter: Waiter, bound: Bound, cost: int) -> Grant | Ask:
        """`admit` for who does not await: the waiter gets the verdict of the ask, to be `judged`, or StoreAway, and
        then what holds is `without_store`."""
        ask = self._ask(bound, cost)
        try:
            verdict = self.store.ask_for(waiter, ask)
        except StoreAway:
            return self.without_store(ask)
        return ask if verdict is None else self.judged(ask, verdict)

    def _ask(self, bound: Bound, cost: int) -> Ask:
        """Raises what was over a moment ago."""
        ask = bound.ask(cost) if self.step == STEPS or not bound.adaptive else bound.tightened_ask(cost, self.step)
        if self._over_until:
            self._refuse_what_is_over(ask)
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

    def judged(self, ask: Ask, verdict: Verdict, store: LimitStore | None = None) -> Grant:
        """A grant, or the refusal by the limit that takes longest to let such a call in."""
        grant = Grant(ask, verdict, self.store if store is None else store)
        by_kind, states = self._by_kind, verdict.states
        for state in states:
            if state[0]:
                break
        else:  # the usual case
            for kind in ask.form.kinds:
                by_kind[kind]["allowed"] += 1
            return grant
        refusing = [limit for limit, state in zip(ask.limits, states, strict=True) if state[0] == REFUSES]
        if refusing:
            for limit in refusing:
                by_kind[limit.terms.kind]["refused"] += 1
            raise self._refusal(grant, refusing)
        for limit, state in zip(ask.limits, states, strict=True):
            if state[0] == WOULD_REFUSE:
                by_kind[limit.terms.kind]["would_refuse"] += 1
                self._say("limit would refuse", limit.terms)
            else:
                by_kind[limit.terms.kind]["allowed"] += 1
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
            terms = limit.terms
            if terms.on_failure == "local":
                local.append(limit.alone(cost))
                continue
            closed = terms.on_failure == "closed" and not terms.shadow
            if count:
                self._by_kind[terms.kind]["unavailable" if closed else "unchecked"] += 1
            if closed:
                raise DependencyUnavailable(
                    "The store of limits is away and a policy says to wait for it", retry_after_ms=1000, rule=terms.rule
                )
        return tuple(local)

    def _refuse_what_is_over(self, ask: Ask) -> None:
        now = monotonic()
        if now >= self._over_until:
            self._over_until = 0.0
            return
        over: list[Over] = []
        for limit in ask.limits:
            if limit.over is not None:
                until, cost, one = limit.over
                if now >= until:
                    limit.over = None
                elif ask.cost >= cost:
                    over.append(one)
        if over and self.store.up:
            for one in over:
                self._by_kind[one.limit.terms.kind]["refused"] += 1
            last = max(over, key=lambda one: one.at + one.wait_s)
            self._say("limit refuses", last.limit.terms)
            raise last.again(now, ask.cost)

    def _refusal(self, grant: Grant, refusing: Sequence[Limit]) -> ToolServiceError:
        over = [Over(grant, limit) for limit in refusing]
        last = max(over, key=lambda one: one.wait_s)
        self._say("limit refuses", last.limit.terms)
        if grant.store is not self._fallback and not isinstance(grant.store, MemoryStore):
            for one in over:
                if 0 < one.wait_s < math.inf:
                    until = one.at + min(one.wait_s, OVER_REMEMBERED_S)
                    one.limit.over = (until, grant.ask.cost, one)
                    self._over_until = max(self._over_until, until)
        error = last.again(last.at, grant.ask.cost)
        if grant.store is self._fallback and error.retry_after_ms is not None:
            error.retry_after_ms = min(error.retry_after_ms, AWAY_WAIT_MS_MAX)
        return error

    def _say(self, message: str, terms: Terms) -> None:
        """One line per rule and time, with the count of those that were not said."""
        now = monotonic()
        said_at, unsaid = self._said.get((message, terms.rule), (-math.inf, 0))
        if now - said_at < SAID_EVERY_S:
            self._said[message, terms.rule] = (said_at, unsaid + 1)
            return
        self._said[message, terms.rule] = (now, 0)
        logger.info(message, extra={"rule": terms.rule, "kind": KINDS[terms.kind], "unsaid": unsaid})


class Over:
    """One limit that refused, kept for as long as it goes on refusing."""

    __slots__ = ("_now_us", "_state", "allowance", "at", "limit", "reset_at", "wait_s")

    def __init__(self, grant: Grant, limit: Limit) -> None:
        wall_us, terms = grant.wall_us, limit.terms
        state = next(
            state
            for one, state in zip(grant.ask.limits, grant.verdict.states, strict=True)
            if one is limit and state[0] == REFUSES
        )
        self._state = state
        self._now_us = grant.verdict.now_us if terms.kind == RATE else wall_us
        self.limit = limit
        self.at = monotonic()
        self.allowance = grant.allowance(terms, state, wall_us)
        self.wait_s = _wait_s(terms, state, grant.ask.cost, self._now_us)
        self.reset_at = rfc3339(wall_us / 1e6 + self.allowance.reset_s)

    def again(self, now: float, cost: int) -> ToolServiceError:
        """The error for a call of this cost, as of `now` (seconds of `monotonic`)."""
        terms, passed_s = self.limit.terms, now - self.at
        wait_s = _wait_s(terms, self._state, cost, self._now_us)
        wait_ms = None if wait_s == math.inf else max(1, math.ceil((wait_s - passed_s) * 1e3))
        error: ToolServiceError
        if terms.kind == RATE:
            error = RateLimited(terms.rule, terms.amount, wait_ms)
        else:
            error = QuotaExceeded(terms.rule, terms.amount, self.reset_at, wait_ms)
        error.allowance = self.allowance._replace(reset_s=max(0.0, self.allowance.reset_s - passed_s))
        return error


_made = tuple.__new__
"""A NamedTuple's own way to be made takes twice as long."""


def _quota_left(terms: Terms, state: tuple[int, int, int], wall_us: int) -> Allowance:
    _, period, used = state
    left_s = max(0.0, (_period_end_us(terms, period) - wall_us) / 1e6)
    return Allowance(terms, max(0, terms.amount - used), used, left_s)


def _rate_left(terms: Terms, state: tuple[int, int, int], now_us: int) -> Allowance:
    _, a, b = state
    window_us, window_parts = terms.window
    remaining = ((now_us + window_us - a) * terms.amount + window_parts - b) // terms.period_us
    if remaining < 0:
        remaining = 0
    elif remaining > terms.burst:
        remaining = terms.burst
    return _made(Allowance, (terms, remaining, terms.burst - remaining, (a - now_us) / 1e6))


def _wait_s(terms: Terms, state: tuple[int, int, int], cost: int, now_us: int) -> float:
    """Until a call of this cost passes; infinite when it never will. `now_us` of a quota is the calendar's."""
    _, a, b = state
    if terms.kind != RATE:
        return math.inf if cost > terms.amount else max(0.001, (_period_end_us(terms, a) - now_us) / 1e6)
    if cost > terms.burst:
        return math.inf
    us, parts = terms.span(cost)
    us = a + us - terms.window[0] - now_us
    return (us + math.ceil((b + parts - terms.window[1]) / terms.amount)) / 1e6


def _period_end_us(terms: Terms, period: int) -> int:
    """Unix microseconds of the end of a day or month that is given by its number since 1970."""
    if terms.kind == DAILY:
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
        of_kind = [(one.remaining, position) for position, (one, _) in enumerate(shown) if one.terms.kind == kind]
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
    terms = one.terms
    entry: dict[str, Any] = {
        "rule": terms.rule,
        "kind": KINDS[terms.kind],
        "limit": terms.amount,
        "remaining": one.remaining,
        "reset_at": rfc3339(wall_us / 1e6 + one.reset_s),
    }
    if terms.kind == RATE:
        entry.update(window_seconds=terms.period_us / 1e6, burst=terms.burst)
        if terms.step is not None:
            entry["factor"] = terms.step / STEPS
    else:
        entry["used"] = one.used
    return entry
