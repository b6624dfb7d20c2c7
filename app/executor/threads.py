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


CALLED_OFF_MAX = 1_000
"""Jobs that may have stayed in the queue before it is swept. Threads pass them over; while all of them hang nobody
does, and each call that gives up would leave one."""


class Job:
    """One function on its way through the pool; `future` belongs to the event loop."""

    __slots__ = ("_claim", "called_off", "context", "function", "future", "written_off")

    def __init__(self, function: Callable[[], Any], future: asyncio.Future[Any]) -> None:
        self.function = function
        self.future = future
        self.context = contextvars.copy_context()
        self.called_off = False
        """Given up before a thread took it: it never ran and never will."""
        self.written_off = False
        """Given up while a thread ran it. With neither mark it had ended when it was given up."""
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
        self._called_off = 0
        """Since the last sweep."""

    def submit(self, function: Callable[[], Any]) -> Job:
        """Queue a function. What it raises, even SystemExit, ends in the job's future."""
        loop = asyncio.get_running_loop()
        job = Job(function, loop.create_future())
        job.future.add_done_callback(ignore_result)
        self._busy += 1
        self._jobs.put(job)
        self._hire(loop)
        return job

    def give_up(self, job: Job) -> None:
        """Stop waiting for a job. One that has not begun never will; else its thread is written off."""
        if job.future.done():
            return  # it ended in the same tick
        self._busy -= 1
        if job.claim():
            job.called_off = True
            job.function = _nothing  # the shell stays queued until a thread passes it over; the arguments need not
            self._called_off += 1
            if self._called_off >= CALLED_OFF_MAX:
                self._sweep()
            return
        job.written_off = True
        self._written_off += 1
        self._hire(asyncio.get_running_loop())  # for the jobs that wait behind it

    def _sweep(self) -> None:
        """Take out of the queue what was called off; what waits keeps its order."""
        self._called_off = 0
        for _ in range(self._jobs.qsize()):
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return  # threads take from it too
            if job is None or not job.called_off:
                self._jobs.put(job)

    def _hire(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start a thread when there are more jobs than threads to serve them, up to the cap."""
        cap = self._size + min(self._written_off, self._size)
        if self._busy <= self._threads - self._written_off or self._threads >= cap:
            return
        try:
            threading.Thread(target=self._work, args=(loop,), name="sync-tool", daemon=True).start()
        except RuntimeError:
            return  # the system has no thread left: the job waits for one of ours, at most until its deadline
        self._threads += 1

    def close(self) -> None:
        """Idle threads end; busy ones are daemons and die with the process."""
        for _ in range(self._threads):
            self._jobs.put(None)

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        while (job := self._jobs.get()) is not None:
            if not job.claim():
                continue
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


def _nothing() -> None:
    """What is left of a job that was called off."""


def _outcome(job: Job) -> tuple[Any, BaseException | None]:
    try:
        return job.context.run(job.function), None
    except StopIteration as error:  # no future takes it, for it would end whoever awaits
        return None, _wrapped(error)
    except Exception as error:
        return None, error
    except BaseException as error:  # SystemExit and friends of tool code must not end a pool's thread
        return None, _wrapped(error)


def _wrapped(error: BaseException) -> RuntimeError:
    wrapped = RuntimeError(f"raised {type(error).__name__}")
    wrapped.__cause__ = error
    return wrapped
