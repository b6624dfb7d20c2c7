"""Ten thousand requests, cut and pipelined at random, answered alike by the lane and by the ASGI door."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from tests.conftest import end
from tests.transport.doors import DOORS, MCP, RPC, Door, execute, http, rpc, start_door
from tests.transport.mcp_wire import META, MODERN
from tests.transport.raw_http import Peer

SEED = 20261121
REQUESTS = 10_000
UNANSWERED_MAX = 25
"""Fewer than may wait on a connection, so that how the segments fall decides nothing."""

VOLATILE = frozenset(("execution_id", "trace_id", "timestamp", "execution_time_ms", "overhead_ms", "total_time_ms"))
"""Ids and times."""


@dataclass(frozen=True)
class Asked:
    """One request. `ends`: the connection ends with its answer. A request that fails has one too."""

    request: bytes
    has_body: bool = True
    ends: bool = False


def batch(*bodies: bytes) -> bytes:
    return b"[%b]" % b",".join(bodies)


def notification(tool_id: str) -> bytes:
    params = {"tool_id": tool_id, "parameters": {"message": "x"}}
    return json.dumps({"jsonrpc": "2.0", "method": "tools.execute", "params": params}).encode()


ECHO = {"tool_id": "echo", "parameters": {"message": "x"}}
PLAN = [{"task_id": "a", **ECHO}, {"task_id": "b", **ECHO, "dependencies": ["a"]}]

WHICH = execute("which_door")
SIMPLE = execute("echo", message="x")

BODIES = [
    WHICH,
    WHICH,
    SIMPLE,
    execute("echo", message="\u00e9\u20ac" * 20),
    execute("echo", message="x" * 5_000),
    execute("echo", message=1),
    execute("echo", other=1),
    execute("calculator", expression="6*7"),
    execute("calculator", expression="1/0"),
    execute("wait", seconds=0.002, value={"a": [1, 2]}),
    execute("raise_exception"),
    execute("fail_clearly"),
    execute("return_bad", kind="nan"),
    execute("cancel_itself"),
    execute("short_timeout", seconds=0.0),
    execute("no_such_tool"),
    execute("hidden"),
    execute("echo", request_id=None, message="x"),
    execute("echo", request_id="an id", message="x"),
    rpc("rpc.ping"),
    rpc("rpc.version"),
    rpc("nope"),
    rpc("tools.get", {"tool_id": "echo"}),
    rpc("tools.list", {"limit": 3}),
    rpc("tools.list", {"limit": -3}),
    rpc("tools.search", {"name_query": "calc"}),
    rpc("tools.cancel", {"call_id": "nobody"}),
    rpc("tools.execute_batch", {"requests": [ECHO, {**ECHO, "tool_id": "nope"}]}),
    rpc("tools.execute_parallel", {"tasks": PLAN}),
    rpc("tools.execute_with_fallback", {"primary": {"tool_id": "fail_clearly"}, "fallback": ECHO}),
    rpc("tools.get_rate_limit_status", {"tool_id": "echo"}),
    notification("echo"),
    notification("nope"),
    batch(),
    batch(execute("echo", message="x"), b"1", notification("echo"), rpc("nope")),
    batch(*[execute("echo", request_id=number, message="x") for number in range(20)]),
    batch(notification("echo"), notification("echo")),
    batch(*[rpc("rpc.ping", request_id=number) for number in range(101)]),
    b"{",
    b"null",
    b'"x"',
    b"\xff",
    b"[" * 100,
    b"   ",
    b'{"jsonrpc":"2.0","id":1,"method":"rpc.ping","params":3}',
    b'{"jsonrpc":"1.0","id":1,"method":"rpc.ping"}',
    b'{"jsonrpc":"2.0","id":{},"method":"rpc.ping"}',
    b'{"jsonrpc":"2.0","id":12345678901234567890123,"method":"rpc.ping"}',
]

MCP_BODIES = [
    rpc("tools/list"),
    rpc("tools/call", {"name": "echo", "arguments": {"message": "x"}}),
    rpc("tools/call", {"name": "echo", "arguments": {"message": 1}}),
    rpc("tools/call", {"name": "nope", "arguments": {}}),
    rpc("tools/call", {"name": "echo", "arguments": {"message": "x"}, "_meta": META}),
    rpc("tools/call", {"name": "echo", "arguments": {"message": "x"}, "_meta": {"progressToken": 1}}),
    rpc(
        "initialize", {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "a", "version": "1"}}
    ),
    b'{"jsonrpc":"2.0","method":"notifications/initialized"}',
    rpc("ping"),
    rpc("server/discover", {"_meta": META}),
    b"{",
]

REST_BODIES = [
    b'{"parameters":{"message":"x"}}',
    b'{"parameters":{"message":"x"},"agent_id":"a"}',
    b'{"parameters":{"message":1}}',
    b'{"parameters":{"message":"x"},"tool_id":"echo"}',
    b'{"parameters":3}',
    b"{}",
    b"[]",
    b"{",
]
REST = b"/api/v1/tools/%b/execute"
REST_TOOLS = (b"echo", b"echo", b"wait", b"fail_clearly", b"raise_exception", b"nope", b"hidden", b"e%63ho", b"a%2Fb")

HEADERS = [
    (),
    (),
    (),
    (b"Connection: keep-alive",),
    (b"X-Filler: " + b"x" * 3_000,),
    (b"traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",),
    (b"Origin: http://127.0.0.1",),
    (b"Accept: application/json, text/event-stream", b"User-Agent: fuzz"),
    (b"MCP-Protocol-Version: " + MODERN.encode(), b"Mcp-Method: tools/call", b"Mcp-Name: echo"),
    (b"MCP-Protocol-Version: 2025-03-26",),
    (b"Authorization: Bearer nothing",),
]

LAST = [
    http(SIMPLE, b"Connection: close"),
    http(SIMPLE, version=b"1.0"),
    http(SIMPLE, b"Origin: https://evil.test"),
    http(SIMPLE).replace(b"Host: 127.0.0.1", b"Host: evil.test"),
    http(SIMPLE).replace(b"Content-Length: ", b"Content-Length: 9999999"),
    http(SIMPLE, b"X: " + b"x" * 40_000),
    http(SIMPLE, b"Connection: Upgrade", b"Upgrade: h2c"),
    http(SIMPLE, b"Content-Length: 1"),
    b"\x16\x03\x01\r\n\r\n",
    b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" % RPC,
]


def chunked(dice: random.Random, body: bytes, path: bytes) -> bytes:
    cut = dice.randrange(len(body)) if len(body) > 1 else 0
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:cut], body[cut:]) if part)
    return b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n%b0\r\n\r\n" % (path, chunks)


def any_request(dice: random.Random) -> Asked:
    if dice.random() < 0.1:
        return dice.choice(
            [
                Asked(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"),
                Asked(b"GET /api/v1/tools?limit=2 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"),
                Asked(b"GET /nowhere HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"),
                Asked(b"HEAD %b HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % RPC, has_body=False),
                Asked(http(SIMPLE, verb=b"PUT")),
                Asked(http(SIMPLE, path=RPC + b"?a=b")),
                Asked(http(SIMPLE, path=RPC + b"/")),
                Asked(http(b"")),
                Asked(http(REST_BODIES[0], path=REST % b"echo?a=b", verb=b"PUT")),
                Asked(http(REST_BODIES[0], path=REST % b"echo" + b"?a=b")),
                Asked(b"HEAD %b HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % (REST % b"echo"), has_body=False),
            ]
        )
    path, bodies = (MCP, MCP_BODIES) if dice.random() < 0.2 else (RPC, BODIES)
    if dice.random() < 0.2:
        path, bodies = REST % dice.choice(REST_TOOLS), REST_BODIES
    body = dice.choice(bodies)
    if dice.random() < 0.05:
        return Asked(chunked(dice, body, path))
    return Asked(http(body, *dice.choice(HEADERS), path=path))


@dataclass(frozen=True)
class Burst:
    """Requests that are sent before their answers are read, in these segments."""

    asked: list[Asked]
    segments: list[bytes]


def any_burst(dice: random.Random, last: bool) -> Burst:
    asked = [any_request(dice) for _ in range(dice.choice((*(1,) * 20, 2, 3, dice.randrange(1, UNANSWERED_MAX))))]
    if last:
        asked.append(Asked(dice.choice(LAST), ends=True))
    whole = b"".join(one.request for one in asked)
    way = dice.random()
    if way < 0.3:
        segments = [one.request for one in asked]
    elif way < 0.5:
        segments = [part for one in asked for part in _head_and_body(one.request)]
    elif way < 0.8:
        segments = [whole]
    else:
        cuts = sorted(dice.randrange(len(whole) + 1) for _ in range(dice.randrange(1, 8)))
        segments = [whole[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    return Burst(asked, segments)


def _head_and_body(request: bytes) -> list[bytes]:
    head, blank, body = request.partition(b"\r\n\r\n")
    return [head + blank, body]


def any_connections(dice: random.Random, requests: int) -> Iterator[list[Burst]]:
    while requests > 0:
        count = dice.randrange(1, 12)
        ends = dice.random() < 0.3
        bursts = [any_burst(dice, ends and number == count - 1) for number in range(count)]
        requests -= sum(len(burst.asked) for burst in bursts)
        yield bursts


TRIES = 5


def answers(door: Door, bursts: list[Burst]) -> tuple[list[Any], bool]:
    """What came back over one connection, without ids and times; None is its end. Where a refusal ends a connection on
    which more was sent, the system may throw away what was not read yet: then all is said again, and True is told."""
    for left in reversed(range(TRIES)):
        try:
            return answers_once(door, bursts), left < TRIES - 1
        except ConnectionResetError:
            if not left:
                raise
    raise AssertionError


def answers_once(door: Door, bursts: list[Burst]) -> list[Any]:
    peer = Peer(door.running.port)
    found: list[Any] = []
    try:
        for burst in bursts:
            for segment in burst.segments:
                if segment:
                    with contextlib.suppress(ConnectionError):  # a refusal came before the rest of what is refused
                        peer.send(segment)
            found += [answer(peer, one) for one in burst.asked]
        if bursts[-1].asked[-1].ends:
            found.append(peer.file.read(1) or None)
    finally:
        peer.close()
    return found


def answer(peer: Peer, asked: Asked) -> Any:
    response = peer.response(has_body=asked.has_body)
    headers = {name: value for name, value in response.headers.items() if name not in ("date", "content-length")}
    assert "date" in response.headers
    if response.headers.get("content-type") == "text/event-stream" or not response.body:
        return response.status, headers, response.body
    if headers.get("content-type") == "application/json":
        return response.status, headers, without_ids(response.json)
    return response.status, headers, response.body


def is_which(asked: Asked) -> bool:
    return asked.request.endswith(WHICH)


def without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: "" if name.rpartition("/")[2] in VOLATILE else without_ids(each) for name, each in value.items()}
    return [without_ids(each) for each in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def doors() -> Iterator[list[Door]]:
    started = [start_door(name, ENABLE_CIRCUIT_BREAKERS="false") for name in DOORS]  # which open by chance
    yield started
    for door in started:
        end(door.running)


def test_ten_thousand_requests_are_answered_alike_by_both_doors(doors: list[Door]) -> None:
    dice = random.Random(SEED)
    count, taken, ran_again = 0, [], False
    with ThreadPoolExecutor(len(doors)) as pool:
        for number, bursts in enumerate(any_connections(dice, REQUESTS)):
            (by_lane, first), (by_asgi, second) = pool.map(lambda door, bursts=bursts: answers(door, bursts), doors)
            ran_again = ran_again or first or second
            asked = [one for burst in bursts for one in burst.asked]
            for one, mine, theirs in zip(asked, by_lane, by_asgi, strict=False):
                if not is_which(one):
                    assert mine == theirs, (SEED, number, one)
            assert len(by_lane) == len(by_asgi) and by_lane[len(asked) :] == by_asgi[len(asked) :], (SEED, number)
            count += len(asked)
            taken += [given[2]["result"]["result"] for one, given in zip(asked, by_lane, strict=False) if is_which(one)]
    assert count >= REQUESTS
    assert taken.count("lane") > len(taken) / 5, "pipelined and cut ones are the parser's"
    for name in ("tool_executions_total", "tool_errors_total"):
        lane, asgi = (door.running.metric(name) for door in doors)
        assert lane == asgi or ran_again, name
