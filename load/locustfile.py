"""Locust users that call tools as agents do, and the verdict on a run; see load/README.md for what each does.

`python -m load.run` runs this with a service and pages to scrape. By itself: `locust -f load/locustfile.py --headless
--host URL --scenario latency`, or with users, rate and time of its own. Credentials: API_KEY. Pages: PAGES_URL, else
it serves them itself on the port that load/pages.py has.
"""

from __future__ import annotations

import atexit
import itertools
import os
import random
import subprocess
import sys
import time
from collections.abc import Container
from typing import Any

from gevent.pool import Group
from locust import FastHttpUser, HttpUser, between, constant, events, task
from locust.argument_parser import LocustArgumentParser
from locust.runners import WorkerRunner

from load import tally
from load.calls import (
    PAGES_URL,
    QUOTA,
    RATE_LIMIT,
    Call,
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
from load.scenarios import ALL_KINDS, SCENARIOS
from load.shapes import SHAPES

DOOR = "/api/v1/jsonrpc"
HEADERS = {"Content-Type": "application/json"}
if API_KEY := os.environ.get("API_KEY"):
    HEADERS["Authorization"] = f"Bearer {API_KEY}"

ANSWER_S_MAX = 40.0
"""TOOL_EXECUTION_TIMEOUT's default of 30 s, the queue's patience and some room: past it nobody answers."""

PAUSE_S = 1.0
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
        body = request.body(request_id)
        tally.count_sent(body)
        with self.client.post(DOOR, data=body, name=request.name, catch_response=True) as response:
            if response.status_code == 0:
                return None  # no answer: Locust counts its own exception, which says more
            try:
                request.judge(response.status_code, response.content, request_id)
                if request.method == "tools.execute":
                    tally.count_overhead(response.content)
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


class EchoUser(AgentUser):
    """`echo` every 2 s on average, whatever the answers take: 1,000 of them make 500 calls a second."""

    due_s = 0.0

    @task
    def one(self) -> None:
        self.ask(execute(echo(), self.label))

    def wait_time(self) -> float:
        """Uneven, because Locust starts users by the second and they would go on calling in step."""
        now = time.monotonic()
        self.due_s = max((self.due_s or now) + random.uniform(1, 3), now)
        return self.due_s - now


class PausingUser(AgentUser):
    """Always one call under way: as many as there are users run at once. Needs TOOL_MODULES=load.tools."""

    wait_time = constant(0)

    @task
    def one(self) -> None:
        self.ask(execute(Call("pause", {"seconds": PAUSE_S}, lambda result: result == PAUSE_S), self.label))


class TightUser(AgentUser):
    """`echo` without a pause: as fast as Locust can."""

    wait_time = constant(0)

    @task
    def one(self) -> None:
        self.ask(execute(echo(), self.label))


class TightRequestsUser(HttpUser):
    """The same by Locust's other client, python-requests, for load/ceiling.py to compare."""

    wait_time = constant(0)

    @task
    def one(self) -> None:
        request, request_id = execute(echo(), type(self).__name__), next(_request_ids)
        body = request.body(request_id)
        with self.client.post(DOOR, body, name=request.name, headers=HEADERS, catch_response=True) as response:
            try:
                request.judge(response.status_code, response.content, request_id)
            except WrongAnswer as wrong:
                response.failure(str(wrong))


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
def _add_arguments(parser: LocustArgumentParser) -> None:
    parser.add_argument("--scenario", choices=sorted(SCENARIOS), help="Who, how many, how long, and what must hold")
    parser.add_argument(
        "--success-min",
        type=float,
        metavar="SHARE",
        env_var="LOAD_SUCCESS_MIN",
        help="Of each kind of request, such as 0.95",
    )
    parser.add_argument(
        "--p95-max", type=float, metavar="MS", env_var="LOAD_P95_MAX", help="Of all requests, milliseconds"
    )
    parser.add_argument("--report", metavar="FILE", help="Write the figures to this file as JSON")


@events.init.add_listener  # type: ignore[untyped-decorator]
def _follow_scenario(environment: Any, **_: Any) -> None:
    """What the command line leaves open is as the scenario says, and without one as Locust does by itself."""
    if isinstance(environment.runner, WorkerRunner):
        return  # the master says which users
    options = environment.parsed_options
    scenario = SCENARIOS.get(options.scenario)
    if not options.user_classes:
        kinds = scenario.classes if scenario else ALL_KINDS
        environment.user_classes = [environment.available_user_classes[kind] for kind in kinds]
    if scenario is None:
        return
    options.num_users = options.num_users or scenario.users
    options.spawn_rate = options.spawn_rate or scenario.spawn_rate
    options.run_time = options.run_time or scenario.run_time_s
    if shape := SHAPES.get(scenario.name):
        environment.shape_class = shape()
        environment.shape_class.runner = environment.runner


@events.init.add_listener  # type: ignore[untyped-decorator]
def _serve_pages(environment: Any, **_: Any) -> None:
    """Where nobody said who has the pages: a taken port has them already, from another run or by hand."""
    if "PAGES_URL" in os.environ or isinstance(environment.runner, WorkerRunner):
        return
    pages = subprocess.Popen([sys.executable, "-m", "load.pages"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    atexit.register(pages.communicate)
    atexit.register(pages.terminate)
    assert pages.stdout is not None
    pages.stdout.readline()  # once it serves, or is gone because the port is taken
    print(f"pages to scrape: {PAGES_URL}; the service needs EGRESS_ALLOW={PAGES_URL.split('://')[1]}", file=sys.stderr)


tally.listen()
