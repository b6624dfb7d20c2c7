"""`http_*` of the REST routes: the names and labels of prometheus-fastapi-instrumentator's default metrics.

The instrumentator tells of what goes through FastAPI; the execute path, which stands ahead of it, tells of itself.
Series are plain numbers, as those in `metrics.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from app.telemetry.histogram import Histogram

REQUEST_BUCKETS_S = (1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ROUTE_BUCKETS_S = (5e-3, 25e-3, 0.1, 1.0)
"""Few, for there is one of each for every route and method."""

COUNTED_METHODS = frozenset({"GET", "POST", "DELETE"})
"""Anything else is counted as one: who calls may name dozens."""


class _Route:
    """The series of one route."""

    __slots__ = ("durations", "request_bytes", "requests", "response_bytes")

    def __init__(self) -> None:
        self.requests: dict[tuple[str, str], int] = {}
        """By method and class of status."""
        self.durations: dict[str, Histogram] = {}
        """By method."""
        self.request_bytes = 0
        self.response_bytes = 0


class HttpRequests(Collector):
    """What was answered. A route is a template or a word, so that paths make no series."""

    def __init__(self) -> None:
        self._routes: dict[str, _Route] = {}
        self._durations = Histogram(REQUEST_BUCKETS_S)

    def observe(
        self, route: str, method: str, status: str, seconds: float, request_bytes: int, response_bytes: int
    ) -> None:
        """One answer; `status` is its class, as `2xx`."""
        if method not in COUNTED_METHODS:
            method = "other"
        known = self._routes.get(route)
        if known is None:
            known = self._routes[route] = _Route()
        requests, answer = known.requests, (method, status)
        requests[answer] = requests.get(answer, 0) + 1
        known.request_bytes += request_bytes
        known.response_bytes += response_bytes
        self._durations.observe(seconds)
        durations = known.durations.get(method)
        if durations is None:
            durations = known.durations[method] = Histogram(ROUTE_BUCKETS_S)
        durations.observe(seconds)

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "http_requests_total", "REST requests that were let in", labels=("handler", "method", "status")
        )
        received = SummaryMetricFamily("http_request_size_bytes", "Bodies of REST requests", labels=("handler",))
        sent = SummaryMetricFamily("http_response_size_bytes", "Bodies of REST answers", labels=("handler",))
        by_route = HistogramMetricFamily(
            "http_request_duration_seconds", "REST requests by route and method", labels=("handler", "method")
        )
        for route, series in self._routes.items():
            for (method, status), count in series.requests.items():
                requests.add_metric((route, method, status), count)
            answered = sum(series.requests.values())
            received.add_metric((route,), count_value=answered, sum_value=series.request_bytes)
            sent.add_metric((route,), count_value=answered, sum_value=series.response_bytes)
            for method, durations in series.durations.items():
                by_route.add_metric((route, method), buckets=durations.buckets(), sum_value=durations.total)
        together = HistogramMetricFamily("http_request_duration_highr_seconds", "REST requests, all routes together")
        together.add_metric((), buckets=self._durations.buckets(), sum_value=self._durations.total)
        yield from (requests, received, sent, by_route, together)
