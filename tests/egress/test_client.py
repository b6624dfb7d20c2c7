"""The way out: what it reaches, what it refuses, and that nothing gets past its bounds or stays behind."""

from __future__ import annotations

import asyncio
import gzip
import os
import socket
import threading
import zlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from app.egress.body import CHUNKS_IN_A_TURN, INFLATE_BYTES, read_body
from app.errors import ToolError
from app.names import LOOKUPS_MAX
from tests.egress.addresses import ODD_URLS, REFUSED_ADDRESSES, words
from tests.egress.asking import LOOPBACK, answering, egress, failure_of, get
from tests.origin import WAIT_S_MAX, Received, Reply, origin, redirect, response

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize("address", REFUSED_ADDRESSES)
async def test_name_that_resolves_to_an_address_that_is_not_public_is_refused(address: str) -> None:
    async with egress("", resolver=answering([address])) as client:
        error = await failure_of(get(client, "http://name.test/"))
    assert (error.code, str(error), error.retryable) == ("EGRESS_REFUSED", "egress refused", False)


@pytest.mark.parametrize("url", ODD_URLS)
async def test_url_that_two_parsers_could_read_in_two_ways_is_not_accepted(url: str) -> None:
    resolver = answering(["1.1.1.1"])
    async with egress("0.0.0.0/0", resolver=resolver) as client:
        error = await failure_of(get(client, url))
    assert error.code == "EGRESS_INVALID_REQUEST"
    assert resolver.asked == []  # type: ignore[attr-defined]
    assert "1.1.1.1" not in str(error)
    assert "example" not in str(error)


async def test_request_and_response_travel_whole() -> None:
    made = response(b"made", status="201 Created", x_a="1", content_type="text/plain")
    async with origin({"/x": made}) as server, egress() as client:
        answer = await client.request(
            "POST",
            server.url("/x?a=1"),
            headers={"X-Own": "yes", "Connection": "close", "Content-Length": "999", "Accept-Encoding": "br"},
            params={"b": "2"},
            body=b"sent",
            timeout_s=WAIT_S_MAX,
        )
    assert (answer.status_code, answer.body, answer.headers["x-a"]) == (201, b"made", "1")
    assert answer.url == server.url("/x?a=1&b=2")
    (request,) = server.received
    assert (request.method, request.target, request.body) == ("POST", "/x?a=1&b=2", b"sent")
    assert request.headers == {
        "host": f"127.0.0.1:{server.port}",
        "accept": "*/*",
        "user-agent": "agentcore-tools",
        "x-own": "yes",
        "accept-encoding": "gzip",
        "content-length": "4",
    }


@pytest.mark.parametrize(
    "headers",
    [
        {"X-A": "1\r\nX-B: 2"},
        {"X-A": "1\nX-B: 2"},
        {"X-A": "nul\x00"},
        {"X-A": "ümlaut"},
        {"X-A\r\nX-B": "1"},
        {"X A": "1"},
        {"": "1"},
        {"X-A:": "1"},
        {"Host": "internal"},
        {"hOsT": "internal"},
        {"Transfer-Encoding": "chunked"},
        {"Upgrade": "websocket"},
        {"TE": "trailers"},
        {"Expect": "100-continue"},
        {"Proxy-Authorization": "Basic x"},
        {"X-A": "1", "x-a": "2"},
        {"X-A": "a" * 20_000},
        {f"X-{number}": "1" for number in range(65)},
    ],
)
async def test_header_that_would_write_more_than_a_header_is_not_accepted(headers: dict[str, str]) -> None:
    async with origin() as server, egress() as client:
        error = await failure_of(get(client, server.url(), headers=headers))
        assert error.code == "EGRESS_INVALID_REQUEST"
        assert server.accepted == 0


@pytest.mark.parametrize("method", ["CONNECT", "TRACE", "get", "GET /", "", "GET\r\n"])
async def test_method_outside_the_list_is_not_accepted(method: str) -> None:
    async with egress() as client:
        error = await failure_of(client.request(method, "http://127.0.0.1/", timeout_s=1))
    assert error.code == "EGRESS_INVALID_REQUEST"


async def test_request_body_is_bounded() -> None:
    async with egress() as client:
        call = client.request("POST", "http://127.0.0.1/", body=bytes(2**20 + 1), timeout_s=1)
        assert (await failure_of(call)).code == "EGRESS_INVALID_REQUEST"


