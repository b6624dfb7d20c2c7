"""What the protocol lane stands on and what it leaves behind: uvicorn's internals, memory, garbage, bugs of a door."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import json
import logging
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
import uvloop
from uvicorn.protocols.http import httptools_impl
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from app.access.authenticator import Authenticator
from app.calls import CurrentCall, current_call
from app.service import open_service
from app.settings import read_settings
from app.telemetry.histogram import Histogram
from app.transport import exchange, lane, protocol
from app.transport.app import Guard, create_app
from app.transport.door import Door, Replied, Reply, Scope, Steps
from app.transport.lane import HEADS_BYTES_MAX, Lane, LaneProtocol, LaneRequest, lane_class
from app.transport.protocol import BoundedHttpProtocol
from app.transport.request import RequestContext
from app.transport.server import Server, protocol_for
from app.transport.wire import Wire
from tests.conftest import places_in
from tests.transport.doors import execute, http
from tests.transport.raw_http import WAIT_S, Peer, answered

RPC = "/api/v1/jsonrpc"
DOORS = pytest.mark.parametrize("by_lane", [True, False], ids=["lane", "asgi"])


class Told(Exception):
    pass


class OddDoor(Door):
    """Raises when told to, and tells by what it was reached and what it finds in its context."""

    def begin(self, body: bytes, context: RequestContext, scope: Scope, then: Replied) -> Steps:
        return self._reply(body, context)

    async def _reply(self, body: bytes, context: RequestContext) -> Reply:
        if body == b"raise":
            raise Told("secret")
        found = current_call.get()
        current_call.set(CurrentCall(body.decode(), None, None))
        by = type(context.client).__name__
        answer = json.dumps({"by": by, "found": found and found.execution_id}).encode()
        return Reply(200, b"content-length: %d\r\n" % len(answer), answer)


class Odd:
    """A server around one OddDoor."""

    def __init__(self, by_lane: bool) -> None:
        self.errors: list[str] = []
        access = Authenticator(None, "off", 600.0)  # type: ignore[arg-type]  # nobody asks for a key
        self.door = OddDoor(access, Histogram((1.0,)), self.errors.append, 1_000, WAIT_S)
        app = Guard(self.door, (), {RPC: self.door}.get, loopback_only=True)
        self.wire = Wire()
        self.http = protocol_for(app, self.wire, lane=by_lane)
        config = uvicorn.Config(
            app,
            http=self.http,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            timeout_graceful_shutdown=5,
        )
        self.server = uvicorn.Server(config)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]

    @property
    def heads(self) -> int:
        shared = self.http.lane  # type: ignore[attr-defined]
        return len(shared.heads) + len(shared._older)


@contextlib.contextmanager
def serving(by_lane: bool) -> Iterator[Odd]:
    odd = Odd(by_lane)
    thread = threading.Thread(target=odd.server.run, args=([odd.listener],), name="uvicorn")
    thread.start()
    try:
        yield odd
    finally:
        odd.server.should_exit = True
        thread.join(WAIT_S)
        assert not thread.is_alive()


def ask(body: bytes, header: bytes = b"X: x") -> bytes:
    return b"POST %b HTTP/1.1\r\nHost: localhost\r\n%b\r\nContent-Length: %d\r\n\r\n%b" % (
        RPC.encode(),
        header,
        len(body),
        body,
    )


# A door with a bug


@DOORS
def test_a_bug_in_a_door_is_a_500_that_tells_nothing(by_lane: bool, caplog: pytest.LogCaptureFixture) -> None:
    with serving(by_lane) as odd:
        peer = Peer(odd.port)
        by = [peer.send(ask(b"12345")).response().json["by"] for _ in range(2)]
        assert by == ["AsgiClient", "LaneRequest" if by_lane else "AsgiClient"]
        response = peer.send(ask(b"raise")).response()
        assert (response.status, response.headers["connection"]) == (500, "close")
        assert peer.is_at_end()
        peer.close()
    assert response.json["error"] == {
        "code": -32603,
        "message": "Internal error",
        "data": {"error_type": "internal", "retryable": False},
    }
    assert odd.errors == ["internal"]
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.getMessage() == "request failed" and record.exc_info and record.exc_info[0] is Told


@DOORS
def test_a_request_finds_nothing_of_the_one_before_in_its_context(by_lane: bool) -> None:
    with serving(by_lane) as odd:
        peer = Peer(odd.port)
        answers = [peer.send(ask(b"12345")).response().json for _ in range(4)]
        peer.close()
    assert [answer["found"] for answer in answers] == [None] * 4
    assert {answer["by"] for answer in answers[1:]} == {"LaneRequest" if by_lane else "AsgiClient"}


# Memory


def long_head(number: int) -> bytes:
    return b"X: %d%b" % (number, b"x" * 1_700)


HEADS_ENOUGH = 3 * HEADS_BYTES_MAX // 2 // 1_800
"""Of `long_head`: more than three halves hold."""


def test_however_many_heads_come_a_bounded_number_is_remembered() -> None:
    with serving(True) as odd:
        peer = Peer(odd.port)
        for number in range(HEADS_ENOUGH):
            assert peer.send(ask(b"x", long_head(number))).response().status == 200
            assert 0 < odd.heads <= HEADS_BYTES_MAX // 1_800
        recent = [peer.send(ask(b"x", long_head(HEADS_ENOUGH - back))).response() for back in range(1, 1_000)]
        assert {response.json["by"] for response in recent} == {"LaneRequest"}
        peer.close()


def test_a_head_in_use_outlives_others_that_come_once() -> None:
    with serving(True) as odd:
        peer = Peer(odd.port)
        peer.send(ask(b"12345")).response()
        for number in range(HEADS_ENOUGH):
            peer.send(ask(b"x", long_head(number))).response()
            if number % 500 == 0:
                assert peer.send(ask(b"12345")).response().json["by"] == "LaneRequest"
        peer.close()


def test_large_heads_are_not_remembered() -> None:
    with serving(True) as odd:
        peer = Peer(odd.port)
        for _ in range(3):
            assert peer.send(ask(b"x", b"X: " + b"x" * 2_000)).response().json["by"] == "AsgiClient"
        assert odd.heads == 0
        peer.close()


# Garbage


@pytest.mark.parametrize("tool", ["which_door", "held"])
@pytest.mark.parametrize("ways", ["one connection", "a connection each"])
@DOORS
def test_neither_a_request_nor_its_connection_is_left_for_the_collector(
    by_lane: bool, ways: str, tool: str, tmp_path: Path
) -> None:
    request = http(execute(tool, **({"gate": "garbage"} if tool == "held" else {})))
    opens = http(execute("open_gate", gate="garbage"))
    count = 100

    async def circles() -> int:
        environ = {"PROTOCOL_LANE": str(by_lane), "TOOL_MODULES": "tests.transport.lane_tools", "DRAIN_SECONDS": "0"}
        async with open_service(read_settings({**environ, **places_in(tmp_path)})) as service:
            server: Any = Server(create_app(service), service, "127.0.0.1", 0)
            serving = asyncio.create_task(server.serve())
            while not server.started:
                await asyncio.sleep(0)

            async def connection(requests: list[bytes]) -> None:
                reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
                for one in requests:
                    answer = await answered(reader, writer, one)
                writer.close()
                await writer.wait_closed()
                assert json.loads(answer)["result"]["status"] == "success"

            await connection([opens, request, request])
            gc.collect()
            if ways == "one connection":
                await connection([request] * count)
            else:
                for _ in range(count):
                    await connection([request])
            found = gc.collect()
            server.stop()
            await serving
            return found

    gc.disable()
    try:
        assert uvloop.run(circles()) < count / 2
    finally:
        gc.enable()
        gc.unfreeze()


# The ground that this stands on


def said(name: str) -> str:
    return f"uvicorn {uvicorn.__version__} has changed what app/transport/{name}.py relies on; read it before you go on"


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_installed_uvicorn_has_the_internals_that_the_lane_relies_on() -> None:
    told = said("lane")
    assert (
        httptools_impl.STATUS_LINE[200] == b"HTTP/1.1 200 OK\r\n"
        and httptools_impl.STATUS_LINE[503] == b"HTTP/1.1 503 Service Unavailable\r\n"
    ), told
    assert parameters(HttpToolsProtocol.__init__) == ["self", "config", "server_state", "app_state", "_loop"], told
    assert parameters(HttpToolsProtocol.data_received) == ["self", "data"], told
    assert parameters(HttpToolsProtocol.on_response_complete) == parameters(HttpToolsProtocol.shutdown) == ["self"]
    state = ServerState()
    assert isinstance(state.tasks, set) and isinstance(state.default_headers, list), told
    assert state.total_requests == 0, told
    assert not FlowControl(asyncio.Transport()).write_paused, told


def test_a_request_of_the_lane_has_all_that_is_asked_of_a_cycle() -> None:
    """By uvicorn's protocol and by ours, which keep it in `cycle`."""
    sources = (inspect.getsource(HttpToolsProtocol), inspect.getsource(BoundedHttpProtocol))
    asked = {name for source in sources for name in re.findall(r"\b(?:self\.|existing_)?cycle\.(\w+)", source)}
    asked |= {name for source in sources for name in re.findall(r"\b(?:running|previous)\.(\w+)", source)}
    of_asgi = {"body", "more_body", "scope", "run_asgi", "transport"}
    told = said("lane") + f": of a cycle it asks for {sorted(asked)}"
    assert asked - of_asgi <= set(dir(LaneRequest)), told
    assert {"response_complete", "disconnected", "message_event"} <= asked, told
    made = inspect.getsource(RequestResponseCycle.__init__)
    assert all(f"self.{name}" in made for name in asked - {"run_asgi"}), told


