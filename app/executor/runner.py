"""Runs one tool within its deadline and comes back in time, whatever the tool does.

`asyncio.wait_for` and `asyncio.timeout` wait for ever on a tool that swallows its cancellation; here the run is
cancelled, given a moment, then abandoned and counted. Knows no registry, no limits, no wire.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any

from app.errors import (
    RESULT_TOO_LARGE,
    TOOL_CANCELLED,
    TOOL_CRASHED,
    TOOL_ERROR,
    TOOL_TIMEOUT,
    Failure,
    Overloaded,
    RunFailed,
    ToolError,
    clean_text,
    failure,
)
from app.executor.threads import Job, ThreadPool
from app.telemetry.supervision import ignore_result
from app.tools.tool import Tool, ToolContext

logger = logging.getLogger("app.tools")

UNWIND_S = 0.02
"""What a cancelled tool gets to close its connections before it is abandoned."""

ABANDONED_PER_TOOL_MAX = 8
"""Below the threads of the pool: one tool that hangs for ever must not take all of them."""

TIMED_OUT = failure(TOOL_TIMEOUT, "The tool did not finish within its deadline")
CANCELLED = failure(TOOL_CANCELLED, "The call was cancelled")


class Interrupt:
    """Lets someone else end what a call is waiting for at this moment."""

    __slots__ = ("_waiting_for", "requested")

    def __init__(self) -> None:
        self.requested = False
        self._waiting_for: asyncio.Future[Any] | None = None

    def watch(self, future: asyncio.Future[Any]) -> None:
        """Name the future that a cancellation is to end. Ends it at once when the cancellation came before."""
        self._waiting_for = future
        if self.requested:
            future.cancel()

    def cancel(self) -> None:
        self.requested = True
        if self._waiting_for is not None:
            self._waiting_for.cancel()


class Abandoned:
    """Runs of one tool that were given up and still live."""

    __slots__ = ("active",)

    def __init__(self) -> None:
        self.active = 0

    def add(self, future: asyncio.Future[Any]) -> None:
        self.active += 1
        future.add_done_callback(self._gone)

    def _gone(self, _: asyncio.Future[Any]) -> None:
        self.active -= 1

    def refuse_past_cap(self) -> None:
        if self.active >= ABANDONED_PER_TOOL_MAX:
            raise Overloaded("Too many runs of this tool hang; try later", retry_after_ms=1000)


class Runner:
    """Owns the threads of sync tools. One per service."""

    def __init__(self, threads: ThreadPool, result_bytes_max: int, on_abandoned: Callable[[], None]) -> None:
        self._threads = threads
        self._result_bytes_max = result_bytes_max
        self._on_abandoned = on_abandoned

    async def run(
        self,
        tool: Tool,
        arguments: dict[str, Any],
        context: ToolContext,
        interrupt: Interrupt,
        abandoned: Abandoned,
    ) -> Any:
        """What the tool returned. Raises RunFailed for every way in which a run can end badly,
        and Overloaded when no thread came free: then nothing ran."""
        abandoned.refuse_past_cap()
        try:
            if tool.blocking:
                return await self._run_in_thread(tool, arguments, context, interrupt, abandoned)
            return await self._run_on_loop(tool, arguments, context, interrupt, abandoned)
        except (RunFailed, Overloaded, asyncio.CancelledError):
            raise
        except ToolError as error:
            raise RunFailed(_told_by_tool(error)) from error
        except Exception as error:
            logger.exception("tool crashed", extra={"tool_id": tool.spec.id, "execution_id": context.execution_id})
            raise RunFailed(failure(TOOL_CRASHED, "The tool failed unexpectedly")) from error

    def encode(self, tool: Tool, value: Any) -> bytes:
        """The result as JSON bytes, checked and bounded. Raises RunFailed."""
        encoded = tool.result.encode(value)
        if len(encoded) > self._result_bytes_max:
            raise RunFailed(failure(RESULT_TOO_LARGE, f"The result is over {self._result_bytes_max} bytes"))
        return encoded

    async def _run_on_loop(
        self, tool: Tool, arguments: dict[str, Any], context: ToolContext, interrupt: Interrupt, abandoned: Abandoned
    ) -> Any:
        task = _start(_contained(tool, arguments, context), name=f"tool:{tool.spec.id}")
        if not task.done():
            await self._within_deadline(task, context.deadline, interrupt, lambda: self._stop_task(task, abandoned))
        if task.cancelled():
            raise RunFailed(failure(TOOL_CRASHED, "The tool cancelled itself"))
        return task.result()

    async def _run_in_thread(
        self, tool: Tool, arguments: dict[str, Any], context: ToolContext, interrupt: Interrupt, abandoned: Abandoned
    ) -> Any:
        job = self._threads.submit(lambda: tool.invoke(arguments, context))
        await self._within_deadline(job.future, context.deadline, interrupt, lambda: self._stop_job(job, abandoned))
        return job.future.result()

    async def _within_deadline(
        self,
        running: asyncio.Future[Any],
        deadline: float,
        interrupt: Interrupt,
        stop: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        """Returns when `running` is done. Whichever comes first decides: its end, the deadline, a cancellation."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[bool] = loop.create_future()
        running.add_done_callback(lambda _: _settle(ended, True))
        expiry = loop.call_later(max(0.0, deadline - time.perf_counter()), _settle, ended, False)
        interrupt.watch(ended)
        try:
            in_time = await ended
        except asyncio.CancelledError:
            await stop()
            if interrupt.requested:
                raise RunFailed(CANCELLED) from None
            raise
        finally:
            expiry.cancel()
        if not in_time:
            await stop()
            raise RunFailed(TIMED_OUT)

    async def _stop_task(self, task: asyncio.Task[Any], abandoned: Abandoned) -> None:
        task.add_done_callback(ignore_result)
        task.cancel()
        await asyncio.wait({task}, timeout=UNWIND_S)
        if not task.done():
            self._abandon(task, abandoned)

    async def _stop_job(self, job: Job, abandoned: Abandoned) -> None:
        if not self._threads.give_up(job):
            raise Overloaded("No thread came free in time", retry_after_ms=1000)
        self._abandon(job.future, abandoned)

    def _abandon(self, future: asyncio.Future[Any], abandoned: Abandoned) -> None:
        abandoned.add(future)
        self._on_abandoned()


def _settle(ended: asyncio.Future[bool], in_time: bool) -> None:
    if not ended.done():
        ended.set_result(in_time)


async def _contained(tool: Tool, arguments: dict[str, Any], context: ToolContext) -> Any:
    """The tool's coroutine, so that a SystemExit in it ends the call and not the event loop."""
    try:
        return await tool.invoke(arguments, context)
    except (Exception, asyncio.CancelledError):
        raise
    except BaseException as error:
        raise RuntimeError(f"raised {type(error).__name__}") from error


def _told_by_tool(error: ToolError) -> Failure:
    return Failure(error.code, TOOL_ERROR.category, clean_text(str(error)), error.retryable, error.retry_after_ms)


if sys.version_info >= (3, 12):

    def _start(coroutine: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        # Runs until the first real wait before it returns: a tool that never waits costs 0.6 µs instead of 4.
        return asyncio.Task(coroutine, loop=asyncio.get_running_loop(), name=name, eager_start=True)

else:

    def _start(coroutine: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        return asyncio.get_running_loop().create_task(coroutine, name=name)
