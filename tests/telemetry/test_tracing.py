"""Traces against a real OTLP receiver: what is kept, under which ids, what a span says."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from typing import Any, ClassVar, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.calls import LOCAL_CALLER, new_execution_id
from app.telemetry.spans import HeadSampler, SpanNote, sampler_of
from app.telemetry.tracing import Tracing
from app.transport.request import RequestContext
from tests.conftest import Running, Serve, end, start_service
from tests.otlp import PARENT_SPAN, PARENT_TRACE, OtlpReceiver, Span

SAMPLED = f"00-{PARENT_TRACE}-{PARENT_SPAN}-01"
UNSAMPLED = f"00-{PARENT_TRACE}-{PARENT_SPAN}-00"
FOR_TESTS = {"TOOL_MODULES": "tests.tools_for_tests", "EGRESS_ALLOW": "127.0.0.1,localhost,::1"}

_traces = iter(range(1, 2**32))


def fresh() -> str:
    """A trace id of the test's own: services and receivers are shared."""
    return f"{time.time_ns():016x}{next(_traces):016x}"


@pytest.fixture(scope="module")
def receiver() -> Iterator[OtlpReceiver]:
    one = OtlpReceiver()
    yield one
    one.close()


@pytest.fixture(scope="module")
def traced(receiver: OtlpReceiver) -> Iterator[Running]:
    """Every call is sampled."""
    running = start_service(TRACE_SAMPLE_RATIO="1", **FOR_TESTS, **receiver.environ)
    yield running
    end(running)


@pytest.fixture(scope="module")
def rarely(receiver: OtlpReceiver) -> Iterator[Running]:
    """No call is sampled unless its caller says so."""
    running = start_service(TRACE_SAMPLE_RATIO="0", **FOR_TESTS, **receiver.environ)
    yield running
    end(running)


@pytest.fixture(scope="module")
def untraced() -> Iterator[Running]:
    running = start_service(ENABLE_TRACING="false", **FOR_TESTS)
    yield running
    end(running)


def post(running: Running, body: Any, **headers: str) -> Any:
    return running.http.post("/api/v1/jsonrpc", json=body, headers=headers).json()


def call(tool_id: str = "echo", parameters: Any = None, **params: Any) -> dict[str, Any]:
    asked = {"tool_id": tool_id, "parameters": {"message": "x"} if parameters is None else parameters, **params}
    return {"jsonrpc": "2.0", "id": 1, "method": "tools.execute", "params": asked}


def only(spans: list[Span], kind: str) -> Span:
    (found,) = [span for span in spans if span.kind == kind]
    return found


# Spans of a call


def test_a_sampled_call_is_a_server_span_and_a_tool_span_below_it(traced: Running, receiver: OtlpReceiver) -> None:
    execution = traced.execute("echo", {"message": "canary-5d1b"}, call_id="call-1", agent_id="agent-1")
    spans = receiver.wait_for_trace(execution["trace_id"], 2)
    server, tool = only(spans, "server"), only(spans, "internal")
    assert execution["trace_id"] == execution["execution_id"].replace("-", "")
    assert (server.name, server.parent_id, server.failed) == ("tools.execute", "", False)
    assert (tool.name, tool.parent_id, tool.failed) == ("execute_tool echo", server.span_id, False)
    assert server.start_ns <= tool.start_ns <= tool.end_ns <= server.end_ns
    assert server.attributes == {
        "rpc.system.name": "jsonrpc",
        "jsonrpc.protocol.version": "2.0",
        "rpc.method": "tools.execute",
        "server.address": "127.0.0.1",
        "agentcore.tenant": "local",
    }
    told = {name: value for name, value in tool.attributes.items() if not name.endswith("_ms")}
    assert told == {
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": "echo",
        "gen_ai.tool.type": "function",
        "gen_ai.tool.call.id": "call-1",
        "gen_ai.agent.id": "agent-1",
        "agentcore.execution_id": execution["execution_id"],
        "agentcore.tenant": "local",
        "agentcore.status": "success",
        "agentcore.attempts": 1,
    }
    stages = [tool.attributes[f"agentcore.{stage}_ms"] for stage in ("registry", "validation", "limits", "run")]
    assert all(value >= 0 for value in stages) and sum(stages) <= (tool.end_ns - tool.start_ns) / 1e6 + 0.01
    assert tool.attributes["agentcore.run_ms"] == pytest.approx(execution["execution_time_ms"], abs=0.001)
    assert not any(b"canary-5d1b" in body for body in receiver.bodies)


