"""Spans on their way out: OpenTelemetry's SDK, its batch processor and its exporters, counted and kept quiet.

Imported only where spans go somewhere, for it takes time and memory. A receiver that is away costs no call anything;
what does not fit the queue is counted. Called by `tracing`; knows no call and no request.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO, Any, cast

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from opentelemetry.context import Context
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace import Link, SpanKind, TraceState
from opentelemetry.trace import get_current_span as current_span

from app import SERVICE
from app.telemetry.logging import stdout_lines
from app.telemetry.metrics import SPAN_OUTCOMES
from app.telemetry.otel_variables import count_in
from app.telemetry.redaction import redact_text
from app.telemetry.span_encoding import Encoder, NotedSpan, whole
from app.telemetry.spans import HeadSampler, SpanNote
from app.telemetry.supervision import ignore_result

logger = logging.getLogger("app.tracing")

COMPLAINT_EVERY_S = 60.0

_VARIABLE = re.compile(r"OTEL_[A-Z_]+")


class SpanExport:
    """The sink of `tracing.Tracing`."""

    def __init__(
        self,
        exporters: Sequence[SpanExporter],
        resource: Resource,
        sampler: HeadSampler,
        environ: Mapping[str, str],
        last_words: LastWords,
    ) -> None:
        self.outcomes = dict.fromkeys(SPAN_OUTCOMES, 0)
        self._resource = resource
        # First, for it reads the variables of span limits and raises ValueError for what they cannot be.
        self._provider = TracerProvider(sampler=_SdkSampler(sampler), resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(_Keeping(self))
        self._queue_max = count_in(environ, "OTEL_BSP_MAX_QUEUE_SIZE")
        self._given = 0
        self._taken = 0
        """Of those given: handed to the exporter. The difference is what waits, or a batch more."""
        self._closed = False
        self._last_words = last_words
        exporter = _Counted(exporters, self.outcomes, self._take, last_words)
        batch = min(self._queue_max, count_in(environ, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE"))
        delay_ms, export_ms = (count_in(environ, f"OTEL_BSP_{name}") for name in ("SCHEDULE_DELAY", "EXPORT_TIMEOUT"))
        self._processor = BatchSpanProcessor(exporter, self._queue_max, delay_ms, batch, export_ms)

    def keep(self, note: SpanNote) -> None:
        """Queue a span of ours."""
        self.keep_span(NotedSpan(note, self._resource))

    def keep_span(self, span: ReadableSpan) -> None:
        """Queue a span; without room it is counted and gone. The processor would drop silently."""
        if self._closed or self._given - self._taken >= self._queue_max:
            self.outcomes["dropped"] += 1
        else:
            self._given += 1
            self._processor.on_end(span)

    def _take(self, count: int) -> None:
        self._taken += count

    def instrument(self, app: Any, own_paths: str) -> None:
        """FastAPI's instrumentation on this application, with a provider of its own: a global one would switch on
        FastAPI's telemetry, and that of any library."""
        os.environ.setdefault("OTEL_SEMCONV_STABILITY_OPT_IN", "http")  # the stable names; the old ones are deprecated
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor

        FastAPIInstrumentor.instrument_app(
            app,
            tracer_provider=self._provider,
            excluded_urls=own_paths,
            exclude_spans=["receive", "send"],
            server_request_hook=_without_secrets,
        )

    async def close(self, timeout_s: float) -> None:
        """Send what waits, in that time. The thread is a daemon: it does not keep the process."""
        self._closed = True
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        ended.add_done_callback(ignore_result)

        def shut_down() -> None:
            try:
                self._processor.shutdown()  # type: ignore[no-untyped-call]
            finally:
                try:
                    loop.call_soon_threadsafe(_settle, ended)
                except RuntimeError:
                    pass  # the loop is closed: nobody waits any more

        threading.Thread(target=shut_down, name="span-flush", daemon=True).start()
        await asyncio.wait({ended}, timeout=timeout_s)
        self._last_words.close()


def _settle(ended: asyncio.Future[None]) -> None:
    if not ended.done():
        ended.set_result(None)


