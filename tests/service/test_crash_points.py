"""SIGKILL at each point between a claim and its answer, then the same call again with its key: what must not be done
twice is not, and no answer that was lost is given as a success."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import ROOT, Running, end, service_environ, start_service
from tests.proxy import FaultProxy
from tests.servers import HOST, PostgresAt, RedisAt, wait_until

TIMEOUT_S = 2
"""Of each run. What a dead process claimed is believed for this and 6 s."""

UNKNOWN = "outcome_unknown"


class Crash:
    """One process that is to die, the call that it dies in, and what its caller heard."""

    def __init__(self, name: str, folder: Path, environ: dict[str, str], redis: RedisAt | None) -> None:
        self.name = name
        self.folder = folder
        self.gate = folder / f"gate-{name}"
        self.gate.touch()
        self.heard: dict[str, Any] | None = None
        self.proxy = None if redis is None else FaultProxy(redis.port)
        if self.proxy is not None:
            environ = {**environ, "REDIS_URL": f"redis://{HOST}:{self.proxy.port}/0"}
        self.running = start_service(**environ)
        assert call(self.running, "pay", f"{name} first")["status"] == "success"  # everything is open

    def start(self, tool: str = "pay", gate: bool = True) -> None:
        """The call, on its way."""
        parameters = {"gate": str(self.gate)} if gate else {}

        def asked() -> None:
            with contextlib.suppress(httpx.HTTPError):
                self.heard = call(self.running, tool, self.name, **parameters)

        self.caller = threading.Thread(target=asked, daemon=True)
        self.caller.start()

    def wait_for_run(self) -> None:
        wait_until(lambda: runs(self.folder, self.name) == 1, "the tool runs")

    def die(self) -> None:
        self.running.stop(signal.SIGKILL)
        self.caller.join(30)
        assert not self.caller.is_alive()

    def close(self) -> None:
        end(self.running)
        if self.proxy is not None:
            self.proxy.close()


def runs(folder: Path, name: str) -> int:
    return (folder / "runs").read_text().splitlines().count(name)


def call(running: Running, tool: str, name: str, **parameters: Any) -> dict[str, Any]:
    params = {"tool_id": tool, "parameters": {"name": name, **parameters}}
    named = {"idempotency_key": name, "timeout_override": TIMEOUT_S}
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools.execute", "params": {**params, **named}}
    answer = httpx.post(f"{running.url}/api/v1/jsonrpc", json=body, timeout=60, trust_env=False).json()
    found: dict[str, Any] = answer.get("result") or answer["error"]
    return found


def again(running: Running, tool: str, name: str, **parameters: Any) -> dict[str, Any]:
    """The first answer that is not `still_running`."""
    answers: list[dict[str, Any]] = []

    def ended() -> bool:
        answers.append(call(running, tool, name, **parameters))
        return answers[-1].get("data", {}).get("reason") != "still_running"

    wait_until(ended, f"{name}: the lease ends")
    return answers[-1]


# Where it dies. Each leaves the call where it is to be cut off.


def before_the_claim(crash: Crash) -> None:
    assert crash.proxy is not None
    crash.proxy.stall()
    crash.start()
    wait_until(lambda: concurrency(crash) == 1, "it is on its way")


def after_the_claim(crash: Crash) -> None:
    """Redis has it; its answer has not come."""
    assert crash.proxy is not None
    before = commands(crash)
    crash.proxy.latency_s = 60.0
    crash.start()
    wait_until(lambda: commands(crash) > before, "it is claimed")


def while_the_tool_runs(crash: Crash) -> None:
    crash.start()
    crash.wait_for_run()


def after_the_tool_before_its_row(crash: Crash) -> None:
    crash.start("pay_and_die", gate=False)
    crash.running.process.wait(30)


def after_its_row_before_its_outcome(crash: Crash) -> None:
    assert crash.proxy is not None
    crash.start()
    crash.wait_for_run()
    crash.proxy.stall()
    crash.gate.unlink()
    wait_until(lambda: ended(crash) == 2, "the tool has ended")


def after_its_outcome_before_its_answer(crash: Crash) -> None:
    assert crash.proxy is not None
    crash.start()
    crash.wait_for_run()
    before = commands(crash)
    crash.proxy.latency_s = 60.0
    crash.gate.unlink()
    wait_until(lambda: commands(crash) > before, "the outcome is kept")


def after_its_answer(crash: Crash) -> None:
    crash.gate.unlink()
    crash.start()
    crash.caller.join(30)
    assert crash.heard is not None and crash.heard["status"] == "success"


def while_a_harmless_tool_runs(crash: Crash) -> None:
    crash.start("put")
    crash.wait_for_run()


def concurrency(crash: Crash) -> float:
    return crash.running.metric("tool_execution_concurrency")


def ended(crash: Crash) -> float:
    """Its runs that are over, the first call's too."""
    return crash.running.metric("tool_executions_total", tool_id="pay")


_REDIS: list[RedisAt] = []


def commands(crash: Crash) -> int:
    """Keys of this process's key that Redis has, with their outcomes."""
    redis = _REDIS[0]
    keys = [key for key in redis.cli("KEYS", "agentcore:idempotency:*").split("\n") if key]
    return len(keys) + sum(redis.cli("HEXISTS", key, "body") == "1" for key in keys)


REDIS_POINTS = {
    before_the_claim: (0, None),
    after_the_claim: (0, UNKNOWN),
    while_the_tool_runs: (1, UNKNOWN),
    after_the_tool_before_its_row: (1, UNKNOWN),
    after_its_row_before_its_outcome: (1, UNKNOWN),
    after_its_outcome_before_its_answer: (1, "replayed"),
    after_its_answer: (1, "replayed"),
    while_a_harmless_tool_runs: (1, "success"),
}
"""Each with the runs until then, and what a repeat gets in the end. None: its claim may have arrived or not."""


