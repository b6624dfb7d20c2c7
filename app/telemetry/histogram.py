"""A histogram of plain numbers, observed by the event loop alone and read at scrape."""

from __future__ import annotations

from bisect import bisect_left
from time import time
from typing import NamedTuple

from prometheus_client.core import Exemplar


class Seen(NamedTuple):
    """The last sampled observation of a bucket: an exemplar of OpenMetrics."""

    value: float
    trace_id: str
    at_s: float


Bucket = tuple[str, float] | tuple[str, float, Exemplar]
"""Upper bound, cumulated count and, where a sampled call fell into it, that call."""


class Histogram:
    """Counts per bucket and a sum; cumulated only when read."""

    __slots__ = ("bounds", "counts", "seen", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.seen: dict[int, Seen] = {}
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def observe_traced(self, value: float, trace_id: str) -> None:
        """`observe` for a call whose trace is kept: the bucket shows the id, which needs no escapes."""
        bucket = bisect_left(self.bounds, value)
        self.counts[bucket] += 1
        self.total += value
        self.seen[bucket] = Seen(value, trace_id, time())

    def buckets(self) -> list[Bucket]:
        """Cumulated, as the exposition format wants them."""
        cumulated = 0
        rows: list[Bucket] = []
        for bucket, (bound, count) in enumerate(zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True)):
            cumulated += count
            rows.append((bound, cumulated))
            if (seen := self.seen.get(bucket)) is not None:
                rows[-1] = (bound, cumulated, Exemplar({"trace_id": seen.trace_id}, seen.value, seen.at_s))
        return rows
