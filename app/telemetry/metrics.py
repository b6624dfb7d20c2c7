"""Every metric of the service, once: what is counted and its labels. `scraping` makes text of it for Prometheus.

Series are plain Python numbers, touched by the event loop alone and read at scrape: 0.2 µs an observation, where the
client library's locked children cost 1.4 (docs/adr/0007-own-counters.md). Label values come from the registry or from
enums, so their number is bounded.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from app.calls import STATUSES, Execution, Status
from app.errors import ERROR_TYPES
from app.telemetry.histogram import Histogram
from app.telemetry.http_requests import HttpRequests

disable_created_metrics()  # type: ignore[no-untyped-call]
"""Of the series that the library keeps: a third more lines, which Prometheus does not read."""

STAGES = (
    "authentication",
    "registry",
    "validation",
    "limits",
    "execution",
    "serialisation",
    "log",
    "tracing",
    "metrics",
)
"""Parts of a call that `framework_stage_seconds` tells apart, in their order. Authentication is one look-up for a
request, however many calls are in it. Reading a request and writing its answer are in the whole overhead alone."""

STAGES_OF_CALLS = ("registry", "validation", "limits", "execution", "serialisation")
"""Those that `observe_stages` observes."""

RUN_STATUSES: tuple[Status, ...] = tuple(status for status in STATUSES if status != "skipped")

REUSES = ("hit", "stale", "miss", "joined", "replayed")
"""How a call met what was there: a kept result, fresh or stale, or none where one might be; the run of an identical
call; the outcome of the first call with its idempotency key."""

LOG_OUTCOMES = ("written", "duplicate", "dead", "dropped")
"""What became of rows of the log."""

SPAN_OUTCOMES = ("exported", "failed", "dropped")
"""What became of spans; dropped found the queue full."""

POOL_STATES = ("in_use", "idle", "unopened")
"""Of a connection that the pool may have; they add up to its bound."""

OVERHEAD_BUCKETS_S = (50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 80e-3, 0.1, 0.25, 1.0)
"""From what a call costs here to past the alert at 100 ms."""

STAGE_BUCKETS_S = (0.5e-6, 1e-6, 2.5e-6, 5e-6, 10e-6, 25e-6, 50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 5e-3, 25e-3, 0.1, 1.0)
"""From a look-up in memory, past a round trip to Redis, to the patience of the queue."""

DURATION_BUCKETS_S = (250e-6, 1e-3, 5e-3, 10e-3, 25e-3, 50e-3, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Marks(Protocol):
    """When a call came to where, `time.perf_counter()` seconds, 0 where it did not come to that: looked up since
    `began`, `found`, its parameters `validated`, its limits `asked`, `started`, `run_ended`, its result `encoded`."""

    began: float
    found: float
    validated: float
    asked: float
    started: float
    run_ended: float
    encoded: float
    attempts: int


class ToolSeries:
    """The series of one tool, held by the executor beside the tool, never looked up by label."""

    __slots__ = ("breaker_state", "duration", "executions", "keeps_results", "retries", "reuse")

    def __init__(self) -> None:
        self.executions: dict[Status, int] = dict.fromkeys(RUN_STATUSES, 0)
        self.keeps_results = False
        self.reuse = dict.fromkeys(REUSES, 0)
        self.retries = 0
        self.breaker_state: Callable[[], int] = int
        """0 closed, 1 half open, 2 open; of the tenant for whom it is worst."""
        self.duration = Histogram(DURATION_BUCKETS_S)

    @property
    def ran(self) -> bool:
        """Whether there is a duration to show."""
        return any(self.duration.counts)


def _zero() -> float:
    return 0.0


def _no_rows() -> Mapping[str, int]:
    return dict.fromkeys(LOG_OUTCOMES, 0)


def _no_spans() -> Mapping[str, int]:
    return dict.fromkeys(SPAN_OUTCOMES, 0)


def _no_pool() -> Mapping[str, int]:
    return dict.fromkeys(POOL_STATES, 0)


class Metrics(Collector):
    """All series of one service.

    What others count is read when Prometheus asks, through functions that the composition root hangs in:
    `gauges[name]` and `counters[name]` for the names in GAUGES and COUNTERS, `log_rows` (LogWriter.counts, by
    LOG_OUTCOMES), `database_pool` (by POOL_STATES), `limit_decisions`, `wire_refusals`. What is not hung in shows 0.

    `registry` is for what the client library keeps itself, of process and Python, and for `http_*` of the REST routes.
    """

    def __init__(self) -> None:
        self.tools: dict[str, ToolSeries] = {}
        self.overhead = Histogram(OVERHEAD_BUCKETS_S)
        self.stages = {stage: Histogram(STAGE_BUCKETS_S) for stage in STAGES}
        self._of_calls = tuple(self.stages[stage] for stage in STAGES_OF_CALLS)
        self.errors = dict.fromkeys(ERROR_TYPES, 0)
        self.busy_s = 0.0
        self.abandoned = 0
        self.limit_decisions: Mapping[str, Mapping[str, int]] = {}
        self.log_rows: Callable[[], Mapping[str, int]] = _no_rows
        self.trace_spans: Callable[[], Mapping[str, int]] = _no_spans
        self.database_pool: Callable[[], Mapping[str, int]] = _no_pool
        self.wire_refusals: Callable[[], Mapping[str, int]] = dict
        self.gauges: dict[str, Callable[[], float]] = {}
        self.counters: dict[str, Callable[[], float]] = {}
        self.registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.http_requests = HttpRequests()
        self.registry.register(self.http_requests)

    def observe_stages(self, marks: Marks, run_s: float) -> None:
        """Of one call, at its end: as far as it came, and `execution` where it ran. Written out, for a function of its
        own for each would cost every call a microsecond."""
        registry, validation, limits, execution, serialisation = self._of_calls
        bounds = STAGE_BUCKETS_S
        if marks.validated:
            seconds = marks.found - marks.began
            registry.counts[bisect_left(bounds, seconds)] += 1
            registry.total += seconds
            seconds = marks.validated - marks.found
            validation.counts[bisect_left(bounds, seconds)] += 1
            validation.total += seconds
        elif marks.found:
            registry.observe(marks.found - marks.began)
        if marks.started:
            seconds = marks.started - marks.asked
            limits.counts[bisect_left(bounds, seconds)] += 1
            limits.total += seconds
        if marks.attempts:
            execution.counts[bisect_left(bounds, run_s)] += 1
            execution.total += run_s
        if marks.encoded:
            seconds = marks.encoded - marks.run_ended
            serialisation.counts[bisect_left(bounds, seconds)] += 1
            serialisation.total += seconds

    def observe_overhead(self, seconds: float, kept_trace: str | None) -> None:
        """Of one call; with the id of its trace when its span is kept."""
        if kept_trace is None:
            self.overhead.observe(seconds)
        else:
            self.overhead.observe_traced(seconds, kept_trace)

    def count_error(self, error_type: str) -> None:
        self.errors[error_type] += 1

    def count_outcome(self, execution: Execution) -> None:
        """Count what went wrong with a call, if anything did."""
        if execution.error is not None:
            self.errors[execution.error.category] += 1
        elif execution.refusal is not None:
            self.errors[execution.refusal.kind.error_type] += 1

    def count_abandoned(self) -> None:
        self.abandoned += 1

    def for_tool(self, tool_id: str) -> ToolSeries:
        return self.tools.setdefault(tool_id, ToolSeries())

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily]:
        """All but the series of the tools, which app/telemetry/scraping.py writes, and those of `registry`."""
        yield _histogram("framework_overhead_seconds", OVERHEAD_HELP, [((), self.overhead)])
        stages = [((stage,), histogram) for stage, histogram in self.stages.items()]
        yield _histogram("framework_stage_seconds", "Time in one stage of a call", stages, ("stage",))
        yield _histogram(
            "registry_lookup_duration_seconds", "Finding a tool by its id", [((), self.stages["registry"])]
        )
        errors = [((error_type,), count) for error_type, count in self.errors.items()]
        yield _counter("tool_errors_total", "Calls refused or failed, by what went wrong", errors, ("error_type",))
        yield _counter("tool_execution_busy_seconds_total", "Time that tools ran, summed", [((), self.busy_s)])
        yield _counter("tool_abandoned_runs_total", "Runs that ignored their cancellation", [((), self.abandoned)])
        decisions = [
            ((kind, outcome), count)
            for kind, outcomes in self.limit_decisions.items()
            for outcome, count in outcomes.items()
        ]
        yield _counter(
            "limit_decisions_total", "Limits met by calls, by what came of it", decisions, ("kind", "outcome")
        )
        refused = [((reason,), count) for reason, count in self.wire_refusals().items()]
        yield _counter("http_wire_refusals_total", "Peers refused or cut by a bound of HTTP", refused, ("reason",))
        rows = [((outcome,), count) for outcome, count in self.log_rows().items()]
        yield _counter("execution_log_rows_total", "Rows of the log, by what became of them", rows, ("outcome",))
        spans = [((outcome,), count) for outcome, count in self.trace_spans().items()]
        yield _counter("trace_spans_total", "Spans, by what became of them", spans, ("outcome",))
        pool = GaugeMetricFamily("database_connection_pool_size", "Connections by state", labels=("state",))
        for state, connections in self.database_pool().items():
            pool.add_metric((state,), connections)
        yield pool
        for name, text in COUNTERS.items():
            yield _counter(name, text, [((), self.counters.get(name, _zero)())])
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(name, text, value=self.gauges.get(name, _zero)())


OVERHEAD_HELP = "Everything but the tool's own run, until the answer is handed over"

GAUGES = {
    "tool_execution_concurrency": "Calls running and queued; the autoscaler's metric",
    "tool_execution_limit": "Calls that may run at once",
    "tool_execution_queue_depth": "Calls waiting for a slot",
    "adaptive_limit": "Calls that should run at once, by how late the event loop is",
    "adaptive_rate_factor": "Part of their rate that adaptive policies should allow",
    "adaptive_delay_seconds": "What a call is delayed by, without its run and its wait for a slot",
    "limit_store_up": "1 while the store of limits answers",
    "execution_log_lag_seconds": "Age of the oldest record that is no row yet",
    "execution_log_journal_bytes": "Bytes in the journal that are no rows yet",
    "execution_log_journal_limit_bytes": "Bytes that the journal may hold",
    "system_cpu_percent": "CPU in use, of what the container may use",
    "system_memory_percent": "Memory in use, of what the container may use",
    "tool_abandoned_runs_active": "Given-up runs that still hold a task or a thread",
    "event_loop_lag_seconds": "Worst delay of the event loop in the last 15 s",
    "registered_tools": "Tools in the registry",
    "result_cache_bytes": "Bytes of kept results in this process",
    "result_cache_entries": "Kept results in this process",
    "egress_breakers_open": "Origins that one tenant's tools do not ask at this time",
}

COUNTERS = {
    "result_cache_refused_total": "Kept results from Redis that could not be believed",
    "log_lines_dropped_total": "Log lines lost because nobody reads stdout",
}


def _counter(
    name: str, text: str, rows: Iterable[tuple[tuple[str, ...], float]], labels: tuple[str, ...] = ()
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, count in rows:
        family.add_metric(values, count)
    return family


def _histogram(
    name: str, text: str, rows: Iterable[tuple[tuple[str, ...], Histogram]], labels: tuple[str, ...] = ()
) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, text, labels=labels)
    for values, histogram in rows:
        family.add_metric(values, buckets=histogram.buckets(), sum_value=histogram.total)
    return family
