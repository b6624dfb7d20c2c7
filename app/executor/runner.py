"""Runs one tool within its deadline and comes back in time, whatever the tool does.

`asyncio.wait_for` and `asyncio.timeout` wait for ever on a tool that swallows its cancellation; here the run is
cancelled, given a moment, then abandoned and counted. Knows no registry, no limits, no wire.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Never

from app.calls import Caller
from app.errors import (
    RESULT_INVALID,
    RESULT_TOO_LARGE,
    TOOL_CRASHED,
    TOOL_ERROR,
    Failure,
    Overloaded,
    RunFailed,
    ToolError,
    clean_text,
    failure,
)
from app.executor.containment import contain_exits, in_tool
from app.executor.forgetting import forget_run, forget_run_soon, forget_soon
from app.executor.in_place import InPlace
from app.executor.on_loop import CANCELLED, STARTS_LATER, TIMED_OUT, UNWIND_S, LoopRun, start
from app.executor.threads import Job, ThreadPool
from app.telemetry.redaction import redact_text
from app.tools.tool import Tool, ToolContext

logger = logging.getLogger("app.tools")

ABANDONED_PER_TOOL_MAX = 8
"""Below the threads of the pool: one tool that hangs for ever must not take all of them."""

ABANDONED_PER_TENANT_MAX = 4
"""Of those, as many count of one tenant, which can choose parameters that hang and deadlines that are too short: with
so many the tool is refused to that tenant alone."""

RETRY_AFTER_MS_MAX = 86_400_000
"""A day. An agent that is told to come back later than that has been told no."""

CRASHED = failure(TOOL_CRASHED, "The tool failed unexpectedly")
CANCELLED_ITSELF = failure(TOOL_CRASHED, "The tool cancelled itself")


class Interrupt:
    """Lets someone else end what a call is waiting for at this moment."""

    requested = False
    _waiting_for: asyncio.Future[Any] | None = None
    _final = False

    def watch(self, future: asyncio.Future[Any], *, final: bool = False) -> None:
        """Name the future that a cancellation is to end; at once, when the cancellation came before.
        `final`: when it is done, the call has its outcome."""
        self._waiting_for = future
        self._final = final
        if self.requested:
            future.cancel()

    def cancel(self) -> bool:
        """False: too late, the call has another outcome already."""
        waiting_for = self._waiting_for
        if waiting_for is not None and not waiting_for.cancel() and self._final:
            return self.requested
        self.requested = True
        return True


class Abandoned:
    """Runs of one tool that were given up and still live."""

    __slots__ = ("_of_tenants", "active")

    def __init__(self) -> None:
        self.active = 0
        self._of_tenants: dict[str | None, int] = {}
        """None: of callers that nothing tells apart."""

    @property
    def of_several(self) -> int:
        """All of them, where they are not one tenant's alone and so say something of the tool; else 0."""
        return self.active if len(self._of_tenants) > 1 or None in self._of_tenants else 0

    def add(self, future: asyncio.Future[Any], caller: Caller) -> None:
        tenant = None if caller.anonymous else caller.tenant
        self.active += 1
        self._of_tenants[tenant] = self._of_tenants.get(tenant, 0) + 1
        future.add_done_callback(partial(self._gone, tenant))

    def _gone(self, tenant: str | None, _: asyncio.Future[Any]) -> None:
        self.active -= 1
        self._of_tenants[tenant] -= 1
        if not self._of_tenants[tenant]:
            del self._of_tenants[tenant]

    def refuse_past_cap(self, caller: Caller) -> None:
        if self.active >= ABANDONED_PER_TENANT_MAX and self._is_past_cap(caller):
            raise Overloaded("Too many runs of this tool hang; try later", retry_after_ms=1000)

    def _is_past_cap(self, caller: Caller) -> bool:
        if not caller.anonymous and self._of_tenants.get(caller.tenant, 0) >= ABANDONED_PER_TENANT_MAX:
            return True
        counted = sum(
            count if tenant is None else min(count, ABANDONED_PER_TENANT_MAX)
            for tenant, count in self._of_tenants.items()
        )
        return counted >= ABANDONED_PER_TOOL_MAX


