"""The checks of a request of 2026-07-28, in their order: the table of docs/mcp.md, as bytes over HTTP."""

from __future__ import annotations

import base64
import json
import socket
from typing import Any

import pytest

from tests.conftest import Running, Serve
from tests.transport.mcp_wire import (
    CAPABILITIES,
    META,
    MODERN,
    VERSION,
    Headers,
    call,
    encoded,
    message,
    modern,
    modern_message,
    routing,
    send,
)

CALL = modern_message("tools/call", {"name": "echo", "arguments": {"message": "hi"}})
CALL_HEADERS = routing("tools/call", "echo")


def echo(service: Running, headers: Headers) -> tuple[int, int | None]:
    """HTTP status and error code of a good call under these headers."""
    answer = send(service, CALL, headers)
    return answer.status, answer.json.get("error", {}).get("code")


def test_a_call_is_answered_whole(mcp: Running) -> None:
    answer = call(mcp, "echo", {"message": 'say "hi" \\ \n'})
    assert answer.headers["content-type"] == "application/json"
    assert not answer.headers.keys() & {"mcp-session-id"}
    result = answer.result
    assert result["resultType"] == "complete" and result["isError"] is False
    assert result["structuredContent"] == {"message": 'say "hi" \\ \n'}
    [block] = result["content"]
    assert block["type"] == "text" and json.loads(block["text"]) == result["structuredContent"]
    assert result["_meta"]["io.modelcontextprotocol/serverInfo"]["name"] == "agentcore-tools"


def test_discovery_names_versions_and_what_is_offered(mcp: Running) -> None:
    result = modern(mcp, "server/discover").result
    assert result["supportedVersions"] == ["2026-07-28", "2025-11-25", "2025-06-18", "2025-03-26", "2024-11-05"]
    assert result["capabilities"] == {"tools": {}} and result["resultType"] == "complete"
    assert result["ttlMs"] >= 0 and result["cacheScope"] == "public"
    assert set(result["_meta"]["io.modelcontextprotocol/serverInfo"]) == {"name", "version"}


@pytest.mark.parametrize("verb", ["GET", "DELETE", "PUT", "PATCH", "OPTIONS"])
def test_other_verbs_are_405_and_name_the_one_that_is_allowed(mcp: Running, verb: str) -> None:
    answer = send(mcp, b"", [("Accept", "text/event-stream"), ("Mcp-Session-Id", "x")], verb)
    assert answer.status == 405 and answer.headers["allow"] == "POST" and answer.body == b""


def test_a_session_that_comes_is_not_looked_at(mcp: Running) -> None:
    assert echo(mcp, [*CALL_HEADERS, ("Mcp-Session-Id", "made up"), ("Last-Event-ID", "7")]) == (200, None)


# 0


@pytest.mark.parametrize("headers", [[("Origin", "https://evil.example")], [("Origin", "null")]])
def test_0_a_foreign_origin_is_403(mcp: Running, headers: Headers) -> None:
    assert send(mcp, CALL, [*CALL_HEADERS, *headers]).status == 403


def test_0_a_host_that_is_not_loopback_is_refused(mcp: Running) -> None:
    with socket.create_connection(("127.0.0.1", mcp.port), timeout=30) as connection:
        connection.sendall(b"POST /mcp HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 2\r\n\r\n{}")
        assert connection.recv(100).startswith(b"HTTP/1.1 403")


def test_0_our_own_origin_may_call(mcp: Running) -> None:
    assert echo(mcp, [*CALL_HEADERS, ("Origin", mcp.url)]) == (200, None)
    assert echo(mcp, [*CALL_HEADERS, ("Origin", mcp.url + " ")]) == (200, None)


def test_0_a_second_origin_is_foreign_whatever_it_is(mcp: Running) -> None:
    for headers in ([("Origin", "https://evil.example"), ("Origin", mcp.url)], [("Origin", mcp.url)] * 2):
        assert send(mcp, CALL, [*CALL_HEADERS, *headers]).status == 403


# 1


@pytest.mark.parametrize(
    "body",
    [b"", b"  ", b"not json", b'{"jsonrpc":"2.0"', b"NaN", b"\xef\xbb\xbf{}", b'"\xff"', b"[" * 65 + b"]" * 65],
)
def test_1_what_is_not_json_is_a_parse_error(mcp: Running, body: bytes) -> None:
    answer = send(mcp, body, CALL_HEADERS)
    assert answer.code == (400, -32700) and answer.json["id"] is None


