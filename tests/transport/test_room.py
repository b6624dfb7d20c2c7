"""The room for large bodies between tenants: some is left for the next one that comes, and all of it comes back."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.transport.room import PART, Room, Share
from tests.access.tokens import AUDIENCE, ISSUER, SECRET, signed
from tests.conftest import Serve
from tests.transport.doors import RPC, TOOLS, Door, execute, http
from tests.transport.raw_http import Response

MEBIBYTE = 1_048_576


class Refusals:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


def share_of(room: Room, tenant: str, body_bytes: int) -> Share:
    share = Share(room)
    share.declared_bytes = body_bytes
    assert share.belongs_to(tenant) and share.take(body_bytes)
    return share


def filled(room: Room, tenant: str, body_bytes: int = 1_000) -> list[Share]:
    """As many bodies as the tenant may have."""
    shares: list[Share] = []
    while True:
        share = Share(room)
        share.declared_bytes = body_bytes
        if not share.belongs_to(tenant):
            return shares
        assert share.take(body_bytes)
        shares.append(share)


def test_a_tenant_alone_has_three_quarters_and_another_has_room() -> None:
    room = Room(100_000, refused := Refusals())
    assert len(filled(room, "many")) == 75 and refused.count == 1
    assert len(filled(room, "other")) == 18
    assert len(filled(room, "third")) == 5
    assert room.bytes <= room.bytes_max


def test_a_tenants_only_body_is_asked_for_no_part() -> None:
    room = Room(100_000, Refusals())
    share_of(room, "one", 100_000)
    assert not Share(room).take(1)


def test_a_body_that_grows_beside_others_of_its_tenant_is_stopped_at_the_part() -> None:
    room = Room(100_000, Refusals())
    share_of(room, "one", 40_000)
    growing = Share(room)
    assert growing.belongs_to("one") and growing.take(35_000) and not growing.take(1)


def test_what_came_before_it_was_known_whose_it_is_counts_too() -> None:
    room = Room(100_000, Refusals())
    shares = [Share(room) for _ in range(9)]
    assert all(share.take(10_000) for share in shares)
    assert [share.belongs_to("one") for share in shares] == [True] * 3 + [False] * 6


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2), st.integers(0, 60_000), st.booleans()), max_size=60))
def test_all_of_it_comes_back(steps: list[tuple[int, int, int, bool]]) -> None:
    room = Room(100_000, Refusals())
    shares = [Share(room) for _ in range(5)]
    for number, tenant, body_bytes, ends in steps:
        share = shares[number]
        if ends:
            share.give_back()
        else:
            share.belongs_to(f"tenant-{tenant}")
            others = room.of(f"tenant-{tenant}") - share.bytes
            if share.take(body_bytes) and others:
                assert room.of(f"tenant-{tenant}") <= PART * (room.bytes_max - room.bytes)
        assert room.bytes == sum(share.bytes for share in shares) <= room.bytes_max
    for share in shares:
        share.give_back()
    assert (room.bytes, room._of_tenants) == (0, {})


def with_length(body: bytes, *headers: bytes) -> bytes:
    return http(body, *headers)


def chunked(body: bytes, *headers: bytes) -> bytes:
    lines = b"".join(line + b"\r\n" for line in (b"Host: 127.0.0.1", b"Transfer-Encoding: chunked", *headers))
    return b"POST %b HTTP/1.1\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (RPC, lines, len(body), body)


@pytest.mark.parametrize("framed", [with_length, chunked])
def test_large_requests_of_one_tenant_leave_room_for_anothers(serve: Serve, framed: Callable[..., bytes]) -> None:
    tokens = {"JWT_ISSUER": ISSUER, "JWT_AUDIENCE": AUDIENCE, "JWT_ALGORITHMS": "HS256", "JWT_SECRET": SECRET}
    running = serve(AUTH_MODE="required", TOOL_MODULES=TOOLS, MAX_REQUEST_BYTES_IN_FLIGHT=str(MEBIBYTE), **tokens)
    door = Door(running, "asgi")
    now = int(time.time())
    bearer = {
        tenant: f"Bearer {signed('HS256', header={'kid': ...}, iat=now, exp=now + 3600, tenant=tenant)}"
        for tenant in ("many", "other")
    }
    running.http.headers["authorization"] = bearer["other"]

    def large(tenant: str, gate: str = "here") -> bytes:
        return framed(execute("held", gate=gate).ljust(100_000), b"Authorization: " + bearer[tenant].encode())

    proxy = door.connect().send(large("many", "before"))  # its connections are everybody's
    door.come("before", 1)
    door.open("before")
    assert proxy.response().status == 200
    held = [door.connect().send(large("many")) for _ in range(7)]
    door.come("here", 7)
    refused: Response = door.connect().send(large("many")).response()
    assert (refused.status, refused.headers["retry-after"]) == (503, "1")
    assert refused.json["error"]["code"] == -32006 and "this tenant" in refused.json["error"]["message"]
    held += [peer.send(large("other")) for peer in (proxy, door.connect())]
    door.come("here", 9)
    door.open("here")
    assert [peer.response().json["result"]["status"] for peer in held] == ["success"] * 9
    assert [peer.send(large("many")).response().status for peer in held[:3]] == [200] * 3
    assert running.metric("http_wire_refusals_total", reason="bodies_full") == 1
    door.hang_up()
