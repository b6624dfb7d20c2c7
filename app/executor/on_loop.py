"""One run of a tool on the event loop that nobody awaits: it ends once, by the tool, its deadline or a cancellation.

What a waiting call costs is mostly who waits for it: this takes one task, the tool's own, and one timer. Called by
`runner`; knows no call, no slot and no limit.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from time import perf_counter
from typing import Any

from app.errors import TOOL_CANCELLED, TOOL_TIMEOUT, Failure, failure
from app.executor.forgetting import forget_run

UNWIND_S = 0.02
"""What a cancelled tool gets to close its connections before it is abandoned."""

TIMED_OUT = failure(TOOL_TIMEOUT, "The tool did not finish within its deadline")
CANCELLED = failure(TOOL_CANCELLED, "The call was cancelled")

STARTS_LATER = sys.version_info < (3, 12)


def start(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
    """A task that, where Python can do that, runs until its first real wait before this returns: a tool that never
    waits costs 0.6 µs then instead of 3."""
    if sys.version_info >= (3, 12):
        return asyncio.Task(coroutine, loop=loop, name=name, eager_start=True)
    return asyncio.Task(coroutine, loop=loop, name=name)


class LoopRun:
    """`then` gets it when it has ended; `cause` says why it was cut short, if it was, and `task` all the rest.
    `abandon` gets the task of a tool that does not end when it is told to."""

    __slots__ = ("_abandon", "_deadline", "_loop", "_then", "_timer", "cause", "task")

    task: asyncio.Task[Any]

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        deadline: float,
        abandon: Callable[[asyncio.Task[Any]], None],
        then: Callable[[LoopRun], None],
    ) -> None:
        self.cause: Failure | None = None
        self._loop = loop
        self._deadline = deadline
        self._abandon = abandon
        self._then: Callable[[LoopRun], None] | None = then
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, coroutine: Coroutine[Any, Any, Any], name: str) -> None:
        """It may have ended when this returns."""
        self.task = start(self._loop, coroutine, name)
        if STARTS_LATER:
            self.task.add_done_callback(self._task_ended)
            self._loop.call_soon(self._begun)  # behind the task's first step: who ends in it needs no timer
            return
        self._begun()
        if self.task.done():
            self._end()
        else:
            self.task.add_done_callback(self._task_ended)

    def cancel(self) -> bool:
        """False: too late, it has another outcome already."""
        if self.cause is None and not self.task.done():
            self._cut(CANCELLED)
        return self.cause is CANCELLED

    def _begun(self) -> None:
        if self.task.done():
            if self.cause is None and perf_counter() > self._deadline:
                self.cause = TIMED_OUT  # it held the loop for all its time; a late value is none
                self.task.add_done_callback(forget_run)
        elif self.cause is None:
            self._timer = self._loop.call_later(max(0.0, self._deadline - perf_counter()), self._cut, TIMED_OUT)

    def _cut(self, cause: Failure) -> None:
        self.cause = cause
        if self._timer is not None:
            self._timer.cancel()
        self.task.add_done_callback(forget_run)
        self.task.cancel()
        self._timer = self._loop.call_later(UNWIND_S, self._give_up)

    def _give_up(self) -> None:
        if not self.task.done():  # else it is told in this tick
            self._abandon(self.task)
            self._end()

    def _task_ended(self, _: asyncio.Task[Any]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._end()

    def _end(self) -> None:
        then, self._then = self._then, None
        if then is not None:
            then(self)
