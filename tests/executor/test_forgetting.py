"""A failed run leaves nothing behind that only the garbage collector would free: what was in its frames, parameters and
bodies, goes with it."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from app.calls import LOCAL_CALLER, ToolCall, new_execution_id
from app.executor.forgetting import ERRORS_MAX, forget_frames
from app.executor.plans import Plan, PlanTask
from app.tools.tool import FunctionTool, ToolError, tool
from tests.executor.in_process import Rig, opened
from tests.waiting import SOON_S, until

pytestmark = pytest.mark.anyio


class Held:
    """Something in a frame."""


held: list[weakref.ref[Held]] = []


def hold() -> Held:
    something = Held()
    held.append(weakref.ref(something))
    return something


# Each has a frame that leads back to its error, which libraries of HTTP and of I/O have too.


@tool
async def fails_in_place() -> None:
    """Raise."""
    something = hold()
    try:
        raise ValueError
    except ValueError as error:
        kept = something, error
        raise ToolError("no") from kept[1]


@tool
async def fails_on_the_loop() -> None:
    """Wait, and raise."""
    something = hold()
    await asyncio.sleep(0)
    try:
        raise ValueError
    except ValueError as error:
        kept = something, error
        raise ToolError("no") from kept[1]


@tool
def fails_in_a_thread() -> None:
    """Raise."""
    something = hold()
    raise ToolError(f"no {type(something).__name__}")


@tool
async def crashes() -> None:
    """Raise what no agent is told."""
    something = hold()
    await asyncio.sleep(0)
    kept = something, ValueError()
    raise kept[1]


@tool
async def fails_in_a_group() -> None:
    """Raise in a task group."""
    something = hold()

    async def fail() -> None:
        kept = something, ToolError("no")
        raise kept[1]

    async with asyncio.TaskGroup() as group:
        group.create_task(fail())


@tool
async def cancels_itself() -> None:
    """Raise CancelledError."""
    something = hold()
    await asyncio.sleep(0)
    kept = something, asyncio.CancelledError()
    raise kept[1]


@tool(timeout=0.01)
async def is_cut_off() -> None:
    """Outlive the deadline."""
    something = hold()
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError as error:
        kept = something, error
        raise asyncio.CancelledError from kept[1]


@tool(timeout=0.01)
async def is_cut_off_and_fails() -> None:
    """Outlive the deadline, and raise something else then."""
    something = hold()
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError as error:
        kept = something, error
        raise ToolError("no") from kept[1]


@tool(idempotent=True, retries=1)
async def fails_again() -> None:
    """Raise, and say that it may be tried again."""
    something = hold()
    raise ToolError(f"no {type(something).__name__}", retryable=True)


@tool
async def returns_no_json() -> object:
    """Return what cannot be sent."""
    return hold()


TOOLS = [each for each in list(globals().values()) if isinstance(each, FunctionTool)]


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    held.clear()
    yield
    gc.enable()


async def call(rig: Rig, failing: FunctionTool) -> None:
    execution = await rig.call(failing)
    assert execution.result is None and execution.refusal is None


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("failing", TOOLS, ids=lambda each: each.spec.id)
async def test_what_was_in_the_frames_of_a_failed_run_goes_with_it(
    failing: FunctionTool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "app.tools")  # it would keep the tracebacks
    async with opened(failing) as rig:
        await call(rig, failing)
        assert held
        await until(lambda: not any(each() for each in held))


@tool
async def returns_a_text(text: str = "") -> str:
    """Return a text."""
    return text


class Parameters(dict[str, Any]):
    """Of a call, as they came."""


@pytest.mark.usefixtures("no_collection")
async def test_a_task_that_points_at_nothing_takes_its_parameters_with_it() -> None:
    async with opened(returns_a_text) as rig:
        first, then = (
            ToolCall(new_execution_id(), "returns_a_text", parameters, LOCAL_CALLER, time.perf_counter())
            for parameters in ({}, Parameters({"text": {"$from": "first", "path": "nowhere"}}))
        )
        parameters = weakref.ref(then.parameters)
        tasks = [PlanTask("first", first, ()), PlanTask("then", then, ("first",))]
        del then
        plan = Plan(tasks, 2, time.perf_counter() + SOON_S)
        result = await plan.run(rig.executor.execute)
        assert result.executions["then"].refusal is not None
        del plan, result, tasks
        await until(lambda: parameters() is None)


class Broken(Exception):
    """Has attributes that fail."""

    @property
    def __traceback__(self) -> None:  # type: ignore[override]
        raise RuntimeError

    @property
    def __cause__(self) -> None:  # type: ignore[override]
        raise RuntimeError


async def test_an_error_that_refuses_to_be_looked_at_is_forgotten_too() -> None:
    cause = ValueError()
    try:
        try:
            raise cause
        except ValueError:
            raise Broken from cause
    except Broken as error:
        forget_frames(error)
    assert cause.__traceback__ is None


async def test_a_chain_of_errors_has_an_end_however_long_it_is() -> None:
    first = last = ValueError()
    for _ in range(2 * ERRORS_MAX):
        last.__cause__ = ValueError()
        last = last.__cause__
    last.__cause__ = first  # and a circle
    forget_frames(first)
