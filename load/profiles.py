"""`python -m load.profiles`: what each PROFILE promises, measured on each of them.

More than 1,000 calls at once (`high-throughput`), the latency of 100 users (`low-latency`), the memory that large
payloads take with as many calls at once as come in (`constrained`). Everything is on.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from load.capacity import asking
from load.client import RIGHT, Outcome, Plan
from load.harness import Bench, Running, bench, command, drive, heading, quantile, refused, write_json
from load.machine import rss_mb, settle
from load.wire import single

PROFILES = ("default", "high-throughput", "low-latency", "constrained")

CALLS = 1_200
PAUSE_S = 0.5

USERS = 100
RATE = 500.0

LARGE_CALLS = 600
LARGE_BYTES = 100_000
"""Past the slots of `constrained`; what comes in at once is held whole, and so is every answer until it is read."""

GOALS = (
    f"high-throughput: {CALLS:,} calls at once and none refused; low-latency: p95 under 30 ms; "
    "constrained: under 512 MB, which is four replicas in 2 GB"
)


@dataclass(frozen=True)
class Row:
    """Times in ms: of the calls at once what they took beside their own wait, of the users' all of it."""

    profile: str
    at_once_per_s: float
    at_once_refused: int
    at_once_p95_ms: float
    users_p50_ms: float
    users_p95_ms: float
    users_p99_ms: float
    idle_mb: float
    large_mb: float

    def line(self) -> str:
        row = f"{self.profile:18}{self.at_once_per_s:9.0f}{self.at_once_refused:9,}{self.at_once_p95_ms:9.1f}"
        row += f"{self.users_p50_ms:9.2f}{self.users_p95_ms:9.2f}{self.users_p99_ms:9.2f}"
        return row + f"{self.idle_mb:9.0f}{self.large_mb:9.0f}"


def visit(own: Bench, profile: str, seconds: float, calls: int, large_calls: int) -> Row:
    server = own.service(profile, own.everything(PROFILE=profile, TOOL_MODULES="load.tools"))
    users = latencies(own, server, seconds)
    settle(server.pid)
    idle_mb = rss_mb(server.pid)
    together = drive(Plan(server.port, asking(own, "pause", {"seconds": PAUSE_S}).requests(), calls, seconds=seconds))
    settle(server.pid)
    over = [took - PAUSE_S * 1e3 for took in right_ms(together)]
    large = drive(Plan(server.port, single(own, "x" * LARGE_BYTES, "reflect").requests(), large_calls, seconds=seconds))
    assert any(ended == RIGHT for ended in large.ended), large.first_wrong
    users_p50_ms, users_p95_ms, users_p99_ms = (quantile(users, q) for q in (0.5, 0.95, 0.99))
    return Row(
        profile,
        len(over) / together.seconds,
        refused(together),
        quantile(over, 0.95),
        users_p50_ms,
        users_p95_ms,
        users_p99_ms,
        idle_mb,
        rss_mb(server.pid),
    )


def latencies(own: Bench, server: Running, seconds: float) -> list[float]:
    plan = Plan(server.port, single(own).requests(), USERS, phases=[(RATE, min(1.0, seconds))])
    drive(plan)  # everything for the first time
    plan.phases = [(RATE, seconds)]
    return right_ms(drive(plan))


def right_ms(outcome: Outcome) -> list[float]:
    return sorted(took / 1e3 for took, ended in zip(outcome.took_us, outcome.ended, strict=True) if ended == RIGHT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each of the three loads")
    parser.add_argument("--calls", type=int, default=CALLS, help="at once, of a tool that waits")
    parser.add_argument("--large-calls", type=int, default=LARGE_CALLS, help="at once, with a large payload")
    parser.add_argument("--json", help="a file for all figures")
    options = parser.parse_args()
    with bench() as own:
        rows = [visit(own, profile, options.seconds, options.calls, options.large_calls) for profile in PROFILES]
    what = f"{options.calls:,} calls at once of {PAUSE_S * 1e3:g} ms; {USERS} users, {RATE:g} echo calls/s; "
    print(heading(what + f"{options.large_calls} calls at once of {LARGE_BYTES / 1e3:g} KB"))
    columns = ("right/s", "refused", "p95 ms", "p50 ms", "p95 ms", "p99 ms", "idle MB", "then MB")
    print(" " * 18 + "".join(f"{name:>9}" for name in columns))
    for row in rows:
        print(row.line())
    print(GOALS, flush=True)
    write_json(options.json, {"profiles": [vars(row) for row in rows]})


if __name__ == "__main__":
    command(main)
