"""The JSON-RPC door, body by body, as bytes over HTTP: the table of docs/json-rpc.md."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.conftest import Running

PATH = "/api/v1/jsonrpc"


def post(service: Running, body: bytes | str, **headers: str) -> httpx.Response:
    content = body.encode() if isinstance(body, str) else body
    return service.http.post(PATH, content=content, headers=headers)


def request(method: Any = "rpc.ping", **members: Any) -> str:
    return json.dumps({"jsonrpc": "2.0", "method": method, **members})


def error_of(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    answer = response.json()
    assert answer["jsonrpc"] == "2.0" and set(answer) == {"jsonrpc", "error", "id"}
    error = answer["error"]
    assert set(error) == {"code", "message", "data"}
    assert {"error_type", "retryable"} <= set(error["data"])
    return answer  # type: ignore[no-any-return]


@pytest.mark.parametrize("request_id", ["1", "0", "-7", '"a"', '""', "9007199254740993", "1.5", "18446744073709551615"])
def test_an_id_comes_back_with_its_type_and_value(service: Running, request_id: str) -> None:
    response = post(service, '{"jsonrpc":"2.0","method":"rpc.ping","id":%s}' % request_id)
    assert response.status_code == 200
    assert f'"id":{request_id}}}' in response.text


def test_id_null_is_a_request_and_is_answered(service: Running) -> None:
    answer = post(service, request(id=None)).json()
    assert answer["id"] is None and "result" in answer


@pytest.mark.parametrize("request_id", [True, False, {}, [1], [], {"a": 1}])
def test_an_id_of_another_type_is_refused_with_id_null(service: Running, request_id: Any) -> None:
    answer = error_of(post(service, request(id=request_id)))
    assert answer["error"]["code"] == -32600 and answer["id"] is None


@pytest.mark.parametrize(
    "body",
    [
        request(),
        request("no.such.method"),
        request("tools.execute", params={"wrong": 1}),
        request("tools.execute", params={"tool_id": "raise_exception"}),
        request("tools.execute", params={"tool_id": "no_such_tool"}),
        request("rpc.ping", params="x"),
    ],
)
def test_without_an_id_nothing_is_answered_whatever_happens(service: Running, body: str) -> None:
    response = post(service, body)
    assert response.status_code == 204 and response.content == b""


def test_a_notification_runs_its_tool(service: Running) -> None:
    before = service.execute("count_calls")["result"]
    post(service, request("tools.execute", params={"tool_id": "count_calls"}))
    assert service.execute("count_calls")["result"] == before + 2


@pytest.mark.parametrize("members", [{}, {"params": []}, {"params": {}}])
def test_no_params_in_any_form_call_without_arguments(service: Running, members: dict[str, Any]) -> None:
    assert post(service, request(id=1, **members)).json()["result"] == {"pong": True}


def test_params_in_an_array_go_by_the_order_of_the_method_table(service: Running) -> None:
    answer = post(service, request("tools.execute", params=["echo", {"message": "hi"}], id=1)).json()
    assert answer["result"]["result"] == {"message": "hi"}


@pytest.mark.parametrize("params", ["null", '"x"', "1", "true", "1.5"])
def test_params_of_another_type_are_an_invalid_request(service: Running, params: str) -> None:
    answer = error_of(post(service, '{"jsonrpc":"2.0","method":"rpc.ping","params":%s,"id":"k"}' % params))
    assert answer["error"]["code"] == -32600 and answer["id"] == "k"


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("rpc.ping", [1]),
        ("rpc.ping", {"x": 1}),
        ("tools.get", ["echo", 2]),
        ("tools.get", {}),
        ("tools.get", {"tool_id": 5}),
        ("tools.get", {"tool_id": None}),
        ("tools.list", {"limit": "5"}),
        ("tools.list", {"limit": 0}),
        ("tools.list", {"limit": 1001}),
        ("tools.list", {"limit": True}),
        ("tools.list", {"cursor": "not a cursor!"}),
        ("tools.list", {"tags": "text"}),
        ("tools.search", {"limit": 101}),
        ("tools.execute", {"tool_id": "echo", "parameters": []}),
        ("tools.execute", {"tool_id": "echo", "parameters": {}, "timeout_override": 0}),
        ("tools.execute", {"tool_id": "echo", "parameters": {}, "timeout_override": "1"}),
        ("tools.execute", {"tool_id": "echo", "parameters": {}, "call_id": "a b"}),
        ("tools.execute", {"tool_id": "echo", "parameters": {}, "call_id": "x" * 65}),
        ("tools.execute", {"tool_id": "echo", "parameters": {"message": "x"}, "unknown": 1}),
        ("tools.execute", {"tool_id": "echo", "parameters": {"message": "x"}, "execution_context": "x"}),
        ("tools.cancel", {}),
        ("tools.cancel", {"execution_id": "a", "call_id": "b"}),
        ("tools.execute_batch", {"requests": [], "max_concurrent": 1}),
        ("tools.execute_batch", {"requests": [{"tool_id": "echo"}], "max_concurrent": 0}),
        ("tools.execute_batch", {"requests": [{"tool_id": "echo"}], "max_concurrent": 101}),
        ("tools.execute_batch", {"requests": [{"tool_id": "echo"}] * 101}),
        ("tools.execute_parallel", {"tasks": [{"tool_id": "echo"}]}),
    ],
)
def test_wrong_params_are_told_by_path_without_their_values(service: Running, method: str, params: Any) -> None:
    answer = error_of(post(service, request(method, params=params, id=3)))
    assert answer["error"]["code"] == -32602 and answer["id"] == 3
    errors = answer["error"]["data"]["errors"]
    assert errors and all(set(error) == {"path", "message", "type"} for error in errors)


@pytest.mark.parametrize(
    "method, params, path, kind",
    [
        ("tools.list", {"tags": "text"}, "tags", "a valid array"),
        ("tools.execute", {"tool_id": "echo", "parameters": 1}, "parameters", "an object"),
        ("tools.execute", {"tool_id": "echo", "execution_context": 1}, "execution_context", "an object"),
        ("tools.execute_batch", {"requests": [1]}, "requests.0", "an object"),
    ],
)
def test_what_params_should_be_is_told_in_words_of_json(
    service: Running, method: str, params: Any, path: str, kind: str
) -> None:
    (told,) = error_of(post(service, request(method, params=params, id=1)))["error"]["data"]["errors"]
    assert (told["path"], told["message"]) == (path, f"Input should be {kind}")


@pytest.mark.parametrize("method", ["", "nope", "rpc.x", "rpc.", "tools", "Tools.list", "tools.nothing"])
def test_an_unknown_method_is_not_found(service: Running, method: str) -> None:
    assert error_of(post(service, request(method, id=1)))["error"]["code"] == -32601


@pytest.mark.parametrize(
    "body",
    [
        '{"jsonrpc":"2.0","method":1,"id":1}',
        '{"jsonrpc":"2.0","method":null,"id":1}',
        '{"jsonrpc":"2.0","id":1}',
        '{"method":"rpc.ping","id":1}',
        '{"jsonrpc":"1.0","method":"rpc.ping","id":1}',
        '{"jsonrpc":2.0,"method":"rpc.ping","id":1}',
        '{"jsonrpc":null,"method":"rpc.ping","id":1}',
    ],
)
def test_a_malformed_request_is_invalid_and_its_readable_id_comes_back(service: Running, body: str) -> None:
    answer = error_of(post(service, body))
    assert answer["error"]["code"] == -32600 and answer["id"] == 1


@pytest.mark.parametrize(
    "body",
    [
        *("{}", "1", "null", '"text"', "true", "1.5", '{"jsonrpc":"2.0","method":1}'),
        *(
            '{"jsonrpc":"2.0","result":5,"id":1}',
            '{"result":5,"error":null,"id":1}',
            '{"jsonrpc":"2.0","error":{},"id":1}',
        ),
    ],
)
def test_what_is_no_request_object_is_invalid_with_id_null(service: Running, body: str) -> None:
    answer = error_of(post(service, body))
    assert answer["error"]["code"] == -32600 and answer["id"] is None


def test_an_extra_member_is_ignored(service: Running) -> None:
    assert "result" in post(service, request(id=1, extra={"a": 1})).json()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"   ",
        b"\n\t",
        b"{",
        b'{"jsonrpc":"2.0","method":"rpc.ping","id":1',
        b'{"jsonrpc":"2.0","method":"rpc.ping","id":1} x',
        b'{"jsonrpc":"2.0","method":"rpc.ping","id":1}{}',
        b'{"jsonrpc":"2.0","method":"rpc.ping","id":NaN}',
        b'{"jsonrpc":"2.0","method":"rpc.ping","id":Infinity}',
        b'{"jsonrpc":"2.0","method":"rpc.ping","id":-Infinity}',
        b'{"jsonrpc":"2.0","method":"rpc.ping","id":1e999}',
        b'{"jsonrpc":"2.0","method":"rpc.ping","id":01}',
        b'{"jsonrpc":"2.0","method":"\xff","id":1}',
        b'{"jsonrpc":"2.0","method":"\xed\xa0\x80","id":1}',
        b'{"jsonrpc":"2.0","method":"\\ud800","id":1}',
        b'{"jsonrpc":"2.0","method":"rpc.ping","id":18446744073709551616}',
        b'{"jsonrpc":"2.0","method":"rpc.ping","id":-9223372036854775809}',
        b'{"jsonrpc":"2.0","method":"rpc.ping","params":{"a":' + b"9" * 4300 + b'},"id":1}',
        b'\xef\xbb\xbf{"jsonrpc":"2.0","method":"rpc.ping","id":1}',
        b"{'jsonrpc':'2.0'}",
        b'{"jsonrpc":"2.0","method":"rpc.ping","id":1,}',
        b'{"a":"\x01"}',
        b"// comment\n{}",
        b"\x00",
        b"[" * 2000 + b"]" * 2000,
        b'[{"jsonrpc":"2.0","method":"rpc.ping","id":1},{"jsonrpc":',
    ],
)
def test_what_is_not_json_is_one_parse_error_with_id_null(service: Running, body: bytes) -> None:
    answer = error_of(post(service, body))
    assert answer["error"]["code"] == -32700 and answer["id"] is None


@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a":', "}")])
def test_nesting_is_taken_up_to_64_levels_and_refused_past_them(service: Running, opening: str, closing: str) -> None:
    def nested(levels: int) -> str:  # the request object and params are two of the levels
        inner = opening * (levels - 2) + "1" + closing * (levels - 2)
        return '{"jsonrpc":"2.0","method":"rpc.ping","params":{"x":%s},"id":1}' % inner

    assert error_of(post(service, nested(64)))["error"]["code"] == -32602
    assert error_of(post(service, nested(65)))["error"]["code"] == -32700


def test_brackets_inside_of_strings_are_no_nesting(service: Running) -> None:
    message = '[{"' * 500
    assert service.execute("echo", {"message": message})["result"] == {"message": message}


def test_long_digits_inside_of_strings_and_fractions_are_no_long_integers(service: Running) -> None:
    message = '12345678901234567890123 and \\" 99999999999999999999999'
    assert service.execute("echo", {"message": message})["result"] == {"message": message}
    body = '{"jsonrpc":"2.0","method":"rpc.ping","id":0.12345678901234567890123}'
    assert post(service, body).status_code == 200 and "result" in post(service, body).json()


def test_of_duplicate_keys_the_last_one_wins(service: Running) -> None:
    body = '{"jsonrpc":"2.0","method":"nope","method":"rpc.ping","id":1,"id":2}'
    assert post(service, body).json() == {"jsonrpc": "2.0", "result": {"pong": True}, "id": 2}


def test_an_empty_batch_is_one_error_and_no_array(service: Running) -> None:
    answer = error_of(post(service, "[]"))
    assert answer["error"]["code"] == -32600 and answer["id"] is None


@pytest.mark.parametrize(("body", "count"), [("[1]", 1), ("[1,2,3]", 3), ("[[]]", 1), ("[null,{}]", 2)])
def test_each_wrong_element_of_a_batch_gets_its_own_error(service: Running, body: str, count: int) -> None:
    answers = post(service, body).json()
    assert len(answers) == count
    assert all(answer["error"]["code"] == -32600 and answer["id"] is None for answer in answers)


def test_a_mixed_batch_answers_requests_and_not_notifications(service: Running) -> None:
    batch = [
        {"jsonrpc": "2.0", "method": "tools.execute", "params": ["echo", {"message": "a"}], "id": "1"},
        {"jsonrpc": "2.0", "method": "rpc.ping"},
        {"jsonrpc": "2.0", "method": "tools.get", "params": {"tool_id": "echo"}, "id": "2"},
        {"foo": "boo"},
        {"jsonrpc": "2.0", "method": "foo.get", "params": {"name": "myself"}, "id": "5"},
        {"jsonrpc": "2.0", "method": "rpc.version", "id": "9"},
    ]
    answers = {answer["id"]: answer for answer in post(service, json.dumps(batch)).json()}
    assert set(answers) == {"1", "2", None, "5", "9"}
    assert "result" in answers["1"] and "result" in answers["2"] and "result" in answers["9"]
    assert answers[None]["error"]["code"] == -32600 and answers["5"]["error"]["code"] == -32601


def test_a_batch_of_notifications_is_answered_by_nothing_at_all(service: Running) -> None:
    response = post(service, "[%s,%s]" % (request(), request("nope")))
    assert response.status_code == 204 and response.content == b""


def test_a_batch_of_one_is_answered_by_an_array_of_one(service: Running) -> None:
    answers = post(service, f"[{request(id=1)}]").json()
    assert isinstance(answers, list) and len(answers) == 1


def test_both_requests_of_one_id_are_answered(service: Running) -> None:
    answers = post(service, f"[{request(id=1)},{request(id=1)}]").json()
    assert [answer["id"] for answer in answers] == [1, 1]


def test_a_batch_over_the_cap_is_one_error(service: Running) -> None:
    ok = post(service, json.dumps([json.loads(request(id=n)) for n in range(100)]))
    assert len(ok.json()) == 100
    answer = error_of(post(service, json.dumps([json.loads(request(id=n)) for n in range(101)])))
    assert answer["error"]["code"] == -32600 and answer["id"] is None


def test_a_bug_in_a_tool_says_nothing_of_its_inside(service: Running) -> None:
    text = post(service, request("tools.execute", params={"tool_id": "raise_exception"}, id=1)).text
    assert "canary" not in text and "hunter2" not in text and "Traceback" not in text and "ValueError" not in text


@pytest.mark.parametrize("content_type", ["application/json-rpc", "text/plain", ""])
def test_no_content_type_is_required(service: Running, content_type: str) -> None:
    headers = {"content-type": content_type} if content_type else {}
    assert "result" in post(service, request(id=1), **headers).json()


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"])
def test_other_http_methods_are_told_what_is_allowed(service: Running, method: str) -> None:
    response = service.http.request(method, PATH)
    assert response.status_code == 405 and response.headers["allow"] == "POST"


def test_a_body_over_the_limit_is_413_with_an_error_object(service: Running) -> None:
    response = post(service, b" " * 1_048_577)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == -32600 and response.json()["id"] is None


def test_a_body_of_the_limit_is_read(service: Running) -> None:
    body = request(id=1).encode()
    assert "result" in post(service, body + b" " * (1_048_576 - len(body))).json()


def test_unknown_and_invisible_tools_look_the_same(service: Running) -> None:
    unknown = service.execute("no_such_tool")
    invisible = service.execute("hidden")
    for error in (unknown, invisible):
        assert error["code"] == -32004 and error["data"].pop("execution_id")
    assert unknown == invisible
    assert "hidden" not in {tool["tool_id"] for tool in service.rpc("tools.list")["result"]["tools"]}
    assert service.rpc("tools.get", {"tool_id": "hidden"})["error"]["code"] == -32004
    assert service.rpc("tools.search", {"name_query": "hidden"})["result"]["count"] == 0


def test_parameters_that_fail_the_schema_are_told_by_path(service: Running) -> None:
    error = service.execute("echo", {"message": 5, "secret-canary": "v"})
    assert error["code"] == -32602 and error["data"]["error_type"] == "invalid_params"
    assert {item["path"] for item in error["data"]["errors"]} == {"message", "secret-canary"}
    assert error["data"]["retryable"] is False and error["data"]["execution_id"]


def test_an_execution_has_the_shape_of_the_contract(service: Running) -> None:
    execution = service.execute("echo", {"message": "hi", "uppercase": True})
    assert list(execution) == [
        "execution_id",
        "tool_id",
        "status",
        "result",
        "error",
        "execution_time_ms",
        "overhead_ms",
        "timestamp",
        "attempts",
        "cached",
        "trace_id",
    ]
    assert execution["result"] == {"message": "HI"} and execution["status"] == "success"
    assert execution["error"] is None and execution["attempts"] == 1 and execution["cached"] is False
    assert execution["execution_id"][14] == "7"


def test_the_context_of_a_request_reaches_the_tool(service: Running) -> None:
    given = {"trace_id": "t-1", "session_id": "s-1", "metadata": {"k": [1]}}
    seen = service.execute("who_calls", agent_id="a-1", execution_context=given)
    assert seen["trace_id"] == "t-1"
    result = seen["result"]
    assert (result["agent_id"], result["session_id"], result["metadata"]) == ("a-1", "s-1", {"k": [1]})
    assert result["execution_id"] == seen["execution_id"]


def test_older_spellings_and_the_a2a_context_mean_the_same(service: Running) -> None:
    assert service.execute("who_calls", identifier="a-2")["result"]["agent_id"] == "a-2"
    answer = service.rpc(
        "tools.execute",
        {"tool_id": "who_calls"},
        a2a_context={"source_agent": "a-3", "trace_id": "t-3", "session_id": "s-3", "more": 1},
    )
    result = answer["result"]["result"]
    assert (result["agent_id"], result["trace_id"], result["session_id"]) == ("a-3", "t-3", "s-3")
    around = {"source_agent": "a-4", "session_id": "s-4", "metadata": {"k": [1]}}
    for given, metadata in ({}, {"k": [1]}), ({"session_id": "s-4"}, {"k": [1]}), ({"metadata": {}}, {}):
        params = {"tool_id": "who_calls", "execution_context": given}
        result = service.rpc("tools.execute", params, a2a_context=around)["result"]["result"]
        assert (result["agent_id"], result["session_id"], result["metadata"]) == ("a-4", "s-4", metadata)
    batch = service.rpc("tools.execute_batch", {"executions": [{"tool_id": "echo", "parameters": {"message": "x"}}]})
    assert batch["result"]["successful_count"] == 1


@pytest.mark.parametrize("trace_id", ["x" * 65, "a b", "a\nb", "é", ""])
def test_a_trace_id_that_cannot_be_logged_as_it_is_is_not_taken(service: Running, trace_id: str) -> None:
    execution = service.execute("echo", {"message": "x"}, execution_context={"trace_id": trace_id})
    assert execution["status"] == "success" and execution["trace_id"] not in {trace_id, None, ""}


def test_a_repeat_with_its_idempotency_key_is_the_first_call_again(service: Running) -> None:
    first = service.execute("count_calls", idempotency_key="jsonrpc-1")
    again = service.execute("count_calls", idempotency_key="jsonrpc-1")
    assert again == {**first, "replayed": True}
    assert service.execute("count_calls")["result"] == first["result"] + 1
    service.execute("echo", {"message": "x"}, idempotency_key="jsonrpc-1")
    error = service.execute("echo", {"message": "y"}, idempotency_key="jsonrpc-1")
    assert (error["code"], error["data"]["reason"]) == (-32007, "other_call")


def test_every_method_of_the_table_is_named_and_described(service: Running) -> None:
    names = service.rpc("rpc.methods")["result"]["methods"]
    document = service.rpc("rpc.discover")["result"]
    assert [method["name"] for method in document["methods"]] == names
    assert {"tools.list", "tools.execute", "tools.execute_parallel", "tools.cancel", "rpc.discover"} <= set(names)
    for method in document["methods"]:
        assert method["summary"] and "result" in method and method["errors"]


def test_pages_are_stable_and_complete(service: Running) -> None:
    everything = [tool["tool_id"] for tool in service.rpc("tools.list")["result"]["tools"]]
    assert everything == sorted(everything) and "echo" in everything
    paged: list[str] = []
    cursor = None
    for _ in range(len(everything)):
        page = service.rpc("tools.list", {"limit": 3, "cursor": cursor})["result"]
        assert page["count"] == len(page["tools"]) <= 3
        paged += [tool["tool_id"] for tool in page["tools"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert paged == everything


def test_lists_narrow_by_category_tags_and_capabilities(service: Running) -> None:
    def listed(**params: Any) -> set[str]:
        return {tool["tool_id"] for tool in service.rpc("tools.list", params)["result"]["tools"]}

    assert "echo" in listed(category="utility") and "wait" not in listed(category="utility")
    assert listed(category="no such category") == set()
    detail = service.rpc("tools.get", {"tool_id": "echo"})["result"]
    assert "echo" in listed(tags=[detail["tags"][0], "no such tag"])
    assert listed(capabilities=["no such capability"]) == set()


@pytest.mark.parametrize(
    ("written", "value"),
    [("-0", 0), ("0.1e1", 1), ("1E2", 100), ("-0.0", 0), ("1e-400", 0), ("5e-324", 5e-324), ("1e308", 1e308)],
)
def test_an_id_written_with_a_fraction_or_an_exponent_is_the_same_number(
    service: Running, written: str, value: float
) -> None:
    answer = post(service, '{"jsonrpc":"2.0","method":"rpc.ping","id":%s}' % written).json()
    assert "result" in answer and answer["id"] == value


@pytest.mark.parametrize(
    ("written", "value"),
    [
        (r'"\u0000"', "\0"),
        (r'"\ud83e\udd80"', "\U0001f980"),
        ('"\U0001f980\u2028\uffff\x7f"', "\U0001f980\u2028\uffff\x7f"),
        (r'"\"\\\/\b\f\n\r\t"', '"\\/\b\f\n\r\t'),
        (f'"{"x" * 100_000}"', "x" * 100_000),
    ],
)
def test_an_id_of_any_text_comes_back(service: Running, written: str, value: str) -> None:
    assert post(service, '{"jsonrpc":"2.0","method":"rpc.ping","id":%s}' % written).json()["id"] == value


@pytest.mark.parametrize(
    "body",
    [
        b'{"jsonrpc":"2.0","method":"rpc.ping","id":1}\x00',
        b'{"jsonrpc":"2.0","method":"rpc.ping","id":1}\x0b',
        b'\x0c{"jsonrpc":"2.0","method":"rpc.ping","id":1}',
        b'\xc2\xa0{"jsonrpc":"2.0","method":"rpc.ping","id":1}',
        request(id=1).encode("utf-16"),
        request(id=1).encode("utf-32-le"),
        b"\x1f\x8b\x08\x00",
        b'{"jsonrpc":"2.0","method":"rpc.ping","id":"\xc0\x80"}',
        b'{"jsonrpc":"2.0","method":"rpc.ping","id":"\xf4\x90\x80\x80"}',
        b'{"jsonrpc":"2.0","method":"rpc.ping","id":"\\udd80\\ud83e"}',
        b'{"jsonrpc":"2.0","method":"rpc.ping","id":1,"dropped":"\\ud83e","dropped":1}',
        b'{"jsonrpc":"2.0","method":"rpc.ping","id":1.}',
        b'{"jsonrpc":"2.0","method":"rpc.ping","id":.5}',
        b'{"jsonrpc":"2.0","method":"rpc.ping","id":+1}',
        b'{"jsonrpc":"2.0","method":"rpc.ping","id":0x1}',
        b'{"jsonrpc":"2.0","method":"rpc.ping","id":1_0}',
        b'{"jsonrpc":"2.0","method":"rpc.ping","id":-1E400}',
        b'{"jsonrpc":"2.0","method":"rpc.ping","id":"\\x41"}',
        b'{"jsonrpc":"2.0","method":"rpc.ping","id":"a\nb"}',
        b'[{"jsonrpc":"2.0","method":"rpc.ping","id":1},{"jsonrpc":"2.0","method":"rpc.ping","id":1E400}]',
        b'[{"jsonrpc":"2.0","method":"rpc.ping","id":1},]',
        b"1E400",
        b"9" * 20,
        b"-9999999999999999999",
        b"9" * 1_048_576,
        b"[" * 1_048_576,
        b'{"a":' * 100_000,
    ],
)
def test_more_that_is_not_json_is_one_parse_error_too(service: Running, body: bytes) -> None:
    answer = error_of(post(service, body))
    assert answer["error"]["code"] == -32700 and answer["id"] is None


@pytest.mark.parametrize(
    "value",
    [
        '"\\"99999999999999999999"',
        '"\\\\",-9223372036854775808,"99999999999999999999"',
        '"[1,99999999999999999999,2]"',
        '"a","","\\\\\\"",18446744073709551615',
        "99999999999999999999.5",
        "99999999999999999999e1",
        "1e-99999999999999999999",
        "1E+00000000000000000000001",
        "-0.00000000000000000000001",
        "9999999999999999999",
    ],
)
def test_what_only_looks_like_a_long_integer_is_taken(service: Running, value: str) -> None:
    body = '{"jsonrpc":"2.0","method":"rpc.ping","id":1,"99999999999999999999":[%s]}' % value
    assert "result" in post(service, body).json()


@pytest.mark.parametrize(
    "value",
    [
        '"\\\\",99999999999999999999',
        '"","",99999999999999999999,""',
        '"\\\\\\"", 18446744073709551616 ',
        '"a":-9999999999999999999',
        "\n-9223372036854775809\n",
        "18446744073709551615,18446744073709551616",
    ],
)
def test_a_long_integer_is_found_wherever_it_stands(service: Running, value: str) -> None:
    inside = "{%s}" if ":" in value else "[%s]"
    body = '{"jsonrpc":"2.0","method":"rpc.ping","id":1,"x":%s}' % (inside % value)
    assert error_of(post(service, body))["error"]["code"] == -32700


@pytest.mark.parametrize(("opening", "closing"), [('["]",', ',"["]'), ('{"]":', ',"[":""}'), ('["\\\\]",', ',"[\\""]')])
def test_brackets_inside_of_strings_hide_no_nesting(service: Running, opening: str, closing: str) -> None:
    def nested(levels: int) -> str:
        inner = opening * (levels - 1) + "1" + closing * (levels - 1)
        return '{"jsonrpc":"2.0","method":"rpc.ping","x":%s,"id":1}' % inner

    assert "result" in post(service, nested(64)).json()
    assert error_of(post(service, nested(65)))["error"]["code"] == -32700


def test_one_deep_value_among_many_flat_ones_is_found(service: Running) -> None:
    flat = "[]," * 50_000
    body = '{"jsonrpc":"2.0","method":"rpc.ping","id":1,"x":[%s%s%s]}'
    assert "result" in post(service, body % (flat, "[" * 62, "]" * 62)).json()
    assert error_of(post(service, body % (flat, "[" * 63, "]" * 63)))["error"]["code"] == -32700


def test_arrays_and_objects_are_counted_outside_of_strings_alone(service: Running) -> None:
    body = '{"jsonrpc":"2.0","method":"rpc.ping","id":1,"x":[%s]}'
    assert "result" in post(service, body % ",".join(["{}"] * 99_998)).json()
    assert error_of(post(service, body % ",".join(["{}"] * 99_999)))["error"]["code"] == -32700
    assert "result" in post(service, body % '"%s","%s"' % ("[" * 200_000, '\\"{' * 200_000)).json()


def test_duplicate_members_are_one_member_however_they_are_written(service: Running) -> None:
    body = '{"jsonrpc":"2.0","method":"rpc.ping","id":[1],"\\u0069d":2}'
    assert post(service, body).json() == {"jsonrpc": "2.0", "result": {"pong": True}, "id": 2}


@pytest.mark.parametrize("name", ["__proto__", "__class__", "constructor", ""])
def test_names_that_mean_something_elsewhere_are_names_like_others(service: Running, name: str) -> None:
    assert "result" in post(service, request(id=1, **{name: {"jsonrpc": "1.0", "id": 2}})).json()
    assert error_of(post(service, request(name, id=1)))["error"]["code"] == -32601
    answer = error_of(post(service, request(id=1, params={name: {}})))
    assert [error["path"] for error in answer["error"]["data"]["errors"]] == [name]


@pytest.mark.parametrize("method", ["rpc.ping\0", "rpc.ping ", " rpc.ping", "\U0001f980", "m" * 1_000_000])
def test_a_method_is_its_name_and_nothing_near_it(service: Running, method: str) -> None:
    response = post(service, request(method, id=1))
    assert error_of(response)["error"]["code"] == -32601 and len(response.content) < 1_000


@pytest.mark.parametrize("value", [1, "x", [], True])
def test_an_a2a_context_of_another_type_is_an_invalid_request(service: Running, value: Any) -> None:
    answer = error_of(post(service, request(id=1, a2a_context=value)))
    assert answer["error"]["code"] == -32600 and answer["id"] == 1
    assert post(service, request(a2a_context=value)).status_code == 204


def test_an_a2a_context_of_null_or_with_values_of_other_types_is_none(service: Running) -> None:
    for value in (None, {"source_agent": 1, "trace_id": {}, "session_id": [], "metadata": "x"}):
        answer = service.rpc("tools.execute", {"tool_id": "who_calls"}, a2a_context=value)
        seen = answer["result"]["result"]
        assert seen["agent_id"] is None and seen["session_id"] is None and not seen["metadata"]


def test_notifications_count_for_the_cap_of_a_batch(service: Running) -> None:
    assert post(service, f"[{','.join([request()] * 100)}]").status_code == 204
    answer = error_of(post(service, f"[{','.join([request()] * 101)}]"))
    assert answer["error"]["code"] == -32600 and answer["id"] is None


def test_a_batch_in_a_batch_is_no_request(service: Running) -> None:
    (answer,) = post(service, f"[[{request(id=1)}]]").json()
    assert answer["error"]["code"] == -32600 and answer["id"] is None


@pytest.mark.parametrize(("method", "around"), [("rpc.ping", "%s"), ("tools.execute", '{"execution_context":%s}')])
def test_of_very_many_violations_the_number_is_told(service: Running, method: str, around: str) -> None:
    params = json.loads(around % json.dumps({f"unknown-{number}": 1 for number in range(10_000)}))
    response = post(service, request(method, params=params, id=1))
    (error,) = error_of(response)["error"]["data"]["errors"]
    assert error["type"] == "too_many_errors" and error["message"].startswith("1000")
    assert len(response.content) < 1_000
