"""Beside a call over /mcp while it runs: its progress as server-sent events, and a client that hangs up."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from app.transport.mcp_stream import HangUp, ProgressStream
from tests.conftest import START_S_MAX, Running
from tests.haproxy import Haproxy, needs_haproxy
from tests.transport.mcp_wire import (
    Answer,
    call,
    encoded,
    legacy_call,
    message,
    modern_message,
    routing,
    send,
)
from tests.waiting import until as soon

EVENTS = ("Accept", "application/json, text/event-stream")


def with_progress(service: Running, tool: str, token: Any, *headers: tuple[str, str], **arguments: Any) -> Answer:
    params = {"name": tool, "arguments": arguments, "_meta": {"progressToken": token}}
    return send(service, modern_message("tools/call", params), [*routing("tools/call", tool), *headers])


def legacy_with_progress(service: Running, tool: str, token: Any, **arguments: Any) -> Answer:
    params = {"name": tool, "arguments": arguments, "_meta": {"progressToken": token}}
    return send(service, message("tools/call", params), [("MCP-Protocol-Version", "2025-06-18"), EVENTS])


def until(holds: Callable[[], bool]) -> None:
    ends = time.monotonic() + START_S_MAX
    while not holds():
        assert time.monotonic() < ends, "did not come to hold"


@pytest.mark.parametrize("token", ["progress-1", "", 0, 17, "t" * 256])
@pytest.mark.parametrize("ask", [with_progress, legacy_with_progress])
def test_progress_comes_as_events_and_the_response_last(
    mcp: Running, ask: Callable[[Running, str, Any], Answer], token: Any
) -> None:
    answer = ask(mcp, "test_tool_with_progress", token)
    assert answer.headers["cache-control"] == "no-cache" and answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["transfer-encoding"] == "chunked" and "content-length" not in answer.headers
    *notifications, response = answer.events
    assert [each["params"] for each in notifications] == [
        {"progressToken": token, "progress": done, "total": 100, "message": f"{done} of 100"} for done in (0, 50, 100)
    ]
    assert all(each["jsonrpc"] == "2.0" and "id" not in each for each in notifications)
    assert {each["method"] for each in notifications} == {"notifications/progress"}
    assert response["id"] == 1 and response["result"]["content"][0]["text"] == "Progress was told"
    assert ("resultType" in response["result"]) == (ask is with_progress)


def test_the_first_event_leaves_before_the_tool_has_ended(mcp: Running) -> None:
    with hung(mcp, "tell_and_wait") as connection:
        head = connection.recv(65536)
        while b"\n\n" not in head:
            head += connection.recv(65536)
    assert head.startswith(b"HTTP/1.1 200 OK\r\n") and b"content-type: text/event-stream\r\n" in head
    assert head.count(b"event: message\ndata: ") == 1


def test_no_event_has_a_line_end_of_unicode_in_it(mcp: Running) -> None:
    text = "next\x85line\u2028separated\u2029here"
    answer = with_progress(mcp, "tell_and_return", 1, text=text)
    notification, response = answer.events
    assert notification["params"]["message"].endswith("line\u2028separated\u2029here")
    assert response["result"]["content"][0]["text"] == text
    assert answer.body.decode().splitlines() == answer.body.decode().split("\n")[:-1]


def test_who_listens_is_given_kept_results_and_keeps_its_own_for_others(mcp: Running) -> None:
    def is_kept(text: str) -> bool:
        return mcp.execute("remembered", {"text": text})["cached"] is True

    def hits() -> float:
        return mcp.metric("tool_reuse_total", tool_id="remembered", outcome="hit")

    before = hits()
    assert not is_kept("told to nobody")
    for text, found in (("told to nobody", 1), ("told to somebody", 1), ("told to somebody", 2)):
        answer = with_progress(mcp, "remembered", "fastmcp sends one with every call", text=text)
        assert answer.result["content"][0]["text"] == text
        assert hits() - before == found
    assert is_kept("told to somebody")


def test_without_a_token_the_answer_is_plain_json(mcp: Running) -> None:
    for answer in (call(mcp, "test_tool_with_progress"), legacy_call(mcp, "test_tool_with_progress")):
        assert answer.result["content"][0]["text"] == "Progress was told"


def test_a_tool_that_tells_nothing_is_answered_in_plain_json(mcp: Running) -> None:
    assert with_progress(mcp, "echo", 1, message="x").result["isError"] is False
    assert with_progress(mcp, "echo", 1).result["isError"] is True
    assert with_progress(mcp, "no_such", 1).code == (400, -32602)


@pytest.mark.parametrize(
    "accept", ["application/json", "text/html", "application/json, text/event-stream;q=0", "text/*; q=0.000"]
)
def test_a_client_that_takes_no_events_gets_none(mcp: Running, accept: str) -> None:
    answer = with_progress(mcp, "test_tool_with_progress", 1, ("Accept", accept))
    assert answer.result["content"][0]["text"] == "Progress was told"


@pytest.mark.parametrize(
    "accept", ["text/event-stream", "*/*", "Text/Event-Stream", "text/*", "application/json,text/event-stream;q=0.05"]
)
def test_a_client_that_takes_events_gets_them(mcp: Running, accept: str) -> None:
    assert len(with_progress(mcp, "test_tool_with_progress", 1, ("Accept", accept)).events) == 4


def test_a_token_may_be_named_with_escapes(mcp: Running) -> None:
    params = {"name": "test_tool_with_progress", "arguments": {}, "_meta": {"progressToken": "t"}}
    body = json.dumps(modern_message("tools/call", params)).replace("progressToken", r"progress\u0054oken")
    headers = [*routing("tools/call", "test_tool_with_progress"), EVENTS]
    for _ in range(3):  # the third by a head that the lane knows
        assert len(send(mcp, body.encode(), headers).events) == 4


@pytest.mark.parametrize("token", [None, True, 1.5, {}, [], pytest.param("t" * 257, id="long")])
def test_what_is_no_token_is_ignored(mcp: Running, token: Any) -> None:
    assert with_progress(mcp, "test_tool_with_progress", token).result["isError"] is False


def test_progress_that_does_not_go_forward_is_left_out(mcp: Running) -> None:
    *notifications, _ = with_progress(mcp, "tell_everything", "t").events
    told = [each["params"] for each in notifications]
    assert [each["progress"] for each in told] == [-1, 0, 0.5, 1]
    assert [each.get("total") for each in told] == [None, 2, None, None]
    assert told[1]["message"] == "with  control and bidi" and all("message" not in each for each in told[2:])


def test_a_flood_of_progress_has_a_bound(mcp: Running) -> None:
    events = with_progress(mcp, "tell_often", 1, times=1_500).events
    assert len(events) == 1_001 and events[-1]["result"]["content"][0]["text"] == "1500"


def test_a_tool_that_fails_after_its_progress_is_the_last_event(mcp: Running) -> None:
    *notifications, response = with_progress(mcp, "tell_and_fail", 1).events
    assert len(notifications) == 1 and response["result"]["isError"] is True
    assert "It went wrong" in response["result"]["content"][0]["text"]


def test_a_run_that_was_given_up_says_nothing_after_the_response(mcp: Running) -> None:
    events = with_progress(mcp, "tell_after_the_deadline", 1).events
    assert [each.get("method", "response") for each in events] == ["notifications/progress", "response"]
    assert "TOOL_TIMEOUT" in events[-1]["result"]["content"][0]["text"]


@pytest.mark.anyio
async def test_between_the_outcome_and_the_response_nothing_is_told() -> None:
    sent: list[Any] = []

    async def keep(event: Any) -> None:
        sent.append(event)

    stream = ProgressStream(keep, "t")
    await stream.notify(1)
    stream.end()
    await stream.notify(2)
    await stream.finish(b"{}")
    assert [event.get("body") for event in sent[1:]] == [
        b'event: message\ndata: {"jsonrpc":"2.0","method":"notifications/progress",'
        b'"params":{"progressToken":"t","progress":1}}\n\n',
        b"event: message\ndata: {}\n\n",
    ]
    assert [event.get("more_body") for event in sent] == [None, True, False]


# A client that hangs up


def hung(
    service: Running, tool: str, *, is_modern: bool = True, port: int | None = None, **arguments: Any
) -> socket.socket:
    """A connection with a call on its way, and nothing read yet."""
    params = {"name": tool, "arguments": arguments, "_meta": {"progressToken": 1}}
    body = modern_message("tools/call", params) if is_modern else message("tools/call", params)
    content = json.dumps(body).encode()
    headers = routing("tools/call", tool) if is_modern else [("MCP-Protocol-Version", "2025-11-25")]
    lines = "".join(f"{name}: {value}\r\n" for name, value in [*headers, ("Content-Length", str(len(content)))])
    connection = socket.create_connection(("127.0.0.1", port or service.port), timeout=START_S_MAX)
    connection.sendall(f"POST /mcp HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n".encode() + content)
    return connection


def ended(service: Running, tool: str, status: str) -> float:
    return service.metric("tool_executions_total", tool_id=tool, status=status)


def test_closing_the_stream_cancels_the_call(mcp: Running) -> None:
    before = ended(mcp, "tell_and_wait", "cancelled")
    with hung(mcp, "tell_and_wait") as connection:
        assert b"text/event-stream" in connection.recv(65536)
    until(lambda: ended(mcp, "tell_and_wait", "cancelled") == before + 1)
    until(lambda: mcp.metric("tool_execution_concurrency") == 0)


def test_closing_the_stream_cancels_the_call_behind_a_proxy(mcp: Running) -> None:
    needs_haproxy()
    before = ended(mcp, "tell_and_wait", "cancelled")
    with Haproxy([mcp.port]) as proxy:
        proxy.wait_until_up()
        with hung(mcp, "tell_and_wait", port=proxy.port) as connection:
            assert b"text/event-stream" in connection.recv(65536)
        until(lambda: ended(mcp, "tell_and_wait", "cancelled") == before + 1)
    until(lambda: mcp.metric("tool_execution_concurrency") == 0)


@pytest.mark.parametrize("time", ["first", "second"])
def test_closing_the_connection_before_any_answer_cancels_the_call(mcp: Running, time: str) -> None:
    """A tool's first call goes another way than its later ones."""
    before = ended(mcp, "wait", "cancelled")
    with hung(mcp, "wait", seconds=60):
        until(lambda: mcp.metric("tool_execution_concurrency") == 1)
    until(lambda: ended(mcp, "wait", "cancelled") == before + 1)
    until(lambda: mcp.metric("tool_execution_concurrency") == 0)


