"""What of OpenTelemetry's variables cannot be followed as it is written. Nothing of OpenTelemetry is imported for it.

`tracing` tells it in the log, `doctor` as a finding. Values are never shown: a header among them may be a key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

from app.telemetry.spans import is_ratio, is_sampler, samplers

QUEUE_SPANS = 2048
BATCH_SPANS = 512
GATHER_MS = 5000
EXPORT_MS = 30_000

COUNTS = {
    "OTEL_BSP_MAX_QUEUE_SIZE": QUEUE_SPANS,
    "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": BATCH_SPANS,
    "OTEL_BSP_SCHEDULE_DELAY": GATHER_MS,
    "OTEL_BSP_EXPORT_TIMEOUT": EXPORT_MS,
}
"""With the defaults that OpenTelemetry has for them."""

COUNT_MAX = 2**31 - 1
"""More fits neither a queue nor a timer, and OpenTelemetry fails of it."""

PROPAGATORS = frozenset({"tracecontext", "baggage"})
COMPRESSIONS = ("gzip", "deflate", "none")
OTLP = ("OTEL_EXPORTER_OTLP_", "OTEL_EXPORTER_OTLP_TRACES_")


def is_exporting(environ: Mapping[str, str]) -> bool:
    """The default exporter waits for an endpoint to be named: a service alone on a laptop has no collector."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    named = environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if named:
        return named != "none"
    return bool(environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"))


def count_in(environ: Mapping[str, str], name: str) -> int:
    """A number of COUNTS: what is given, or its default where that cannot be."""
    text = environ.get(name, "")
    return int(text) if _is_count(text) else COUNTS[name]


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= len(str(COUNT_MAX)) and 0 < int(text) <= COUNT_MAX


def foreign_propagators(text: str) -> bool:
    """Whether OTEL_PROPAGATORS asks for anything but W3C Trace Context."""
    return not {name.strip() for name in text.lower().split(",") if name.strip()} <= PROPAGATORS


def odd_variables(environ: Mapping[str, str]) -> Iterator[str]:
    """What is not followed, each with its name and what to write."""
    sampler, ratio = environ.get("OTEL_TRACES_SAMPLER", ""), environ.get("OTEL_TRACES_SAMPLER_ARG", "")
    if sampler and not is_sampler(sampler):
        yield f"OTEL_TRACES_SAMPLER: must be one of {', '.join(samplers())}; TRACE_SAMPLE_RATIO holds"
    if ratio and not is_ratio(ratio):
        yield "OTEL_TRACES_SAMPLER_ARG: must be a number from 0 to 1; TRACE_SAMPLE_RATIO holds"
    if is_exporting(environ):
        yield from _odd_for_export(environ)


def _odd_for_export(environ: Mapping[str, str]) -> Iterator[str]:
    for name, otherwise in COUNTS.items():
        if (text := environ.get(name)) and not _is_count(text):
            yield f"{name}: must be a whole number from 1 to {COUNT_MAX}; {otherwise} holds"
    by_grpc = _otlp(environ, "PROTOCOL").values()
    for name, text in _otlp(environ, "ENDPOINT").items():
        if "grpc" not in by_grpc and not _is_web_url(text):
            yield f"{name}: must be http:// or https:// and a host; spans are lost"
    for name, text in _otlp(environ, "COMPRESSION").items():
        if text.strip().lower() not in COMPRESSIONS:
            yield f"{name}: must be one of {', '.join(COMPRESSIONS)}"
    for name, text in _otlp(environ, "TIMEOUT").items():
        if not _is_seconds(text):
            yield f"{name}: must be a number of seconds"


def _otlp(environ: Mapping[str, str], name: str) -> dict[str, str]:
    """What is said of all signals, and of traces alone."""
    return {prefix + name: text for prefix in OTLP if (text := environ.get(prefix + name))}


def _is_web_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _is_seconds(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False
