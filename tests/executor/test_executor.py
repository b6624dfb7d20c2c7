"""The call path: deadlines, slots, cancellation at every point, and exactly one epilogue for every outcome."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import AfterValidator

from app.calls import LOCAL_CALLER, Caller, Execution, ToolCall, new_execution_id
from app.errors import DRAINING, INTERNAL, INVALID_PARAMS, OVERLOADED, TOOL_NOT_FOUND, ErrorKind, ToolError
from app.executor.attempts import BACKOFF_S_MIN
from app.executor.run import LONG_IN_PLACE_MAX, LONG_IN_PLACE_S
from app.executor.threads import ThreadPool
from app.limits.concurrency import Slots
from app.tools.tool import FunctionTool, ToolContext, tool
from tests.executor.in_process import Rig, opened
from tests.waiting import until

pytestmark = pytest.mark.anyio

OTHER_CALLER = Caller("other", "other")
ADMIN = Caller("other", "admin", LOCAL_CALLER.scopes | {"admin"})


@tool
async def echo(message: str) -> str:
    """Return the message."""
    return message


@tool
async def forever() -> None:
    """Wait until cancelled."""
    await asyncio.Event().wait()


@tool(max_concurrent=1)
async def alone() -> None:
    """Wait until cancelled; one at a time."""
    await asyncio.Event().wait()


@tool
async def fail() -> None:
    """Fail clearly."""
    raise ToolError("No")


@tool
async def crash() -> None:
    """Fail otherwise."""
    raise ValueError


@tool
async def give_bytes() -> Any:
    """Return what JSON cannot hold."""
    return b""


@tool(required_scopes=["never:granted"])
async def hidden() -> None:
    """Nobody may see this."""


def timed(timeout: float | None) -> FunctionTool:
    @tool(id="timed", timeout=timeout)
    async def remaining(context: ToolContext) -> float:
        """Tell what is left."""
        return context.remaining_s()

    return remaining


@pytest.mark.parametrize(
    ("tools_own", "override", "ceiling", "plans", "smallest"),
    [
        (None, None, 30.0, None, 30.0),
        (5.0, None, 30.0, None, 5.0),
        (50.0, None, 30.0, None, 30.0),
        (5.0, 3.0, 30.0, None, 3.0),
        (5.0, 8.0, 30.0, None, 5.0),
        (None, 3000.0, 30.0, None, 30.0),
        (5.0, 3.0, 30.0, 2.0, 2.0),
        (5.0, 3.0, 30.0, 20.0, 3.0),
    ],
)
async def test_a_run_may_take_the_smallest_of_all_the_times_that_are_given(
    tools_own: float | None, override: float | None, ceiling: float, plans: float | None, smallest: float
) -> None:
    one = timed(tools_own)
    async with opened(one, ceiling_s=ceiling) as rig:
        deadline = None if plans is None else time.perf_counter() + plans
        execution = await rig.call(one, timeout_override_s=override, deadline=deadline)
        assert execution.result is not None
        assert smallest / 2 < float(execution.result) <= smallest


async def test_a_plans_deadline_holds_for_a_call_that_waited_for_its_slot() -> None:
    one = timed(None)
    async with opened(one, forever, slots=Slots(1)) as rig:
        first = rig.start(forever)
        await until(lambda: rig.slots.running == 1)
        deadline = time.perf_counter() + 5.0
        second = rig.start(one, deadline=deadline)
        await until(lambda: rig.slots.queued == 1)
        waited_until = time.perf_counter() + 0.05
        await until(lambda: time.perf_counter() > waited_until)
        first.cancel()
        execution = await second
        assert execution.result is not None and float(execution.result) <= deadline - waited_until


async def test_cancelling_by_execution_id_or_call_id_ends_a_running_call_as_cancelled() -> None:
    async with opened(forever) as rig:
        by_execution, by_call = rig.start(forever), rig.start(forever, call_id="mine")
        await until(lambda: rig.slots.running == 2)
        assert rig.executor.calls.cancel(LOCAL_CALLER, by_execution.get_name(), None)
        assert rig.executor.calls.cancel(LOCAL_CALLER, None, "mine")
        for execution in (await by_execution, await by_call):
            assert (execution.status, execution.attempts) == ("cancelled", 1)
            assert execution.error and execution.error.code == "TOOL_CANCELLED"
        assert rig.runs(forever) == {"cancelled": 2}
        assert rig.errors() == {"cancelled": 2}


async def test_cancelling_what_does_not_run_says_false() -> None:
    async with opened(echo) as rig:
        ended = await rig.call(echo, {"message": "a"}, call_id="mine")
        assert not rig.executor.calls.cancel(LOCAL_CALLER, ended.execution_id, None)
        assert not rig.executor.calls.cancel(LOCAL_CALLER, None, "mine")
        assert not rig.executor.calls.cancel(LOCAL_CALLER, "never heard of", None)
        assert not rig.executor.calls.cancel(LOCAL_CALLER, None, None)


async def test_only_the_caller_or_an_admin_can_cancel_a_call() -> None:
    async with opened(forever) as rig:
        call = rig.start(forever, call_id="mine")
        await until(lambda: rig.slots.running == 1)
        assert not rig.executor.calls.cancel(OTHER_CALLER, call.get_name(), None)
        assert not rig.executor.calls.cancel(OTHER_CALLER, None, "mine")
        assert not rig.executor.calls.cancel(dataclasses.replace(LOCAL_CALLER, tenant="other"), call.get_name(), None)
        assert not rig.executor.calls.cancel(ADMIN, None, "mine"), "a call_id is a name among the caller's own calls"
        assert rig.executor.calls.cancel(ADMIN, call.get_name(), None)
        assert (await call).status == "cancelled"


async def test_an_admins_call_id_is_its_own_call_else_that_of_the_only_caller_who_has_it() -> None:
    async with opened(forever) as rig:
        mine, others = (
            rig.start(forever, caller=ADMIN, call_id="a"),
            rig.start(forever, caller=OTHER_CALLER, call_id="a"),
        )
        first, second = (rig.start(forever, caller=caller, call_id="b") for caller in (LOCAL_CALLER, OTHER_CALLER))
        await until(lambda: rig.slots.running == 4)
        cancel = rig.executor.calls.cancel_anywhere
        assert await cancel(ADMIN, None, "a") and (await mine).status == "cancelled"
        assert not await cancel(LOCAL_CALLER, None, "a")
        assert await cancel(ADMIN, None, "a") and (await others).status == "cancelled"
        assert not await cancel(ADMIN, None, "b"), "whose it is, it does not say"
        assert await cancel(LOCAL_CALLER, None, "b") and (await first).status == "cancelled"
        assert await cancel(ADMIN, None, "b") and (await second).status == "cancelled"
        assert not await cancel(ADMIN, None, "b")


async def test_cancelling_a_call_in_the_queue_ends_it_without_a_run() -> None:
    async with opened(forever, alone, slots=Slots(2)) as rig:
        running = rig.start(alone)
        await until(lambda: rig.slots.running == 1)
        for_its_tool = rig.start(alone)
        await until(lambda: rig.executor.queue_depth == 1)
        filling = rig.start(forever)
        for_the_process = rig.start(forever)
        await until(lambda: rig.executor.queue_depth == 2)
        for queued in (for_its_tool, for_the_process):
            assert rig.executor.calls.cancel(LOCAL_CALLER, queued.get_name(), None)
            execution = await queued
            assert (execution.status, execution.attempts, execution.run_s) == ("cancelled", 0, 0)
        assert rig.executor.queue_depth == 0
        for call in (running, filling):
            rig.executor.calls.cancel(LOCAL_CALLER, call.get_name(), None)
            await call


async def test_cancelling_a_sync_tool_answers_at_once_and_counts_its_thread_as_abandoned() -> None:
    begun, release = threading.Event(), threading.Event()

    @tool
    def hold() -> None:
        """Hold a thread."""
        begun.set()
        release.wait()

    async with opened(hold) as rig:
        call = rig.start(hold)
        await until(begun.is_set)
        assert rig.executor.calls.cancel(LOCAL_CALLER, call.get_name(), None)
        assert (await call).status == "cancelled"
        assert (rig.executor.abandoned, rig.metrics.abandoned) == (1, 1)
        release.set()
        await until(lambda: rig.executor.abandoned == 0)


async def test_cancelling_a_sync_tool_that_waits_for_a_thread_ends_it_as_cancelled() -> None:
    release = threading.Event()

    @tool
    def hold() -> None:
        """Hold a thread."""
        release.wait()

    async with opened(hold, threads=ThreadPool(1)) as rig:
        first, second = rig.start(hold), rig.start(hold)
        await until(lambda: rig.slots.running == 2)
        await asyncio.sleep(0)
        assert rig.executor.calls.cancel(LOCAL_CALLER, second.get_name(), None)
        execution = await second
        assert execution.status == "cancelled" and execution.refusal is None
        assert rig.executor.abandoned == 0
        release.set()
        assert (await first).status == "success"


async def test_a_cancellation_in_the_tick_of_the_tools_end_comes_too_late_and_says_so() -> None:
    release = asyncio.Event()

    @tool
    async def wait() -> str:
        """Wait to be released."""
        await release.wait()
        return "done"

    async with opened(wait) as rig:
        call = rig.start(wait)
        await until(lambda: rig.slots.running == 1)
        answers: list[bool] = []
        release.set()
        # For each turn of the loop until the answer: what cancel says must be what the execution becomes.
        while not call.done():
            await asyncio.sleep(0)
            if rig.executor.concurrency:
                answers.append(rig.executor.calls.cancel(LOCAL_CALLER, call.get_name(), None))
        cancelled = any(answers)
        assert (await call).status == ("cancelled" if cancelled else "success")


@pytest.mark.parametrize("turns", range(8))
async def test_what_cancel_says_is_what_the_execution_becomes(turns: int) -> None:
    release = asyncio.Event()

    @tool
    async def wait() -> str:
        """Wait to be released."""
        await release.wait()
        return "done"

    async with opened(wait) as rig:
        call = rig.start(wait)
        await until(lambda: rig.slots.running == 1)
        release.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        cancelled = rig.executor.calls.cancel(LOCAL_CALLER, call.get_name(), None)
        assert (await call).status == ("cancelled" if cancelled else "success")


@pytest.mark.parametrize("turns", range(1, 7))
@pytest.mark.parametrize("waits", range(4))
async def test_what_cancel_says_holds_for_a_tool_that_takes_so_many_turns(waits: int, turns: int) -> None:
    @tool
    async def work() -> str:
        """Take some turns of the loop."""
        for _ in range(waits):
            await asyncio.sleep(0)
        return "done"

    async with opened(work) as rig:
        call = rig.start(work)
        for _ in range(turns):
            await asyncio.sleep(0)
        cancelled = rig.executor.calls.cancel(LOCAL_CALLER, call.get_name(), None)
        assert (await call).status == ("cancelled" if cancelled else "success")


async def test_a_call_that_is_cancelled_in_the_tick_of_its_slot_does_not_run() -> None:
    ran: list[str] = []

    @tool
    async def work() -> None:
        """Note that it ran."""
        ran.append("work")
        await asyncio.Event().wait()

    async with opened(work, forever, slots=Slots(1)) as rig:
        first = rig.start(forever)
        second = rig.start(work)
        await until(lambda: rig.slots.queued == 1)
        rig.executor.calls.cancel(LOCAL_CALLER, first.get_name(), None)
        while rig.slots.queued:
            await asyncio.sleep(0)
        # The slot is its own now, and it does not know yet.
        assert rig.executor.calls.cancel(LOCAL_CALLER, second.get_name(), None)
        assert (await second).status == "cancelled"
        assert ran == []
        await first


@pytest.mark.parametrize("where", ["in place", "on the loop", "in a thread"])
async def test_each_attempt_gets_the_parameters_as_they_were_sent(where: str) -> None:
    seen: list[list[str]] = []

    def send(names: list[str]) -> int:
        seen.append(list(names))
        sent = names.pop()
        if len(seen) == 1:
            raise ToolError(f"{sent} was sent, then the connection broke", retryable=True)
        return len(names)

    async def in_place(names: list[str]) -> int:
        return send(names)

    async def on_loop(names: list[str]) -> int:
        await asyncio.sleep(0)
        return send(names)

    function = {"in place": in_place, "on the loop": on_loop, "in a thread": send}[where]
    sends = tool(id="send", description="Send to all.", idempotent=True, retries=1)(function)
    async with opened(sends) as rig:
        execution = await rig.call(sends, {"names": ["anna", "ben"]})
        assert (execution.status, execution.attempts) == ("success", 2)
        assert seen == [["anna", "ben"], ["anna", "ben"]]


async def test_where_parameters_are_refused_the_second_time_the_first_failure_stands() -> None:
    asked: list[str] = []

    def once(word: str) -> str:
        asked.append(word)
        if len(asked) > 1:
            raise ValueError
        return word

    async def fails(word: Any) -> None:
        raise ToolError("Not now", code="NOT_NOW", retryable=True)

    fails.__annotations__["word"] = Annotated[str, AfterValidator(once)]  # a hint can name what is global alone
    work = tool(id="work", description="Fail, for now.", idempotent=True, retries=1)(fails)
    async with opened(work) as rig:
        execution = await rig.call(work, {"word": "one"})
        assert execution.refusal is None and execution.error and execution.error.code == "NOT_NOW"
        assert (execution.attempts, len(asked) > 1) == (1, True)


async def test_a_call_that_is_cancelled_in_the_tick_in_which_its_pause_ends_does_not_run_again() -> None:
    ran: list[str] = []

    @tool(idempotent=True, retries=1)
    async def work() -> None:
        """Fail once."""
        ran.append("work")
        if len(ran) == 1:
            raise ToolError("Not now", retryable=True, retry_after_ms=1_000)

    async with opened(work) as rig:
        call = rig.start(work)
        await until(lambda: bool(ran))
        answers: list[bool] = []
        threading.Event().wait(1.0 + 2 * BACKOFF_S_MIN)  # the pause is over before the loop turns again
        # Behind the pause's own timer, which was due earlier, and before its call goes on.
        asyncio.get_running_loop().call_later(
            0, lambda: answers.append(rig.executor.calls.cancel(LOCAL_CALLER, call.get_name(), None))
        )
        execution = await call
        assert (answers, execution.status) == ([True], "cancelled")
        assert len(ran) == 1


async def test_a_running_call_id_cannot_be_used_twice_and_is_free_afterwards() -> None:
    async with opened(forever, echo, fail) as rig:
        first = rig.start(forever, call_id="mine")
        await until(lambda: rig.slots.running == 1)
        again = await rig.call(echo, {"message": "a"}, call_id="mine")
        assert again.refusal and again.refusal.kind is INVALID_PARAMS
        assert again.refusal.data["errors"][0]["path"] == "call_id"
        assert (await rig.call(echo, {"message": "a"}, call_id="mine", caller=OTHER_CALLER)).status == "success"
        assert rig.executor.calls.cancel(LOCAL_CALLER, None, "mine"), "the refused one did not take the name along"
        assert (await first).status == "cancelled"
        for one, parameters in ((echo, {"message": "a"}), (fail, {}), (echo, {}), ("unknown", {})):
            execution = await rig.call(one, parameters, call_id="mine")
            assert execution.refusal is None or execution.refusal.kind is not INVALID_PARAMS or not parameters
        assert (await rig.call(echo, {"message": "a"}, call_id="mine")).status == "success"


def crashing_validator(value: str) -> str:
    raise {"exit": SystemExit, "cancel": asyncio.CancelledError, "type": TypeError}[value]("canary-7f3a")


@tool
async def validated(value: Annotated[str, AfterValidator(crashing_validator)]) -> None:
    """Has a validator that crashes."""


@pytest.mark.parametrize("kind", ["exit", "cancel", "type"])
async def test_a_validator_that_crashes_refuses_its_call_and_nothing_else(kind: str) -> None:
    async with opened(validated) as rig:
        execution = await rig.call(validated, {"value": kind})
        assert execution.refusal and execution.refusal.kind is INTERNAL
        assert "canary" not in str(execution.refusal.as_error())
        assert rig.errors() == {"internal": 1}


@pytest.mark.parametrize(
    ("tool_id", "parameters", "kind", "runs", "errors"),
    [
        ("echo", {"message": "a"}, None, {"success": 1}, {}),
        ("fail", {}, None, {"failed": 1}, {"tool_error": 1}),
        ("crash", {}, None, {"failed": 1}, {"tool_crash": 1}),
        ("give_bytes", {}, None, {"failed": 1}, {"result_invalid": 1}),
        ("forever", {}, None, {"timeout": 1}, {"timeout": 1}),
        ("echo", {}, INVALID_PARAMS, {}, {"invalid_params": 1}),
        ("unknown", {}, TOOL_NOT_FOUND, {}, {"tool_not_found": 1}),
        ("hidden", {}, TOOL_NOT_FOUND, {}, {"tool_not_found": 1}),
    ],
)
async def test_every_outcome_is_counted_once_and_a_refusal_is_no_run(
    tool_id: str, parameters: dict[str, Any], kind: ErrorKind | None, runs: dict[str, int], errors: dict[str, int]
) -> None:
    async with opened(echo, fail, crash, give_bytes, forever, hidden) as rig:
        execution = await rig.call(tool_id, parameters, timeout_override_s=0.01 if tool_id == "forever" else None)
        assert (execution.refusal and execution.refusal.kind) == kind
        assert execution.refusal is None or execution.refusal.execution_id == execution.execution_id
        assert execution.attempts == (1 if runs else 0)
        counted = rig.metrics.tools.get(tool_id)
        assert {name: count for name, count in counted.executions.items() if count} == runs if counted else not runs
        assert counted is None or sum(counted.duration.counts) == len(runs)
        assert rig.errors() == errors
        assert sum(rig.metrics.stages["metrics"].counts) == 1


async def test_a_tool_that_computes_for_long_soon_runs_in_a_task_where_its_calls_are_counted() -> None:
    computed_s = 0.0

    @tool
    async def compute() -> bool:
        """Whether it ran in a task of its own."""
        ends = time.perf_counter() + computed_s
        while time.perf_counter() < ends:
            pass
        return asyncio.current_task() is not None

    async with opened(compute) as rig:
        computed_s = 2 * LONG_IN_PLACE_S
        in_task = [(await rig.call(compute)).result for _ in range(LONG_IN_PLACE_MAX + 2)]
        assert in_task == [b"false"] * LONG_IN_PLACE_MAX + [b"true"] * 2
        straight: list[Execution] = []
        call = ToolCall(new_execution_id(), "compute", {}, LOCAL_CALLER, time.perf_counter())
        assert rig.executor.begin(call, straight.append), "it waits for its turn, and takes no coroutine for that"
        await until(lambda: bool(straight))
        assert straight[0].result == b"true"


async def test_a_draining_executor_refuses_new_calls_and_lets_running_ones_finish() -> None:
    release = asyncio.Event()

    @tool
    async def wait() -> str:
        """Wait to be released."""
        await release.wait()
        return "done"

    async with opened(wait, echo) as rig:
        running = rig.start(wait)
        await until(lambda: rig.slots.running == 1)
        rig.executor.calls.stop_accepting()
        refused = await rig.call(echo, {"message": "a"})
        assert refused.refusal and refused.refusal.kind is DRAINING and refused.refusal.retry_after_ms
        release.set()
        assert (await running).result == b'"done"'
        assert rig.errors() == {"draining": 1}


async def test_a_full_queue_refuses_at_once_and_an_impatient_wait_in_the_end() -> None:
    async with opened(forever, slots=Slots(1, queue_max=1)) as rig:
        running = rig.start(forever)
        queued = rig.start(forever, timeout_override_s=0.01)
        await until(lambda: rig.executor.queue_depth == 1)
        refused = await rig.call(forever)
        assert not queued.done(), "the full queue was not waited for"
        for execution in (refused, await queued):
            assert execution.refusal and execution.refusal.kind is OVERLOADED
            assert execution.refusal.retry_after_ms and execution.attempts == 0
        running.cancel()
        await asyncio.wait({running})
        assert rig.runs(forever) == {"cancelled": 1}


async def test_a_tools_own_limit_holds_it_back_and_nobody_else() -> None:
    async with opened(alone, echo) as rig:
        running = rig.start(alone)
        await until(lambda: rig.slots.running == 1)
        assert (await rig.call(alone, timeout_override_s=0.01)).refusal
        assert (await rig.call(echo, {"message": "a"})).status == "success"
        assert rig.executor.calls.cancel(LOCAL_CALLER, running.get_name(), None)
        await running
        assert (await rig.call(alone, timeout_override_s=0.01)).status == "timeout", "its slot is free again"


async def test_a_call_that_waits_for_its_tool_takes_no_slot_of_the_process() -> None:
    async with opened(alone, echo, slots=Slots(2)) as rig:
        calls = [rig.start(alone), rig.start(alone)]
        await until(lambda: rig.executor.queue_depth == 1)
        assert rig.slots.running == 1
        assert (await rig.call(echo, {"message": "a"})).status == "success"
        for call in reversed(calls):
            rig.executor.calls.cancel(LOCAL_CALLER, call.get_name(), None)
            await call


class ClientOf:
    """A client that stays until it is told to leave."""

    def __init__(self) -> None:
        self.leaves = asyncio.Event()

    async def gone(self) -> None:
        await self.leaves.wait()


async def test_a_call_whose_client_goes_is_cancelled_only_when_its_tool_says_so() -> None:
    client, release = ClientOf(), asyncio.Event()

    async def wait() -> str:
        """Wait to be released."""
        await release.wait()
        return "done"

    stays = tool(id="stays")(wait)
    leaves = tool(id="leaves", cancel_on_disconnect=True)(wait)
    async with opened(stays, leaves) as rig:
        calls = [rig.start(one, client=client) for one in (stays, leaves)]
        await until(lambda: rig.slots.running == 2)
        client.leaves.set()
        assert (await calls[1]).status == "cancelled"
        release.set()
        assert (await calls[0]).status == "success"
        assert (await rig.call(leaves, client=ClientOf())).status == "success"
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("client-watch") and not task.done()]


@asynccontextmanager
async def situation(name: str) -> AsyncIterator[tuple[Rig, FunctionTool]]:
    """A rig in which a call of the tool has to wait at a certain place."""
    release = threading.Event()

    @tool(id="reluctant")
    async def reluctant() -> None:
        """Take two turns of the loop to unwind."""
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    @tool(id="in_thread")
    def in_thread() -> None:
        """Hold a thread."""
        release.wait()

    @tool(id="watched", cancel_on_disconnect=True)
    async def watched() -> str:
        """Take some turns."""
        for _ in range(3):
            await asyncio.sleep(0)
        return "done"

    chosen = {"in a thread": in_thread, "for the tool's slot": alone, "with a watcher": watched}.get(name, reluctant)
    slots = Slots(1 if name == "for a slot" else 10)
    async with opened(reluctant, in_thread, watched, alone, slots=slots) as rig:
        ahead = rig.start(chosen) if name.startswith("for ") else None
        await asyncio.sleep(0)
        yield rig, chosen
        release.set()
        if ahead:
            ahead.cancel()
            await asyncio.wait({ahead})
        await until(lambda: rig.executor.abandoned == 0)


SITUATIONS = ("running", "in a thread", "for a slot", "for the tool's slot", "with a watcher")


async def outcome(call: asyncio.Task[Execution]) -> str:
    await asyncio.wait({call})
    return "raised" if call.cancelled() else call.result().status


@pytest.mark.parametrize("name", SITUATIONS)
@pytest.mark.parametrize("turns", range(8))
async def test_a_request_that_is_cancelled_at_any_turn_of_the_loop_leaves_nothing_behind(name: str, turns: int) -> None:
    async with situation(name) as (rig, one):
        before = sum(rig.metrics.stages["metrics"].counts)
        call = rig.start(one, call_id="mine", client=ClientOf())
        for _ in range(turns):
            await asyncio.sleep(0)
        call.cancel()
        assert await outcome(call) in ("raised", "success")
        begun = 0 if turns == 0 else 1  # a task that was cancelled before its first step never called the executor
        assert sum(rig.metrics.stages["metrics"].counts) - before == begun, "one epilogue"
        assert not rig.executor.calls.cancel(LOCAL_CALLER, None, "mine")


@pytest.mark.parametrize("name", SITUATIONS)
@pytest.mark.parametrize("second", range(3))
@pytest.mark.parametrize("first", range(1, 5))
async def test_a_request_cancelled_while_its_call_is_cancelled_leaves_nothing_behind(
    name: str, first: int, second: int
) -> None:
    async with situation(name) as (rig, one):
        call = rig.start(one, client=ClientOf())
        for _ in range(first):
            await asyncio.sleep(0)
        rig.executor.calls.cancel(LOCAL_CALLER, call.get_name(), None)
        for _ in range(second):
            await asyncio.sleep(0)
        was_done = call.done()
        call.cancel()
        assert await outcome(call) == "raised" or was_done, "the request's cancellation is not swallowed"


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["async", "alone", "thread", "cancel", "abort", "turn", "release"]), st.integers(0, 30)
        ),
        max_size=40,
    )
)
async def test_no_order_of_calls_and_cancellations_loses_a_slot(steps: list[tuple[str, int]]) -> None:
    release = threading.Event()
    released = asyncio.Event()

    @tool(id="async")
    async def on_loop() -> str:
        """Wait to be released."""
        await released.wait()
        return "done"

    @tool(id="alone", max_concurrent=1)
    async def one_at_a_time() -> str:
        """Wait to be released."""
        await released.wait()
        return "done"

    @tool(id="thread")
    def in_thread() -> str:
        """Wait to be released."""
        release.wait()
        return "done"

    async with opened(on_loop, one_at_a_time, in_thread, slots=Slots(3)) as rig:
        calls: list[asyncio.Task[Execution]] = []
        for step, number in steps:
            if step in ("async", "alone", "thread"):
                calls.append(rig.start(step))
            elif step == "turn":
                await asyncio.sleep(0)
            elif step == "release":
                released.set()
                release.set()
            elif calls and step == "cancel":
                rig.executor.calls.cancel(LOCAL_CALLER, calls[number % len(calls)].get_name(), None)
            elif calls:
                calls[number % len(calls)].cancel()
            assert rig.slots.running <= 3
        released.set()
        release.set()
        await asyncio.gather(*calls, return_exceptions=True)
        await until(lambda: rig.executor.abandoned == 0)
        ended = [call.result() for call in calls if not call.cancelled()]
        ran = sum(execution.attempts for execution in ended)
        counted = sum(sum(series.executions.values()) for series in rig.metrics.tools.values())
        assert ran <= counted <= len(calls)


async def test_an_exit_in_a_result_or_a_validator_does_not_end_the_loop() -> None:
    class Exits:
        def __iter__(self) -> Any:
            sys.exit(3)

    @tool
    async def give() -> list[int]:
        """Return what exits when it is looked at."""
        return Exits()  # type: ignore[return-value]

    async with opened(give) as rig:
        execution = await rig.call(give)
        assert execution.error and execution.error.code == "TOOL_RESULT_INVALID"
