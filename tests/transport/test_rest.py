"""REST as a client meets it: over HTTP, against a service in a process of its own."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from app.calls import Caller
from app.errors import PermissionDenied, ToolServiceError
from app.transport.app import Guard, origin_of
from app.transport.methods import require_scope
from app.transport.rest import answer_errors, error_response
from tests.conftest import START_S_MAX, Running, Serve, end, start_service

TOOLS = "/api/v1/tools"
DOORS = (TOOLS, "/api/v1/jsonrpc")


def execute(service: Running, tool_id: str, body: Any = None, **query: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    return service.http.post(f"{TOOLS}/{tool_id}/execute", content=content, params=query)


def refused(response: httpx.Response, status: int, code: int) -> dict[str, Any]:
    """The error of a response that must be a refusal in the one shape of REST."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    answer = response.json()
    assert list(answer) == ["error"] and set(answer["error"]) == {"code", "message", "data"}
    assert {"error_type", "retryable"} <= set(answer["error"]["data"])
    assert answer["error"]["code"] == code
    error: dict[str, Any] = answer["error"]
    return error


def violated(response: httpx.Response) -> list[str]:
    return [each["path"] for each in refused(response, 422, -32602)["data"]["errors"]]


def ids(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    return [tool["tool_id"] for tool in response.json()["tools"]]


def until(holds: Callable[[], bool]) -> None:
    ends = time.monotonic() + START_S_MAX
    while not holds():
        assert time.monotonic() < ends


# Discovery


def test_pages_follow_one_another_and_hold_what_the_method_lists(service: Running) -> None:
    seen: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        page = service.http.get(TOOLS, params={"limit": "3", **cursor})
        assert len(ids(page)) == page.json()["count"] <= 3
        seen += ids(page)
        if page.json()["next_cursor"] is None:
            break
        cursor = {"cursor": page.json()["next_cursor"]}
    assert seen == [tool["tool_id"] for tool in service.rpc("tools.list", {})["result"]["tools"]]
    assert len(seen) > 6


def test_a_list_without_query_is_the_answer_of_the_method(service: Running) -> None:
    narrowed = service.http.get(TOOLS, params={"category": "utility"}).json()
    assert narrowed == service.rpc("tools.list", {"category": "utility"})["result"]


def test_tags_may_be_repeated_and_any_of_them_is_enough(service: Running) -> None:
    text, time_ = (set(ids(service.http.get(TOOLS, params={"tag": tag}))) for tag in ("text", "time"))
    assert "echo" in text and "current_time" in time_
    assert set(ids(service.http.get(f"{TOOLS}?tag=text&tag=time"))) == text | time_


def test_a_query_ranks_and_the_answer_is_one_page(service: Running) -> None:
    found = service.http.get(TOOLS, params={"query": "calculator", "category": "utility"})
    assert ids(found)[0] == "calculator"
    assert set(found.json()) == {"tools", "count", "query", "next_cursor"}
    assert found.json()["query"] == "calculator" and found.json()["next_cursor"] is None


def test_a_blank_query_is_none(service: Running) -> None:
    assert ids(service.http.get(TOOLS, params={"query": " "})) == ids(service.http.get(TOOLS))


def test_a_tool_is_described_as_the_method_describes_it(service: Running) -> None:
    response = service.http.get(f"{TOOLS}/echo")
    assert response.status_code == 200 and response.headers["content-type"] == "application/json"
    assert response.json() == service.rpc("tools.get", {"tool_id": "echo"})["result"]


def test_an_unknown_and_a_hidden_tool_look_the_same(service: Running) -> None:
    for path in ("{}", "{}/execute"):
        method = "POST" if path.endswith("execute") else "GET"
        errors = []
        for tool_id in ("hidden", "no_such_tool", "%00", "a" * 200, "é"):
            response = service.http.request(method, f"{TOOLS}/{path.format(tool_id)}")
            error = refused(response, 404, -32004)
            error["data"].pop("execution_id", None)
            errors.append(error)
        assert all(error == errors[0] for error in errors)
    assert "hidden" not in ids(service.http.get(TOOLS))
    assert "hidden" not in ids(service.http.get(TOOLS, params={"query": "hidden"}))


@pytest.mark.parametrize(
    ("query", "path"),
    [
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=many", "limit"),
        ("limit=1_0", "limit"),
        ("limit=%201", "limit"),
        ("limit=1.0", "limit"),
        ("limit=%D9%A1", "limit"),
        ("limit=", "limit"),
        ("limit=5&limit=6", "limit"),
        ("query=a&query=b", "query"),
        ("category=utility&category=utility", "category"),
        ("cursor=%21", "cursor"),
        ("cursor=ZWNobw&query=echo", "cursor"),
        ("category=" + "c" * 257, "category"),
        ("&".join(["tag=t"] * 21), "tag"),
        ("pages=2", "pages"),
        ("pages=2&pages=3", "pages"),
        ("Limit=5", "Limit"),
    ],
)
def test_a_bad_query_is_refused_by_the_name_of_its_parameter(service: Running, query: str, path: str) -> None:
    assert violated(service.http.get(f"{TOOLS}?{query}")) == [path]


def test_routes_without_parameters_refuse_all(service: Running) -> None:
    assert violated(service.http.get(f"{TOOLS}/echo?limit=1")) == ["limit"]
    assert violated(execute(service, "echo", {"parameters": {"message": "m"}}, dry="true")) == ["dry"]


# Calls


def test_a_call_answers_with_the_execution_of_the_method(service: Running) -> None:
    response = execute(service, "echo", {"parameters": {"message": "Grüße"}})
    execution = response.json()
    assert response.status_code == 200 and response.headers["content-type"] == "application/json"
    assert execution["status"] == "success" and execution["result"] == {"message": "Grüße"}
    assert list(execution) == list(service.execute("echo", {"message": "m"}))


def test_no_body_is_no_arguments(service: Running) -> None:
    assert execute(service, "current_time").json()["status"] == "success"
    assert execute(service, "current_time", {}).json()["status"] == "success"
    assert violated(execute(service, "echo")) == ["message"]


def test_a_tool_that_fails_is_a_result(service: Running) -> None:
    response = execute(service, "fail_clearly", {"parameters": {"message": "No", "retryable": True}})
    assert response.status_code == 200 and "retry-after" not in response.headers
    assert response.json()["status"] == "failed"
    assert response.json()["error"]["code"] == "TICKET_CLOSED"
    assert execute(service, "short_timeout", {"parameters": {"seconds": 30}}).json()["status"] == "timeout"


def test_options_reach_the_tool(service: Running) -> None:
    context = {"trace_id": "trace-7", "session_id": "s", "metadata": {"a": [1]}}
    for label in ("agent_id", "identifier"):
        body = {label: "planner", "execution_context": context, "timeout_override": 3}
        result = execute(service, "who_calls", body).json()["result"]
        assert result["agent_id"] == "planner" and result["tenant"] == "local"
        assert {name: result[name] for name in context} == context
        assert 0 < result["remaining_s"] <= 3


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b" ",
        b'{"parameters": {"a": NaN}}',
        b'{"parameters": {"a": "\xff"}}',
        b"{} {}",
        b'{"parameters": {"a": 18446744073709551616}}',
        b'{"parameters": {"a": ' + b"[" * 64 + b"]" * 64 + b"}}",
    ],
)
def test_what_is_no_json_here_is_400(service: Running, body: bytes) -> None:
    refused(execute(service, "echo", body), 400, -32700)


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ([], ""),
        (None, None),
        ("text", ""),
        ({"parameters": []}, "parameters"),
        ({"parameters": None}, "parameters"),
        ({"arguments": {"message": "m"}}, "arguments"),
        ({"tool_id": "echo"}, "tool_id"),
        ({"timeout_override": 0}, "timeout_override"),
        ({"timeout_override": "1"}, "timeout_override"),
        ({"call_id": "no blanks"}, "call_id"),
        ({"agent_id": "a" * 257}, "agent_id"),
        ({"execution_context": {"user": "u"}}, "execution_context.user"),
    ],
)
def test_a_body_that_does_not_fit_is_422_and_names_the_member(service: Running, body: Any, path: str | None) -> None:
    response = execute(service, "current_time", json.dumps(body).encode())
    assert violated(response) == [path or ""]
    assert "execution_id" not in response.json()["error"]["data"]


