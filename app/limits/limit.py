"""One limit: a counter with a rule, as a store sees it, and the integer arithmetic of both kinds.

A rate is a GCRA (generic cell rate algorithm, ITU-T I.371): its state is the theoretical arrival time (TAT) of the next
call. A quota is a count within a UTC day or month. Time is whole microseconds and a remainder in parts of 1/`amount`
microsecond, so that nothing is ever rounded; every number stays under 2**53, which Lua's doubles hold exactly.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any, Final, Literal

RATE: Final = 0
DAILY: Final = 1
MONTHLY: Final = 2
KINDS = ("rate", "daily", "monthly")
Kind = Literal[0, 1, 2]

OnFailure = Literal["local", "open", "closed"]

STEPS: Final = 10
"""An adaptive rate is held at tenths of itself: few enough to keep, fine enough not to jump."""

WINDOW_US_MAX = 366 * 86_400 * 1_000_000
"""The time in which a burst may come back whole: past a year nobody waits for it, and 2**53 is far away."""

KEY_PREFIX = "{limits}:"
"""One hash tag, so that a Cluster decides all limits of a call on one shard, atomically."""


def counter_key(*parts: str) -> str:
    """The key of a counter. Parts are hashed with their lengths: no choice of names makes two counters one."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(b"%d:%b" % (len(encoded), encoded))
    return KEY_PREFIX + digest.hexdigest()[:40]


TERMS_KEPT = 4_096
"""Of policies there are a few; tightened rates have terms of their own."""


def _span(amount: int, period_us: int, cost: int) -> tuple[int, int]:
    return divmod(cost * period_us, amount)


@lru_cache(TERMS_KEPT)
def _spending(kind: Kind, amount: int, period_us: int, burst: int, cost: int) -> tuple[int, int]:
    if kind == RATE:
        return _span(amount, period_us, cost if cost <= burst else burst + 1)
    return cost if cost <= amount else amount + 1, 0


class Terms:
    """What a policy says of its counters: one object for all of them, since those of 10,000 callers fit no cache of a
    processor. `amount` calls per `period_us` with bursts up to `burst`, or `amount` in a day or month. `on_failure` is
    the answer while the store is away. `step`: at how many tenths of its rate it is held; None for one that load does
    not change."""

    __slots__ = ("amount", "burst", "counter", "kind", "on_failure", "period_us", "rule", "shadow", "step", "window")

    def __init__(
        self,
        rule: str,
        kind: Kind,
        amount: int,
        period_us: int,
        burst: int,
        shadow: bool,
        on_failure: OnFailure,
        step: int | None,
    ) -> None:
        self.rule = rule
        self.kind = kind
        self.amount = amount
        self.period_us = period_us
        self.burst = burst
        self.shadow = shadow
        self.on_failure = on_failure
        self.step = step
        self.window = _span(amount, period_us, burst)
        """What a full burst takes."""
        self.counter = (kind, amount, *self.window)
        """As the script reads it."""

    def span(self, cost: int) -> tuple[int, int]:
        """The time that `cost` calls take at this rate: microseconds, and parts of 1/`amount` of one."""
        return _span(self.amount, self.period_us, cost)

    def spending(self, cost: int) -> tuple[int, int]:
        """What a cost adds to a counter. What never passes is told as little over the limit: all numbers stay under
        2**53."""
        return _spending(self.kind, self.amount, self.period_us, self.burst, cost)


_terms = lru_cache(TERMS_KEPT)(Terms)


class Limit:
    """What one counter may reach. Made once for a counter and kept; compared by identity. `cost` of a call counts
    instead of 1. Where the store is away and `on_failure` says `local`, `fallback` holds in this process."""

    __slots__ = ("_tightened", "fallback", "key", "over", "terms")

    def __init__(
        self,
        key: str,
        rule: str,
        kind: Kind,
        amount: int,
        *,
        period_us: int = 0,
        burst: int = 0,
        shadow: bool = False,
        on_failure: OnFailure = "closed",
        replicas: int = 1,
        step: int | None = None,
    ) -> None:
        self.key = key
        self.terms = _terms(rule, kind, amount, period_us, burst, shadow, on_failure, step)
        self.over: Any = None
        """Of admission: until when, from which cost on and with what it refuses without asking; None: ask."""
        self._tightened: tuple[int, dict[int, Limit]] | None = None
        self.fallback = self if replicas == 1 else self._part(replicas)

    def tightened(self, step: int, cost: int) -> Limit:
        """This limit at so many tenths of its rate, for calls of this cost. The same counter: a longer period and a
        smaller burst over the same amount, so that no store needs to know. What could pass at all still does, later."""
        terms = self.terms
        if terms.step is None or step >= STEPS:
            return self
        if self._tightened is None or self._tightened[0] != step:
            self._tightened = (step, {})
        kept = self._tightened[1]
        burst = max(-(-terms.burst * step // STEPS), min(cost, terms.burst))
        limit = kept.get(burst)
        if limit is None:
            limit = kept[burst] = Limit(
                self.key,
                terms.rule,
                RATE,
                terms.amount,
                period_us=terms.period_us * STEPS // step,
                burst=burst,
                shadow=terms.shadow,
                on_failure=terms.on_failure,
                replicas=self.fallback.terms.period_us // terms.period_us,
                step=step,
            )
        return limit

    def alone(self, cost: int) -> Limit:
        """This limit as this replica keeps it while the store is away, for calls of this cost. What could pass at all
        still does, though it costs more than one replica's part: once nothing of the part is used."""
        terms, part = self.terms, self.fallback.terms
        if not (part.burst or part.amount) < cost <= (terms.burst or terms.amount):
            return self.fallback
        return Limit(
            self.key,
            terms.rule,
            terms.kind,
            terms.amount if terms.kind == RATE else cost,
            period_us=part.period_us,
            burst=cost if terms.kind == RATE else 0,
            shadow=terms.shadow,
            on_failure=terms.on_failure,
            step=terms.step,
        )

    def _part(self, replicas: int) -> Limit:
        """This limit as one of so many replicas keeps it alone; never 0, for that would be `closed`."""
        terms = self.terms
        if terms.kind != RATE:
            part = max(1, terms.amount // replicas)
            return Limit(self.key, terms.rule, terms.kind, part, shadow=terms.shadow, on_failure=terms.on_failure)
        return Limit(
            self.key,
            terms.rule,
            RATE,
            terms.amount,
            period_us=terms.period_us * replicas,
            burst=max(1, terms.burst // replicas),
            shadow=terms.shadow,
            on_failure=terms.on_failure,
            step=terms.step,
        )