@pytest.mark.parametrize(
    "body",
    [
        [],
        [CALL],
        1,
        "text",
        None,
        {},
        {**CALL, "jsonrpc": "1.0"},
        {key: value for key, value in CALL.items() if key != "jsonrpc"},
        {**CALL, "method": 5},
        {**CALL, "method": None},
        {**CALL, "params": []},
        {**CALL, "params": None},
        {**CALL, "params": "x"},
        {"jsonrpc": "2.0", "id": 1, "result": {}},
        {"jsonrpc": "2.0", "id": 1, "error": {"code": 1, "message": "x"}},
        {"jsonrpc": "2.0", "method": 5},
    ],
    ids=lambda body: json.dumps(body)[:40],
)
def test_1_what_is_no_single_request_is_an_invalid_one(mcp: Running, body: Any) -> None:
    assert send(mcp, body, CALL_HEADERS).code == (400, -32600)


def test_1_a_readable_id_comes_back_with_a_bad_envelope(mcp: Running) -> None:
    assert send(mcp, {**CALL, "id": "k", "method": 5}, CALL_HEADERS).json["id"] == "k"


# 2


@pytest.mark.parametrize(
    "body",
    [
        {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 1}},
        {"jsonrpc": "2.0", "method": "no/such"},
        {"jsonrpc": "2.0", "method": "tools/call", "params": {"name": "count_calls", "_meta": META}},
        {"jsonrpc": "2.0", "method": "x", "params": {"_meta": {VERSION: "2099-01-01"}}},
    ],
    ids=lambda body: str(body["method"]),
)
@pytest.mark.parametrize("headers", [CALL_HEADERS, routing("tools/list"), [("MCP-Protocol-Version", "2099-01-01")], []])
def test_2_a_message_without_an_id_is_accepted_and_says_nothing(mcp: Running, body: Any, headers: Headers) -> None:
    answer = send(mcp, body, headers)
    assert answer.status == 202 and answer.body == b"" and "content-type" not in answer.headers


def test_2_a_message_without_an_id_runs_nothing(mcp: Running) -> None:
    before = call(mcp, "count_calls").result["content"][0]["text"]
    send(mcp, {**CALL, "params": {"name": "count_calls", "_meta": META}, "id": 1}, routing("tools/call", "count_calls"))
    send(mcp, {"jsonrpc": "2.0", "method": "tools/call", "params": {"name": "count_calls", "_meta": META}}, [])
    assert int(call(mcp, "count_calls").result["content"][0]["text"]) == int(before) + 2


# 3


@pytest.mark.parametrize("request_id", [None, True, False, 1.5, 1.0, {}, [], [1]])
def test_3_an_id_of_another_type_is_an_invalid_request(mcp: Running, request_id: Any) -> None:
    answer = send(mcp, {**CALL, "id": request_id}, CALL_HEADERS)
    assert answer.code == (400, -32600) and answer.json["id"] is None


@pytest.mark.parametrize("request_id", [0, -1, 9007199254740993, "", "a", "ü"])
def test_3_an_id_comes_back_with_its_type_and_value(mcp: Running, request_id: Any) -> None:
    answer = send(mcp, {**CALL, "id": request_id}, CALL_HEADERS)
    assert answer.json["id"] == request_id and type(answer.json["id"]) is type(request_id)


# 4


@pytest.mark.parametrize(
    "params",
    [
        None,
        {},
        {"_meta": None},
        {"_meta": []},
        {"_meta": {}},
        {"_meta": {VERSION: MODERN}},
        {"_meta": {CAPABILITIES: {}}},
        {"_meta": {VERSION: None, CAPABILITIES: {}}},
        {"_meta": {VERSION: MODERN, CAPABILITIES: None}},
        {"_meta": {VERSION: MODERN, CAPABILITIES: []}},
    ],
    ids=lambda params: json.dumps(params)[:60],
)
@pytest.mark.parametrize("method", ["server/discover", "tools/list", "no/such"])
def test_4_what_meta_must_say_is_missing(mcp: Running, params: Any, method: str) -> None:
    answer = send(mcp, message(method, params), routing(method))
    assert answer.code == (400, -32602) and answer.json["id"] == 1


def test_4_is_told_before_what_is_wrong_with_headers(mcp: Running) -> None:
    body = message("tools/list", {"_meta": {VERSION: MODERN}})
    assert send(mcp, body, [("MCP-Protocol-Version", MODERN), ("Mcp-Method", "wrong")]).code == (400, -32602)


