"""What a running service takes and shows, looked at twice a second from outside: CPU, memory, calls under way, pool.

`tables` uses it around a load. Knows no load. Values of a service that did not answer in time are left out.
"""

from __future__ import annotations

import re
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Self

import httpx

from load.machine import cpu_s, rss_mb

EVERY_S = 0.5
ANSWER_S_MAX = 5.0
STEADY_SHARE = 0.9
"""Of the calls wanted: fewer are on the way up or down."""


class Look(NamedTuple):
    """One look: shares of a core and of the pool since the look before."""

    cpu: float
    rss_mb: float
    concurrency: float
    pool: float


@dataclass(frozen=True)
class Seen:
    """All looks of a while."""

    looks: Sequence[Look]

    def steady(self, level: int) -> Seen:
        """While about so many calls were under way; all looks where that never was."""
        return Seen([look for look in self.looks if look.concurrency >= STEADY_SHARE * level] or self.looks)

    @property
    def cpu_mean(self) -> float:
        return statistics.fmean([look.cpu for look in self.looks] or [0.0])

    @property
    def cpu_max(self) -> float:
        return max((look.cpu for look in self.looks), default=0.0)

    @property
    def rss_mb_max(self) -> float:
        return max((look.rss_mb for look in self.looks), default=0.0)

    @property
    def concurrency_max(self) -> float:
        return max((look.concurrency for look in self.looks), default=0.0)

    @property
    def pool_max(self) -> float:
        return max((look.pool for look in self.looks), default=0.0)


@dataclass
class Watch:
    """Looks while the block runs."""

    pid: int
    url: str
    looks: list[Look] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._watch, name="watch")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def seen(self) -> Seen:
        return Seen(self.looks)

    def _watch(self) -> None:
        with httpx.Client(base_url=self.url, trust_env=False, timeout=ANSWER_S_MAX) as http:
            used_s, at_s = cpu_s(self.pid), time.monotonic()
            while not self._ended.wait(EVERY_S):
                try:
                    gauges = _gauges(http.get("/metrics").text)
                except httpx.HTTPError:
                    continue
                used, now = cpu_s(self.pid), time.monotonic()
                cpu = (used - used_s) / (now - at_s)
                used_s, at_s = used, now
                self.looks.append(Look(cpu, rss_mb(self.pid), *gauges))


def _gauges(text: str) -> tuple[float, float]:
    """Calls under way, and the share of the pool that is in use."""
    running = re.search(r"^tool_execution_concurrency (\S+)$", text, re.MULTILINE)
    states = dict(re.findall(r'^database_connection_pool_size\{state="(\w+)"\} (\S+)$', text, re.MULTILINE))
    bound = sum(map(float, states.values()))
    return float(running[1]) if running else 0.0, float(states.get("in_use", 0)) / bound if bound else 0.0