def test_arguments_that_do_not_fit_the_tool_are_422_without_their_values(service: Running) -> None:
    response = execute(service, "echo", {"parameters": {"message": {"secret": "hunter2"}, "uppercase": "hunter2"}})
    assert sorted(violated(response)) == ["message", "uppercase"]
    assert "hunter2" not in response.text
    assert response.json()["error"]["data"]["execution_id"]


def test_a_key_that_stands_for_another_call_is_422(service: Running) -> None:
    first = execute(service, "echo", {"parameters": {"message": "x"}, "idempotency_key": "rest-1"})
    assert first.status_code == 200
    response = execute(service, "echo", {"parameters": {"message": "y"}, "idempotency_key": "rest-1"})
    refused(response, 422, -32007)
    assert response.json()["error"]["data"]["retryable"] is False


def test_a_body_over_its_bound_is_413_however_it_is_sent(service: Running) -> None:
    body = b'{"parameters": {"message": "' + b"x" * 1_048_576 + b'"}}'
    refused(execute(service, "echo", body), 413, -32600)
    pieces = (body[start : start + 65_536] for start in range(0, len(body), 65_536))
    refused(service.http.post(f"{TOOLS}/echo/execute", content=pieces), 413, -32600)


def test_a_body_that_trickles_in_is_408(serve: Serve) -> None:
    service = serve(REQUEST_READ_TIMEOUT_S="0.2")
    with socket.create_connection(("127.0.0.1", service.port), timeout=START_S_MAX) as connection:
        connection.sendall(head("echo", 100) + b"{")
        refused(read_response(connection), 408, -32600)