def test_4_client_info_is_optional_and_anything_else_is_ignored(mcp: Running) -> None:
    meta = {**META, "io.modelcontextprotocol/clientInfo": {"name": "x", "version": "1"}, "com.example/x": [1]}
    answer = modern(mcp, "tools/call", {"name": "echo", "arguments": {"message": "x"}, "_meta": meta, "extra": 1})
    assert answer.result["isError"] is False


# 5


def without(name: str) -> Headers:
    return [header for header in CALL_HEADERS if header[0] != name]


@pytest.mark.parametrize("name", ["MCP-Protocol-Version", "Mcp-Method", "Mcp-Name"])
def test_5_a_routing_header_is_missing(mcp: Running, name: str) -> None:
    assert echo(mcp, without(name)) == (400, -32020)


@pytest.mark.parametrize("name", ["MCP-Protocol-Version", "Mcp-Method", "Mcp-Name"])
@pytest.mark.parametrize("value", ["", " ", "wrong", "2025-11-25", "TOOLS/CALL", "Echo", "echo2", "echo,echo"])
def test_5_a_routing_header_is_not_what_the_body_says(mcp: Running, name: str, value: str) -> None:
    assert echo(mcp, [*without(name), (name, value)]) == (400, -32020)


@pytest.mark.parametrize("header", CALL_HEADERS, ids=lambda header: header[0])
def test_5_a_routing_header_comes_twice_even_if_both_are_right(mcp: Running, header: tuple[str, str]) -> None:
    assert echo(mcp, [*CALL_HEADERS, header]) == (400, -32020)
    assert echo(mcp, [*CALL_HEADERS, (header[0].lower(), header[1])]) == (400, -32020)


def test_5_names_of_headers_are_compared_without_case(mcp: Running) -> None:
    assert echo(mcp, [(name.upper(), value) for name, value in CALL_HEADERS]) == (200, None)
    assert echo(mcp, [(name.lower(), value) for name, value in CALL_HEADERS]) == (200, None)


@pytest.mark.parametrize("blanks", ["{} ", " {}", "\t{}\t", "  {}  \t", "{}\t"])
def test_5_blanks_around_values_do_not_count(mcp: Running, blanks: str) -> None:
    assert echo(mcp, [(name, blanks.format(value)) for name, value in CALL_HEADERS]) == (200, None)


def test_5_a_name_may_come_in_base64(mcp: Running) -> None:
    assert echo(mcp, [*without("Mcp-Name"), ("Mcp-Name", encoded("echo"))]) == (200, None)


@pytest.mark.parametrize(
    "value",
    [
        encoded("echo2"),
        "=?base64?ZWNobw?=",
        "=?base64?ZWNobx==?=",
        "=?base64?ZWNo!bw==?=",
        "=?BASE64?ZWNobw==?=",
        "=?base64?ZWNobw==",
        "=?base64??=",
        "=?base64?=",
        "=?base64?/w==?=",
        "ZWNobw==",
        " =?base64?ZWNobw== ?=",
    ],
)
def test_5_base64_that_is_not_canonical_or_not_of_the_name_is_unequal(mcp: Running, value: str) -> None:
    assert echo(mcp, [*without("Mcp-Name"), ("Mcp-Name", value)]) == (400, -32020)


def test_5_version_and_method_have_no_encoded_form(mcp: Running) -> None:
    assert echo(mcp, [*without("Mcp-Method"), ("Mcp-Method", encoded("tools/call"))]) == (400, -32020)
    assert echo(mcp, [*without("MCP-Protocol-Version"), ("MCP-Protocol-Version", encoded(MODERN))]) == (400, -32020)


def test_5_a_name_outside_of_ascii_comes_encoded_or_not_at_all(mcp: Running) -> None:
    body = modern_message("tools/call", {"name": "écho"})
    assert send(mcp, body, routing("tools/call", "écho")).code == (400, -32020)
    assert send(mcp, body, routing("tools/call", encoded("écho"))).code == (400, -32602)


def test_5_a_name_that_looks_encoded_must_be(mcp: Running) -> None:
    body = modern_message("tools/call", {"name": encoded("echo")})
    assert send(mcp, body, routing("tools/call", encoded("echo"))).code == (400, -32020)
    assert send(mcp, body, routing("tools/call", encoded(encoded("echo")))).code == (400, -32602)


