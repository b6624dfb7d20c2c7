"""The one thread in which the journal waits for its disk: syncs, and the removal of files, in the order asked for.

A daemon: a disk that hangs must not keep the process from ending. Knows nothing of segments. Called by the journal.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable

from app.stepping import settle

logger = logging.getLogger("app.execution_log")

Work = Callable[[], None]
Then = Callable[[OSError | None], None]

START_RETRY_S = 0.25
"""Between two attempts to have a thread, where the system starts none. What was asked for waits."""


class DiskThread:
    """Starts with its first work. Belongs to one event loop."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Work, Then] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._retry: asyncio.TimerHandle | None = None

    def submit(self, work: Work, then: Then) -> None:
        """Run `work` in the thread, then `then` on the loop, with the error that it ended with."""
        self._queue.put((work, then))
        if self._thread is None and self._retry is None:
            self._start(asyncio.get_running_loop())

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._retry = loop, None
        thread = threading.Thread(target=self._run, name="journal-disk", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system has no thread left
            self._retry = loop.call_later(START_RETRY_S, self._start, loop)
        else:
            self._thread = thread

    async def finish(self, within_s: float) -> bool:
        """Wait for what was asked for, bounded, and let the thread end. False: it hangs, or there never was one."""
        if self._thread is None and self._retry is None:
            return True
        done = asyncio.get_running_loop().create_future()
        self.submit(_nothing, lambda _: settle(done))
        self._queue.put(None)
        finished, _ = await asyncio.wait({done}, timeout=within_s)
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if finished and self._thread is not None:
            self._thread.join(within_s)
        return bool(finished)

    def _run(self) -> None:
        assert self._loop is not None
        while (asked := self._queue.get()) is not None:
            work, then = asked
            error: OSError | None = None
            try:
                work()
            except OSError as caught:
                error = caught
            try:
                self._loop.call_soon_threadsafe(then, error)
            except RuntimeError:
                return  # the loop is closed: nobody waits any more


def _nothing() -> None:
    """Behind everything that was asked for before."""
