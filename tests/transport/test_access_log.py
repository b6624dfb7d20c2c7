"""Access lines: the same by the lane and by ASGI, as many as were asked for, and nothing in them that is a secret."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest

from tests.access.keyring import make_key
from tests.conftest import Serve, end, places_in, start_service
from tests.servers import make_folder, remove_folder, wait_until
from tests.transport.doors import DOORS, MCP, RPC, Door, chunked, execute, http, mcp_call, rpc, which
from tests.transport.mcp_wire import META, MODERN

CANARY = "canary5b1fcanary5b1f"
TOOLS = "tests.tools_for_tests,tests.transport.lane_tools,tests.mcp_fixtures"
_marks = count(1)


class Logged(Door):
    """A service that tells of every request."""

    database = ""
    _told = 0

    def lines(self) -> list[dict[str, Any]]:
        """The access lines since the last time, up to now, in their order."""
        mark = f"/mark-{next(_marks)}"
        peer = self.connect()
        peer.send(b"GET %b HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % mark.encode()).response()
        self.running.read_log(lambda event: event.get("path") == mark)
        access = [event for event in self.running.log if event["logger"] == "app.access"]
        new = access[self._told :]
        end_of_new = next(number for number, event in enumerate(new) if event.get("path") == mark)
        self._told += end_of_new + 1
        return new[:end_of_new]

    def line_of(self, request: bytes) -> dict[str, Any]:
        """Of one request on a connection of its own; the service has seen it before, so that the lane takes it."""
        self.connect().send(request).response()
        self.lines()
        peer = self.connect()
        peer.send(request).response()
        (line,) = self.lines()
        return line


def start_logged(name: str, **environ: str) -> Logged:
    lane = "true" if name == "lane" else "false"
    return Logged(
        start_service(**{"PROTOCOL_LANE": lane, "TOOL_MODULES": TOOLS, "ACCESS_LOG_RATIO": "1", **environ}), name
    )


@pytest.fixture(scope="module", params=DOORS)
def shared(request: pytest.FixtureRequest) -> Iterator[Logged]:
    door = start_logged(request.param, REQUEST_READ_TIMEOUT_S="3")
    yield door
    end(door.running)


@pytest.fixture
def door(shared: Logged) -> Iterator[Logged]:
    shared.lines()
    yield shared
    shared.hang_up()


@pytest.fixture(scope="module", params=DOORS)
def guarded(request: pytest.FixtureRequest) -> Iterator[Logged]:
    """The same behind a proxy, and it asks for a key."""
    folder = make_folder("agentcore-access-lines-")
    places = places_in(folder)
    door = start_logged(request.param, AUTH_MODE="required", FORWARDED_ALLOW_IPS="127.0.0.1", **places)
    door.database = places["DATABASE_URL"]
    yield door
    door.hang_up()
    end(door.running)
    remove_folder(folder)


def facts(line: dict[str, Any]) -> dict[str, Any]:
    """What the request alone decides."""
    assert (line["level"], line["logger"], line["message"]) == ("INFO", "app.access", "request")
    assert 0 <= line.get("duration_ms", 0) < 60_000
    told = ("time", "level", "logger", "message", "duration_ms", "response_bytes", "execution_id", "trace_id")
    return {name: fact for name, fact in line.items() if name not in told}


def get(path: bytes, verb: bytes = b"GET") -> bytes:
    return b"%b %b HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % (verb, path)


# What a line tells


def test_a_call_is_told_with_its_method_and_its_id(door: Logged) -> None:
    body = execute("which_door")
    request = door.taught(http(body))
    door.lines()
    response = door.connect().send(request).response()
    (line,) = door.lines()
    assert door.answers(response)
    assert facts(line) == {
        "method": "POST",
        "path": "/api/v1/jsonrpc",
        "client_address": "127.0.0.1",
        "status": 200,
        "request_bytes": len(body),
        "rpc_method": "tools.execute",
    }
    assert line["response_bytes"] == len(response.body) and "duration_ms" in line
    assert line["execution_id"] == response.json["result"]["execution_id"]
    assert line["trace_id"] == response.json["result"]["trace_id"]


def test_a_call_that_needs_a_task_is_told_with_its_id_too(door: Logged) -> None:
    request = door.taught(http(execute("wait", seconds=0.0, value="x")))
    door.lines()
    response = door.connect().send(request).response()
    (line,) = door.lines()
    assert line["execution_id"] == response.json["result"]["execution_id"]


def test_a_method_that_runs_nothing_has_no_execution(door: Logged) -> None:
    line = door.line_of(http(rpc("rpc.ping")))
    assert (line["rpc_method"], line["status"]) == ("rpc.ping", 200) and "execution_id" not in line


def test_a_batch_is_one_line_with_its_size(door: Logged) -> None:
    line = door.line_of(http(b"[%b,%b,%b]" % (which(), which(), rpc("rpc.ping"))))
    assert (line["batch"], line["status"]) == (3, 200)
    assert "rpc_method" not in line and "execution_id" not in line


def test_a_notification_is_told_though_it_is_answered_with_nothing(door: Logged) -> None:
    body = json.dumps({"jsonrpc": "2.0", "method": "rpc.ping"}).encode()
    line = door.line_of(http(body))
    assert (line["rpc_method"], line["status"], line["response_bytes"]) == ("rpc.ping", 204, 0)


def test_a_method_that_does_not_exist_is_not_named(door: Logged) -> None:
    line = door.line_of(http(rpc(CANARY)))
    assert line["status"] == 200 and "rpc_method" not in line


def test_an_mcp_call_is_told_with_its_method_and_its_id(door: Logged) -> None:
    line = door.line_of(mcp_call("which_door"))
    assert (line["path"], line["rpc_method"], line["status"]) == ("/mcp", "tools/call", 200)
    assert line["execution_id"].replace("-", "")[:8].isalnum() and line["trace_id"]


def test_an_answer_in_events_is_one_line_at_its_end(door: Logged) -> None:
    params = {
        "name": "test_tool_with_progress",
        "arguments": {},
        "_meta": {**META, "progressToken": CANARY},
    }
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}).encode()
    routing = [b"MCP-Protocol-Version: " + MODERN.encode(), b"Mcp-Method: tools/call", b"Connection: close"]
    routing += [b"Mcp-Name: test_tool_with_progress", b"Accept: application/json, text/event-stream"]
    peer = door.connect().send(http(body, *routing, path=MCP))
    answer = peer.file.read()
    (line,) = door.lines()
    assert b"text/event-stream" in answer and answer.count(b"data: ") == 4
    assert (line["rpc_method"], line["status"], line["request_bytes"]) == ("tools/call", 200, len(body))
    assert 0 < line["response_bytes"] < len(answer) and "client_gone" not in line


@pytest.mark.parametrize(
    ("request_bytes", "expected"),
    [
        (get(b"/livez"), {"method": "GET", "path": "/livez", "status": 200}),
        (get(b"/livez?token=" + CANARY.encode()), {"method": "GET", "path": "/livez", "status": 200}),
        (get(b"/api/v1/tools"), {"method": "GET", "path": "/api/v1/tools", "status": 200}),
        (get(b"/no/such"), {"method": "GET", "path": "/no/such", "status": 404}),
        (get(b"/no%20such%0A"), {"method": "GET", "path": "/no such\n", "status": 404}),
        (get(RPC), {"method": "GET", "path": "/api/v1/jsonrpc", "status": 405}),
        (get(MCP, b"DELETE"), {"method": "DELETE", "path": "/mcp", "status": 405}),
        (get(b"/livez").replace(b"127.0.0.1", b"example.org"), {"method": "GET", "path": "/livez", "status": 403}),
        (
            http(b'{"parameters":{"message":"x"}}', path=b"/api/v1/tools/echo/execute"),
            {"method": "POST", "path": "/api/v1/tools/echo/execute", "status": 200, "request_bytes": 30},
        ),
        (
            http(which(), b"Expect: nothing"),
            {"method": "POST", "path": "/api/v1/jsonrpc", "status": 200, "rpc_method": "tools.execute"},
        ),
        (chunked(which()), {"method": "POST", "status": 200, "rpc_method": "tools.execute"}),
        (http(b"{"), {"method": "POST", "path": "/api/v1/jsonrpc", "status": 200, "request_bytes": 1}),
    ],
    ids=[
        "livez",
        "a query",
        "tools",
        "404",
        "404 of odd letters",
        "405",
        "405 of mcp",
        "403",
        "rest",
        "not on the lane",
        "chunked",
        "no json",
    ],
)
def test_whatever_answers_it_a_request_has_its_line(
    door: Logged, request_bytes: bytes, expected: dict[str, Any]
) -> None:
    line = door.line_of(request_bytes)
    assert expected.items() <= facts(line).items()
    assert line["client_address"] == "127.0.0.1" and "duration_ms" in line and "response_bytes" in line
    assert ("request_bytes" in line) == (b"Content-Length" in request_bytes)
    assert CANARY not in json.dumps(line)


def test_a_rest_call_is_told_with_its_id(door: Logged) -> None:
    peer = door.connect().send(http(b'{"parameters":{"message":"x"}}', path=b"/api/v1/tools/echo/execute"))
    execution = peer.response().json
    (line,) = door.lines()
    assert (line["execution_id"], line["trace_id"]) == (execution["execution_id"], execution["trace_id"])


def test_an_answer_to_head_is_told_as_head(door: Logged) -> None:
    door.connect().send(get(b"/livez", b"HEAD")).response(has_body=False)
    (line,) = door.lines()
    assert (line["method"], line["status"]) == ("HEAD", 200) and "response_bytes" not in line


def test_requests_that_wait_behind_another_have_lines_of_their_own(door: Logged) -> None:
    call, ping = door.taught(http(which())), door.taught(http(rpc("rpc.ping")))
    door.lines()
    peer = door.connect().send(call + ping + get(b"/livez"))
    first = peer.response().json["result"]["execution_id"]
    assert [peer.response().status for _ in range(2)] == [200, 200]
    lines = door.lines()
    assert [line.get("rpc_method") for line in lines] == ["tools.execute", "rpc.ping", None]
    assert [line.get("execution_id") for line in lines] == [first, None, None]


def test_the_client_is_the_peer_or_whom_a_trusted_proxy_names(door: Logged, guarded: Logged) -> None:
    request = http(rpc("rpc.ping"), b"X-Forwarded-For: 192.0.2.7")
    assert door.line_of(request)["client_address"] == "127.0.0.1"
    assert guarded.line_of(request)["client_address"] == "192.0.2.7"


# What the connection refuses by itself


@pytest.mark.parametrize(
    ("request_bytes", "expected"),
    [
        (b"\x16\x03\x01 rubbish", {"status": 400}),
        (b"GET /a/b?token=%b bad\r\n\r\n" % CANARY.encode(), {"method": "GET", "path": "/a/b", "status": 400}),
        (get(b"/x?" + CANARY.encode() * 500), {"method": "GET", "path": "/x", "status": 414}),
        (
            http(b"{}", b"X-Secret: " + CANARY.encode() * 2_000),
            {"method": "POST", "path": "/api/v1/jsonrpc", "status": 431},
        ),
        (
            http(b"{}").replace(b"Content-Length: 2", b"Content-Length: 99999999"),
            {"method": "POST", "path": "/api/v1/jsonrpc", "status": 413},
        ),
        (get(b"/livez")[:-4], {"method": "GET", "path": "/livez", "status": 408}),
        (http(b"{}")[:-1], {"method": "POST", "path": "/api/v1/jsonrpc", "status": 408, "request_bytes": 2}),
        (
            chunked(b"{}").replace(b"0\r\n\r\n", b"bad chunk"),
            {"method": "POST", "path": "/api/v1/jsonrpc", "status": 400},
        ),
    ],
    ids=["no http", "bad version", "414", "431", "413", "408 head", "408 body", "bad chunk"],
)
def test_a_request_that_the_connection_refuses_has_one_line(
    door: Logged, request_bytes: bytes, expected: dict[str, Any]
) -> None:
    peer = door.connect().send(request_bytes)
    status = peer.response().status
    assert peer.is_at_end()
    (line,) = door.lines()
    assert facts(line) == {"client_address": "127.0.0.1", **expected} and status == expected["status"]
    assert CANARY not in json.dumps(line)


# Who goes


@pytest.mark.parametrize("tool", ["held", "held_for_client"])
def test_a_client_that_goes_away_has_its_line_without_a_status(door: Logged, tool: str) -> None:
    gate = f"{tool} {door.name}"
    door.open("g" * len(gate))
    door.taught(http(execute(tool, gate="g" * len(gate))))
    peer = door.connect().send(http(execute(tool, gate=gate)))
    door.come(gate)
    peer.close()
    door.turn()
    door.open(gate)
    seen: list[dict[str, Any]] = []

    def is_told() -> bool:
        seen.extend(line for line in door.lines() if "client_gone" in line)
        return bool(seen)

    wait_until(is_told, "its line")
    (line,) = seen
    assert (line["status"], line["client_gone"], line["response_bytes"]) == (None, True, 0)
    assert line["rpc_method"] == "tools.execute" and line["execution_id"]


def test_a_client_that_goes_away_in_mid_body_has_its_line_without_a_status(door: Logged) -> None:
    peer = door.connect()
    door.turn()
    peer.send(http(which())[:-5])
    door.turn()
    peer.close()
    door.turn()
    (line,) = (line for line in door.lines() if line["path"] != "/livez")
    assert (line["status"], line["client_gone"]) == (None, True) and "rpc_method" not in line


# Secrets


def test_neither_a_key_nor_a_body_nor_a_query_comes_into_a_line(guarded: Logged) -> None:
    _, credential = make_key(guarded.database)
    secret = credential.rpartition("_")[2]
    bearer, key = b"Authorization: Bearer " + credential.encode(), b"X-API-Key: " + credential.encode()
    body = execute("echo", CANARY, message=f"password {CANARY}")
    rest = json.dumps({"parameters": {"message": CANARY}}).encode()
    execution = b"/api/v1/tools/echo/execute?q=" + CANARY.encode()
    requests = [
        http(body, bearer),
        http(b"[%b,%b]" % (body, body), bearer),
        http(body, key, b"Cookie: session=" + CANARY.encode()),
        http(body, bearer, path=RPC + b"?token=" + CANARY.encode()),
        http(rest, bearer, path=execution.partition(b"?")[0]),
        http(rest, bearer, path=execution),
        http(body, b"Authorization: Bearer act_" + CANARY.encode()),
        http(body),
        http(body, path=MCP),
        http(body, path=b"/api/v1/%b" % credential.encode()),
        http(body, path=b"/api/v1/token=%b" % CANARY.encode()),
        http(body, b"Connection", bearer),
    ]
    guarded.lines()
    statuses = [guarded.connect().send(request).response().status for request in requests for _ in range(2)]
    lines = guarded.lines()
    assert [line["status"] for line in lines] == statuses
    assert statuses[::2] == [200, 200, 200, 200, 200, 422, 401, 401, 401, 401, 401, 400]
    text = json.dumps(guarded.running.log)
    assert CANARY not in text and secret not in text


# How many


@pytest.mark.parametrize("door_name", DOORS)
def test_access_log_ratio_is_the_part_of_the_requests_that_are_told(door_name: str) -> None:
    door = start_logged(door_name, ACCESS_LOG_RATIO="0.1")
    try:
        request = http(rpc("rpc.ping"))
        peer = door.connect()
        others = [get(b"/livez"), get(b"/no/such"), get(RPC)]
        for number in range(400):
            peer.send(others[number % 3] if number % 4 == 3 else request).response()
        refused = door.connect().send(b"rubbish\r\n\r\n")
        assert refused.response().status == 400
        for _ in range(9):
            peer.send(request).response()
        door.running.stop()
        lines = whole_log(door)
        assert len(lines) == 41
        assert {line["path"] for line in lines} > {"/api/v1/jsonrpc"}
    finally:
        door.hang_up()
        end(door.running)


@pytest.mark.parametrize("environ", [{}, {"ACCESS_LOG_RATIO": "0"}])
def test_access_log_ratio_0_tells_of_nothing(serve: Serve, environ: dict[str, str]) -> None:
    door = Door(serve(**environ), "lane")
    peer = door.connect()
    for request in [http(rpc("rpc.ping"))] * 20 + [get(b"/livez"), get(b"/no/such"), get(RPC), b"rubbish\r\n\r\n"]:
        peer.send(request).response()
    door.hang_up()
    door.running.stop()
    assert whole_log(door) == []


def test_a_flood_of_requests_has_all_its_lines(door: Logged) -> None:
    request = door.taught(http(rpc("rpc.ping")))
    door.lines()
    peer = door.connect()
    for _ in range(300):
        peer.send(request).response()
    lines = door.lines()
    assert len(lines) == 300 and not any("lines_held_back" in line for line in lines)
    assert door.running.metric("log_lines_dropped_total") == 0


def whole_log(door: Door) -> list[dict[str, Any]]:
    """The access lines of a service that has ended."""
    with pytest.raises(AssertionError, match="no such event"):
        door.running.read_log(lambda event: False)
    return [event for event in door.running.log if event["logger"] == "app.access"]
