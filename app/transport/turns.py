"""Large bodies one after another: to decode and check one takes milliseconds, and what came within one turn of the loop
would all be done before anything else is.
"""

from __future__ import annotations

import asyncio

from app.fairness import FairQueue
from app.stepping import settle

LARGE_BODY_BYTES = 32_768
"""Over it a body takes its turn, and room that all share. Those below are most, and bounded by the connections."""


class Turns:
    """Lets one pass in each turn of the loop: of a tenant in the order of their coming, and tenants by turns. As many
    wait as there are connections."""

    def __init__(self) -> None:
        self._taken = False
        self._waiting: FairQueue[asyncio.Future[None]] = FairQueue()

    async def take(self, tenant: str) -> None:
        """Returns in a turn in which nobody else has passed. May be cancelled."""
        loop = asyncio.get_running_loop()
        if self._taken:
            waits = loop.create_future()
            self._waiting.add(waits, tenant)
            try:
                await waits
            finally:
                self._waiting.discard(waits)
        else:
            self._taken = True
            loop.call_soon(self._next, loop)

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        waits = self._waiting.pop_next()
        if waits is None:
            self._taken = False
        else:
            settle(waits)
            loop.call_soon(self._next, loop)