def test_a_failed_run_says_its_code_and_the_request_is_well(traced: Running, receiver: OtlpReceiver) -> None:
    execution = traced.execute("fail_clearly", {"message": "canary-19aa"})
    spans = receiver.wait_for_trace(execution["trace_id"], 2)
    server, tool = only(spans, "server"), only(spans, "internal")
    assert tool.failed and tool.attributes["error.type"] == "TICKET_CLOSED" and not server.failed
    assert tool.attributes["agentcore.status"] == "failed" and "error.type" not in server.attributes
    assert not any(b"canary-19aa" in body for body in receiver.bodies)


def test_a_refused_call_is_an_error_of_the_request_too(traced: Running, receiver: OtlpReceiver) -> None:
    trace_id = fresh()
    answer = post(traced, call("echo", {"message": 5}), traceparent=f"00-{trace_id}-{PARENT_SPAN}-01")
    assert answer["error"]["code"] == -32602
    spans = receiver.wait_for_trace(trace_id, 2)
    server, tool = only(spans, "server"), only(spans, "internal")
    assert server.failed and server.attributes["rpc.response.status_code"] == "-32602"
    assert server.attributes["error.type"] == "-32602"
    assert tool.failed and tool.attributes["agentcore.status"] == "refused"
    assert tool.attributes["error.type"] == "invalid_params" and "agentcore.run_ms" not in tool.attributes


def test_a_tool_that_is_none_names_no_span(traced: Running, receiver: OtlpReceiver) -> None:
    trace_id = fresh()
    post(traced, call("no_such_tool_7c"), traceparent=f"00-{trace_id}-{PARENT_SPAN}-01")
    tool = only(receiver.wait_for_trace(trace_id, 2), "internal")
    assert tool.name == "execute_tool" and "gen_ai.tool.name" not in tool.attributes
    trace_id = fresh()
    unknown = {"jsonrpc": "2.0", "id": 1, "method": "no.such.method"}
    post(traced, unknown, traceparent=f"00-{trace_id}-{PARENT_SPAN}-01")
    server = only(receiver.wait_for_trace(trace_id, 1), "server")
    assert server.name == "jsonrpc" and server.attributes["rpc.method"] == "_OTHER"


def test_a_method_that_calls_no_tool_has_a_span_too(traced: Running, receiver: OtlpReceiver) -> None:
    traced.rpc("tools.list")
    receiver.wait_for(lambda spans: any(span.name == "tools.list" and span.kind == "server" for span in spans))


def test_secrets_in_what_an_agent_says_of_itself_do_not_leave(traced: Running, receiver: OtlpReceiver) -> None:
    key = "act_0123456789abcdef_canary8f2e55d1canary8f2e55d1"
    execution = traced.execute("echo", {"message": "x"}, agent_id=key, execution_context={"session_id": key})
    tool = only(receiver.wait_for_trace(execution["trace_id"], 2), "internal")
    assert "gen_ai.agent.id" in tool.attributes and "gen_ai.conversation.id" in tool.attributes
    assert not any(b"canary8f2e55d1" in body for body in receiver.bodies)