def test_5_a_name_header_beside_no_name_is_unequal(mcp: Running) -> None:
    assert send(mcp, modern_message("tools/call", {}), routing("tools/call", "echo")).code == (400, -32020)
    assert send(mcp, modern_message("tools/call", {}), routing("tools/call", "=?base64?!?=")).code == (400, -32020)
    assert send(mcp, modern_message("tools/call", {"name": 5}), routing("tools/call", "5")).code == (400, -32020)


def test_5_only_calls_have_a_name(mcp: Running) -> None:
    assert send(mcp, modern_message("tools/list"), routing("tools/list", "echo")).status == 200


def test_5_is_told_before_what_is_wrong_with_the_version(mcp: Running) -> None:
    body = message("tools/list", {"_meta": {VERSION: "2099-01-01", CAPABILITIES: {}}})
    assert send(mcp, body, routing("tools/list")).code == (400, -32020)


# 6


@pytest.mark.parametrize("version", ["2099-01-01", "2025-11-25", "v1", "DRAFT-2026-v1"])
@pytest.mark.parametrize("method", ["tools/list", "server/discover", "no/such"])
def test_6_a_version_that_is_not_served_in_this_era(mcp: Running, version: str, method: str) -> None:
    body = message(method, {"_meta": {VERSION: version, CAPABILITIES: {}}})
    answer = send(mcp, body, [("MCP-Protocol-Version", version), ("Mcp-Method", method)])
    assert answer.code == (400, -32022)
    assert answer.error["data"]["requested"] == version and MODERN in answer.error["data"]["supported"]
    assert set(answer.error["data"]) == {"supported", "requested"}


# 7

MIRRORED = {"region": "eu", "count": 3, "dry": True}
MIRRORED_HEADERS = [("Mcp-Param-Region", "eu"), ("Mcp-Param-Count", "3"), ("Mcp-Param-Dry-Run", "true")]


def mirrored(service: Running, arguments: dict[str, Any], *headers: tuple[str, str]) -> tuple[int, Any]:
    """HTTP status, and error code or whether the tool failed."""
    params = {"name": "mirrored_parameters", "arguments": arguments}
    answer = modern(service, "tools/call", params, *headers)
    return answer.status, answer.error["code"] if "error" in answer.json else answer.result["isError"]


def test_7_mirrored_parameters_and_their_headers_agree(mcp: Running) -> None:
    assert mirrored(mcp, MIRRORED, *MIRRORED_HEADERS) == (200, False)
    assert mirrored(mcp, {}) == (200, False)
    assert mirrored(mcp, MIRRORED, *[(name.upper(), value) for name, value in MIRRORED_HEADERS]) == (200, False)


@pytest.mark.parametrize("absent", range(3))
def test_7_a_header_is_missing_though_the_argument_is_there(mcp: Running, absent: int) -> None:
    assert mirrored(mcp, MIRRORED, *MIRRORED_HEADERS[:absent], *MIRRORED_HEADERS[absent + 1 :]) == (400, -32020)


@pytest.mark.parametrize("header", MIRRORED_HEADERS, ids=lambda header: header[0])
def test_7_a_header_is_there_though_the_argument_is_not(mcp: Running, header: tuple[str, str]) -> None:
    assert mirrored(mcp, {}, header) == (400, -32020)


def test_7_null_counts_as_absent(mcp: Running) -> None:
    assert mirrored(mcp, {"region": None}) == (200, True)
    assert mirrored(mcp, {"region": None}, ("Mcp-Param-Region", "null")) == (400, -32020)


