"""The promise that a record is kept: one object for all records of a tick, so that a call costs no future of its own.

Made by the journal, held by the executor and the doors. Knows no file.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Generator
from contextvars import Context

from app.stepping import NOW

logger = logging.getLogger("app.execution_log")


def settle(future: asyncio.Future[None]) -> None:
    """End what somebody waits for, if somebody still does."""
    if not future.done():
        future.set_result(None)


class Commit:
    """Done once, and then for good. It never fails: what a failing disk means for an answer is the journal's affair."""

    __slots__ = ("_asyncio_future_blocking", "_callbacks", "_loop", "done")

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None, *, done: bool = False) -> None:
        self.done = done
        self._loop = loop  # kept by who makes many: asking for it costs Python 3.11 a system call
        self._callbacks: list[Callable[[Commit], object]] = []
        self._asyncio_future_blocking = False

    def add_done_callback(self, callback: Callable[[Commit], object], *, context: Context | None = None) -> None:
        """Have it called with this commit, on the event loop: when it is done, or now when it is."""
        if self.done:
            callback(self)
        elif context is None:
            self._callbacks.append(callback)
        else:
            self._callbacks.append(lambda commit: context.run(callback, commit))

    async def wait(self) -> None:
        """Return when it is done. May be cancelled; others that wait do not notice."""
        if self.done:
            return
        if NOW.stepping:  # the stepper is called back by the commit itself: no future, no turn of the loop
            await _Directly(self)
            return
        future = (self._loop or asyncio.get_running_loop()).create_future()
        self._callbacks.append(lambda _: settle(future))
        await future

    def complete(self) -> None:
        """Called by the journal alone."""
        self.done = True
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            try:
                callback(self)
            except Exception:  # one door's bug must not keep the other answers of the tick
                logger.exception("callback of a commit failed")


class _Directly:
    """For a stepper, to which a commit is as good as a future."""

    __slots__ = ("_commit",)

    def __init__(self, commit: Commit) -> None:
        self._commit = commit

    def __await__(self) -> Generator[Commit, None, None]:
        self._commit._asyncio_future_blocking = True
        yield self._commit


COMMITTED = Commit(done=True)
"""For what promises nothing, or has kept its promise already."""
