"""The method tables of /mcp, one for each era, and what they answer: discovery, the list of tools, calls.

A method takes a checked request and gives the `result` as JSON. Knows the executor, the registry and the content
blocks; no HTTP, and no headers but those that mirror parameters.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import orjson

from app.calls import Caller, Execution, Progress, ToolCall, new_execution_id
from app.errors import INVALID_PARAMS, InvalidParams, ToolServiceError
from app.executor.executor import Executor
from app.executor.straight import Then
from app.telemetry.metrics import Metrics
from app.telemetry.tracing import OFF, Tracing
from app.tools.registry import Registry, ToolFilter, decode_cursor, encode_cursor
from app.tools.tool import Tool
from app.transport.calling import (
    SCOPE_EXECUTE,
    SCOPE_READ,
    Ending,
    kept_trace,
    require_scope,
    settle,
    with_key,
    within_budget,
)
from app.transport.jsonrpc import Ended
from app.transport.mcp_protocol import (
    CALL,
    LEGACY_VERSIONS,
    LIST,
    META_CAPABILITIES,
    SERVED_VERSIONS,
    ClientCapabilityMissing,
    Malformed,
    Request,
    Routing,
    check_mirrored,
)
from app.transport.mcp_results import SERVER_INFO, advice, definition, failed, finished, refused, rendered
from app.transport.mcp_stream import HangUp
from app.transport.request import RequestContext
from app.transport.shapes import IDEMPOTENCY_KEY_CHARACTERS_MAX

SCOPES = {LIST: SCOPE_READ, CALL: SCOPE_EXECUTE}
"""What a method needs; those that are not here only describe the service."""

META_IDEMPOTENCY_KEYS = ("io.agentcore/idempotency_key", "idempotency_key", "idempotencyKey")
"""The first is ours as MCP names such things; the others are what clients write."""

PAGE_TOOLS = 250
"""Tools in one answer. Many clients read one page and no more; a page of that many has some 250 KB."""

TTL_MS = 60_000
"""How long a client may keep a list. Tools change with a rollout, or with what a key allows."""

_EVERY_TOOL = ToolFilter()

Method = Callable[[RequestContext, Request, Routing, Progress | None], Awaitable[bytes]]


class McpMethods:
    """Both tables and the work behind them."""

    def __init__(
        self,
        executor: Executor,
        registry: Registry,
        metrics: Metrics,
        *,
        cache_answers: bool = True,
        tracing: Tracing = OFF,
    ) -> None:
        self._executor = executor
        self._registry = registry
        self._metrics = metrics
        self._cache_answers = cache_answers
        self._tracing = tracing
        self.modern: Mapping[str, Method] = {"server/discover": _discover, LIST: self._list, CALL: self._call}
        self.legacy: Mapping[str, Method] = {
            "initialize": _initialize,
            "ping": _ping,
            LIST: self._list,
            CALL: self._call,
        }

    async def _list(
        self, context: RequestContext, request: Request, routing: Routing, on_progress: Progress | None
    ) -> bytes:
        require_scope(context.caller, SCOPE_READ)
        cursor = request.params.get("cursor", "")
        if type(cursor) is not str:
            raise Malformed("cursor must be a string")
        return self._page(context.caller, cursor, modern=request.modern)

    def _page(self, caller: Caller, cursor: str, *, modern: bool) -> bytes:
        """Tools by id, those only that the caller may call. A cursor names the last one seen."""
        snapshot = self._registry.snapshot
        key = ("mcp", modern, caller.anonymous, caller.scopes, caller.tools, cursor)
        if (known := snapshot.pages.get(key)) is not None:
            return known
        ids = snapshot.visible_ids(_EVERY_TOOL, caller)
        start = bisect_right(ids, _last_seen(cursor)) if cursor else 0
        end = start + PAGE_TOOLS
        listed = [definition(snapshot.tools[tool_id], modern=modern) for tool_id in ids[start:end]]
        page: dict[str, Any] = {"tools": listed}
        if end < len(ids):
            page["nextCursor"] = encode_cursor(ids[end - 1])
        if modern:
            page |= {"ttlMs": TTL_MS, "cacheScope": "public" if caller.anonymous else "private"}
        encoded = finished(orjson.dumps(page), modern=modern)
        if self._cache_answers:
            snapshot.keep_page(key, encoded)
        return encoded

    async def _call(
        self, context: RequestContext, request: Request, routing: Routing, on_progress: Progress | None
    ) -> bytes:
        call, tool = self._asked_for(context, request, routing, on_progress)
        lacks = self._lacks(call, tool, request)
        return await self.execute(context, call, tool, request, routing) if lacks is None else lacks

    def begin_call(
        self, context: RequestContext, request: Request, routing: Routing, then: Ended
    ) -> Awaitable[bytes] | None:
        """A call without a coroutine, if it can be helped. None: `then` gets its result, before this returns or later;
        else it has to be awaited. Raises what is wrong with the request."""
        call, tool = self._asked_for(context, request, routing, None)
        lacks = self._lacks(call, tool, request)
        if lacks is not None:
            then(lacks)
            return None
        context.call = call

        def written(context: RequestContext, execution: Execution) -> bytes:
            return self._written(context, execution, tool, request, routing)

        begun = self._begin(context, call, tool, Ending(written, context, then).of_call, modern=request.modern)
        return None if begun else self.execute(context, call, tool, request, routing)

    def _asked_for(
        self, context: RequestContext, request: Request, routing: Routing, on_progress: Progress | None
    ) -> tuple[ToolCall, Tool]:
        require_scope(context.caller, SCOPE_EXECUTE)
        tool = self._tool(request.params.get("name"), context.caller)
        arguments = request.params.get("arguments", {})
        if request.modern and tool is not None and tool.parameters.mirrored:
            check_mirrored(tool.parameters.mirrored, arguments, routing)
        if tool is None:
            raise Malformed("Unknown tool; tools/list shows what you may call")
        if type(arguments) is not dict:
            raise Malformed("arguments must be an object")
        if "traceparent" in request.meta and context.trace is not None and not context.trace.remote:
            context.trace = self._tracing.begin(_carried(request.meta))
        return tool_call(context, request, tool, arguments, on_progress), tool

    def _lacks(self, call: ToolCall, tool: Tool, request: Request) -> bytes | None:
        """The answer to arguments that do not fit, of a client that lacks what the tool needs besides."""
        if request.modern and tool.spec.client_capabilities:
            try:
                check_capabilities(tool, call.parameters, request)
            except InvalidParams as refusal:
                self._metrics.count_error(INVALID_PARAMS.error_type)
                return failed(advice(refusal), request.modern, call.execution_id)
        return None

    def _tool(self, name: Any, caller: Caller) -> Tool | None:
        if type(name) is not str:
            raise Malformed("name must be a string")
        try:
            return self._registry.lookup(name, caller)
        except ToolServiceError:
            return None

    async def execute(
        self, context: RequestContext, call: ToolCall, tool: Tool, request: Request, routing: Routing
    ) -> bytes:
        """One call to its result. Raises the refusals that are none of the agent's business."""
        execution = await self._run(context, call, tool, modern=request.modern)
        commit = settle(context, execution)
        if commit is not None:
            await commit.wait()
        return self._written(context, execution, tool, request, routing)

    def _written(
        self, context: RequestContext, execution: Execution, tool: Tool, request: Request, routing: Routing
    ) -> bytes:
        """Once its row is kept."""
        if execution.refusal is not None:
            return refused(execution.refusal, modern=request.modern)
        if context.budget is not None:
            execution = within_budget(context.budget, execution, self._metrics)
        written = rendered(execution, tool, routing, modern=request.modern)
        overhead_s = time.perf_counter() - context.received_at - execution.run_s
        self._metrics.observe_overhead(overhead_s, kept_trace(execution))
        return written

    def _begin(self, context: RequestContext, call: ToolCall, tool: Tool, then: Then, *, modern: bool) -> bool:
        if not _is_watched(context, tool, modern=modern):
            return self._executor.begin(call, then)
        hang_up = self._hang_up(context, call)

        def ended(execution: Execution) -> None:
            hang_up.stop()
            then(execution)

        begun = self._executor.begin(call, ended)
        if not begun:
            hang_up.stop()
        return begun

    async def _run(self, context: RequestContext, call: ToolCall, tool: Tool, *, modern: bool) -> Execution:
        if not _is_watched(context, tool, modern=modern):
            return await self._executor.execute(call)
        hang_up = self._hang_up(context, call)
        try:
            return await self._executor.execute(call)
        finally:
            hang_up.stop()

    def _hang_up(self, context: RequestContext, call: ToolCall) -> HangUp:
        assert context.client is not None
        return HangUp(context.client, lambda: self._executor.calls.cancel(call.caller, call.execution_id, None))


