"""The bounded HTTP/1.1 connection, driven over raw sockets against a running uvicorn, on both event loops."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import logging
import queue
import random
import re
import select
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from app.transport.protocol import BoundedHttpProtocol, protocol_class
from app.transport.wire import COLLECTED_AFTER_BYTES, HttpBounds, Reason, Wire
from tests.transport.raw_http import (
    CHUNKED,
    GET,
    GRAIN_S,
    SHORT,
    SHORT_S,
    WAIT_S,
    Echo,
    Peer,
    Served,
    assert_refused,
    eventually,
    post,
    serving,
)


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def loop(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def default_server(loop: str) -> Iterator[Served]:
    with serving(Wire(HttpBounds()), loop) as served:
        yield served


@pytest.fixture(scope="module")
def short_server(loop: str) -> Iterator[Served]:
    with serving(Wire(SHORT), loop) as served:
        yield served


def fresh(served: Served) -> Served:
    served.forget_peers()
    served.app.gate = asyncio.Event()
    served.app.calls = 0
    served.app.seen = queue.Queue()
    return served


@pytest.fixture
def server(default_server: Served) -> Served:
    """With the default bounds."""
    return fresh(default_server)


@pytest.fixture
def short(short_server: Served) -> Served:
    """With deadlines of SHORT_S."""
    return fresh(short_server)


# Plain traffic


@pytest.mark.parametrize("way", ["whole", "byte by byte"])
def test_a_request_is_answered_however_it_is_cut_into_segments(server: Served, way: str) -> None:
    peer, request = server.connect(), post(b"x", b"hello")
    for part in [request] if way == "whole" else [bytes([byte]) for byte in request]:
        peer.send(part)
    assert peer.response().json["body"] == "hello"
    assert peer.send(GET % b"again").response().json["path"] == "/again"


def test_a_chunked_body_arrives_whole_in_many_small_chunks(server: Served) -> None:
    body = bytes(range(256)) * 20
    chunks = b"".join(b"1\r\n%b\r\n" % bytes([byte]) for byte in body)
    response = server.ask(CHUNKED % b"x" + chunks + b"0\r\n\r\n")
    assert response.json["body"].encode("latin-1") == body


def test_head_is_answered_without_a_body(server: Served) -> None:
    peer = server.connect().send(b"HEAD /x HTTP/1.1\r\nHost: a\r\n\r\n")
    assert int(peer.response(has_body=False).headers["content-length"]) > 0
    assert peer.send(GET % b"next").response().json["path"] == "/next"


def test_http_1_0_needs_no_host_and_ends_after_the_answer(server: Served) -> None:
    peer = server.connect().send(b"POST /x HTTP/1.0\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\nhi")
    assert peer.response().json["body"] == "hi"
    assert peer.is_at_end()


def test_expect_is_answered_with_100_before_the_body(server: Served) -> None:
    peer = server.connect().send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
    assert peer.response().status == 100
    assert peer.send(b"hi").response().json["body"] == "hi"


@pytest.mark.parametrize(
    "target", [b"/%00", b"/%zz%", b"/%ff%fe", b"*", b"http://b/abs?x=%zz", b"/a?b=%00&\xc3%", b"//"]
)
def test_odd_targets_reach_the_application_or_are_refused(server: Served, target: bytes) -> None:
    response = server.ask(b"OPTIONS %b HTTP/1.1\r\nHost: a\r\n\r\n" % target)
    assert response.status == (400 if b"\xc3" in target else 200)


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 5\r\n\r\nhello", b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"]
)
@pytest.mark.parametrize("segments", ["one segment", "two segments"])
def test_an_upgrade_is_ignored_and_its_body_is_a_body(server: Served, framing: bytes, segments: str) -> None:
    peer = server.connect()
    head, body = b"POST /x HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n", framing
    if segments == "two segments":
        first, _, body = framing.partition(b"\r\n\r\n")
        head += first + b"\r\n\r\n"
        peer.send(head + body[:2])
        head, body = b"", body[2:]
    response = peer.send(head + body).response()
    assert response.json["body"] == "hello"
    assert response.headers["connection"] == "close"
    assert peer.is_at_end()


def test_a_websocket_request_is_answered_as_plain_http(server: Served, caplog: pytest.LogCaptureFixture) -> None:
    upgrade = b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    peer = server.connect().send(upgrade + GET % b"next")
    assert [peer.response().json["path"] for _ in range(2)] == ["/ws", "/next"]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_while_draining_every_answer_ends_its_connection(loop: str) -> None:
    with serving(Wire(HttpBounds()), loop) as served:
        peer = served.connect().send(GET % b"before")
        assert "connection" not in peer.response().headers
        served.wire.draining = True
        assert peer.send(GET % b"while").response().headers["connection"] == "close"
        assert peer.is_at_end()


def test_trailers_are_read_and_forgotten(server: Served) -> None:
    peer = server.connect().send(CHUNKED % b"x" + b"2\r\nhi\r\n0\r\nHost: evil\r\nX-Late: 1\r\n\r\n")
    told = peer.response().json
    assert (told["body"], told["headers"]) == ("hi", ["host", "transfer-encoding"])
    assert peer.send(GET % b"next").response().status == 200


# Not HTTP, or ambiguous HTTP

HEAD = b"POST / HTTP/1.1\r\nHost: a\r\n"
AMBIGUOUS = {
    "no Host": b"GET / HTTP/1.1\r\n\r\n",
    "two Hosts": HEAD + b"Host: a\r\n\r\n",
    "two Hosts in 1.0": b"GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n",
    "empty Host": b"GET / HTTP/1.1\r\nHost:\r\n\r\n",
    "Host with path": b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n",
    "Host with user": b"GET / HTTP/1.1\r\nHost: a@b\r\n\r\n",
    "Host list": b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
    "Host with colons in brackets": b"GET / HTTP/1.1\r\nHost: [::::]\r\n\r\n",
    "Host with IPv4 in brackets": b"GET / HTTP/1.1\r\nHost: [1.2.3]\r\n\r\n",
    "Host with bad port": b"GET / HTTP/1.1\r\nHost: a:8x\r\n\r\n",
    "length beside chunked": HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked beside length": HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "two equal lengths": HEAD + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
    "length list": HEAD + b"Content-Length: 5, 5\r\n\r\nhello",
    "signed length": HEAD + b"Content-Length: +5\r\n\r\nhello",
    "negative length": HEAD + b"Content-Length: -5\r\n\r\nhello",
    "empty length": HEAD + b"Content-Length:\r\n\r\nhello",
    "hexadecimal length": HEAD + b"Content-Length: 0x5\r\n\r\nhello",
    "underscored length": HEAD + b"Content-Length: 1_0\r\n\r\nhello",
    "overflowing length": HEAD + b"Content-Length: 99999999999999999999\r\n\r\nhello",
    "gzip, chunked": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "gzip then chunked": HEAD + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked twice": HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked, chunked": HEAD + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "identity": HEAD + b"Transfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "xchunked": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "vertical tab before chunked": HEAD + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "chunked in 1.0": b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "folded line": HEAD + b"X: a\r\n b\r\n\r\n",
    "folded first line": b"GET / HTTP/1.1\r\n Host: a\r\n\r\n",
    "NUL in value": HEAD + b"X: a\x00b\r\n\r\n",
    "NUL in name": HEAD + b"X\x00: a\r\n\r\n",
    "NUL in target": b"GET /\x00 HTTP/1.1\r\nHost: a\r\n\r\n",
    "bare CR": HEAD + b"X: a\rb\r\n\r\n",
    "bare LF": b"GET / HTTP/1.1\nHost: a\n\n",
    "space before colon": HEAD + b"X : a\r\n\r\n",
    "no colon": HEAD + b"X\r\n\r\n",
    "no name": HEAD + b": a\r\n\r\n",
    "target beyond ASCII": b"GET /\xc3\xa9?\xc3\xa9 HTTP/1.1\r\nHost: a\r\n\r\n",
    "space in target": b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
    "target without path": b"GET http://a HTTP/1.1\r\nHost: a\r\n\r\n",
    "CONNECT": b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n",
    "unknown method": b"FOO / HTTP/1.1\r\nHost: a\r\n\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS ClientHello": bytes.fromhex("16030100a5010000a10303") + bytes(160),
    "trailer with length": CHUNKED % b"" + b"0\r\nContent-Length: 5\r\n\r\n",
}


@pytest.mark.parametrize("request_bytes", AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
def test_what_is_not_clearly_http_gets_400_and_an_end(server: Served, request_bytes: bytes) -> None:
    assert_refused(server.connect().send(request_bytes), 400)
    assert server.app.calls == 0 or b"chunked" in request_bytes


@pytest.mark.parametrize("version", [b"2.0", b"0.9"])
def test_other_versions_of_http_get_505(server: Served, version: bytes) -> None:
    assert_refused(server.connect().send(b"GET / HTTP/%b\r\nHost: a\r\n\r\n" % version), 505)


@pytest.mark.parametrize("host", [b"a", b"127.0.0.1:8001", b"[::1]:8001", b"tools.example.com", b"a_b:", b"%41"])
def test_a_host_that_names_a_host_is_served(server: Served, host: bytes) -> None:
    assert server.ask(b"GET / HTTP/1.1\r\nHost:  %b \r\n\r\n" % host).status == 200


def test_a_second_request_on_a_connection_is_held_to_the_same_rules(server: Served) -> None:
    peer = server.connect().send(GET % b"x")
    assert peer.response().status == 200
    assert_refused(peer.send(b"GET / HTTP/1.1\r\n\r\n"), 400)


def test_random_bytes_end_the_connection_and_harm_nobody(server: Served) -> None:
    dice = random.Random(20261101)
    neighbour = server.connect()
    for _ in range(100):
        peer = server.connect().send(b"\xff" + dice.randbytes(dice.randrange(1, 3000)))
        assert_refused(peer, 400)
        peer.close()
    assert neighbour.send(GET % b"x").response().status == 200


@pytest.mark.parametrize("path", [b"/api/v1/jsonrpc", b"/mcp", b"/mcp?x=1"])
def test_a_refusal_on_an_rpc_door_is_a_json_rpc_response(server: Served, path: bytes) -> None:
    response = assert_refused(
        server.connect().send(b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Length: 9999999\r\n\r\n" % path), 413
    )
    assert list(response.json) == ["jsonrpc", "error", "id"]
    assert (response.json["jsonrpc"], response.json["id"]) == ("2.0", None)
    assert response.json["error"]["code"] == -32600
    assert response.json["error"]["data"] == {"error_type": "invalid_request", "retryable": False}


def test_a_refusal_elsewhere_is_a_rest_error(server: Served) -> None:
    response = assert_refused(
        server.connect().send(b"POST /api HTTP/1.1\r\nHost: a\r\nContent-Length: 9999999\r\n\r\n"), 413
    )
    assert list(response.json) == ["error"]


def test_a_refused_head_request_gets_no_body(short: Served) -> None:
    peer = short.connect().send(b"HEAD / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n")
    assert peer.response(has_body=False).status == 408
    assert peer.is_at_end()


# Malformed chunks

BAD_CHUNKS = {
    "not a number": b"zz\r\nab\r\n",
    "negative": b"-3\r\nabc\r\n",
    "hexadecimal prefix": b"0x3\r\nabc\r\n",
    "overflow": b"fffffffffffffffff\r\n",
    "bare LF": b"3\nabc\n",
    "space after size": b"3 \r\nabc\r\n",
    "longer than said": b"3\r\nabcd\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("chunk", BAD_CHUNKS.values(), ids=BAD_CHUNKS.keys())
def test_a_bad_chunk_gets_400_and_the_application_a_disconnect(server: Served, chunk: bytes) -> None:
    peer = server.connect().send(CHUNKED % b"x" + b"2\r\nhi\r\n")
    eventually(lambda: server.app.calls == 1)
    assert_refused(peer.send(chunk), 400)
    assert server.app.seen.get(timeout=WAIT_S) == "disconnect"


def test_a_bad_chunk_after_the_answer_ends_the_connection(server: Served) -> None:
    peer = server.connect().send(CHUNKED % b"early")
    assert peer.response().body == b"early"
    assert peer.send(b"zz\r\n").is_at_end()


def test_a_flood_of_bad_peers_writes_a_few_log_lines(server: Served, caplog: pytest.LogCaptureFixture) -> None:
    began, refused = time.monotonic(), server.wire.refused[Reason.MALFORMED]
    for bad in [b"\x16\x03\x01", CHUNKED % b"x" + b"zz\r\n"] * 100:
        peer = server.connect().send(bad)
        assert peer.response().status == 400
        peer.close()
    for _ in range(20):
        peer = server.connect().send(CHUNKED % b"x" + b"2\r\nhi\r\n")
        peer.reset()
    eventually(lambda: server.app.seen.qsize() == 120)
    assert server.wire.refused[Reason.MALFORMED] == refused + 200
    loud = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(loud) <= 2 + (time.monotonic() - began)
    assert {record.getMessage() for record in loud} <= {"requests refused or cut"}, "one message for who counts lines"
    assert not any(record.exc_info for record in loud)


# Sizes


@pytest.mark.parametrize("ending", [b"", b"\r\n\r\n"], ids=["unfinished", "finished"])
@pytest.mark.parametrize("size", [40_000, 200_000])
def test_a_head_over_its_bytes_gets_431(server: Served, size: int, ending: bytes) -> None:
    assert_refused(server.connect().send(HEAD + b"X: " + b"x" * size + ending), 431)
    assert server.app.calls == 0


@pytest.mark.parametrize(("over", "status"), [(0, 200), (1, 431)])
def test_the_head_bound_is_exact_also_when_a_body_follows(server: Served, over: int, status: int) -> None:
    head = b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 200000\r\nX: \r\n"
    filler = b"x" * (32_768 - len(head) + over)
    peer = server.connect().send(head.replace(b"X: ", b"X: " + filler) + b"\r\n" + b"y" * 200_000)
    assert peer.response().status == status


@pytest.mark.parametrize(("over", "status"), [(0, 200), (1, 431)])
def test_the_head_bound_is_exact_also_behind_another_request(server: Served, over: int, status: int) -> None:
    head = b"GET /x HTTP/1.1\r\nHost: a\r\nX: \r\n"
    head = head.replace(b"X: ", b"X: " + b"x" * (32_768 - len(head) + over)) + b"\r\n"
    peer = server.connect().send(GET % b"first" + head[:20_000])
    assert peer.response().json["path"] == "/first"
    assert peer.send(head[20_000:]).response().status == status


@pytest.mark.parametrize(("count", "status"), [(99, 200), (100, 431), (5_000, 431)])
def test_more_than_100_headers_get_431(server: Served, count: int, status: int) -> None:
    assert server.ask(b"GET / HTTP/1.1\r\nHost: a\r\n" + b"a: b\r\n" * count + b"\r\n").status == status


@pytest.mark.parametrize("ending", [b"", b" HTTP/1.1\r\nHost: a\r\n\r\n"], ids=["unfinished", "finished"])
@pytest.mark.parametrize("size", [40_000, 200_000])
def test_a_long_target_gets_414(server: Served, size: int, ending: bytes) -> None:
    assert_refused(server.connect().send(b"GET /" + b"x" * size + ending), 414)


def test_a_target_a_little_over_gets_414(server: Served) -> None:
    assert server.ask(b"GET /" + b"x" * 8_191 + b" HTTP/1.1\r\nHost: a\r\n\r\n").status == 200
    assert_refused(server.connect().send(b"GET /" + b"x" * 8_192 + b" HTTP/1.1\r\nHost: a\r\n\r\n"), 414)


FRAMING = {
    "long trailer": b"0\r\nX: " + b"x" * 400_000,
    "long trailers in one segment": b"0\r\n" + b"X: %b\r\n" % (b"x" * 1_000) * 50 + b"\r\n",
    "many trailers": b"0\r\n" + b"a: b\r\n" * 5_000,
    "tiny chunks": b"1\r\na\r\n" * 60_000,
    "chunk extension": b"2;" + b"x" * 400_000,
    "extensions on small chunks": (b"1;%b\r\na\r\n" % (b"x" * 100)) * 5_000,
}


@pytest.mark.parametrize("framing", FRAMING.values(), ids=FRAMING.keys())
def test_framing_that_outgrows_the_body_gets_431(server: Served, framing: bytes) -> None:
    peer = server.connect().send(CHUNKED % b"x")
    eventually(lambda: server.app.calls == 1)
    assert_refused(peer.send(framing), 431)
    assert server.app.seen.get(timeout=WAIT_S) == "disconnect"


@pytest.mark.parametrize("expect", [b"", b"Expect: 100-continue\r\n"])
def test_a_declared_body_over_the_bound_gets_413_at_once(server: Served, expect: bytes) -> None:
    head = b"POST / HTTP/1.1\r\nHost: a\r\n%bContent-Length: 1048577\r\n\r\n" % expect
    assert_refused(server.connect().send(head), 413)
    assert server.app.calls == 0


def test_a_body_of_exactly_the_bound_is_served(server: Served) -> None:
    assert len(server.ask(post(b"x", b"x" * 1_048_576)).json["body"]) == 1_048_576


ENDLESS = {
    "application reads": CHUNKED % b"x",
    "application does not read": CHUNKED % b"gated-before-reading",
    "application has not asked yet": CHUNKED.replace(b"Host", b"Expect: 100-continue\r\nHost")
    % b"gated-before-reading",
}


@pytest.mark.parametrize("head", ENDLESS.values(), ids=ENDLESS.keys())
def test_endless_chunks_get_413(loop: str, head: bytes) -> None:
    with serving(Wire(HttpBounds(request_bytes_max=50_000, linger_bytes_max=10**9)), loop) as served:
        peer, chunk = served.connect().send(head), b"1000\r\n" + bytes(0x1000) + b"\r\n"
        for _ in range(1_000):
            peer.send(chunk)
            if select.select([peer.sock], [], [], 0)[0]:
                break
        assert_refused(peer, 413)
        served.ask(GET % b"open")
        assert served.app.seen.get(timeout=WAIT_S) == "disconnect"


def test_a_refusal_can_be_read_by_a_peer_that_goes_on_sending(server: Served) -> None:
    peer = server.connect().send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3000000\r\n\r\n")
    peer.send(bytes(3_000_000))
    assert_refused(peer, 413)


def test_a_peer_that_never_stops_sending_is_cut(server: Served) -> None:
    peer = server.connect().send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 300000000\r\n\r\n")
    with pytest.raises(OSError, match=r"reset|pipe|abort"):
        for _ in range(3_000):
            peer.send(bytes(100_000))


# Large bodies of all connections together


@pytest.fixture
def tight(loop: str) -> Iterator[Served]:
    """Room for three large bodies of 100,000 bytes."""
    with serving(Wire(HttpBounds(requests_bytes_max=300_000)), loop) as served:
        yield served


LARGE = {
    "with its length": post(b"gated", bytes(100_000)),
    "chunked": CHUNKED % b"gated" + b"186a0\r\n" + bytes(100_000) + b"\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("large", LARGE.values(), ids=LARGE.keys())
def test_large_bodies_past_the_room_for_all_get_503_and_small_ones_pass(tight: Served, large: bytes) -> None:
    running = [tight.connect().send(large) for _ in range(3)]
    eventually(lambda: tight.wire.room.bytes == 300_000)
    refused = assert_refused(tight.connect().send(large), 503)
    assert refused.headers["retry-after"] == "1" and refused.json["error"]["data"]["retry_after_ms"] == 1000
    assert tight.wire.refused[Reason.BODIES_FULL] == 1
    assert tight.ask(post(b"x", bytes(32_768))).status == 200
    assert (
        tight.ask(
            CHUNKED % b"x" + b"4000\r\n" + bytes(16_384) + b"\r\n" + b"4000\r\n" + bytes(16_384) + b"\r\n0\r\n\r\n"
        ).status
        == 200
    )
    tight.ask(GET % b"open")
    assert [peer.response().status for peer in running] == [200] * 3
    eventually(lambda: tight.wire.room.bytes == 0)
    assert [peer.send(large).response().status for peer in running] == [200] * 3


def test_room_is_taken_by_what_has_come_of_a_body_and_not_by_what_was_declared(tight: Served) -> None:
    begin, rest = post(b"listening", bytes(90_000))[:-20_000], bytes(20_000)
    whole, refused, gone, last = peers = [tight.connect() for _ in range(4)]
    for number, peer in enumerate(peers, 1):
        peer.send(begin)
        eventually(lambda number=number: tight.wire.room.bytes == number * 70_000)
    whole.send(rest)
    eventually(lambda: tight.wire.room.bytes == 300_000)
    assert_refused(refused.send(rest), 503)
    gone.close()
    eventually(lambda: tight.wire.room.bytes == 160_000)
    last.send(rest)
    tight.ask(GET % b"open")
    assert [peer.response().status for peer in (whole, last)] == [200, 200]
    eventually(lambda: tight.wire.room.bytes == 0)


@pytest.mark.parametrize("large", LARGE.values(), ids=LARGE.keys())
def test_room_is_taken_for_as_long_as_a_request_runs_though_its_client_has_gone(tight: Served, large: bytes) -> None:
    """Clients that give up and send anew would take as much memory as they like."""
    large = large.replace(b"/gated", b"/kept")
    peers = [tight.connect().send(large) for _ in range(3)]
    eventually(lambda: tight.wire.room.bytes == 300_000)
    for peer in peers:
        peer.close()
    eventually(lambda: not tight.wire.connections)
    assert_refused(tight.connect().send(large), 503)
    tight.ask(GET % b"open")
    eventually(lambda: tight.wire.room.bytes == 0)
    assert tight.ask(large).status == 200


def test_a_chunked_body_takes_room_for_all_of_it_once_it_is_large(tight: Served) -> None:
    peer = tight.connect().send(CHUNKED % b"gated")
    for number in range(1, 5):
        peer.send(b"3000\r\n" + bytes(12_288) + b"\r\n")
        if number > 2:
            eventually(lambda number=number: tight.wire.room.bytes == number * 12_288)
    tight.ask(GET % b"open")
    assert peer.send(b"0\r\n\r\n").response().status == 200
    eventually(lambda: tight.wire.room.bytes == 0)


def test_room_comes_back_where_the_answer_comes_before_the_body(tight: Served) -> None:
    head, body = post(b"early", bytes(200_000))[:-200_000], bytes(200_000)
    peers = [tight.connect().send(head) for _ in range(4)]
    assert [peer.response().status for peer in peers] == [200] * 4
    assert [peer.send(body + GET % b"x").response().status for peer in peers] == [200] * 4
    eventually(lambda: tight.wire.room.bytes == 0)


# Lies


def test_bytes_beyond_the_declared_length_are_the_next_request(server: Served) -> None:
    peer = server.connect().send(post(b"x", b"hello") + b"surplus\r\n\r\n")
    assert peer.response().json["body"] == "hello"
    assert_refused(peer, 400)


def test_a_body_shorter_than_declared_gets_408_and_the_application_a_disconnect(short: Served) -> None:
    peer = short.connect().send(b"POST /mcp HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nhello")
    assert assert_refused(peer, 408).json["jsonrpc"] == "2.0"
    assert short.app.seen.get(timeout=WAIT_S) == "disconnect"


def test_a_peer_that_hangs_up_in_mid_body_is_a_disconnect(server: Served) -> None:
    peer = server.connect().send(CHUNKED % b"x" + b"2\r\nhi\r\n")
    eventually(lambda: server.app.calls == 1)
    peer.close()
    assert server.app.seen.get(timeout=WAIT_S) == "disconnect"


# Deadlines


def test_a_half_sent_head_gets_408(short: Served) -> None:
    began = time.monotonic()
    assert_refused(short.connect().send(b"GET / HTTP/1.1\r\nHost: a\r\nX: "), 408)
    assert time.monotonic() - began >= SHORT_S - GRAIN_S


def test_a_head_that_trickles_gets_408(short: Served) -> None:
    peer = short.connect()
    peer.trickle(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 1000)
    assert_refused(peer, 408)


@pytest.mark.parametrize(
    "path", [b"x", b"gated-before-reading"], ids=["application reads", "application does not read"]
)
@pytest.mark.parametrize("framing", [b"Content-Length: 9999", b"Transfer-Encoding: chunked\r\nX: 1"])
def test_a_body_that_trickles_gets_408(short: Served, path: bytes, framing: bytes) -> None:
    peer = short.connect().send(b"POST /%b HTTP/1.1\r\nHost: a\r\n%b\r\n\r\n" % (path, framing))
    peer.trickle(b"1\r\nx\r\n" * 200)
    assert_refused(peer, 408)
    short.ask(GET % b"open")
    assert short.app.seen.get(timeout=WAIT_S) == "disconnect"


def test_a_body_that_trickles_after_the_answer_ends_the_connection(short: Served) -> None:
    peer = short.connect().send(b"POST /early HTTP/1.1\r\nHost: a\r\nContent-Length: 9999\r\n\r\n")
    assert peer.response().body == b"early"
    peer.trickle(b"x" * 200)
    assert peer.is_at_end()


def test_a_connection_that_says_nothing_is_closed_silently(short: Served) -> None:
    assert short.connect().is_at_end()


def test_blank_lines_do_not_keep_a_connection(short: Served) -> None:
    peer = short.connect()
    peer.trickle(b"\r\n" * 500)
    assert peer.is_gone()


def test_a_connection_is_closed_when_idle_after_an_answer(short: Served) -> None:
    peer = short.connect().send(GET % b"x")
    assert peer.response().status == 200
    began = time.monotonic()
    assert peer.is_at_end()
    assert time.monotonic() - began >= SHORT_S / 2


def test_a_half_sent_second_head_gets_408(short: Served) -> None:
    peer = short.connect().send(GET % b"x" + b"GET /second HT")
    assert peer.response().status == 200
    assert_refused(peer, 408)


def test_no_deadline_runs_while_a_request_is_worked_on(short: Served) -> None:
    waiting = short.connect().send(GET % b"gated")
    with_second_head = short.connect().send(GET % b"gated" + b"GET /second HT")
    with_late_head = short.connect().send(GET % b"gated" + b"GET /late HT")
    for _ in range(2):
        short.pass_a_deadline()
    with_late_head.send(b"TP/1.1\r\nHost: a\r\n\r\n")
    assert short.ask(GET % b"open").status == 200
    assert waiting.response().status == 200
    assert [with_late_head.response().json["path"] for _ in range(2)] == ["/gated", "/late"]
    assert with_second_head.response().status == 200
    assert_refused(with_second_head, 408)


def test_the_body_deadline_stands_still_while_the_application_does_not_read(short: Served) -> None:
    body = b"x" * 900_000
    peer = short.connect()
    sender = threading.Thread(target=peer.send, args=(post(b"gated-before-reading", body),))
    sender.start()
    for _ in range(2):
        short.pass_a_deadline()
    assert short.ask(GET % b"open").status == 200
    assert len(peer.response().json["body"]) == len(body)
    sender.join(WAIT_S)


@pytest.mark.parametrize("path", [b"bytes/8000000", b"streamed/8000000"])
@pytest.mark.parametrize("behind", [0, 1])
def test_a_reader_that_does_not_read_is_cut(
    short: Served, path: bytes, behind: int, caplog: pytest.LogCaptureFixture
) -> None:
    before = short.wire.refused[Reason.READER_TOO_SLOW]
    peer = short.connect(receive_buffer_bytes=4096).send(GET % path + GET % b"x" * behind)
    assert short.app.seen.get(timeout=WAIT_S) == "sent"
    eventually(lambda: not short.wire.connections)
    assert short.wire.refused[Reason.READER_TOO_SLOW] == before + 1
    with contextlib.suppress(ConnectionResetError):
        assert len(peer.response().body) < 8_000_000
    assert not [record for record in caplog.records if record.name == "asyncio"], "written to after the end"


class Circle:
    def __init__(self) -> None:
        self.itself = self


def test_garbage_is_looked_for_once_large_bodies_would_be_much_of_it(loop: str) -> None:
    """Not by the collector's own count of objects, which knows no bytes."""
    gc.collect()
    gc.disable()
    try:
        with serving(Wire(HttpBounds()), loop) as served:
            peer = served.connect()
            garbage = weakref.ref(Circle())
            for sent_bytes in range(0, COLLECTED_AFTER_BYTES, 1_000_000):
                assert garbage() is not None, sent_bytes
                assert peer.send(post(b"x", bytes(1_000_000))).response().status == 200
            eventually(lambda: garbage() is None)
    finally:
        gc.enable()


