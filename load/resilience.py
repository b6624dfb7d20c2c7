"""`python -m load.resilience`: fast and slow tools beside one another past the capacity, and a dead upstream.

A real service with `ADAPTIVE_CONCURRENCY=enforce`, no limit set by hand. Overload: calls are due by a schedule that
does not wait for the service, so whoever waits is charged for it; without Redis and PostgreSQL, which have the client's
core here. Upstream: everything on, a tool whose server dies and comes back, beside one that needs none.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import orjson

from load.capacity import first_clean_window
from load.client import REFUSED, RIGHT, Outcome, Plan
from load.harness import (
    OFF,
    Asking,
    Bench,
    Running,
    ask,
    bench,
    call_body,
    command,
    drive,
    heading,
    quantile,
    write_json,
)
from load.machine import settle
from load.run import ROOT, CannotRun


class Kind(NamedTuple):
    """A mix of calls, and what its capacity is made of."""

    name: str
    work_s: float
    """Of the core, for each call."""
    fast_s: float
    slow_s: float
    """What a call waits for beside."""
    slow_part: float
    connections: int
    """Of the closed loop that shows the peak."""
    factors: tuple[int, ...]


KINDS = (
    Kind("slots", 0.0, 0.02, 1.0, 0.8, 1_300, (2, 5, 10)),
    Kind("core", 0.002, 0.02, 0.8, 0.5, 250, (2, 5)),
)
"""Slow calls fill the slots, of which they get 1,350 by default; or all calls together fill the core. A refusal costs
the core as much as a small call, so the second cannot go to 10 times."""

BEFORE = 0.5
WINDOW_S = 0.5
CALIBRATION_LOOPS = 200_000

UPSTREAM_CALLS = 200
BACK_S_MAX = 30.0
CLOSES_WITHIN_S = 15.0

ENFORCED = {"ADAPTIVE_CONCURRENCY": "enforce", "TOOL_MODULES": "load.tools"}


# Overload


@dataclass(frozen=True)
class Row:
    """One overload. Times in ms; goodput in calls that ended right while it lasted, per second."""

    factor: float
    offered_per_s: float
    goodput_per_s: float
    of_peak: float
    fast_p95_before_ms: float
    fast_p95_ms: float
    times: float
    slow_p95_ms: float
    refused: int
    refused_p99_ms: float
    failed: int
    recovered_s: float

    def line(self) -> str:
        row = f"{self.factor:>5g} x{self.offered_per_s:11,.0f}{self.goodput_per_s:11,.0f}{self.of_peak:8.2f}"
        row += f"{self.fast_p95_before_ms:13.1f}{self.fast_p95_ms:9.1f}{self.times:7.2f}{self.slow_p95_ms:13.1f}"
        return row + f"{self.refused:9,}{self.refused_p99_ms:9.1f}{self.failed:8}{self.recovered_s:13.1f}"


def loops_for(seconds: float) -> int:
    """Turns of an empty loop that take so long here."""
    took = []
    for _ in range(9):
        began = time.perf_counter()
        for _ in range(CALIBRATION_LOOPS):
            pass
        took.append(time.perf_counter() - began)
    return int(CALIBRATION_LOOPS * seconds / sorted(took)[len(took) // 2])


def mixed(kind: Kind) -> tuple[list[tuple[str, str]], set[int]]:
    """Requests in a random order, and the numbers of those to the fast tool."""
    loops = loops_for(kind.work_s)
    fast = {"tool_id": "stir", "parameters": {"seconds": kind.fast_s, "loops": loops}}
    slow = {"tool_id": "brew", "parameters": {"seconds": kind.slow_s, "loops": loops}}
    order, requests, numbers = random.Random(1), [], set()
    for number in range(200):
        params = slow if order.random() < kind.slow_part else fast
        if params is fast:
            numbers.add(number)
        body = orjson.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools.execute", "params": params})
        requests += Asking(body=body, right='"status":"success"').requests()
    return requests, numbers


def overload(bench: Bench, kind: Kind, seconds: float) -> list[Row]:
    server = bench.service(kind.name, {**OFF, **ENFORCED})
    requests, fast = mixed(kind)
    peaks = []
    for _ in range(3):
        found = drive(Plan(server.port, requests, kind.connections, seconds=seconds))
        peaks.append(sum(one == RIGHT for one in found.ended) / found.seconds)
    peak_per_s = sorted(peaks)[1]
    print(heading(f"{kind.name} are the capacity, {1 - kind.slow_part:.0%} fast calls, {seconds:g} s of overload"))
    print(f"peak {peak_per_s:,.0f} calls/s, a closed loop of {kind.connections:,} connections")
    columns = ("offered/s", 11), ("goodput/s", 11), ("of peak", 8), ("fast before", 13), ("p95 ms", 9), ("times", 7)
    more = ("slow p95 ms", 13), ("refused", 9), ("p99 ms", 9), ("failed", 8), ("recovered s", 13)
    print(" " * 7 + "".join(f"{name:>{size}}" for name, size in (*columns, *more)))
    rows = []
    for factor in kind.factors:
        settle(server.pid)
        row = overloaded(server, requests, fast, peak_per_s, factor, seconds)
        print(row.line(), flush=True)
        rows.append(row)
    print("goals: 0.90 of the peak, fast tools at most 2.00 times as slow, recovered within 10 s\n", flush=True)
    return rows


def overloaded(
    server: Running,
    requests: list[tuple[str, str]],
    fast: set[int],
    peak_per_s: float,
    factor: float,
    seconds: float,
) -> Row:
    """Half of the capacity, too much, half again."""
    phases = [(BEFORE * peak_per_s, seconds), (factor * peak_per_s, seconds), (BEFORE * peak_per_s, 2 * seconds)]
    outcome = drive(Plan(server.port, requests, 64, phases=phases, connections_max=4_000))
    return row_of(outcome, fast, peak_per_s, factor, seconds)


def row_of(outcome: Outcome, fast: set[int], peak_per_s: float, factor: float, seconds: float) -> Row:
    begins, ends = seconds * 1e6, seconds * 2e6
    calls = list(zip(outcome.due_us, outcome.took_us, outcome.ended, outcome.kind, strict=True))
    during = [one for one in calls if begins <= one[0] < ends]
    right = [one for one in calls if one[2] == RIGHT]
    per_s = sum(begins <= due + took < ends for due, took, _, _ in right) / seconds

    def p95(calls: list[tuple[int, int, int, int]], *, quick: bool) -> float:
        took_ms = sorted(took / 1e3 for _, took, ended, kind in calls if ended == RIGHT and (kind in fast) is quick)
        return quantile(took_ms, 0.95)

    before = p95([one for one in calls if one[0] < begins], quick=True)
    refused = sorted(took / 1e3 for _, took, ended, _ in during if ended == REFUSED)
    usual_us = quantile(sorted(took for due, took, _, kind in calls if due < begins and kind in fast), 0.99)
    after = [(due - ends, took, ended, kind) for due, took, ended, kind in calls if due >= ends]
    bad = [due for due, took, ended, kind in after if ended != RIGHT or (kind in fast and took > 2 * usual_us)]
    recovered = first_clean_window(len(after) / max(1.0, 2 * seconds / WINDOW_S), bad, WINDOW_S)
    return Row(
        factor,
        len(during) / seconds,
        per_s,
        per_s / max(peak_per_s, 1.0),
        before,
        p95(during, quick=True),
        p95(during, quick=True) / max(before, 0.001),
        p95(during, quick=False),
        len(refused),
        quantile(refused, 0.99),
        sum(ended not in (RIGHT, REFUSED) for _, _, ended, _ in calls),
        recovered * WINDOW_S,
    )


# A dead upstream


@dataclass(frozen=True)
class Upstream:
    """`opened_after`: calls until the first that was refused at once. Times of the tool beside it in ms."""

    opened_after: int
    beside_p95_before_ms: float
    beside_p95_ms: float
    refused_at_once: int
    closed_after_s: float

    def line(self) -> str:
        return (
            f"breaker open after {self.opened_after} calls, {self.refused_at_once} then refused at once; closed "
            f"{self.closed_after_s:.1f} s after the upstream was back; echo beside it p95 "
            f"{self.beside_p95_before_ms:.2f} ms before, {self.beside_p95_ms:.2f} ms while it was dead"
        )


def upstream(bench: Bench) -> Upstream:
    """One caller throughout: a breaker is a tenant's own."""
    params = {"tool_id": "ask_upstream", "parameters": {}}
    body = orjson.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools.execute", "params": params})
    asking = Asking(body=body, credentials=bench.credentials[:1])
    beside = Asking(body=call_body(), credentials=bench.credentials[:1])
    with pages_process(0) as port:
        url = f"http://127.0.0.1:{port}"
        server = bench.service("upstream", bench.everything(LOAD_UPSTREAM=f"{url}/ferries", **ENFORCED), url)
        for _ in range(30):
            if '"status":"success"' not in (answer := ask(server, asking)):
                raise CannotRun(f"the upstream is up and the tool says {answer[-300:]}")
        before = sorted(timed(server, beside) for _ in range(UPSTREAM_CALLS))
    opened_after = refused = 0
    during = []
    for number in range(UPSTREAM_CALLS):
        if '"code":-32006' in ask(server, asking):
            refused += 1
            opened_after = opened_after or number
        during.append(timed(server, beside))
    if not refused:
        raise CannotRun(f"{UPSTREAM_CALLS} calls to a dead upstream were all let through")
    with pages_process(port):
        began = time.perf_counter()
        while time.perf_counter() - began < BACK_S_MAX and '"status":"success"' not in ask(server, asking):
            time.sleep(0.05)
        closed_after_s = time.perf_counter() - began
    found = Upstream(opened_after, quantile(before, 0.95), quantile(sorted(during), 0.95), refused, closed_after_s)
    print(heading("a tool whose upstream dies, one caller"))
    print(found.line())
    print(f"goals: open within 20 calls, closes by itself (here within {CLOSES_WITHIN_S:g} s), no change beside it\n")
    return found


