"""How many calls run at once: slots with a bounded queue and a bounded patience. Knows no tool and no HTTP."""

from __future__ import annotations

import asyncio
from collections import deque

from app.errors import Overloaded

QUEUE_PATIENCE_S = 1.0
"""Longer, and callers give up before they are served: a queue then only makes dead work."""


class Slots:
    """`limit` calls hold a slot, `queue_max` wait for one, first come first served.

    `take_now` decides without waiting; only when it says no is `wait` worth a future.
    """

    __slots__ = ("_waiting", "limit", "queue_max", "running")

    def __init__(self, limit: int, queue_max: int | None = None) -> None:
        self.limit = limit
        self.queue_max = limit if queue_max is None else queue_max
        self.running = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def queued(self) -> int:
        return len(self._waiting)

    def take_now(self) -> bool:
        if self.running < self.limit and not self._waiting:
            self.running += 1
            return True
        return False

    def wait(self) -> asyncio.Future[None]:
        """A future that is done once a slot is ours. Raises Overloaded when the queue is full."""
        if len(self._waiting) >= self.queue_max:
            raise Overloaded("Too many calls at once", retry_after_ms=int(QUEUE_PATIENCE_S * 1000))
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        return turn

    async def take(self, turn: asyncio.Future[None], patience_s: float) -> None:
        """Wait for `turn`. Raises Overloaded after the patience; leaves no slot behind when cancelled."""
        expiry = asyncio.get_running_loop().call_later(patience_s, _expire, turn)
        try:
            await turn
        except (Overloaded, asyncio.CancelledError):
            self._leave(turn)
            raise
        finally:
            expiry.cancel()

    def _leave(self, turn: asyncio.Future[None]) -> None:
        if turn.done() and not turn.cancelled() and turn.exception() is None:
            self.release()  # the slot came in the same tick as the cancellation
        elif turn in self._waiting:
            self._waiting.remove(turn)

    def release(self) -> None:
        """Give the slot to the next in the queue, or back."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.running -= 1


def _expire(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_exception(Overloaded("No slot came free in time", retry_after_ms=int(QUEUE_PATIENCE_S * 1000)))