def test_the_resource_says_which_service_it_was(
    traced: Running, serve: Serve, receiver: OtlpReceiver, own_receiver: OtlpReceiver
) -> None:
    execution = traced.execute("echo", {"message": "x"})
    resource = receiver.wait_for_trace(execution["trace_id"], 2)[0].resource
    assert resource["service.name"] == "agentcore-tools" and resource["service.instance.id"]
    named = {"OTEL_SERVICE_NAME": "tools-eu", "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test"}
    headers = {"OTEL_EXPORTER_OTLP_HEADERS": "x-tenant=7", "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip"}
    running = serve(TRACE_SAMPLE_RATIO="1", **own_receiver.environ, **named, **headers)
    resource = own_receiver.wait_for_trace(running.execute("echo", {"message": "x"})["trace_id"], 2)[0].resource
    assert resource["service.name"] == "tools-eu" and resource["deployment.environment.name"] == "test"
    assert own_receiver.headers[0]["x-tenant"] == "7" and own_receiver.headers[0]["content-encoding"] == "gzip"


# Many calls in one request


@pytest.mark.parametrize("method", ["tools.execute_batch", "tools.execute_parallel", "tools.execute_with_fallback"])
def test_a_request_of_many_calls_is_one_trace(traced: Running, receiver: OtlpReceiver, method: str) -> None:
    echo, failing = {"tool_id": "echo", "parameters": {"message": "x"}}, {"tool_id": "fail_clearly"}
    params = {
        "tools.execute_batch": {"requests": [echo, echo]},
        "tools.execute_parallel": {"tasks": [{"task_id": "a", **echo}, {"task_id": "b", **echo}]},
        "tools.execute_with_fallback": {"primary": failing, "fallback": echo},
    }
    result = traced.rpc(method, params[method])["result"]
    answers = result.get("attempts") or result["results"]
    answers = list(answers.values()) if isinstance(answers, dict) else answers
    (trace_id,) = {execution["trace_id"] for execution in answers}
    spans = receiver.wait_for_trace(trace_id, 3)
    server = only(spans, "server")
    tools = [span for span in spans if span.kind == "internal"]
    assert server.name == method and [span.parent_id for span in tools] == [server.span_id] * 2
    told = {span.attributes["agentcore.execution_id"] for span in tools}
    assert told == {execution["execution_id"] for execution in answers}


def test_a_json_rpc_batch_is_one_span_with_a_child_for_each_call(traced: Running, receiver: OtlpReceiver) -> None:
    answers = post(traced, [call() | {"id": n} for n in range(3)])
    (trace_id,) = {answer["result"]["trace_id"] for answer in answers}
    spans = receiver.wait_for_trace(trace_id, 4)
    server = only(spans, "server")
    assert server.name == "jsonrpc" and server.attributes["agentcore.batch_size"] == 3
    assert "rpc.method" not in server.attributes
    assert all(span.parent_id == server.span_id for span in spans if span is not server)


# Whose trace it is


def test_a_callers_trace_is_taken_over(rarely: Running, receiver: OtlpReceiver) -> None:
    trace_id = fresh()
    headers = {"traceparent": f"00-{trace_id}-{PARENT_SPAN}-01", "tracestate": "vendor=abc,other=1"}
    execution = post(rarely, call(), **headers)["result"]
    server = only(receiver.wait_for_trace(trace_id, 2), "server")
    assert execution["trace_id"] == trace_id
    assert server.parent_id == PARENT_SPAN and server.parent_is_remote and server.state == "vendor=abc,other=1"


def test_a_caller_who_does_not_sample_is_not_sampled(traced: Running, receiver: OtlpReceiver) -> None:
    trace_id, known = fresh(), fresh()
    execution = post(traced, call(), traceparent=f"00-{trace_id}-{PARENT_SPAN}-00")["result"]
    post(traced, call(), traceparent=f"00-{known}-{PARENT_SPAN}-01")
    receiver.wait_for_trace(known, 2)
    assert execution["trace_id"] == trace_id and receiver.trace(trace_id) == []


