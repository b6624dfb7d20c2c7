"""/mcp by the protocol lane and by ASGI: every head with every body, twice on one connection, byte by byte the same.

Bodies are padded to one length, so that each comes under heads that the lane has learned from others: what a head says
of routing must be checked against every body anew.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.access.keyring import make_key
from tests.conftest import Running, end, places_in, start_service
from tests.servers import make_folder, remove_folder
from tests.transport.mcp_wire import CAPABILITIES, META, MODERN, VERSION, Headers, encoded, message, modern_message

TOOLS = "tests.tools_for_tests,tests.mcp_fixtures,tests.transport.lane_tools"
BODY_BYTES = 700

ECHO = {"name": "echo", "arguments": {"message": "hi"}}
MIRRORED = {"name": "mirrored_parameters", "arguments": {"region": "eu"}}
PROGRESS = {"name": "test_tool_with_progress", "_meta": {"progressToken": "p"}}
CALL: Headers = [("MCP-Protocol-Version", MODERN), ("Mcp-Method", "tools/call")]
LIST: Headers = [("MCP-Protocol-Version", MODERN), ("Mcp-Method", "tools/list")]

HEADS: dict[str, Headers] = {
    "none": [],
    **{version: [("MCP-Protocol-Version", version)] for version in ("2025-11-25", "2025-06-18", "2025-03-26")},
    "version of nobody": [("MCP-Protocol-Version", "2099-01-01")],
    "version twice": [("MCP-Protocol-Version", "2025-11-25")] * 2,
    "modern version alone": CALL[:1],
    "echo": [*CALL, ("Mcp-Name", "echo")],
    "echo in base64": [*CALL, ("Mcp-Name", encoded("echo"))],
    "echo, not canonical": [*CALL, ("Mcp-Name", "=?base64?ZWNobx==?=")],
    "echo, padded": [(name, f"\t{value} ") for name, value in [*CALL, ("Mcp-Name", "echo")]],
    "echo, other case": [(name.upper(), value) for name, value in [*CALL, ("Mcp-Name", "echo")]],
    "echo twice": [*CALL, *[("Mcp-Name", "echo")] * 2],
    "Echo": [*CALL, ("Mcp-Name", "Echo")],
    "unknown": [*CALL, ("Mcp-Name", "no_such_tool")],
    "no name": CALL,
    "mirrored": [*CALL, ("Mcp-Name", "mirrored_parameters"), ("Mcp-Param-Region", "eu")],
    "mirrored otherwise": [*CALL, ("Mcp-Name", "mirrored_parameters"), ("Mcp-Param-Region", "us")],
    "not mirrored": [*CALL, ("Mcp-Name", "mirrored_parameters")],
    "progress": [*CALL, ("Mcp-Name", "test_tool_with_progress")],
    "progress, JSON only": [*CALL, ("Mcp-Name", "test_tool_with_progress"), ("Accept", "application/json")],
    "legacy, JSON only": [("MCP-Protocol-Version", "2025-06-18"), ("Accept", "application/json")],
    "session": [*CALL, ("Mcp-Name", "echo"), ("Mcp-Session-Id", "s"), ("Last-Event-ID", "1")],
    "list": LIST,
    "list with a name": [*LIST, ("Mcp-Name", "echo")],
    "discover": [LIST[0], ("Mcp-Method", "server/discover")],
    "unknown method": [LIST[0], ("Mcp-Method", "no/such")],
    "no JSON": [*CALL, ("Mcp-Name", "echo"), ("Content-Type", "text/plain")],
    "own origin": [*CALL, ("Mcp-Name", "echo"), ("Origin", "http://127.0.0.1")],
    "foreign origin": [*CALL, ("Mcp-Name", "echo"), ("Origin", "https://evil.example")],
}

BODIES: dict[str, Any] = {
    "modern echo": modern_message("tools/call", ECHO),
    "modern echo, other id": modern_message("tools/call", ECHO, request_id="ü"),
    "modern unknown tool": modern_message("tools/call", {"name": "no_such_tool"}),
    "modern without a name": modern_message("tools/call", {}),
    "modern mirrored": modern_message("tools/call", MIRRORED),
    "modern progress": modern_message("tools/call", PROGRESS),
    "modern wrong arguments": modern_message("tools/call", {"name": "echo", "arguments": {"message": 5}}),
    "modern malformed arguments": modern_message("tools/call", {"name": "echo", "arguments": []}),
    "modern list": modern_message("tools/list"),
    "modern list, bad cursor": modern_message("tools/list", {"cursor": 5}),
    "modern discover": modern_message("server/discover"),
    "modern unknown method": modern_message("no/such"),
    "modern initialize": modern_message("initialize", {"protocolVersion": "2025-11-25"}),
    "modern notification": {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"_meta": META}},
    "no capabilities": message("tools/call", {**ECHO, "_meta": {VERSION: MODERN}}),
    "legacy version in meta": message("tools/call", {**ECHO, "_meta": {VERSION: "2025-11-25", CAPABILITIES: {}}}),
    "version of nobody": message("tools/call", {**ECHO, "_meta": {VERSION: "2099-01-01", CAPABILITIES: {}}}),
    "initialize": message("initialize", {"protocolVersion": "2025-06-18", "capabilities": {}}),
    "ping": message("ping"),
    "echo": message("tools/call", ECHO),
    "progress": message("tools/call", PROGRESS),
    "list": message("tools/list"),
    "failing tool": message("tools/call", {"name": "fail_clearly"}),
    "notification": {"jsonrpc": "2.0", "method": "notifications/initialized"},
    "response": {"jsonrpc": "2.0", "id": 1, "result": {}},
    "batch": [message("ping"), message("tools/call", ECHO, request_id=2)],
    "batch of modern": [modern_message("tools/list")],
    "empty batch": [],
    "id null": {**message("ping"), "id": None},
    "id fraction": modern_message("tools/call", ECHO, request_id=1.0),
    "envelope": {**message("ping"), "jsonrpc": "1.0"},
    "params": message("ping", []),
    "no object": 5,
    "no JSON": b"{",
    "not UTF-8": b'"\xff"',
    "NaN": b'{"jsonrpc":"2.0","id":NaN}',
}


@dataclass(frozen=True)
class Pair:
    """The same service twice: with the lane, and without it."""

    lane: Running
    asgi: Running
    credential: str | None = None


@pytest.fixture(scope="module")
def open_pair() -> Iterator[Pair]:
    pair = Pair(*(start_service(PROTOCOL_LANE=lane, TOOL_MODULES=TOOLS) for lane in ("true", "false")))
    yield pair
    end(pair.lane)
    end(pair.asgi)


@pytest.fixture(scope="module")
def guarded_pair() -> Iterator[Pair]:
    folders = [make_folder("agentcore-mcp-lane-") for _ in range(2)]
    key = make_key(places_in(folders[0])["DATABASE_URL"], subject="agent", tools=["echo"])[1]
    database = {"DATABASE_URL": places_in(folders[0])["DATABASE_URL"]}
    lane, asgi = (
        start_service(**{**places_in(folder), **database}, PROTOCOL_LANE=lane, TOOL_MODULES=TOOLS, AUTH_MODE="required")
        for folder, lane in zip(folders, ("true", "false"), strict=True)
    )
    yield Pair(lane, asgi, f"Bearer {key}")
    end(lane)
    end(asgi)
    for folder in folders:
        remove_folder(folder)


class Line:
    """One connection, opened anew when the service closed it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket: socket.socket | None = None
        self._unread = b""

    def send(self, *pieces: bytes) -> bytes:
        """The whole response, its chunks put together."""
        if self._socket is None:
            self._socket = socket.create_connection(("127.0.0.1", self._port), timeout=30)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._unread = b""
        for piece in pieces:
            self._socket.sendall(piece)
        head = self._until(b"\r\n\r\n")
        lines = head.lower()
        if b"transfer-encoding: chunked" in lines:
            body = b"".join(iter(self._chunk, b""))
        else:
            found = re.search(rb"content-length: (\d+)", lines)
            body = self._take(int(found[1]) if found else 0)
        if b"connection: close" in lines:
            self.close()
        return head + body

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _chunk(self) -> bytes:
        size = int(self._until(b"\r\n"), 16)
        return self._take(size + 2)[:-2]

    def _until(self, mark: bytes) -> bytes:
        while mark not in self._unread:
            self._read()
        found, _, self._unread = self._unread.partition(mark)
        return found + mark

    def _take(self, count: int) -> bytes:
        while len(self._unread) < count:
            self._read()
        taken, self._unread = self._unread[:count], self._unread[count:]
        return taken

    def _read(self) -> None:
        assert self._socket is not None
        read = self._socket.recv(65_536)
        assert read, "closed in the middle of an answer"
        self._unread += read


