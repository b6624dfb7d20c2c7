"""`python -m load.ceiling`: what Locust itself can drive, by each of its clients and by several processes.

Users ask without a pause, of a service that does nothing but the call path, on a core of its own.
Where that core is not full, what is measured is Locust's ceiling and not the service's. Locust alone prints the rate.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from typing import NamedTuple

from load.machine import cpu_s, pin_self, pin_server, raise_open_files
from load.run import CannotRun, Plan, heading, own_service, run_locust
from load.scenarios import Bounds, seconds

USERS = 32
"""Enough that one is always ready to ask; more only wait for one another."""

QUIET = {"ENABLE_DATABASE_LOGGING": "false", "AUTH_MODE": "none", "ENABLE_TRACING": "false"}
ANY = Bounds(p95_ms_max=1e9, success_min=1.0)


class Way(NamedTuple):
    """One row."""

    name: str
    user: str
    processes: int = 0


WAYS = (
    Way("FastHttpUser", "TightUser"),
    Way("HttpUser", "TightRequestsUser"),
    Way("FastHttpUser, 2 workers", "TightUser", 2),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m load.ceiling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run-time", type=seconds, default=10, help="of each row")
    given = parser.parse_args()
    raise_open_files()
    try:
        with ExitStack() as stack:
            pin_self()
            service = stack.enter_context(own_service("http://127.0.0.1:1", **QUIET))
            pin_server(service.pid)
            print(f"{heading()}: echo by {USERS} users without a pause, {given.run_time} s each")
            print(f"{'':26}{'requests/s':>12}{'p95 ms':>8}{'failures':>10}{'service core':>14}")
            for way in WAYS:
                show(way, given.run_time, service.url, service.pid)
    except CannotRun as error:
        raise SystemExit(f"ceiling: {error}") from None


def show(way: Way, run_time_s: int, url: str, pid: int) -> None:
    plan = Plan("headline", USERS, USERS, run_time_s, ANY, (way.user,), processes=way.processes)
    before_s = cpu_s(pid)
    total = run_locust(plan, url, "http://127.0.0.1:1")["total"]
    used = (cpu_s(pid) - before_s) / run_time_s
    print(f"{way.name:26}{total['rps']:12,.0f}{total['p95']:8,.0f}{total['failures']:10,}{used:14.0%}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
