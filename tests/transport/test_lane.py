"""The protocol lane and the ASGI door behind it: the same requests over both, byte by byte."""

from __future__ import annotations

import contextlib
import select
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.transport.wire import HttpBounds
from tests.conftest import Serve, end
from tests.servers import wait_until
from tests.transport.doors import DOORS, RPC, TOOLS, Door, chunked, execute, http, mcp_call, start_door, which
from tests.transport.raw_http import GRAIN_S, Peer

READ_TIMEOUT_S, DEFAULT_READ_TIMEOUT_S = 1.0, 10.0


@pytest.fixture(scope="module", params=DOORS)
def shared(request: pytest.FixtureRequest) -> Iterator[Door]:
    door = start_door(request.param)
    yield door
    end(door.running)


@pytest.fixture
def door(shared: Door) -> Iterator[Door]:
    """Its connections end with the test."""
    yield shared
    shared.hang_up()


@pytest.fixture(scope="module", params=DOORS)
def shared_hasty(request: pytest.FixtureRequest) -> Iterator[Door]:
    door = start_door(request.param, REQUEST_READ_TIMEOUT_S=str(READ_TIMEOUT_S))
    yield door
    end(door.running)


@pytest.fixture
def hasty(shared_hasty: Door) -> Iterator[Door]:
    """With short deadlines, for tests that let one pass: others may be held up in the middle of a request."""
    yield shared_hasty
    shared_hasty.hang_up()


# Which requests take it


def test_protocol_lane_answers_a_head_that_went_the_whole_way_once(door: Door) -> None:
    request = http(which(), b"X-Test: first and second")
    first, second = (door.connect().send(request).response() for _ in range(2))
    assert first.json["result"]["result"] == "asgi"
    assert door.answers(second)
    assert list(first.headers) == list(second.headers)


def test_the_mcp_door_is_on_the_lane_too(door: Door) -> None:
    request = door.taught(mcp_call("which_door"))
    answer = door.connect().send(request).response().json["result"]
    assert answer["content"][0]["text"] == door.name


@pytest.mark.parametrize(
    "header",
    [
        b"Connection: close",
        b"Connection: TE",
        b"Expect: nothing",
        b"Forwarded: for=192.0.2.1",
        b"Idempotency-Key: k",
        b"Origin: http://127.0.0.1",
        b"Proxy-Connection: close",
        b"traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        b"X-Forwarded-For: 192.0.2.1",
        b"X-Request-ID: 1",
        b"X-Long: " + b"x" * 2_048,
    ],
)
def test_a_head_that_asks_for_more_takes_the_asgi_door_each_time(door: Door, header: bytes) -> None:
    request = http(which(), header)
    for _ in range(3):
        assert door.connect().send(request).response().json["result"]["result"] == "asgi"


# One connection after another request


def test_a_connection_is_kept_alive_over_many_requests(door: Door) -> None:
    request = door.taught(http(which()))
    peer = door.connect()
    for _ in range(50):
        response = peer.send(request).response()
        assert door.answers(response) and "connection" not in response.headers


def test_a_client_may_say_keep_alive(door: Door) -> None:
    request = door.taught(http(which(), b"Connection: Keep-Alive"))
    peer = door.connect()
    assert all(door.answers(peer.send(request).response()) for _ in range(3))


