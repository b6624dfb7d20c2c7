"""What every wire does with a call, whatever its envelope: who may make it, what it is made from, what it leaves.

From the params of a request to a ToolCall, and from its Execution to what the answer waits for and says beside the
result. Used by the method tables of JSON-RPC and MCP and by REST. Knows no HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from app.calls import Caller, Execution, ToolCall, new_execution_id
from app.errors import RESULT_TOO_LARGE, InvalidParams, PermissionDenied, failure
from app.execution_log.commit import Commit
from app.telemetry.metrics import Metrics
from app.transport import shapes
from app.transport.jsonrpc import Ended
from app.transport.request import AnswerBudget, RequestContext

SCOPE_EXECUTE = "tools:execute"
SCOPE_READ = "tools:read"
SCOPE_HISTORY = "executions:read"

_TRACE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def require_scope(caller: Caller, scope: str) -> None:
    """The one place where the scope of a method or a route is looked at."""
    if scope not in caller.scopes:
        raise PermissionDenied(f"This needs the scope {scope}")


def tool_call(context: RequestContext, tool_id: str, params: shapes.RestExecuteBody) -> ToolCall:
    """The call that the params ask for; what the request's a2a_context says fills the gaps."""
    execution_id, trace, label = new_execution_id(), context.trace, None
    if params.execution_context is not None or context.a2a is not None:
        given = params.execution_context or _NO_CONTEXT
        label = _trace_id(given.trace_id or _text(context.a2a, "trace_id"))
    call = ToolCall(
        execution_id,
        tool_id,
        params.parameters,
        context.caller,
        context.received_at,
        context.client,
        trace,
        label if trace is None else trace.id_of_call(execution_id, label),
        params.agent_id,
        params.timeout_override,
        params.call_id,
        params.idempotency_key,
    )
    if params.execution_context is None and context.a2a is None:
        return call
    return replace(
        call,
        agent_id=agent_of(context, call.agent_id),
        session_id=given.session_id or _text(context.a2a, "session_id"),
        metadata=_metadata(context.a2a) if given.metadata is None else given.metadata,
        trace_label=label if trace is not None and label != trace.trace_id else None,
    )


def agent_of(context: RequestContext, given: str | None) -> str | None:
    """The label of who asks: the one that was given or, where there is none, that of the request's a2a_context."""
    return given or (None if context.a2a is None else _text(context.a2a, "source_agent"))


def with_key(call: ToolCall, given: str) -> ToolCall:
    """With the key of the header, which may stand in quotes: a draft of the IETF says so and few clients do it."""
    key = given[1:-1] if len(given) > 1 and given[0] == given[-1] == '"' else given
    if not 0 < len(key) <= shapes.IDEMPOTENCY_KEY_CHARACTERS_MAX or not key.isprintable():
        wrong = f"Holds 1 to {shapes.IDEMPOTENCY_KEY_CHARACTERS_MAX} printable characters"
        raise InvalidParams.at("Idempotency-Key", wrong)
    if call.idempotency_key not in (None, key):
        raise InvalidParams.at("Idempotency-Key", "Differs from idempotency_key; give one of the two")
    return replace(call, idempotency_key=key)


_NO_CONTEXT = shapes.ExecutionContext.model_validate({})


def _text(values: Mapping[str, Any] | None, name: str) -> str | None:
    value = values.get(name) if values else None
    return value[: shapes.LABEL_CHARACTERS_MAX] if isinstance(value, str) else None


def _metadata(values: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    value = values.get("metadata") if values else None
    return value if type(value) is dict else None


def _trace_id(given: str | None) -> str | None:
    """Taken only when it can be written into logs and headers as it is."""
    return given if given is not None and _TRACE_ID.fullmatch(given) else None


class Ending:
    """What follows a call that nobody awaits: its commit, then its result as `written` has it, or the refusal that it
    raises."""

    __slots__ = ("_context", "_execution", "_then", "_written")

    def __init__(
        self, written: Callable[[RequestContext, Execution], bytes], context: RequestContext, then: Ended
    ) -> None:
        self._written = written
        self._context = context
        self._then = then

    def of_call(self, execution: Execution) -> None:
        self._execution = execution
        try:
            commit = settle(self._context, execution)
        except Exception as error:
            self._then(error)
            return
        if commit is None:
            self._committed()
        else:
            commit.add_done_callback(self._committed)

    def _committed(self, _: Any = None) -> None:
        result: bytes | Exception
        try:
            result = self._written(self._context, self._execution)
        except Exception as error:
            result = error
        self._then(result)


def settle(context: RequestContext, execution: Execution) -> Commit | None:
    """What a call leaves to its answer: what its limits have left, and the commit of its row, to be waited for by a
    call alone, so that its overhead has it; the calls of a batch share one wait at the door."""
    aside, refusal = execution.aside, execution.refusal
    if context.budget is not None:
        if aside is not None:
            context.hold_for(aside.commit)
        return None
    if refusal is not None:
        context.allowance = refusal.allowance
        context.retry_after_ms = refusal.retry_after_ms
    elif aside is not None and aside.grant is not None:
        context.allowance = aside.grant.tightest()
    commit: Commit | None = None if aside is None else aside.commit
    return None if commit is None or commit.done else commit


def within_budget(budget: AnswerBudget, execution: Execution, metrics: Metrics) -> Execution:
    """The same, or a failure where the answer that it shares with others has no room for its result."""
    if execution.result is None or budget.take(len(execution.result)):
        return execution
    dropped = replace(execution, status="failed", result=None, error=_NO_ROOM)
    metrics.count_outcome(dropped)
    return dropped


_NO_ROOM = failure(RESULT_TOO_LARGE, "The results of one request have no room for this one; ask for fewer at once")


def kept_trace(execution: Execution) -> str | None:
    """The id of the call's trace, when its span is kept."""
    return None if execution.aside is None else execution.aside.kept_trace
