"""Room at a store of limits: who begins many calls at once waits while many asks of others are on their way.

Calls that wait for their verdicts hold their memory, and a thousand of them fit no cache of a processor: a batch of 20
from each of 64 connections costs a sixth less where they begin by and by. Calls that come alone never wait here, nor
does anyone for a tool. The store says how many asks it has in hand; the dispatcher of batches waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from app.fairness import FairQueue
from app.stepping import Signal

ASKS_AT_ONCE = 160
"""On their way before others wait: 32,000 calls/s of batches where Redis takes 5 ms."""


class Room:
    """One per store. Whoever waits is let in by the next verdicts, or by the store's end: within its budget."""

    __slots__ = ("_due", "_loop", "_on_their_way", "_waiting")

    def __init__(self, on_their_way: Callable[[], int]) -> None:
        self._on_their_way = on_their_way
        self._loop = asyncio.get_running_loop()
        self._waiting: FairQueue[_Turn] = FairQueue()
        self._due = False

    async def enter(self, calls: int, tenant: str) -> None:
        """Returns when so many calls may begin: of a tenant in the order of their coming, and tenants by turns."""
        if not self._waiting.turns and self._on_their_way() < ASKS_AT_ONCE:
            return
        turn = _Turn(calls, Signal(self._loop))
        self._waiting.add(turn, tenant)
        try:
            await turn.let_in.wait()
        finally:
            self._waiting.discard(turn)

    def decided(self) -> None:
        """Some asks were. Who waits is let in when this tick's answers are written."""
        if self._waiting.turns and not self._due:
            self._due = True
            self._loop.call_soon(self._let_in)

    def open(self) -> None:
        """For all: the store is away, and asks are answered at once."""
        while (turn := self._waiting.pop_next()) is not None:
            turn.let_in.complete()

    def _let_in(self) -> None:
        self._due = False
        on_their_way = self._on_their_way()
        room = ASKS_AT_ONCE - on_their_way
        while room > 0 and (turn := self._waiting.pop_next()) is not None:
            turn.let_in.complete()
            room -= turn.calls
        if not on_their_way:  # those that were let in may ask for nothing, and then nothing is decided
            self.decided()


class _Turn:
    """So many calls that wait together."""

    __slots__ = ("calls", "let_in")

    def __init__(self, calls: int, let_in: Signal) -> None:
        self.calls = calls
        self.let_in = let_in

    def done(self) -> bool:
        return self.let_in.done
