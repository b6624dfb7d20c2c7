"""The way of spans to a receiver: what a bad one costs, and the OTEL variables that name it."""

from __future__ import annotations

import fcntl
import json
import logging
import subprocess
import sys
import threading
import time
from concurrent import futures
from typing import Any

import grpc
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.sdk.resources import Resource

from app.telemetry.otel_variables import odd_variables
from app.telemetry.span_encoding import Encoder, NotedSpan, whole
from app.telemetry.span_export import LastWords
from app.telemetry.spans import SpanNote
from tests.conftest import ROOT, Running, Serve, end, service_environ
from tests.otlp import PARENT_SPAN, PARENT_TRACE, OtlpReceiver, Span, partly_taken, spans_in


def spans_counted(running: Running) -> dict[str, int]:
    outcomes = ("exported", "failed", "dropped")
    return {outcome: int(running.metric("trace_spans_total", outcome=outcome)) for outcome in outcomes}


def settled(running: Running, total: int) -> dict[str, int]:
    """The counts, once every span has its outcome."""
    ends = time.monotonic() + 60
    while sum((counts := spans_counted(running)).values()) < total:
        assert time.monotonic() < ends, counts
    return counts


def test_under_a_burst_every_span_arrives_or_is_counted(serve: Serve, own_receiver: OtlpReceiver) -> None:
    small = {"OTEL_BSP_MAX_QUEUE_SIZE": "64", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "32"}
    running = serve(TRACE_SAMPLE_RATIO="1", **own_receiver.environ, **small)
    own_receiver.stall()
    requests = [{"tool_id": "echo", "parameters": {"message": "x"}}] * 100
    for _ in range(5):
        assert running.rpc("tools.execute_batch", {"requests": requests})["result"]["successful_count"] == 100
    own_receiver.resume()
    counts = settled(running, 505)
    assert counts["failed"] == 0 and counts["dropped"] > 300 and sum(counts.values()) == 505
    own_receiver.wait_for(lambda spans: len(spans) >= counts["exported"])
    arrived = [span.span_id for span in own_receiver.spans]
    assert len(arrived) == len(set(arrived)) == counts["exported"]


def test_a_receiver_that_is_away_costs_no_call_and_one_line(serve: Serve) -> None:
    away = OtlpReceiver()
    environ = away.environ
    away.close()
    running = serve(TRACE_SAMPLE_RATIO="1", OTEL_EXPORTER_OTLP_TIMEOUT="4", **environ)
    executions = [running.execute("echo", {"message": "x"}) for _ in range(50)]
    assert all(execution["status"] == "success" for execution in executions)
    assert settled(running, 100)["failed"] == 100
    back = OtlpReceiver(away.port)
    try:
        back.wait_for_trace(running.execute("echo", {"message": "x"})["trace_id"], 2)
        back.status = 400
        running.execute("echo", {"message": "x"})
        assert settled(running, 104) == {"exported": 2, "failed": 102, "dropped": 0}
        assert running.stop() == 0
    finally:
        back.close()
    with pytest.raises(AssertionError):
        running.read_log(lambda event: False)  # to the end
    complaints = [event for event in running.log if event["logger"].startswith(("app.tracing", "opentelemetry"))]
    assert [event["message"] for event in complaints] == ["spans may be lost"] and complaints[0]["reason"]


@pytest.mark.parametrize(
    "proxy", [{}, {"HTTP_PROXY": "http://127.0.0.1:1", "NO_PROXY": "127.0.0.1"}], ids=["own", "requests"]
)
def test_spans_that_the_receiver_takes_a_batch_without_are_failed(
    serve: Serve, own_receiver: OtlpReceiver, proxy: dict[str, str]
) -> None:
    own_receiver.rejects = 1
    running = serve(TRACE_SAMPLE_RATIO="1", **own_receiver.environ, **proxy)
    for _ in range(3):
        running.execute("echo", {"message": "x"})
    counts, exports = settled(running, 6), len(own_receiver.bodies)
    assert counts == {"exported": 6 - exports, "failed": exports, "dropped": 0}
    complaint = running.read_log(lambda event: event["message"] == "spans may be lost")
    assert "rejected: too old" in complaint["reason"]
    own_receiver.rejects = 0
    running.execute("echo", {"message": "x"})
    assert settled(running, 8)["failed"] == exports


