"""Which requests and calls are traced, by which ids, and what their spans say.

Decides first: what is not sampled pays for the decision alone, and a span is made at the end, from times that are known
anyway. Knows W3C Trace Context and the semantic conventions; `span_export` knows OpenTelemetry's SDK, and is imported
only where spans go somewhere. Called by the doors, the executor's epilogue and egress; docs/tracing.md shows the spans.
"""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from app.calls import Caller, Execution, ToolCall, current_call, new_execution_id
from app.errors import DEPENDENCY_UNAVAILABLE, INTERNAL, ToolServiceError
from app.telemetry.metrics import SPAN_OUTCOMES
from app.telemetry.otel_variables import is_exporting, odd_variables
from app.telemetry.redaction import redact_text
from app.telemetry.spans import Attributes, HeadSampler, SpanNote, SpanSink, Tokens, sampler_of

logger = logging.getLogger("app.tracing")

Headers = Iterable[tuple[bytes, bytes]]

SLOW_S = 1.0
"""Of a request or a call: the tail rule takes it for slow."""

SPANS_CLOSE_S = 2.0
"""For the last spans at shutdown; a receiver that is away must not hold up a rollout."""

TRACESTATE_CHARACTERS_MAX = 512
"""What must be propagated at least (W3C Trace Context, section 3.3.1.5); longer ones are dropped whole."""

_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_TRACESTATE = re.compile(rb"[\t -~]+")
_TRACE_ID = re.compile(r"(?!0{32})[0-9a-f]{32}")

KEPT_REFUSALS = frozenset({INTERNAL, DEPENDENCY_UNAVAILABLE})
"""Refusals that are our doing. The rest are the caller's, or come in floods that counters tell better."""


class RequestTrace:
    """The trace that one request's calls belong to. Empty until something asks for more: class attributes are the
    defaults, because most requests set two of them."""

    trace_id: str | None = None
    remote = False
    """Whether the caller gave it, by `traceparent`."""
    parent_id: str = ""
    """The caller's span, or nothing."""
    state: str = ""
    sampled: bool | None = None
    """None: not decided yet."""
    kept = False
    """Not sampled, but the tail rule kept one of its calls."""
    _span_id: str | None = None

    @property
    def span_id(self) -> str:
        """The SERVER span's."""
        if self._span_id is None:
            self._span_id = new_span_id()
        return self._span_id

    def id_of_call(self, execution_id: str, given: str | None) -> str:
        """The call's trace id as answers, rows and logs have it. What the agent gave holds where no `traceparent` came;
        the first call names the trace for those beside it."""
        if self.trace_id is None:
            self.trace_id = given if given is not None and is_trace_id(given) else execution_id.replace("-", "")
        if given is None or self.remote:
            return self.trace_id
        return given


def is_trace_id(text: str) -> bool:
    return _TRACE_ID.fullmatch(text) is not None


_random_bits = random.Random().getrandbits  # noqa: S311  # ids, no secrets; tools may seed the module's own


def new_span_id() -> str:
    return f"{_random_bits(64) or 1:016x}"


def span_id_of(execution_id: str) -> str:
    """Of the call's span: the random half of the execution's id, so that nobody needs to remember it."""
    return execution_id[19:23] + execution_id[24:]


class Outgoing:
    """One request of a tool: the headers that carry the trace on, and the CLIENT span when it is sampled."""

    __slots__ = (
        "_began",
        "_method",
        "_origin",
        "_parent_id",
        "_sink",
        "_span_id",
        "_trace",
        "_trace_id",
        "headers",
    )

    def __init__(
        self,
        sink: SpanSink | None,
        trace: RequestTrace,
        trace_id: str,
        sampled: bool,
        parent_id: str,
        method: str,
        origin: tuple[str, str, int],
    ) -> None:
        self._sink = sink if sampled else None
        self._trace = trace
        self._trace_id = trace_id
        self._parent_id = parent_id
        self._method = method
        self._origin = origin
        self._began = time.perf_counter()
        self._span_id = parent_id if self._sink is None else new_span_id()
        self.headers = {"traceparent": f"00-{trace_id}-{self._span_id}-{'01' if sampled else '00'}"}
        if trace.state:
            self.headers["tracestate"] = trace.state

    def ended(self, status_code: int | None = None, error: str | None = None) -> None:
        """Once. Neither path nor query is told: they are a tool's parameters."""
        if self._sink is None:
            return
        scheme, host, port = self._origin
        attributes: Attributes = {
            "http.request.method": self._method,
            "url.scheme": scheme,
            "server.address": redact_text(host),
            "server.port": port,
        }
        if status_code is not None:
            attributes["http.response.status_code"] = status_code
            if status_code >= 400:
                error = str(status_code)
        if error is not None:
            attributes["error.type"] = error
        end_ns = time.time_ns()
        self._sink.keep(
            SpanNote(
                self._method,
                "client",
                self._trace_id,
                self._span_id,
                self._parent_id,
                False,
                end_ns - _ns_since(self._began),
                end_ns,
                NOTHING,
                attributes,
                error is not None,
                self._trace.state,
            )
        )


