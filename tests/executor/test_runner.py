"""Whatever a tool does, its call comes back in time, says what an agent may know, and gives back what it took."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import inspect
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
from pydantic import BaseModel, computed_field

from app.breaker import ABANDONED_TO_OPEN_ALL
from app.calls import LOCAL_CALLER, Caller, ToolCall, new_execution_id
from app.errors import MESSAGE_CHARACTERS_MAX, OVERLOADED, ToolError
from app.executor.plans import run_batch
from app.executor.runner import ABANDONED_PER_TENANT_MAX, ABANDONED_PER_TOOL_MAX, RETRY_AFTER_MS_MAX
from app.executor.threads import ThreadPool
from app.tools.tool import FunctionTool, ToolContext, tool
from tests.executor.in_process import opened
from tests.waiting import SOON_S, until

pytestmark = pytest.mark.anyio

CANARY = "canary-7f3a"


def swallowing(release: asyncio.Event) -> FunctionTool:
    """A tool that swallows every cancellation until it is released, and then returns."""

    @tool
    async def stubborn() -> str:
        """Swallow cancellations."""
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                pass
        return "late"

    return stubborn


async def test_a_tool_that_swallows_cancellation_times_out_and_its_late_value_is_never_returned() -> None:
    release = asyncio.Event()
    stubborn = swallowing(release)
    async with opened(stubborn) as rig:
        execution = await rig.call(stubborn, timeout_override_s=0.02)
        assert (execution.status, execution.result) == ("timeout", None)
        assert execution.error and execution.error.code == "TOOL_TIMEOUT" and execution.error.retryable
        assert (rig.slots.running, rig.executor.abandoned, rig.metrics.abandoned) == (0, 1, 1)
        release.set()
        await until(lambda: rig.executor.abandoned == 0)
        assert rig.runs(stubborn) == {"timeout": 1}


async def test_a_tool_with_too_many_abandoned_runs_is_refused_until_one_of_them_ends() -> None:
    release = asyncio.Event()
    stubborn = swallowing(release)
    async with opened(stubborn) as rig:
        hung = [rig.start(stubborn, timeout_override_s=0.01) for _ in range(ABANDONED_PER_TOOL_MAX)]
        assert {(await call).status for call in hung} == {"timeout"}
        refused = await rig.call(stubborn)
        assert refused.refusal and refused.refusal.kind is OVERLOADED
        assert refused.refusal.retry_after_ms and refused.refusal.execution_id == refused.execution_id
        assert (refused.attempts, refused.run_s) == (0, 0)
        release.set()
        await until(lambda: rig.executor.abandoned == 0)
        assert (await rig.call(stubborn)).result == b'"late"'
        assert rig.runs(stubborn) == {"timeout": ABANDONED_PER_TOOL_MAX, "success": 1}, "a refused call is no run"


async def test_runs_that_a_replaced_tool_left_behind_count_for_the_new_one() -> None:
    release = asyncio.Event()
    async with opened(swallowing(release)) as rig:
        hung = [rig.start("stubborn", timeout_override_s=0.01) for _ in range(ABANDONED_PER_TOOL_MAX)]
        assert {(await call).status for call in hung} == {"timeout"}
        rig.executor.registry.replace([swallowing(release)])
        refused = await rig.call("stubborn", timeout_override_s=0.01)
        release.set()
        await until(lambda: rig.executor.abandoned == 0)
        assert refused.refusal and refused.refusal.kind is OVERLOADED
        assert (await rig.call("stubborn")).status == "success"


def hanging(release: threading.Event, begun: list[str], timeout_s: float = 30.0) -> FunctionTool:
    """A tool that hangs in its thread until it is released, if it is told to."""

    @tool(timeout=timeout_s)
    def hangs(hang: bool = True) -> str:
        """Hang in a thread."""
        if hang:
            begun.append("")
            release.wait(SOON_S)
        return "ran"

    return hangs


ONE, OTHER, THIRD = (Caller(tenant, "agent") for tenant in ("one", "other", "third"))


async def test_runs_of_one_tenant_that_hang_close_the_tool_to_nobody_else() -> None:
    release, begun = threading.Event(), list[str]()
    hangs = hanging(release, begun)
    async with opened(hangs) as rig:

        async def abandon(caller: Caller, count: int) -> None:
            calls = [rig.start(hangs, caller=caller) for _ in range(count)]
            await until(lambda: len(begun) == rig.executor.abandoned + count)
            for call in calls:
                rig.executor.calls.cancel(caller, call.get_name(), None)
            assert {(await call).status for call in calls} == {"cancelled"}

        await abandon(ONE, 2 * ABANDONED_PER_TOOL_MAX)
        refused = await rig.call(hangs, {"hang": False}, caller=ONE)
        assert refused.refusal and refused.refusal.kind is OVERLOADED
        assert (await rig.call(hangs, {"hang": False}, caller=OTHER)).result == b'"ran"'
        await abandon(OTHER, ABANDONED_PER_TENANT_MAX)
        refused = await rig.call(hangs, {"hang": False}, caller=THIRD)
        assert refused.refusal and refused.refusal.kind is OVERLOADED, "now it is the tool"
        release.set()
        await until(lambda: rig.executor.abandoned == 0)
        assert (await rig.call(hangs, {"hang": False}, caller=ONE)).result == b'"ran"'


async def test_runs_of_one_tenant_that_time_out_and_hang_open_the_breaker_to_nobody_else() -> None:
    release, begun = threading.Event(), list[str]()
    hangs = hanging(release, begun, timeout_s=1.0)
    async with opened(hangs) as rig:
        calls = [rig.start(hangs, caller=ONE) for _ in range(ABANDONED_TO_OPEN_ALL)]
        await until(lambda: len(begun) == len(calls))
        assert {(await call).status for call in calls} == {"timeout"}
        assert rig.executor.abandoned == ABANDONED_TO_OPEN_ALL
        assert (await rig.call(hangs, {"hang": False}, caller=OTHER)).refusal is None
        assert (await rig.call(hangs, caller=OTHER)).status == "timeout"
        refused = await rig.call(hangs, {"hang": False}, caller=THIRD)
        assert refused.refusal and refused.refusal.kind is OVERLOADED, "two tenants say that it is the tool"
        release.set()
        await until(lambda: rig.executor.abandoned == 0)


async def test_a_tool_that_ends_while_it_is_cancelled_has_timed_out_all_the_same() -> None:
    @tool
    async def reluctant() -> str:
        """Return instead of being cancelled."""
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "late"

    async with opened(reluctant) as rig:
        execution = await rig.call(reluctant, timeout_override_s=0.01)
        assert (execution.status, execution.result) == ("timeout", None)
        assert rig.metrics.abandoned == 0


async def test_a_tool_that_fails_while_it_is_cancelled_leaves_no_exception_behind() -> None:
    @tool
    async def clumsy() -> str:
        """Raise while being cancelled."""
        try:
            return str(await asyncio.Event().wait())
        finally:
            raise ValueError(CANARY)

    async with opened(clumsy) as rig:
        assert (await rig.call(clumsy, timeout_override_s=0.01)).status == "timeout"
    gc.collect()  # would report an exception that nobody took


async def test_a_cancelled_tool_runs_its_finally_blocks() -> None:
    steps: list[str] = []

    @tool
    async def careful() -> None:
        """Clean up."""
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            steps.append("cleaned")

    async with opened(careful) as rig:
        assert (await rig.call(careful, timeout_override_s=0.01)).status == "timeout"
    assert steps == ["cleaned"]


async def test_a_second_cancellation_while_a_tool_unwinds_still_counts_it_as_abandoned() -> None:
    release, unwinding = asyncio.Event(), asyncio.Event()

    @tool
    async def slow_to_end() -> None:
        """Take long to unwind."""
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            unwinding.set()
            while not release.is_set():
                try:
                    await release.wait()
                except asyncio.CancelledError:
                    pass

    async with opened(slow_to_end) as rig:
        call = rig.start(slow_to_end)
        await until(lambda: rig.slots.running == 1)
        call.cancel()
        await unwinding.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert (rig.executor.abandoned, rig.metrics.abandoned, rig.slots.running) == (1, 1, 0)
        release.set()
        await until(lambda: rig.executor.abandoned == 0)


class OwnBaseException(BaseException):
    pass


class WithoutText(Exception):
    def __str__(self) -> str:
        raise ValueError(CANARY)

    __repr__ = __str__


def too_deep() -> None:
    too_deep()


RAISED: dict[str, Callable[[], object]] = {
    "ValueError": lambda: ValueError(CANARY),
    "huge text": lambda: ValueError(CANARY * 1_000_000),
    "exception whose text fails": WithoutText,
    "MemoryError": lambda: MemoryError(CANARY),
    "RecursionError": too_deep,
    "SystemExit": lambda: SystemExit(3),
    "KeyboardInterrupt": lambda: KeyboardInterrupt(CANARY),
    "CancelledError": lambda: asyncio.CancelledError(CANARY),
    "GeneratorExit": lambda: GeneratorExit(CANARY),
    "StopIteration": lambda: StopIteration(CANARY),
    "StopAsyncIteration": lambda: StopAsyncIteration(CANARY),
    "TimeoutError": lambda: TimeoutError(CANARY),
    "ExceptionGroup": lambda: ExceptionGroup(CANARY, [ValueError(CANARY)]),
    "BaseExceptionGroup": lambda: BaseExceptionGroup(CANARY, [SystemExit(CANARY), KeyboardInterrupt()]),
    "ExceptionGroup of a ToolError that fails": lambda: ExceptionGroup(CANARY, [DoubtFails(CANARY)]),
    "BaseException": lambda: OwnBaseException(CANARY),
}


PLACES = ("at once", "after a wait", "in a thread", "in a child task")
CASES = [
    (what, where)
    for what in RAISED
    for where in PLACES
    # A task group takes a child's cancellation for an end like any other, so there the tool goes on.
    if (what, where) != ("CancelledError", "in a child task")
]


@pytest.mark.parametrize(("what", "where"), CASES)
async def test_what_a_tool_raises_ends_its_call_alone_and_its_text_stays_here(what: str, where: str) -> None:
    def fail() -> None:
        raise RAISED[what]()  # type: ignore[misc]

    @tool(id="at_once")
    async def at_once() -> None:
        """Fail."""
        fail()

    @tool(id="after_a_wait")
    async def after_a_wait() -> None:
        """Fail."""
        await asyncio.sleep(0)
        fail()

    @tool(id="in_a_thread")
    def in_a_thread() -> None:
        """Fail."""
        fail()

    @tool(id="in_a_child_task")
    async def in_a_child_task() -> None:
        """Fail."""
        async with asyncio.TaskGroup() as group:
            group.create_task(after_a_wait())
            group.create_task(asyncio.sleep(60))
        await asyncio.Event().wait()

    tools = (at_once, after_a_wait, in_a_thread, in_a_child_task)
    async with opened(*tools) as rig:
        execution = await rig.call(where.replace(" ", "_"), timeout_override_s=5.0)
        assert execution.status == "failed"
        assert execution.error and execution.error.code == "TOOL_CRASHED" and not execution.error.retryable
        assert CANARY.encode() not in execution.as_json()
        assert rig.errors() == {"tool_crash": 1}
        assert rig.executor.abandoned == 0


async def test_a_child_task_that_exits_and_that_nobody_awaits_does_not_end_the_loop() -> None:
    async def leave() -> None:
        sys.exit(3)

    @tool
    async def careless() -> str:
        """Start a task and forget it."""
        child = asyncio.create_task(leave())
        await asyncio.wait({child})
        return type(child.exception()).__name__

    async with opened(careless) as rig:
        assert (await rig.call(careless)).result == b'"RuntimeError"'


async def test_a_child_task_that_exits_after_its_tool_has_ended_does_not_end_the_loop() -> None:
    children: list[asyncio.Task[None]] = []

    async def leave() -> None:
        sys.exit(3)

    @tool
    async def gone() -> str:
        """Start a task and return."""
        children.append(asyncio.create_task(leave()))
        return "done"

    async with opened(gone) as rig:
        assert (await rig.call(gone)).result == b'"done"'
        await asyncio.wait(children)
        assert type(children[0].exception()).__name__ == "RuntimeError"


async def test_what_a_tool_sets_in_its_context_no_other_call_sees() -> None:
    tenant = contextvars.ContextVar("tenant", default="nobody's")

    @tool
    async def remember(name: str) -> str:
        """Read what is remembered, and remember the name."""
        before = tenant.get()
        tenant.set(name)
        return before

    async with opened(remember) as rig:
        calls = [
            ToolCall(new_execution_id(), "remember", {"name": name}, LOCAL_CALLER, time.perf_counter())
            for name in ("mine", "yours")
        ]
        executions = await run_batch(rig.executor.execute, calls, 1)
        assert [execution.result for execution in executions] == [b'"nobody\'s"'] * 2


@pytest.mark.skipif(sys.version_info < (3, 12), reason="inspect.markcoroutinefunction came with Python 3.12")
async def test_a_function_that_is_marked_as_a_coroutine_function_may_wait() -> None:
    async def wait() -> str:
        await asyncio.sleep(0)
        return "done"

    def marked() -> Any:
        """Return a coroutine."""
        return wait()

    one = tool(inspect.markcoroutinefunction(marked))
    async with opened(one) as rig:
        assert (await rig.call(one)).result == b'"done"'


async def test_child_tasks_of_a_tool_are_ordinary_tasks() -> None:
    seen = contextvars.ContextVar("seen", default="nothing")

    async def child() -> str:
        await asyncio.sleep(0)
        return seen.get()

    @tool
    async def parent() -> list[Any]:
        """Use tasks as one does."""
        seen.set("the parent's")
        named = asyncio.create_task(child(), name="named")
        never_begun = asyncio.create_task(child())
        never_begun.cancel()
        cancelled = await asyncio.gather(never_begun, return_exceptions=True)
        async with asyncio.timeout(5):
            return [named.get_name(), await named, type(cancelled[0]).__name__]

    async with opened(parent) as rig:
        assert (await rig.call(parent)).result == b'["named","the parent\'s","CancelledError"]'


async def test_the_children_of_a_tools_task_group_end_with_its_deadline() -> None:
    ended: list[str] = []

    async def child(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(name)

    @tool
    async def family() -> None:
        """Wait for two children."""
        async with asyncio.TaskGroup() as group:
            group.create_task(child("a"))
            group.create_task(child("b"))

    async with opened(family) as rig:
        assert (await rig.call(family, timeout_override_s=0.01)).status == "timeout"
        assert sorted(ended) == ["a", "b"]
        assert rig.metrics.abandoned == 0


class TextFails(ToolError):
    def __str__(self) -> str:
        raise ValueError(CANARY)


class NeverInitialised(ToolError):
    def __init__(self) -> None:
        pass


class ExitsWhenAsked(ToolError):
    @property
    def retry_after_ms(self) -> int:  # type: ignore[override]
        sys.exit(3)

    @retry_after_ms.setter
    def retry_after_ms(self, value: object) -> None:
        pass


class DoubtFails(ToolError):
    @property
    def in_doubt(self) -> bool:  # type: ignore[override]
        sys.exit(3)


class HoldsItself(ExceptionGroup[Exception]):
    @property
    def exceptions(self) -> tuple[Exception, ...]:  # type: ignore[override]
        return (self,)


def with_wait(retry_after_ms: Any) -> ToolError:
    return ToolError("Busy", retryable=True, retry_after_ms=retry_after_ms)


def with_code(code: Any) -> ToolError:
    error = ToolError("Told")
    error.code = code
    return error


@tool
async def fail_with(kind: str) -> None:
    """Raise one of the errors below."""
    raise TOLD[kind]()


TOLD: dict[str, Callable[[], ToolError]] = {
    "plain": lambda: ToolError("The ticket is closed", code="TICKET_CLOSED", retryable=True, retry_after_ms=250),
    "long": lambda: ToolError("x" * 5_000_000),
    "control characters": lambda: ToolError("a\x00b\x1b[31mc\u202ed\ud800e"),
    "bad code": lambda: ToolError("Told", code="no code " * 1000),
    "code set later": lambda: with_code("x" * 1000),
    "code of another type": lambda: with_code(object()),
    "fraction of a millisecond": lambda: with_wait(0.5),
    "negative wait": lambda: with_wait(-5),
    "endless wait": lambda: with_wait(2**80),
    "infinite wait": lambda: with_wait(float("inf")),
    "wait of another type": lambda: with_wait(object()),
    "text that fails": lambda: TextFails("x"),
    "never initialised": NeverInitialised,
    "attribute that exits": lambda: ExitsWhenAsked("x"),
}


async def test_a_tool_error_tells_the_agent_its_text_code_and_when_to_try_again() -> None:
    async with opened(fail_with) as rig:
        error = (await rig.call(fail_with, {"kind": "plain"})).error
        assert error == ("TICKET_CLOSED", "tool_error", "The ticket is closed", True, 250)


async def test_what_looks_like_a_secret_in_the_text_of_a_tool_error_stays_here() -> None:
    said = f"https://user:{CANARY}@host/?api_key={CANARY} said: password: {CANARY}"
    cut = "x" * (MESSAGE_CHARACTERS_MAX - 20) + f" act_{'0' * 20}_{'0' * 64}"

    @tool
    async def ask(about: str) -> None:
        """Raise what the server said."""
        raise ToolError(about)

    async with opened(ask) as rig:
        for about in (said, cut):
            error = (await rig.call(ask, {"about": about})).error
            assert error is not None and "[redacted]" in error.message
            assert CANARY not in error.message and "act_" not in error.message


async def test_a_group_that_says_it_holds_itself_is_what_it_was_made_of() -> None:
    @tool
    async def ask() -> None:
        """Raise a group without an end."""
        raise HoldsItself("all", [ToolError("No such city", code="NO_CITY")])

    async with opened(ask) as rig:
        error = (await rig.call(ask)).error
        assert error is not None and error.code == "NO_CITY"


@pytest.mark.parametrize("sibling", [None, ToolError("second"), ValueError(CANARY)], ids=repr)
async def test_a_tool_error_in_a_task_group_is_still_what_the_tool_says(sibling: Exception | None) -> None:
    async def ask(error: Exception, gate: asyncio.Event) -> None:
        try:
            await gate.wait()
        finally:
            raise error

    @tool
    async def ask_both() -> None:
        """Ask two at once, in a group within a group: one fails, and the other as it is cancelled."""
        async with asyncio.TaskGroup(), asyncio.TaskGroup() as group:
            gate = asyncio.Event()
            group.create_task(ask(ToolError("No such city", code="NO_CITY", retryable=True), gate))
            if sibling is not None:
                group.create_task(ask(sibling, asyncio.Event()))
            gate.set()

    async with opened(ask_both) as rig:
        error = (await rig.call(ask_both)).error
        assert error is not None
        if isinstance(sibling, ValueError):
            assert error.code == "TOOL_CRASHED" and CANARY not in error.message
        else:
            assert (error.code, error.message, error.retryable) == ("NO_CITY", "No such city", True)


async def test_the_text_of_a_tool_error_is_bounded_and_printable() -> None:
    async with opened(fail_with) as rig:
        long = (await rig.call(fail_with, {"kind": "long"})).error
        assert long and long.message == "x" * 2_000
        odd = (await rig.call(fail_with, {"kind": "control characters"})).error
        assert odd and odd.message == "ab[31mcd?e"


@pytest.mark.parametrize(
    ("kind", "expected_ms"),
    [("fraction of a millisecond", 0), ("negative wait", 0), ("endless wait", RETRY_AFTER_MS_MAX)],
)
async def test_the_wait_that_a_tool_error_asks_for_is_bounded(kind: str, expected_ms: int) -> None:
    async with opened(fail_with) as rig:
        error = (await rig.call(fail_with, {"kind": kind})).error
        assert error and (error.message, error.retry_after_ms) == ("Busy", expected_ms)


@pytest.mark.parametrize("kind", TOLD)
async def test_no_tool_error_however_broken_makes_an_answer_that_cannot_be_written(kind: str) -> None:
    async with opened(fail_with) as rig:
        execution = await rig.call(fail_with, {"kind": kind})
        assert execution.status == "failed" and execution.refusal is None
        assert execution.error and len(execution.error.code) <= 64
        assert CANARY.encode() not in execution.as_json()
        assert rig.runs(fail_with) == {"failed": 1}


class Broken(BaseModel):
    @computed_field
    def value(self) -> int:
        raise ValueError(CANARY)


class Exits(BaseModel):
    @computed_field
    def value(self) -> int:
        sys.exit(3)


def cycle() -> list[Any]:
    one: list[Any] = []
    one.append(one)
    return one


def nested(levels: int) -> list[Any]:
    one: list[Any] = []
    for _ in range(levels):
        one = [one]
    return one


RETURNED: dict[str, Callable[[], Any]] = {
    "NaN": lambda: float("nan"),
    "infinity inside": lambda: {"a": [float("-inf")]},
    "bytes": lambda: b"\x00\xff",
    "cycle": cycle,
    "nesting": lambda: nested(5_000),
    "2**70": lambda: 2**70,
    "lone surrogate": lambda: "\ud800",
    "object": object,
    "generator": lambda: iter(range(3)),
    "function": lambda: cycle,
    "keys that are no text": lambda: {1: 2},
    "property that raises": Broken,
    "property that exits": Exits,
    "coroutine": lambda: asyncio.sleep(0),
}


@pytest.mark.parametrize("kind", RETURNED)
async def test_a_result_that_json_cannot_hold_fails_the_call_and_nothing_else(kind: str) -> None:
    @tool
    async def give() -> Any:
        """Return something odd."""
        return RETURNED[kind]()

    async with opened(give) as rig:
        execution = await rig.call(give)
        assert execution.status == "failed"
        assert execution.error and execution.error.code == "TOOL_RESULT_INVALID"
        assert CANARY.encode() not in execution.as_json()
        assert rig.errors() == {"result_invalid": 1}
    gc.collect()  # would warn of a coroutine that was never awaited


async def test_a_sync_function_that_returns_a_coroutine_fails_clearly_and_warns_of_nothing() -> None:
    async def inner() -> str:
        return "never"

    @tool
    def forgets_to_await() -> str:
        """Return a coroutine."""
        return inner()  # type: ignore[return-value]

    async with opened(forgets_to_await) as rig:
        error = (await rig.call(forgets_to_await)).error
        assert error and error.code == "TOOL_RESULT_INVALID"
    gc.collect()


async def test_a_tool_that_returns_a_generator_fails_clearly() -> None:
    async def numbers() -> AsyncIterator[int]:
        yield 1

    def letters() -> Iterator[str]:
        yield "a"

    @tool(id="of_numbers")
    async def of_numbers() -> Any:
        """Return an asynchronous generator."""
        return numbers()

    @tool(id="of_letters")
    def of_letters() -> Any:
        """Return a generator."""
        return letters()

    declared = (of_numbers, of_letters)
    async with opened(*declared) as rig:
        for one in declared:
            error = (await rig.call(one)).error
            assert error and error.code == "TOOL_RESULT_INVALID"


async def test_a_result_may_be_as_long_as_the_limit_and_no_longer() -> None:
    @tool
    async def give(characters: int) -> str:
        """Return a text."""
        return "x" * characters

    async with opened(give, result_bytes_max=1_024) as rig:
        assert (await rig.call(give, {"characters": 1_022})).status == "success"
        error = (await rig.call(give, {"characters": 1_023})).error
        assert error and error.code == "TOOL_RESULT_TOO_LARGE"
        error = (await rig.call(give, {"characters": 100_000_000})).error
        assert error and error.code == "TOOL_RESULT_TOO_LARGE"


async def test_hung_sync_tools_do_not_stop_other_sync_tools() -> None:
    release = threading.Event()

    @tool
    def hang() -> None:
        """Hold a thread."""
        release.wait()

    @tool
    def quick() -> str:
        """Return at once."""
        return "done"

    async with opened(hang, quick, threads=ThreadPool(2)) as rig:
        hung = [rig.start(hang, timeout_override_s=0.5) for _ in range(2)]
        behind = rig.start(quick)
        assert [(await call).status for call in hung] == ["timeout", "timeout"]
        assert (await behind).result == b'"done"', "it waited for a thread and got a fresh one"
        assert (await rig.call(quick)).status == "success"
        assert rig.executor.abandoned == 2
        release.set()
        await until(lambda: rig.executor.abandoned == 0)


async def test_a_sync_tool_that_never_got_a_thread_is_refused_and_did_not_run() -> None:
    release = threading.Event()
    ran: list[str] = []

    @tool
    def hang(name: str) -> None:
        """Hold a thread."""
        ran.append(name)
        release.wait()

    async with opened(hang, threads=ThreadPool(1)) as rig:
        first = rig.start(hang, {"name": "first"})
        await until(lambda: ran == ["first"])
        refused = await rig.call(hang, {"name": "second"}, timeout_override_s=0.01)
        assert refused.refusal and refused.refusal.kind is OVERLOADED and refused.refusal.retry_after_ms
        assert refused.attempts == 0
        release.set()
        assert (await first).status == "success"
        assert ran == ["first"]
        assert rig.runs(hang) == {"success": 1}


async def test_a_sync_tool_that_ends_in_the_tick_of_its_deadline_has_timed_out_and_did_run() -> None:
    deadlines: list[float] = []
    release = threading.Event()

    @tool(timeout=0.5)
    def send(context: ToolContext) -> None:
        """Have an effect, late."""
        deadlines.append(context.deadline)
        release.wait()

    async with opened(send) as rig:
        call = rig.start(send, idempotency_key="once")
        await until(lambda: bool(deadlines))
        release.set()
        threading.Event().wait(max(0.0, deadlines[0] - time.perf_counter()) + 0.02)  # the loop sees both at once
        ended = await call
        assert (ended.status, ended.refusal, ended.attempts) == ("timeout", None, 1)
        assert rig.runs(send) == {"timeout": 1}
        assert (await rig.call(send, idempotency_key="once")).replayed
        assert len(deadlines) == 1


async def test_a_sync_tool_runs_beside_the_event_loop_and_not_on_it() -> None:
    @tool
    def where() -> bool:
        """Tell whether this is the loop's thread."""
        return threading.current_thread() is threading.main_thread()

    async with opened(where) as rig:
        assert (await rig.call(where)).result == b"false"


@pytest.mark.parametrize("blocking", [True, False])
async def test_the_context_tells_a_tool_when_its_run_ends(blocking: bool) -> None:
    async def on_loop(context: ToolContext) -> float:
        return context.remaining_s()

    def in_thread(context: ToolContext) -> float:
        return context.remaining_s()

    chosen: Callable[..., float | Awaitable[float]] = in_thread if blocking else on_loop
    one = tool(id="remaining", description="Tell what is left.")(chosen)
    async with opened(one) as rig:
        execution = await rig.call(one, timeout_override_s=7.0)
        assert execution.result and 0.0 < float(execution.result) <= 7.0


async def test_a_deadline_that_passed_already_ends_the_run_at_its_first_wait() -> None:
    @tool
    async def wait() -> None:
        """Wait for ever."""
        await asyncio.Event().wait()

    async with opened(wait) as rig:
        assert (await rig.call(wait, deadline=time.perf_counter() - 1.0)).status == "timeout"