def test_of_answers_that_nobody_reads_the_oldest_are_cut_past_the_room_for_all(loop: str) -> None:
    with serving(Wire(HttpBounds(responses_bytes_max=20_000_000)), loop, send_buffer_bytes=4096) as served:
        peers = []
        for number in range(1, 5):
            peers.append(served.connect(receive_buffer_bytes=4096).send(GET % b"bytes/8000000"))
            assert served.app.seen.get(timeout=WAIT_S) == "sent"
            eventually(lambda number=number: served.wire.refused[Reason.ANSWERS_FULL] == max(0, number - 2))  # type: ignore[misc]
        assert 15_000_000 < served.wire.unread_bytes < 16_000_000
        for cut in peers[:2]:
            with contextlib.suppress(ConnectionResetError):
                assert len(cut.response().body) < 8_000_000
        assert [len(peer.response().body) for peer in peers[2:]] == [8_000_000] * 2
        eventually(lambda: served.wire.unread_bytes == 0)
        large = served.connect(receive_buffer_bytes=4096).send(GET % b"bytes/30000000")
        assert len(large.response().body) == 30_000_000, "one alone may be larger"
        assert served.wire.refused[Reason.ANSWERS_FULL] == 2


def test_who_reads_its_answer_slowly_is_not_cut_for_those_who_read_nothing(loop: str) -> None:
    with serving(Wire(HttpBounds(responses_bytes_max=20_000_000)), loop, send_buffer_bytes=4096) as served:
        peers = [served.connect(receive_buffer_bytes=4096) for _ in range(3)]

        def ask(peer: Peer, count: int) -> None:
            peer.send(GET % b"bytes/%d" % count)
            assert served.app.seen.get(timeout=WAIT_S) == "sent"

        slow, deaf, late = peers
        ask(slow, 12_000_000)
        read = len(slow.file.read(6_000_000))
        ask(deaf, 9_000_000)
        eventually(lambda: served.wire.unread_bytes > 13_000_000)
        assert served.wire.refused[Reason.ANSWERS_FULL] == 0, "what was read is unread no more"
        read += len(slow.file.read(1_000_000))
        ask(late, 9_000_000)
        eventually(lambda: served.wire.refused[Reason.ANSWERS_FULL] == 1)
        read += len(slow.file.read(12_000_000 - read))
        assert read == 12_000_000
        with contextlib.suppress(ConnectionResetError):
            assert len(deaf.response().body) < 9_000_000
        assert len(late.response().body) == 9_000_000