async def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async with origin({"/": response(b"direct")}) as server, origin() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "https_proxy"):
            monkeypatch.setenv(name, proxy.url())
        async with egress() as client:
            assert (await get(client, server.url())).body == b"direct"
        assert proxy.accepted == 0


async def test_cookies_are_not_kept() -> None:
    async with origin({"/": response(b"", set_cookie="a=b")}) as server, egress() as client:
        assert (await get(client, server.url())).headers["set-cookie"] == "a=b"
        await get(client, server.url())
        assert "cookie" not in server.received[1].headers


async def test_name_is_resolved_once_and_connected_to_the_checked_address() -> None:
    resolver = answering([LOOPBACK], ["127.0.0.2"])
    async with origin({"/": response(b"first")}) as server:
        async with egress("127.0.0.1", resolver=resolver) as client:
            assert (await get(client, server.url(host="rebind.test"))).body == b"first"
            assert resolver.asked == ["rebind.test"]  # type: ignore[attr-defined]
            assert server.received[0].headers["host"] == f"rebind.test:{server.port}"
            error = await failure_of(get(client, server.url(host="rebind.test")))
        assert error.code == "EGRESS_REFUSED"
        assert len(server.received) == 1


@pytest.mark.parametrize("answer", [[LOOPBACK, "10.0.0.1"], ["10.0.0.1", LOOPBACK], [LOOPBACK, "not an address"]])
async def test_one_bad_address_among_good_ones_refuses_all(answer: list[str]) -> None:
    async with origin({"/": response()}) as server, egress(resolver=answering(answer)) as client:
        assert (await failure_of(get(client, server.url(host="mixed.test")))).code == "EGRESS_REFUSED"
        assert server.accepted == 0


async def cut_off(request: Received, writer: asyncio.StreamWriter) -> None:
    """Read the request and close without a word."""


@pytest.mark.parametrize("path", ["/", "/moved", "/done"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "POST", "PATCH"])
async def test_error_after_a_request_that_a_repeat_would_do_twice_says_so(method: str, path: str) -> None:
    replies: dict[str, Reply] = {"/": cut_off, "/moved": redirect("/", 307), "/done": redirect("/", 303)}
    async with origin(replies) as server, egress() as client:
        error = await failure_of(client.request(method, server.url(path), timeout_s=WAIT_S_MAX))
        assert (error.code, error.retryable) == ("EGRESS_FAILED", True)
        assert error.in_doubt is (method in ("POST", "PATCH"))
        keyed = client.request(method, server.url(path), headers={"Idempotency-Key": "k"}, timeout_s=WAIT_S_MAX)
        assert not (await failure_of(keyed)).in_doubt


async def test_request_that_was_never_sent_leaves_no_doubt() -> None:
    with socket.socket() as deaf:
        deaf.bind((LOOPBACK, 0))
        async with egress() as client:
            url = f"http://{LOOPBACK}:{deaf.getsockname()[1]}/"
            error = await failure_of(client.request("POST", url, timeout_s=WAIT_S_MAX))
    assert (error.code, error.retryable, error.in_doubt) == ("EGRESS_FAILED", True, False)


async def test_next_address_is_tried_when_one_does_not_answer() -> None:
    async with origin({"/": response(b"second")}) as server:
        resolver = answering(["127.0.0.2", LOOPBACK])
        async with egress("127.0.0.0/8", resolver=resolver) as client:
            assert (await get(client, server.url(host="two.test"))).body == b"second"


async def test_resolver_that_hangs_ends_at_the_deadline_and_harms_no_other_call() -> None:
    never = asyncio.Event()

    async def resolve(host: str, port: int) -> Sequence[str]:
        if host == "hung.test":
            await never.wait()
        return [LOOPBACK]

    async with origin({"/": response(b"ok")}) as server, egress(pool_size=1, resolver=resolve) as client:
        hung = [asyncio.create_task(get(client, "http://hung.test/", timeout_s=0.2)) for _ in range(20)]
        assert (await get(client, server.url(host="well.test"))).body == b"ok"
        errors = await asyncio.gather(*hung, return_exceptions=True)
    assert {(error.code, error.retryable) for error in errors if isinstance(error, ToolError)} == {
        ("EGRESS_TIMEOUT", True)
    }
    assert len(errors) == 20