class _Counted(SpanExporter):
    """Hands batches to the exporters and counts what came of them. In the processor's thread."""

    def __init__(
        self,
        exporters: Sequence[SpanExporter],
        outcomes: dict[str, int],
        take: Callable[[int], None],
        last_words: LastWords,
    ) -> None:
        self._exporters = exporters
        self._outcomes = outcomes
        self._take = take
        self._last_words = last_words

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._take(len(spans))
        failed = max(self._failed(exporter, spans) for exporter in self._exporters)
        self._outcomes["failed"] += failed
        self._outcomes["exported"] += len(spans) - failed
        return SpanExportResult.FAILURE if failed else SpanExportResult.SUCCESS

    def _failed(self, exporter: SpanExporter, spans: Sequence[ReadableSpan]) -> int:
        """How many of them did not arrive."""
        try:
            if exporter.export(spans) is not SpanExportResult.SUCCESS:
                return len(spans)
        except Exception as error:
            self._last_words.complain(type(error).__name__)
            return len(spans)
        partial: ExportTracePartialSuccess | None = getattr(exporter, "partial", None)
        if partial is None or partial.rejected_spans <= 0:
            return 0
        rejected = min(partial.rejected_spans, len(spans))
        self._last_words.complain(f"{rejected} of {len(spans)} spans rejected: {partial.error_message}")
        return rejected

    def shutdown(self) -> None:
        for exporter in self._exporters:
            exporter.shutdown()


class _Whole(SpanExporter):
    """For exporters that read spans."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return self._exporter.export(whole(spans))

    def shutdown(self) -> None:
        self._exporter.shutdown()


class LastWords(logging.Handler):
    """What OpenTelemetry's libraries log, at most once in COMPLAINT_EVERY_S: they write a line per batch, and more."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._complained_at = -COMPLAINT_EVERY_S
        self._source = logging.getLogger("opentelemetry")
        self._propagated = self._source.propagate
        self._source.propagate = False
        self._source.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        about_export = record.name.startswith("opentelemetry.exporter")
        self.complain(record.getMessage() if about_export else _without_values(record))

    def complain(self, reason: str) -> None:
        now = time.monotonic()
        if now - self._complained_at >= COMPLAINT_EVERY_S:
            self._complained_at = now
            logger.warning("spans may be lost", extra={"reason": reason})

    def close(self) -> None:
        self._source.removeHandler(self)
        self._source.propagate = self._propagated
        super().close()


def _without_values(record: logging.LogRecord) -> str:
    """Of what it quotes, names of variables alone: a header among the values may be a key."""
    given = record.args if isinstance(record.args, tuple) else ()
    told = tuple(arg if isinstance(arg, str) and _VARIABLE.fullmatch(arg) else "..." for arg in given)
    try:
        return str(record.msg) % told
    except (TypeError, ValueError):
        return str(record.msg)


class _Keeping(SpanProcessor):
    """Takes over the spans that FastAPI's instrumentation made."""

    def __init__(self, export: SpanExport) -> None:
        self._export = export

    def on_end(self, span: ReadableSpan) -> None:
        if span.context is not None and span.context.trace_flags.sampled:
            self._export.keep_span(span)


class _SdkSampler(Sampler):
    """Our decision, as the SDK asks for it."""

    def __init__(self, sampler: HeadSampler) -> None:
        self._sampler = sampler

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Any = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        parent = current_span(parent_context).get_span_context()
        sampled = self._sampler.samples(f"{trace_id:032x}", parent.trace_flags.sampled if parent.is_valid else None)
        decision = Decision.RECORD_AND_SAMPLE if sampled else Decision.DROP
        return SamplingResult(decision, attributes if sampled else None, parent.trace_state)

    def get_description(self) -> str:
        return "agentcore"


def _without_secrets(span: Any, scope: Mapping[str, Any]) -> None:
    """The instrumentation writes down what the client sent; a key in the wrong place is still a key."""
    if span is None or not span.is_recording():
        return
    for name in ("url.path", "url.query", "user_agent.original"):
        value = (span.attributes or {}).get(name)
        if value:
            span.set_attribute(name, redact_text(value))


