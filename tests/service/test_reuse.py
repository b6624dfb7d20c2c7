"""Reuse over two replicas on one Redis and one PostgreSQL, seen through their doors."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.access.keyring import make_key
from tests.conftest import ROOT, Running, Serve, end, service_environ, start_service
from tests.proxy import FaultProxy
from tests.servers import HOST, PostgresAt, RedisAt, RedisServer, wait_until
from tests.transport.mcp_wire import send

MODULE = "tests.service.reuse_tools"

LIMITS = """
policies:
  - {name: day, match: {tool: search}, per: [tenant], rate: 100000/second, quota: {daily: 1000}}
"""

CALLERS = {
    "anna": ("acme", "anna", ()),
    "ben": ("acme", "ben", ()),
    "bob": ("bcme", "anna", ()),
    "root": ("ops", "root", ("admin",)),
}

PATIENT_MS = "10000"
"""Nothing here is about how long Redis may take."""

_names = itertools.count()


@pytest.fixture
def name() -> str:
    """Of this test's runs alone."""
    return f"name-{next(_names)}"


@dataclass
class Site:
    one: Running
    two: Running
    """It sees Redis through `proxy`."""
    proxy: FaultProxy
    redis: RedisServer
    environ: dict[str, str]
    keys: dict[str, str]
    folder: Path

    def call(self, running: Running, tool: str, who: str = "anna", **params: Any) -> dict[str, Any]:
        """tools.execute; the Execution or the error."""
        named = {key: params.pop(key) for key in ("idempotency_key", "call_id") if key in params}
        answer = self.rpc(running, "tools.execute", {"tool_id": tool, "parameters": params, **named}, who)
        return answer.get("result") or answer["error"]

    def rpc(
        self, running: Running, method: str, params: Any, who: str = "anna", headers: dict[str, str] | None = None
    ) -> dict[str, Any]:
        body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        response = running.http.post("/api/v1/jsonrpc", json=body, headers={**self.bearer(who), **(headers or {})})
        found: dict[str, Any] = response.json()
        return found

    def mcp(self, running: Running, params: Any, headers: dict[str, str]) -> dict[str, Any]:
        """tools/call; its result or the error."""
        body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
        sent = {**self.bearer("anna"), "MCP-Protocol-Version": "2025-06-18", **headers}
        answer = running.http.post("/mcp", json=body, headers=sent).json()
        found: dict[str, Any] = answer.get("result") or answer["error"]
        return found

    def rest(
        self, running: Running, tool: str, key: str | bytes, who: str = "anna", **parameters: Any
    ) -> tuple[int, dict[str, Any]]:
        headers = {**self.bearer(who), "Idempotency-Key": key}
        path = f"/api/v1/tools/{tool}/execute"
        response = running.http.post(path, json={"parameters": parameters}, headers=headers)
        return response.status_code, response.json()

    def bearer(self, who: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[who]}"}

    def runs(self, name: str) -> int:
        file = self.folder / "runs"
        return file.read_text().splitlines().count(name) if file.exists() else 0

    def gate(self, name: str) -> Path:
        path = self.folder / f"gate-{name}"
        path.touch()
        return path

    def rows(self, tool: str, of: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        page = self.rpc(self.one, "tools.get_execution_history", {"tool_id": tool, "limit": 200})["result"]
        return [row for row in page["executions"] if of(row)]


@pytest.fixture(scope="module")
def site(postgres: PostgresAt, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("reuse")
    (folder / "limits.yaml").write_text(LIMITS)
    database = postgres.create_database()
    with RedisServer() as redis, FaultProxy(redis.port) as proxy:
        environ = {
            "DATABASE_URL": database,
            "REDIS_URL": redis.url,
            "LIMITS_FILE": str(folder / "limits.yaml"),
            "LIMITS_TIMEOUT_MS": PATIENT_MS,
            "AUTH_MODE": "required",
            "TOOL_MODULES": MODULE,
            "RUNS_FILE": str(folder / "runs"),
        }
        command("migrate", environ)
        keys = {
            who: make_key(database, tenant=tenant, subject=subject, **({"scopes": ALL_SCOPES} if scopes else {}))[1]
            for who, (tenant, subject, scopes) in CALLERS.items()
        }
        with ThreadPoolExecutor() as pool:
            urls = (redis.url, f"redis://{HOST}:{proxy.port}/0")
            one, two = pool.map(lambda url: start_service(**{**environ, "REDIS_URL": url}), urls)
        site = Site(one, two, proxy, redis, environ, keys, folder)
        whole(site)
        yield site
        for running in (one, two):
            end(running)


ALL_SCOPES = ["admin", "tools:execute", "tools:read", "executions:read"]


def command(words: str, environ: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "app", *words.split()],
        cwd=ROOT,
        env=service_environ(**environ),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Idempotency keys


def test_fifty_parallel_repeats_on_two_replicas_are_one_run(site: Site, name: str) -> None:
    for running in (site.one, site.two):
        site.call(running, "pay", name=f"{name}-first", idempotency_key=f"{name}-first")
    with ThreadPoolExecutor(50) as pool:
        replicas = [site.one, site.two] * 25
        answers = list(pool.map(lambda one: site.call(one, "pay", name=name, idempotency_key=name), replicas))
    outcomes = Counter(answer["data"]["reason"] if "data" in answer else answer["status"] for answer in answers)
    assert set(outcomes) <= {"success", "still_running"} and outcomes["success"] >= 1
    assert len({answer["execution_id"] for answer in answers if "status" in answer}) == 1
    assert sum("status" in answer and "replayed" not in answer for answer in answers) == 1
    assert site.runs(name) == 1


def test_a_replay_is_the_first_answer_on_any_replica_and_writes_no_row(site: Site, name: str) -> None:
    first = site.call(site.one, "pay", name=name, idempotency_key=name)
    for running in (site.one, site.two):
        assert site.call(running, "pay", name=name, idempotency_key=name) == {**first, "replayed": True}
    last = site.call(site.one, "pay", name=name)
    wait_until(lambda: bool(site.rows("pay", lambda row: row["execution_id"] == last["execution_id"])), "the last row")
    assert len(site.rows("pay", lambda row: row["execution_id"] == first["execution_id"])) == 1
    assert site.runs(name) == 2
    assert site.two.metric("tool_reuse_total", tool_id="pay", outcome="replayed") >= 1


def test_a_key_comes_by_header_or_parameter_and_not_by_both_that_differ(site: Site, name: str) -> None:
    params = {"tool_id": "pay", "parameters": {"name": name}}
    first = site.rpc(site.one, "tools.execute", params, headers={"Idempotency-Key": name})["result"]
    quoted = site.rpc(site.two, "tools.execute", params, headers={"Idempotency-Key": f'"{name}"'})["result"]
    both = {**params, "idempotency_key": name}
    same = site.rpc(site.one, "tools.execute", both, headers={"Idempotency-Key": name})["result"]
    assert quoted == same == {**first, "replayed": True}
    assert site.rest(site.two, "pay", name, name=name) == (200, {**first, "replayed": True})
    for header in ("other", "", "x" * 257):
        refused = site.rpc(site.one, "tools.execute", both, headers={"Idempotency-Key": header})
        assert refused["error"]["code"] == -32602, header
    assert site.runs(name) == 1


@pytest.mark.parametrize("ending", [" ", "\t", " \t "])
def test_blanks_around_a_header_are_no_part_of_the_key(site: Site, name: str, ending: str) -> None:
    first = site.call(site.one, "pay", name=name, idempotency_key=name)
    headers = [*site.bearer("anna").items(), ("Idempotency-Key", f"{ending}{name}{ending}")]
    path, body = "/api/v1/tools/pay/execute", {"parameters": {"name": name}}
    answer = send(site.one, body, headers, path=path)  # httpx would not send it
    assert answer.status == 200 and json.loads(answer.body) == {**first, "replayed": True}


def test_a_key_beyond_ascii_is_the_same_in_header_and_body(site: Site, name: str) -> None:
    key = f"{name}-ключ-ø"
    first = site.call(site.one, "pay", name=name, idempotency_key=key)
    assert site.rest(site.two, "pay", key.encode(), name=name) == (200, {**first, "replayed": True})
    status, refused = site.rest(site.two, "pay", key.encode("cp1251", "replace"), name=name)
    assert status == 422 and refused["error"]["code"] == -32602 and site.runs(name) == 1


def test_a_header_is_a_key_over_mcp_too(site: Site, name: str) -> None:
    first = site.mcp(site.one, {"name": "pay", "arguments": {"name": name}}, {"Idempotency-Key": name})
    again = site.mcp(site.two, {"name": "pay", "arguments": {"name": name}}, {"Idempotency-Key": name})
    assert again["structuredContent"] == first["structuredContent"] and site.runs(name) == 1
    other = {"name": "pay", "arguments": {"name": name}, "_meta": {"idempotencyKey": "other"}}
    assert site.mcp(site.one, other, {"Idempotency-Key": name})["code"] == -32602
    batch = [
        {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "pay", "arguments": {"name": name}}}
    ]
    headers = {**site.bearer("anna"), "MCP-Protocol-Version": "2025-03-26", "Idempotency-Key": name}
    answer = site.one.http.post("/mcp", json=batch, headers=headers).json()
    assert answer["error"]["code"] == -32600 and site.runs(name) == 1


@pytest.mark.parametrize("method", ["tools.execute_batch", "tools.execute_parallel", "tools.execute_with_fallback"])
def test_a_header_is_for_one_call(site: Site, name: str, method: str) -> None:
    item = {"tool_id": "pay", "parameters": {"name": name}}
    params = {
        "tools.execute_batch": {"requests": [item]},
        "tools.execute_parallel": {"tasks": [{"task_id": "a", **item}]},
        "tools.execute_with_fallback": {"primary": item, "fallback": item},
    }[method]
    assert site.rpc(site.one, method, params, headers={"Idempotency-Key": name})["error"]["code"] == -32602
    batch = [{"jsonrpc": "2.0", "id": 1, "method": "tools.execute", "params": item}]
    headers = {**site.bearer("anna"), "Idempotency-Key": name}
    answer = site.one.http.post("/api/v1/jsonrpc", json=batch, headers=headers).json()
    assert answer["error"]["code"] == -32600 and site.runs(name) == 0


def test_items_of_a_batch_have_keys_of_their_own(site: Site, name: str) -> None:
    item = {"tool_id": "pay", "parameters": {"name": name}}
    requests = [{**item, "idempotency_key": f"{name}-{number}"} for number in (1, 2, 1)]
    params = {"requests": requests, "max_concurrent": 1}
    results = site.rpc(site.one, "tools.execute_batch", params)["result"]["results"]
    assert [result.get("replayed", False) for result in results] == [False, False, True]
    assert results[2]["execution_id"] == results[0]["execution_id"] and site.runs(name) == 2


def test_no_fallback_runs_beside_a_first_call_that_still_runs_or_has_no_outcome(site: Site, name: str) -> None:
    """A client that repeats a chain: the fallback would do the same thing a second time."""
    gate = site.gate(name)
    primary = {"tool_id": "pay", "parameters": {"name": name, "gate": str(gate)}, "idempotency_key": name}
    fallback = {"tool_id": "put", "parameters": {"name": name}, "idempotency_key": name}
    chain = {"primary": primary, "fallback": fallback}
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(site.rpc, site.one, "tools.execute_with_fallback", chain)
        wait_until(lambda: site.runs(name) == 1, "the first runs")
        again = site.rpc(site.two, "tools.execute_with_fallback", chain)
        assert (again["error"]["code"], again["error"]["data"]["reason"]) == (-32007, "still_running")
        other = {**chain, "primary": {**primary, "parameters": {"name": name}}}
        refused = site.rpc(site.two, "tools.execute_with_fallback", other)
        assert (refused["error"]["code"], refused["error"]["data"]["reason"]) == (-32007, "other_call")
        gate.unlink()
        assert not first.result()["result"]["used_fallback"]
    last = site.rpc(site.two, "tools.execute_with_fallback", chain)["result"]
    assert last["result"] == {**first.result()["result"]["result"], "replayed": True} and site.runs(name) == 1


def test_conflicts_have_their_status_on_rest(site: Site, name: str) -> None:
    gate = site.gate(name)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(site.rest, site.one, "pay", name, name=name, gate=str(gate))
        wait_until(lambda: site.runs(name) == 1, "the first runs")
        status, answer = site.rest(site.two, "pay", name, name=name, gate=str(gate))
        data = answer["error"]["data"]
        assert (status, data["reason"], data["retryable"]) == (409, "still_running", True)
        assert 0 < data["retry_after_ms"] <= 1_000
        status, answer = site.rest(site.two, "pay", name, name=name)
        data = answer["error"]["data"]
        assert (status, data["reason"], data["retryable"]) == (422, "other_call", False)
        gate.unlink()
        assert first.result()[0] == 200
    assert data["first_execution_id"] == first.result()[1]["execution_id"] and site.runs(name) == 1


def test_a_key_that_redis_lost_while_its_call_ran_is_kept_from_its_end(site: Site, name: str) -> None:
    gate = site.gate(name)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(site.call, site.one, "pay", name=name, gate=str(gate), idempotency_key=name)
        wait_until(lambda: site.runs(name) == 1, "the first runs")
        site.redis.cli("FLUSHALL")
        gate.unlink()
        answer = first.result()
    again = site.call(site.two, "pay", name=name, gate=str(gate), idempotency_key=name)
    assert again == {**answer, "replayed": True} and site.runs(name) == 1


def test_callers_with_the_same_key_never_meet(site: Site, name: str) -> None:
    answers = {who: site.call(site.one, "pay", who, name=name, idempotency_key=name) for who in ("anna", "ben", "bob")}
    assert len({answer["execution_id"] for answer in answers.values()}) == 3 and site.runs(name) == 3
    for who, answer in answers.items():
        again = site.call(site.two, "pay", who, name=name, idempotency_key=name)
        assert again == {**answer, "replayed": True}


def test_without_redis_nothing_runs_but_what_may_run_twice(site: Site, name: str) -> None:
    site.proxy.reset()
    try:
        for _ in range(3):
            error = site.call(site.two, "pay", name=name, idempotency_key=name)
            assert (error["code"], error["data"]["retryable"]) == (-32008, True)
        assert site.runs(name) == 0
        assert site.call(site.two, "put", name=name, idempotency_key=name)["status"] == "success"
        assert site.call(site.two, "pay", name=name)["status"] == "success", "without a key nothing is promised"
    finally:
        site.proxy.heal()
    wait_until(lambda: "status" in site.call(site.two, "pay", name=name, idempotency_key=name), "it is back")
    assert site.runs(name) == 3
    whole(site)


# Kept results


def test_a_result_is_kept_for_all_replicas_and_its_hits_are_logged_and_counted(site: Site, name: str) -> None:
    def used() -> int:
        status = site.rpc(site.one, "tools.get_rate_limit_status", {"tool_id": "search"})["result"]
        found: int = status["quota"]["daily"]["used"]
        return found

    before, hits = used(), site.one.metric("tool_reuse_total", tool_id="search", outcome="hit")
    first = site.call(site.one, "search", name=name)
    shared(site, name)
    second, third = site.call(site.two, "search", "ben", name=name), site.call(site.one, "search", name=name)
    assert [answer["cached"] for answer in (first, second, third)] == [False, True, True]
    assert second["result"] == third["result"] == first["result"] and second["attempts"] == 0
    assert used() == before + 1, "a hit spends no quota"
    assert site.one.metric("tool_reuse_total", tool_id="search", outcome="hit") == hits + 1
    ids = {answer["execution_id"]: answer["cached"] for answer in (first, second, third)}
    wait_until(lambda: len(site.rows("search", lambda row: row["execution_id"] in ids)) == 3, "three rows")
    assert {
        row["execution_id"]: row["cached"] for row in site.rows("search", lambda row: row["execution_id"] in ids)
    } == ids


def test_the_overhead_of_a_hit_is_observed_by_each_method(site: Site, name: str) -> None:
    hit = {"tool_id": "search", "parameters": {"name": name}}
    site.call(site.one, "search", name=name)
    for method, params in {
        "tools.execute": hit,
        "tools.execute_batch": {"requests": [hit]},
        "tools.execute_parallel": {"tasks": [{"task_id": "a", **hit}]},
        "tools.execute_with_fallback": {"primary": hit, "fallback": []},
    }.items():
        before = site.one.metric("framework_overhead_seconds_count")
        assert '"cached": true' in json.dumps(site.rpc(site.one, method, params)["result"])
        assert site.one.metric("framework_overhead_seconds_count") == before + 1, method


def test_tenants_have_results_of_their_own_unless_the_tool_shares(site: Site, name: str) -> None:
    for tool, runs in (("search", 2), ("search_for_all", 1)):
        for who in ("anna", "bob", "anna", "bob"):
            assert site.call(site.one, tool, who, name=name + tool)["status"] == "success"
        assert site.runs(name + tool) == runs


def by_route(site: Site, tool: str) -> None:
    response = site.one.http.delete(f"/api/v1/admin/cache/{tool}", headers=site.bearer("root"))
    assert response.json() == {"tool_id": tool, "forgotten": True}


def by_command(site: Site, tool: str) -> None:
    assert tool in command(f"tools invalidate {tool}", site.environ)


@pytest.mark.parametrize("forget", [by_route, by_command])
def test_what_is_forgotten_is_forgotten_on_all_replicas(
    site: Site, name: str, forget: Callable[[Site, str], None]
) -> None:
    kept(site, name)
    forget(site, "search")
    seen: list[int] = []
    for running in (site.one, site.two):
        wait_until(lambda running=running: seen_run(site, running, name, seen) == 2, "the new result")  # type: ignore[misc]
    assert 2 in seen and site.runs(name) <= 4


HOLDS = """
for _, key in ipairs(redis.call("KEYS", "agentcore:result:*")) do
    if string.find(redis.call("GET", key) or "", ARGV[1], 1, true) then return 1 end
end
return 0
"""


def shared(site: Site, name: str) -> None:
    """Wait until Redis has a result of it: an answer does not wait for that, and before it another replica runs."""
    wait_until(lambda: site.redis.cli("EVAL", HOLDS, 0, f'"{name}"') == "1", "it is in Redis")


def whole(site: Site) -> None:
    """Wait until the second replica has caught up with Redis: it gives what it has not run."""

    def caught_up() -> bool:
        name = f"whole-{next(_names)}"
        site.call(site.one, "search", name=name)
        shared(site, name)
        cached: bool = site.call(site.two, "search", name=name)["cached"]
        return cached

    wait_until(caught_up, "it has caught up")


def kept(site: Site, name: str) -> None:
    """On both replicas, the first one's."""
    site.call(site.one, "search", name=name)
    shared(site, name)
    assert site.call(site.two, "search", name=name)["cached"]


def seen_run(site: Site, running: Running, name: str, seen: list[int]) -> int:
    run: int = site.call(running, "search", name=name)["result"]["run"]
    seen.append(run)
    return min(run, 2)


def test_a_replica_that_was_away_meanwhile_forgets_when_it_is_back(site: Site, name: str) -> None:
    kept(site, name)
    site.proxy.reset()
    try:
        by_route(site, "search")
        assert site.call(site.two, "search", name=name)["result"]["run"] == 1, "it cannot know"
        assert site.call(site.one, "search", name=name)["result"]["run"] == 2
    finally:
        site.proxy.heal()
    wait_until(lambda: site.call(site.two, "search", name=name)["result"]["run"] >= 2, "it knows")
    whole(site)


def test_only_an_admin_makes_others_forget(site: Site) -> None:
    response = site.one.http.delete("/api/v1/admin/cache/search", headers=site.bearer("anna"))
    assert response.status_code == 403
    response = site.one.http.delete("/api/v1/admin/cache/nothing", headers=site.bearer("root"))
    assert response.status_code == 404


def test_a_stale_result_is_given_while_one_replica_fetches_a_new_one(site: Site, name: str) -> None:
    site.call(site.one, "search_news", name=name)
    shared(site, name)
    new = {id(running): 0 for running in (site.one, site.two)}
    stale_before = site.one.metric("tool_reuse_total", tool_id="search_news", outcome="stale")
    ends = time.monotonic() + 60
    while min(new.values()) < 2 and time.monotonic() < ends:
        for running in (site.one, site.two):
            answer = site.call(running, "search_news", name=name)
            assert answer["cached"], "nobody waits for the refresh"
            new[id(running)] = max(new[id(running)], answer["result"]["run"])
    assert set(new.values()) == {2} and site.runs(name) == 2
    stale = site.one.metric("tool_reuse_total", tool_id="search_news", outcome="stale") - stale_before
    stale += site.two.metric("tool_reuse_total", tool_id="search_news", outcome="stale")
    assert stale >= 1


# Joining and cancelling


def test_joined_calls_are_one_run_and_a_row_each(site: Site, name: str) -> None:
    gate = site.gate(name)
    before = site.one.metric("tool_execution_concurrency")
    with ThreadPoolExecutor(20) as pool:
        calls = [pool.submit(site.call, site.one, "read", name=name, gate=str(gate)) for _ in range(20)]
        wait_until(lambda: site.one.metric("tool_execution_concurrency") == before + 20, "all are there")
        gate.unlink()
        answers = [call.result() for call in calls]
    assert Counter(answer["cached"] for answer in answers) == {False: 1, True: 19} and site.runs(name) == 1
    ids = {answer["execution_id"] for answer in answers}
    wait_until(lambda: len(site.rows("read", lambda row: row["execution_id"] in ids)) == 20, "a row each")


def test_tools_cancel_reaches_a_call_on_the_other_replica(site: Site, name: str) -> None:
    gate = site.gate(name)
    for who in ("anna", "root"):  # its caller, or an admin
        run = site.runs(name)
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(site.call, site.one, "pay", name=name, gate=str(gate), call_id=name)
            wait_until(lambda run=run: site.runs(name) == run + 1, "it runs")  # type: ignore[misc]
            for other in ("ben", "bob"):
                assert cancelled(site, site.two, {"call_id": name}, other) is False
            # Asked again where the answer took longer than is waited for.
            wait_until(
                lambda call=call, who=who: cancelled(site, site.two, {"call_id": name}, who) or call.done(),  # type: ignore[misc]
                "it is cancelled",
            )
            assert call.result()["status"] == "cancelled"
    gate.unlink()


def cancelled(site: Site, running: Running, params: dict[str, Any], who: str) -> bool:
    found: bool = site.rpc(running, "tools.cancel", params, who)["result"]["cancelled"]
    return found


def test_a_call_that_nobody_runs_is_known_to_be_none_without_a_wait(site: Site) -> None:
    """All say no: it is not waited for the half second that an answer may take."""
    took = []
    for _ in range(5):
        began = time.monotonic()
        assert cancelled(site, site.two, {"execution_id": "0197f1d2-0000-7000-8000-000000000000"}, "anna") is False
        took.append(time.monotonic() - began)
    assert min(took) < 0.4, took


# Settings


def test_result_cache_bytes_0_keeps_nothing_and_redis_pool_size_bounds_connections(
    serve: Serve, tmp_path: Path, redis_url: str
) -> None:
    running = serve(
        REDIS_URL=redis_url,
        LIMITS_TIMEOUT_MS=PATIENT_MS,
        RESULT_CACHE_BYTES="0",
        REDIS_POOL_SIZE="2",
        TOOL_MODULES=MODULE,
        RUNS_FILE=str(tmp_path / "runs"),
    )
    assert [running.execute("search", {"name": "a"})["cached"] for _ in range(2)] == [False, False]
    with ThreadPoolExecutor(20) as pool:
        keyed = pool.map(lambda n: running.execute("pay", {"name": "b"}, idempotency_key=str(n)), range(40))
        assert {answer["status"] for answer in keyed} == {"success"}
    assert not [key for key in redis_keys(redis_url) if ":result:" in key]
    assert sum("agentcore-tools:cache" in line for line in clients(redis_url)) <= 2


def redis_keys(url: str) -> list[str]:
    return RedisAt(url).cli("KEYS", "*").split("\n")


def clients(url: str) -> list[str]:
    return RedisAt(url).cli("CLIENT", "LIST").split("\n")


@pytest.mark.parametrize("enabled", ["true", "false"])
def test_enable_result_compression_makes_what_redis_keeps_smaller(
    serve: Serve, tmp_path: Path, redis_url: str, enabled: str
) -> None:
    redis = RedisAt(redis_url)
    environ = {"REDIS_URL": redis_url, "LIMITS_TIMEOUT_MS": PATIENT_MS, "RUNS_FILE": str(tmp_path / "runs")}
    running = serve(ENABLE_RESULT_COMPRESSION=enabled, TOOL_MODULES=MODULE, **environ)
    running.execute("search", {"name": "a"})
    found = "agentcore:result:*"
    wait_until(lambda: redis.cli("KEYS", found) != "", "it is kept")
    assert (int(redis.cli("STRLEN", redis.cli("KEYS", found))) < 2_000) is (enabled == "true")
    assert running.execute("search", {"name": "a"})["cached"]