async def test_hung_lookups_keep_a_bounded_number_of_threads_and_recover(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def getaddrinfo(host: str, *args: Any, **options: Any) -> list[Any]:
        released.wait(WAIT_S_MAX)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (LOOPBACK, 0))]

    def lookups() -> int:
        return sum(thread.name == "resolve" for thread in threading.enumerate())

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    async with origin({"/": response(b"ok")}) as server, egress() as client:
        names = [f"n{number}.test" for number in range(LOOKUPS_MAX + 8)] * 3
        calls = [failure_of(get(client, f"http://{name}/", timeout_s=0.3)) for name in names]
        assert {error.code for error in await asyncio.gather(*calls)} == {"EGRESS_TIMEOUT"}
        assert lookups() == LOOKUPS_MAX
        assert (await get(client, server.url())).body == b"ok"
        released.set()
        assert (await get(client, server.url(host="later.test"))).body == b"ok"


async def test_names_of_this_machine_resolve_and_are_refused_unless_allowed() -> None:
    async with origin({"/": response(b"ok")}) as server:
        async with egress("") as client:
            assert (await failure_of(get(client, server.url(host="localhost")))).code == "EGRESS_REFUSED"
        async with egress(f"localhost:{server.port}") as client:
            assert (await get(client, server.url(host="localhost"))).body == b"ok"


async def test_name_without_an_address_is_a_failure_to_try_again() -> None:
    async with egress(resolver=answering([])) as client:
        error = await failure_of(get(client, "http://nowhere.test/"))
    assert (error.code, error.retryable) == ("EGRESS_FAILED", True)
    assert "nowhere" not in str(error)


async def test_nobody_listening_is_a_failure_to_try_again() -> None:
    async with origin() as server:
        pass
    async with egress() as client:
        error = await failure_of(get(client, server.url()))
    assert (error.code, error.retryable) == ("EGRESS_FAILED", True)
    assert str(server.port) not in str(error)


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 200 OK\r\n", b"garbage\r\n\r\n", b"HTTP/1.1 200 OK\r\na b: c\r\n\r\n"]
)
async def test_answer_that_is_no_http_is_a_failure(answer: bytes) -> None:
    async def speak(request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)

    async with origin({"/": speak}) as server, egress() as client:
        assert (await failure_of(get(client, server.url()))).code == "EGRESS_FAILED"
        assert (client.pool.busy, client.pool.idle) == (0, 0)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_three_redirects_are_followed_and_a_fourth_is_not(status: int) -> None:
    replies = {f"/{number}": redirect(f"/{number + 1}", status) for number in range(4)} | {"/4": response(b"end")}
    async with origin({**replies}) as server, egress() as client:
        answer = await get(client, server.url("/1"))
        assert (answer.body, answer.url) == (b"end", server.url("/4"))
        assert (await failure_of(get(client, server.url("/0")))).code == "EGRESS_TOO_MANY_REDIRECTS"


@pytest.mark.parametrize(
    "location",
    [
        *words("""
    http://10.0.0.1/ http://127.0.0.2/ http://169.254.169.254/latest/ http://[::1]/ http://2130706433/ //10.0.0.1/
    http://127.1/ file:///etc/passwd gopher://127.0.0.1/ http://user:word@127.0.0.1/ http://[::ffff:10.0.0.1]/
    http://internal.test/ http://1.1.1.1:22/"""),
        "http://127.0.0.1/\tb",
        "http:\\\\127.0.0.1\\",
        "http://127.0.0.1/ b",
    ],
)
async def test_redirect_is_checked_like_a_first_request(location: str) -> None:
    resolver = answering(["192.168.0.1"])
    async with origin({"/": redirect(location)}) as server, egress(resolver=resolver) as client:
        error = await failure_of(get(client, server.url()))
    assert (error.code, str(error)) == ("EGRESS_REFUSED", "egress refused")


@pytest.mark.parametrize(
    ("method", "status", "then"),
    [
        ("POST", 301, "GET"),
        ("POST", 302, "GET"),
        ("POST", 303, "GET"),
        ("PUT", 303, "GET"),
        ("HEAD", 303, "HEAD"),
        ("PUT", 302, "PUT"),
        ("POST", 307, "POST"),
        ("POST", 308, "POST"),
    ],
)
async def test_method_and_body_after_a_redirect_follow_rfc_9110(method: str, status: int, then: str) -> None:
    async with origin({"/": redirect("/end", status), "/end": response()}) as server, egress() as client:
        headers = {"Content-Type": "text/plain", "X-Kept": "1"}
        body = None if method == "HEAD" else b"body"
        await client.request(method, server.url(), headers=headers, body=body, timeout_s=WAIT_S_MAX)
    last = server.received[-1]
    assert (last.method, last.headers["x-kept"]) == (then, "1")
    assert last.body == (b"body" if then in ("POST", "PUT") else b"")
    assert ("content-type" in last.headers) == (then != "GET")


