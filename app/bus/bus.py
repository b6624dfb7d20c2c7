"""What is said to other replicas, and the bus of a service that has none.

Knows no call, no tool and no Redis; `redis_bus` does. The executor, the result cache and `opening` hold on to it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

Message = Mapping[str, Any]
Listener = Callable[[Message], bool]
"""Whether it did what the message asks for."""


class Bus:
    """Nobody else is there: what holds without Redis."""

    def __init__(self) -> None:
        self.listeners: dict[str, Listener] = {}
        self.on_gap: Callable[[], Awaitable[None]] = _nothing

    async def tell(self, kind: str, **what: Any) -> bool:
        """To every other replica. False: nobody can be told."""
        return True

    async def ask(self, kind: str, **what: Any) -> bool:
        """Whether another replica did it."""
        return False


async def _nothing() -> None:
    """No gap matters."""