class TracedRequest(Protocol):
    """What the span of a request says of it. `method` is one of ours, or None; `batch`: how many came together;
    `route`: the template of a REST path, and its scheme."""

    caller: Caller
    trace: Any
    method: str | None
    error: ToolServiceError | None
    batch: int | None
    route: str | None
    scheme: str


class Tracing:
    """Traces of one service. One per process; on the event loop's thread alone."""

    def __init__(self, sampler: HeadSampler, sink: SpanSink | None = None, *, enabled: bool = True, tail: bool = True):
        self.enabled = enabled
        self.recording = sink is not None
        """Spans go somewhere. Without, ids are made and propagated all the same."""
        self._common_to_rpc: Attributes = {}
        self._common_to_rest: Attributes = {}
        self.listens_at({})
        self._sampler = sampler
        self._sink = sink
        self._keeps_tail = tail
        self._errors = Tokens()
        self._slow = Tokens()

    def listens_at(self, server: Attributes) -> None:
        """What every SERVER span says of where this process listens."""
        self._common_to_rpc = {"rpc.system.name": "jsonrpc", "jsonrpc.protocol.version": "2.0", **server}
        self._common_to_rest = {"http.request.method": "POST", **server}

    @property
    def outcomes(self) -> Mapping[str, int]:
        """Spans by what came of them."""
        return NO_SPANS if self._sink is None else self._sink.outcomes

    def begin(self, headers: Headers) -> RequestTrace | None:
        """The trace of a request; None where tracing is off."""
        if not self.enabled:
            return None
        for name, _ in headers:
            if name == b"traceparent":
                return self._continued(headers)
        return RequestTrace()

    def _continued(self, headers: Headers) -> RequestTrace:
        trace = RequestTrace()
        given = [value for name, value in headers if name == b"traceparent"]
        found = _TRACEPARENT.fullmatch(given[0].strip(b" \t")) if len(given) == 1 else None
        if found is None:
            return trace
        version, trace_id, parent_id, flags, more = found.groups()
        if version == b"ff" or (version == b"00" and more) or not (trace_id.strip(b"0") and parent_id.strip(b"0")):
            return trace
        trace.remote = True
        trace.trace_id = trace_id.decode()
        trace.parent_id = parent_id.decode()
        trace.sampled = self._sampler.samples(trace.trace_id, bool(int(flags, 16) & 1))
        state = b",".join(value for name, value in headers if name == b"tracestate")
        if len(state) <= TRACESTATE_CHARACTERS_MAX and _TRACESTATE.fullmatch(state):
            trace.state = state.decode()
        return trace

    def _is_sampled(self, trace: RequestTrace) -> bool:
        if trace.sampled is None:
            if trace.trace_id is None:
                trace.trace_id = new_execution_id().replace("-", "")
            trace.sampled = self._sampler.samples(trace.trace_id, None)
        return trace.sampled

    def call_ended(
        self, call: ToolCall, execution: Execution, marks: tuple[float, float, float, float], *, known: bool
    ) -> str | None:
        """Part of the epilogue; the trace id, when the call's span is kept. `marks`: when the tool was found, its
        parameters were validated, its limits asked and its run begun, `time.perf_counter()` seconds, 0 where it did not
        come to that; `known`: there is such a tool."""
        sink, trace = self._sink, call.trace
        if sink is None or trace is None:
            return None
        if call.trace_id is trace.trace_id and not self._is_sampled(trace):
            ran_well = execution.error is None and execution.refusal is None
            if ran_well and execution.run_s + execution.overhead_s < SLOW_S:
                return None  # nearly every call ends here
        trace_id = self._trace_of_span(trace, call.trace_id)
        link = None if trace_id == trace.trace_id else (trace.trace_id or "", trace.span_id)
        sampled = self._is_sampled(trace) if link is None else self._sampler.samples(trace_id, None)
        tail = None if sampled else self._tail_of_call(execution)
        if not sampled and tail is None:
            return None
        if tail is not None and link is None:
            trace.kept = True
        attributes = _call_attributes(call, execution, marks)
        if known:
            attributes["gen_ai.tool.name"] = call.tool_id
        if tail is not None:
            attributes["agentcore.tail"] = tail
        end_ns = time.time_ns()
        sink.keep(
            SpanNote(
                f"execute_tool {call.tool_id}" if known else "execute_tool",
                "internal",
                trace_id,
                span_id_of(call.execution_id),
                trace.span_id if link is None else "",
                False,
                end_ns - _ns_since(call.received_at),
                end_ns,
                COMMON_TO_CALLS,
                attributes,
                "error.type" in attributes,
                trace.state if link is None else "",
                link,
            )
        )
        return trace_id

    def _trace_of_span(self, trace: RequestTrace, of_call: str | None) -> str:
        """The request's, unless the agent gave the call the id of another; then the span links to the request's."""
        if trace.trace_id is None:  # whoever made the call did not ask `id_of_call`
            self._is_sampled(trace)
            assert trace.trace_id is not None
        if of_call is None or of_call == trace.trace_id or not is_trace_id(of_call):
            return trace.trace_id
        return of_call

    def _tail_of_call(self, execution: Execution) -> str | None:
        """Why a call that is not sampled is kept all the same; None: it is not."""
        refusal = execution.refusal
        failed = refusal.kind in KEPT_REFUSALS if refusal else execution.status in ("failed", "timeout")
        return self._tail(failed, execution.run_s + execution.overhead_s)

    def _tail(self, failed: bool, took_s: float) -> str | None:
        if failed:
            reason, tokens = "error", self._errors
        elif took_s >= SLOW_S:
            reason, tokens = "slow", self._slow
        else:
            return None
        return reason if self._keeps_tail and tokens.take(time.perf_counter()) else None

    def request_ended(self, request: TracedRequest, began: float) -> None:
        """A request for a door was answered; `began`, `time.perf_counter()` seconds."""
        trace: RequestTrace | None = request.trace
        if self._sink is None or trace is None:
            return
        error, route = request.error, request.route
        tail = None
        if not self._is_sampled(trace) and not trace.kept:
            tail = self._tail(error is not None and error.kind in KEPT_REFUSALS, time.perf_counter() - began)
            if tail is None:
                return
        attributes = _rpc_attributes(request) if route is None else _rest_attributes(request)
        if tail is not None:
            attributes["agentcore.tail"] = tail
        assert trace.trace_id is not None
        end_ns = time.time_ns()
        self._sink.keep(
            SpanNote(
                f"POST {route}" if route is not None else request.method or "jsonrpc",
                "server",
                trace.trace_id,
                trace.span_id,
                trace.parent_id,
                True,
                end_ns - _ns_since(began),
                end_ns,
                self._common_to_rpc if route is None else self._common_to_rest,
                attributes,
                "error.type" in attributes,
                trace.state,
            )
        )

    def outgoing(self, method: str, origin: tuple[str, str, int]) -> Outgoing | None:
        """What carries the running call's trace to another service; None where there is no call, or tracing is off."""
        running = current_call.get()
        trace: RequestTrace | None = None if running is None else running.trace
        if running is None or trace is None:
            return None
        trace_id = self._trace_of_span(trace, running.trace_id)
        own = trace_id == trace.trace_id
        sampled = self._is_sampled(trace) if own else self._sampler.samples(trace_id, None)
        parent_id = span_id_of(running.execution_id)
        if not self.recording and own and trace.parent_id:
            parent_id = trace.parent_id  # no span of ours will be there to be a parent; the caller's is
        return Outgoing(self._sink, trace, trace_id, sampled, parent_id, method, origin)

    def instrument(self, app: Any, own_paths: str) -> None:
        """Let FastAPI's instrumentation make the spans of an application's routes, but for `own_paths` (a pattern)."""
        if self._sink is not None:
            self._sink.instrument(app, own_paths)

    async def close(self, timeout_s: float = SPANS_CLOSE_S) -> None:
        """Send what waits, for a bounded time."""
        if self._sink is not None:
            await self._sink.close(timeout_s)


