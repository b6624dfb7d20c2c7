"""What /mcp answers: lists with annotations and cursors, contents of every type, refusals that an agent can read."""

from __future__ import annotations

import base64
import http.client
import json
import signal
import socket
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.conftest import ROOT, Running, Serve
from tests.mcp_fixtures import PNG, SCHEMA_2020_12, WAV
from tests.transport.mcp_wire import (
    Answer,
    call,
    legacy,
    legacy_call,
    message,
    modern,
    modern_message,
    routing,
    send,
)


def tools(service: Running, *, is_legacy: bool = False) -> dict[str, dict[str, Any]]:
    answer = legacy(service, "tools/list") if is_legacy else modern(service, "tools/list")
    return {tool["name"]: tool for tool in answer.result["tools"]}


# Lists


def test_the_list_is_in_the_order_of_names_every_time(mcp: Running) -> None:
    names = [list(tools(mcp)) for _ in range(3)]
    assert names[0] == sorted(names[0]) and names[1:] == names[:1] * 2


def test_what_a_caller_may_not_call_is_not_listed(mcp: Running) -> None:
    assert "hidden" not in tools(mcp) and "hidden" not in tools(mcp, is_legacy=True)


def test_a_tool_is_listed_as_it_is_declared(mcp: Running) -> None:
    echo = tools(mcp)["echo"]
    detail = mcp.rpc("tools.get", {"tool_id": "echo"})["result"]
    assert echo["description"] == detail["description"]
    assert echo["inputSchema"] == detail["parameters"] and echo["outputSchema"] == detail["result"]
    assert echo["title"] == echo["annotations"]["title"] == (detail["title"] or detail["name"])


@pytest.mark.parametrize(
    ("tool", "read_only", "destructive", "idempotent"),
    [("echo", True, False, True), ("count_calls", False, False, False), ("test_simple_text", True, False, True)],
)
def test_the_hints_come_from_the_declaration(
    mcp: Running, tool: str, read_only: bool, destructive: bool, idempotent: bool
) -> None:
    annotations = tools(mcp)[tool]["annotations"]
    assert annotations == {
        "title": annotations["title"],
        "readOnlyHint": read_only,
        "destructiveHint": destructive,
        "idempotentHint": idempotent,
    }


def test_only_results_with_an_object_root_have_a_schema(mcp: Running) -> None:
    for listed in (tools(mcp), tools(mcp, is_legacy=True)):
        roots = {name: tool["outputSchema"]["type"] for name, tool in listed.items() if "outputSchema" in tool}
        assert set(roots.values()) == {"object"}
        assert not roots.keys() & {"test_simple_text", "test_image_content", "every_content_type", "count_calls"}


def test_a_schema_that_was_declared_comes_back_as_it_is(mcp: Running) -> None:
    assert tools(mcp)["json_schema_2020_12_tool"]["inputSchema"] == SCHEMA_2020_12
    assert tools(mcp, is_legacy=True)["json_schema_2020_12_tool"]["inputSchema"] == SCHEMA_2020_12


def test_a_mirrored_parameter_is_marked_in_the_schema(mcp: Running) -> None:
    properties = tools(mcp)["mirrored_parameters"]["inputSchema"]["properties"]
    assert {name: part["x-mcp-header"] for name, part in properties.items()} == {
        "region": "Region",
        "count": "Count",
        "dry": "Dry-Run",
    }


def test_a_list_may_be_kept_and_by_all_where_all_see_the_same(mcp: Running) -> None:
    result = modern(mcp, "tools/list").result
    assert isinstance(result["ttlMs"], int) and result["ttlMs"] > 0 and result["cacheScope"] == "public"
    assert result["resultType"] == "complete" and "nextCursor" not in result


def test_the_empty_cursor_is_a_cursor(mcp: Running) -> None:
    assert modern(mcp, "tools/list", {"cursor": ""}).result == modern(mcp, "tools/list").result


