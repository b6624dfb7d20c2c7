"""What a store of counters is asked and what it answers. `memory_store` and `redis_store` are the two that there are.

An ask names all limits of one call: it spends at every one of them or at none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from app.limits.limit import Limit

PASSES, REFUSES, WOULD_REFUSE = 0, 1, 2

Sent = tuple[tuple[str, ...], bytes]
"""Of an ask: the keys of its counters, and what is wanted of each."""


Spends = tuple[tuple[Limit, int, int], ...]
"""Of an ask: each limit with what the cost adds to its counter."""


class StoreAway(Exception):
    """The store did not answer in its time, or not as it should: what holds now is each limit's `on_failure`."""


class Ask:
    """Spend `cost` at every limit, or, with the verdict that spent it, give it back. A cost of 0 is a question.

    Nothing in it changes but what its store has made of it, once: `sent` what is sent of it, `spends` what is added."""

    __slots__ = ("cost", "limits", "sent", "spends", "spent")

    def __init__(self, limits: tuple[Limit, ...], cost: int, spent: Verdict | None = None) -> None:
        self.limits = limits
        self.cost = cost
        self.spent = spent
        self.sent: Sent | None = None
        self.spends: Spends | None = None

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