def open_span_export(sampler: HeadSampler, environ: Mapping[str, str], version: str) -> SpanExport | None:
    """By OpenTelemetry's variables; None, and a line in the log, when none of the exporters can be had.

    Raises ValueError for what the SDK refuses."""
    last_words = LastWords()
    exporters: list[SpanExporter] = []
    for name in _names_in(environ.get("OTEL_TRACES_EXPORTER", "otlp")):
        try:
            exporters.append(_exporter(name, environ))
        except Exception as error:  # bad variables, each library in its own way: serving does not depend on it
            reason = str(error) if isinstance(error, NotSupported) else type(error).__name__
            logger.error("no spans go there", extra={"exporter": name, "reason": reason})
    for noisy in ("httpcore", "urllib3", "requests"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if not exporters:
        last_words.close()
        return None
    try:
        return SpanExport(exporters, _resource(version), sampler, environ, last_words)
    except ValueError:
        last_words.close()
        raise


class NotSupported(Exception):
    """A variable asks for what is not here; says what is."""


def _names_in(text: str) -> Iterable[str]:
    return (name.strip().lower() for name in text.split(",") if name.strip())


def _exporter(name: str, environ: Mapping[str, str]) -> SpanExporter:
    if name == "console":
        # Not by sys.stdout: events would cut spans in two, and one that nobody reads would keep the process.
        lines = cast(IO[str], stdout_lines())
        return _Whole(ConsoleSpanExporter(out=lines, formatter=lambda span: span.to_json(indent=None) + "\n"))
    if name != "otlp":
        raise NotSupported("OTEL_TRACES_EXPORTER takes otlp, console and none")
    protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if protocol == "grpc":
        return _grpc_exporter()
    if protocol not in (None, "", "http/protobuf"):
        raise NotSupported("OTEL_EXPORTER_OTLP_PROTOCOL takes http/protobuf and grpc")
    return _http_exporter(environ)


def _http_exporter(environ: Mapping[str, str]) -> SpanExporter:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    from app.telemetry.span_transport import HttpcoreTransport, LastAnswer, is_able

    encoder = Encoder()

    class HttpExporter(OTLPSpanExporter):
        """The library's but for its encoder, which has no place to hang another one in."""

        partial: ExportTracePartialSuccess | None = None
        """What the receiver said of the last batch, which it may take without some of its spans."""

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            client = getattr(self, "_client", None)
            if client is None:  # another version keeps it elsewhere
                return super().export(whole(spans))
            if not isinstance(client._transport, LastAnswer):
                client._transport = LastAnswer(client._transport)
            sent = client.export(encoder.encode(spans).SerializeToString())
            self.partial = _partial(client._transport.protobuf) if sent.success else None
            return SpanExportResult.SUCCESS if sent.success else SpanExportResult.FAILURE

    return HttpExporter(_transport=HttpcoreTransport(environ)) if is_able(environ) else HttpExporter()


def _partial(answer: bytes) -> ExportTracePartialSuccess | None:
    try:
        read: ExportTraceServiceResponse = ExportTraceServiceResponse.FromString(answer)
    except DecodeError:
        return None
    return read.partial_success


def _grpc_exporter() -> SpanExporter:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    encoder = Encoder()

    class GrpcExporter(OTLPSpanExporter):
        """The library's but for its encoder, and it does not drop what the receiver answered."""

        partial: ExportTracePartialSuccess | None = None

        def _initialize_channel_and_stub(self) -> None:
            super()._initialize_channel_and_stub()  # type: ignore[no-untyped-call]
            client: Any = self._client
            send = client.Export

            def send_and_keep(**request: Any) -> ExportTraceServiceResponse:
                answer: ExportTraceServiceResponse = send(**request)
                self.partial = answer.partial_success
                return answer

            client.Export = send_and_keep

        def _translate_data(self, data: Sequence[ReadableSpan]) -> ExportTraceServiceRequest:
            return encoder.encode(data)

    return GrpcExporter()


def _resource(version: str) -> Resource:
    """What OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME say, over what we say of ourselves."""
    ours = {SERVICE_NAME: SERVICE, "service.version": version, "service.instance.id": str(uuid.uuid4())}
    said = Resource.create()
    if str(said.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        return said.merge(Resource({SERVICE_NAME: SERVICE})).merge(
            Resource({name: value for name, value in ours.items() if name not in said.attributes})
        )
    return Resource({**ours, **said.attributes})