@pytest.mark.parametrize("time", ["first", "second"])
def test_in_the_legacy_era_a_call_goes_on_without_its_client(mcp: Running, tmp_path: Path, time: str) -> None:
    gate = tmp_path / "gate"
    before = ended(mcp, "wait_for_file", "success")
    with hung(mcp, "wait_for_file", is_modern=False, path=str(gate)):
        until(lambda: mcp.metric("tool_execution_concurrency") == 1)
    gate.touch()
    until(lambda: ended(mcp, "wait_for_file", "success") == before + 1)


def test_in_the_legacy_era_a_stream_that_is_closed_does_not_cancel(mcp: Running) -> None:
    before = ended(mcp, "tell_and_wait", "success")
    with hung(mcp, "tell_and_wait", is_modern=False, seconds=0.5) as connection:
        assert b"text/event-stream" in connection.recv(65536)
    until(lambda: ended(mcp, "tell_and_wait", "success") == before + 1)


def test_a_client_that_stays_gets_the_answer_of_a_long_call(mcp: Running) -> None:
    assert call(mcp, "wait", {"seconds": 0.3, "value": encoded("x")}).result["isError"] is False


class Call:
    """What a watched call holds."""


class Staying:
    """A client that does not go."""

    is_gone = False

    def __init__(self) -> None:
        self.watched = asyncio.Event()

    async def gone(self) -> None:
        self.watched.set()
        await asyncio.Event().wait()


@pytest.mark.anyio
async def test_a_call_that_was_watched_does_not_wait_for_the_garbage_collector() -> None:
    gc.collect()
    gc.disable()
    try:
        client, call_ = Staying(), Call()
        held = weakref.ref(call_)
        hang_up = HangUp(client, partial(isinstance, call_, Call))
        del call_
        await client.watched.wait()
        hang_up.stop()
        del hang_up
        await soon(lambda: held() is None)
    finally:
        gc.enable()
