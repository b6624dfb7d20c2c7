"""What a store of counters is asked and what it answers. `memory_store` and `redis_store` are the two that there are.

An ask names all limits of one call: it spends at every one of them or at none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

from app.limits.limit import RATE, Kind, Limit, Terms
from app.limits.room import Room

PASSES, REFUSES, WOULD_REFUSE = 0, 1, 2

Spends = tuple[tuple[str, Terms, int, int], ...]
"""Of an ask: each counter's key and terms, with what the cost adds to it."""

FORMS_KEPT = 1_024
"""Of asks: as many as there are sets of policies that bind a call, times their tightened forms."""


class StoreAway(Exception):
    """The store did not answer in its time, or not as it should: what holds now is each limit's `on_failure`."""


class Form:
    """What the asks of all callers of the same policies have alike: one object."""

    __slots__ = ("kinds", "told")

    def __init__(self, kinds: tuple[Kind, ...], told: tuple[int, Terms] | None) -> None:
        self.kinds = kinds
        self.told = told
        """Place and terms of the limit that is told to the caller, where there is no choice: the only rate that is
        enforced, or without one the only quota."""


@lru_cache(FORMS_KEPT)
def _form(terms: tuple[Terms, ...]) -> Form:
    enforced = [(place, one) for place, one in enumerate(terms) if not one.shadow]
    told = [(place, one) for place, one in enforced if one.kind == RATE] or enforced
    return Form(tuple(one.kind for one in terms), told[0] if len(told) == 1 else None)


class Ask:
    """Spend `cost` at every limit, or, with the verdict that spent it, give it back. A cost of 0 is a question.

    Nothing in it changes but what its store has made of it, once: `spends` what is added; `keys` and `want` what is
    sent, of `counters` keys."""

    __slots__ = ("cost", "counters", "form", "keys", "limits", "spends", "spent", "want")

    def __init__(self, limits: tuple[Limit, ...], cost: int, spent: Verdict | None = None) -> None:
        self.limits = limits
        self.cost = cost
        self.spent = spent
        self.form = _form(tuple([limit.terms for limit in limits]))
        self.spends: Spends | None = None
        self.counters = len(limits)
        self.keys: bytes | None = None
        self.want = b""

    def back(self, spent: Verdict) -> Ask:
        """The ask that gives back what this one has spent."""
        return Ask(self.limits, self.cost, spent)


class Verdict(NamedTuple):
    """One entry per limit: `(status, a, b)`, where a and b are the counter's state afterwards. A rate: its TAT in Unix
    microseconds and parts of 1/`amount` of one, never before `now_us`. A quota: the period's number and what is used.
    """

    now_us: int
    states: Sequence[tuple[int, int, int]]

    @property
    def passes(self) -> bool:
        return all(state[0] != REFUSES for state in self.states)


class Waiter(Protocol):
    """Who waits for a verdict: a future, or what goes on by itself. Done before it is told: it has been withdrawn."""

    def done(self) -> bool: ...
    def set_result(self, verdict: Verdict, /) -> None: ...
    def set_exception(self, error: StoreAway, /) -> None: ...


class LimitStore(Protocol):
    """Where counters live."""

    @property
    def room(self) -> Room | None:
        """Where who begins many calls at once asks first; None where every ask is decided at once."""

    @property
    def up(self) -> bool:
        """Whether it answers; while it does not, `ask` raises at once."""

    @property
    def state(self) -> str:
        """For people: what it is, and why it is away if it is."""

    async def trouble(self) -> str | None:
        """What an operator has to mend although it answers; None: nothing that can be told."""

    def ask(self, ask: Ask) -> Verdict | asyncio.Future[Verdict]:
        """Decide, now or soon. Raises StoreAway, here or in the future."""

    def ask_for(self, waiter: Waiter, ask: Ask) -> Verdict | None:
        """Decide now, or tell the waiter soon. Raises StoreAway, here or to the waiter."""

    def wall_us(self, now_us: int) -> int:
        """Unix microseconds of the calendar at a verdict's `now_us`: quotas end by it, and it is what is told."""

    def give_back(self, ask: Ask) -> None:
        """Undo a spending, as far as time has not done so already. Never raises, never waits."""