def head_of(headers: Headers, credential: str | None, body_bytes: int = BODY_BYTES) -> bytes:
    given = [*headers, *([("Authorization", credential)] if credential else [])]
    lines = "".join(f"{name}: {value}\r\n" for name, value in given)
    return f"POST /mcp HTTP/1.1\r\nHost: 127.0.0.1\r\n{lines}Content-Length: {body_bytes}\r\n\r\n".encode()


def body_of(body: Any) -> bytes:
    return (body if isinstance(body, bytes) else json.dumps(body).encode()).ljust(BODY_BYTES)


CHANGING = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}|(?<=date: )[^\r]+")
"""Ids of executions, and the time."""


def check_same(pair: Pair, seed: int) -> None:
    """Every head with every body, in an order of chance; half of them in two pieces."""
    chance = random.Random(seed)
    cases = list(itertools.product(HEADS, BODIES))
    chance.shuffle(cases)
    lines = Line(pair.lane.port), Line(pair.asgi.port)
    different, statuses = [], set()
    for head_name, body_name in cases:
        head, body = head_of(HEADS[head_name], pair.credential), body_of(BODIES[body_name])
        pieces = (head, body) if chance.random() < 0.5 else (head + body,)
        answers = {CHANGING.sub(b"*", line.send(*pieces)) for line in lines for _ in range(2)}
        statuses |= {int(answer[9:12]) for answer in answers}
        if len(answers) > 1:
            different.append((head_name, body_name, answers))
    for line in lines:
        line.close()
    assert different == []
    assert statuses == {200, 202, 400, 403, 404}


