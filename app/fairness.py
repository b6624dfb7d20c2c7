"""Who is next where there is not enough for all: tenants in turn, and each tenant's own in the order of their coming.

One queue for what is first come, first served, would be the property of whoever sends most. Knows nothing of what is
waited for; slots, threads, connections and look-ups of names are given out by it.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """What can stand in a queue: a future, or what has one."""

    def done(self) -> bool:
        """Whether it waits no more."""


T = TypeVar("T", bound=Waiting)


class FairQueue(Generic[T]):
    """Turns that wait: a queue per tenant, and tenants in the order in which they are served.

    Every step is a few dictionary steps, however many wait. OrderedDict throughout: a plain dictionary is searched from
    its first entry ever made for the first that is left. A tenant of whom nobody waits is not in here.
    """

    __slots__ = ("_queues", "_tenants_by_length", "longest", "turns")

    def __init__(self) -> None:
        self.turns: dict[T, str] = {}
        """Whose each turn is. Never walked, only counted and looked up."""
        self.longest = 0
        self._queues: OrderedDict[str, OrderedDict[T, None]] = OrderedDict()
        self._tenants_by_length: dict[int, OrderedDict[str, None]] = {}

    def length(self, tenant: str) -> int:
        queue = self._queues.get(tenant)
        return 0 if queue is None else len(queue)

    def ahead_of(self, tenant: str) -> int:
        """How many get a slot up to and including one more call of the tenant: its own and, tenants being served in
        turn, as many of each other one, as far as there are."""
        own = self.length(tenant)
        others = len(self._queues) - (own > 0)
        return min(len(self.turns), own + (own + 1) * others) + 1

    def add(self, turn: T, tenant: str) -> None:
        """Behind the tenant's others; a tenant that had none is served after those who wait."""
        queue = self._queues.get(tenant)
        if queue is None:
            queue = self._queues[tenant] = OrderedDict()
        queue[turn] = None
        self.turns[turn] = tenant
        self._resized(tenant, len(queue) - 1, len(queue))

    def discard(self, turn: T) -> None:
        tenant = self.turns.pop(turn, None)
        if tenant is not None:
            queue = self._queues[tenant]
            del queue[turn]
            self._shrunk(tenant, queue)

    def pop_next(self) -> T | None:
        """The oldest turn of the tenant that is next. Those cancelled in this very tick are still here: they go without
        costing their tenant its turn."""
        while self._queues:
            tenant, queue = next(iter(self._queues.items()))
            turn, _ = queue.popitem(last=False)
            del self.turns[turn]
            self._shrunk(tenant, queue)
            if not turn.done():
                if queue:
                    self._queues.move_to_end(tenant)
                return turn
        return None

    def pop_newest_of_longest(self) -> T:
        """Of several as long, the one that came to that length last."""
        tenant = next(reversed(self._tenants_by_length[self.longest]))
        queue = self._queues[tenant]
        turn, _ = queue.popitem()
        del self.turns[turn]
        self._shrunk(tenant, queue)
        return turn

    def _shrunk(self, tenant: str, queue: OrderedDict[T, None]) -> None:
        if not queue:
            del self._queues[tenant]
        self._resized(tenant, len(queue) + 1, len(queue))

    def _resized(self, tenant: str, before: int, after: int) -> None:
        """Lengths change by one, so the longest is found without a search."""
        by_length = self._tenants_by_length
        if after:
            peers = by_length.get(after)
            if peers is None:
                peers = by_length[after] = OrderedDict()
            peers[tenant] = None
        if before:
            peers = by_length[before]
            del peers[tenant]
            if not peers:
                del by_length[before]
        if after > self.longest or (before == self.longest and before not in by_length):
            self.longest = after


class FairSemaphore:
    """So many at once. What is given back goes to the tenant that is next, whoever holds the rest."""

    __slots__ = ("_waiting", "free")

    def __init__(self, size: int) -> None:
        self.free = size
        self._waiting: FairQueue[asyncio.Future[None]] = FairQueue()

    async def acquire(self, tenant: str) -> None:
        """Nobody waits while one is free. Cancelled, it holds nothing."""
        if self.free:
            self.free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(turn, tenant)
        try:
            await turn
        except BaseException:
            if turn.cancelled():
                self._waiting.discard(turn)
            else:
                self.release()  # it came in the tick of the cancellation
            raise

    def release(self) -> None:
        turn = self._waiting.pop_next()
        if turn is None:
            self.free += 1
        else:
            turn.set_result(None)