def test_a_connection_has_all_that_a_request_of_the_lane_asks_of_it() -> None:
    async def build() -> LaneProtocol:
        http_class = lane_class(Lane({}, lambda host: True), Wire())
        config = uvicorn.Config(OddDoor, http=http_class, ws="none", log_config=None)  # type: ignore[arg-type]
        config.load()
        return http_class(config, ServerState(), {})

    ours = asyncio.run(build())
    asked = set(re.findall(r"\bprotocol\.(\w+)", inspect.getsource(LaneRequest)))
    assert {"transport", "loop", "tasks", "server_state", "on_response_complete", "context"} <= asked
    assert all(hasattr(ours, name) for name in asked), said("lane")
    asked = set(re.findall(r"\bself\.(\w+)", inspect.getsource(LaneProtocol)))
    assert all(hasattr(ours, name) for name in asked), said("lane")
    assert len(vars(ours)) <= 30, "slower attributes from here on"


def test_no_method_of_uvicorn_is_overridden_unawares() -> None:
    mine = {name for name, value in vars(LaneProtocol).items() if inspect.isfunction(value)}
    theirs = set(dir(BoundedHttpProtocol))
    assert mine & theirs == {"__init__", "data_received", "expire", "shutdown"}, said("lane")
    bounded = {name for name, value in vars(BoundedHttpProtocol).items() if inspect.isfunction(value)}
    expected = """__init__ connection_made connection_lost data_received pause_writing resume_writing on_message_begin
        on_header on_headers_complete on_body on_message_complete on_response_complete _should_upgrade
        _start_asgi_task"""
    assert bounded & set(vars(HttpToolsProtocol)) == set(expected.split()), said("protocol")


def test_what_a_cycle_sends_goes_through_an_exchange_in_the_way_that_it_expects() -> None:
    told = said("exchange")
    uses = set(re.findall(r"self\.transport\.(\w+)", inspect.getsource(RequestResponseCycle)))
    assert uses == {"write", "close", "is_closing"} <= set(dir(exchange.Exchange)), told
    sends = inspect.getsource(RequestResponseCycle.send)
    assert sends.index("self.response_started = True") < sends.index("self.transport.write"), told
    assert "self.response_complete = True" in sends and "self.on_response()" in sends, told
    asked = set(re.findall(r"\bcycle\.(\w+)", inspect.getsource(exchange)))
    made = inspect.getsource(RequestResponseCycle.__init__)
    assert all(f"self.{name}" in made for name in asked), told


def test_the_parser_gives_bytes_to_the_class_that_the_lane_derives_from() -> None:
    assert LaneProtocol.__mro__[1:3] == (BoundedHttpProtocol, HttpToolsProtocol), said("lane")
    assert protocol.IDLE == 0 and lane.IDLE is protocol.IDLE