@pytest.mark.parametrize(
    "traceparent",
    [
        f"ff-{PARENT_TRACE}-{PARENT_SPAN}-01",
        f"00-{'0' * 32}-{PARENT_SPAN}-01",
        f"00-{PARENT_TRACE}-{'0' * 16}-01",
        f"00-{PARENT_TRACE.upper()}-{PARENT_SPAN}-01",
        f"{SAMPLED}-more",
        f"{SAMPLED}0",
        SAMPLED[:-1],
        "",
        "nonsense",
    ],
)
def test_a_traceparent_that_is_none_does_not_count(rarely: Running, traceparent: str) -> None:
    execution = post(rarely, call(), traceparent=traceparent)["result"]
    assert execution["trace_id"] == execution["execution_id"].replace("-", "")


def test_two_traceparents_are_none(rarely: Running) -> None:
    headers = [("traceparent", SAMPLED), ("traceparent", UNSAMPLED), ("content-type", "application/json")]
    response = rarely.http.post("/api/v1/jsonrpc", content=json.dumps(call()), headers=headers)
    execution = response.json()["result"]
    assert execution["trace_id"] == execution["execution_id"].replace("-", "")


def test_a_later_version_of_traceparent_is_read_as_far_as_it_is_known(rarely: Running) -> None:
    trace_id = fresh()
    execution = post(rarely, call(), traceparent=f"01-{trace_id}-{PARENT_SPAN}-00-more")["result"]
    assert execution["trace_id"] == trace_id


def test_an_agents_own_trace_id_is_the_trace(traced: Running, receiver: OtlpReceiver) -> None:
    trace_id = fresh()
    execution = traced.execute("echo", {"message": "x"}, execution_context={"trace_id": trace_id})
    assert execution["trace_id"] == trace_id
    assert only(receiver.wait_for_trace(trace_id, 2), "server").parent_id == ""


def test_an_agents_own_word_stays_a_label(traced: Running, receiver: OtlpReceiver) -> None:
    execution = traced.execute("echo", {"message": "x"}, execution_context={"trace_id": "ticket-17"})
    spans = receiver.wait_for_trace(execution["execution_id"].replace("-", ""), 2)
    assert execution["trace_id"] == "ticket-17"
    assert only(spans, "internal").attributes["agentcore.trace_label"] == "ticket-17"


def test_a_traceparent_goes_before_an_agents_own_trace_id(traced: Running, receiver: OtlpReceiver) -> None:
    trace_id, given_id = fresh(), fresh()
    body = call(execution_context={"trace_id": given_id})
    execution = post(traced, body, traceparent=f"00-{trace_id}-{PARENT_SPAN}-01")["result"]
    tool = only(receiver.wait_for_trace(trace_id, 2), "internal")
    assert execution["trace_id"] == trace_id and tool.attributes["agentcore.trace_label"] == given_id


def test_a_call_of_another_trace_than_its_request_links_to_it(traced: Running, receiver: OtlpReceiver) -> None:
    first, second = fresh(), fresh()
    requests = [call(execution_context={"trace_id": trace_id})["params"] for trace_id in (first, second)]
    result = traced.rpc("tools.execute_batch", {"requests": requests})["result"]
    assert [execution["trace_id"] for execution in result["results"]] == [first, second]
    server = only(receiver.wait_for_trace(first, 2), "server")
    (apart,) = receiver.wait_for_trace(second, 1)
    assert apart.parent_id == "" and apart.links == ((first, server.span_id),)


# What tools send


class Upstream:
    """A real HTTP server that remembers headers; /redirect leads to its other name, another origin."""

    def __init__(self) -> None:
        self.seen: list[dict[str, str]] = []
        upstream = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                upstream.seen.append({name.lower(): value for name, value in self.headers.items()})
                self.send_response(302 if self.path == "/redirect" else 404 if self.path == "/missing" else 200)
                if self.path == "/redirect":
                    self.send_header("Location", f"http://localhost:{upstream.port}/secret-path?secret=1")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    server = Upstream()
    yield server
    server.close()