CREDENTIALS = {
    "Authorization": "Bearer s",
    "Cookie": "s=1",
    "X-API-Key": "s",
    "X-Auth-Token": "s",
    "Api-Key": "s",
    "X-Vendor-Secret-We-Never-Heard-Of": "s",
}


async def test_credentials_stay_with_the_origin_that_they_were_meant_for() -> None:
    async with origin({"/": response()}) as other, origin({"/same": redirect("/away")}) as server, egress() as client:
        server.replies["/away"] = redirect(other.url())
        await get(client, server.url("/same"), headers=CREDENTIALS | {"Accept": "text/html"})
        same = server.received[1].headers
        away = other.received[0].headers
    assert {name.lower() for name in CREDENTIALS} <= same.keys()
    assert not {name.lower() for name in CREDENTIALS} & away.keys()
    assert away["accept"] == "text/html"


async def test_credentials_do_not_come_back_after_leaving_the_origin() -> None:
    async with origin({"/end": response()}) as server, origin() as other, egress() as client:
        server.replies["/"] = redirect(other.url())
        other.replies["/"] = redirect(server.url("/end"))
        await get(client, server.url(), headers=CREDENTIALS)
        assert "authorization" not in server.received[1].headers


async def test_other_name_for_the_same_address_is_another_origin() -> None:
    async with origin({"/end": response()}) as server, egress(resolver=answering([LOOPBACK])) as client:
        server.replies["/"] = redirect(server.url("/end", host="b.test"))
        await get(client, server.url(host="a.test"), headers=CREDENTIALS)
        assert "authorization" not in server.received[1].headers