@pytest.mark.parametrize(
    ("argument", "value", "header", "outcome"),
    [
        ("region", "eu", "us", -32020),
        ("region", "eu", "EU", -32020),
        ("region", "eu", encoded("eu"), False),
        ("region", "Zürich", encoded("Zürich"), False),
        ("region", "Zürich", "Zürich", -32020),
        ("region", "", "", False),
        ("region", " padded ", encoded(" padded "), False),
        ("region", " padded ", " padded ", -32020),
        ("region", "a b", "a b", False),
        ("region", "a\tb", "a\tb", False),
        ("region", "SGVsbG8=", "SGVsbG8=", False),
        ("region", "=?base64?SGVsbG8=", "=?base64?SGVsbG8=", False),
        ("region", "Hello", "=?base64?SGVsbG8?=", -32020),
        ("region", "Hello", "=?base64?SGVs!!!bG8=?=", -32020),
        ("count", 42, "42", False),
        ("count", 42, "42.0", False),
        ("count", 42.0, "42", False),
        ("count", -7, "-7", False),
        ("count", 42, "43", -32020),
        ("count", 42, "42.5", -32020),
        ("count", 42, "4.2e1", -32020),
        ("count", 42, "4_2", -32020),
        ("count", 42, "+42", -32020),
        ("count", 42, "", -32020),
        ("count", 9007199254740993, "9007199254740992", -32020),
        ("count", 9007199254740993, "9007199254740993", False),
        ("dry", True, "true", False),
        ("dry", False, "false", False),
        ("dry", True, "True", -32020),
        ("dry", True, "1", -32020),
        ("region", 5, "5", True),
        ("count", "x", "x", True),
        ("count", 1.5, "1.5", True),
        ("count", -1e21, "-1e+21", True),
        ("count", 1e20, "100000000000000000000", True),
        ("count", 1.5, "1.25", -32020),
        ("count", True, "true", True),
    ],
)
def test_7_values_are_compared_as_the_parameter_has_them(
    mcp: Running, argument: str, value: Any, header: str, outcome: Any
) -> None:
    name = {"region": "Mcp-Param-Region", "count": "Mcp-Param-Count", "dry": "Mcp-Param-Dry-Run"}[argument]
    assert mirrored(mcp, {argument: value}, (name, header)) == (400 if outcome == -32020 else 200, outcome)


def test_7_a_header_comes_twice(mcp: Running) -> None:
    assert mirrored(mcp, {"region": "eu"}, *[("Mcp-Param-Region", "eu")] * 2) == (400, -32020)


def test_7_headers_that_no_parameter_asks_for_are_ignored(mcp: Running) -> None:
    assert mirrored(mcp, MIRRORED, *MIRRORED_HEADERS, ("Mcp-Param-Other", "x"), ("Mcp-Param-Other", "y")) == (
        200,
        False,
    )
    assert echo(mcp, [*CALL_HEADERS, ("Mcp-Param-Message", "other")]) == (200, None)


@pytest.mark.parametrize("value", [["eu"], {"name": "eu"}, [], {}], ids=json.dumps)
def test_7_what_no_header_can_say_is_for_the_agent_to_mend(mcp: Running, value: Any) -> None:
    assert mirrored(mcp, {"region": value}) == (200, True)
    assert mirrored(mcp, {"region": value}, ("Mcp-Param-Region", "eu")) == (400, -32020)
    assert mirrored(mcp, {"region": value, "count": 1}) == (400, -32020)


def test_7_is_told_before_what_is_wrong_with_the_arguments(mcp: Running) -> None:
    assert mirrored(mcp, {"region": "eu", "unknown": 1}) == (400, -32020)


# 8


@pytest.mark.parametrize(
    "method",
    [
        "initialize",
        "ping",
        "logging/setLevel",
        "resources/list",
        "prompts/list",
        "completion/complete",
        "x",
        "",
        "Tools/List",
    ],
)
def test_8_an_unknown_method_is_404(mcp: Running, method: str) -> None:
    body = modern_message(method, {"protocolVersion": "2025-11-25"})
    answer = send(mcp, body, [("MCP-Protocol-Version", MODERN), ("Mcp-Method", method)] if method else [])
    assert answer.code == ((404, -32601) if method else (400, -32020))


# 9


def test_9_an_unknown_tool_is_invalid_params(mcp: Running) -> None:
    assert call(mcp, "no_such_tool").code == (400, -32602)


def test_9_a_tool_that_the_caller_may_not_call_looks_like_none(mcp: Running) -> None:
    assert call(mcp, "hidden").error == call(mcp, "no_such_tool").error


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"name": None},
        {"name": ""},
        {"arguments": {}},
        *({"name": "echo", "arguments": arguments} for arguments in ([], "x", 1, None)),
    ],
    ids=json.dumps,
)
def test_9_malformed_params_of_a_call(mcp: Running, params: dict[str, Any]) -> None:
    assert modern(mcp, "tools/call", params).code == (400, -32602)


LONG = base64.b64encode(b"z" * 300_000).decode()


@pytest.mark.parametrize("cursor", [5, None, [], True, "not a cursor!", "é", pytest.param(LONG, id="long")])
def test_9_a_bad_cursor(mcp: Running, cursor: Any) -> None:
    assert modern(mcp, "tools/list", {"cursor": cursor}).code == (400, -32602)


