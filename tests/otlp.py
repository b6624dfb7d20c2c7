"""A real OTLP/HTTP receiver: takes what the service exports, decodes the protobuf, keeps the spans."""

from __future__ import annotations

import gzip
import http.server
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as EncodedSpan

WAIT_S_MAX = 30.0
"""Not a claim about speed: past it the test fails instead of hanging."""

PARENT_TRACE, PARENT_SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
"""Of a caller, in a traceparent."""

KINDS = {1: "internal", 2: "server", 3: "client"}


@dataclass(frozen=True)
class Span:
    """One span as it arrived. Ids are hex digits, as answers and headers have them."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    parent_is_remote: bool
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    failed: bool
    state: str
    links: tuple[tuple[str, str], ...]
    resource: dict[str, Any]
    scope: str


def value_of(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [value_of(item) for item in value.array_value.values]
    return None if kind is None else getattr(value, kind)


def spans_in(request: ExportTraceServiceRequest) -> list[Span]:
    """The spans of one export, flat."""
    return [
        Span(
            span.name,
            KINDS.get(span.kind, str(span.kind)),
            span.trace_id.hex(),
            span.span_id.hex(),
            span.parent_span_id.hex(),
            bool(span.flags & 0x200),
            span.start_time_unix_nano,
            span.end_time_unix_nano,
            {pair.key: value_of(pair.value) for pair in span.attributes},
            span.status.code == 2,
            span.trace_state,
            tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
            {pair.key: value_of(pair.value) for pair in group.resource.attributes},
            scope.scope.name,
        )
        for group in request.resource_spans
        for scope in group.scope_spans
        for span in scope.spans
        if isinstance(span, EncodedSpan)
    ]


def partly_taken(rejects: int) -> ExportTraceServiceResponse:
    """The answer of a receiver that rejects so many spans of an export."""
    partial = ExportTracePartialSuccess(rejected_spans=rejects, error_message="too old" if rejects else "")
    return ExportTraceServiceResponse(partial_success=partial) if rejects else ExportTraceServiceResponse()


class OtlpReceiver:
    """Listens on loopback. `status` is what it answers, `rejects` how many spans of each export it takes the others
    without; `stall()` lets exports wait until `resume()`."""

    def __init__(self, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self._scheme = "http" if tls is None else "https"
        self.status = 200
        self.rejects = 0
        self.headers: list[dict[str, str]] = []
        self.bodies: list[bytes] = []
        self._spans: list[Span] = []
        self._news = threading.Condition()
        self._open = threading.Event()
        self._open.set()
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver._open.wait(WAIT_S_MAX)
                if receiver.status == 200 and self.path == "/v1/traces":
                    receiver._take({name.lower(): value for name, value in self.headers.items()}, body)
                answer = partly_taken(receiver.rejects).SerializeToString()
                self.send_response(receiver.status if self.path == "/v1/traces" else 404)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A service that was killed in the middle of an export is no news."""

        self._server = Server(("127.0.0.1", port), Handler)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def environ(self) -> dict[str, str]:
        """Settings of a service that exports here, without the usual 5 s of gathering."""
        endpoint = f"{self._scheme}://127.0.0.1:{self.port}"
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "20"}

    @property
    def spans(self) -> list[Span]:
        with self._news:
            return list(self._spans)

    def trace(self, trace_id: str) -> list[Span]:
        return [span for span in self.spans if span.trace_id == trace_id]

    def wait_for(self, wanted: Callable[[list[Span]], Any], within_s: float = WAIT_S_MAX) -> list[Span]:
        """All spans, as soon as `wanted` holds of them."""
        ends = time.monotonic() + within_s
        with self._news:
            while not wanted(self._spans):
                left = ends - time.monotonic()
                assert left > 0, f"not these spans: {[(span.name, span.trace_id) for span in self._spans[-20:]]}"
                self._news.wait(left)
            return list(self._spans)

    def wait_for_trace(self, trace_id: str, count: int) -> list[Span]:
        """The spans of one trace, as soon as there are so many."""
        self.wait_for(lambda spans: sum(span.trace_id == trace_id for span in spans) >= count)
        return self.trace(trace_id)

    def stall(self) -> None:
        self._open.clear()

    def resume(self) -> None:
        self._open.set()

    def close(self) -> None:
        self.resume()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _take(self, headers: dict[str, str], body: bytes) -> None:
        if headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        spans = spans_in(ExportTraceServiceRequest.FromString(body))
        with self._news:
            self.headers.append(headers)
            self.bodies.append(body)
            self._spans += spans
            self._news.notify_all()
