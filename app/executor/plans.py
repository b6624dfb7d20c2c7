"""Many calls from one request: a batch, a plan with dependencies, a chain of fallbacks.

Each call walks the executor by itself, so limits count every one. What is wrong with a plan is said before anything
runs. Knows no wire.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextvars import copy_context
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import orjson

from app.calls import Execution, ToolCall
from app.errors import (
    DEPENDENCY_SKIPPED,
    DRAINING,
    IDEMPOTENCY_CONFLICT,
    INVALID_PARAMS,
    TOOL_TIMEOUT,
    InvalidParams,
    failure,
)

Execute = Callable[[ToolCall], Awaitable[Execution]]

REFERENCE = "$from"

REFERENCED_BYTES_MAX = 4_194_304
"""Of results that one task reads and pastes. 70,000 references fit a request; to a 1 MiB result each, they would
make 70 GB of parameters."""


async def run_bounded(work: Iterable[Callable[[], Awaitable[None]]], at_once: int) -> None:
    """Run all of `work`, at most `at_once` at a time, started in order; cancels the rest when cancelled. Each has a
    task, and so a context, of its own: what a call's validators set is seen by no other."""
    slots = asyncio.Semaphore(at_once)

    async def run(item: Callable[[], Awaitable[None]]) -> None:
        async with slots:
            await item()

    async with asyncio.TaskGroup() as group:
        for item in work:
            group.create_task(run(item), name="of-batch")


async def run_batch(execute: Execute, calls: Sequence[ToolCall], max_concurrent: int) -> list[Execution]:
    """Every call's Execution, in the order of the calls."""
    results: dict[int, Execution] = {}

    async def run_one(position: int, call: ToolCall) -> None:
        results[position] = await execute(_received_now(call))

    work = [_bind(run_one, position, call) for position, call in enumerate(calls)]
    await run_bounded(work, min(max_concurrent, len(calls)))
    return [results[position] for position in range(len(calls))]


def _bind(function: Callable[..., Awaitable[None]], *arguments: Any) -> Callable[[], Awaitable[None]]:
    return lambda: function(*arguments)


def _received_now(call: ToolCall) -> ToolCall:
    """A call's clock starts when it is its turn, not when the request around it came."""
    return replace(call, received_at=time.perf_counter())


async def run_fallback(execute: Execute, calls: Sequence[ToolCall]) -> list[Execution]:
    """Every attempt, the last one being what the chain came to. Stops at the first success, and where no other
    tool can help: the caller's own mistake, a cancellation, a replica that is shutting down, a first call with the same
    idempotency key, which may have done already what another tool would do again."""
    attempts: list[Execution] = []
    for call in calls:

        async def attempt(call: ToolCall = call) -> None:
            attempts.append(await execute(_received_now(call)))

        await run_bounded([attempt], 1)
        if not _another_tool_can_help(attempts[-1]):
            break
    return attempts


def _another_tool_can_help(execution: Execution) -> bool:
    if execution.refusal is not None:
        return execution.refusal.kind not in (INVALID_PARAMS, IDEMPOTENCY_CONFLICT, DRAINING)
    return execution.status not in ("success", "cancelled")


@dataclass(frozen=True, slots=True)
class PlanTask:
    """One node of a plan."""

    task_id: str
    call: ToolCall
    dependencies: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PlanResult:
    """What a plan came to; `started` is the order in which its tasks began, `never_began` what no executor saw."""

    executions: dict[str, Execution]
    started: list[str]

    @property
    def never_began(self) -> list[Execution]:
        began = set(self.started)
        return [execution for task_id, execution in self.executions.items() if task_id not in began]