class Runner:
    """Runs tools on the running event loop and in the threads it is given. One per service."""

    def __init__(self, threads: ThreadPool, result_bytes_max: int, on_abandoned: Callable[[], None]) -> None:
        self._threads = threads
        self._result_bytes_max = result_bytes_max
        self._on_abandoned = on_abandoned
        self._loop = asyncio.get_running_loop()  # kept: asking costs Python 3.11 a system call
        self._in_place = InPlace()
        contain_exits(self._loop)

    async def run(
        self,
        tool: Tool,
        arguments: dict[str, Any],
        context: ToolContext,
        interrupt: Interrupt,
        abandoned: Abandoned,
    ) -> Any:
        """What the tool returned. Raises RunFailed for every way in which a run can end badly,
        and Overloaded when it could not begin: then nothing ran."""
        abandoned.refuse_past_cap(context.caller)
        if tool.blocking:
            ended = await self._in_thread(tool, arguments, context, interrupt, abandoned)
        else:
            ended = await self._on_loop(tool, arguments, context, interrupt, abandoned)
        return _returned(ended, tool, context.execution_id)

    def begin(
        self,
        tool: Tool,
        arguments: dict[str, Any],
        context: ToolContext,
        abandoned: Abandoned,
        then: Callable[[LoopRun], None],
    ) -> LoopRun:
        """`run` of a tool on the loop, without a coroutine: `then` gets it once it has ended, to be asked what the tool
        `returned`. Raises Overloaded when it could not begin: then nothing ran."""
        abandoned.refuse_past_cap(context.caller)
        run = LoopRun(
            self._loop, context.deadline, partial(self._abandon, abandoned=abandoned, caller=context.caller), then
        )
        run.begin(_contained(tool, arguments, context), f"tool:{tool.spec.id}")
        return run

    def returned(self, run: LoopRun, tool: Tool, execution_id: str) -> Any:
        """Of a run that has ended. Raises RunFailed."""
        if run.cause is not None:
            raise RunFailed(run.cause)
        return _returned(run.task, tool, execution_id)

    def encode(self, tool: Tool, value: Any) -> bytes:
        """The result as JSON bytes, checked and bounded. Raises RunFailed."""
        try:
            encoded = tool.result.encode(value)
        except BaseException as error:  # the tool's own types may raise anything; nothing awaits in there
            if inspect.iscoroutine(value):
                value.close()  # somebody forgot an `await`; Python would warn of it later, far from here
            reason = type(error.__cause__ if isinstance(error, RunFailed) else error)
            logger.error(
                "tool result invalid",
                # Names of types only: texts could quote the result, which is for the log's payload settings to allow.
                extra={"tool_id": tool.spec.id, "returned": type(value).__name__, "reason": reason.__name__},
            )
            forget_soon(self._loop, error)
            raise RunFailed(failure(RESULT_INVALID, "The tool returned an invalid result")) from error
        if len(encoded) > self._result_bytes_max:
            raise RunFailed(failure(RESULT_TOO_LARGE, f"The result is over {self._result_bytes_max} bytes"))
        return encoded

    def run_in_place(
        self, tool: Tool, arguments: dict[str, Any], context: ToolContext | None, deadline: float, execution_id: str
    ) -> Any:
        """`run` for a coroutine that has no `await`: no deadline can interrupt it, so a task and a timer of its own
        would only cost their 4 µs. It needs a context only where it takes one. What it sets in its context variables
        ends with it, and it sees no current task: the request's, where there is one, is not its to cancel."""
        request = asyncio.current_task(self._loop)
        if request is not None:
            asyncio._leave_task(self._loop, request)
        try:
            value = self._in_place.run(tool.invoke(arguments, context))
        except asyncio.CancelledError as error:
            forget_soon(self._loop, error)
            raise RunFailed(CANCELLED_ITSELF) from error
        except BaseException as error:  # SystemExit too must end the call and not the event loop
            forget_soon(self._loop, error)
            _fail(error, tool, execution_id)
        finally:
            if request is not None:
                asyncio._enter_task(self._loop, request)
        if time.perf_counter() > deadline:
            raise RunFailed(TIMED_OUT)  # nothing could interrupt it, but a late value is none
        return value

    async def _on_loop(
        self, tool: Tool, arguments: dict[str, Any], context: ToolContext, interrupt: Interrupt, abandoned: Abandoned
    ) -> asyncio.Future[Any]:
        """The tool's task, done."""
        task = start(self._loop, _contained(tool, arguments, context), f"tool:{tool.spec.id}")
        try:
            if STARTS_LATER:
                # One turn of the loop, in which the task begins: a tool that never waits ends in it, without a timer.
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            await self._stop_task(task, abandoned, context.caller)
            raise
        if not task.done() or interrupt.requested:
            await self._within_deadline(
                task, context.deadline, interrupt, lambda: self._stop_task(task, abandoned, context.caller)
            )
        elif time.perf_counter() > context.deadline:
            task.add_done_callback(forget_run)
            raise RunFailed(TIMED_OUT)  # it held the loop for all its time; a late value is none
        return task

    async def _in_thread(
        self, tool: Tool, arguments: dict[str, Any], context: ToolContext, interrupt: Interrupt, abandoned: Abandoned
    ) -> asyncio.Future[Any]:
        """The future of the tool's job, done."""
        job = self._threads.submit(lambda: tool.invoke(arguments, context), context.caller.tenant)
        try:
            await self._within_deadline(
                job.future, context.deadline, interrupt, lambda: self._stop_job(job, abandoned, context.caller)
            )
        except RunFailed as failed:
            if failed.cause is TIMED_OUT and job.called_off:
                raise Overloaded("No thread came free in time", retry_after_ms=1000) from None
            raise
        return job.future

    async def _within_deadline(
        self,
        running: asyncio.Future[Any],
        deadline: float,
        interrupt: Interrupt,
        stop: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        """Returns when `running` is done. Whichever comes first decides: its end, the deadline, a cancellation."""
        ended: asyncio.Future[bool] = self._loop.create_future()
        running.add_done_callback(lambda _: _settle(ended, True))
        expiry = self._loop.call_later(max(0.0, deadline - time.perf_counter()), _settle, ended, False)
        interrupt.watch(ended, final=True)
        try:
            in_time = await ended
        except asyncio.CancelledError:
            await stop()
            if cancelled_from_outside():
                raise
            raise RunFailed(CANCELLED) from None
        finally:
            expiry.cancel()
        if not in_time:
            await stop()
            raise RunFailed(TIMED_OUT)

    async def _stop_task(self, task: asyncio.Task[Any], abandoned: Abandoned, caller: Caller) -> None:
        task.add_done_callback(forget_run)
        task.cancel()
        try:
            await asyncio.wait({task}, timeout=UNWIND_S)
        finally:  # a second cancellation can come while we wait
            if not task.done():
                self._abandon(task, abandoned, caller)

    async def _stop_job(self, job: Job, abandoned: Abandoned, caller: Caller) -> None:
        job.future.add_done_callback(forget_run)
        self._threads.give_up(job)
        if job.written_off:
            self._abandon(job.future, abandoned, caller)

    def _abandon(self, future: asyncio.Future[Any], abandoned: Abandoned, caller: Caller) -> None:
        abandoned.add(future, caller)
        self._on_abandoned()


def cancelled_from_outside() -> bool:
    """Whether the whole request is being cancelled, rather than this one call by its `Interrupt`."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _settle(ended: asyncio.Future[bool], in_time: bool) -> None:
    if not ended.done():
        ended.set_result(in_time)


async def _contained(tool: Tool, arguments: dict[str, Any], context: ToolContext) -> Any:
    """The tool's coroutine, so that a SystemExit in it ends the call and not the event loop."""
    in_tool.set(True)
    try:
        return await tool.invoke(arguments, context)
    except (SystemExit, KeyboardInterrupt) as error:
        raise RuntimeError(f"raised {type(error).__name__}") from error


def _returned(ended: asyncio.Future[Any], tool: Tool, execution_id: str) -> Any:
    """What the tool returned. Raises RunFailed."""
    if ended.cancelled():
        forget_run_soon(ended.get_loop(), ended)
        raise RunFailed(CANCELLED_ITSELF)
    error = ended.exception()
    if error is not None:
        forget_run_soon(ended.get_loop(), ended)
        _fail(error, tool, execution_id)
    return ended.result()


def _fail(error: BaseException, tool: Tool, execution_id: str) -> Never:
    """Raises RunFailed for what a tool raised: its own words also where a task group of the tool's wrapped them."""
    told = error
    if isinstance(error, BaseExceptionGroup):
        with contextlib.suppress(BaseException):  # a subclass whose members or attributes fail
            told = _told_in_group(error)
    raise RunFailed(_cause(told, tool, execution_id)) from told


def _told_in_group(group: BaseExceptionGroup[Any]) -> BaseException:
    """The ToolError of a group that holds nothing else, of several the first in doubt or the first; else the group."""
    told: list[ToolError] = []
    left: list[BaseException] = [group]
    while left:
        error = left.pop()
        if isinstance(error, BaseExceptionGroup):
            left += reversed(_members(error))
        elif isinstance(error, ToolError):
            told.append(error)
        else:
            return group
    return next((error for error in told if error.in_doubt), told[0])


_members: Callable[[BaseExceptionGroup[Any]], tuple[BaseException, ...]] = vars(BaseExceptionGroup)[
    "exceptions"
].__get__
"""As the group was made: a subclass may say that it holds itself."""


def _cause(error: BaseException, tool: Tool, execution_id: str) -> Failure:
    """What an agent may know of a tool's exception: a ToolError without secrets, nothing of any other."""
    if isinstance(error, ToolError):
        try:
            return _told_by_tool(error, tool)
        except BaseException as broken:  # a subclass with a __str__ or attributes that fail
            error.__context__ = broken
    logger.error("tool crashed", exc_info=error, extra={"tool_id": tool.spec.id, "execution_id": execution_id})
    return CRASHED


def _told_by_tool(error: ToolError, tool: Tool) -> Failure:
    retry_after_ms = error.retry_after_ms
    if retry_after_ms is not None:
        retry_after_ms = max(0, min(int(retry_after_ms), RETRY_AFTER_MS_MAX))
    # Built anew, because a subclass may have set a code that ToolError would not take.
    code = ToolError("", code=error.code).code
    harmless = not error.in_doubt or tool.spec.idempotent or tool.spec.read_only
    retryable = bool(error.retryable) and harmless
    # Often another server's words: what looks like a secret in them must not end in an agent's prompt.
    message = clean_text(redact_text(str(error)))
    return Failure(code, TOOL_ERROR.category, message, retryable, retry_after_ms)
