"""Batches keep their order, plans their dependencies, fallbacks their purpose; what is wrong is said before any run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import AfterValidator

from app.calls import LOCAL_CALLER, Execution, ToolCall, new_execution_id
from app.errors import INVALID_PARAMS, InvalidParams, ToolError
from app.executor.plans import (
    REFERENCED_BYTES_MAX,
    Plan,
    PlanResult,
    PlanTask,
    Results,
    resolved,
    run_batch,
    run_fallback,
)
from app.limits.concurrency import Slots
from app.tools.tool import tool
from tests.executor.in_process import Rig, leave_a_mark, opened
from tests.waiting import until

pytestmark = pytest.mark.anyio


@dataclass
class Trace:
    """What the tools saw: events in their order, and gates that hold single runs."""

    events: list[str] = field(default_factory=list)
    gates: dict[str, asyncio.Event] = field(default_factory=dict)
    running: int = 0
    most_running: int = 0

    def hold(self, *names: str) -> None:
        for name in names:
            self.gates[name] = asyncio.Event()


@asynccontextmanager
async def traced(**options: Any) -> AsyncIterator[tuple[Rig, Trace]]:
    trace = Trace()

    @tool
    async def step(name: str, value: Any = None, fails: bool = False) -> Any:
        """Note its begin and end."""
        trace.events.append(f"{name} begins")
        trace.running += 1
        trace.most_running = max(trace.most_running, trace.running)
        try:
            await asyncio.sleep(0)
            if name in trace.gates:
                await trace.gates[name].wait()
        finally:
            trace.running -= 1
            trace.events.append(f"{name} ends")
        if fails:
            raise ToolError("No")
        return {"name": name, "value": value}

    async with opened(step, **options) as rig:
        yield rig, trace


def call(name: str, tool_id: str = "step", **parameters: Any) -> ToolCall:
    return ToolCall(new_execution_id(), tool_id, {"name": name, **parameters}, LOCAL_CALLER, time.perf_counter())


def task(name: str, *dependencies: str, **parameters: Any) -> PlanTask:
    return PlanTask(name, call(name, **parameters), dependencies)


def plan(*tasks: PlanTask, max_concurrent: int = 10, within_s: float = 30.0) -> Plan:
    return Plan(tasks, max_concurrent, time.perf_counter() + within_s)


def statuses(result: PlanResult) -> dict[str, str]:
    return {task_id: execution.status for task_id, execution in result.executions.items()}


@tool
async def marked(name: Annotated[str, AfterValidator(leave_a_mark)]) -> str:
    """Fail with what its validator saw of the calls before."""
    raise ToolError(name)


@tool
async def marked_well(name: Annotated[str, AfterValidator(leave_a_mark)]) -> str:
    """Return what its validator saw of the calls before."""
    return name


async def test_what_a_validator_sets_is_seen_by_no_other_call() -> None:
    async with opened(marked, marked_well) as rig:
        execute = rig.executor.execute
        calls = [call(name, "marked") for name in "abc"]
        for executions in (await run_batch(execute, calls, 1), await run_fallback(execute, calls)):
            assert [execution.error and execution.error.message for execution in executions] == ["nothing"] * 3
        first = PlanTask("a", call("a", "marked_well"), ())
        result = await plan(first, PlanTask("b", call("b", "marked_well"), ("a",))).run(execute)
        assert {execution.result for execution in result.executions.values()} == {b'"nothing"'}


async def test_a_diamond_runs_its_middle_at_once_and_its_end_last() -> None:
    async with traced() as (rig, trace):
        result = await plan(
            task("end", "left", "right"), task("left", "begin"), task("right", "begin"), task("begin")
        ).run(rig.executor.execute)
        assert trace.events[:2] == ["begin begins", "begin ends"]
        assert set(trace.events[2:4]) == {"left begins", "right begins"}
        assert trace.events[-2:] == ["end begins", "end ends"]
        assert list(result.executions) == ["end", "left", "right", "begin"], "in the order of the request"
        assert result.started[0] == "begin" and result.started[-1] == "end"
        assert set(statuses(result).values()) == {"success"}


async def test_a_task_begins_the_moment_its_own_dependencies_have_ended() -> None:
    async with traced() as (rig, trace):
        trace.hold("slow")
        running = asyncio.create_task(
            plan(task("slow"), task("quick"), task("after quick", "quick"), task("after both", "quick", "slow")).run(
                rig.executor.execute
            )
        )
        await until(lambda: "after quick ends" in trace.events)
        assert "slow ends" not in trace.events and "after both begins" not in trace.events
        trace.gates["slow"].set()
        await running
        assert trace.events.index("slow ends") < trace.events.index("after both begins")


async def test_a_chain_of_a_hundred_runs_in_its_order() -> None:
    names = [f"t{number}" for number in range(100)]
    tasks = [task(name, *names[position - 1 : position]) for position, name in enumerate(names)]
    async with traced() as (rig, trace):
        result = await plan(*reversed(tasks), max_concurrent=100).run(rig.executor.execute)
        assert result.started == names
        assert trace.events == [f"{name} {what}" for name in names for what in ("begins", "ends")]


async def test_a_hundred_independent_tasks_run_as_many_at_once_as_allowed() -> None:
    async with traced() as (rig, trace):
        result = await plan(*(task(f"t{number}") for number in range(100)), max_concurrent=7).run(rig.executor.execute)
        assert trace.most_running == 7
        assert result.started == [f"t{number}" for number in range(100)]


@pytest.mark.parametrize(
    ("tasks", "path"),
    [
        ([task("a"), task("a")], "tasks"),
        ([task("a", "a")], "tasks"),
        ([task("a", "b"), task("b", "a")], "tasks"),
        ([task("free"), task("a", "c"), task("b", "a"), task("c", "b")], "tasks"),
        ([task("a"), task("b", "nowhere")], "tasks.1.dependencies"),
        ([task("a"), task("b", value={"$from": "a"})], "tasks.1.parameters"),
        ([task("a"), task("b", "a", value=[{"x": {"$from": "nowhere"}}])], "tasks.1.parameters"),
        ([task("a", value={"$from": "a"})], "tasks.0.parameters"),
        ([task("a"), task("b", "a", value={"$from": 5})], "tasks.1.parameters"),
        ([task("a"), task("b", "a", value={"$from": "a", "path": 0})], "tasks.1.parameters"),
    ],
)
async def test_a_plan_that_cannot_be_is_refused_before_it_is_run(tasks: list[PlanTask], path: str) -> None:
    with pytest.raises(InvalidParams) as refused:
        plan(*tasks)
    assert refused.value.data["errors"][0]["path"] == path


async def test_a_dependency_that_is_named_twice_is_one() -> None:
    async with traced() as (rig, _):
        result = await plan(task("a"), task("b", "a", "a", "a")).run(rig.executor.execute)
        assert statuses(result) == {"a": "success", "b": "success"}


class Counted(str):
    """A task's id that counts how often one is compared with another."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return str.__eq__(self, other)


