"""A bounded pool of daemon threads for sync tools, of their own: a hung tool must not stop anyone else's.

`ThreadPoolExecutor` joins its threads at interpreter exit, so one hung tool would keep the process from ending.
A thread that is given up is written off and replaced, up to a cap.
"""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
from collections.abc import Callable
from typing import Any

from app.telemetry.supervision import ignore_result

THREADS_MAX = 64
"""Sync tools mostly wait for something; 64 waiting threads cost about 4 MB of touched stack."""


class Job:
    """One function on its way through the pool; `future` belongs to the event loop."""

    __slots__ = ("_claim", "context", "function", "future", "started", "written_off")

    def __init__(self, function: Callable[[], Any], future: asyncio.Future[Any]) -> None:
        self.function = function
        self.future = future
        self.context = contextvars.copy_context()
        self.started = False
        self.written_off = False
        self._claim = threading.Lock()

    def claim(self) -> bool:
        """True for the first who asks: the thread that will run it, or the loop that calls it off."""
        return self._claim.acquire(blocking=False)


class ThreadPool:
    """All counts live on the event loop's thread; threads only take jobs and post results."""

    def __init__(self, size: int = THREADS_MAX) -> None:
        self._size = size
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._threads = 0
        self._busy = 0
        self._written_off = 0

    def submit(self, function: Callable[[], Any]) -> Job:
        """Queue a function. What it raises, even SystemExit, ends in the job's future."""
        loop = asyncio.get_running_loop()
        job = Job(function, loop.create_future())
        job.future.add_done_callback(ignore_result)
        self._busy += 1
        if self._busy > self._threads - self._written_off and self._threads < self._size + self._replaceable():
            self._threads += 1
            threading.Thread(target=self._work, args=(loop,), name="sync-tool", daemon=True).start()
        self._jobs.put(job)
        return job

    def give_up(self, job: Job) -> bool:
        """Stop waiting for a job. False: it had not begun and never will. True: its thread is written off."""
        if job.claim():
            self._busy -= 1
            return False
        job.written_off = True
        self._busy -= 1
        self._written_off += 1
        return True

    def close(self) -> None:
        """Idle threads end; busy ones are daemons and die with the process."""
        for _ in range(self._threads):
            self._jobs.put(None)

    def _replaceable(self) -> int:
        return min(self._written_off, self._size)

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        while (job := self._jobs.get()) is not None:
            if not job.claim():
                continue
            job.started = True
            value, error = _outcome(job)
            try:
                loop.call_soon_threadsafe(self._post, job, value, error)
            except RuntimeError:
                return  # the loop is closed: nobody waits any more
            del job, value, error

    def _post(self, job: Job, value: Any, error: BaseException | None) -> None:
        if job.written_off:
            self._written_off -= 1
            if self._threads > self._size:
                self._threads -= 1
                self._jobs.put(None)
        else:
            self._busy -= 1
        if job.future.done():
            return
        if error is None:
            job.future.set_result(value)
        else:
            job.future.set_exception(error)


def _outcome(job: Job) -> tuple[Any, BaseException | None]:
    try:
        return job.context.run(job.function), None
    except Exception as error:
        return None, error
    except BaseException as error:  # SystemExit and friends of tool code must not end a pool's thread
        exited = RuntimeError(f"raised {type(error).__name__}")
        exited.__cause__ = error
        return None, exited