def test_other_routes_answer_between_requests_of_the_lane(door: Door) -> None:
    request = door.taught(http(which()))
    rest = b'{"parameters": {"message": "by REST"}}'
    peer = door.connect()
    for _ in range(3):
        assert door.answers(peer.send(request).response())
        assert peer.send(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").response().status == 200
        assert door.answers(peer.send(request).response())
        response = peer.send(http(rest, path=b"/api/v1/tools/echo/execute")).response()
        assert response.json["result"] == {"message": "by REST"}


@pytest.mark.parametrize("verb", [b"GET", b"HEAD", b"PUT", b"DELETE"])
def test_only_post_is_taken_whatever_the_body(door: Door, verb: bytes) -> None:
    good = door.taught(http(which()))
    peer = door.connect()
    for _ in range(2):
        refused = peer.send(http(which(), verb=verb)).response(has_body=verb != b"HEAD")
        assert (refused.status, refused.headers["allow"]) == (405, "POST")
        assert door.answers(peer.send(good).response())


@pytest.mark.parametrize("header", [b"", b"Connection: keep-alive"])
def test_http_1_0_ends_after_its_answer(door: Door, header: bytes) -> None:
    door.taught(http(which()))
    request = http(which(), *[header] * bool(header), version=b"1.0")
    for _ in range(2):
        peer = door.connect().send(request)
        response = peer.response()
        assert response.json["result"]["result"] == "asgi" and response.headers["connection"] == "close"
        assert peer.is_at_end()


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
def test_an_upgrade_is_not_taken_up(door: Door, protocol: bytes) -> None:
    good = door.taught(http(which()))
    for _ in range(2):
        peer = door.connect()
        assert door.answers(peer.send(good).response())
        response = peer.send(http(which(), b"Connection: Upgrade", b"Upgrade: " + protocol)).response()
        assert response.json["result"]["result"] == "asgi" and response.headers["connection"] == "close"
        assert peer.is_at_end()


# How it is cut


def test_head_and_body_may_come_apart(door: Door) -> None:
    head, _, body = door.taught(http(which())).partition(b"\r\n\r\n")
    peer = door.connect()
    for _ in range(3):
        peer.send(head + b"\r\n\r\n")
        door.turn()
        assert door.answers(peer.send(body).response())


@pytest.mark.parametrize("cuts", [(10,), (-5,), (30, -20), (-20, -10, -5), (10, 20, 30, 40, -9)])
def test_a_request_in_several_segments_is_one(door: Door, cuts: tuple[int, ...]) -> None:
    request = door.taught(http(which()))
    peer = door.connect()
    door.turn()  # the server reads it from now on
    for _ in range(2):
        before = 0
        for cut in (*cuts, len(request)):
            cut %= len(request) + 1
            peer.send(request[before:cut])
            door.turn()
            before = cut
        assert peer.response().json["result"]["result"] == "asgi"
        assert door.answers(peer.send(request).response())


@pytest.mark.parametrize("kept_back", [1, 2, 70])
def test_a_body_that_follows_its_head_in_parts_is_one(door: Door, kept_back: int) -> None:
    head, _, body = door.taught(http(which())).partition(b"\r\n\r\n")
    peer = door.connect().send(head + b"\r\n\r\n")
    door.turn()
    peer.send(body[:-kept_back])
    door.turn()
    assert peer.send(body[-kept_back:]).response().json["id"] == "0000"
    assert door.answers(peer.send(http(which())).response())


def test_a_request_may_come_byte_by_byte(door: Door) -> None:
    request = door.taught(http(which()))
    peer = door.connect()
    for byte in request:
        peer.send(bytes([byte]))
    assert peer.response().json["id"] == "0000"
    assert door.answers(peer.send(request).response())


def test_a_body_may_be_chunked(door: Door) -> None:
    peer = door.connect()
    for _ in range(3):
        assert peer.send(chunked(which())).response().json["result"]["result"] == "asgi"


def test_a_client_that_expects_100_gets_it_each_time(door: Door) -> None:
    body = which()
    head, _, _ = http(body, b"Expect: 100-continue").partition(b"\r\n\r\n")
    peer = door.connect()
    for _ in range(3):
        assert peer.send(head + b"\r\n\r\n").response().status == 100
        assert peer.send(body).response().json["id"] == "0000"


# Several at once


@pytest.mark.parametrize("way", ["one segment", "a segment each"])
def test_answers_come_in_the_order_of_requests_fast_and_slow_ones_mixed(door: Door, way: str) -> None:
    gates = [f"{way} {number}" for number in range(3)]
    slow = [http(execute("held", gate, gate=gate)) for gate in gates]
    for gate in gates:
        door.open(gate)
    for request in slow:
        door.taught(request)
    fast = door.taught(http(which()))
    again = [f"{gate} again" for gate in gates]
    requests = []
    for gate in again:
        requests += [http(execute("held", gate, gate=gate)), fast, fast]
    peer = door.connect()
    if way == "one segment":
        peer.send(b"".join(requests))
    else:
        for request in requests:
            peer.send(request)
            door.turn()
    for gate in reversed(again):
        door.open(gate)
    answers = [peer.response().json for _ in requests]
    assert [answer["id"] for answer in answers] == [name for gate in again for name in (gate, "0000", "0000")]
    assert door.answers(peer.send(fast).response())


def test_a_slow_call_of_the_lane_is_followed_by_what_waited_behind_it(door: Door) -> None:
    gate = f"followed {door.name}"
    door.open("open")
    same = http(execute("held", 1, gate="x" * len(gate)))
    door.open("x" * len(gate))
    door.taught(same)
    fast = door.taught(http(which(1)))
    peer = door.connect().send(http(execute("held", 1, gate=gate)))
    door.come(gate)
    for number in range(10):
        peer.send(http(which(number)))
    door.open(gate)
    assert peer.response().json["result"]["result"] == door.name
    assert [peer.response().json["id"] for _ in range(10)] == [f"{number:04}" for number in range(10)]
    assert door.answers(peer.send(fast).response())


def test_more_requests_than_may_wait_behind_a_slow_one_end_the_connection_in_order(door: Door) -> None:
    gate = f"many {door.name}"
    door.open(f"nobody {door.name}")
    fast = door.taught(http(which()))
    peer = door.connect().send(http(execute("held", gate=gate)))
    door.come(gate)
    peer.send(fast * 100)
    door.turn()
    door.open(gate)
    assert [peer.response().status for _ in range(1 + 32)] == [200] * 33
    refused = peer.response()
    assert (refused.status, refused.headers["connection"]) == (503, "close")


def test_a_client_that_does_not_read_is_not_worked_for(door: Door) -> None:
    size = 300_000
    request = door.taught(http(execute("return_long", characters=size)))
    calls = {"tool_id": "return_long", "status": "success"}
    before = door.running.metric("tool_executions_total", **calls)
    count = 30  # fewer than may wait in one read
    peer = door.connect(receive_buffer_bytes=4_096)
    for _ in range(count):
        peer.send(request)
    door.turn()
    ran = door.running.metric("tool_executions_total", **calls) - before
    assert ran < count / 2, "as many as the kernel's buffers take, and two"
    assert all(len(peer.response().json["result"]["result"]) == size for _ in range(count))
    assert door.running.metric("tool_executions_total", **calls) - before == count


# Bounds and deadlines


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (http(which()).replace(b"Content-Length: ", b"Content-Length: 9999"), 413),
        (http(which(), b"X: " + b"x" * 40_000), 431),
        (http(which(), *[b"X: x"] * 120), 431),
        (http(which(), path=RPC + b"?" + b"x" * 9_000), 414),
        (http(which(), b"Content-Length: 5"), 400),
        (http(which(), b"Host: b"), 400),
        (http(which(), b"Transfer-Encoding: chunked"), 400),
        (http(which()).replace(b"Host: 127.0.0.1\r\n", b""), 400),
        (http(which(), version=b"2.0"), 505),
    ],
    ids=["413", "431 bytes", "431 lines", "414", "two lengths", "two hosts", "two framings", "no host", "505"],
)
def test_a_bound_that_is_passed_ends_the_connection_after_a_request_of_the_lane(
    door: Door, request_bytes: bytes, status: int
) -> None:
    good = door.taught(http(which()))
    peer = door.connect()
    assert door.answers(peer.send(good).response())
    refused = peer.send(request_bytes).response()
    assert (refused.status, refused.headers["connection"]) == (status, "close")
    assert peer.is_at_end()


