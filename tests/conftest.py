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
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parent.parent

START_S_MAX = 60.0
"""Not a claim about speed: past it the test fails instead of hanging."""


@dataclass
class Running:
    """A served process: where it answers, what it logged, how to end it."""

    process: subprocess.Popen[bytes]
    url: str
    port: int
    log: list[dict[str, Any]] = field(default_factory=list)
    _unread: bytes = b""

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
        client = self.__dict__.get("_client")
        if client is None:
            client = self.__dict__["_client"] = httpx.Client(base_url=self.url, timeout=60, trust_env=False)
        return client

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
        return self.process.wait(timeout=60)


Serve = Callable[..., Running]


def start_service(*arguments: str, **environ: str) -> Running:
    """`agentcore-tools serve` on a free port, with the settings given and none from outside."""
    process = subprocess.Popen(
        [sys.executable, "-m", "app", "serve", "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=service_environ(**environ),
    )
    running = Running(process, "", 0)
    try:
        event = running.read_log(lambda event: event["message"] == "serving")
    except BaseException:
        end(running)
        raise
    running.url = event["url"]
    running.port = int(event["url"].rsplit(":", 1)[1])
    return running


def service_environ(**environ: str) -> dict[str, str]:
    """The environment of a service under test: hermetic but for what Python needs."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    return {**kept, "DRAIN_SECONDS": "0", "PYTHONPATH": str(ROOT), **environ}


def end(running: Running) -> None:
    """End a service whatever state it is in."""
    with contextlib.suppress(ProcessLookupError):
        running.process.send_signal(signal.SIGCONT)
        running.process.kill()
    running.process.wait()
    if running.process.stdout is not None:
        running.process.stdout.close()
    client = running.__dict__.get("_client")
    if client is not None:
        client.close()


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


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """Tests that are coroutines run on the loop that the service runs on."""
    return "asyncio", {"use_uvloop": True}
