"""JWT_* settings of a running service, each with the effect that it says; and keys beside tokens."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.access.credential import CredentialRefused
from app.access.jwt import JwtVerifier, jwt_rules
from tests.access.keyring import make_key, opened_keyring
from tests.access.tokens import AUDIENCE, ISSUER, SECRET, document, jwk, rsa_key, signed
from tests.conftest import ROOT, Running, Serve, end, places_in, service_environ, start_service
from tests.servers import free_port, make_folder, remove_folder

CALL = {"jsonrpc": "2.0", "id": 1, "method": "tools.execute", "params": {"tool_id": "who_calls"}}

Service = tuple[Running, str]


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """A service that takes tokens by secret, with claims of other names, and a key of its database."""
    folder = make_folder("agentcore-tokens-")
    places = places_in(folder)
    _, key = make_key(places["DATABASE_URL"], tenant="acme")
    running = start_service(
        **places,
        JWT_ISSUER=ISSUER,
        JWT_AUDIENCE=AUDIENCE,
        JWT_ALGORITHMS="HS256,HS384",
        JWT_SECRET=SECRET,
        JWT_TENANT_CLAIM="org",
        JWT_SCOPE_CLAIM="scp",
        TOOL_MODULES="tests.tools_for_tests",
    )
    yield running, key
    end(running)
    remove_folder(folder)


def token(algorithm: str = "HS256", **claims: Any) -> str:
    now = time.time()
    return signed(algorithm, **{"iat": now, "exp": now + 60, "org": "umbrella", "scp": "tools:execute", **claims})


def call(service: Running, credential: str) -> tuple[int, Any]:
    """Status, and the tool's result or the error's code."""
    response = service.http.post("/api/v1/jsonrpc", json=CALL, headers={"Authorization": f"Bearer {credential}"})
    answer = response.json()
    return response.status_code, answer["error"]["code"] if "error" in answer else answer["result"]["result"]


REFUSED = (401, -32002)


def test_jwt_secret_signs_what_is_taken(service: Service) -> None:
    assert call(service[0], token())[0] == 200
    assert call(service[0], token(key="f" * 64)) == REFUSED


def test_jwt_issuer_is_the_only_one_taken(service: Service) -> None:
    assert call(service[0], token(iss="https://other.test/")) == REFUSED


def test_jwt_audience_must_be_named(service: Service) -> None:
    assert call(service[0], token(aud="https://other.test")) == REFUSED


def test_jwt_algorithms_are_all_that_is_taken(service: Service) -> None:
    assert call(service[0], token("HS384"))[0] == 200
    assert call(service[0], token("HS512")) == REFUSED


def test_jwt_tenant_claim_names_the_tenant(service: Service) -> None:
    result = call(service[0], token(tenant="decoy"))[1]
    assert (result["tenant"], result["subject"]) == ("umbrella", "alice")
    assert call(service[0], token(org=...)) == REFUSED


def test_jwt_scope_claim_holds_the_scopes(service: Service) -> None:
    assert call(service[0], token(scp=["tools:read"], scope="tools:execute")) == (200, -32003)
    assert call(service[0], token(scp=..., scope="tools:execute")) == (200, -32003)


@pytest.mark.anyio
async def test_jwt_jwks_verifies_and_a_key_taken_out_of_it_is_believed_no_more(tmp_path: Path) -> None:
    keys = tmp_path / "jwks.json"
    keys.write_bytes(document(jwk(rsa_key())))
    rules = jwt_rules(issuer=ISSUER, audience=AUDIENCE, algorithms=("RS256",), secret=None, jwks=str(keys))
    assert rules is not None
    verifier = JwtVerifier(rules)
    async with opened_keyring(f"sqlite+aiosqlite:///{tmp_path}/keys.db", tokens=verifier) as ring:
        ring.wall.now_s = time.time()
        good = signed(iat=ring.wall.now_s, exp=ring.wall.now_s + 600).encode()
        await verifier.keys.refresh()
        assert (await ring.identify(good)).subject == "alice"
        await verifier.keys.refresh()
        assert ring.access.known(good) is not None, "the same document makes nothing unknown"
        keys.write_bytes(document(jwk(rsa_key("b"), kid="k2")))
        await verifier.keys.refresh()
        assert ring.access.known(good) is None
        with pytest.raises(CredentialRefused):
            await ring.identify(good)


@pytest.mark.anyio
async def test_with_the_database_away_tokens_are_taken_all_the_same(tmp_path: Path) -> None:
    rules = jwt_rules(issuer=ISSUER, audience=AUDIENCE, algorithms=("HS256",), secret=SECRET, jwks=None)
    assert rules is not None
    async with opened_keyring(f"sqlite+aiosqlite:///{tmp_path}/keys.db", tokens=JwtVerifier(rules)) as ring:
        await ring.run_sql("DROP TABLE api_keys")
        await ring.access.confirm()
        assert ring.access.away_s is not None and not ring.access.lets_nobody_in
        assert (await ring.identify(token(tenant="acme").encode())).tenant == "acme"


@pytest.mark.anyio
async def test_an_issuer_that_is_away_leaves_known_keys_good_and_none_known_lets_nobody_in(tmp_path: Path) -> None:
    keys = tmp_path / "jwks.json"
    rules = jwt_rules(issuer=ISSUER, audience=AUDIENCE, algorithms=("RS256",), secret=None, jwks=str(keys))
    assert rules is not None
    verifier = JwtVerifier(rules)
    async with opened_keyring(f"sqlite+aiosqlite:///{tmp_path}/keys.db", tokens=verifier) as ring:
        await verifier.keys.refresh()
        await ring.access.confirm()
        assert verifier.keys.problem == "file: No such file or directory" and ring.access.lets_nobody_in
        keys.write_bytes(document(jwk(rsa_key())))
        await verifier.keys.refresh()
        assert verifier.keys.problem is None and not ring.access.lets_nobody_in
        keys.unlink()
        await verifier.keys.refresh()
        assert verifier.keys.problem is not None and not ring.access.lets_nobody_in, "known keys are good"
        keys.write_bytes(document())
        await verifier.keys.refresh()
        assert verifier.keys.problem == "no key in it can be used" and ring.access.lets_nobody_in
        await ring.make()
        await ring.access.confirm()
        assert not ring.access.lets_nobody_in, "the API key is good"


def jwt_by(jwks: str) -> dict[str, str]:
    return {"JWT_ISSUER": ISSUER, "JWT_AUDIENCE": AUDIENCE, "JWT_ALGORITHMS": "RS256", "JWT_JWKS": jwks}


@pytest.mark.parametrize("wrong", ["missing", "unreachable", "empty", "no set", "no key"])
def test_doctor_reads_the_keys_of_tokens(wrong: str, tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    if wrong in ("empty", "no set", "no key"):
        file.write_text({"empty": "", "no set": "{}", "no key": '{"keys": []}'}[wrong])
    jwks = f"http://127.0.0.1:{free_port()}/jwks" if wrong == "unreachable" else str(file)
    done = doctor(jwks)
    (found,) = [each for each in json.loads(done.stdout) if not each["ok"]]
    assert done.returncode == 1 and found["what"] == "token keys" and found["says"].startswith("JWT_JWKS: ")


def test_doctor_is_content_with_keys_that_can_be_read(tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    file.write_bytes(document(jwk(rsa_key())))
    done = doctor(str(file))
    assert done.returncode == 0, done.stdout


def doctor(jwks: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "app", "doctor", "--port", "0", "--json"],
        cwd=ROOT,
        env=service_environ(**jwt_by(jwks)),
        capture_output=True,
        text=True,
    )


def test_readyz_is_503_while_neither_a_token_nor_a_key_can_let_anybody_in(serve: Serve, tmp_path: Path) -> None:
    places = places_in(tmp_path)
    running = serve(**places, **jwt_by(str(tmp_path / "nope.json")))
    before = running.http.get("/readyz")
    assert before.status_code == 503 and "tokens: keys cannot be read; none is known" in before.text
    make_key(places["DATABASE_URL"])
    ends = time.monotonic() + 60
    while (ready := running.http.get("/readyz")).status_code != 200:
        assert time.monotonic() < ends
    assert "tokens: keys cannot be read" in ready.text


def test_a_token_that_expires_is_refused_though_it_is_known(service: Service) -> None:
    now = time.time()
    expiring = token(iat=now - 100, exp=now - 25)  # and 30 s of leeway
    assert call(service[0], expiring)[0] == 200
    ends = time.monotonic() + 60
    while call(service[0], expiring) != REFUSED:
        assert time.monotonic() < ends
        time.sleep(0.1)


def test_keys_and_tokens_are_taken_side_by_side(service: Service) -> None:
    running, key = service
    assert call(running, key)[1]["tenant"] == "acme" and call(running, token())[1]["tenant"] == "umbrella"
    assert call(running, f"{token()}x") == REFUSED and call(running, f"{key}x") == REFUSED
    assert running.http.post("/api/v1/jsonrpc", json=CALL).status_code == 401


def test_two_tokens_that_share_their_first_200_characters_are_two(service: Service) -> None:
    first, second = (token(sub="s" * 200 + name) for name in ("alice", "mallory"))
    shared = next(n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    assert shared > 200
    assert call(service[0], first)[1]["subject"].endswith("alice")
    assert call(service[0], second)[1]["subject"].endswith("mallory")
    assert call(service[0], first[:shared] + second[shared:-1] + ("A" if second[-1] != "A" else "B")) == REFUSED