def test_a_request_of_a_tool_carries_the_trace_on(traced: Running, receiver: OtlpReceiver, upstream: Upstream) -> None:
    trace_id = fresh()
    headers = {"traceparent": f"00-{trace_id}-{PARENT_SPAN}-01", "tracestate": "vendor=abc"}
    assert post(traced, call("fetch", {"url": f"{upstream.url}/secret-path"}), **headers)["result"]["result"] == 200
    spans = receiver.wait_for_trace(trace_id, 3)
    client, tool = only(spans, "client"), only(spans, "internal")
    assert upstream.seen[0]["traceparent"] == f"00-{trace_id}-{client.span_id}-01"
    assert upstream.seen[0]["tracestate"] == "vendor=abc"
    assert client.parent_id == tool.span_id and client.name == "GET" and not client.failed
    assert client.attributes == {
        "http.request.method": "GET",
        "http.response.status_code": 200,
        "server.address": "127.0.0.1",
        "server.port": upstream.port,
        "url.scheme": "http",
    }
    assert not any(b"secret-path" in body for body in receiver.bodies)


def test_a_request_of_a_call_that_is_not_sampled_says_so(rarely: Running, upstream: Upstream) -> None:
    execution = rarely.execute("fetch", {"url": upstream.url})
    version, trace_id, span_id, flags = upstream.seen[0]["traceparent"].split("-")
    assert (version, trace_id, flags) == ("00", execution["trace_id"], "00")
    assert span_id == execution["execution_id"].replace("-", "")[16:] and "tracestate" not in upstream.seen[0]


def test_each_hop_of_a_redirect_is_a_span_of_its_own(
    traced: Running, receiver: OtlpReceiver, upstream: Upstream
) -> None:
    execution = traced.execute("fetch", {"url": f"{upstream.url}/redirect"})
    assert execution["result"] == 200
    clients = [span for span in receiver.wait_for_trace(execution["trace_id"], 4) if span.kind == "client"]
    sent = [seen["traceparent"].split("-")[2] for seen in upstream.seen]
    assert sent == [span.span_id for span in sorted(clients, key=lambda span: span.start_ns)] and len(set(sent)) == 2


def test_a_request_that_fails_says_how(traced: Running, receiver: OtlpReceiver, upstream: Upstream) -> None:
    missing = traced.execute("fetch", {"url": f"{upstream.url}/missing"})
    client = only(receiver.wait_for_trace(missing["trace_id"], 3), "client")
    assert client.failed and client.attributes["error.type"] == "404"
    refused = traced.execute("fetch", {"url": "http://10.255.255.1/"})
    client = only(receiver.wait_for_trace(refused["trace_id"], 3), "client")
    assert client.failed and client.attributes["error.type"] == "EGRESS_REFUSED"


def test_a_trace_that_the_tool_set_itself_is_left_alone(
    traced: Running, receiver: OtlpReceiver, upstream: Upstream
) -> None:
    execution = traced.execute("fetch", {"url": upstream.url, "headers": {"Traceparent": SAMPLED}})
    assert upstream.seen[0]["traceparent"] == SAMPLED and "tracestate" not in upstream.seen[0]
    assert len(receiver.wait_for_trace(execution["trace_id"], 2)) == 2


def test_nothing_is_passed_on_where_tracing_is_off(untraced: Running, upstream: Upstream) -> None:
    assert post(untraced, call("fetch", {"url": upstream.url}), traceparent=SAMPLED)["result"]["result"] == 200
    assert "traceparent" not in upstream.seen[0]


def test_without_a_receiver_the_callers_span_stays_the_parent(service: Running, upstream: Upstream) -> None:
    execution = post(service, call("fetch", {"url": upstream.url}), traceparent=SAMPLED)["result"]
    assert execution["trace_id"] == PARENT_TRACE and upstream.seen[0]["traceparent"] == SAMPLED
    execution = service.execute("fetch", {"url": upstream.url})
    assert upstream.seen[1]["traceparent"].split("-")[1] == execution["trace_id"]