def test_the_last_spans_are_sent_at_shutdown(serve: Serve, own_receiver: OtlpReceiver) -> None:
    gathering = {**own_receiver.environ, "OTEL_BSP_SCHEDULE_DELAY": "600000"}
    running = serve(TRACE_SAMPLE_RATIO="1", **gathering)
    execution = running.execute("echo", {"message": "x"})
    assert own_receiver.spans == []
    assert running.stop() == 0 and len(own_receiver.trace(execution["trace_id"])) == 2


def test_a_receiver_that_never_answers_does_not_hold_up_the_end(serve: Serve, own_receiver: OtlpReceiver) -> None:
    own_receiver.stall()
    running = serve(TRACE_SAMPLE_RATIO="1", **own_receiver.environ)
    running.execute("echo", {"message": "x"})
    assert running.stop() == 0


def test_where_spans_go_nowhere_nothing_of_it_is_imported() -> None:
    script = """
import asyncio, os, sys
from app.cli import create_app, open_service, read_settings
async def opened():
    async with open_service(read_settings(os.environ), listen=("127.0.0.1", 8001)) as service:
        create_app(service)
for name, value in (("PROFILE", "default"), ("OTEL_TRACES_EXPORTER", "none"), ("OTEL_SDK_DISABLED", "true")):
    os.environ[name] = value
    asyncio.run(opened())
    os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://127.0.0.1:1"
    os.environ["OTEL_TRACES_EXPORTER"] = "otlp"
unwanted = ("opentelemetry.exporter", "opentelemetry.sdk.trace", "opentelemetry.instrumentation", "grpc", "requests")
print([name for name in sys.modules if name.startswith(unwanted)])
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=service_environ(), capture_output=True, check=True
    )
    assert done.stdout.decode().splitlines()[-1] == "[]"


def test_spans_go_by_grpc_where_that_is_asked_for(serve: Serve) -> None:
    arrived: list[Span] = []
    exports: list[int] = []
    news = threading.Condition()

    class Service(TraceServiceServicer):
        def Export(self, request: ExportTraceServiceRequest, context: Any) -> ExportTraceServiceResponse:
            with news:
                arrived.extend(spans_in(request))
                exports.append(len(request.resource_spans))
                news.notify_all()
            return partly_taken(1)

    server = grpc.server(futures.ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        running = serve(
            TRACE_SAMPLE_RATIO="1",
            OTEL_EXPORTER_OTLP_PROTOCOL="grpc",
            OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{port}",
            OTEL_BSP_SCHEDULE_DELAY="20",
        )
        execution = running.execute("echo", {"message": "x"})
        with news:
            assert news.wait_for(lambda: len(arrived) == 2, 30)
        assert {span.trace_id for span in arrived} == {execution["trace_id"]}
        assert settled(running, 2)["failed"] == len(exports)
        assert running.stop() == 0
    finally:
        server.stop(None)


def test_spans_go_to_stdout_where_that_is_asked_for_and_an_unknown_exporter_is_named(serve: Serve) -> None:
    running = serve(TRACE_SAMPLE_RATIO="1", OTEL_TRACES_EXPORTER="zipkin, console", OTEL_BSP_SCHEDULE_DELAY="20")
    execution = running.execute("echo", {"message": "x"})
    span = running.read_log(lambda event: event.get("name") == "execute_tool echo")
    assert span["context"]["trace_id"] == f"0x{execution['trace_id']}"
    complaint = running.read_log(lambda event: event.get("message") == "no spans go there")
    assert complaint["exporter"] == "zipkin" and "otlp" in complaint["reason"]


def test_spans_and_events_share_stdout_line_by_line(serve: Serve) -> None:
    running = serve(
        TRACE_SAMPLE_RATIO="1", OTEL_TRACES_EXPORTER="console", OTEL_BSP_SCHEDULE_DELAY="200", ACCESS_LOG_RATIO="1"
    )
    stdout, clients, calls = running.process.stdout, 8, 150
    assert stdout is not None
    fcntl.fcntl(stdout, fcntl.F_SETPIPE_SZ, 4096)  # longer writes wait half-way, and others come between

    def call_on(_: int) -> None:
        with httpx.Client(base_url=running.url, trust_env=False, timeout=60) as client:
            body = {
                "jsonrpc": "2.0",
                "id": 1,
                "method": "tools.execute",
                "params": {"tool_id": "echo", "parameters": {"message": "x"}},
            }
            for _ in range(calls):
                assert "result" in client.post("/api/v1/jsonrpc", json=body).json()

    with futures.ThreadPoolExecutor(clients + 1) as pool:
        read = pool.submit(stdout.read)
        list(pool.map(call_on, range(clients)))
        assert running.stop() == 0
        events = [json.loads(line) for line in read.result().splitlines()]
    assert sum(event.get("message") == "request" for event in events) == clients * calls
    assert any(event.get("name") == "execute_tool echo" for event in events)


def test_spans_on_a_stdout_that_nobody_reads_do_not_keep_the_process(serve: Serve) -> None:
    running = serve(TRACE_SAMPLE_RATIO="1", OTEL_TRACES_EXPORTER="console", OTEL_BSP_SCHEDULE_DELAY="20")
    for _ in range(500):
        running.execute("echo", {"message": "x"})
    assert running.stop() == 0


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NOTES = st.builds(
    SpanNote,
    name=TEXTS,
    kind=st.sampled_from(["server", "internal", "client"]),
    trace_id=st.integers(1, 2**128 - 1).map(lambda number: f"{number:032x}"),
    span_id=st.integers(1, 2**64 - 1).map(lambda number: f"{number:016x}"),
    parent_id=st.just("") | st.integers(1, 2**64 - 1).map(lambda number: f"{number:016x}"),
    parent_is_remote=st.booleans(),
    start_ns=st.integers(0, 2**63),
    end_ns=st.integers(0, 2**63),
    common=st.just({}),
    attributes=st.dictionaries(
        TEXTS.filter(len), TEXTS | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.booleans()
    ),
    failed=st.booleans(),
    state=st.sampled_from(["", "a=1", "vendor=abc,other=1"]),
    link=st.none() | st.just((PARENT_TRACE, PARENT_SPAN)),
)


@given(st.lists(NOTES, max_size=5), st.sampled_from([{}, {"a.common": "x", "b.common": 7}]))
def test_our_encoder_writes_what_the_librarys_writes(notes: list[SpanNote], common: dict[str, Any]) -> None:
    resource = Resource({"service.name": "x"})
    spans = [NotedSpan(note._replace(common=common), resource) for note in notes]
    encoder = Encoder()
    for _ in range(2):  # the second time what is common is known
        ours = encoder.encode(spans)
        theirs = encode_spans(whole(spans))
        assert sorted(map(repr, spans_in(ours))) == sorted(map(repr, spans_in(theirs)))


# Variables


def test_otel_variables_stand_in_the_env_file_too(own_receiver: OtlpReceiver, tmp_path: Any) -> None:
    lines = [f"{name}={value}" for name, value in own_receiver.environ.items()]
    (tmp_path / ".env").write_text("\n".join([*lines, "TRACE_SAMPLE_RATIO=1"]))
    process = subprocess.Popen(
        [sys.executable, "-m", "app", "serve", "--port", "0"],
        cwd=tmp_path,
        env=service_environ(tmp_path),
        stdout=subprocess.PIPE,
    )
    running = Running(process, "", 0, tmp_path)
    try:
        running.url = running.read_log(lambda event: event["message"] == "serving")["url"]
        own_receiver.wait_for_trace(running.execute("echo", {"message": "x"})["trace_id"], 2)
    finally:
        end(running)


def run(command: str, **environ: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "app", *command.split(), "--port", "0"],
        cwd=ROOT,
        env=service_environ(**environ),
        capture_output=True,
    )


@pytest.mark.parametrize(
    "name",
    [
        "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT",
        "OTEL_ATTRIBUTE_COUNT_LIMIT",
        "OTEL_SPAN_EVENT_COUNT_LIMIT",
        "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT",
    ],
)
def test_a_variable_that_opentelemetry_does_not_take_is_named_without_its_value(name: str) -> None:
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", name: "canary-31c"}
    done = run("serve", **environ)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and name.encode() in line
    assert b"canary-31c" not in done.stderr + done.stdout
    doctor = run("doctor --json", **environ)
    (found,) = [each for each in json.loads(doctor.stdout) if not each["ok"]]
    assert doctor.returncode == 1 and found["what"] == "tracing" and name in found["says"]


def test_propagators_of_a_whole_cluster_break_no_command(serve: Serve, own_receiver: OtlpReceiver) -> None:
    for command in ("tools list", "doctor"):
        done = subprocess.run(
            [sys.executable, "-m", "app", *command.split()],
            cwd=ROOT,
            env=service_environ(OTEL_PROPAGATORS="b3,canary-77"),
            capture_output=True,
        )
        assert done.returncode == 0 and b"canary-77" not in done.stderr, done.stderr
    running = serve(OTEL_PROPAGATORS="b3", TRACE_SAMPLE_RATIO="1", **own_receiver.environ)
    running.read_log(lambda event: event["message"].startswith("OTEL_PROPAGATORS is not followed"))
    headers = {"traceparent": f"00-{PARENT_TRACE}-{PARENT_SPAN}-01"}
    assert running.http.get("/api/v1/tools", headers=headers).status_code == 200
    own_receiver.wait_for_trace(PARENT_TRACE, 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_TRACES_SAMPLER", "bogus"),
        ("OTEL_TRACES_SAMPLER_ARG", "7"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "abc"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "9" * 5_000),
        ("OTEL_BSP_SCHEDULE_DELAY", "0"),
        ("OTEL_BSP_SCHEDULE_DELAY", "9" * 30),
        ("OTEL_BSP_EXPORT_TIMEOUT", "x"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "garbage"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://a:port"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "zip"),
    ],
)
def test_a_variable_that_is_not_followed_is_named(name: str, value: str) -> None:
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", name: value}
    (odd,) = odd_variables(environ)
    assert odd.startswith(f"{name}: must be ") and value not in odd.split()


def test_variables_that_can_be_followed_are_not_odd() -> None:
    by_grpc = {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", "OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4317"}
    others = {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.5", "OTEL_BSP_MAX_QUEUE_SIZE": "1"}
    assert [*odd_variables({**by_grpc, **others})] == [] == [*odd_variables({"OTEL_BSP_MAX_QUEUE_SIZE": "unused"})]


def test_odd_variables_are_told_at_the_start_and_by_doctor(serve: Serve) -> None:
    odd = {"OTEL_TRACES_SAMPLER": "bogus", "OTEL_EXPORTER_OTLP_ENDPOINT": "garbage"}
    running = serve(**odd)
    for name in odd:
        running.read_log(lambda event, name=name: event.get("reason", "").startswith(f"{name}: "))  # type: ignore[misc]
    doctor = run("doctor --json", **odd)
    (found,) = [each for each in json.loads(doctor.stdout) if not each["ok"]]
    assert doctor.returncode == 1 and found["what"] == "tracing" and all(name in found["says"] for name in odd)


def test_what_opentelemetry_logs_is_told_with_names_and_without_values(caplog: pytest.LogCaptureFixture) -> None:
    last_words = LastWords()
    try:
        told = "Unable to parse value for %s as integer. Defaulting to %s"
        logging.getLogger("opentelemetry.sdk").warning(told, "OTEL_BSP_EXPORT_TIMEOUT", "canary-52a")
    finally:
        last_words.close()
    (record,) = caplog.records
    assert vars(record)["reason"] == "Unable to parse value for OTEL_BSP_EXPORT_TIMEOUT as integer. Defaulting to ..."


def test_odd_export_variables_do_not_keep_the_service_from_serving(serve: Serve) -> None:
    odd = {"OTEL_BSP_SCHEDULE_DELAY": "0", "OTEL_BSP_MAX_QUEUE_SIZE": "9" * 30, "OTEL_EXPORTER_OTLP_TIMEOUT": "soon"}
    headers = {"OTEL_EXPORTER_OTLP_HEADERS": "authorization canary-9d0e"}
    running = serve(OTEL_EXPORTER_OTLP_ENDPOINT="nonsense", TRACE_SAMPLE_RATIO="1", **odd, **headers)
    assert running.execute("echo", {"message": "x"})["status"] == "success"
    assert running.stop() == 0
    with pytest.raises(AssertionError):
        running.read_log(lambda event: False)  # to the end
    assert "canary-9d0e" not in json.dumps(running.log)


def test_a_name_that_is_no_text_costs_its_batch_nothing() -> None:
    note = SpanNote("n", "internal", PARENT_TRACE, PARENT_SPAN, "", False, 1, 2, {}, {"agentcore.tenant": "a\ud800"})
    (span,) = spans_in(Encoder().encode([NotedSpan(note, Resource({}))]))
    assert span.attributes == {"agentcore.tenant": "a?"}
