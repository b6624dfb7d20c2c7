"""`python -m load.capacity`: what one process carries, and what it does when it is asked for more.

The origin's mix with 2,000 users; 1,500 slow tools at once; overload at 2, 5 and 10 times the capacity, where the
capacity is that of slots with a tool that waits, and of the core with one that does not. Everything is on.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import orjson

from load.calls import calculator, echo, web_scrape
from load.client import REFUSED, RIGHT, Outcome, Plan
from load.harness import (
    Asking,
    Bench,
    Running,
    Target,
    bench,
    command,
    drive,
    heading,
    measure,
    print_table,
    quantile,
    write_json,
)
from load.machine import rss_mb, settle
from load.pages import serving_pages
from load.wire import single

USERS = 2_000
WAIT_S = 2.0
"""Between two calls of a user, on average: 1 to 3 s, as in the Locust file."""

MIX = (("echo", echo, 5), ("calculator", calculator, 3), ("web_scrape", web_scrape, 2))
MIX_REQUESTS = 200

SLOW_CALLS = 1_500
SLOW_S = (0.5, 0.8, 1.1, 1.4, 1.7, 2.0)

SLOTS = 25
PAUSE_S = 0.05
"""With SLOTS: 500 calls a second, which a client on one core can pass ten times over."""
FACTORS = (2, 5, 10)
BEFORE = AFTER = 0.5
"""Of the capacity, before the overload and after it."""
WINDOW_S = 0.25


def asking(bench: Bench, tool_id: str, parameters: dict[str, Any]) -> Asking:
    params = {"tool_id": tool_id, "parameters": parameters}
    body = orjson.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools.execute", "params": params})
    return Asking(body=body, right='"status":"success"', credentials=bench.credentials)


# The mix


@dataclass(frozen=True)
class Mixed:
    """One kind of call of the mix."""

    tool_id: str
    calls: int
    right: int
    p50_ms: float
    p95_ms: float
    p99_ms: float


def mix(bench: Bench, users: int, seconds: float) -> list[Mixed]:
    """Users come within the first third of the time; each has a connection and pauses for WAIT_S between calls."""
    with serving_pages() as pages:
        server = bench.service("everything, lane", bench.everything(), pages)
        requests, kinds = mixed_requests(bench, pages)
        rate = users / WAIT_S
        ramp = [(rate * part / 4, seconds / 12) for part in (1, 2, 3, 4)]
        outcome = drive(Plan(server.port, requests, users, phases=[*ramp, (rate, seconds * 2 / 3)]))
        print(heading(f"{users:,} users of the mix, up to {rate:,.0f} calls/s, {seconds:g} s"))
        print(f"{'':22}{'calls':>9}{'success %':>11}{'p50 ms':>10}{'p95 ms':>10}{'p99 ms':>10}")
        rows = [mixed(outcome, name, {number for number, one in enumerate(kinds) if one == name}) for name, *_ in MIX]
        rows.append(mixed(outcome, "all", set(range(len(kinds)))))
        for row in rows:
            share = row.right / max(row.calls, 1) * 100
            print(f"{row.tool_id:22}{row.calls:9,}{share:11.2f}{row.p50_ms:10.2f}{row.p95_ms:10.2f}{row.p99_ms:10.2f}")
        if rows[-1].right < rows[-1].calls:
            print(f"the first that went wrong: {outcome.first_wrong or 'no answer'}")
        print(f"{rss_mb(server.pid):.0f} MB; the origin reports 98.7 % and has over 95 % as its target\n", flush=True)
    return rows


def mixed_requests(bench: Bench, pages: str) -> tuple[list[tuple[str, str]], list[str]]:
    """Requests in an order of their own, and the tool of each."""
    choose, made = random.Random(5), []
    deck = [(name, make) for name, make, weight in MIX for _ in range(weight)]
    for number in range(MIX_REQUESTS):
        name, make = deck[number % len(deck)]
        parameters = make().parameters
        if "url" in parameters:
            parameters = {**parameters, "url": f"{pages}/{parameters['url'].split('/', 3)[3]}"}
        one = asking(bench, name, parameters)
        head, right = one.requests()[number % len(bench.credentials)]
        made.append(((head, right), name))
    choose.shuffle(made)
    return [request for request, _ in made], [name for _, name in made]


def mixed(outcome: Outcome, name: str, numbers: set[int]) -> Mixed:
    mine = [place for place, kind in enumerate(outcome.kind) if kind in numbers]
    took = sorted(outcome.took_us[place] / 1e3 for place in mine if outcome.ended[place] == RIGHT)
    return Mixed(name, len(mine), len(took), *(quantile(took, q) for q in (0.5, 0.95, 0.99)))


# Slow tools


def slow(bench: Bench, calls: int, seconds: float) -> dict[str, float]:
    """So many calls that wait run at every moment; each caller asks again when it is answered."""
    server = bench.service("everything, lane", bench.everything(TOOL_MODULES="load.tools"))
    before_mb = rss_mb(server.pid)
    askings = [asking(bench, "pause", {"seconds": length}).requests() for length in SLOW_S]
    requests = [one for together in itertools.zip_longest(*askings) for one in together]
    outcome = drive(Plan(server.port, requests, calls, seconds=seconds))
    lengths = [SLOW_S[kind % len(SLOW_S)] * 1e3 for kind in outcome.kind]
    over = sorted(took / 1e3 - length for took, length in zip(outcome.took_us, lengths, strict=True))
    right = sum(one == RIGHT for one in outcome.ended)
    after_mb = rss_mb(server.pid)
    p50, p95, p99 = (quantile(over, q) for q in (0.5, 0.95, 0.99))
    print(heading(f"{calls:,} calls at once of {SLOW_S[0]:g} to {SLOW_S[-1]:g} s, for {seconds:g} s"))
    print(f"{right:,} of {len(over):,} calls right; over their own time p50 {p50:.1f}, p95 {p95:.1f}, p99 {p99:.1f} ms")
    print(f"{before_mb:.0f} MB before, {after_mb:.0f} MB after; the origin reports 4,500 MB\n", flush=True)
    shown = {"calls": len(over), "right": right, "over_p50_ms": p50, "over_p95_ms": p95, "over_p99_ms": p99}
    return {**shown, "before_mb": before_mb, "after_mb": after_mb}


# Overload


@dataclass(frozen=True)
class Overload:
    """What happened at `factor` times the capacity. Times in ms; goodput in calls that ended right, per second."""

    factor: float
    offered_per_s: float
    goodput_per_s: float
    of_peak: float
    admitted_p95_ms: float
    refused: int
    refused_p50_ms: float
    refused_p99_ms: float
    failed: int
    recovered_s: float

    def line(self) -> str:
        row = f"{self.factor:>5g} x{self.offered_per_s:12,.0f}{self.goodput_per_s:11,.0f}{self.of_peak:8.2f}"
        row += f"{self.admitted_p95_ms:14.1f}{self.refused:9,}{self.refused_p50_ms:13.2f}{self.refused_p99_ms:9.2f}"
        return row + f"{self.failed:8}{self.recovered_s:13.2f}"


def overload(bench: Bench, seconds: float) -> list[Overload]:
    server = bench.service(
        "25 slots", bench.everything(TOOL_MODULES="load.tools", MAX_CONCURRENT_EXECUTIONS=str(SLOTS))
    )
    requests = asking(bench, "pause", {"seconds": PAUSE_S}).requests()
    peak = drive(Plan(server.port, requests, SLOTS + SLOTS // 2, seconds=seconds))
    peak_per_s = sum(one == RIGHT for one in peak.ended) / peak.seconds
    print(heading(f"overload, {SLOTS} slots, a tool that waits {PAUSE_S * 1e3:g} ms, {seconds:g} s each"))
    print(f"peak {peak_per_s:,.0f} calls/s of {SLOTS / PAUSE_S:,.0f} that the slots allow")
    columns = ("offered/s", 12), ("goodput/s", 11), ("of peak", 8), ("admitted p95", 14), ("refused", 9)
    columns_more = ("refused p50", 13), ("p99 ms", 9), ("failed", 8), ("recovered s", 13)
    print(" " * 7 + "".join(f"{name:>{size}}" for name, size in (*columns, *columns_more)))
    rows = []
    for factor in FACTORS:
        settle(server.pid)
        row = overloaded(server, requests, peak_per_s, factor, seconds)
        print(row.line(), flush=True)
        rows.append(row)
    print("goals at 10 times: 0.90 of the peak, refusals under 10 ms, recovered within 5 s\n", flush=True)
    return rows


def overloaded(
    server: Running, requests: list[tuple[str, str]], peak_per_s: float, factor: float, seconds: float
) -> Overload:
    """Half of the capacity, too much, half again; recovered when every later window is as the first phase was."""
    phases = [(BEFORE * peak_per_s, seconds / 2), (factor * peak_per_s, seconds), (AFTER * peak_per_s, seconds)]
    outcome = drive(Plan(server.port, requests, 64, phases=phases, connections_max=1_000))
    begins, ends = seconds / 2 * 1e6, seconds * 1.5 * 1e6
    calls = list(zip(outcome.due_us, outcome.took_us, outcome.ended, strict=True))
    during = [one for one in calls if begins <= one[0] < ends]
    good = sum(ended == RIGHT and begins <= due + took < ends for due, took, ended in calls)
    admitted = sorted(took / 1e3 for _, took, ended in during if ended == RIGHT)
    refused = sorted(took / 1e3 for _, took, ended in during if ended == REFUSED)
    failed = sum(ended not in (RIGHT, REFUSED) for _, _, ended in calls)
    usual_us = quantile(sorted(took for due, took, _ in calls if due < begins), 0.99)
    after = [(due - ends, took, ended) for due, took, ended in calls if due >= ends]
    bad = [due for due, took, ended in after if ended != RIGHT or took > 2 * usual_us]
    recovered_s = first_clean_window(len(after) / max(1.0, seconds / WINDOW_S), bad, WINDOW_S) * WINDOW_S
    per_s = good / seconds
    return Overload(
        factor,
        len(during) / seconds,
        per_s,
        per_s / max(peak_per_s, 1.0),
        quantile(admitted, 0.95),
        len(refused),
        quantile(refused, 0.5),
        quantile(refused, 0.99),
        failed,
        recovered_s,
    )


def first_clean_window(calls_each: float, bad: list[float], window_s: float) -> int:
    """The first window after which no window is bad. One slow call in fifty is not: that much the start shows."""
    counts = Counter(int(due / 1e6 / window_s) for due in bad)
    really = [window for window, count in counts.items() if count > max(1.0, calls_each / 50)]
    return max(really) + 1 if really else 0


CONNECTIONS = 64


def crowded(bench: Bench, rounds: int, seconds: float) -> list[Target]:
    """The core is the capacity: 64 connections fill it, and then there are as many times more."""
    server = bench.service("echo", bench.everything())
    asked = single(bench)
    targets = [
        Target(f"{factor * CONNECTIONS:,} connections", server, asked, factor * CONNECTIONS) for factor in (1, *FACTORS)
    ]
    measure(targets, rounds, seconds)
    print_table("echo, the core is full at 64 connections", targets)
    return targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=USERS)
    parser.add_argument("--slow-calls", type=int, default=SLOW_CALLS)
    parser.add_argument("--seconds", type=float, default=4.0, help="of overload; the others take some times as long")
    parser.add_argument("--only", choices=("mix", "slow", "overload", "crowded"))
    parser.add_argument("--json", help="a file for all figures")
    options = parser.parse_args()
    shown: dict[str, Any] = {}
    with bench() as own:
        if options.only in (None, "mix"):
            shown["mix"] = [asdict(row) for row in mix(own, options.users, 4 * options.seconds)]
        if options.only in (None, "slow"):
            shown["slow"] = slow(own, options.slow_calls, 1.5 * options.seconds)
        if options.only in (None, "overload"):
            shown["overload"] = [asdict(row) for row in overload(own, options.seconds)]
        if options.only in (None, "crowded"):
            shown["crowded"] = [target.as_json() for target in crowded(own, 2, min(2.0, options.seconds))]
    write_json(options.json, {"capacity": shown})


if __name__ == "__main__":
    command(main)
