"""Locust users that call tools as agents do; see load/README.md for what each does.

`python -m load.run` runs this with a service and pages to scrape. By itself: `locust -f load/locustfile.py --headless
-u 1500 -r 100 -t 10m --host http://127.0.0.1:8001 [PlainUser …]`. Credentials: API_KEY. Pages: PAGES_URL.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Container
from pathlib import Path
from typing import Any

from gevent.pool import Group
from locust import FastHttpUser, between, constant, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.stats import StatsEntry, StatsError

from load.calls import (
    QUOTA,
    RATE_LIMIT,
    Refused,
    Request,
    WrongAnswer,
    calculator,
    deal,
    division_by_zero,
    echo,
    execute,
    execute_batch,
    execute_parallel,
    execute_with_fallback,
)

DOOR = "/api/v1/jsonrpc"
HEADERS = {"Content-Type": "application/json"}
if API_KEY := os.environ.get("API_KEY"):
    HEADERS["Authorization"] = f"Bearer {API_KEY}"

ANSWER_S_MAX = 40.0
"""TOOL_EXECUTION_TIMEOUT's default of 30 s, the queue's patience and some room: past it nobody answers."""

BURST_CALLS = 20
BATCH_CALLS = 10
"""The deck has ten cards, so each batch is the whole mix."""

HAMMER_CALLS_MAX = 100
"""A service without limits would be hammered without end, and the other users' share of the run with it."""

HAMMER_REST_S = 30.0
LIMITED_REST_S_MAX = 5.0
"""A quota comes back tomorrow; the run does not wait for it."""

_calls = deal()
_request_ids = itertools.count(1)


class AgentUser(FastHttpUser):
    """What all users share: one way to ask, and what counts as a failure."""

    abstract = True
    network_timeout = ANSWER_S_MAX
    connection_timeout = ANSWER_S_MAX
    default_headers = HEADERS
    concurrency = BURST_CALLS

    @property
    def label(self) -> str:
        """The agent_id, which limits follow where authentication is off: kinds of users do not share theirs."""
        return f"load-{type(self).__name__}"

    def ask(self, request: Request, expected: Container[int] = ()) -> Refused | None:
        """Send, and count under the request's name. A refusal whose code is `expected` is counted by itself, as no
        failure, and returned."""
        request_id = next(_request_ids)
        with self.client.post(DOOR, data=request.body(request_id), name=request.name, catch_response=True) as response:
            if response.status_code == 0:
                return None  # no answer: Locust counts its own exception, which says more
            try:
                request.judge(response.status_code, response.content, request_id)
            except WrongAnswer as wrong:
                if isinstance(wrong, Refused) and wrong.code in expected:
                    response.request_meta["name"] = f"{request.name} (limited)"
                    response.success()
                    return wrong
                response.failure(str(wrong))
        return None


class PlainUser(AgentUser):
    """One call of the mix every 2 s on average: 1,000 of them make 500 calls a second."""

    weight = 16
    wait_time = between(1, 3)

    @task
    def one(self) -> None:
        self.ask(execute(next(_calls), self.label))


class BurstUser(AgentUser):
    """Twenty calls of the mix at the same moment, then silence."""

    weight = 1
    wait_time = constant(10)

    @task
    def burst(self) -> None:
        group = Group()
        try:
            for _ in range(BURST_CALLS):
                group.spawn(self.ask, execute(next(_calls), self.label))
            group.join(raise_error=True)
        finally:
            group.kill()


class QuotaUser(AgentUser):
    """Hammers echo until a rate limit or a quota says stop; to be limited is what it came for."""

    weight = 1
    rest_s = 0.0

    @task
    def hammer(self) -> None:
        for _ in range(HAMMER_CALLS_MAX):
            limited = self.ask(execute(echo(), self.label, "echo hammered"), expected=(RATE_LIMIT, QUOTA))
            if limited is not None:
                self.rest_s = min(limited.retry_after_s or LIMITED_REST_S_MAX, LIMITED_REST_S_MAX)
                return
        self.rest_s = HAMMER_REST_S

    def wait_time(self) -> float:
        """Locust's own wait, not a sleep in the task: it is broken off when the run ends."""
        return self.rest_s


class BatchUser(AgentUser):
    """A batch of the whole mix, then a plan whose last task needs the two before it."""

    weight = 1
    wait_time = between(2, 6)

    @task
    def batch_then_plan(self) -> None:
        self.ask(execute_batch([next(_calls) for _ in range(BATCH_CALLS)], self.label))
        self.ask(execute_parallel(calculator(), echo(), self.label))


class FallbackUser(AgentUser):
    """A primary that fails, so that the fallback must answer; then one that does not need it."""

    weight = 1
    wait_time = between(1, 3)

    @task
    def failing_then_working(self) -> None:
        self.ask(execute_with_fallback(division_by_zero(), echo(), self.label, falls_back=True))
        self.ask(execute_with_fallback(calculator(), echo(), self.label, falls_back=False))


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def _add_report_argument(parser: LocustArgumentParser) -> None:
    parser.add_argument("--report", metavar="FILE", help="Write the figures to this file as JSON")


@events.test_stop.add_listener  # type: ignore[untyped-decorator]
def _write_report(environment: Environment, **_: Any) -> None:
    """All users have ended here. Locust's own files may lack the last second."""
    if environment.parsed_options is None or not environment.parsed_options.report:
        return
    assert environment.runner is not None
    stats = environment.stats
    report = {
        "rows": [_row(stats.entries[key]) for key in sorted(stats.entries)],
        "total": _row(stats.total),
        "failures": [_failure(error) for error in stats.errors.values()],
        "crashes": [crash["msg"] for crash in environment.runner.exceptions.values()],
    }
    Path(environment.parsed_options.report).write_text(json.dumps(report), encoding="utf-8")


def _row(entry: StatsEntry) -> dict[str, Any]:
    percentiles = {f"p{p}": entry.get_response_time_percentile(p / 100) for p in (50, 95, 99)}
    return {
        "name": entry.name,
        "requests": entry.num_requests,
        "failures": entry.num_failures,
        **percentiles,
        "max": entry.max_response_time,
        "rps": entry.total_rps,
    }


def _failure(error: StatsError) -> dict[str, Any]:
    return {"name": error.name, "reason": str(error.error), "count": error.occurrences}