# The head and the tail


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 2**128 - 1))
def test_what_is_sampled_at_a_ratio_is_sampled_at_every_higher_one(one: float, other: float, number: int) -> None:
    trace_id, (low, high) = f"{number:032x}", sorted((one, other))
    assert HeadSampler(low).samples(trace_id, None) <= HeadSampler(high).samples(trace_id, None)
    assert HeadSampler(1).samples(trace_id, None) and not HeadSampler(0).samples(trace_id, None)


@pytest.mark.parametrize("ratio", [0.01, 0.4, 0.6])
def test_the_part_of_our_own_ids_that_is_sampled_is_the_ratio(ratio: float) -> None:
    sampler, count = HeadSampler(ratio), 20_000
    sampled = sum(sampler.samples(new_execution_id().replace("-", ""), None) for _ in range(count))
    assert abs(sampled - ratio * count) < 6 * (count * ratio * (1 - ratio)) ** 0.5  # once in a billion runs


@pytest.mark.parametrize(
    ("named", "argument", "without_parent", "with_unsampled_parent"),
    [
        ("", "", False, False),
        ("always_on", "", True, True),
        ("always_off", "", False, False),
        ("traceidratio", "1", True, True),
        ("parentbased_always_on", "", True, False),
        ("parentbased_always_off", "", False, False),
        ("parentbased_traceidratio", "1", True, False),
        ("parentbased_traceidratio", "nonsense", False, False),
        ("PARENTBASED_ALWAYS_ON", "", True, False),
        ("unheard_of", "", False, False),
    ],
)
def test_the_sampler_is_the_one_that_otel_variables_name(
    named: str, argument: str, without_parent: bool, with_unsampled_parent: bool
) -> None:
    environ = {"OTEL_TRACES_SAMPLER": named, "OTEL_TRACES_SAMPLER_ARG": argument}
    sampler, _ = sampler_of(0.0, environ)
    assert sampler.samples(PARENT_TRACE, None) is without_parent
    assert sampler.samples(PARENT_TRACE, False) is with_unsampled_parent


def test_failed_timed_out_and_slow_calls_are_kept_though_not_sampled(rarely: Running, receiver: OtlpReceiver) -> None:
    well = rarely.execute("echo", {"message": "x"})
    failed = rarely.execute("fail_clearly")
    late = rarely.execute("wait", {"seconds": 30}, timeout_override=0.05)
    slow = rarely.execute("wait", {"seconds": 1.05})  # uvloop keeps time in whole milliseconds
    assert [failed["status"], late["status"], slow["status"]] == ["failed", "timeout", "success"]
    for execution, why in ((failed, "error"), (late, "error"), (slow, "slow")):
        spans = receiver.wait_for_trace(execution["trace_id"], 2)
        server, tool = only(spans, "server"), only(spans, "internal")
        assert tool.attributes["agentcore.tail"] == why and tool.parent_id == server.span_id
    assert receiver.trace(well["trace_id"]) == []


def test_refusals_are_the_callers_and_not_kept(rarely: Running, receiver: OtlpReceiver) -> None:
    trace_id = fresh()
    for body in (call("echo", {"message": 5}), call("no_such_tool"), {"jsonrpc": "2.0", "id": 1, "method": "x"}):
        assert "error" in post(rarely, body, traceparent=f"00-{trace_id}-{PARENT_SPAN}-00")
    receiver.wait_for_trace(rarely.execute("fail_clearly")["trace_id"], 2)
    assert receiver.trace(trace_id) == []


def test_the_tail_is_bounded(serve: Serve, own_receiver: OtlpReceiver) -> None:
    running = serve(TRACE_SAMPLE_RATIO="0", **FOR_TESTS, **own_receiver.environ)
    began = time.monotonic()
    failing = [{"tool_id": "fail_clearly"}] * 100
    for _ in range(3):
        assert running.rpc("tools.execute_batch", {"requests": failing})["result"]["failed_count"] == 100
    seconds = time.monotonic() - began
    assert running.stop() == 0
    tools = [span for span in own_receiver.spans if span.kind == "internal"]
    assert 10 <= len(tools) <= 10 + 10 * seconds + 1