def test_overload_is_503_and_says_when_to_come_back(service: Running, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    body = {"parameters": {"path": str(gate)}}
    with ThreadPoolExecutor() as pool:
        calls = [pool.submit(execute, service, "wait_alone_for_file", body) for _ in range(2)]
        (refused_one,), _ = wait(calls, return_when=FIRST_COMPLETED)
        gate.touch()
    (taken,), left = [call.result() for call in calls if call is not refused_one], refused_one.result()
    assert taken.json()["status"] == "success"
    error = refused(left, 503, -32006)
    retry_after_ms = error["data"]["retry_after_ms"]
    assert retry_after_ms <= int(left.headers["retry-after"]) * 1000 < retry_after_ms + 1000


def test_a_call_that_meets_the_shutdown_is_503_and_the_connection_closes(serve: Serve) -> None:
    service = serve()
    body = json.dumps({"parameters": {"message": "m"}}).encode()
    with socket.create_connection(("127.0.0.1", service.port), timeout=START_S_MAX) as connection:
        connection.sendall(head("echo", len(body), "Expect: 100-continue"))
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")  # the route is waiting for the body
        service.process.terminate()
        until(lambda: not is_listening(service.port))
        connection.sendall(body)
        response = read_response(connection)
    refused(response, 503, -32009)
    assert response.headers["connection"] == "close" and response.headers["retry-after"] == "1"
    assert service.process.wait(timeout=START_S_MAX) == 0


def test_a_client_that_leaves_cancels_a_call_that_asked_for_it(service: Running) -> None:
    def cancelled() -> float:
        return service.metric("tool_executions_total", tool_id="wait_for_client", status="cancelled")

    before = cancelled()
    body = b'{"parameters": {"seconds": 30}}'
    with socket.create_connection(("127.0.0.1", service.port), timeout=START_S_MAX) as connection:
        connection.sendall(head("wait_for_client", len(body)) + body)
    until(lambda: cancelled() == before + 1)


def head(tool_id: str, body_bytes: int, *headers: str) -> bytes:
    start = f"POST {TOOLS}/{tool_id}/execute HTTP/1.1"
    return "\r\n".join((start, "Host: 127.0.0.1", f"Content-Length: {body_bytes}", *headers, "", "")).encode()


def read_response(connection: socket.socket) -> httpx.Response:
    """Everything until the server closes, as one response."""
    answer = b""
    while chunk := connection.recv(65_536):
        answer += chunk
    start, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = start.decode().split("\r\n")
    headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    return httpx.Response(int(status.split()[1]), headers=headers, content=body)


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# Errors that are no call's


@pytest.mark.parametrize("path", ["/", "/api/v1/tools/", "/api/v1/tools/echo/", "/api/v1/tools/a/b/c", "/docs/oauth2"])
def test_an_unknown_path_is_404_in_the_same_shape_and_never_a_redirect(service: Running, path: str) -> None:
    refused(service.http.get(path), 404, -32601)
    refused(service.http.post(path), 404, -32601)


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", TOOLS, "GET, HEAD"),
        ("DELETE", f"{TOOLS}/echo", "GET, HEAD"),
        ("GET", f"{TOOLS}/echo/execute", "POST"),
        ("OPTIONS", TOOLS, "GET, HEAD"),
        ("PUT", "/openapi.json", "GET, HEAD"),
        ("POST", "/livez", "GET, HEAD"),
    ],
)
def test_another_method_is_405_and_says_which_there_are(service: Running, method: str, path: str, allow: str) -> None:
    response = service.http.request(method, path)
    refused(response, 405, -32600)
    assert response.headers["allow"] == allow


