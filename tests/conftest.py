"""Real servers for the tests: the service itself, started as an operator starts it, in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests import reaper
from tests.servers import PostgresAt, PostgresServer, RedisAt, RedisServer, make_folder, remove_folder

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts the suite in the background has it ignore SIGINT; what the tests interrupt would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent

START_S_MAX = 180.0
"""Not a claim about speed: past it the test fails instead of hanging."""


def pytest_configure() -> None:
    """How long an example takes tells of the machine: hypothesis would fail a test for 0.2 s."""
    from hypothesis import HealthCheck, settings  # here, for `load` imports this module too

    settings.register_profile("tests", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("tests")


@dataclass
class Running:
    """A served process: where it answers, what it logged, how to end it."""

    process: subprocess.Popen[bytes]
    url: str
    port: int
    folder: Path
    log: list[dict[str, Any]] = field(default_factory=list)
    _unread: bytes = b""
    _client: httpx.Client | None = None
    _opening: threading.Lock = field(default_factory=threading.Lock)

    def rpc(self, method: str, params: Any = None, **request: Any) -> dict[str, Any]:
        """One JSON-RPC call; the whole response object."""
        body = {"jsonrpc": "2.0", "id": 1, "method": method, **request}
        if params is not None:
            body["params"] = params
        response = self.http.post("/api/v1/jsonrpc", json=body)
        return response.json()  # type: ignore[no-any-return]

    def execute(self, tool_id: str, parameters: dict[str, Any] | None = None, **params: Any) -> dict[str, Any]:
        """tools.execute; the result, or the error object where it was refused."""
        answer = self.rpc("tools.execute", {"tool_id": tool_id, "parameters": parameters or {}, **params})
        return answer.get("result") or answer["error"]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry these labels; 0 when there is none."""
        total = 0.0
        for line in self.http.get("/metrics").text.splitlines():
            found = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
            if found and found[1] == name:
                given = dict(re.findall(r'(\w+)="([^"]*)"', found[2] or ""))
                if labels.items() <= given.items():
                    total += float(found[3])
        return total

    @property
    def http(self) -> httpx.Client:
        with self._opening:  # of two threads that ask first, one would leave a client open
            if self._client is None:
                self._client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)
            return self._client

    def read_log(self, until: Callable[[dict[str, Any]], bool], within_s: float = START_S_MAX) -> dict[str, Any]:
        """The first event, old or new, for which `until` holds."""
        for event in self.log:
            if until(event):
                return event
        ends = time.monotonic() + within_s
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        while time.monotonic() < ends:
            if not select.select([fd], [], [], ends - time.monotonic())[0]:
                break
            chunk = os.read(fd, 65536)
            if not chunk:
                break
            *lines, self._unread = (self._unread + chunk).split(b"\n")
            events = [json.loads(line) for line in lines if line]
            self.log += events
            for event in events:
                if until(event):
                    return event
        raise AssertionError(f"no such event in the log; exit {self.process.poll()}; last: {self.log[-5:]}")

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        """Signal it and wait; the exit code."""
        self.process.send_signal(signal_number)
        return self.process.wait(timeout=START_S_MAX)


Serve = Callable[..., Running]


def start_service(*arguments: str, **environ: str) -> Running:
    """`agentcore-tools serve` on a free port, with the settings given and none from outside.

    Unless they name other places, database and journal are in `Running.folder`, which ends with the service.
    """
    folder = make_folder("agentcore-service-")
    process = subprocess.Popen(
        [sys.executable, "-m", "app", "serve", "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=service_environ(folder, **environ),
    )
    reaper.owe("process", process.pid)
    running = Running(process, "", 0, folder)
    try:
        event = running.read_log(lambda event: event["message"] == "serving")
    except BaseException:
        end(running)
        raise
    running.url = event["url"]
    running.port = int(event["url"].rsplit(":", 1)[1])
    return running


def service_environ(folder: Path | None = None, **environ: str) -> dict[str, str]:
    """The environment of a service under test: hermetic but for what Python needs. It keeps its data in `folder`."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    places = places_in(folder or make_folder("agentcore-service-"))
    return {**kept, **places, "DRAIN_SECONDS": "0", "PYTHONPATH": str(ROOT), **environ}


def places_in(folder: Path) -> dict[str, str]:
    """Settings of a service that writes nothing but into `folder`."""
    return {
        "DATABASE_URL": f"sqlite+aiosqlite:///{folder / 'agentcore.db'}",
        "JOURNAL_DIR": str(folder / "journal"),
    }


def end(running: Running) -> None:
    """End a service whatever state it is in."""
    with contextlib.suppress(ProcessLookupError):
        running.process.send_signal(signal.SIGCONT)
        running.process.kill()
    running.process.wait()
    reaper.settle("process", running.process.pid)
    if running.process.stdout is not None:
        running.process.stdout.close()
    if running._client is not None:
        running._client.close()
    remove_folder(running.folder)


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start services that end with the test."""
    started: list[Running] = []

    def start(*arguments: str, **environ: str) -> Running:
        started.append(start_service(*arguments, **environ))
        return started[-1]

    yield start
    for running in started:
        end(running)


@pytest.fixture(scope="session")
def service() -> Iterator[Running]:
    """One service for every test that leaves nothing behind: the built-in tools and those of tests.tools_for_tests."""
    running = start_service(TOOL_MODULES="tests.tools_for_tests", EGRESS_ALLOW="127.0.0.1")
    yield running
    end(running)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresAt]:
    """One PostgreSQL for every test that leaves it as it was: TEST_DATABASE_URL's, else a PostgresServer."""
    if url := os.environ.get("TEST_DATABASE_URL"):
        server = PostgresAt(url)
        yield server
        server.drop_databases()
    else:
        with PostgresServer() as own:
            yield own


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new, empty database: the test runs on each kind."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'agentcore.db'}"
    server: PostgresAt = request.getfixturevalue("postgres")
    return server.create_database()


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL of the test's own, to be killed, stalled and starved."""
    with PostgresServer() as server:
        yield server


@pytest.fixture(scope="session")
def redis(worker_id: str) -> Iterator[RedisAt]:
    """One Redis for every test that leaves it as it was: TEST_REDIS_URL's, else a RedisServer."""
    if url := os.environ.get("TEST_REDIS_URL"):
        # Workers of pytest-xdist share that server: each has a database of it.
        number = int(worker_id.removeprefix("gw")) % 16 if worker_id != "master" else 0
        yield RedisAt(urlsplit(url)._replace(path=f"/{number}").geturl())
    else:
        with RedisServer() as own:
            yield own


@pytest.fixture
def redis_url(redis: RedisAt) -> str:
    """The shared Redis, empty."""
    redis.cli("FLUSHDB")
    return redis.url


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A Redis of the test's own, to be killed, stalled and starved."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """Tests that are coroutines run on the loop that the service runs on."""
    return "asyncio", {"use_uvloop": True}