def test_a_body_of_a_megabyte_comes_in_many_segments(door: Door) -> None:
    body = execute("echo", message="x")
    body += b" " * (1_048_576 - len(body))
    request = door.taught(http(body))
    peer = door.connect()
    for _ in range(2):
        assert peer.send(request).response().json["result"]["result"] == {"message": "x"}


def test_bytes_beyond_the_length_are_the_next_request(door: Door) -> None:
    good = door.taught(http(which()))
    peer = door.connect().send(good + b"surplus\r\n\r\n")
    assert peer.response().status == 200
    refused = peer.response()
    assert (refused.status, refused.headers["connection"]) == (400, "close")
    assert peer.is_at_end()


@pytest.mark.parametrize("sent", ["head", "head and half of the body", "head, then half of the body"])
def test_a_body_that_does_not_come_gets_408(hasty: Door, sent: str) -> None:
    head, _, body = hasty.taught(http(which())).partition(b"\r\n\r\n")
    head += b"\r\n\r\n"
    began = time.monotonic()
    peer = hasty.connect().send(head if "," in sent or sent == "head" else head + body[:40])
    if "," in sent:
        hasty.turn()
        peer.send(body[:40])
    refused = peer.response()
    took_s = time.monotonic() - began
    assert (refused.status, refused.headers["connection"], refused.json["error"]["code"]) == (408, "close", -32600)
    assert peer.is_at_end()
    assert READ_TIMEOUT_S - GRAIN_S <= took_s < DEFAULT_READ_TIMEOUT_S, "by the deadline of its own setting"