def _is_watched(context: RequestContext, tool: Tool, *, modern: bool) -> bool:
    """Whether a client that hangs up cancels its call."""
    return modern and context.client is not None and not tool.never_waits


def tool_call(
    context: RequestContext, request: Request, tool: Tool, arguments: dict[str, Any], on_progress: Progress | None
) -> ToolCall:
    """The call that a request asks for."""
    execution_id, trace, meta = new_execution_id(), context.trace, request.meta
    call = ToolCall(
        execution_id,
        tool.spec.id,
        arguments,
        context.caller,
        context.received_at,
        context.client,
        trace,
        None if trace is None else trace.id_of_call(execution_id, None),
        idempotency_key=_idempotency_key(meta) if meta else None,
        on_progress=on_progress,
    )
    return call if context.idempotency_key is None else with_key(call, context.idempotency_key)


def _carried(meta: Mapping[str, Any]) -> list[tuple[bytes, bytes]]:
    """The trace context in `_meta` (SEP-414), as the headers that it would be."""
    return [
        (name.encode(), meta[name].encode("ascii", "replace"))
        for name in ("traceparent", "tracestate")
        if isinstance(meta.get(name), str)
    ]


def _idempotency_key(meta: Mapping[str, Any]) -> str | None:
    given = [name for name in META_IDEMPOTENCY_KEYS if meta.get(name) is not None]
    if not given:
        return None
    key = meta[given[0]]
    if not isinstance(key, str) or not 0 < len(key) <= IDEMPOTENCY_KEY_CHARACTERS_MAX:
        raise Malformed(f"{given[0]} must be a text of 1 to {IDEMPOTENCY_KEY_CHARACTERS_MAX} characters")
    if any(meta[name] != key for name in given):
        raise Malformed(f"{' and '.join(given)} differ; give one")
    return key