@contextlib.contextmanager
def pages_process(port: int) -> Iterator[int]:
    """A web server that can die: its process. Port 0 is any free one."""
    run = [sys.executable, "-u", "-m", "load.pages", "--port", str(port)]
    with subprocess.Popen(run, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline().rsplit(":", 1)[1])
        finally:
            process.kill()


def timed(server: Running, asking: Asking) -> float:
    """One call, in ms."""
    began = time.perf_counter()
    if '"status":"success"' not in (answer := ask(server, asking)):
        raise CannotRun(f"the call beside it was answered {answer[-300:]}")
    return (time.perf_counter() - began) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0, help="of overload; a row takes four times as long")
    parser.add_argument("--only", choices=("overload", "upstream"))
    parser.add_argument("--few", action="store_true", help="one overload, at twice the capacity")
    parser.add_argument("--json", help="a file for all figures")
    options = parser.parse_args()
    shown: dict[str, Any] = {}
    with bench() as own:
        if options.only in (None, "upstream"):
            shown["upstream"] = asdict(upstream(own))
        if options.only in (None, "overload"):
            for kind in [KINDS[0]._replace(factors=(2,))] if options.few else KINDS:
                shown[kind.name] = [asdict(row) for row in overload(own, kind, options.seconds)]
    write_json(options.json, shown)


if __name__ == "__main__":
    command(main)
