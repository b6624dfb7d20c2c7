"""Heads are remembered, permission is not: keys, tokens, hosts, origins, proxies, over the lane and the ASGI door."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from app.access.jwt import LEEWAY_S
from tests.access.keyring import change_keys, make_key
from tests.access.tokens import AUDIENCE, ISSUER, SECRET, signed
from tests.conftest import end, places_in
from tests.servers import make_folder, remove_folder, wait_until
from tests.transport.doors import DOORS, MCP, Door, execute, http, start_door, which
from tests.transport.mcp_wire import META, MODERN
from tests.transport.raw_http import Peer, Response

pytestmark = pytest.mark.parametrize("guarded", DOORS, indirect=True)


class Guarded(Door):
    """A service that asks for keys and takes tokens."""

    database: str

    def key(self, **given: object) -> tuple[str, str]:
        key, credential = make_key(self.database, **given)
        return key.id, credential


@pytest.fixture(scope="module")
def guarded(request: pytest.FixtureRequest) -> Iterator[Guarded]:
    folder = make_folder("agentcore-lane-")
    places = places_in(folder)
    limits = folder / "limits.yaml"
    limits.write_text("policies: [{name: few, match: {tool: echo}, per: [subject], rate: 5/hour}]")
    door = start_door(
        request.param,
        **places,
        AUTH_MODE="required",
        JWT_ISSUER=ISSUER,
        JWT_AUDIENCE=AUDIENCE,
        JWT_ALGORITHMS="HS256",
        JWT_SECRET=SECRET,
        LIMITS_FILE=str(limits),
        FORWARDED_ALLOW_IPS="127.0.0.1",
    )
    door.__class__ = Guarded
    assert isinstance(door, Guarded)
    door.database = places["DATABASE_URL"]
    yield door
    door.hang_up()
    end(door.running)
    remove_folder(folder)


def call(credential: str, body: bytes, *headers: bytes) -> bytes:
    return http(body, b"Authorization: Bearer " + credential.encode(), *headers)


def ask(door: Door, request: bytes) -> Response:
    """On a connection of its own."""
    peer = Peer(door.running.port)
    try:
        return peer.send(request).response()
    finally:
        peer.close()


def token(valid_s: float) -> str:
    now = int(time.time())
    return signed("HS256", header={"kid": ...}, iat=now - 60, exp=now + int(valid_s))


def until_refused(door: Door, request: bytes) -> Response:
    """The first answer that is not by this door."""
    answers: list[Response] = []

    def is_refused() -> bool:
        answers.append(ask(door, request))
        return answers[-1].status != 200

    wait_until(is_refused, "a refusal")
    assert all(door.answers(answer) for answer in answers[:-1])
    return answers[-1]


# Credentials


def test_two_keys_in_the_same_place_of_a_head_are_two_callers(guarded: Guarded) -> None:
    requests = {subject: call(guarded.key(subject=subject)[1], execute("who_calls")) for subject in ("first", "other")}
    assert len({len(request) for request in requests.values()}) == 1
    for _ in range(3):
        for subject, request in requests.items():
            assert ask(guarded, request).json["result"]["result"]["subject"] == subject
    good = call(guarded.key()[1], which())
    assert [ask(guarded, good).json["result"]["result"] for _ in range(2)] == ["asgi", guarded.name]
    bad = good.replace(b"Bearer act_", b"Bearer acz_")
    assert [ask(guarded, bad).status for _ in range(3)] == [401] * 3
    assert guarded.answers(ask(guarded, good))


def test_without_a_credential_every_request_is_refused(guarded: Guarded) -> None:
    for _ in range(3):
        refused = ask(guarded, http(which()))
        assert refused.status == 401 and refused.headers["www-authenticate"].startswith("Bearer")


def test_a_key_is_refused_soon_after_it_was_revoked_though_its_head_is_remembered(guarded: Guarded) -> None:
    key_id, credential = guarded.key()
    request = guarded.taught(call(credential, which()))
    assert guarded.answers(ask(guarded, request))
    change_keys(guarded.database, "UPDATE api_keys SET revoked_at = created_at WHERE id = :id", id=key_id)
    assert until_refused(guarded, request).status == 401
    assert ask(guarded, request).status == 401


def test_what_a_key_may_do_changes_soon_though_its_head_is_remembered(guarded: Guarded) -> None:
    key_id, credential = guarded.key()
    request = guarded.taught(call(credential, which()))
    assert guarded.answers(ask(guarded, request))
    change_keys(guarded.database, "UPDATE api_keys SET tools = '[]' WHERE id = :id", id=key_id)
    wait_until(lambda: "error" in ask(guarded, request).json, "a refusal")
    assert ask(guarded, request).json["error"]["code"] == -32004


def test_a_token_is_refused_once_it_has_expired_though_its_head_is_remembered(guarded: Guarded) -> None:
    request = guarded.taught(call(token(5 - LEEWAY_S), which()))
    assert guarded.answers(ask(guarded, request))
    assert until_refused(guarded, request).status == 401


def test_an_expired_key_is_refused_though_its_head_is_remembered(guarded: Guarded) -> None:
    key_id, credential = guarded.key(expires_in="1m")
    request = guarded.taught(call(credential, which()))
    assert guarded.answers(ask(guarded, request))
    change_keys(guarded.database, "UPDATE api_keys SET expires_at = created_at WHERE id = :id", id=key_id)
    assert until_refused(guarded, request).status == 401


def test_a_limit_binds_and_is_told_in_the_same_headers(guarded: Guarded) -> None:
    request = call(guarded.key(subject=f"limited-{guarded.name}")[1], execute("echo", message="x"))
    answers = [ask(guarded, request) for _ in range(6)]
    told = [answer.headers["ratelimit-remaining"] for answer in answers]
    assert told == ["4", "3", "2", "1", "0", "0"]
    assert [answer.status for answer in answers] == [200] * 6
    assert answers[-1].json["error"]["code"] == -32001 and "retry-after" in answers[-1].headers
    assert list(answers[0].headers) == list(answers[1].headers)


# Hosts, origins, proxies


def test_a_host_that_is_not_loopback_is_refused_each_time(guarded: Guarded) -> None:
    good = guarded.taught(call(guarded.key()[1], which()))
    evil = good.replace(b"Host: 127.0.0.1", b"Host: evil.test")
    for _ in range(3):
        assert guarded.answers(ask(guarded, good))
        assert ask(guarded, evil).status == 403


def test_a_foreign_origin_is_refused_each_time_and_the_own_one_is_not(guarded: Guarded) -> None:
    credential = guarded.key()[1]
    good = guarded.taught(call(credential, which()))
    for _ in range(3):
        assert ask(guarded, call(credential, which(), b"Origin: https://evil.test")).status == 403
        assert ask(guarded, call(credential, which(), b"Origin: http://127.0.0.1")).status == 200
        assert guarded.answers(ask(guarded, good))


def test_what_a_proxy_says_of_the_scheme_holds_for_that_request_alone(guarded: Guarded) -> None:
    """A challenge of the MCP door names the address that the client has used."""
    credential = guarded.key(scopes=["tools:read"])[1]
    params = {"name": "which_door", "arguments": {}, "_meta": META}
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}).encode()
    head = (b"Authorization: Bearer " + credential.encode(), b"MCP-Protocol-Version: " + MODERN.encode())
    head += (b"Mcp-Method: tools/call", b"Mcp-Name: which_door")
    direct = http(body, *head, path=MCP)
    proxied = http(body, *head, b"X-Forwarded-Proto: https", b"X-Forwarded-For: 192.0.2.1", path=MCP)
    for _ in range(3):
        for request, scheme in ((direct, "http"), (proxied, "https")):
            refused = ask(guarded, request)
            assert refused.status == 403
            assert f'resource_metadata="{scheme}://127.0.0.1/' in refused.headers["www-authenticate"]


def test_with_auth_mode_auto_the_first_key_ends_what_heads_without_one_may_do(guarded: Guarded) -> None:
    folder = make_folder("agentcore-auto-")
    places = places_in(folder)
    door = start_door(guarded.name, **places, AUTH_MODE="auto")
    try:
        request = door.taught(http(which()))
        assert door.answers(ask(door, request))
        _, credential = make_key(places["DATABASE_URL"])
        assert until_refused(door, request).status == 401
        good = door.taught(call(credential, which()))
        assert door.answers(ask(door, good))
    finally:
        door.hang_up()
        end(door.running)
        remove_folder(folder)


def test_callers_on_many_connections_are_never_mistaken_for_one_another(guarded: Guarded) -> None:
    requests = {
        f"subject{number}": call(guarded.key(subject=f"subject{number}")[1], execute("who_calls"))
        for number in range(8)
    }

    def ask_often(subject: str) -> set[str]:
        peer = Peer(guarded.running.port)
        answers = [peer.send(requests[subject]).response().json["result"]["result"]["subject"] for _ in range(50)]
        peer.close()
        return set(answers)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask_often, requests)) == [{subject} for subject in requests]