def test_a_head_that_does_not_end_gets_408(hasty: Door) -> None:
    request = hasty.taught(http(which()))
    peer = hasty.connect()
    assert hasty.answers(peer.send(request).response())
    refused = peer.send(request[:60]).response()
    assert (refused.status, refused.headers["connection"]) == (408, "close")
    assert peer.is_at_end()


def test_a_body_that_comes_later_than_a_sweep_is_taken(door: Door) -> None:
    """The lane gives a held head to the parser after a while, long before its deadline."""
    head, _, body = door.taught(http(which())).partition(b"\r\n\r\n")
    peer = door.connect().send(head + b"\r\n\r\n")
    assert not select.select([peer.sock], [], [], 3 * HttpBounds().sweep_interval_s)[0]
    assert peer.send(body).response().json["id"] == "0000"
    assert door.answers(peer.send(http(which())).response())


# Who goes


def test_a_call_goes_on_without_its_client_and_its_row_says_so(door: Door) -> None:
    gate = f"alone {door.name}"
    door.open("y" * len(gate))
    door.taught(http(execute("held", gate="y" * len(gate))))
    before = door.rows_until_now("held")
    peer = door.connect().send(http(execute("held", gate=gate)))
    door.come(gate)
    peer.close()
    door.turn()
    door.open(gate)
    (row,) = door.rows_since(before, "held")
    assert (row["status"], row["client_gone"]) == ("success", True)


@pytest.mark.parametrize("calls", [1, 3])
def test_calls_that_want_to_be_are_cancelled_with_their_client(door: Door, calls: int) -> None:
    gate = f"cancelled {door.name} {calls}"
    other = "z" * len(gate)

    def request(name: str) -> bytes:
        bodies = [execute("held_for_client", number, gate=name) for number in range(calls)]
        return http(b"[%b]" % b",".join(bodies) if calls > 1 else bodies[0])

    door.open(other)
    door.taught(request(other))
    before = door.rows_until_now("held_for_client")
    peer = door.connect().send(request(gate))
    door.come(gate, calls)
    peer.close()
    rows = door.rows_since(before, "held_for_client", calls)
    assert {(row["status"], row["client_gone"]) for row in rows} == {("cancelled", True)}
    assert door.running.metric("tool_execution_concurrency") == 0