@pytest.mark.parametrize("path", [TOOLS, f"{TOOLS}/echo", "/livez", "/readyz", "/metrics", "/openapi.json", "/docs"])
def test_head_answers_as_get_without_the_body(service: Running, path: str) -> None:
    response = service.http.head(path)
    assert response.status_code == 200 and response.content == b""
    assert response.headers["content-type"] == service.http.get(path).headers["content-type"]
    assert int(response.headers["content-length"]) > 0


def test_a_defect_is_500_and_says_nothing_of_itself() -> None:
    app = FastAPI()
    counted: list[str] = []
    answer_errors(app, counted.append)

    @app.get("/")
    async def crash() -> None:
        raise ValueError("canary-7f3a")

    async def get(*, raised: bool) -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=raised)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/")

    response = asyncio.run(get(raised=False))
    error = refused(response, 500, -32603)
    assert error["message"] == "Internal error" and "canary" not in response.text
    assert counted == ["internal"]
    with pytest.raises(ValueError, match="canary"):  # the server gets it too, for the log
        asyncio.run(get(raised=True))


def test_retry_after_is_in_whole_seconds_and_never_early() -> None:
    for milliseconds, seconds in ((0, "1"), (1, "1"), (1000, "1"), (1001, "2")):
        assert error_response(ToolServiceError("m", retry_after_ms=milliseconds)).headers["retry-after"] == seconds
    assert "retry-after" not in error_response(ToolServiceError("m")).headers


def test_a_scope_that_the_caller_lacks_is_refused() -> None:
    caller = Caller("t", "s", frozenset({"tools:read"}))
    require_scope(caller, "tools:read")
    with pytest.raises(PermissionDenied):
        require_scope(caller, "tools:execute")


def test_refusals_are_counted_once_each(service: Running) -> None:
    def count(error_type: str) -> float:
        return service.metric("tool_errors_total", error_type=error_type)

    before = {kind: count(kind) for kind in ("invalid_params", "parse_error", "tool_not_found")}
    service.http.get(f"{TOOLS}?limit=0")
    execute(service, "echo", {"parameters": {}})
    execute(service, "echo", b"{")
    execute(service, "no_such_tool")
    service.http.get(f"{TOOLS}/no_such_tool")
    counted = {kind: count(kind) - before[kind] for kind in before}
    assert counted == {"invalid_params": 2, "parse_error": 1, "tool_not_found": 2}


# Browsers


def browse(service: Running, path: str, **headers: str) -> httpx.Response:
    """A request as a page makes it; GET for REST, POST for the JSON-RPC door."""
    if path in DOORS[1:]:
        body = b'{"jsonrpc":"2.0","method":"rpc.ping","id":1}'
        return service.http.post(path, content=body, headers={"Content-Type": "application/json", **headers})
    return service.http.get(path, headers=headers)


@pytest.fixture(scope="module")
def cross() -> Iterator[Running]:
    running = start_service(CORS_ALLOW_ORIGINS="https://app.example, http://[::1]:3000")
    yield running
    end(running)