async def test_declared_length_over_the_bound_is_refused_before_it_is_read() -> None:
    async def speak(request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1001\r\n\r\n")
        await asyncio.Event().wait()

    async with origin({"/": speak}) as server, egress() as client:
        error = await failure_of(get(client, server.url(), response_bytes_max=1000))
        assert error.code == "EGRESS_RESPONSE_TOO_LARGE"
        await server.until(lambda: server.open == 0)


async def test_endless_body_is_cut_at_the_bound() -> None:
    async def speak(request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"1000\r\n" + bytes(0x1000) + b"\r\n")
            await writer.drain()

    async with origin({"/": speak}) as server, egress() as client:
        error = await failure_of(get(client, server.url(), response_bytes_max=100_000))
        assert error.code == "EGRESS_RESPONSE_TOO_LARGE"
        await server.until(lambda: server.open == 0)


async def test_body_in_chunks_of_a_byte_leaves_turns_to_others() -> None:
    """What has arrived is handed over without a wait: 64 KiB from the socket hold 10,900 such chunks."""
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async def arrived() -> AsyncIterator[bytes]:
        for _ in range(10_000):
            yield b"x"

    beside = asyncio.create_task(others())
    try:
        assert await read_body(arrived(), {}, 10_000) == b"x" * 10_000
    finally:
        beside.cancel()
    assert turns >= 10_000 // CHUNKS_IN_A_TURN - 1


async def test_body_of_exactly_the_bound_passes() -> None:
    async with origin({"/": response(bytes(1000))}) as server, egress() as client:
        assert len((await get(client, server.url(), response_bytes_max=1000)).body) == 1000


async def test_body_that_trickles_is_cut_at_the_deadline_of_the_whole_call() -> None:
    async def speak(request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0)

    async with origin({"/": speak}) as server, egress() as client:
        error = await failure_of(get(client, server.url(), timeout_s=0.3, response_bytes_max=2**40))
        assert (error.code, error.retryable) == ("EGRESS_TIMEOUT", True)
        await server.until(lambda: server.open == 0)
        assert (client.pool.busy, client.pool.idle) == (0, 0)


async def test_redirects_share_one_deadline() -> None:
    async def silent(request: Received, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async with origin({"/": redirect("/silent"), "/silent": silent}) as server, egress() as client:
        assert (await failure_of(get(client, server.url(), timeout_s=0.2))).code == "EGRESS_TIMEOUT"
        await server.until(lambda: server.open == 0)


@pytest.mark.parametrize("timeout_s", [0.0, -1.0])
async def test_call_without_time_left_is_over_at_once(timeout_s: float) -> None:
    async with origin({"/": response()}) as server, egress() as client:
        assert (await failure_of(get(client, server.url(), timeout_s=timeout_s))).code == "EGRESS_TIMEOUT"


async def test_headers_without_end_are_a_failure() -> None:
    async def speak(request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(b"x-a: " + b"a" * 1000 + b"\r\n")
            await writer.drain()

    async with origin({"/": speak}) as server, egress() as client:
        assert (await failure_of(get(client, server.url()))).code == "EGRESS_FAILED"
        await server.until(lambda: server.open == 0)


@pytest.mark.parametrize("size", [0, 1, 100_000, 256 * 1024, 256 * 1024 + 1, 900_000])
async def test_gzip_is_inflated(size: int) -> None:
    plain = bytes(size // 2) + os.urandom(size - size // 2)
    async with origin({"/": response(gzip.compress(plain), content_encoding="gzip")}) as server, egress() as client:
        assert (await get(client, server.url(), response_bytes_max=2**20)).body == plain


@pytest.mark.parametrize("pieces", [1, 2])
async def test_gzip_that_ends_where_a_piece_of_it_ends_is_whole(pieces: int) -> None:
    plain = bytes(pieces * INFLATE_BYTES)  # so little when compressed that all of it comes at once
    async with origin({"/": response(gzip.compress(plain), content_encoding="gzip")}) as server, egress() as client:
        assert (await get(client, server.url(), response_bytes_max=2**20)).body == plain


async def test_gzip_members_follow_one_another() -> None:
    body = gzip.compress(b"one ") + gzip.compress(b"") + gzip.compress(b"two")
    async with origin({"/": response(body, content_encoding="gzip")}) as server, egress() as client:
        assert (await get(client, server.url())).body == b"one two"


async def test_gzip_bomb_is_cut_at_the_bound_without_inflating_it() -> None:
    deflate = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    million = bytes(1_000_000)
    bomb = b"".join(deflate.compress(million) for _ in range(500)) + deflate.flush()
    assert len(bomb) < 1_000_000
    async with origin({"/": response(bomb, content_encoding="gzip")}) as server, egress() as client:
        before = _peak_memory_bytes()
        error = await failure_of(get(client, server.url(), response_bytes_max=1_000_000))
        assert error.code == "EGRESS_RESPONSE_TOO_LARGE"
        assert _peak_memory_bytes() - before < 50_000_000  # of the 500,000,000 that it would fill


def _peak_memory_bytes() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("peak memory is read from Linux's /proc")
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        (b"not gzip", "gzip"),
        (gzip.compress(b"x" * 1000)[:-5], "gzip"),
        (gzip.compress(b"x") + b"garbage", "gzip"),
        (gzip.compress(b"") * 1000, "gzip"),
        (b"whatever", "br"),
        (gzip.compress(gzip.compress(b"x")), "gzip, gzip"),
    ],
    ids=["no gzip", "cut", "garbage after", "too many members", "not asked for", "twice"],  # gzip holds the time
)
async def test_broken_or_unasked_encoding_is_a_failure(body: bytes, encoding: str) -> None:
    async with origin({"/": response(body, content_encoding=encoding)}) as server, egress() as client:
        assert (await failure_of(get(client, server.url()))).code == "EGRESS_FAILED"


async def test_head_tells_of_a_body_that_is_not_sent() -> None:
    reply = b"HTTP/1.1 200 OK\r\ncontent-length: 99999999\r\ncontent-encoding: br\r\n\r\n"
    async with origin({"/": reply}) as server, egress() as client:
        answer = await client.request("HEAD", server.url(), timeout_s=WAIT_S_MAX)
        assert (answer.body, answer.headers["content-length"]) == (b"", "99999999")
        assert client.pool.idle == 1


@pytest.mark.parametrize("status", ["304 Not Modified", "204 No Content"])
async def test_status_without_a_body_may_tell_of_one(status: str) -> None:
    reply = f"HTTP/1.1 {status}\r\ncontent-length: 99999999\r\ncontent-encoding: br\r\netag: x\r\n\r\n".encode()
    async with origin({"/": reply}) as server, egress() as client:
        answer = await get(client, server.url(), headers={"If-None-Match": "x"})
        assert (answer.status_code, answer.body, answer.headers["etag"]) == (int(status[:3]), b"", "x")
        assert client.pool.idle == 1
