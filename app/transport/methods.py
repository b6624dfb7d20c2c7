"""The method table of /api/v1/jsonrpc: each method's params, scope, work and result.

A method reads its params, builds ToolCalls, awaits the executor, writes bytes. Knows no HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from pydantic import BaseModel, ValidationError

from app import SERVICE, __version__
from app.access.keys import SCOPE_ADMIN
from app.calls import Caller, Execution, ToolCall
from app.errors import InvalidParams
from app.execution_log.history import LIMIT_DEFAULT as HISTORY_LIMIT_DEFAULT
from app.execution_log.history import ExecutionHistory, Filters
from app.executor.executor import Executor
from app.executor.plans import Execute, Plan, PlanTask, run_batch, run_fallback
from app.stepping import IN_TASK
from app.telemetry.metrics import Metrics
from app.tools.registry import Registry, ToolFilter
from app.tools.schema import ERRORS_BUILT_MAX, violations, whole_floats_as_integers
from app.transport import shapes
from app.transport.calling import (
    SCOPE_EXECUTE,
    SCOPE_HISTORY,
    SCOPE_READ,
    Ending,
    agent_of,
    kept_trace,
    require_scope,
    settle,
    tool_call,
    with_key,
    within_budget,
)
from app.transport.jsonrpc import Ended, Method
from app.transport.request import AnswerBudget, RequestContext

Work = Callable[[RequestContext, Any], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """One line of the table. `scope` None: everybody."""

    name: str
    params: type[shapes.Params]
    result: type[BaseModel] | None
    scope: str | None
    summary: str
    work: Work
    in_task: bool = True
    """False: whatever in it needs a task asks for one itself."""
    bounded: tuple[str, ...] = ()
    """Names of params that are lists of calls: at most MAX_BATCH_SIZE items."""


class Methods:
    """The table and the work behind it."""

    def __init__(
        self,
        executor: Executor,
        registry: Registry,
        history: ExecutionHistory,
        metrics: Metrics,
        batch_max: int,
        answer_bytes_max: int,
    ) -> None:
        self._executor = executor
        self._history = history
        self._registry = registry
        self._metrics = metrics
        self._batch_max = batch_max
        self._answer_bytes_max = answer_bytes_max
        self.discovery = b"{}"
        """The OpenRPC document, hung in by the application once the table stands."""

    def table(self) -> tuple[MethodSpec, ...]:
        execute, read = SCOPE_EXECUTE, SCOPE_READ
        return (
            MethodSpec("tools.list", shapes.ListParams, shapes.ToolPage, read, "Tools by filter, in pages", self._list),
            MethodSpec("tools.get", shapes.GetParams, shapes.ToolDetail, read, "One tool with its schemas", self._get),
            MethodSpec("tools.search", shapes.SearchParams, shapes.SearchResult, read, "Tools by words", self._search),
            MethodSpec(
                "tools.execute",
                shapes.ExecuteParams,
                shapes.Execution,
                execute,
                "Run a tool",
                self._execute,
                in_task=False,
            ),
            MethodSpec(
                "tools.execute_batch",
                shapes.BatchParams,
                shapes.BatchResult,
                execute,
                "Run several tools, independently",
                self._execute_batch,
                bounded=("requests", "executions"),
            ),
            MethodSpec(
                "tools.execute_parallel",
                shapes.ParallelParams,
                shapes.ParallelResult,
                execute,
                "Run a graph of tools with dependencies",
                self._execute_parallel,
                bounded=("tasks",),
            ),
            MethodSpec(
                "tools.execute_with_fallback",
                shapes.FallbackParams,
                shapes.FallbackResult,
                execute,
                "Run a tool, and others when it fails",
                self._execute_with_fallback,
                bounded=("fallback", "fallbacks"),
            ),
            MethodSpec(
                "tools.cancel",
                shapes.CancelParams,
                shapes.CancelResult,
                execute,
                "Cancel a call of yours",
                self._cancel,
            ),
            MethodSpec(
                "tools.get_execution_history",
                shapes.HistoryPage,
                shapes.ExecutionPage,
                SCOPE_HISTORY,
                "Executions of your tenant, newest first",
                self._execution_history,
            ),
            MethodSpec(
                "tools.get_rate_limit_status",
                shapes.LimitStatusParams,
                shapes.LimitStatus,
                read,
                "What is left of each limit of a tool, for you; costs nothing",
                self._limit_status,
            ),
            MethodSpec("rpc.ping", shapes.NoParams, shapes.Pong, None, "Whether the service answers", self._ping),
            MethodSpec("rpc.version", shapes.NoParams, shapes.Version, None, "The service's version", self._version),
            MethodSpec("rpc.methods", shapes.NoParams, shapes.MethodNames, None, "Names of all methods", self._names),
            MethodSpec("rpc.discover", shapes.NoParams, None, None, "This API as an OpenRPC document", self._discover),
        )

    def methods(self) -> dict[str, Method]:
        """The table as the dispatcher wants it."""
        return {spec.name: self._method(spec) for spec in self.table()}

    def _method(self, spec: MethodSpec) -> Method:
        names = tuple(spec.params.model_fields)
        begin = self.begin_execute if spec.name == "tools.execute" else None
        return Method(spec.name, names, _reader(spec, self._batch_max), _scoped(spec), begin)

    async def _list(self, context: RequestContext, params: shapes.ListParams) -> bytes:
        return self._registry.page(_filter(params), context.caller, params.limit, params.cursor)

    async def _get(self, context: RequestContext, params: shapes.GetParams) -> bytes:
        return self._registry.detail(params.tool_id, context.caller)

    async def _search(self, context: RequestContext, params: shapes.SearchParams) -> bytes:
        return self._registry.search(params.name_query or "", _filter(params), context.caller, params.limit)

    def _execute(self, context: RequestContext, params: shapes.ExecuteParams) -> Awaitable[bytes]:
        return self.execute(context, params.tool_id, params)

    def begin_execute(self, context: RequestContext, params: shapes.ExecuteParams, then: Ended) -> bool:
        """`tools.execute` without a coroutine. False: nothing was done, and the call has to be awaited."""
        if context.idempotency_key is not None:
            return False
        require_scope(context.caller, SCOPE_EXECUTE)
        if params.idempotency_key is None:
            refusal = self._executor.crowded_out(context.caller, params.tool_id, agent_of(context, params.agent_id))
            if refusal is not None:
                if context.budget is None:
                    context.retry_after_ms = refusal.retry_after_ms
                raise refusal
        context.call = call = tool_call(context, params.tool_id, params)
        return self._executor.begin(call, Ending(self.written, context, then).of_call)

    async def execute(self, context: RequestContext, tool_id: str, params: shapes.RestExecuteBody) -> bytes:
        """One call to its Execution, written. Raises the refusal when it did not run."""
        call = context.call or tool_call(context, tool_id, params)
        if context.idempotency_key is not None:
            call = with_key(call, context.idempotency_key)
        execution = await self._executor.execute(call)
        commit = settle(context, execution)
        if commit is not None:
            await commit.wait()
        return self.written(context, execution)

    def written(self, context: RequestContext, execution: Execution) -> bytes:
        """Once its row is kept. Raises the refusal."""
        if execution.refusal is not None:
            raise execution.refusal
        if context.budget is not None:
            execution = within_budget(context.budget, execution, self._metrics)
        written = execution.as_json()
        overhead_s = time.perf_counter() - context.received_at - execution.run_s
        self._metrics.observe_overhead(overhead_s, kept_trace(execution))
        return written

    async def _execute_batch(self, context: RequestContext, params: shapes.BatchParams) -> bytes:
        _expect_no_key(context)
        began = time.perf_counter()
        calls = self._executor.calls.admitted(tool_call(context, item.tool_id, item) for item in params.requests)
        executions = await run_batch(self._bounded_execute(context), calls, params.max_concurrent)
        return orjson.dumps(
            {"results": [self._item(execution) for execution in executions], **_counts(executions), **_total(began)}
        )

    async def _execute_parallel(self, context: RequestContext, params: shapes.ParallelParams) -> bytes:
        _expect_no_key(context)
        began = time.perf_counter()
        calls = self._executor.calls.admitted(tool_call(context, item.tool_id, item) for item in params.tasks)
        tasks = [
            PlanTask(item.task_id, call, tuple(item.dependencies))
            for item, call in zip(params.tasks, calls, strict=True)
        ]
        plan = Plan(tasks, params.max_concurrent, began + self._executor.timeout_ceiling_s)
        done = await plan.run(self._bounded_execute(context))
        for execution in done.never_began:
            self._metrics.count_outcome(execution)
        return orjson.dumps(
            {
                "results": {task_id: self._item(execution) for task_id, execution in done.executions.items()},
                "execution_order": done.started,
                **_counts(list(done.executions.values())),
                **_total(began),
            }
        )

    async def _execute_with_fallback(self, context: RequestContext, params: shapes.FallbackParams) -> bytes:
        _expect_no_key(context)
        began = time.perf_counter()
        calls = self._executor.calls.admitted(
            tool_call(context, item.tool_id, item) for item in (params.primary, *params.fallback)
        )
        attempts = await run_fallback(self._bounded_execute(context), calls)
        result = _outcome(attempts)
        return orjson.dumps(
            {
                "result": result.as_dict(),
                "used_fallback": result is not attempts[0],
                "attempts": [self._item(execution) for execution in attempts],
                **_total(began),
            }
        )

    async def _cancel(self, context: RequestContext, params: shapes.CancelParams) -> bytes:
        if (params.execution_id is None) == (params.call_id is None):
            raise InvalidParams.at("", "Give either execution_id or call_id")
        cancelled = await self._executor.calls.cancel_anywhere(context.caller, params.execution_id, params.call_id)
        return orjson.dumps({"cancelled": cancelled})

    async def _limit_status(self, context: RequestContext, params: shapes.LimitStatusParams) -> bytes:
        return await self.limit_status(context.caller, params.tool_id, agent_of(context, params.agent_id))

    async def limit_status(self, caller: Caller, tool_id: str, agent_id: str | None = None) -> bytes:
        """What is left of each limit, written. REST answers the same."""
        return orjson.dumps(await self._executor.look_at_limits(caller, tool_id, agent_id))

    async def _execution_history(self, context: RequestContext, params: shapes.HistoryPage) -> bytes:
        return await self.history_page(context.caller, params)

    async def history_page(self, caller: Caller, asked: shapes.HistoryPage) -> bytes:
        """`{executions, next_cursor}`, newest first. Raises InvalidParams, DependencyUnavailable."""
        found = await self._history.page(
            tenant_seen(caller), filters_of(asked), asked.limit or HISTORY_LIMIT_DEFAULT, asked.cursor
        )
        return b'{"executions":[%b],"next_cursor":%b}' % (b",".join(found.rows), orjson.dumps(found.next_cursor))

    async def _ping(self, context: RequestContext, params: shapes.NoParams) -> bytes:
        return b'{"pong":true}'

    async def _version(self, context: RequestContext, params: shapes.NoParams) -> bytes:
        return orjson.dumps({"name": SERVICE, "version": __version__})

    async def _names(self, context: RequestContext, params: shapes.NoParams) -> bytes:
        return orjson.dumps({"methods": [spec.name for spec in self.table()]})

    async def _discover(self, context: RequestContext, params: shapes.NoParams) -> bytes:
        return self.discovery

    def _bounded_execute(self, context: RequestContext) -> Execute:
        """`executor.execute` for the calls of one request, whose results share the room of one answer."""
        budget = context.budget or AnswerBudget(self._answer_bytes_max)

        async def execute(call: ToolCall) -> Execution:
            execution = await self._executor.execute(call)
            if execution.aside is not None:
                context.hold_for(execution.aside.commit)
            return within_budget(budget, execution, self._metrics)

        return execute

    def _item(self, execution: Execution) -> dict[str, Any]:
        """An Execution among several, or the error of one that was refused."""
        if execution.refusal is not None:
            return {"error": execution.refusal.as_error()}
        if execution.attempts or execution.cached:
            self._metrics.observe_overhead(execution.overhead_s, kept_trace(execution))
        return execution.as_dict()


def _expect_no_key(context: RequestContext) -> None:
    if context.idempotency_key is not None:
        raise InvalidParams.at("Idempotency-Key", "Is for one call; give each its own idempotency_key instead")


def _filter(params: shapes.ListParams | shapes.SearchParams) -> ToolFilter:
    return ToolFilter(params.category, tuple(params.tags or ()), tuple(params.capabilities or ()))


def tenant_seen(caller: Caller) -> str | None:
    """Whose executions a caller may read: its tenant's; None, everyone's, for an admin."""
    return None if SCOPE_ADMIN in caller.scopes else caller.tenant


def filters_of(asked: shapes.HistoryFilters) -> Filters:
    return Filters.of(
        tool_id=asked.tool_id, status=asked.status, subject=asked.subject, since=asked.since, until=asked.until
    )


def _counts(executions: Sequence[Execution]) -> dict[str, int]:
    successful = sum(execution.status == "success" for execution in executions)
    return {"successful_count": successful, "failed_count": len(executions) - successful}


def _total(began: float) -> dict[str, float]:
    return {"total_time_ms": round((time.perf_counter() - began) * 1e3, 3)}


def _outcome(attempts: Sequence[Execution]) -> Execution:
    """What a chain came to: its last attempt that ran. Raises the first refusal when none did."""
    ran = [execution for execution in attempts if execution.refusal is None]
    if ran:
        return ran[-1]
    assert attempts[0].refusal is not None
    raise attempts[0].refusal


class PlainExecute:
    """ExecuteParams of a call that says no more than what to run, as most do: what the model would hold, without it."""

    __slots__ = (
        "agent_id",
        "call_id",
        "execution_context",
        "idempotency_key",
        "parameters",
        "timeout_override",
        "tool_id",
    )

    def __init__(self, tool_id: str, parameters: dict[str, Any]) -> None:
        self.tool_id = tool_id
        self.parameters = parameters
        self.agent_id = self.execution_context = self.timeout_override = self.call_id = self.idempotency_key = None


def _reader(spec: MethodSpec, batch_max: int) -> Callable[[dict[str, Any]], Any]:
    validate = spec.params.__pydantic_validator__.validate_python
    plain = PlainExecute if spec.params is shapes.ExecuteParams else None

    def read(params: dict[str, Any]) -> Any:
        for name in spec.bounded:
            items = params.get(name)
            if type(items) is list and len(items) > batch_max:
                raise InvalidParams.at(name, f"Holds at most {batch_max} items")
        if plain is not None and len(params) == 2:
            tool_id, parameters = params.get("tool_id"), params.get("parameters")
            if type(tool_id) is str and len(tool_id) <= shapes.TOOL_ID_CHARACTERS_MAX and type(parameters) is dict:
                return plain(tool_id, parameters)
        try:
            return validate(params, strict=True)
        except ValidationError as error:
            count = error.error_count()
        if count > ERRORS_BUILT_MAX:
            raise InvalidParams.at("", f"{count} violations", "too_many_errors")
        try:  # once more with 1.0 as 1, as tools take it
            return validate(whole_floats_as_integers(params), strict=True)
        except ValidationError as error:
            raise InvalidParams("Invalid params; rpc.discover shows the schema", violations(error, params)) from None

    return read


def _scoped(spec: MethodSpec) -> Work:
    """The work behind the method's scope."""
    scope, begin = spec.scope, _in_task(spec.work) if spec.in_task else spec.work
    if scope is None:
        return begin

    def work(context: RequestContext, params: Any) -> Awaitable[bytes]:
        require_scope(context.caller, scope)
        return begin(context, params)

    return work


def _in_task(work: Work) -> Work:
    async def begin(context: RequestContext, params: Any) -> bytes:
        await IN_TASK
        return await work(context, params)

    return begin