def test_cursors_lead_through_every_tool_once(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "many_tools.py").write_text(
        "from app.tools.tool import tool\n"
        "def make(number):\n"
        "    @tool(id=f'tool_{number:04}', description='One of many')\n"
        "    async def one() -> int:\n"
        "        return number\n"
        "    return one\n"
        "for number in range(600):\n"
        "    globals()[f'tool_{number}'] = make(number)\n"
    )
    service = serve(TOOL_MODULES="many_tools", PYTHONPATH=f"{ROOT}:{tmp_path}")
    for listed in (
        lambda cursor: modern(service, "tools/list", cursor),
        lambda cursor: legacy(service, "tools/list", cursor),
    ):
        names: list[str] = []
        params: dict[str, Any] = {}
        pages = 0
        while pages < 10:
            result = listed(params).result
            names += [tool["name"] for tool in result["tools"]]
            pages += 1
            if "nextCursor" not in result:
                break
            params = {"cursor": result["nextCursor"]}
        assert 2 <= pages < 10 and names == sorted(set(names))
        assert {f"tool_{number:04}" for number in range(600)} < set(names)


# Contents


def test_every_content_type_is_a_block(mcp: Running) -> None:
    for answer in (call(mcp, "every_content_type"), legacy_call(mcp, "every_content_type")):
        assert answer.result["isError"] is False and "structuredContent" not in answer.result
        text, image, audio, link, resource = answer.result["content"]
        assert text == {"type": "text", "text": "text"}
        assert image == {"type": "image", "data": base64.b64encode(PNG).decode(), "mimeType": "image/png"}
        assert audio == {"type": "audio", "data": base64.b64encode(WAV).decode(), "mimeType": "audio/wav"}
        assert link == {
            "type": "resource_link",
            "uri": "https://example.com/a",
            "name": "a",
            "mimeType": "text/plain",
            "size": 3,
        }
        assert resource == {"type": "resource", "resource": {"uri": "test://blob", "blob": "//77"}}


@pytest.mark.parametrize("version", [None, "2025-03-26", "2024-11-05"])
def test_links_are_text_to_clients_of_revisions_without_them(mcp: Running, version: str | None) -> None:
    def blocks(tool: str) -> list[dict[str, Any]]:
        return legacy(mcp, "tools/call", {"name": tool}, version).result["content"]  # type: ignore[no-any-return]

    as_they_are = call(mcp, "every_content_type").result["content"]
    as_they_are[3] = {"type": "text", "text": "a: https://example.com/a"}
    assert blocks("every_content_type") == as_they_are
    assert blocks("return_link") == [
        {"type": "text", "text": "ü: x:resource_link", "annotations": {"audience": ["user"]}}
    ]


@pytest.mark.parametrize("version", ["2025-06-18", "2025-11-25"])
def test_links_are_links_since_the_revision_that_brought_them(mcp: Running, version: str) -> None:
    answer = legacy(mcp, "tools/call", {"name": "return_link"}, version)
    assert answer.result["content"] == call(mcp, "return_link").result["content"]
    assert answer.result["content"][0]["type"] == "resource_link"


def test_one_block_is_a_list_of_one(mcp: Running) -> None:
    [block] = call(mcp, "test_embedded_resource").result["content"]
    assert block == {
        "type": "resource",
        "resource": {
            "uri": "test://embedded-resource",
            "mimeType": "text/plain",
            "text": "This is an embedded resource content.",
        },
    }


def test_the_other_doors_give_the_same_blocks_as_json(mcp: Running) -> None:
    assert mcp.execute("test_image_content")["result"] == call(mcp, "test_image_content").result["content"][0]
    assert mcp.execute("every_content_type")["result"] == call(mcp, "every_content_type").result["content"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain", "plain"),
        ('with "quotes" \\ and\nlines ü \u2028', 'with "quotes" \\ and\nlines ü \u2028'),
        (None, "null"),
        (5, "5"),
        ([1, "a"], '[1,"a"]'),
        ({"a": 'b"\\\x01'}, json.dumps({"a": 'b"\\\x01'}, separators=(",", ":"))),
    ],
)
def test_data_is_text_as_it_is_or_as_json(mcp: Running, value: Any, text: str) -> None:
    for answer in (
        call(mcp, "wait", {"seconds": 0, "value": value}),
        legacy_call(mcp, "wait", {"seconds": 0, "value": value}),
    ):
        assert answer.result["content"] == [{"type": "text", "text": text}]
        assert "structuredContent" not in answer.result


def test_a_result_says_under_which_id_it_is_in_the_log(mcp: Running) -> None:
    for answer in (call(mcp, "echo", {"message": "x"}), legacy_call(mcp, "echo", {"message": "x"})):
        execution_id = answer.result["_meta"]["io.agentcore/execution_id"]
        assert len(execution_id) == 36 and execution_id[14] == "7"