def test_always_off_keeps_no_tail() -> None:
    kept: list[SpanNote] = []

    class Sink:
        outcomes: ClassVar[dict[str, int]] = {}
        keep = staticmethod(kept.append)

    for named, count in (("always_off", 0), ("parentbased_always_off", 1)):
        sampler, tail = sampler_of(0.0, {"OTEL_TRACES_SAMPLER": named})
        tracing = Tracing(sampler, cast(Any, Sink()), tail=tail)
        request = RequestContext(LOCAL_CALLER, 0.0, trace=tracing.begin([]))
        request.method = "tools.list"
        tracing.request_ended(request, time.perf_counter() - 60)
        assert len(kept) == count


# REST


def test_a_rest_call_is_below_the_span_of_its_route(traced: Running, receiver: OtlpReceiver) -> None:
    trace_id = fresh()
    headers = {"traceparent": f"00-{trace_id}-{PARENT_SPAN}-01"}
    response = traced.http.post("/api/v1/tools/echo/execute", json={"parameters": {"message": "x"}}, headers=headers)
    spans = receiver.wait_for_trace(trace_id, 2)
    server, tool = only(spans, "server"), only(spans, "internal")
    assert response.json()["trace_id"] == trace_id
    assert server.name == "POST /api/v1/tools/{tool_id}/execute" and server.parent_id == PARENT_SPAN
    assert server.attributes["http.response.status_code"] == 200
    assert tool.name == "execute_tool echo" and tool.parent_id == server.span_id


def test_a_rest_calls_answer_names_the_trace_that_was_made_for_it(traced: Running, receiver: OtlpReceiver) -> None:
    response = traced.http.post("/api/v1/tools/echo/execute", json={"parameters": {"message": "x"}})
    spans = receiver.wait_for_trace(response.json()["trace_id"], 2)
    assert only(spans, "internal").parent_id == only(spans, "server").span_id


def test_probes_and_documents_leave_no_span_and_a_secret_in_a_query_does_not_leave(
    traced: Running, receiver: OtlpReceiver
) -> None:
    for path in ("/livez", "/readyz", "/metrics", "/docs", "/openapi.json"):
        assert traced.http.get(path).status_code == 200
    trace_id = fresh()
    headers = {"traceparent": f"00-{trace_id}-{PARENT_SPAN}-01", "user-agent": "x password=canary-77ab"}
    traced.http.get("/api/v1/tools?query=x&api_key=canary-77ab", headers=headers)
    server = only(receiver.wait_for_trace(trace_id, 1), "server")
    assert server.name == "GET /api/v1/tools" and "url.query" in server.attributes
    assert not any(b"canary-77ab" in body for body in receiver.bodies)
    probed = [s.name for s in receiver.spans if s.scope != "app" and "/api/" not in s.name]
    assert probed == []


# Lines in the log


@pytest.mark.parametrize("tool_id", ["write_line", "write_line_in_thread"])
def test_lines_that_a_tool_writes_name_its_call(rarely: Running, tool_id: str) -> None:
    trace_id = fresh()
    body = call(tool_id, {"message": f"line of {trace_id}"})
    execution = post(rarely, body, traceparent=f"00-{trace_id}-{PARENT_SPAN}-00")["result"]
    event = rarely.read_log(lambda event: event["message"] == f"line of {trace_id}")
    assert event["trace_id"] == trace_id and event["execution_id"] == execution["execution_id"]


def test_lines_about_a_call_name_its_trace_where_tracing_is_off_too(untraced: Running) -> None:
    execution = untraced.execute("raise_exception")
    event = untraced.read_log(lambda event: event["message"] == "tool crashed")
    assert event["trace_id"] == execution["trace_id"] == execution["execution_id"].replace("-", "")