@pytest.fixture
def environ(postgres: PostgresAt, tmp_path: Path) -> dict[str, str]:
    """Of all processes of a test: one database, one folder of journals."""
    environ = {
        "DATABASE_URL": postgres.create_database(),
        "JOURNAL_DIR": str(tmp_path / "journal"),
        "TOOL_MODULES": "tests.service.reuse_tools",
        "RUNS_FILE": str(tmp_path / "runs"),
        "LIMITS_TIMEOUT_MS": "10000",
    }
    command = [sys.executable, "-m", "app", "migrate"]
    subprocess.run(command, cwd=ROOT, env=service_environ(**environ), check=True, capture_output=True, timeout=60)
    return environ


@contextlib.contextmanager
def crashes(points: Any, folder: Path, environ: dict[str, str], redis: RedisAt | None) -> Iterator[dict[str, Crash]]:
    """A process for each point, up and warm."""
    with ThreadPoolExecutor(4) as pool:
        started = list(pool.map(lambda point: Crash(point.__name__, folder, environ, redis), points))
    try:
        yield {crash.name: crash for crash in started}
    finally:
        for crash in started:
            crash.close()


def check(points: Any, all_crashes: dict[str, Crash], folder: Path, environ: dict[str, str]) -> None:
    """After a restart: what each repeat gets, how often each tool ran, and the rows."""
    running = start_service(**environ)
    try:
        answered: set[str] = set()
        for point, (ran, outcome) in points.items():
            crash = all_crashes[point.__name__]
            tool = "put" if outcome == "success" else "pay_and_die" if "before_its_row" in crash.name else "pay"
            parameters = {} if tool == "pay_and_die" else {"gate": str(crash.gate)}
            assert runs(folder, crash.name) == ran, crash.name
            crash.gate.unlink(missing_ok=True)
            final = again(running, tool, crash.name, **parameters)
            reason = final.get("data", {}).get("reason")
            now = runs(folder, crash.name)
            if outcome is None:
                assert (now, reason) in ((1, None), (0, UNKNOWN)), final
            elif outcome == UNKNOWN:
                assert (now, reason) == (ran, UNKNOWN), (crash.name, final)
                assert crash.heard is None, "an answer left, and its outcome is lost"
            else:
                assert final["status"] == "success" and now == ran + (outcome == "success"), (crash.name, final)
                assert final.get("replayed", False) is (outcome == "replayed")
                if crash.heard is not None:
                    assert final == {**crash.heard, "replayed": True}
            assert call(running, tool, crash.name, **parameters).get("replayed", reason == UNKNOWN)
            assert runs(folder, crash.name) == now, "and never again"
            if "execution_id" in final and "status" in final:
                answered.add(final["execution_id"])
        assert answered <= rows(running, answered)
    finally:
        end(running)


def rows(running: Running, wanted: set[str]) -> set[str]:
    found: set[str] = set()

    def there() -> bool:
        page = running.rpc("tools.get_execution_history", {"limit": 200})["result"]["executions"]
        ids = [row["execution_id"] for row in page]
        assert len(set(ids)) == len(ids)
        found.update(ids)
        return wanted <= found

    wait_until(there, "every answered call has its row")
    return found


def test_with_redis_no_crash_makes_two_runs_or_a_success_that_was_lost(
    environ: dict[str, str], redis: RedisAt, tmp_path: Path
) -> None:
    redis.cli("FLUSHDB")
    _REDIS[:] = [redis]
    with crashes(REDIS_POINTS, tmp_path, environ, redis) as all_crashes:
        for point in REDIS_POINTS:
            crash = all_crashes[point.__name__]
            point(crash)
            crash.die()
            assert crash.proxy is not None
            if point is after_its_row_before_its_outcome:
                crash.proxy.reset()  # what it sent and nobody had read is lost
            else:
                crash.proxy.heal()  # or arrives now
        check(REDIS_POINTS, all_crashes, tmp_path, {**environ, "REDIS_URL": redis.url})


def after_its_answer_without_its_outcome(crash: Crash) -> None:
    """Another process holds the file for longer than the call waits; the answer leaves, and it dies."""
    crash.start()
    crash.wait_for_run()
    with contextlib.closing(sqlite3.connect(crash.folder / "journal" / "idempotency.db", isolation_level=None)) as file:
        file.execute("BEGIN IMMEDIATE")
        crash.gate.unlink()
        crash.caller.join(30)
        assert crash.heard is not None and crash.heard["status"] == "success"
        crash.running.process.kill()
        crash.running.process.wait(30)
        crash.heard = None  # it is true that it was heard: here a repeat is told that nobody knows, and nothing runs
        file.execute("ROLLBACK")


FILE_POINTS = {
    while_the_tool_runs: (1, UNKNOWN),
    after_the_tool_before_its_row: (1, UNKNOWN),
    after_its_answer_without_its_outcome: (1, UNKNOWN),
    after_its_answer: (1, "replayed"),
    while_a_harmless_tool_runs: (1, "success"),
}


def test_with_the_file_no_crash_makes_two_runs_or_a_success_that_was_lost(
    environ: dict[str, str], tmp_path: Path
) -> None:
    with crashes(FILE_POINTS, tmp_path, environ, None) as all_crashes:
        for point in FILE_POINTS:
            crash = all_crashes[point.__name__]
            point(crash)
            crash.die()
        check(FILE_POINTS, all_crashes, tmp_path, environ)
