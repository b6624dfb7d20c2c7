"""Background tasks with a name and an owner, and the watch over the event loop.

A task that ends without being asked makes the owner's `on_crash` run: the process then drains and exits non-zero.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any

logger = logging.getLogger("app.supervision")


def ignore_result(future: asyncio.Future[Any]) -> None:
    """Take a result that nobody waits for any more, so that asyncio does not report it as forgotten."""
    if not future.cancelled():
        future.exception()


class Supervisor:
    """Owns the service's background tasks."""

    def __init__(self, on_crash: Callable[[str], None]) -> None:
        self._on_crash = on_crash
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    def start(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if self._closing and error is None:
            return
        logger.critical("background task ended", extra={"task": task.get_name()}, exc_info=error)
        if not self._closing:
            self._on_crash(task.get_name())

    async def close(self) -> None:
        """Cancel every task and wait for it, bounded."""
        self._closing = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=5.0)


LAG_SAMPLE_S = 0.1
LAG_WINDOW_SAMPLES = 150
"""The gauge shows the worst lag of the last 15 s, so that a scrape every 15 s misses none."""

BLOCKED_AFTER_S = 0.25


class LoopWatch:
    """Measures how late the event loop runs, and names what blocks it while it is blocked.

    The measuring half is a task on the loop; the naming half is a thread, for a blocked loop cannot speak.
    """

    def __init__(self) -> None:
        self._lags = [0.0] * LAG_WINDOW_SAMPLES
        self._beat = time.perf_counter()
        self._stop = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_thread = 0

    def lag_s(self) -> float:
        """The worst of the last 15 s, seconds."""
        return max(self._lags)

    async def measure(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._beat = time.perf_counter()
        threading.Thread(target=self._watch, name="loop-watch", daemon=True).start()
        sample = 0
        try:
            while True:
                before = time.perf_counter()
                await asyncio.sleep(LAG_SAMPLE_S)
                self._beat = time.perf_counter()
                self._lags[sample] = max(0.0, self._beat - before - LAG_SAMPLE_S)
                sample = (sample + 1) % LAG_WINDOW_SAMPLES
        finally:
            self._stop.set()

    def _watch(self) -> None:
        reported = 0.0
        while not self._stop.wait(BLOCKED_AFTER_S / 2):
            beat = self._beat
            late_s = time.perf_counter() - beat - LAG_SAMPLE_S
            if late_s > BLOCKED_AFTER_S and beat != reported:
                reported = beat  # one line per blockage, however long it lasts
                self._report(late_s)

    def _report(self, late_s: float) -> None:
        frame = sys._current_frames().get(self._loop_thread)
        tool_id = _tool_running_in(frame)  # first: a stack's lines are read from disk, and the loop may go on meanwhile
        task = asyncio.current_task(self._loop)
        stack = "".join(traceback.format_stack(frame, limit=20)) if frame else ""
        logger.error(
            "event loop blocked",
            extra={
                "blocked_s": round(late_s, 3),
                "tool_id": tool_id,
                "task": task.get_name() if task else None,
                "stack": stack,
            },
        )


def _tool_running_in(frame: FrameType | None) -> str | None:
    """The id of the tool that a stack is in: what of ours runs one has it in a local variable of that name. Variables
    of others are not touched: what they do when looked at is theirs."""
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith("app.executor."):
            spec = getattr(frame.f_locals.get("tool"), "spec", None)
            if spec is not None:
                return str(spec.id)
        frame = frame.f_back
    return None