def test_many_references_to_many_dependencies_are_not_compared_each_with_each() -> None:
    ids = [Counted(f"task {number}") for number in range(1_000)]
    plan(*map(task, ids), task("last", *ids, value=[{"$from": Counted(ids[-1])}] * 1_000))
    assert Counted.compared < 10 * len(ids)


def test_references_are_replaced_at_any_depth_and_what_they_bring_is_not_looked_at_again() -> None:
    result = {"name": "a", "value": {"deep": [{"x": 1}, {"$from": "bait"}], "10": "ten"}}
    wanted = {
        "all": {"$from": "a"},
        "list": [{"$from": "a", "path": "value.deep.0.x"}, {"$from": "a", "path": "value.10"}],
        "bait": {"$from": "a", "path": "value.deep.1"},
        "not one": {"$from": "a", "path": "name", "more": 1},
    }
    assert resolved(wanted, Results({"a": orjson.dumps(result)})) == {
        "all": result,
        "list": [1, "ten"],
        "bait": {"$from": "bait"},
        "not one": {"$from": "a", "path": "name", "more": 1},
    }


async def test_a_task_gets_what_its_dependency_returned() -> None:
    async with traced() as (rig, _):
        result = await plan(
            task("a", value=[1, {"b": "found"}]), task("c", "a", value=[{"$from": "a", "path": "value.1.b"}])
        ).run(rig.executor.execute)
        assert result.executions["c"].result == b'{"name":"c","value":["found"]}'


@pytest.mark.parametrize(
    "path", ["nothing", "value.2", "value.-1", "value. 1", "value.1_0", "value.١", "name.0", "value.0.x", ".", "value."]
)
async def test_a_path_that_leads_nowhere_refuses_its_task_and_skips_what_depends_on_it(path: str) -> None:
    async with traced() as (rig, trace):
        result = await plan(
            task("a", value=[1, 2]), task("b", "a", value={"$from": "a", "path": path}), task("c", "b")
        ).run(rig.executor.execute)
        refusal = result.executions["b"].refusal
        assert refusal and refusal.kind is INVALID_PARAMS
        assert refusal.execution_id == result.executions["b"].execution_id
        assert statuses(result) == {"a": "success", "b": "failed", "c": "skipped"}
        assert result.started == ["a"] and "b begins" not in trace.events


