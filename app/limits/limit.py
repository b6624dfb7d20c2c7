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


SHAPES_KEPT = 4_096
"""Limits of one policy have one shape; tightened ones have their own."""


def _span(amount: int, period_us: int, cost: int) -> tuple[int, int]:
    return divmod(cost * period_us, amount)


@lru_cache(SHAPES_KEPT)
def _shape(kind: Kind, amount: int, period_us: int, burst: int) -> tuple[tuple[int, int], tuple[Kind, int, int, int]]:
    """Of many callers' limits, made once: what each of 10,000 has for itself, the garbage collector walks."""
    window = _span(amount, period_us, burst)
    return window, (kind, amount, *window)


@lru_cache(SHAPES_KEPT)
def _spending(kind: Kind, amount: int, period_us: int, burst: int, cost: int) -> tuple[int, int]:
    if kind == RATE:
        return _span(amount, period_us, cost if cost <= burst else burst + 1)
    return cost if cost <= amount else amount + 1, 0


class Limit:
    """What one counter may reach. Made once for a counter and kept; compared by identity.

    `amount` calls per `period_us` with bursts up to `burst`, or `amount` in a day or month. `cost` of a call counts
    instead of 1. `on_failure` is the answer while the store is away: `local` means `fallback` in this process. `step`:
    at how many tenths of its rate it is held; None for one that load does not change.
    """

    __slots__ = (
        "_tightened",
        "amount",
        "burst",
        "counter",
        "fallback",
        "key",
        "kind",
        "on_failure",
        "over",
        "period_us",
        "rule",
        "shadow",
        "step",
        "window",
    )

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
        self.rule = rule
        self.kind = kind
        self.amount = amount
        self.period_us = period_us
        self.burst = burst
        self.shadow = shadow
        self.on_failure = on_failure
        self.over: Any = None
        """Of admission: until when, from which cost on and with what it refuses without asking; None: ask."""
        self.step = step
        self._tightened: tuple[int, dict[int, Limit]] | None = None
        self.window, self.counter = _shape(kind, amount, period_us, burst)
        """What a full burst takes, and the counter as the script reads it."""
        self.fallback = self if replicas == 1 else self._part(replicas)

    def span(self, cost: int) -> tuple[int, int]:
        """The time that `cost` calls take at this rate: microseconds, and parts of 1/`amount` of one."""
        return _span(self.amount, self.period_us, cost)

    def spending(self, cost: int) -> tuple[int, int]:
        """What a cost adds to the counter. What never passes is told as little over the limit: all numbers stay under
        2**53."""
        return _spending(self.kind, self.amount, self.period_us, self.burst, cost)

    def tightened(self, step: int, cost: int) -> Limit:
        """This limit at so many tenths of its rate, for calls of this cost. The same counter: a longer period and a
        smaller burst over the same amount, so that no store needs to know. What could pass at all still does, later."""
        if self.step is None or step >= STEPS:
            return self
        if self._tightened is None or self._tightened[0] != step:
            self._tightened = (step, {})
        kept = self._tightened[1]
        burst = max(-(-self.burst * step // STEPS), min(cost, self.burst))
        limit = kept.get(burst)
        if limit is None:
            limit = kept[burst] = Limit(
                self.key,
                self.rule,
                RATE,
                self.amount,
                period_us=self.period_us * STEPS // step,
                burst=burst,
                shadow=self.shadow,
                on_failure=self.on_failure,
                replicas=self.fallback.period_us // self.period_us,
                step=step,
            )
        return limit

    def alone(self, cost: int) -> Limit:
        """This limit as this replica keeps it while the store is away, for calls of this cost. What could pass at all
        still does, though it costs more than one replica's part: once nothing of the part is used."""
        part = self.fallback
        if not (part.burst or part.amount) < cost <= (self.burst or self.amount):
            return part
        return Limit(
            self.key,
            self.rule,
            self.kind,
            self.amount if self.kind == RATE else cost,
            period_us=part.period_us,
            burst=cost if self.kind == RATE else 0,
            shadow=self.shadow,
            on_failure=self.on_failure,
            step=self.step,
        )

    def _part(self, replicas: int) -> Limit:
        """This limit as one of so many replicas keeps it alone; never 0, for that would be `closed`."""
        if self.kind != RATE:
            part = max(1, self.amount // replicas)
            return Limit(self.key, self.rule, self.kind, part, shadow=self.shadow, on_failure=self.on_failure)
        return Limit(
            self.key,
            self.rule,
            RATE,
            self.amount,
            period_us=self.period_us * replicas,
            burst=max(1, self.burst // replicas),
            shadow=self.shadow,
            on_failure=self.on_failure,
            step=self.step,
        )