def check_capabilities(tool: Tool, arguments: dict[str, Any], request: Request) -> None:
    """Check 11, which comes after that of the arguments: an agent mends those itself. Raises InvalidParams too."""
    missing = [name for name in tool.spec.client_capabilities if name not in request.meta[META_CAPABILITIES]]
    if missing:
        tool.parameters.validate(arguments)
        raise ClientCapabilityMissing(missing)


def _last_seen(cursor: str) -> str:
    try:
        return decode_cursor(cursor)
    except InvalidParams:
        raise Malformed("cursor is none that this service gave") from None


async def _discover(context: RequestContext, request: Request, routing: Routing, on_progress: Progress | None) -> bytes:
    return _DISCOVERED


_DISCOVERED = finished(
    orjson.dumps(
        {
            "supportedVersions": SERVED_VERSIONS,
            "capabilities": {"tools": {}},
            "ttlMs": TTL_MS,
            "cacheScope": "public",
        }
    ),
    modern=True,
)


async def _initialize(
    context: RequestContext, request: Request, routing: Routing, on_progress: Progress | None
) -> bytes:
    asked = request.params.get("protocolVersion")
    version = asked if asked in LEGACY_VERSIONS else LEGACY_VERSIONS[0]
    return b'{"protocolVersion":"%b","capabilities":{"tools":{}},"serverInfo":%b}' % (version.encode(), SERVER_INFO)


async def _ping(context: RequestContext, request: Request, routing: Routing, on_progress: Progress | None) -> bytes:
    return b"{}"