def test_an_mcp_call_is_cancelled_with_its_client(door: Door) -> None:
    gate = f"mcp {door.name}"
    door.open("w" * len(gate))
    door.taught(mcp_call("held_for_client", gate="w" * len(gate)))
    before = door.rows_until_now("held_for_client")
    peer = door.connect().send(mcp_call("held_for_client", gate=gate))
    door.come(gate)
    peer.close()
    (row,) = door.rows_since(before, "held_for_client")
    assert row["status"] == "cancelled"


@pytest.mark.parametrize("door_name", DOORS)
def test_a_drain_loses_no_answer_and_ends_every_connection(serve: Serve, tmp_path: Path, door_name: str) -> None:
    lane = "true" if door_name == "lane" else "false"
    running = serve(PROTOCOL_LANE=lane, TOOL_MODULES=TOOLS, DRAIN_SECONDS="4")
    door = Door(running, door_name)
    there, gate = tmp_path / "1", tmp_path / "2"
    there.touch()
    slow = http(execute("wait_for_file", path=str(gate), value="done"))
    quick = door.taught(http(execute("wait_for_file", path=str(there), value="done")))
    assert len(quick) == len(slow), "they share a head"
    fast = door.taught(http(which()))
    idle, silent, *busy = (door.connect() for _ in range(8))
    assert door.answers(idle.send(fast).response()) and door.answers(silent.send(fast).response())
    for peer in busy:
        peer.send(slow)
    wait_until(lambda: running.metric("tool_execution_concurrency") == len(busy), "they run")
    busy[0].send(fast)
    running.process.send_signal(signal.SIGTERM)
    running.read_log(lambda event: event["message"] == "draining")
    late = idle.send(fast).response()
    assert (late.status, late.headers["connection"]) == (200, "close")
    assert idle.is_at_end() and silent.is_at_end()
    gate.touch()
    for peer in busy:
        assert peer.response().json["result"]["result"] == "done"
    refused = busy[0].response()
    assert (refused.status, refused.headers["connection"]) == (503, "close")
    assert refused.json["error"]["code"] == -32009
    assert all(peer.is_at_end() for peer in busy)
    assert running.process.wait(30) == 0
    door.hang_up()


@pytest.mark.parametrize("door_name", DOORS)
def test_max_request_bytes_in_flight_bounds_large_requests_together(serve: Serve, door_name: str) -> None:
    lane = "true" if door_name == "lane" else "false"
    running = serve(PROTOCOL_LANE=lane, TOOL_MODULES=TOOLS, MAX_REQUEST_BYTES_IN_FLIGHT=str(2**20))
    door = Door(running, door_name)
    door.open("past")
    door.taught(http(execute("held", gate="past").ljust(34_900)))
    large = http(execute("held", gate="here").ljust(34_900))
    peers = [door.connect().send(large) for _ in range(30)]
    door.come("here", len(peers))
    one_more = door.connect().send(large).response()
    assert (one_more.status, one_more.headers["retry-after"], one_more.headers["connection"]) == (503, "1", "close")
    assert one_more.json["error"]["code"] == -32006
    assert running.metric("http_wire_refusals_total", reason="bodies_full") == 1
    assert door.answers(door.connect().send(door.taught(http(which()))).response())
    door.open("here")
    for peer in peers:
        assert peer.response().json["result"]["result"] == "asgi"
    for peer in peers:
        assert peer.send(large).response().json["result"]["result"] == "asgi"
    door.hang_up()