@pytest.mark.parametrize("path", [*DOORS, "/no/such/path", f"{TOOLS}?limit=0"])
def test_an_allowed_origin_may_read_every_answer(cross: Running, path: str) -> None:
    for origin in ("https://app.example", "http://[::1]:3000"):
        response = browse(cross, path, Origin=origin)
        assert response.status_code != 403
        assert response.headers["access-control-allow-origin"] == origin
        assert "Origin" in response.headers["vary"]
        assert "Retry-After" in response.headers["access-control-expose-headers"]


@pytest.mark.parametrize("path", [*DOORS, f"{TOOLS}/echo/execute"])
def test_a_preflight_from_an_allowed_origin_passes(cross: Running, path: str) -> None:
    headers = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    response = cross.http.options(path, headers=headers)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://app.example"
    assert "POST" in response.headers["access-control-allow-methods"]
    assert response.headers["access-control-allow-headers"] == "authorization,content-type"


@pytest.mark.parametrize("path", [*DOORS, "/docs", "/metrics", "/livez"])
@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "https://app.example.evil.example", "https://app.example:8443", ""]
)
def test_a_foreign_origin_is_refused_everywhere(cross: Running, path: str, origin: str) -> None:
    response = browse(cross, path, Origin=origin)
    refused(response, 403, -32003)
    assert "access-control-allow-origin" not in response.headers
    preflight = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    refused(cross.http.options(path, headers=preflight), 403, -32003)


@pytest.mark.parametrize("path", [*DOORS, "/docs", "/openapi.json"])
def test_a_page_of_our_own_may_call(service: Running, path: str) -> None:
    assert browse(service, path, Origin=service.url).status_code == 200
    refused(browse(service, path, Origin="http://127.0.0.1:1"), 403, -32003)
    refused(browse(service, path, Origin=service.url.replace("http", "https")), 403, -32003)


@pytest.mark.parametrize("path", [*DOORS, "/docs", "/metrics"])
def test_on_loopback_a_host_of_another_name_is_refused(service: Running, path: str) -> None:
    for host in ("evil.example", f"evil.example:{service.port}", "127.0.0.1.evil.example", "localhost.evil.example"):
        refused(browse(service, path, Host=host, Origin=f"http://{host}"), 403, -32003)
        refused(browse(service, path, Host=host), 403, -32003)
    for host in ("localhost", f"localhost:{service.port}", "127.0.0.1", "[::1]", "127.8.8.8"):
        assert browse(service, path, Host=host, Origin=f"http://{host}").status_code == 200


def test_a_host_with_no_address_in_its_brackets_is_refused_at_every_layer(service: Running) -> None:
    guard = Guard(FastAPI(), (), {}, loopback_only=True)
    transport = httpx.ASGITransport(guard)

    async def guarded(host: str) -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get("/livez", headers={"Host": host})

    for host in ("[::::]", "[1.2.3]"):
        refused(browse(service, TOOLS, Host=host), 400, -32600)
        refused(asyncio.run(guarded(host)), 403, -32003)


def test_the_public_url_is_our_own_origin_whatever_its_path(serve: Serve) -> None:
    service = serve(PUBLIC_URL="https://Tools.example:443/agents/")
    assert browse(service, TOOLS, Origin="https://tools.example").status_code == 200
    refused(browse(service, TOOLS, Origin="https://tools.example:444"), 403, -32003)
    assert service.http.get("/openapi.json").json()["servers"] == [{"url": "https://Tools.example:443/agents"}]


def test_every_origin_may_be_allowed(serve: Serve) -> None:
    service = serve(CORS_ALLOW_ORIGINS="*")
    for path in DOORS:
        response = browse(service, path, Origin="https://any.example")
        assert response.status_code == 200 and response.headers["access-control-allow-origin"] == "*"
        refused(browse(service, path, Host="evil.example"), 403, -32003)


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("http://a.example", "http://a.example"),
        ("http://a.example:80/x", "http://a.example"),
        ("https://a.example:80", "https://a.example:80"),
        ("http://[::1]:8001/x", "http://[::1]:8001"),
    ],
)
def test_an_origin_is_what_a_browser_makes_of_the_url(url: str, origin: str) -> None:
    assert origin_of(url) == origin
