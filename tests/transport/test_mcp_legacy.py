"""The eras before 2026-07-28: the handshake, batches by version, HTTP status, and messages that mix eras."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.conftest import Running
from tests.transport.mcp_wire import (
    CAPABILITIES,
    META,
    MODERN,
    VERSION,
    Answer,
    Headers,
    legacy,
    legacy_call,
    message,
    modern_message,
    routing,
    send,
)

LEGACY = ["2025-11-25", "2025-06-18", "2025-03-26", "2024-11-05"]
EVERY_HEADER: list[str | None] = [None, *LEGACY]


def header(version: str | None) -> Headers:
    return [] if version is None else [("MCP-Protocol-Version", version)]


def opening(version: Any, **members: Any) -> dict[str, Any]:
    params = {"protocolVersion": version, "capabilities": {}, "clientInfo": {"name": "x", "version": "1"}}
    return message("initialize", params, **members)


# The handshake


@pytest.mark.parametrize("version", LEGACY)
def test_initialize_echoes_a_version_that_is_served(mcp: Running, version: str) -> None:
    answer = send(mcp, opening(version))
    assert answer.result["protocolVersion"] == version
    assert answer.result["capabilities"] == {"tools": {}}
    assert set(answer.result["serverInfo"]) == {"name", "version"}
    assert "mcp-session-id" not in answer.headers and "resultType" not in answer.result


@pytest.mark.parametrize("version", ["2099-01-01", MODERN, "", "x", None, 5])
def test_initialize_offers_the_newest_one_otherwise(mcp: Running, version: Any) -> None:
    assert send(mcp, opening(version)).result["protocolVersion"] == "2025-11-25"


@pytest.mark.parametrize("version", [*EVERY_HEADER, MODERN, "2099-01-01", ""])
def test_initialize_is_legacy_whatever_the_header_says(mcp: Running, version: str | None) -> None:
    assert send(mcp, opening("2025-06-18"), header(version)).result["protocolVersion"] == "2025-06-18"


def test_initialize_under_the_modern_meta_is_an_unknown_method(mcp: Running) -> None:
    body = modern_message("initialize", {"protocolVersion": "2025-11-25"})
    assert send(mcp, body, routing("initialize")).code == (404, -32601)


@pytest.mark.parametrize("version", EVERY_HEADER)
def test_every_version_lists_and_calls_without_having_opened(mcp: Running, version: str | None) -> None:
    assert legacy(mcp, "ping", version=version).result == {}
    tools = legacy(mcp, "tools/list", version=version).result
    assert "echo" in [tool["name"] for tool in tools["tools"]] and not tools.keys() & {"ttlMs", "cacheScope"}
    called = send(mcp, message("tools/call", {"name": "echo", "arguments": {"message": "hi"}}), header(version))
    assert called.result["structuredContent"] == {"message": "hi"} and called.result["isError"] is False
    assert "resultType" not in called.result


@pytest.mark.parametrize(
    "body",
    [
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 1}},
        {"jsonrpc": "2.0", "method": "tools/call", "params": {"name": "no_such"}},
        {"jsonrpc": "2.0", "id": 7, "result": {}},
        {"jsonrpc": "2.0", "id": 7, "error": {"code": -1, "message": "no"}},
    ],
    ids=json.dumps,
)
@pytest.mark.parametrize("version", EVERY_HEADER)
def test_notifications_and_responses_are_accepted_and_say_nothing(mcp: Running, body: Any, version: str | None) -> None:
    answer = send(mcp, body, header(version))
    assert answer.status == 202 and answer.body == b""


# HTTP status


@pytest.mark.parametrize(
    ("method", "params", "code"),
    [
        ("no/such", None, -32601),
        ("server/discover", None, -32601),
        ("resources/list", {}, -32601),
        ("logging/setLevel", {"level": "debug"}, -32601),
        ("tools/call", {"name": "no_such_tool"}, -32602),
        ("tools/call", {"name": "hidden"}, -32602),
        ("tools/call", {}, -32602),
        ("tools/call", {"name": 5}, -32602),
        ("tools/call", {"name": "echo", "arguments": []}, -32602),
        ("tools/list", {"cursor": "not a cursor!"}, -32602),
    ],
)
def test_errors_of_well_formed_requests_are_http_200(mcp: Running, method: str, params: Any, code: int) -> None:
    answer = legacy(mcp, method, params)
    assert answer.code == (200, code) and answer.json["id"] == 1


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"no json", -32700),
        (b"", -32700),
        (b"1", -32600),
        (b"{}", -32600),
        (b'{"jsonrpc":"2.0","id":1}', -32600),
        (b'{"jsonrpc":"1.0","id":1,"method":"ping"}', -32600),
        (b'{"jsonrpc":"2.0","id":null,"method":"ping"}', -32600),
        (b'{"jsonrpc":"2.0","id":1.5,"method":"ping"}', -32600),
        (b'{"jsonrpc":"2.0","id":1,"method":"ping","params":[]}', -32600),
    ],
)
@pytest.mark.parametrize("version", [None, "2025-11-25"])
def test_what_is_no_request_is_http_400(mcp: Running, body: bytes, code: int, version: str | None) -> None:
    assert send(mcp, body, header(version)).code == (400, code)


@pytest.mark.parametrize("version", ["2099-01-01", "", "2025-11-2", "2025-11-25, 2025-11-25", "null"])
def test_an_unsupported_version_is_http_400(mcp: Running, version: str) -> None:
    assert legacy(mcp, "ping", version=version or " ").status == 400


def test_a_version_header_that_comes_twice_is_http_400(mcp: Running) -> None:
    assert send(mcp, message("ping"), header("2025-11-25") * 2).status == 400


@pytest.mark.parametrize("blanks", ["2025-11-25 ", "\t2025-11-25", " 2025-11-25\t "])
def test_blanks_around_the_version_do_not_count(mcp: Running, blanks: str) -> None:
    assert legacy(mcp, "ping", version=blanks).result == {}


def test_modern_headers_under_a_legacy_version_mean_nothing(mcp: Running) -> None:
    more = [("Mcp-Method", "wrong"), ("Mcp-Name", "wrong"), ("Mcp-Param-Region", "wrong")]
    body = message("tools/call", {"name": "mirrored_parameters", "arguments": {"region": "eu"}})
    assert send(mcp, body, [*header("2025-11-25"), *more]).result["isError"] is False


# Which era


def test_a_modern_header_over_a_legacy_body_is_a_modern_request(mcp: Running) -> None:
    assert send(mcp, message("tools/list"), routing("tools/list")).code == (400, -32602)
    assert legacy(mcp, "ping", version=MODERN).code == (400, -32602)


@pytest.mark.parametrize("version", EVERY_HEADER)
def test_a_modern_body_under_a_legacy_header_is_a_mismatch(mcp: Running, version: str | None) -> None:
    headers = [*header(version), ("Mcp-Method", "tools/list")]
    assert send(mcp, modern_message("tools/list"), headers).code == (400, -32020)


@pytest.mark.parametrize("version", LEGACY)
def test_a_legacy_version_in_meta_is_a_modern_request_of_a_version_without_them(mcp: Running, version: str) -> None:
    body = message("tools/list", {"_meta": {VERSION: version, CAPABILITIES: {}}})
    answer = send(mcp, body, [*header(version), ("Mcp-Method", "tools/list")])
    assert answer.code == (400, -32022) and answer.error["data"]["requested"] == version


def test_meta_without_a_version_does_not_make_a_request_modern(mcp: Running) -> None:
    body = message("tools/list", {"_meta": {CAPABILITIES: {}, "progressToken": 1}})
    assert "resultType" not in send(mcp, body, header("2025-11-25")).result


def test_eras_may_follow_one_another_on_one_connection(mcp: Running) -> None:
    with httpx.Client(base_url=mcp.url, trust_env=False) as client:
        bodies = [message("ping"), modern_message("tools/list"), opening("2025-06-18"), message("ping")]
        headers = [{}, dict(routing("tools/list")), {}, {"mcp-protocol-version": "2025-06-18"}]
        answers = [client.post("/mcp", json=b, headers=h) for b, h in zip(bodies, headers, strict=True)]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert ["resultType" in answer.json()["result"] for answer in answers] == [False, True, False, False]


# Batches


def batch(service: Running, messages: Any, version: str | None = "2025-03-26") -> Answer:
    return send(service, messages, header(version))


@pytest.mark.parametrize("version", [None, "2025-03-26", "2024-11-05"])
def test_a_batch_is_answered_request_by_request(mcp: Running, version: str | None) -> None:
    echo = {"name": "echo", "arguments": {"message": "hi"}}
    messages = [
        message("ping", request_id="a"),
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        message("tools/call", echo, request_id=2),
        message("no/such", request_id=3),
        {"jsonrpc": "2.0", "id": 9, "result": {}},
        {"wrong": 1},
        5,
    ]
    answer = batch(mcp, messages, version)
    assert answer.status == 200
    answered = [(each["id"], each.get("error", {}).get("code")) for each in answer.json]
    assert answered == [("a", None), (2, None), (3, -32601), (None, -32600), (None, -32600)]
    assert answer.json[1]["result"]["structuredContent"] == {"message": "hi"}


@pytest.mark.parametrize("version", ["2025-06-18", "2025-11-25", MODERN, "2099-01-01"])
def test_later_versions_have_no_batches(mcp: Running, version: str) -> None:
    assert batch(mcp, [message("ping")], version).code == (400, -32600)


def test_an_empty_batch_is_an_invalid_request(mcp: Running) -> None:
    assert batch(mcp, []).code == (400, -32600)


def test_a_batch_over_the_cap_is_one_invalid_request(mcp: Running) -> None:
    assert len(batch(mcp, [message("ping")] * 100).json) == 100
    assert batch(mcp, [message("ping")] * 101).code == (400, -32600)


def test_a_batch_that_asks_nothing_is_accepted(mcp: Running) -> None:
    answer = batch(mcp, [{"jsonrpc": "2.0", "method": "notifications/initialized"}] * 3)
    assert answer.status == 202 and answer.body == b""


def test_a_batch_of_one_is_an_array_of_one(mcp: Running) -> None:
    assert batch(mcp, [message("ping")]).json == [{"jsonrpc": "2.0", "id": 1, "result": {}}]


@pytest.mark.parametrize("stray", [opening("2025-03-26"), modern_message("tools/list")], ids=["initialize", "modern"])
def test_what_opens_or_is_modern_cannot_stand_in_a_batch(mcp: Running, stray: Any) -> None:
    answers = batch(mcp, [stray, message("ping", request_id=2)]).json
    assert answers[0]["error"]["code"] == -32600 and answers[0]["id"] == 1
    assert answers[1] == {"jsonrpc": "2.0", "id": 2, "result": {}}


def test_a_batch_that_is_broken_json_is_one_parse_error(mcp: Running) -> None:
    assert batch(mcp, b'[{"jsonrpc":"2.0","id":1,"method":"ping"},').code == (400, -32700)


def test_progress_has_no_place_in_a_batch(mcp: Running) -> None:
    params = {"name": "test_tool_with_progress", "_meta": {"progressToken": 1}}
    answer = batch(mcp, [message("tools/call", params)])
    assert answer.headers["content-type"] == "application/json"
    assert answer.json[0]["result"]["content"][0]["text"] == "Progress was told"


def test_the_results_of_a_batch_share_the_room_of_one_answer(mcp: Running) -> None:
    params = {"name": "return_long", "arguments": {"characters": 1_000_000}}
    answers = batch(mcp, [message("tools/call", params, request_id=number) for number in range(20)]).json
    failed = [each for each in answers if each["result"]["isError"]]
    assert len(answers) == 20 and 3 <= len(failed) <= 5
    assert "TOOL_RESULT_TOO_LARGE" in failed[0]["result"]["content"][0]["text"]


def test_a_modern_error_code_never_reaches_the_legacy_era(mcp: Running) -> None:
    assert legacy_call(mcp, "test_missing_capability").result["isError"] is False
    assert META[VERSION] == MODERN