@pytest.mark.parametrize("door_name", DOORS)
def test_max_response_bytes_in_flight_cuts_the_slowest_of_those_that_do_not_read(serve: Serve, door_name: str) -> None:
    lane = "true" if door_name == "lane" else "false"
    bounds = {"MAX_RESPONSE_BYTES_IN_FLIGHT": str(2**20), "MAX_RESULT_BYTES": str(2**24)}
    running = serve(PROTOCOL_LANE=lane, TOOL_MODULES=TOOLS, **bounds)
    door = Door(running, door_name)
    request = door.taught(http(execute("return_long", characters=12_000_000)))
    slow, next_one = (door.connect(receive_buffer_bytes=4096) for _ in range(2))
    assert slow.send(request).file.read(4) == b"HTTP"
    assert next_one.send(request).file.read(4) == b"HTTP"
    wait_until(lambda: running.metric("http_wire_refusals_total", reason="answers_full") == 1, "one is cut")
    running.read_log(lambda event: event["message"] == "requests refused or cut" and event["reason"] == "answers_full")
    with contextlib.suppress(ConnectionResetError):
        assert len(slow.response().body) < 12_000_000
    assert len(next_one.response().json["result"]["result"]) == 12_000_000
    assert door.answers(door.connect().send(door.taught(http(which()))).response())
    door.hang_up()


@pytest.mark.parametrize("door_name", DOORS)
def test_a_call_that_waits_for_redis_and_for_its_row_on_disk_keeps_its_door(
    serve: Serve, door_name: str, redis_url: str, tmp_path: Path
) -> None:
    limits = tmp_path / "limits.yaml"
    limits.write_text("policies: [{name: wide, match: {tool: which_door}, per: [tenant], rate: 1000/day}]")
    lane = "true" if door_name == "lane" else "false"
    redis = {"REDIS_URL": redis_url, "LIMITS_TIMEOUT_MS": "10000"}
    environ = {**redis, "LIMITS_FILE": str(limits), "JOURNAL_MODE": "strict"}
    door = Door(serve(PROTOCOL_LANE=lane, TOOL_MODULES=TOOLS, **environ), door_name)
    request = door.taught(http(which()))
    peers = [door.connect() for _ in range(5)]
    for number in range(4):
        for peer in peers:
            peer.send(request)
        answers = [peer.response() for peer in peers]
        assert all(door.answers(answer) for answer in answers)
        left = sorted(int(answer.headers["ratelimit-remaining"]) for answer in answers)
        assert left == list(range(994 - 5 * number, 999 - 5 * number))
    before = door.rows_until_now("which_door")
    peers[0].send(request)
    peers[0].close()
    (row,) = door.rows_since(before, "which_door")
    assert len(before) == 21 and row["status"] == "success"
    door.hang_up()


def test_a_peer_that_is_reset_harms_nobody(door: Door) -> None:
    request = door.taught(http(which()))
    gate = f"reset {door.name}"
    peer = door.connect().send(http(execute("held", gate=gate)))
    door.come(gate)
    peer.send(request)
    door.peers.remove(peer)
    peer.reset()
    door.open(gate)
    assert door.answers(door.connect().send(request).response())


def test_a_thousand_heads_in_turn_do_not_grow_the_service(door: Door) -> None:
    def resident_bytes() -> int:
        status = Path(f"/proc/{door.running.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) * 1024

    peer = door.connect()

    def round_of_heads(number: int) -> None:
        for head in range(3_000):
            peer.send(http(which(), b"X-Test: %d %d %b" % (number, head, b"x" * 1_000)))
            assert peer.response().status == 200

    round_of_heads(1)
    before = resident_bytes()
    round_of_heads(2)
    assert resident_bytes() - before < 8_000_000


def test_writers_on_many_connections_are_all_answered(door: Door) -> None:
    request = door.taught(http(which()))
    wrong: list[Any] = []

    def ask() -> None:
        peer = Peer(door.running.port)
        for _ in range(100):
            response = peer.send(request).response()
            if not door.answers(response):
                wrong.append(response)
        peer.close()

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