COMMON_TO_CALLS: Attributes = {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.type": "function"}
NOTHING: Attributes = {}

NO_SPANS: Mapping[str, int] = dict.fromkeys(SPAN_OUTCOMES, 0)


def _ns_since(perf_s: float) -> int:
    return int((time.perf_counter() - perf_s) * 1e9)


def _rpc_attributes(request: TracedRequest) -> Attributes:
    attributes: Attributes = {"agentcore.tenant": request.caller.tenant}
    if request.batch is not None:
        attributes["agentcore.batch_size"] = request.batch
    else:
        attributes["rpc.method"] = request.method or "_OTHER"
    if request.error is not None:
        attributes["error.type"] = attributes["rpc.response.status_code"] = str(request.error.kind.rpc_code)
    return attributes


def _rest_attributes(request: TracedRequest) -> Attributes:
    """By the conventions for HTTP servers, to which what the client did wrong is no error."""
    status = 200 if request.error is None else request.error.http_status
    attributes: Attributes = {
        "agentcore.tenant": request.caller.tenant,
        "http.route": request.route or "",
        "http.response.status_code": status,
        "url.scheme": request.scheme,
    }
    if status >= 500:
        attributes["error.type"] = str(status)
    return attributes


def _call_attributes(call: ToolCall, execution: Execution, marks: tuple[float, float, float, float]) -> Attributes:
    """By the conventions for tool execution. No parameter, no result, no text of an error, no subject."""
    attributes: Attributes = {
        "agentcore.execution_id": execution.execution_id,
        "agentcore.tenant": call.caller.tenant,
        "agentcore.status": "refused" if execution.refusal else execution.status,
        "agentcore.attempts": execution.attempts,
        "agentcore.overhead_ms": execution.overhead_s * 1e3,
    }
    found, validated, asked, started = marks
    if found:
        attributes["agentcore.registry_ms"] = (found - call.received_at) * 1e3
    if validated:
        attributes["agentcore.validation_ms"] = (validated - found) * 1e3
    if started:
        attributes["agentcore.limits_ms"] = (started - asked) * 1e3
    if execution.attempts:
        attributes["agentcore.run_ms"] = execution.run_s * 1e3
    if execution.cached:
        attributes["agentcore.cached"] = True
    if execution.error is not None:
        attributes["error.type"] = execution.error.code
    elif execution.refusal is not None:
        attributes["error.type"] = execution.refusal.kind.error_type
    if call.call_id or call.agent_id or call.session_id or call.trace_label:
        attributes.update({name: redact_text(text) for name, text in _told(call) if text})
    return attributes


def _told(call: ToolCall) -> Iterable[tuple[str, str | None]]:
    """What the agent says of itself; anything may stand there."""
    yield "gen_ai.tool.call.id", call.call_id
    yield "gen_ai.agent.id", call.agent_id
    yield "gen_ai.conversation.id", call.session_id
    yield "agentcore.trace_label", call.trace_label


OFF = Tracing(HeadSampler(0.0), enabled=False)
"""No ids but those of executions, nothing propagated."""


def open_tracing(enabled: bool, ratio: float, environ: Mapping[str, str], version: str) -> Tracing:
    """By the settings and OpenTelemetry's own variables. Its SDK is imported only where spans go somewhere. Raises
    ValueError, which names the variable, for what the SDK refuses; what else is odd is told in the log."""
    for odd in odd_variables(environ) if enabled else ():
        logger.warning("a variable of OpenTelemetry is not followed", extra={"reason": odd})
    sampler, tail = sampler_of(ratio, environ)
    if not (enabled and is_exporting(environ)):
        return Tracing(sampler, enabled=enabled)
    from app.telemetry.span_export import open_span_export

    return Tracing(sampler, open_span_export(sampler, environ, version), tail=tail)