def test_a_result_over_the_bound_is_a_failure_that_says_so(mcp: Running) -> None:
    result = call(mcp, "return_long", {"characters": 1_048_576}).result
    assert result["isError"] is True and "TOOL_RESULT_TOO_LARGE" in result["content"][0]["text"]


# What travels in _meta


def test_a_trace_goes_on(mcp: Running) -> None:
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    meta = {"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"}
    assert call(mcp, "who_calls", _meta=meta).result["structuredContent"]["trace_id"] == trace_id


@pytest.mark.parametrize("given", ["x", 5, "ü", "00-" + "0" * 32 + "-00f067aa0ba902b7-01", None])
def test_a_trace_that_is_none_is_ignored(mcp: Running, given: Any) -> None:
    result = call(mcp, "who_calls", _meta={"traceparent": given}).result
    execution_id = result["_meta"]["io.agentcore/execution_id"]
    assert result["structuredContent"]["trace_id"] == execution_id.replace("-", "")


def test_the_trace_of_the_http_request_goes_before_that_of_the_message(mcp: Running) -> None:
    of_http, of_message = f"00-{'a' * 32}-00f067aa0ba902b7-01", f"00-{'b' * 32}-00f067aa0ba902b7-01"
    params = {"name": "who_calls", "_meta": {"traceparent": of_message}}
    result = modern(mcp, "tools/call", params, ("traceparent", of_http)).result
    assert result["structuredContent"]["trace_id"] == "a" * 32


def test_a_repeat_by_its_idempotency_key_gets_what_came_of_the_first_call(mcp: Running) -> None:
    meta = {"io.agentcore/idempotency_key": "mcp-results-1"}
    first, again = (call(mcp, "count_calls", _meta=meta).result for _ in range(2))
    assert first["isError"] is False and again == first
    call(mcp, "echo", {"message": "x"}, _meta=meta)
    error = refusal(call(mcp, "echo", {"message": "y"}, _meta=meta))
    assert (error["code"], error["data"]["error_type"]) == (-32007, "idempotency_conflict")


@pytest.mark.parametrize("name", ["idempotency_key", "idempotencyKey"])
def test_an_idempotency_key_may_have_its_plain_name(mcp: Running, name: str) -> None:
    meta = {name: f"mcp-plain-{name}"}
    first, second = (call(mcp, "count_calls", _meta=meta).result for _ in range(2))
    assert first["content"] == second["content"] and first["_meta"] == second["_meta"]
    both = {"idempotency_key": "a", "idempotencyKey": "b"}
    assert "differ" in call(mcp, "count_calls", _meta=both).json["error"]["message"]


@pytest.mark.parametrize("key", ["", 5, "x" * 257, []])
def test_an_idempotency_key_that_cannot_be_one_is_malformed(mcp: Running, key: Any) -> None:
    meta = {"io.agentcore/idempotency_key": key}
    assert call(mcp, "echo", {"message": "x"}, _meta=meta).code == (400, -32602)


# Refusals


def refusal(answer: Answer) -> dict[str, Any]:
    """The error in a result, as structure and as the same in text."""
    assert answer.result["isError"] is True
    error = answer.result["structuredContent"]["error"]
    assert [json.loads(block["text"]) for block in answer.result["content"]] == [{"error": error}]
    return error  # type: ignore[no-any-return]


def test_a_rate_limit_tells_the_agent_when_to_come_back(serve: Serve) -> None:
    service = serve(LIMITS_RATE="2/hour")
    assert call(service, "echo", {"message": "x"}).headers["ratelimit-remaining"] == "1"
    assert legacy_call(service, "echo", {"message": "x"}).headers["ratelimit-remaining"] == "0"
    for answer in (call(service, "echo", {"message": "x"}), legacy_call(service, "echo", {"message": "x"})):
        error = refusal(answer)
        assert error["code"] == -32001 and error["data"]["error_type"] == "rate_limit"
        assert 0 < error["data"]["retry_after_ms"] <= 1_800_000 and error["data"]["retryable"] is True
        assert int(answer.headers["retry-after"]) > 0
    assert service.execute("echo", {"message": "x"})["code"] == -32001
    assert service.metric("tool_errors_total", error_type="rate_limit") == 3


