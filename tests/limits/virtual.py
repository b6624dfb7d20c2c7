"""An event loop in virtual time, on which work takes as long as it is said to take: load is simulated, the code under
it is the real one, and every run is the same."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _NoWaiting(selectors.SelectSelector):
    """Where a loop would sleep, the time is over at once."""

    slept: Callable[[float], None]

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "everybody waits and nothing is going to happen"
        if timeout > 0:
            self.slept(timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        selector = _NoWaiting()
        selector.slept = self._sleep
        self._now_s = 1000.0
        self.burned_s = 0.0
        super().__init__(selector)

    def time(self) -> float:
        return self._now_s

    def burn(self, seconds: float) -> None:
        """The loop computes for so long."""
        self._now_s += seconds
        self.burned_s += seconds

    def _sleep(self, seconds: float) -> None:
        self._now_s += seconds


def run_virtually(main: Callable[[VirtualLoop], Coroutine[Any, Any, T]]) -> T:
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(main(loop))
    finally:
        loop.close()