class Plan:
    """A checked graph of tasks. A task starts the moment its last dependency has ended.

    Raises InvalidParams for duplicate ids, unknown dependencies, cycles, and references to what is no dependency.
    """

    def __init__(self, tasks: Sequence[PlanTask], max_concurrent: int, deadline: float) -> None:
        self._tasks = {task.task_id: task for task in tasks}
        self._dependencies = {task.task_id: frozenset(task.dependencies) for task in tasks}
        self._slots = asyncio.Semaphore(max_concurrent)
        self._deadline = deadline
        self._dependents: dict[str, list[str]] = {task.task_id: [] for task in tasks}
        self._missing = {task_id: len(dependencies) for task_id, dependencies in self._dependencies.items()}
        self._executions: dict[str, Execution] = {}
        self._started: list[str] = []
        self._context = copy_context()
        """What each task begins with. That of the task which ended before it has what its validators set."""
        self._check(tasks)

    def _check(self, tasks: Sequence[PlanTask]) -> None:
        if len(self._tasks) != len(tasks):
            raise InvalidParams.at("tasks", "task_id must be unique")
        for position, task in enumerate(tasks):
            for dependency in self._dependencies[task.task_id]:
                if dependency not in self._tasks:
                    raise InvalidParams.at(f"tasks.{position}.dependencies", "Names a task that is not in the plan")
                self._dependents[dependency].append(task.task_id)
            _check_references(task.call.parameters, self._dependencies[task.task_id], position)
        if not self._ends():
            raise InvalidParams.at("tasks", "The dependencies form a cycle")

    def _ends(self) -> bool:
        """Kahn's algorithm: whether every task can have its turn."""
        missing = dict(self._missing)
        ready = [task_id for task_id, count in missing.items() if count == 0]
        for task_id in ready:
            for dependent in self._dependents[task_id]:
                missing[dependent] -= 1
                if missing[dependent] == 0:
                    ready.append(dependent)
        return len(ready) == len(missing)

    async def run(self, execute: Execute) -> PlanResult:
        async with asyncio.TaskGroup() as group:
            for task_id, count in self._missing.items():
                if count == 0:
                    self._spawn(group, execute, task_id)
        return PlanResult({task_id: self._executions[task_id] for task_id in self._tasks}, self._started)

    def _spawn(self, group: asyncio.TaskGroup, execute: Execute, task_id: str) -> None:
        work = self._run_task(group, execute, self._tasks[task_id])
        group.create_task(work, name=f"plan:{task_id}", context=self._context.copy())

    async def _run_task(self, group: asyncio.TaskGroup, execute: Execute, task: PlanTask) -> None:
        async with self._slots:
            self._ended(group, execute, task.task_id, await self._execution_of(execute, task))

    async def _execution_of(self, execute: Execute, task: PlanTask) -> Execution:
        call = replace(_received_now(task.call), deadline=self._deadline)
        dependencies = {name: self._executions[name] for name in self._dependencies[task.task_id]}
        if any(execution.status != "success" for execution in dependencies.values()):
            return not_run(call, "skipped")
        if time.perf_counter() >= self._deadline:
            return not_run(call, "timeout")
        try:
            results = Results({name: execution.result or b"null" for name, execution in dependencies.items()})
            call = replace(call, parameters=resolved(call.parameters, results))
        except InvalidParams as refusal:
            refusal.execution_id = call.execution_id
            refusal.forget_origin()
            return replace(not_run(call, "failed"), refusal=refusal)
        self._started.append(task.task_id)
        return await execute(call)

    def _ended(self, group: asyncio.TaskGroup, execute: Execute, task_id: str, execution: Execution) -> None:
        self._executions[task_id] = execution
        for dependent in self._dependents[task_id]:
            self._missing[dependent] -= 1
            if self._missing[dependent] == 0:
                self._spawn(group, execute, dependent)


def not_run(call: ToolCall, status: Any) -> Execution:
    """The Execution of a task whose turn never came."""
    causes = {
        "skipped": failure(DEPENDENCY_SKIPPED, "A task that this one depends on did not succeed"),
        "timeout": failure(TOOL_TIMEOUT, "The plan's deadline passed before this task's turn"),
    }
    return Execution(
        execution_id=call.execution_id,
        tool_id=call.tool_id,
        status=status,
        result=None,
        error=causes.get(status),
        refusal=None,
        run_s=0.0,
        overhead_s=time.perf_counter() - call.received_at,
        finished_at=time.time(),
        attempts=0,
        trace_id=call.trace_id or call.execution_id.replace("-", ""),
    )


def _check_references(parameters: Any, dependencies: Collection[str], position: int) -> None:
    for reference in _references(parameters):
        if not isinstance(reference[REFERENCE], str) or not isinstance(reference.get("path", ""), str):
            raise InvalidParams.at(f"tasks.{position}.parameters", "$from and path must be strings")
        if reference[REFERENCE] not in dependencies:
            raise InvalidParams.at(f"tasks.{position}.parameters", "$from names a task that is not in dependencies")


def _is_reference(value: Any) -> bool:
    return isinstance(value, dict) and REFERENCE in value and value.keys() <= {REFERENCE, "path"}


def _references(value: Any) -> Iterable[dict[str, Any]]:
    """Every `{"$from": …}` inside; nesting is bounded by the codec."""
    if _is_reference(value):
        return [value]
    if isinstance(value, dict):
        return chain.from_iterable(map(_references, value.values()))
    if isinstance(value, list):
        return chain.from_iterable(map(_references, value))
    return ()


class Results:
    """Results of a task's dependencies, each parsed once, within REFERENCED_BYTES_MAX in all."""

    def __init__(self, written: Mapping[str, bytes]) -> None:
        self._written = written
        self._parsed: dict[str, Any] = {}
        self._left_bytes = REFERENCED_BYTES_MAX

    def at(self, task_id: str, path: str) -> Any:
        """What a reference points at. Raises InvalidParams."""
        if task_id not in self._parsed:
            self._spend(len(self._written[task_id]))
            self._parsed[task_id] = orjson.loads(self._written[task_id])
        found = _pointed_at(self._parsed[task_id], path)
        self._spend(len(orjson.dumps(found)))
        return found

    def _spend(self, size_bytes: int) -> None:
        self._left_bytes -= size_bytes
        if self._left_bytes < 0:
            raise InvalidParams.at("parameters", f"$from: over {REFERENCED_BYTES_MAX} bytes of results in one task")


def resolved(value: Any, results: Results) -> Any:
    """A copy of the parameters in which each reference is replaced by what it points at. Raises InvalidParams."""
    if _is_reference(value):
        return results.at(value[REFERENCE], value.get("path", ""))
    if isinstance(value, dict):
        return {key: resolved(item, results) for key, item in value.items()}
    if isinstance(value, list):
        return [resolved(item, results) for item in value]
    return value


def _pointed_at(result: Any, path: str) -> Any:
    for step in path.split(".") if path else ():
        try:
            result = result[_index(step)] if isinstance(result, list) else result[step]
        except (KeyError, IndexError, ValueError, TypeError):
            raise InvalidParams.at("parameters", "$from: the dependency's result has no such path") from None
    return result


def _index(step: str) -> int:
    """Digits alone: `int` would take `-1`, ` 1 ` and `1_0` too."""
    if not (step.isascii() and step.isdigit()):
        raise ValueError
    return int(step)
