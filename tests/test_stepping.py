"""Coroutines that are stepped without a task: every way in which one can end, and the way into a task."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import types
from collections.abc import Coroutine, Generator
from typing import Any

import pytest

from app.execution_log.commit import Commit
from app.stepping import IN_TASK, Stepper

pytestmark = pytest.mark.anyio

WAIT_S = 10.0
"""Longer than anything here takes."""

colour: contextvars.ContextVar[str] = contextvars.ContextVar("colour", default="none")


class Watched(Stepper):
    """Tells how it ended."""

    def __init__(self, context: contextvars.Context | None = None) -> None:
        self.tasks_kept: set[asyncio.Task[Any]] = set()
        loop = asyncio.get_running_loop()
        super().__init__(loop, contextvars.copy_context() if context is None else context, self.tasks_kept)
        self.ends: list[Any] = []
        self.ended = asyncio.Event()

    def returned(self, value: Any) -> None:
        self.ends.append(value)
        self.ended.set()

    def raised(self, error: BaseException) -> None:
        self.ends.append(error)
        self.ended.set()

    async def end(self) -> Any:
        """What it ended with, the only time that it did."""
        async with asyncio.timeout(WAIT_S):
            await self.ended.wait()
        await asyncio.sleep(0)
        (end,) = self.ends
        assert not self.tasks_kept
        return end


def started(steps: Coroutine[Any, Any, Any]) -> Watched:
    watched = Watched()
    watched.start(steps)
    return watched


class Told(Exception):
    pass


async def test_what_never_waits_has_ended_when_start_returns() -> None:
    async def never_waits() -> str:
        return "value"

    watched = started(never_waits())
    assert watched.ends == ["value"]
    assert await watched.end() == "value"


async def test_what_raises_at_once_has_raised_when_start_returns() -> None:
    async def raises() -> None:
        raise Told

    watched = started(raises())
    assert [type(end) for end in watched.ends] == [Told]


async def test_it_waits_for_a_future_and_gets_its_value() -> None:
    future: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def waits() -> str:
        return await future + await future

    watched = started(waits())
    assert not watched.ends
    future.set_result("ab")
    assert await watched.end() == "abab"


async def test_it_waits_for_one_future_after_another() -> None:
    futures = [asyncio.get_running_loop().create_future() for _ in range(3)]

    async def waits() -> list[int]:
        return [await future for future in futures]

    watched = started(waits())
    for number in (2, 0, 1):
        futures[number].set_result(number)
    assert await watched.end() == [0, 1, 2]


async def test_an_exception_of_what_it_waits_for_is_raised_where_it_waits() -> None:
    future: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def waits() -> str:
        try:
            return await future
        except Told:
            return "caught"

    watched = started(waits())
    future.set_exception(Told())
    assert await watched.end() == "caught"


async def test_an_exception_after_a_wait_is_raised() -> None:
    async def waits() -> None:
        await asyncio.sleep(0)
        raise Told

    assert type(await started(waits()).end()) is Told


async def test_a_cancelled_future_is_a_cancellation_where_it_is_waited_for() -> None:
    future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    tidied: list[str] = []

    async def waits() -> None:
        try:
            await future
        finally:
            tidied.append("up")

    watched = started(waits())
    future.cancel()
    assert type(await watched.end()) is asyncio.CancelledError
    assert tidied == ["up"]


async def test_it_gives_others_a_turn() -> None:
    order: list[str] = []

    async def waits() -> None:
        order.append("first")
        await asyncio.sleep(0)
        order.append("last")

    asyncio.get_running_loop().call_soon(order.append, "before")
    watched = started(waits())
    assert order == ["first"]
    await watched.end()
    assert order == ["first", "before", "last"]


async def test_what_awaits_no_future_ends_with_an_error_and_is_closed() -> None:
    closed: list[str] = []

    @types.coroutine
    def oddly() -> Generator[Any, Any, Any]:
        yield "not a future"

    async def waits() -> None:
        try:
            await oddly()
        finally:
            closed.append("closed")

    error = await started(waits()).end()
    assert type(error) is RuntimeError and "str" in str(error)
    assert closed == ["closed"]


# Into a task


async def test_outside_of_a_task_there_is_none_and_after_in_task_there_is() -> None:
    seen: list[asyncio.Task[Any] | None] = []

    async def goes() -> str:
        seen.append(asyncio.current_task())
        await IN_TASK
        seen.append(asyncio.current_task())
        await asyncio.sleep(0)
        seen.append(asyncio.current_task())
        return "value"

    watched = Watched()
    asyncio.get_running_loop().call_soon(watched.start, goes())  # this test is a task
    assert await watched.end() == "value"
    outside, *inside = seen
    assert outside is None and None not in inside and len(set(inside)) == 1


async def from_a_callback(steps: Coroutine[Any, Any, Any]) -> Watched:
    """Started where the lane starts them: in a callback of the loop, outside of any task."""
    watched = Watched()
    asyncio.get_running_loop().call_soon(watched.start, steps)
    await asyncio.sleep(0)
    return watched


async def test_a_second_in_task_changes_nothing() -> None:
    async def goes() -> bool:
        await IN_TASK
        task = asyncio.current_task()
        await IN_TASK
        return asyncio.current_task() is task

    assert await (await from_a_callback(goes())).end() is True


async def test_in_a_task_timeouts_and_groups_work() -> None:
    async def goes() -> str:
        await IN_TASK
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(0))
        try:
            async with asyncio.timeout(0):
                await asyncio.Event().wait()
        except TimeoutError:
            return "timed out"
        return "waited"

    assert await (await from_a_callback(goes())).end() == "timed out"


async def test_what_raises_in_its_task_raises() -> None:
    async def goes() -> None:
        await IN_TASK
        raise Told

    assert type(await (await from_a_callback(goes())).end()) is Told


async def test_its_task_is_kept_while_it_lives() -> None:
    gate = asyncio.Event()

    async def goes() -> None:
        await IN_TASK
        await gate.wait()

    watched = await from_a_callback(goes())
    assert len(watched.tasks_kept) == 1
    gate.set()
    await watched.end()


@pytest.mark.parametrize("begun", [True, False], ids=["begun", "not begun"])
async def test_a_cancelled_task_is_a_cancellation_and_leaves_nothing_open(begun: bool) -> None:
    tidied: list[str] = []

    async def goes() -> None:
        try:
            await IN_TASK
            await asyncio.Event().wait()
        finally:
            tidied.append("up")

    watched = Watched()
    cancelled: list[bool] = []

    def begin() -> None:
        watched.start(goes())
        if not begun:
            cancelled.extend(task.cancel() for task in watched.tasks_kept)

    asyncio.get_running_loop().call_soon(begin)
    await asyncio.sleep(0)
    if begun:
        await asyncio.sleep(0)
        cancelled.extend(task.cancel() for task in watched.tasks_kept)
    assert cancelled == [True]
    assert type(await watched.end()) is asyncio.CancelledError
    assert tidied == ["up"]


async def test_a_cancellation_may_be_swallowed_as_in_any_task() -> None:
    async def goes() -> str:
        await IN_TASK
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "went on"
        return "waited"

    watched = await from_a_callback(goes())
    await asyncio.sleep(0)
    for task in watched.tasks_kept:
        task.cancel()
    assert await watched.end() == "went on"


# Its context


async def test_what_it_sets_stays_in_its_context_over_waits_and_into_its_task() -> None:
    seen: list[str] = []

    async def goes() -> None:
        colour.set("red")
        await asyncio.sleep(0)
        seen.append(colour.get())
        await IN_TASK
        seen.append(colour.get())

    context = contextvars.copy_context()
    watched = Watched(context)
    asyncio.get_running_loop().call_soon(watched.start, goes())
    await watched.end()
    assert seen == ["red", "red"]
    assert context[colour] == "red" and colour.get() == "none"


async def test_it_leaves_no_circles_behind() -> None:
    async def goes(in_task: bool) -> None:
        await asyncio.sleep(0)
        if in_task:
            await IN_TASK

    async def run(count: int) -> None:
        for number in range(count):
            watched = await from_a_callback(goes(bool(number % 2)))
            await watched.end()

    await run(2)
    gc.collect()
    gc.disable()
    try:
        await run(100)
        assert gc.collect() < 20
    finally:
        gc.enable()


async def test_a_commit_wakes_what_is_stepped_by_itself_and_in_its_context() -> None:
    loop = asyncio.get_running_loop()
    commit, seen = Commit(loop), []

    async def waits(name: str) -> str:
        colour.set(name)
        await commit.wait()
        seen.append(colour.get())
        return name

    both = [started(waits("red")), started(waits("blue"))]
    task = asyncio.ensure_future(waits("green"))
    await asyncio.sleep(0)
    assert seen == []
    commit.complete()
    assert seen == ["red", "blue"], "before complete() returned; the task needs a turn of the loop"
    assert [await one.end() for one in both] == ["red", "blue"]
    assert await asyncio.wait_for(task, WAIT_S) == "green" and colour.get() == "none"
    assert await started(waits("done already")).end() == "done already"


async def test_a_task_that_waits_for_a_commit_may_be_cancelled_while_it_is_stepped_beside() -> None:
    commit = Commit(asyncio.get_running_loop())
    stepped, task = started(commit.wait()), asyncio.ensure_future(commit.wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert stepped.ends == []
    commit.complete()
    assert await stepped.end() is None