# 10


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "message: Field required"),
        ({"message": 5}, "message: Input should be a valid string"),
        ({"message": "x", "other": 1}, "other: Extra inputs are not permitted"),
    ],
)
def test_10_arguments_that_do_not_fit_are_a_result_that_says_what_to_mend(
    mcp: Running, arguments: dict[str, Any], told: str
) -> None:
    result = call(mcp, "echo", arguments).result
    assert result["isError"] is True and result["resultType"] == "complete"
    assert told in result["content"][0]["text"] and "call again" in result["content"][0]["text"]


def test_10_no_arguments_are_arguments(mcp: Running) -> None:
    assert modern(mcp, "tools/call", {"name": "test_simple_text"}).result["isError"] is False


def test_10_a_tool_that_fails_is_a_result(mcp: Running) -> None:
    result = call(mcp, "fail_clearly", {"message": "No such ticket", "retryable": True}).result
    assert result["isError"] is True and "structuredContent" not in result
    assert result["content"] == [
        {"type": "text", "text": "No such ticket [TICKET_CLOSED; may be tried again in 250 ms]"}
    ]


def test_10_what_a_crash_says_stays_in_the_log(mcp: Running) -> None:
    answer = call(mcp, "raise_exception")
    assert answer.result["isError"] is True and b"canary" not in answer.body and b"TOOL_CRASHED" in answer.body


def test_10_a_tool_that_runs_out_of_time_is_a_result(mcp: Running) -> None:
    text = call(mcp, "short_timeout", {"seconds": 5}).result["content"][0]["text"]
    assert "deadline" in text and "TOOL_TIMEOUT" in text and "tried again" in text


# 11


def test_11_a_capability_that_the_client_did_not_declare(mcp: Running) -> None:
    answer = call(mcp, "test_missing_capability")
    assert answer.code == (400, -32021)
    assert answer.error["data"] == {"requiredCapabilities": {"sampling": {}}}


def test_11_a_capability_that_the_client_declared(mcp: Running) -> None:
    declared = {CAPABILITIES: {"sampling": {}}}
    assert call(mcp, "test_missing_capability", _meta=declared).result["isError"] is False


def test_11_comes_after_the_arguments(mcp: Running) -> None:
    result = call(mcp, "test_missing_capability", {"unknown": 1}).result
    assert result["isError"] is True and "unknown" in result["content"][0]["text"]


# Bodies and settings


def test_a_body_over_the_bound_is_413(serve: Serve) -> None:
    service = serve(MAX_REQUEST_BYTES="1024")
    answer = send(service, b" " * 2000, CALL_HEADERS)
    assert answer.code == (413, -32600) and answer.json["id"] is None


def test_errors_are_counted_by_type(mcp: Running) -> None:
    def counted() -> dict[str, float]:
        kinds = ("parse_error", "invalid_request", "invalid_params", "method_not_found", "tool_error")
        return {kind: mcp.metric("tool_errors_total", error_type=kind) for kind in kinds}

    before = counted()
    send(mcp, b"no", CALL_HEADERS)
    echo(mcp, without("Mcp-Name"))
    call(mcp, "no_such_tool")
    call(mcp, "echo", {})
    modern(mcp, "no/such")
    call(mcp, "fail_clearly")
    after = counted()
    assert {kind: after[kind] - before[kind] for kind in before} == {
        "parse_error": 1,
        "invalid_request": 1,
        "invalid_params": 2,
        "method_not_found": 1,
        "tool_error": 1,
    }


def test_the_overhead_of_a_call_is_observed(mcp: Running) -> None:
    before = mcp.metric("framework_overhead_seconds_count")
    call(mcp, "echo", {"message": "x"})
    assert mcp.metric("framework_overhead_seconds_count") == before + 1


def test_mcp_tolerate_header_mismatch_takes_modern_messages_under_an_old_header(serve: Serve) -> None:
    service = serve(MCP_TOLERATE_HEADER_MISMATCH="true")
    old = ("MCP-Protocol-Version", "2025-11-25")
    assert echo(service, [old]) == (200, None)
    assert echo(service, [old, *CALL_HEADERS[1:]]) == (200, None)
    assert send(service, CALL, [old]).result["resultType"] == "complete"
    assert echo(service, [old, ("Mcp-Name", "other")]) == (400, -32020)
    assert echo(service, [old, ("Mcp-Method", "tools/list")]) == (400, -32020)
    assert echo(service, []) == (400, -32020)
    assert echo(service, [("MCP-Protocol-Version", "2099-01-01"), *CALL_HEADERS[1:]]) == (400, -32020)