@pytest.mark.parametrize("size", [50_000, 8_000_000], ids=["under the high-water mark", "over it"])
def test_a_closed_connection_that_cannot_flush_is_cut(loop: str, size: int) -> None:
    with serving(Wire(SHORT), loop, send_buffer_bytes=4096) as served:
        served.connect(receive_buffer_bytes=4096).send(b"GET /bytes/%d HTTP/1.0\r\n\r\n" % size)
        assert served.app.seen.get(timeout=WAIT_S) == "sent"
        eventually(lambda: not served.wire.connections)
        assert served.wire.refused[Reason.READER_TOO_SLOW] == 1


def test_a_deadline_counts_from_its_own_beginning(loop: str) -> None:
    bounds = HttpBounds(header_read_timeout_s=SHORT_S, body_read_timeout_s=SHORT_S)
    with serving(Wire(bounds), loop) as served:
        for half in (b"GET / HT", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n"):
            peer = served.connect()
            served.pass_a_deadline()
            began = time.monotonic()
            assert_refused(peer.send(half), 408)
            assert time.monotonic() - began >= SHORT_S - GRAIN_S


def test_the_idle_deadline_counts_from_the_end_of_a_body_that_outlived_its_answer(loop: str) -> None:
    idle_s = 4 * SHORT_S  # a peer of ours may be held up between its connection and its first byte
    with serving(Wire(HttpBounds(header_read_timeout_s=SHORT_S, idle_timeout_s=idle_s)), loop) as served:
        peer = served.connect().send(b"POST /early HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n")
        assert peer.response().body == b"early"
        served.pass_a_deadline()
        began = time.monotonic()
        assert peer.send(b"hello").is_at_end()
        assert time.monotonic() - began >= idle_s - GRAIN_S


def test_a_refused_peer_that_stays_is_cut(short: Served) -> None:
    assert_refused(short.connect().send(b"\x16\x03"), 400)
    eventually(lambda: not short.wire.connections)


def test_a_wire_serves_one_server_after_another(loop: str) -> None:
    wire = Wire(SHORT)
    for _ in range(2):
        with serving(wire, loop) as served:
            assert served.connect().is_at_end()


def test_500_idle_connections_disturb_nobody_and_are_closed(short: Served) -> None:
    idle = [short.connect() for _ in range(500)]
    for number in range(20):
        assert short.ask(post(b"x", b"%d" % number)).json["body"] == str(number)
    assert all(peer.is_at_end() for peer in idle)


def test_connections_over_the_bound_are_closed_at_once(loop: str) -> None:
    with serving(Wire(HttpBounds(connections_max=3)), loop) as served:
        first, *_others = [served.connect() for _ in range(3)]
        assert first.send(GET % b"x").response().status == 200
        with contextlib.suppress(ConnectionResetError):
            assert served.connect().is_at_end()
        assert served.wire.refused[Reason.CONNECTIONS_FULL] == 1
        first.close()
        eventually(lambda: len(served.wire.connections) == 2)
        assert served.ask(GET % b"x").status == 200


# Pipelines


@pytest.mark.parametrize("first", [b"x", b"gated"], ids=["fast", "slow"])
def test_pipelined_requests_are_answered_in_order(server: Served, first: bytes) -> None:
    paths = [first, *(b"p%d" % number for number in range(20))]
    requests = [post(path, path) if number % 2 else GET % path for number, path in enumerate(paths)]
    peer = server.connect().send(b"".join(requests))
    server.ask(GET % b"open")
    assert [peer.response().json["path"] for _ in paths] == ["/" + path.decode() for path in paths]
    assert peer.send(GET % b"last").response().json["path"] == "/last"


def test_more_pipelined_requests_than_the_bound_end_the_connection_in_order(server: Served) -> None:
    peer = server.connect().send(GET % b"gated" + GET % b"x" * 5_000)
    eventually(lambda: server.wire.refused[Reason.PIPELINE_FULL] > 0)
    server.ask(GET % b"open")
    assert [peer.response().status for _ in range(1 + 32)] == [200] * 33
    assert_refused(peer, 503)


@pytest.mark.parametrize(
    ("path", "members"),
    [
        (b"x", ["error"]),
        (b"api/v1/jsonrpc", ["jsonrpc", "error", "id"]),
        (b"mcp?x=1", ["jsonrpc", "error", "id"]),
    ],
)
def test_one_pipelined_request_too_many_is_refused_as_its_door_refuses(
    server: Served, path: bytes, members: list[str]
) -> None:
    peer = server.connect().send(GET % b"gated" + post(path, b"{}") * 40)
    eventually(lambda: server.wire.refused[Reason.PIPELINE_FULL] > 0)
    server.ask(GET % b"open")
    assert [peer.response().status for _ in range(1 + 32)] == [200] * 33
    refused = assert_refused(peer, 503)
    assert list(refused.json) == members and refused.json.get("id") is None
    assert refused.json["error"]["code"] == -32006
    assert refused.json["error"]["data"]["retry_after_ms"] == 1000
    assert refused.headers["retry-after"] == "1"


def test_requests_behind_a_listening_application_wait_unread(server: Served) -> None:
    peer = server.connect().send(GET % b"listening")
    assert server.app.seen.get(timeout=WAIT_S) == "listening"
    for _ in range(60):  # in one read of 256 KB they are fewer than the bound
        peer.send(post(b"x", b"x" * 10_000))
    server.ask(GET % b"open")
    assert [peer.response().status for _ in range(61)] == [200] * 61


@pytest.mark.parametrize(
    "bad", [b"\x16\x03", b"GET / HTTP/1.1\r\n\r\n", CHUNKED % b"x" + b"zz\r\n"], ids=["bytes", "head", "body"]
)
@pytest.mark.parametrize("between", [0, 3])
def test_a_refusal_waits_for_the_answers_before_it(server: Served, bad: bytes, between: int) -> None:
    peer = server.connect().send(GET % b"gated" + GET % b"x" * between + bad)
    eventually(lambda: server.app.calls == 1)
    server.ask(GET % b"open")
    assert [peer.response().status for _ in range(1 + between)] == [200] * (1 + between)
    assert_refused(peer, 400)


def test_a_refusal_that_waited_can_be_read_by_a_peer_that_goes_on_sending(server: Served) -> None:
    peer = server.connect()
    peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
    peer.send(GET % b"gated" + b"\x16\x03")
    eventually(lambda: server.app.calls == 1)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(peer.send, bytes(3_000_000))
        server.ask(GET % b"open")
        assert peer.response().status == 200
        sending.result(WAIT_S)
    assert_refused(peer, 400)


def test_a_pipelined_body_is_read_when_its_turn_comes(server: Served) -> None:
    peer = server.connect().send(GET % b"gated" + b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhello")
    eventually(lambda: server.app.calls == 1)
    server.ask(GET % b"open")
    assert peer.response().json["path"] == "/gated"
    assert peer.send(b"world").response().json["body"] == "helloworld"


def test_a_server_that_stops_ends_idle_and_refused_connections(loop: str) -> None:
    with serving(Wire(HttpBounds()), loop) as served:
        idle, refused = served.connect().send(GET % b"x"), served.connect().send(b"\x16\x03")
        assert idle.response().status == 200
        assert refused.response().status == 400
        served.server.should_exit = True
        assert idle.is_at_end()
        assert refused.is_at_end()


# The ground that this stands on


def test_the_installed_uvicorn_has_the_internals_that_the_protocol_relies_on() -> None:
    async def build() -> BoundedHttpProtocol:
        config = uvicorn.Config(Echo(), http=protocol_class(Wire()), ws="none", log_config=None)
        config.load()
        return protocol_class(Wire())(config, uvicorn.Server(config).server_state, {})

    ours = asyncio.run(build())
    overridden = set(vars(BoundedHttpProtocol)) & set(vars(HttpToolsProtocol))
    expected = """__init__ connection_made connection_lost data_received pause_writing resume_writing on_message_begin
        on_header on_headers_complete on_body on_message_complete on_response_complete _should_upgrade
        _start_asgi_task"""
    assert {name for name in overridden if not name.startswith("__") or name == "__init__"} == set(expected.split())
    attributes = "loop parser transport flow pipeline cycle scope headers url expect_100_continue server_state"
    assert set(attributes.split()) - {"url"} <= set(vars(ours))
    assert len(vars(ours)) <= 30, "slower attributes from here on"
    assert hasattr(HttpToolsProtocol, "_start_asgi_task")
    transport_uses = set(re.findall(r"self\.transport\.(\w+)", inspect.getsource(RequestResponseCycle)))
    assert transport_uses == {"write", "close", "is_closing"}, "Exchange has just these"
    cycle_attributes = """response_started response_complete disconnected more_body keep_alive body logger
        message_event waiting_for_100_continue"""
    source = inspect.getsource(RequestResponseCycle.__init__)
    assert all(f"self.{name}" in source for name in cycle_attributes.split())
    flow_attributes = {"read_paused", "write_paused", "pause_reading", "resume_reading"}
    assert flow_attributes <= set(dir(FlowControl(asyncio.Transport())))


def test_a_sweep_is_never_rarer_than_a_quarter_of_the_smallest_deadline() -> None:
    assert HttpBounds().sweep_interval_s == 0.5
    assert HttpBounds(linger_timeout_s=60).sweep_interval_s == 1
    assert SHORT.sweep_interval_s == SHORT_S / 4
