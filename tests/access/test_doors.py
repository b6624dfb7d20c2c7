"""Every door of a running service: who is let in, who is not, and how they are told."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from fastapi.routing import iter_route_contexts
from jsonschema import Draft202012Validator
from starlette.requests import Request

from app.access.credential import CredentialMissing
from app.service import open_service
from app.settings import Settings
from app.transport.app import create_app
from app.transport.docs_page import FILES
from app.transport.gate import caller_with, is_open
from tests.access.keyring import change_keys, make_key
from tests.conftest import START_S_MAX, Running, end, places_in, start_service
from tests.servers import make_folder, remove_folder
from tests.transport.raw_http import Peer

RPC, TOOLS, ADMIN = "/api/v1/jsonrpc", "/api/v1/tools", "/api/v1/admin/keys"

OPEN = {"/livez", "/readyz", "/metrics", "/docs", "/openapi.json"}
"""What the contract opens."""

CALL = {"jsonrpc": "2.0", "id": 1, "method": "tools.execute", "params": {"tool_id": "who_calls"}}


@dataclass(frozen=True)
class Guarded:
    """A service that asks for keys, and some keys."""

    service: Running
    id: str
    key: str
    other: str
    admin: str
    revoked: str
    expired: str


@pytest.fixture(scope="module")
def guarded() -> Iterator[Guarded]:
    folder = make_folder("agentcore-guarded-")
    places = places_in(folder)
    url = places["DATABASE_URL"]
    key, credential = make_key(url, tenant="acme", subject="planner")
    _, other = make_key(url, tenant="other", subject="planner", scopes=["tools:read"])
    _, admin = make_key(url, subject="root", scopes=["admin"])
    _, revoked = make_key(url, subject="former")
    late, expired = make_key(url, subject="late", expires_in="90d")
    change_keys(url, "UPDATE api_keys SET expires_at = created_at WHERE id = :id", id=late.id)
    running = start_service(**places, AUTH_MODE="required", TOOL_MODULES="tests.tools_for_tests")
    with httpx.Client(base_url=running.url, headers={"X-API-Key": admin}, trust_env=False) as client:
        assert client.delete(f"{ADMIN}/{revoked.split('_')[1]}").status_code == 200
    yield Guarded(running, key.id, credential, other, admin, revoked, expired)
    end(running)
    remove_folder(folder)


def ask(service: Running, path: str, headers: list[tuple[bytes, bytes]], method: str = "POST") -> httpx.Response:
    """One request byte for byte as given, whatever clients would say to such headers."""
    body = json.dumps(CALL).encode() if method == "POST" else b""
    sent = [(b"Host", b"127.0.0.1"), (b"Content-Length", b"%d" % len(body)), (b"Connection", b"close"), *headers]
    head = b"".join(b"%b: %b\r\n" % header for header in sent)
    with socket.create_connection(("127.0.0.1", service.port), timeout=START_S_MAX) as connection:
        connection.sendall(b"%b %b HTTP/1.1\r\n%b\r\n%b" % (method.encode(), path.encode(), head, body))
        answer = b""
        while chunk := connection.recv(65_536):
            answer += chunk
    start, _, rest = answer.partition(b"\r\n\r\n")
    status, *lines = start.decode("latin-1").split("\r\n")
    pairs = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    return httpx.Response(int(status.split()[1]), headers=pairs, content=rest)


def unauthenticated(response: httpx.Response, path: str, *, given: bool) -> dict[str, Any]:
    """The error of an answer that must be a 401, told as that door tells."""
    assert response.status_code == 401, response.text
    challenge = 'Bearer realm="agentcore-tools"' + (', error="invalid_token"' if given else "")
    assert response.headers["www-authenticate"] == challenge
    answer = response.json()
    assert answer.keys() == ({"jsonrpc", "error", "id"} if path == RPC else {"error"})
    if path == RPC:
        assert answer["jsonrpc"] == "2.0" and answer["id"] is None
    error: dict[str, Any] = answer["error"]
    assert error["code"] == -32002 and error["data"] == {"error_type": "unauthenticated", "retryable": False}
    return error


# Let in


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        (b"Authorization", b"Bearer "),
        (b"authorization", b"bearer "),
        (b"AUTHORIZATION", b"BEARER "),
        (b"Authorization", b"Bearer   "),
        (b"X-API-Key", b""),
        (b"x-api-KEY", b"  "),
    ],
)
def test_a_good_key_is_taken_in_either_header(guarded: Guarded, name: bytes, prefix: bytes) -> None:
    header = [(name, prefix + guarded.key.encode())]
    answer = ask(guarded.service, RPC, header).json()["result"]["result"]
    assert (answer["tenant"], answer["subject"]) == ("acme", "planner")
    assert ask(guarded.service, f"{TOOLS}/echo", header, "GET").status_code == 200


def test_the_same_key_in_both_headers_is_one(guarded: Guarded) -> None:
    key = guarded.key.encode()
    headers = [(b"Authorization", b"Bearer " + key), (b"X-API-Key", key)]
    assert "result" in ask(guarded.service, RPC, headers).json()


@pytest.mark.parametrize(
    "path", [TOOLS, f"{TOOLS}/echo", "/api/v1/executions", "/api/v1/executions/export", ADMIN, "/no"]
)
def test_no_cache_on_the_way_keeps_what_one_caller_was_told(guarded: Guarded, path: str) -> None:
    answer = guarded.service.http.get(path, headers={"X-API-Key": guarded.key})
    assert answer.headers.get_list("cache-control") == ["no-store"]


def test_the_agent_id_is_a_label_and_never_who_calls(guarded: Guarded) -> None:
    headers = {"X-API-Key": guarded.key}
    body = {**CALL, "params": {**CALL["params"], "agent_id": "root"}, "a2a_context": {"source_agent": "root"}}
    result = guarded.service.http.post(RPC, json=body, headers=headers).json()["result"]["result"]
    assert result["subject"] == "planner" and result["agent_id"] == "root"


# Not let in


def attempts(guarded: Guarded) -> dict[str, list[tuple[bytes, bytes]]]:
    """Ways in that must not be, by what each tries."""
    key, key_id = guarded.key.encode(), guarded.id.encode()
    secret = key.rsplit(b"_", 1)[1]
    other = guarded.other.encode()
    other_secret = other.rsplit(b"_", 1)[1]
    bearers = {
        "empty": b"",
        "prefix of the key": key[:-1],
        "half of the key": key[: len(key) // 2],
        "key with a suffix": key + b"0",
        "key with a newline escaped": key + b"%0a",
        "key twice": key + key,
        "two keys": key + b"," + other,
        "two keys with a blank": key + b" " + other,
        "upper case": key.upper(),
        "upper case secret": b"act_" + key_id + b"_" + secret.upper(),
        "upper case prefix": b"ACT" + key[3:],
        "no prefix": key[4:],
        "secret alone": secret,
        "id alone": b"act_" + key_id,
        "id with an empty secret": b"act_" + key_id + b"_",
        "swapped id and secret": b"act_" + secret + b"_" + key_id,
        "id of one, secret of another": b"act_" + key_id + b"_" + other_secret,
        "unknown id": b"act_" + b"0" * 20 + b"_" + secret,
        "wrong secret": b"act_" + key_id + b"_" + b"0" * 64,
        "digest for the secret": b"act_"
        + key_id
        + b"_"
        + b"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "SQL in the id": b"act_' OR '1'='1_" + secret,
        "SQL wildcard in the id": b"act_" + b"%" * 20 + b"_" + secret,
        "SQL comment in the id": b"act_" + key_id[:18] + b"--_" + secret,
        "escaped NUL": key + b"%00",
        "full-width digits": ("act_" + "０" * 20 + "_" + secret.decode()).encode(),
        "bytes over 127": key[:-1] + b"\xe9",
        "a blank inside": key[:30] + b" " + key[30:],
        "a tab inside": key[:30] + b"\t" + key[30:],
        "quoted": b'"' + key + b'"',
        "revoked": guarded.revoked.encode(),
        "expired": guarded.expired.encode(),
        "null": b"null",
        "true": b"true",
        "a glob": b"*",
        "JSON": b'{"key":"' + key + b'"}',
        "base64 of nothing": b"Og==",
        "a token without a signature": b"eyJhbGciOiJub25lIn0.eyJzdWIiOiJyb290In0.",
        "over 8 KiB": b"a" * 8_193,
        "key after 8 KiB": b"0" * 8_193 + key,
    }
    other_ways = {
        "Basic scheme": [(b"Authorization", b"Basic " + key)],
        "no scheme": [(b"Authorization", key)],
        "scheme alone": [(b"Authorization", b"Bearer")],
        "scheme and a tab": [(b"Authorization", b"Bearer\t" + key)],
        "scheme with a colon": [(b"Authorization", b"Bearer: " + key)],
        "another word before": [(b"Authorization", b"Negotiate Bearer " + key)],
        "Authorization twice": [(b"Authorization", b"Bearer " + key)] * 2,
        "Authorization twice, one good": [(b"Authorization", b"Bearer x"), (b"Authorization", b"Bearer " + key)],
        "X-API-Key twice": [(b"X-API-Key", key)] * 2,
        "X-API-Key twice, one good": [(b"X-API-Key", key), (b"X-API-Key", b"x")],
        "one good, one bad": [(b"Authorization", b"Bearer " + key), (b"X-API-Key", guarded.other.encode())],
        "bad before good": [(b"X-API-Key", b"x"), (b"Authorization", b"Bearer " + key)],
        "empty X-API-Key": [(b"X-API-Key", b"")],
        "empty beside a good one": [(b"Authorization", b"Bearer " + key), (b"X-API-Key", b"")],
    }
    return {**{what: [(b"Authorization", b"Bearer " + value)] for what, value in bearers.items()}, **other_ways}


def test_no_bypass_gets_past_any_door(guarded: Guarded) -> None:
    tried = attempts(guarded)
    assert len(tried) > 50
    for what, headers in tried.items():
        for method, path in (("POST", RPC), ("GET", TOOLS), ("GET", ADMIN), ("POST", f"{TOOLS}/echo/execute")):
            response = ask(guarded.service, path, headers, method)
            try:
                error = unauthenticated(response, path, given=True)
            except AssertionError as failed:
                raise AssertionError(f"{what} at {path}") from failed
            assert (
                error["message"]
                == unauthenticated(ask(guarded.service, path, [(b"X-API-Key", b"x")], method), path, given=True)[
                    "message"
                ]
            ), "nobody is told which part was wrong"


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"X-Api-Token", b"KEY")],
        [(b"Api-Key", b"KEY")],
        [(b"X_API_Key", b"KEY")],
        [(b"Proxy-Authorization", b"Bearer KEY")],
        [(b"X-Forwarded-Authorization", b"Bearer KEY")],
        [(b"X-Original-URL", b"/livez")],
        [(b"X-Rewrite-URL", b"/livez")],
        [(b"Cookie", b"key=KEY; authorization=KEY")],
        [(b"X-Forwarded-User", b"root"), (b"X-Remote-User", b"root"), (b"X-Forwarded-For", b"127.0.0.1")],
    ],
)
def test_a_key_anywhere_else_is_none(guarded: Guarded, headers: list[tuple[bytes, bytes]]) -> None:
    given = [(name, value.replace(b"KEY", guarded.key.encode())) for name, value in headers]
    for path, method in ((RPC, "POST"), (TOOLS, "GET"), (f"{TOOLS}?key={guarded.key}&api_key={guarded.key}", "GET")):
        unauthenticated(ask(guarded.service, path, given, method), path, given=False)


def test_a_header_with_a_null_byte_is_no_request_at_all(guarded: Guarded) -> None:
    for value in (guarded.key.encode() + b"\x00", b"\x00" + guarded.key.encode()):
        assert ask(guarded.service, RPC, [(b"Authorization", b"Bearer " + value)]).status_code in (400, 401)


def test_the_body_of_who_is_not_let_in_is_not_looked_at(guarded: Guarded) -> None:
    response = guarded.service.http.post(RPC, content=b"{ not json")
    unauthenticated(response, RPC, given=False)
    again = guarded.service.http.post(RPC, json=CALL, headers={"X-API-Key": guarded.key})
    assert "result" in again.json(), "the connection is still good"


def test_refusals_are_counted(guarded: Guarded) -> None:
    before = guarded.service.metric("tool_errors_total", error_type="unauthenticated")
    guarded.service.http.post(RPC, json=CALL)
    guarded.service.http.get(TOOLS)
    assert guarded.service.metric("tool_errors_total", error_type="unauthenticated") == before + 2


def test_no_key_is_ever_logged(guarded: Guarded) -> None:
    guarded.service.http.get(TOOLS, headers={"X-API-Key": guarded.key[:-1]})
    secrets = [each.rsplit("_", 1)[1][:16] for each in (guarded.key, guarded.admin, guarded.revoked)]
    assert not [line for line in guarded.service.log if any(secret in json.dumps(line) for secret in secrets)]
    for path in ("/metrics", "/readyz", "/openapi.json"):
        text = guarded.service.http.get(path).text
        assert not any(secret in text for secret in secrets)


# Every route


def test_every_route_but_the_open_ones_needs_a_credential(guarded: Guarded) -> None:
    """Walks the routes of the application: one that is added tomorrow is closed, or is missed here."""

    async def walked() -> list[tuple[str, str, bool]]:
        async with open_service(Settings(database_url="sqlite+aiosqlite:///:memory:")) as service:
            routes: list[Any] = []

            def seen(app: Any) -> None:
                for name in ("_inner", "_rest", "app"):
                    if hasattr(app, name):
                        seen(getattr(app, name))
                if hasattr(app, "routes"):
                    routes.extend(iter_route_contexts(app.routes))

            seen(create_app(service))
            return [
                (method, route.path or "", is_open(route.original_route))
                for route in routes
                for method in route.methods or ()
            ]

    found = asyncio.run(walked())
    parts_of_the_page = {f"/docs/{name}" for name in FILES}
    assert {path for _, path, is_open in found if is_open} == OPEN | parts_of_the_page
    closed = [(method, path) for method, path, is_open in found if not is_open]
    assert len(closed) >= 6
    for method, path in [*closed, ("POST", RPC)]:
        response = guarded.service.http.request(method, re.sub(r"{\w+}", "echo", path))
        unauthenticated(response, path, given=False)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/api",
        "/mcp",
        "/api/v1/tools/",
        "/api/v1/jsonrpc/",
        "//livez",
        "/livez/",
        "/livez/../api/v1/tools",
        "/livez;/api/v1/tools",
        "/livez%2f",
        "/%2e/livez",
        "/LIVEZ",
        "/docs/",
        "/docs/oauth2-redirect",
        "/redoc",
        "/openapi.json/",
        "/metrics/x",
        "/readyz%00",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE"])
def test_a_path_that_is_none_needs_a_credential_too(guarded: Guarded, path: str, method: str) -> None:
    assert ask(guarded.service, path, [], method).status_code == 401


@pytest.mark.parametrize("path", sorted(OPEN))
def test_the_open_ones_answer_without_and_with_a_wrong_one(guarded: Guarded, path: str) -> None:
    assert guarded.service.http.get(path).status_code == 200
    assert guarded.service.http.get(path, headers={"Authorization": "Bearer wrong"}).status_code == 200


def test_a_request_that_came_by_no_gate_is_nobodys() -> None:
    request = Request({"type": "http", "headers": []})
    with pytest.raises(CredentialMissing):
        caller_with(request, "tools:read")


# Scopes


def test_a_scope_that_a_key_lacks_is_403_on_rest_and_an_error_in_json_rpc(guarded: Guarded) -> None:
    headers = {"X-API-Key": guarded.other}
    assert guarded.service.http.get(TOOLS, headers=headers).status_code == 200
    refused = guarded.service.http.post(f"{TOOLS}/echo/execute", json={}, headers=headers)
    assert refused.status_code == 403 and refused.json()["error"]["code"] == -32003
    answer = guarded.service.http.post(RPC, json=CALL, headers=headers)
    assert answer.status_code == 200 and answer.json()["error"]["code"] == -32003


def test_who_may_not_execute_is_told_so_before_the_body_is_read(guarded: Guarded) -> None:
    head = f"POST {TOOLS}/echo/execute?a=1 HTTP/1.1\r\nHost: 127.0.0.1\r\nX-API-Key: {guarded.other}\r\n"
    peer = Peer(guarded.service.port)
    refused = peer.send(head.encode() + b"Content-Length: 20\r\n\r\n").response()
    assert refused.status == 403 and refused.json["error"]["code"] == -32003
    peer.close()


def test_each_item_of_a_batch_is_held_to_the_scopes(guarded: Guarded) -> None:
    many = {**CALL, "method": "tools.execute_batch", "params": {"requests": [CALL["params"]]}}
    batch = [CALL, {"jsonrpc": "2.0", "id": 2, "method": "tools.list"}, many]
    answers = guarded.service.http.post(RPC, json=batch, headers={"X-API-Key": guarded.other}).json()
    assert [answer.get("error", {}).get("code") for answer in answers] == [-32003, None, -32003]


def test_admin_is_no_more_than_its_name(guarded: Guarded) -> None:
    headers = {"X-API-Key": guarded.admin}
    assert guarded.service.http.get(ADMIN, headers=headers).status_code == 200
    assert guarded.service.http.get(TOOLS, headers=headers).status_code == 403


# Keys over REST


def admin(guarded: Guarded, method: str, path: str = ADMIN, **options: Any) -> httpx.Response:
    return guarded.service.http.request(method, path, headers={"Authorization": f"Bearer {guarded.admin}"}, **options)


def test_a_key_made_over_rest_works_until_it_is_revoked_there(guarded: Guarded) -> None:
    made = admin(guarded, "POST", json={"tenant": "t", "subject": "s", "tools": ["echo"], "expires_in": "90d"})
    assert made.status_code == 201 and made.headers["cache-control"] == "no-store"
    body = made.json()
    assert body["key"].startswith(f"act_{body['id']}_") and body["scopes"] == [
        "executions:read",
        "tools:execute",
        "tools:read",
    ]
    secret = body.pop("key")
    assert admin(guarded, "GET", f"{ADMIN}/{body['id']}").json() == body
    call = {"json": CALL, "headers": {"X-API-Key": secret}}
    assert guarded.service.http.post(RPC, **call).status_code == 200
    revoked = admin(guarded, "DELETE", f"{ADMIN}/{body['id']}")
    assert revoked.status_code == 200 and revoked.json()["revoked_at"] is not None and "key" not in revoked.json()
    assert guarded.service.http.post(RPC, **call).status_code == 401, "at once on the replica that was asked"
    for method in ("DELETE", "GET"):
        assert admin(guarded, method, f"{ADMIN}/{body['id']}").json() == revoked.json()


def test_the_list_has_every_key_in_pages_and_no_secret(guarded: Guarded) -> None:
    seen, query = [], {"limit": "2"}
    while True:
        page = admin(guarded, "GET", params=query).json()
        assert page["count"] == len(page["keys"]) <= 2
        seen += [key["id"] for key in page["keys"]]
        if page["next_cursor"] is None:
            break
        query = {"limit": "2", "cursor": page["next_cursor"]}
    assert seen == sorted(set(seen)) and guarded.id in seen and guarded.revoked.split("_")[1] in seen
    text = admin(guarded, "GET").text
    assert not any(key.rsplit("_", 1)[1] in text for key in (guarded.key, guarded.admin)) and "sha256" not in text


@pytest.mark.parametrize("key_id", ["0" * 20, "x", "%00", "..%2f", "' OR '1'='1", "é"])
def test_a_key_that_is_none_is_404(guarded: Guarded, key_id: str) -> None:
    for method in ("GET", "DELETE"):
        assert admin(guarded, method, f"{ADMIN}/{key_id}").status_code == 404


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"tenant": "t"}, "subject"),
        ({"tenant": "t", "subject": "s", "scopes": ["Admin"]}, "scopes.0"),
        ({"tenant": "t", "subject": "s", "tools": ["[ab]"]}, "tools.0"),
        ({"tenant": "t", "subject": "s", "expires_in": "soon"}, "expires_in"),
        ({"tenant": "t", "subject": "s", "id": "0" * 20}, "id"),
        ([], ""),
    ],
)
def test_what_a_new_key_may_not_say_is_422_by_name(guarded: Guarded, body: Any, path: str) -> None:
    response = admin(guarded, "POST", json=body)
    assert response.status_code == 422
    assert [each["path"] for each in response.json()["error"]["data"]["errors"]] == [path]


def test_what_the_message_must_not_repeat_is_in_the_schema(guarded: Guarded) -> None:
    bad = {"tenant": " t", "subject": "s ", "expires_in": "99999999d"}
    errors = admin(guarded, "POST", json=bad).json()["error"]["data"]["errors"]
    fields = guarded.service.http.get("/openapi.json").json()["components"]["schemas"]["NewKey"]["properties"]
    told = {"tenant": "without blanks", "subject": "without blanks", "expires_in": "at most 36500d"}
    assert {each["path"] for each in errors} == set(told)
    assert all(words in fields[name]["description"] for name, words in told.items())


def test_a_bad_page_is_422_and_a_body_that_is_no_json_400(guarded: Guarded) -> None:
    for query in ("limit=0", "limit=1001", "cursor=x", "cursor=%00", "page=2"):
        assert admin(guarded, "GET", f"{ADMIN}?{query}").status_code == 422
    assert admin(guarded, "POST", content=b"{").status_code == 400
    assert admin(guarded, "POST").status_code == 400


def test_a_key_without_the_scope_may_do_nothing_there(guarded: Guarded) -> None:
    one = f"{ADMIN}/{guarded.id}"
    for method, path in (("GET", ADMIN), ("POST", ADMIN), ("GET", one), ("DELETE", one)):
        response = guarded.service.http.request(method, path, headers={"X-API-Key": guarded.key})
        assert response.status_code == 403, "before the body, the query and the id are looked at"
    assert guarded.service.http.post(RPC, json=CALL, headers={"X-API-Key": guarded.key}).status_code == 200


def test_with_authentication_off_nobody_is_an_administrator(service: Running) -> None:
    one = f"{ADMIN}/{'0' * 20}"
    for method, path in (("GET", ADMIN), ("POST", ADMIN), ("GET", one), ("DELETE", one)):
        assert service.http.request(method, path).status_code == 403


def test_every_example_of_the_admin_routes_works_when_it_is_pasted(guarded: Guarded) -> None:
    document = guarded.service.http.get("/openapi.json").json()
    for name, example in document["paths"][ADMIN]["post"]["requestBody"]["content"]["application/json"][
        "examples"
    ].items():
        made = admin(guarded, "POST", json=example["value"])
        assert made.status_code == example["x-status"], name
        fits(document, document["paths"][ADMIN]["post"], made)
    fits(document, document["paths"][ADMIN]["get"], admin(guarded, "GET", params={"limit": "20"}))
    for method in ("get", "delete"):
        answer = admin(guarded, method, f"{ADMIN}/{made.json()['id']}")
        fits(document, document["paths"][f"{ADMIN}/{{key_id}}"][method], answer)


def fits(document: dict[str, Any], operation: dict[str, Any], response: httpx.Response) -> None:
    schema = operation["responses"][str(response.status_code)]["content"]["application/json"]["schema"]
    validator = Draft202012Validator({**schema, "components": document["components"]})
    assert list(validator.iter_errors(response.json())) == []


def test_the_documents_say_how_to_send_a_credential(guarded: Guarded, service: Running) -> None:
    document = guarded.service.http.get("/openapi.json").json()
    assert set(document["components"]["securitySchemes"]) == {"bearer", "apiKey"}
    assert document["security"] == [{"bearer": []}, {"apiKey": []}]
    assert {} in service.http.get("/openapi.json").json()["security"], "optional while authentication may be off"
    for path, item in document["paths"].items():
        for operation in item.values():
            assert (operation.get("security") == []) == (path in OPEN)
            assert ("401" in operation["responses"]) == (path not in OPEN)


def test_a_key_that_takes_anothers_place_shares_its_limits_and_idempotency_keys() -> None:
    folder = make_folder("agentcore-rotated-")
    places = places_in(folder)
    keys = [make_key(places["DATABASE_URL"], tenant="acme", subject="planner")[1] for _ in range(2)]
    running = start_service(**places, AUTH_MODE="required", LIMITS_RATE="100/hour")
    try:
        answers = [
            httpx.post(
                f"{running.url}{TOOLS}/echo/execute",
                headers={"X-API-Key": key, "Idempotency-Key": "one"},
                json={"parameters": {"message": "hi"}},
                trust_env=False,
            )
            for key in keys
        ]
    finally:
        end(running)
        remove_folder(folder)
    first, repeated = (answer.json() for answer in answers)
    assert repeated["replayed"] and repeated["execution_id"] == first["execution_id"]
    assert [answer.headers["RateLimit-Remaining"] for answer in answers] == ["99", "98"]
