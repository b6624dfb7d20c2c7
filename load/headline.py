"""`python -m load.headline`: the origin's own test, 1,000 users and 500 echo calls a second, beside what it reports.

Each user has a connection of its own; calls are due by a schedule that does not wait for the server, and a latency
counts from when its call was due. Everything is on. The last row is the origin's design, built as documented.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any

from load.client import RIGHT, Outcome, Plan
from load.harness import Asking, Running, bench, command, drive, heading, quantile, write_json
from load.machine import cpu_s, rss_mb, settle
from load.wire import ASGI, single

USERS = 1_000
RATE = 500.0
WARM_S = 2.0

ORIGIN = ("origin, as reported", 18.0, 42.0, 87.0, 156.0, 78.0, 3_200.0)
"""p50, p95, p99, max (ms), CPU (%), memory (MB)."""

GOALS = "goals: p95 under 4 ms, p99 under 8 ms, under 120 MB"


@dataclass(frozen=True)
class Row:
    """Latencies in ms, of right answers; CPU in percent of a core; memory of the process after the run."""

    name: str
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float
    cpu_percent: float
    rss_mb: float
    calls_per_s: float
    failed: int
    client_late_p99_ms: float

    def line(self) -> str:
        times = "".join(f"{one:10.2f}" for one in (self.p50_ms, self.p95_ms, self.p99_ms, self.max_ms))
        rest = f"{self.cpu_percent:8.0f}{self.rss_mb:8.0f}{self.calls_per_s:9.0f}{self.failed:8d}"
        return f"{self.name:28}{times}{rest}{self.client_late_p99_ms:14.2f}"


def visit(server: Running, asking: Asking, rate: float, users: int, seconds: float) -> Row:
    plan = Plan(server.port, asking.requests(), users, phases=[(rate, min(WARM_S, seconds))])
    drive(plan)
    settle(server.pid)
    before_s, began = cpu_s(server.pid), time.perf_counter()
    plan.phases = [(rate, seconds)]
    outcome = drive(plan)
    return summary(server, outcome, (cpu_s(server.pid) - before_s) / (time.perf_counter() - began))


def summary(server: Running, outcome: Outcome, used: float) -> Row:
    took = sorted(us for us, ended in zip(outcome.took_us, outcome.ended, strict=True) if ended == RIGHT)
    p50, p95, p99 = (quantile(took, q) / 1e3 for q in (0.5, 0.95, 0.99))
    failed = len(outcome.ended) - len(took)
    late_ms = outcome.late_p99_us / 1e3
    most = took[-1] / 1e3 if took else 0.0
    rate = len(took) / outcome.seconds
    return Row(server.name, p50, p95, p99, most, used * 100, rss_mb(server.pid), rate, failed, late_ms)


def print_rows(rows: list[Row], rate: float, users: int, seconds: float) -> None:
    print(heading(f"{users:,} users, {rate:g} echo calls/s for {seconds:g} s"))
    times_columns = "".join(f"{name + ' ms':>10}" for name in ("p50", "p95", "p99", "max"))
    print(f"{'':28}{times_columns}{'CPU %':>8}{'MB':>8}{'calls/s':>9}{'failed':>8}{'client p99 ms':>14}")
    name, *times, cpu, memory = ORIGIN
    print(f"{name:28}" + "".join(f"{one:10.0f}" for one in times) + f"{cpu:8.0f}{memory:8.0f}{RATE:9.0f}")
    for row in rows:
        print(row.line())
    print(f"{GOALS}; `client p99` is how late the client itself sent\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0, help="for each server")
    parser.add_argument("--users", type=int, default=USERS)
    parser.add_argument("--rate", type=float, default=RATE, help="calls a second, of all users together")
    parser.add_argument("--json", help="a file for all figures")
    options = parser.parse_args()
    rows: list[Row] = []
    with bench() as own:
        asked = single(own)
        visits: list[tuple[Running, Asking]] = [
            (own.bare(), Asking(right='"message":"hello world"')),
            (own.service("everything, lane", own.everything()), asked),
            (own.service("everything, ASGI", own.everything(**ASGI)), asked),
            (own.origin_design(), asked),
        ]
        for server, asking in visits:
            rows.append(visit(server, asking, options.rate, options.users, options.seconds))
            settle(server.pid)
    print_rows(rows, options.rate, options.users, options.seconds)
    shown: list[dict[str, Any]] = [vars(row) for row in rows]
    write_json(options.json, {"headline": shown})


if __name__ == "__main__":
    command(main)
