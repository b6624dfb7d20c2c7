"""Who may use /mcp, and how a client that may not learns what to do about it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.access.keyring import make_key
from tests.access.tokens import AUDIENCE, ISSUER, SECRET, signed
from tests.conftest import Running, Serve, end, places_in, start_service
from tests.servers import make_folder, remove_folder
from tests.transport.mcp_wire import Answer, Headers, legacy, message, modern, modern_message, routing, send

CALL = modern_message("tools/call", {"name": "echo", "arguments": {"message": "x"}})
METADATA = "/.well-known/oauth-protected-resource"


@dataclass(frozen=True)
class Guarded:
    service: Running
    key: str
    reader: str
    narrow: str


@pytest.fixture(scope="module")
def guarded() -> Iterator[Guarded]:
    """A service that asks for keys."""
    folder = make_folder("agentcore-mcp-")
    url = places_in(folder)["DATABASE_URL"]
    _, key = make_key(url, tenant="acme", subject="planner")
    _, reader = make_key(url, subject="reader", scopes=["tools:read"])
    _, narrow = make_key(url, subject="narrow", tools=["e*"])
    running = start_service(**places_in(folder), AUTH_MODE="required", TOOL_MODULES="tests.tools_for_tests")
    yield Guarded(running, key, reader, narrow)
    end(running)
    if folder.exists():
        remove_folder(folder)


@pytest.fixture(scope="module")
def issued() -> Iterator[Running]:
    """A service that takes the tokens of an issuer."""
    running = start_service(
        JWT_ISSUER=ISSUER, JWT_AUDIENCE=AUDIENCE, JWT_ALGORITHMS="HS256", JWT_SECRET=SECRET, AUTH_MODE="required"
    )
    yield running
    end(running)


def token(**changes: object) -> str:
    now = int(time.time())
    return signed("HS256", SECRET, **{"iat": now - 60, "exp": now + 600, **changes})


def bearer(credential: str) -> Headers:
    return [("Authorization", f"Bearer {credential}")]


def call(service: Running, headers: Headers) -> Answer:
    return send(service, CALL, [*routing("tools/call", "echo"), *headers])


@pytest.mark.parametrize("verb", ["POST", "GET", "DELETE"])
@pytest.mark.parametrize("headers", [[], routing("tools/call", "echo")])
def test_without_a_credential_a_401_has_a_challenge_and_no_body(guarded: Guarded, verb: str, headers: Headers) -> None:
    answer = send(guarded.service, CALL, headers, verb)
    assert answer.status == 401 and answer.body == b"" and answer.headers["content-length"] == "0"
    assert answer.headers["www-authenticate"] == 'Bearer realm="agentcore-tools"'


@pytest.mark.parametrize("credential", ["act_wrong_key", "x", "a.b.c"])
def test_a_credential_that_is_not_good_is_a_401_that_says_so(guarded: Guarded, credential: str) -> None:
    answer = call(guarded.service, bearer(credential))
    assert answer.status == 401 and answer.body == b""
    assert answer.headers["www-authenticate"] == 'Bearer realm="agentcore-tools", error="invalid_token"'


def test_a_key_is_a_bearer_token(guarded: Guarded) -> None:
    assert call(guarded.service, bearer(guarded.key)).result["isError"] is False
    assert call(guarded.service, [("X-API-Key", guarded.key)]).result["isError"] is False


def test_a_key_in_the_query_is_none(guarded: Guarded) -> None:
    path = f"/mcp?access_token={guarded.key}&api_key={guarded.key}"
    assert send(guarded.service, CALL, routing("tools/call", "echo"), path=path).status == 401


def test_a_refused_credential_is_counted(guarded: Guarded) -> None:
    before = guarded.service.metric("tool_errors_total", error_type="unauthenticated")
    send(guarded.service, CALL, [])
    assert guarded.service.metric("tool_errors_total", error_type="unauthenticated") == before + 1


@pytest.mark.parametrize("is_modern", [True, False])
def test_a_scope_that_is_missing_is_a_403_that_names_it(guarded: Guarded, is_modern: bool) -> None:
    body = CALL if is_modern else message("tools/call", {"name": "echo"})
    answer = send(
        guarded.service, body, [*(routing("tools/call", "echo") if is_modern else []), *bearer(guarded.reader)]
    )
    assert answer.code == (403, -32003)
    assert answer.headers["www-authenticate"] == 'Bearer error="insufficient_scope", scope="tools:execute"'
    assert modern(guarded.service, "tools/list", {}, *bearer(guarded.reader)).status == 200


def test_what_a_key_does_not_allow_is_neither_listed_nor_called(guarded: Guarded) -> None:
    listed = modern(guarded.service, "tools/list", {}, *bearer(guarded.narrow)).result
    names = {tool["name"] for tool in listed["tools"]}
    assert "echo" in names and all(name.startswith("e") for name in names)
    refused = modern(guarded.service, "tools/call", {"name": "calculator", "arguments": {}}, *bearer(guarded.narrow))
    unknown = modern(guarded.service, "tools/call", {"name": "no_such", "arguments": {}}, *bearer(guarded.narrow))
    assert refused.code == unknown.code == (400, -32602) and refused.error == unknown.error


def test_a_list_that_depends_on_the_caller_is_private(guarded: Guarded) -> None:
    for credential in (guarded.key, guarded.narrow):
        assert modern(guarded.service, "tools/list", {}, *bearer(credential)).result["cacheScope"] == "private"


def test_describing_itself_needs_a_credential_and_no_scope(guarded: Guarded) -> None:
    assert modern(guarded.service, "server/discover", {}, *bearer(guarded.reader)).status == 200
    assert legacy(guarded.service, "ping").status == 401


def test_there_is_no_metadata_where_nobody_issues_tokens(guarded: Guarded, mcp: Running) -> None:
    for service in (guarded.service, mcp):
        for path in (METADATA, f"{METADATA}/mcp"):
            answer = send(service, b"", [], "GET", path)
            assert answer.status == 404 and "www-authenticate" not in answer.headers


# Tokens of an issuer


def test_a_401_leads_to_the_metadata_and_the_metadata_to_the_issuer(issued: Running) -> None:
    answer = send(issued, CALL, [])
    assert answer.status == 401 and answer.body == b""
    found = re.fullmatch(
        r'Bearer resource_metadata="(http://127.0.0.1:\d+)(/\S+)", scope="tools:read tools:execute"',
        answer.headers["www-authenticate"],
    )
    assert found is not None, answer.headers
    document = send(issued, b"", [], "GET", found[2])
    assert document.status == 200 and document.headers["content-type"] == "application/json"
    assert document.json == {
        "resource": f"{found[1]}/mcp",
        "authorization_servers": [ISSUER],
        "scopes_supported": ["tools:read", "tools:execute"],
        "bearer_methods_supported": ["header"],
        "resource_name": "agentcore-tools",
    }


def test_the_metadata_is_at_the_root_too_and_needs_no_credential(issued: Running) -> None:
    assert send(issued, b"", [], "GET", METADATA).json == send(issued, b"", [], "GET", f"{METADATA}/mcp").json
    assert send(issued, b"", bearer("wrong"), "GET", METADATA).status == 200
    assert send(issued, b"", [], "HEAD", METADATA).status == 200
    refused = send(issued, b"{}", [], "POST", METADATA)
    assert refused.status == 405 and refused.headers["allow"] == "GET"


def test_a_good_token_calls_and_a_bad_one_is_challenged(issued: Running) -> None:
    assert call(issued, bearer(token())).result["isError"] is False
    for bad in (token(aud="https://other.test"), token(iss="https://other.test/"), token(exp=1), token()[:-2]):
        answer = call(issued, bearer(bad))
        assert answer.status == 401 and answer.body == b""
        assert answer.headers["www-authenticate"].endswith(', error="invalid_token"')


def test_a_token_without_the_scope_is_told_which_and_where_to_get_it(issued: Running) -> None:
    answer = call(issued, bearer(token(scope="tools:read")))
    assert answer.code == (403, -32003)
    challenge = answer.headers["www-authenticate"]
    assert challenge.startswith('Bearer error="insufficient_scope", scope="tools:execute", resource_metadata="')
    assert challenge.endswith(f'{METADATA}/mcp"')


def test_behind_a_proxy_the_public_address_is_named(serve: Serve) -> None:
    service = serve(
        JWT_ISSUER=ISSUER,
        JWT_AUDIENCE=AUDIENCE,
        JWT_ALGORITHMS="HS256",
        JWT_SECRET=SECRET,
        PUBLIC_URL="https://tools.example.com/agents",
    )
    challenge = send(service, CALL, []).headers["www-authenticate"]
    assert f'resource_metadata="https://tools.example.com/agents{METADATA}/mcp"' in challenge
    assert send(service, b"", [], "GET", METADATA).json["resource"] == "https://tools.example.com/agents/mcp"