async def test_a_replaced_reference_is_validated_like_any_parameter() -> None:
    async with traced() as (rig, _):
        result = await plan(task("a"), task("b", "a", fails={"$from": "a"})).run(rig.executor.execute)
        refusal = result.executions["b"].refusal
        assert refusal and refusal.kind is INVALID_PARAMS


async def test_references_cannot_multiply_a_result_without_bound() -> None:
    large = "x" * (REFERENCED_BYTES_MAX // 4)
    async with traced(result_bytes_max=REFERENCED_BYTES_MAX) as (rig, _):
        result = await plan(
            task("a", value=large),
            task("twice", "a", value=[{"$from": "a", "path": "value"}] * 2),
            task("often", "a", value=[{"$from": "a", "path": "value"}] * 1_000),
            task("parts", "a", value=[{"$from": "a", "path": "name"}] * 1_000),
        ).run(rig.executor.execute)
        assert statuses(result) == {"a": "success", "twice": "success", "often": "failed", "parts": "success"}
        refusal = result.executions["often"].refusal
        assert refusal and refusal.kind is INVALID_PARAMS


async def test_a_failed_task_skips_all_that_comes_after_it_and_nothing_else() -> None:
    async with traced() as (rig, trace):
        result = await plan(
            task("bad", fails=True),
            task("good"),
            task("child", "bad"),
            task("grandchild", "child", "good"),
            task("other", "good"),
        ).run(rig.executor.execute)
        assert statuses(result) == {
            "bad": "failed",
            "good": "success",
            "child": "skipped",
            "grandchild": "skipped",
            "other": "success",
        }
        skipped = result.executions["grandchild"]
        assert skipped.error and skipped.error.code == "DEPENDENCY_FAILED" and skipped.attempts == 0
        assert sorted(result.started) == ["bad", "good", "other"]
        assert "child begins" not in trace.events


async def test_a_refused_task_skips_its_dependents() -> None:
    async with traced() as (rig, _):
        unknown = PlanTask("unknown", call("unknown", tool_id="unknown"), ())
        result = await plan(unknown, task("after", "unknown")).run(rig.executor.execute)
        assert statuses(result) == {"unknown": "failed", "after": "skipped"}


async def test_the_plans_deadline_ends_what_runs_and_what_waits_for_its_turn() -> None:
    async with traced() as (rig, trace):
        trace.hold("a", "b")
        result = await plan(task("a"), task("b"), task("after", "a"), max_concurrent=1, within_s=0.05).run(
            rig.executor.execute
        )
        assert statuses(result) == {"a": "timeout", "b": "timeout", "after": "skipped"}
        assert result.executions["a"].attempts == 1
        assert trace.events[:2] == ["a begins", "a ends"]


async def test_a_plan_whose_deadline_has_passed_runs_nothing_more() -> None:
    async with traced() as (rig, trace):
        result = await plan(task("a"), task("after", "a"), within_s=-1.0).run(rig.executor.execute)
        assert statuses(result) == {"a": "timeout", "after": "skipped"}
        late = result.executions["a"]
        assert late.attempts == 0 and late.error and late.error.code == "TOOL_TIMEOUT"
        assert trace.events == result.started == []


async def test_a_cancelled_plan_cancels_its_tasks_and_starts_no_others() -> None:
    async with traced(slots=Slots(2)) as (rig, trace):
        trace.hold("a", "b", "c")
        running = asyncio.create_task(
            plan(task("a"), task("b"), task("c"), task("after", "a")).run(rig.executor.execute)
        )
        await until(lambda: rig.slots.running == 2 and rig.slots.queued == 1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert rig.executor.concurrency == 0
        assert sorted(trace.events) == ["a begins", "a ends", "b begins", "b ends"]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
async def test_in_any_plan_each_task_runs_once_after_its_dependencies_and_never_too_many_at_once(data: Any) -> None:
    size = data.draw(st.integers(1, 20))
    at_once = data.draw(st.integers(1, 5))
    dependencies = [data.draw(st.sets(st.integers(0, size - 1)).map(sorted)) for _ in range(size)]
    # Edges go from lower to higher numbers, so there is no cycle; the order of the request is any.
    tasks = [
        task(f"t{number}", *(f"t{lower}" for lower in lowers if lower < number))
        for number, lowers in enumerate(dependencies)
    ]
    failing = data.draw(st.sets(st.integers(0, size - 1), max_size=2))
    for number in failing:
        tasks[number].call.parameters["fails"] = True
    request = data.draw(st.permutations(tasks))
    async with traced() as (rig, trace):
        result = await plan(*request, max_concurrent=at_once).run(rig.executor.execute)
    assert trace.most_running <= at_once
    assert list(result.executions) == [one.task_id for one in request]
    assert sorted(result.started) == sorted(event[:-7] for event in trace.events if event.endswith(" begins"))
    for one in tasks:
        depends_on_failed = any(result.executions[name].status != "success" for name in one.dependencies)
        assert (result.executions[one.task_id].status == "skipped") == depends_on_failed
        assert (one.task_id in result.started) != depends_on_failed
        for name in one.dependencies if not depends_on_failed else ():
            assert trace.events.index(f"{name} ends") < trace.events.index(f"{one.task_id} begins")


async def test_a_batch_answers_in_the_order_of_its_calls_whatever_their_speed() -> None:
    async with traced() as (rig, trace):
        trace.hold("0", "3")
        running = asyncio.create_task(run_batch(rig.executor.execute, [call(str(n)) for n in range(6)], 3))
        await until(lambda: "5 ends" in trace.events)
        trace.gates["3"].set()
        await until(lambda: "3 ends" in trace.events)
        trace.gates["0"].set()
        executions = await running
        assert [orjson.loads(one.result or b"")["name"] for one in executions] == list("012345")
        assert trace.most_running == 3


@pytest.mark.parametrize("at_once", [1, 2, 100])
async def test_a_batch_runs_no_more_calls_at_once_than_asked(at_once: int) -> None:
    async with traced() as (rig, trace):
        executions = await run_batch(rig.executor.execute, [call(str(n)) for n in range(20)], at_once)
        assert trace.most_running == min(at_once, 20)
        assert len(executions) == 20


async def test_a_refused_call_of_a_batch_leaves_the_others_alone() -> None:
    async with traced() as (rig, _):
        calls = [call("a"), call("b", tool_id="unknown"), call("c", fails=True), call("d", wrong=1)]
        executions = await run_batch(rig.executor.execute, calls, 2)
        assert [one.status for one in executions] == ["success", "failed", "failed", "failed"]
        assert [one.refusal and one.refusal.kind.error_type for one in executions] == [
            None,
            "tool_not_found",
            None,
            "invalid_params",
        ]


async def test_a_cancelled_batch_starts_no_other_call() -> None:
    async with traced() as (rig, trace):
        trace.hold("0")
        running = asyncio.create_task(run_batch(rig.executor.execute, [call(str(n)) for n in range(5)], 1))
        await until(lambda: "0 begins" in trace.events)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert trace.events == ["0 begins", "0 ends"]


async def test_a_cancelled_call_of_a_batch_lets_the_next_one_run() -> None:
    async with traced() as (rig, trace):
        trace.hold("0")
        first = call("0")
        running = asyncio.create_task(run_batch(rig.executor.execute, [first, call("1")], 1))
        await until(lambda: "0 begins" in trace.events)
        assert rig.executor.calls.cancel(LOCAL_CALLER, first.execution_id, None)
        assert [one.status for one in await running] == ["cancelled", "success"]


async def attempted(*calls: ToolCall) -> Sequence[Execution]:
    async with traced() as (rig, _):
        return await run_fallback(rig.executor.execute, calls)


async def test_a_fallback_stops_at_the_first_success() -> None:
    assert [one.status for one in await attempted(call("a"), call("b"))] == ["success"]
    executions = await attempted(call("a", fails=True), call("b"), call("c"))
    assert [one.status for one in executions] == ["failed", "success"]


async def test_a_fallback_goes_on_after_a_failure_and_a_tool_that_is_not_there() -> None:
    executions = await attempted(call("a", fails=True), call("b", tool_id="unknown"), call("c", fails=True))
    assert [one.refusal is None for one in executions] == [True, False, True]


async def test_a_fallback_stops_at_the_callers_own_mistake() -> None:
    assert len(await attempted(call("a", wrong=1), call("b"))) == 1


async def test_a_fallback_stops_where_the_replica_drains() -> None:
    async with traced() as (rig, _):
        rig.executor.calls.stop_accepting()
        assert len(await run_fallback(rig.executor.execute, [call("a"), call("b")])) == 1


async def test_a_fallback_stops_when_its_call_is_cancelled() -> None:
    async with traced() as (rig, trace):
        trace.hold("a")
        first = call("a")
        running = asyncio.create_task(run_fallback(rig.executor.execute, [first, call("b")]))
        await until(lambda: "a begins" in trace.events)
        assert rig.executor.calls.cancel(LOCAL_CALLER, first.execution_id, None)
        assert [one.status for one in await running] == ["cancelled"]
        assert trace.events == ["a begins", "a ends"]
