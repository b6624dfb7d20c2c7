"""Every metric of the service, once: what is counted and its labels. `scraping` makes text of it for Prometheus.

Series are plain Python numbers, touched by the event loop alone and read at scrape: 0.2 µs an observation, where the
client library's locked children cost 1.4 (docs/adr/0007-own-counters.md). Label values come from the registry or from
enums, so their number is bounded.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from app.calls import STATUSES, Execution, Status
from app.errors import ERROR_TYPES

STAGES = ("registry", "validation", "limits", "execution", "serialisation", "metrics")
"""Parts of a call that `framework_stage_seconds` tells apart, in their order."""

RUN_STATUSES: tuple[Status, ...] = tuple(status for status in STATUSES if status != "skipped")

OVERHEAD_BUCKETS_S = (50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 80e-3, 0.1, 0.25, 1.0)
"""From what a call costs here to past the alert at 100 ms."""

STAGE_BUCKETS_S = (1e-6, 2.5e-6, 5e-6, 10e-6, 25e-6, 50e-6, 100e-6, 250e-6, 1e-3, 5e-3, 25e-3, 0.1)
LOOKUP_BUCKETS_S = (0.5e-6, 1e-6, 2.5e-6, 5e-6, 10e-6, 50e-6, 250e-6, 1e-3, 5e-3, 10e-3)
DURATION_BUCKETS_S = (250e-6, 1e-3, 5e-3, 10e-3, 25e-3, 50e-3, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Histogram:
    """Counts per bucket and a sum; cumulated only when read."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """`(upper bound, cumulated count)` as the exposition format wants them."""
        cumulated = 0
        rows: list[tuple[str, float]] = []
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            cumulated += count
            rows.append((bound, cumulated))
        return rows


class ToolSeries:
    """The series of one tool, held by the executor beside the tool, never looked up by label."""

    __slots__ = ("duration", "executions")

    def __init__(self) -> None:
        self.executions: dict[Status, int] = dict.fromkeys(RUN_STATUSES, 0)
        self.duration = Histogram(DURATION_BUCKETS_S)

    @property
    def ran(self) -> bool:
        """Whether there is a duration to show."""
        return any(self.executions.values())


def _zero() -> float:
    return 0.0


class Metrics(Collector):
    """All series of one service. Gauges are functions that the composition root hangs in."""

    def __init__(self) -> None:
        self.tools: dict[str, ToolSeries] = {}
        self.overhead = Histogram(OVERHEAD_BUCKETS_S)
        self.lookup = Histogram(LOOKUP_BUCKETS_S)
        self.stages = {stage: Histogram(STAGE_BUCKETS_S) for stage in STAGES}
        self.errors = dict.fromkeys(ERROR_TYPES, 0)
        self.busy_s = 0.0
        self.abandoned = 0
        self.limit_decisions: Mapping[str, Mapping[str, int]] = {}
        self.wire_refusals: Callable[[], Mapping[str, int]] = dict
        self.gauges: dict[str, Callable[[], float]] = {}
        self.counters: dict[str, Callable[[], float]] = {}
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

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
        """All but the series of the tools, which app/telemetry/scraping.py writes."""
        yield _histogram("framework_overhead_seconds", OVERHEAD_HELP, [((), self.overhead)])
        stages = [((stage,), histogram) for stage, histogram in self.stages.items()]
        yield _histogram("framework_stage_seconds", "Time in one stage of a call", stages, ("stage",))
        yield _histogram("registry_lookup_duration_seconds", "Finding a tool by its id", [((), self.lookup)])
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
        for name, text in COUNTERS.items():
            yield _counter(name, text, [((), self.counters.get(name, _zero)())])
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(name, text, value=self.gauges.get(name, _zero)())


OVERHEAD_HELP = "Everything but the tool's own run, until the answer is handed over"

GAUGES = {
    "tool_execution_concurrency": "Calls running and queued; the autoscaler's metric",
    "tool_execution_limit": "Calls that may run at once",
    "tool_execution_queue_depth": "Calls waiting for a slot",
    "limit_store_up": "1 while the store of limits answers",
    "tool_abandoned_runs_active": "Given-up runs that still hold a task or a thread",
    "event_loop_lag_seconds": "Worst delay of the event loop in the last 15 s",
    "registered_tools": "Tools in the registry",
}

COUNTERS = {
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
