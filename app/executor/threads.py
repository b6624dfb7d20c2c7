"""A bounded pool of daemon threads for sync tools, of their own: a hung tool must not stop anyone else's, nor a tenant
with many calls another one's.

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

from app.fairness import FairQueue
from app.telemetry.supervision import ignore_result

THREADS_MAX = 64
"""Sync tools mostly wait for something; 64 waiting threads cost about 4 MB of touched stack."""


CALLED_OFF_MAX = 1_000
"""Jobs that may have stayed in the threads' queue before it is swept. Threads pass them over; while the system starts
none nobody does, and each call that gives up would leave one."""


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

    def call_off(self) -> None:
        self.called_off = True
        self.function = _nothing

    def done(self) -> bool:
        return self.future.done()


class ThreadPool:
    """All counts live on the event loop's thread; threads only take jobs and post results. They are given no more jobs
    than they can begin: what waits does so on the loop, where tenants are served in turn."""

    def __init__(self, size: int = THREADS_MAX) -> None:
        self._size = size
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._waiting: FairQueue[Job] = FairQueue()
        self._threads = 0
        self._busy = 0
        """Jobs that threads were given and that nobody has given up."""
        self._written_off = 0
        self._called_off = 0
        """Since the last sweep."""

    def submit(self, function: Callable[[], Any], tenant: str = "") -> Job:
        """Queue a function. What it raises, even SystemExit, ends in the job's future."""
        loop = asyncio.get_running_loop()
        job = Job(function, loop.create_future())
        job.future.add_done_callback(ignore_result)
        if self._busy < self._places:
            self._begin(job, loop)
        else:
            self._waiting.add(job, tenant)  # those before it wait too
        return job

    @property
    def _places(self) -> int:
        """Threads that there may be besides those that are written off."""
        return self._size + min(self._written_off, self._size) - self._written_off

    def _begin(self, job: Job, loop: asyncio.AbstractEventLoop) -> None:
        self._busy += 1
        self._jobs.put(job)
        self._hire(loop)

    def _begin_next(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._busy < self._places:
            job = self._waiting.pop_next()
            if job is None:
                return
            self._begin(job, loop)

    def give_up(self, job: Job) -> None:
        """Stop waiting for a job. One that has not begun never will; else its thread is written off."""
        if job.future.done():
            return  # it ended in the same tick
        if job in self._waiting.turns:
            self._waiting.discard(job)
            job.call_off()
            return
        self._busy -= 1
        if job.claim():
            job.call_off()  # the shell stays queued until a thread passes it over; the arguments need not
            self._called_off += 1
            if self._called_off >= CALLED_OFF_MAX:
                self._sweep()
        else:
            job.written_off = True
            self._written_off += 1
        self._begin_next(asyncio.get_running_loop())

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
        self._begin_next(job.future.get_loop())
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
