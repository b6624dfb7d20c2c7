"""Limits of several replicas together, seen through their doors, while Redis works and while it does not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest
import redis

from tests.conftest import Running, end, start_service
from tests.servers import RedisServer
from tests.waiting import SOON_S

pytestmark = pytest.mark.anyio

PATIENT_MS = 10_000
"""Where Redis is well: on a slow machine it may take longer than the budget, and away it changes what is counted."""

BUDGET_MS = 50

LIMITS = """
policies:
  - {name: hot, match: {tool: echo}, rate: 200/second, burst: 1000}
  - {name: day, match: {tool: current_time}, quota: {daily: 300, monthly: 250}}
  - {name: local, match: {tool: calculator}, rate: 100000/second, on_store_failure: local}
  - {name: closed, match: {tool: count_calls}, quota: {daily: 1000000}, on_store_failure: closed}
  - {name: open, match: {tool: who_calls}, rate: 100000/second, on_store_failure: open}
  - {name: few, match: {tool: wait}, quota: {monthly: 5}}
"""

HOT_RATE, HOT_BURST = 200, 1_000
"""A burst of 5 s: nothing is lost while the callers stand still for less."""

REFUSED_EACH = 100
"""Until each connection was refused so often, the burst is long over and the rate is what lets calls in."""


@dataclass
class Door:
    """One connection to a service: calls one after another, each with what its caller waited."""

    port: int
    answers: list[tuple[float, str]] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def call(self, tool_id: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
        """The result or the error object; `answers` takes the wait in seconds and the outcome."""
        request = {"jsonrpc": "2.0", "id": 1, "method": "tools.execute"}
        body = json.dumps({**request, "params": {"tool_id": tool_id, "parameters": parameters or {}}}).encode()
        began = time.perf_counter()
        self._writer.write(
            b"POST /api/v1/jsonrpc HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%b" % (len(body), body)
        )
        head = await self._reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        answer: dict[str, Any] = json.loads(await self._reader.readexactly(length))
        found: dict[str, Any] = answer.get("result") or answer["error"]
        outcome = found["status"] if "status" in found else found["data"]["error_type"]
        self.answers.append((time.perf_counter() - began, outcome))
        return found


@pytest.fixture(scope="module")
def limits_redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="module")
def replicas(limits_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Running]]:
    """Four processes with the same limits on one Redis."""
    with started(4, limits_redis, tmp_path_factory.mktemp("limits"), PATIENT_MS) as running:
        yield running


@pytest.fixture(scope="module")
def failing_redis() -> Iterator[RedisServer]:
    """Killed and stopped, and started again."""
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="module")
def hasty(failing_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Running]]:
    """Two that wait for it no longer than the budget."""
    with started(2, failing_redis, tmp_path_factory.mktemp("limits"), BUDGET_MS) as running:
        yield running


@contextlib.contextmanager
def started(count: int, server: RedisServer, folder: Path, budget_ms: int) -> Iterator[list[Running]]:
    (folder / "limits.yaml").write_text(LIMITS)
    environ = {
        "REDIS_URL": server.url,
        "LIMITS_FILE": str(folder / "limits.yaml"),
        "LIMITS_TIMEOUT_MS": str(budget_ms),
        "TOOL_MODULES": "tests.tools_for_tests",
        "ENABLE_DATABASE_LOGGING": "false",
    }
    with ThreadPoolExecutor() as pool:
        running = list(pool.map(lambda _: start_service(**environ), range(count)))
    yield running
    for one in running:
        end(one)


async def on_all(
    replicas: list[Running], each: int, work: Callable[[Door], Awaitable[None]]
) -> list[tuple[float, str]]:
    """Work on so many connections to each replica at once; every answer of all."""
    async with contextlib.AsyncExitStack() as stack:
        doors = [await stack.enter_async_context(Door(one.port)) for one in replicas for _ in range(each)]
        await asyncio.gather(*(work(door) for door in doors))
        return [answer for door in doors for answer in door.answers]


async def test_four_replicas_admit_a_hot_key_as_one(replicas: list[Running], limits_redis: RedisServer) -> None:
    """As much as the burst and the rate let in until the last call that was refused, and no more."""
    first_s, refused_s = math.inf, 0.0

    async def hammer(door: Door) -> None:
        nonlocal first_s, refused_s
        refused = 0
        while refused < REFUSED_EACH:
            sent_s = time.perf_counter()
            found = await door.call("echo", {"message": "x"})
            first_s = min(first_s, time.perf_counter())
            if "data" in found:
                refused += 1
                refused_s = max(refused_s, sent_s)
                await asyncio.sleep(0.002)

    began = time.perf_counter()
    answers = await on_all(replicas, 3, hammer)
    took = time.perf_counter() - began
    counted = Counter(outcome for _, outcome in answers)
    print(f"hot key: {counted} in {took:.2f} s")
    assert set(counted) == {"success", "rate_limit"}
    assert counted["success"] <= HOT_BURST + HOT_RATE * took + 1
    assert counted["success"] >= HOT_BURST + HOT_RATE * (refused_s - first_s) - 2, "then there was nothing left"


async def test_a_quota_of_all_replicas_is_exact_to_the_call(replicas: list[Running], limits_redis: RedisServer) -> None:
    """200 callers at once over two of them; the month refuses first and leaves the day alone."""

    async def call_often(door: Door) -> None:
        for _ in range(3):
            await door.call("current_time")

    answers = await on_all(replicas[:2], 100, call_often)
    assert Counter(outcome for _, outcome in answers) == {"success": 250, "quota": 350}
    for replica in replicas:
        quota = replica.rpc("tools.get_rate_limit_status", {"tool_id": "current_time"})["result"]["quota"]
        assert (quota["daily"]["used"], quota["monthly"]["used"], quota["monthly"]["remaining"]) == (250, 250, 0)
    assert replicas[2].execute("current_time")["data"]["rule"] == "day"


async def test_many_callers_share_commands(replicas: list[Running], limits_redis: RedisServer) -> None:
    """200 connections to one replica: as MONITOR sees it, one command for many of their calls."""

    async def call_often(door: Door) -> None:
        for _ in range(10):
            await door.call("calculator", {"expression": "1+1"})

    with Monitor(limits_redis) as monitor:
        answers = await on_all(replicas[:1], 200, call_often)
        commands = monitor.commands()
    assert Counter(outcome for _, outcome in answers) == {"success": 2000}
    print(f"{commands} for 2000 calls")
    assert set(commands) == {"EVALSHA"} and commands["EVALSHA"] < 500


class Monitor:
    """What clients send to a server, script calls of scripts left out."""

    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self._client = redis.Redis(host=server.host, port=server.port)

    def __enter__(self) -> Self:
        self._monitor = self._client.monitor().__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._monitor.__exit__(None, None, None)
        self._client.close()

    def commands(self) -> Counter[str]:
        """By name, until now."""
        self._server.cli("ECHO", "until now")
        counted: Counter[str] = Counter()
        for seen in self._monitor.listen():
            name = seen["command"].split(" ")[0].upper()
            if name == "ECHO":
                return counted
            if seen["client_type"] != "lua" and name not in ("HELLO", "CLIENT"):
                counted[name] += 1
        raise AssertionError("the monitor ended")


def a_kill(server: RedisServer) -> None:
    server.kill()


def a_stop(server: RedisServer) -> None:
    server.pause()


def a_start(server: RedisServer) -> None:
    server.start()


def a_continuation(server: RedisServer) -> None:
    server.resume()


@pytest.mark.parametrize(("begin", "heal"), [(a_kill, a_start), (a_stop, a_continuation)])
async def test_redis_away_under_load_is_what_each_policy_says_and_over_without_a_restart(
    hasty: list[Running],
    failing_redis: RedisServer,
    begin: Callable[[RedisServer], None],
    heal: Callable[[RedisServer], None],
) -> None:
    tools: list[tuple[str, dict[str, Any]]] = [
        ("calculator", {"expression": "1+1"}),
        ("count_calls", {}),
        ("who_calls", {}),
    ]
    seen: dict[str, Counter[str]] = {tool_id: Counter() for tool_id, _ in tools}
    ends = asyncio.Event()
    doors: list[Door] = []

    async def call_on(door: Door) -> None:
        tool_id, parameters = tools[len(doors) % len(tools)]
        doors.append(door)
        while not ends.is_set():
            await door.call(tool_id, parameters)
            seen[tool_id][door.answers[-1][1]] += 1
            await asyncio.sleep(0.005)

    async def until(outcome: Callable[[], bool]) -> None:
        async with asyncio.timeout(SOON_S):
            while not outcome():
                await asyncio.sleep(0.01)

    async def until_answered_anew() -> None:
        """Everybody, twice: who asks is known by the second answer."""
        before = [len(door.answers) for door in doors]
        await until(lambda: all(len(door.answers) >= count + 2 for door, count in zip(doors, before, strict=True)))

    load = asyncio.create_task(on_all(hasty, 9, call_on))
    await until(lambda: all(counter["success"] > 20 for counter in seen.values()))
    await asyncio.to_thread(begin, failing_redis)
    await until(lambda: seen["count_calls"]["dependency_unavailable"] > 50)
    while [await asyncio.to_thread(one.metric, "limit_store_up") for one in hasty] != [0, 0]:
        await until_answered_anew()
    await until_answered_anew()  # what was let in before
    away = {tool_id: counter["success"] for tool_id, counter in seen.items()}
    await until(lambda: all(seen[tool_id]["success"] > away[tool_id] + 50 for tool_id in ("calculator", "who_calls")))
    assert seen["count_calls"]["success"] == away["count_calls"], "what must be counted does not run"
    await asyncio.to_thread(heal, failing_redis)
    await until(lambda: seen["count_calls"]["success"] > away["count_calls"] + 20)
    ends.set()
    answers = await asyncio.wait_for(load, SOON_S)
    worst = sorted((wait for wait, _ in answers), reverse=True)[:5]
    print(f"{begin.__name__}: {len(answers)} answers, worst {[f'{w * 1e3:.0f} ms' for w in worst]}")
    assert set(seen["calculator"]) == set(seen["who_calls"]) == {"success"}
    assert set(seen["count_calls"]) == {"success", "dependency_unavailable"}
    for one in hasty:
        await until(lambda one=one: one.metric("limit_store_up") == 1)  # type: ignore[misc]
    assert all(one.metric("limit_decisions_total", outcome="unavailable") > 0 for one in hasty)
    for one in hasty:
        one.read_log(lambda event: event["message"] == "limit store up")
        # A process that was held up by the machine says so, as an error.
        loud = [event for event in one.log if event["level"] in ("ERROR", "CRITICAL") or "exception" in event]
        assert {event["message"] for event in loud} <= {"event loop blocked"}


async def test_the_months_of_a_tool_are_counted_while_clients_go_away(
    replicas: list[Running], limits_redis: RedisServer
) -> None:
    """A call that was admitted runs to its end, and counts once."""
    replica = replicas[3]

    async def leave(door: Door) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await door.call("wait", {"seconds": 0.3})

    await on_all([replica], 3, leave)
    async with asyncio.timeout(SOON_S):
        while replica.metric("tool_executions_total", tool_id="wait") < 3:
            await asyncio.sleep(0.01)
    found = [replica.execute("wait", {"seconds": 0}) for _ in range(3)]
    assert ["status" in one for one in found] == [True, True, False]