def test_every_head_with_every_body_is_answered_alike(open_pair: Pair) -> None:
    check_same(open_pair, 1)


def test_every_head_with_every_body_is_answered_alike_where_keys_are_asked_for(guarded_pair: Pair) -> None:
    check_same(guarded_pair, 2)


def test_who_is_turned_away_is_so_alike(guarded_pair: Pair) -> None:
    lines = Line(guarded_pair.lane.port), Line(guarded_pair.asgi.port)
    some = {name: HEADS[name] for name in ("none", "echo", "list")}
    for head, credential in itertools.product(some.values(), [None, "Bearer act_wrong", "Basic eA=="]):
        asked = head_of(head, credential) + body_of(BODIES["modern echo"])
        answers = {CHANGING.sub(b"*", line.send(asked)) for line in lines for _ in range(2)}
        assert len(answers) == 1 and answers.pop().startswith(b"HTTP/1.1 401 ")
    for line in lines:
        line.close()


@pytest.mark.parametrize("era", ["modern", "legacy"])
@pytest.mark.parametrize("apart", [False, True])
def test_what_is_asked_again_takes_the_lane(open_pair: Pair, era: str, apart: bool) -> None:
    params = {"name": "which_door"}
    body = body_of(modern_message("tools/call", params) if era == "modern" else message("tools/call", params))
    headers = [*CALL, ("Mcp-Name", "which_door")] if era == "modern" else [("MCP-Protocol-Version", "2025-11-25")]
    head = head_of([*headers, ("X-Test", f"{era} {apart}")], None)
    for service, last in ((open_pair.lane, "lane"), (open_pair.asgi, "asgi")):
        line = Line(service.port)
        line.send(head + body)
        answer = json.loads(line.send(*((head, body) if apart else (head + body,))).partition(b"\r\n\r\n")[2])
        assert answer["result"]["content"][0]["text"] == last
        line.close()