def test_a_quota_tells_the_agent_when_it_ends(serve: Serve) -> None:
    service = serve(LIMITS_QUOTA_DAILY="1")
    call(service, "echo", {"message": "x"})
    error = refusal(call(service, "echo", {"message": "x"}))
    assert error["data"]["error_type"] == "quota" and error["data"]["reset_at"].endswith("Z")


def test_an_overload_is_a_result(serve: Serve) -> None:
    service = serve(MAX_CONCURRENT_EXECUTIONS="1", TOOL_MODULES="tests.tools_for_tests")
    batch = [
        message("tools/call", {"name": "wait", "arguments": {"seconds": 1.5, "value": n}}, request_id=n)
        for n in range(4)
    ]
    results = [each["result"] for each in send(service, batch).json]
    overloaded = [each for each in results if each["isError"]]
    assert overloaded
    for each in overloaded:
        assert each["structuredContent"]["error"]["data"]["error_type"] == "overloaded"


def test_a_refusal_passes_the_schema_that_legacy_clients_check_it_against(mcp: Running) -> None:
    modern_schema, legacy_schema = (
        tools(mcp)["echo"]["outputSchema"],
        tools(mcp, is_legacy=True)["echo"]["outputSchema"],
    )
    assert legacy_schema["properties"] == modern_schema["properties"], "some clients make a class of them"
    error = {"error": {"code": -32001, "message": "Rate limit reached", "data": {}}}
    jsonschema.validate({"message": "x"}, legacy_schema)
    jsonschema.validate(error, legacy_schema)
    for neither in ({}, {"message": 5}, {"error": "x"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(neither, legacy_schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(error, modern_schema)


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("return_outcome", {}),
        ("return_outcome", {"error": "as data"}),
        ("return_anything", {"values": {"error": None}}),
        ("return_numbers", {"values": {"error": 1, "other": 2}}),
        ("return_named_numbers", {"values": {"error": 1, "other": 2}}),
        ("return_branch", {}),
    ],
)
def test_an_error_among_the_data_of_a_tool_passes_its_schema_as_a_refusal_does(
    mcp: Running, tool: str, arguments: dict[str, Any]
) -> None:
    schema = tools(mcp, is_legacy=True)[tool]["outputSchema"]
    structured = legacy_call(mcp, tool, arguments).result["structuredContent"]
    assert structured == (arguments.get("values") or structured)
    jsonschema.validate(structured, schema)
    jsonschema.validate({"error": {"code": -32001, "message": "Rate limit reached", "data": {}}}, schema)


def test_what_no_tool_returns_and_no_refusal_is_fails_the_schema_of_legacy_lists(mcp: Running) -> None:
    listed = tools(mcp, is_legacy=True)
    wrong: dict[str, Any] = {
        "return_outcome": {"error": "alone"},
        "return_numbers": {"error": "no number"},
        "return_named_numbers": {"error": "no number"},
        "return_branch": {"name": "root", "branches": [{}]},
    }
    for tool, structured in wrong.items():
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(structured, listed[tool]["outputSchema"])


def test_a_replica_that_shuts_down_is_503_so_that_another_is_asked(serve: Serve) -> None:
    service = serve()
    body = json.dumps(modern_message("tools/call", {"name": "echo", "arguments": {"message": "x"}})).encode()
    head = "".join(f"{name}: {value}\r\n" for name, value in routing("tools/call", "echo"))
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as late:
        late.sendall(f"POST /mcp HTTP/1.1\r\nHost: localhost\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode())
        late.sendall(body[:-5])
        assert call(service, "echo", {"message": "the half request has been read by now"}).status == 200
        service.process.send_signal(signal.SIGTERM)
        service.read_log(lambda event: event["message"] == "draining")
        late.sendall(body[-5:])
        with http.client.HTTPResponse(late) as response:
            response.begin()
            refused = json.loads(response.read())
    assert response.status == 503 and refused["error"]["code"] == -32009 and refused["id"] == 1
    assert response.headers["retry-after"] == "1" and response.headers["connection"] == "close"
    assert service.process.wait(timeout=60) == 0


def test_every_answer_is_valid_under_its_length(mcp: Running) -> None:
    body = json.dumps(modern_message("tools/call", {"name": "echo", "arguments": {"message": "ü" * 1000}})).encode()
    answer = send(mcp, body, routing("tools/call", "echo"))
    assert int(answer.headers["content-length"]) == len(answer.body)
