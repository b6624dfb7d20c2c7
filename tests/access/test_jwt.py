"""Tokens: which become a caller, which are refused, and that a refusal says nothing."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.access.credential import CredentialRefused
from app.access.jwks import FixedKey, KeySet
from app.access.jwt import ASYMMETRIC, SYMMETRIC, JwtRules, JwtVerifier, jwt_rules, keys_for
from app.calls import Caller
from app.errors import DependencyUnavailable, Unauthenticated
from tests.access.tokens import (
    AUDIENCE,
    ISSUER,
    NOW,
    SECRET,
    assembled,
    base64url,
    claims,
    document,
    ec_key,
    ed_key,
    jwk,
    key_of,
    rsa_key,
    signed,
)
from tests.conftest import Serve
from tests.origin import origin, response

pytestmark = pytest.mark.anyio

WORDS = frozenset({"tools:execute", "tools:read"})


def rules(**given: Any) -> JwtRules:
    """Checked as at start."""
    settled = {"issuer": ISSUER, "audience": AUDIENCE, "algorithms": ("RS256",), "secret": None, "jwks": None, **given}
    found = jwt_rules(**settled)
    assert found is not None
    return found


def with_secret(*algorithms: str, now: Callable[[], float] = lambda: NOW) -> JwtVerifier:
    return JwtVerifier(rules(algorithms=algorithms or ("HS256",), secret=SECRET), clock=now)


@pytest.fixture
def with_keys(tmp_path: Path) -> Callable[..., JwtVerifier]:
    """Verifiers with a key file of these keys; all algorithms but those with a secret unless some are given."""

    def build(*keys: Any, algorithms: tuple[str, ...] = tuple(sorted(ASYMMETRIC)), **given: Any) -> JwtVerifier:
        path = tmp_path / "jwks.json"
        path.write_bytes(document(*(keys or [jwk(rsa_key())])))
        return JwtVerifier(rules(algorithms=algorithms, jwks=str(path), **given), clock=lambda: NOW)

    return build


async def caller_of(verifier: JwtVerifier, token: str) -> Caller:
    caller, _ = await verifier.verify(token)
    return caller


async def refused(verifier: JwtVerifier, token: str) -> None:
    """Refused, and the client learns nothing but that."""
    with pytest.raises(Unauthenticated) as caught:
        await verifier.verify(token)
    assert caught.value.as_error() == CredentialRefused().as_error()
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("algorithm", sorted(SYMMETRIC))
async def test_token_signed_with_the_secret_becomes_a_caller(algorithm: str) -> None:
    assert await caller_of(with_secret(algorithm), signed(algorithm)) == Caller("acme", "alice", WORDS)


@pytest.mark.parametrize("algorithm", sorted(ASYMMETRIC))
async def test_token_signed_by_the_issuer_becomes_a_caller(
    algorithm: str, with_keys: Callable[..., JwtVerifier]
) -> None:
    verifier = with_keys(jwk(key_of(algorithm)), algorithms=(algorithm,))
    assert await caller_of(verifier, signed(algorithm)) == Caller("acme", "alice", WORDS)


async def test_caller_has_what_the_token_says_and_nothing_else() -> None:
    caller = await caller_of(with_secret(), signed("HS256", admin=True, tools=["rm"], limit_class="gold", anonymous=1))
    assert (caller.tools, caller.limit_class, caller.anonymous) == (("*",), "default", False)


async def test_tenant_and_scopes_come_from_the_claims_that_settings_name() -> None:
    named = rules(algorithms=("HS256",), secret=SECRET, tenant_claim="https://claims.test/org", scope_claim="roles")
    verifier = JwtVerifier(named, clock=lambda: NOW)
    token = signed("HS256", roles=["tools:read"], **{"https://claims.test/org": "umbrella"})
    assert await caller_of(verifier, token) == Caller("umbrella", "alice", frozenset({"tools:read"}))


@pytest.mark.parametrize(
    ("claim", "scopes"),
    [
        ("tools:read", {"tools:read"}),
        ("tools:read  admin tools:read", {"tools:read", "admin"}),
        (["tools:read", "admin"], {"tools:read", "admin"}),
        ("", set()),
        ([], set()),
        (None, set()),
        (..., set()),
    ],
)
async def test_scopes_are_a_list_or_words_in_a_text_and_none_is_none(claim: Any, scopes: set[str]) -> None:
    assert (await caller_of(with_secret(), signed("HS256", scope=claim))).scopes == scopes


@pytest.mark.parametrize(
    "claim",
    [1, True, {"tools:read": True}, ["tools:read", 1], ["tools:read admin"], ["a\nb"], "a\tb", "é", ["x"] * 101],
    ids=repr,
)
async def test_scopes_of_another_form_refuse_the_token(claim: Any) -> None:
    await refused(with_secret(), signed("HS256", scope=claim))


async def test_two_tokens_that_share_their_first_200_characters_are_two_callers() -> None:
    def token(subject: str) -> str:
        first = {"padding": "x" * 200, **claims(sub=subject)}
        return assembled({"alg": "HS256"}, first, hmac_key=SECRET.encode())

    alice, bob = token("alice"), token("bob")
    assert alice[:200] == bob[:200]
    verifier = with_secret()
    assert [(await caller_of(verifier, each)).subject for each in (alice, bob)] == ["alice", "bob"]


# --- what decides about the signature is configuration


PUBLIC_PEM = rsa_key().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
PUBLIC_DER = rsa_key().public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
PUBLIC_JWK = json.dumps(jwk(rsa_key())).encode()


@pytest.mark.parametrize(
    "secret",
    [PUBLIC_PEM, PUBLIC_PEM.strip(), PUBLIC_DER, PUBLIC_JWK, b"", SECRET.encode()],
    ids=["PEM", "PEM without its last line feed", "DER", "JWK", "empty", "secret"],
)
async def test_public_key_used_as_a_secret_signs_nothing(secret: bytes, with_keys: Callable[..., JwtVerifier]) -> None:
    for algorithm in ("HS256", "RS256", "hs256"):
        await refused(with_keys(), assembled({"alg": algorithm, "kid": "k1"}, hmac_key=secret))


@pytest.mark.parametrize("algorithm", ["none", "None", "NONE", "nOnE", " none", "none ", "", "null", None, ..., 0, []])
async def test_token_without_a_signature_is_refused_however_it_is_spelled(
    algorithm: Any, with_keys: Callable[..., JwtVerifier]
) -> None:
    header = {"kid": "k1"} if algorithm is ... else {"alg": algorithm, "kid": "k1"}
    for verifier in (with_secret(), with_keys()):
        await refused(verifier, assembled(header))
        await refused(verifier, assembled(header).removesuffix("."))
        await refused(verifier, assembled(header, hmac_key=b""))


async def test_signature_taken_off_a_good_token_is_missed(with_keys: Callable[..., JwtVerifier]) -> None:
    token = signed()
    assert await caller_of(with_keys(), token)
    await refused(with_keys(), token.rpartition(".")[0] + ".")
    await refused(with_keys(), token.rpartition(".")[0])


@pytest.mark.parametrize("algorithm", ["HS384", "HS512", "RS256"])
async def test_algorithm_that_is_not_configured_is_refused_though_the_key_fits(algorithm: str) -> None:
    token = signed(algorithm, key=SECRET if algorithm.startswith("HS") else None)
    await refused(with_secret("HS256"), token)


async def test_algorithm_must_fit_the_key_that_the_kid_names(with_keys: Callable[..., JwtVerifier]) -> None:
    verifier = with_keys(jwk(rsa_key(), "rsa"), jwk(ec_key(), "ec"), jwk(ed_key(), "ed"))
    assert await caller_of(verifier, signed("ES256", header={"kid": "ec"}))
    for algorithm, kid in [("RS256", "ec"), ("ES256", "rsa"), ("EdDSA", "ec"), ("ES256", "ed"), ("ES384", "ec")]:
        await refused(verifier, signed(algorithm, header={"kid": kid}))


async def test_key_that_names_its_algorithm_verifies_no_other(with_keys: Callable[..., JwtVerifier]) -> None:
    verifier = with_keys(jwk(rsa_key(), alg="PS256"))
    assert await caller_of(verifier, signed("PS256"))
    await refused(verifier, signed("RS256"))


async def test_curve_of_the_key_is_the_one_that_the_algorithm_means(with_keys: Callable[..., JwtVerifier]) -> None:
    verifier = with_keys(jwk(ec_key(ec.SECP384R1)))
    assert await caller_of(verifier, signed("ES384"))
    await refused(verifier, signed("ES256"))


async def test_token_of_another_key_with_the_same_kid_is_refused(with_keys: Callable[..., JwtVerifier]) -> None:
    await refused(with_keys(), signed(key=rsa_key("thief")))


async def test_every_changed_character_breaks_the_token(with_keys: Callable[..., JwtVerifier]) -> None:
    verifier, token = with_keys(jwk(ec_key())), signed("ES256")
    assert await caller_of(verifier, token)
    for place in range(0, len(token), 7):
        other = "A" if token[place] != "A" else "B"
        await refused(verifier, token[:place] + other + token[place + 1 :])


# --- the header


@pytest.mark.parametrize(
    "kid",
    [
        "unknown",
        "K1",
        "k1 ",
        "",
        "../../../../dev/null",
        "/etc/passwd",
        "k1' OR '1'='1",
        "k1; DROP TABLE api_keys; --",
        "| sleep 10",
        "http://127.0.0.1/keys",
        "\u0000",
        "x" * 5_000,
        "__class__",
        ...,
    ],
    ids=lambda kid: repr(kid)[:20],
)
async def test_kid_is_looked_up_and_nothing_else(kid: Any, with_keys: Callable[..., JwtVerifier]) -> None:
    await refused(with_keys(), signed(header={"kid": kid}))


async def test_kid_longer_than_any_does_not_ask_the_issuer() -> None:
    async with origin({"/jwks": response(document(jwk(rsa_key())))}) as server:
        verifier = JwtVerifier(rules(jwks=server.url("/jwks")), clock=lambda: NOW)
        await refused(verifier, signed(header={"kid": "k" * 257}))
        assert server.accepted == 0
        await refused(verifier, signed(header={"kid": "k" * 256}))
        assert server.accepted == 1
        assert await caller_of(verifier, signed())


@pytest.mark.parametrize("kid", [1, None, ["k1"], {"kid": "k1"}, True], ids=repr)
async def test_kid_that_is_no_text_is_refused(kid: Any, with_keys: Callable[..., JwtVerifier]) -> None:
    await refused(with_keys(), assembled({"alg": "RS256", "kid": kid}))


async def test_dev_null_as_kid_does_not_make_the_empty_secret_good() -> None:
    await refused(with_secret(), assembled({"alg": "HS256", "kid": "/dev/null"}, hmac_key=b""))


async def test_token_without_kid_takes_the_key_without_kid_only(with_keys: Callable[..., JwtVerifier]) -> None:
    token = signed(header={"kid": ...})
    assert await caller_of(with_keys(jwk(rsa_key(), None), jwk(ed_key(), "k1")), token)
    await refused(with_keys(jwk(rsa_key(), "k1")), token)


async def test_addresses_and_keys_in_the_header_are_never_used(with_keys: Callable[..., JwtVerifier]) -> None:
    thief = rsa_key("thief")
    async with origin({"/jwks": response(document(jwk(thief)))}) as server:
        for name in ("jku", "x5u"):
            header = {name: server.url("/jwks")}
            await refused(with_keys(), signed(key=thief, header=header))
            await refused(with_keys(), signed(key=thief, header={**header, "kid": ...}))
            await refused(with_keys(), signed(key=thief, header={**header, "kid": "new"}))
            assert await caller_of(with_keys(), signed(header=header))
        for kid in ("k1", "new", ...):
            await refused(with_keys(), signed(key=thief, header={"jwk": jwk(thief), "kid": kid}))
            await refused(with_keys(), signed(key=thief, header={"x5c": ["MIIB"], "x5t": "x", "kid": kid}))
        assert server.accepted == 0


@pytest.mark.parametrize(
    "extra",
    [
        {"crit": ["exp"], "exp": 1},
        {"crit": ["b64"], "b64": True},
        {"crit": []},
        {"crit": None},
        {"crit": "b64"},
        {"crit": ["http://claims.test/x"], "http://claims.test/x": 1},
        {"b64": False},
        {"b64": True},
        {"b64": None},
        {"cty": "JWT"},
        {"typ": "dpop+jwt"},
        {"typ": "logout+jwt"},
        {"typ": "JWE"},
        {"typ": ""},
        {"typ": None},
        {"typ": 1},
    ],
    ids=repr,
)
async def test_header_that_asks_for_what_is_not_supported_is_refused(extra: dict[str, Any]) -> None:
    await refused(with_secret(), assembled({"alg": "HS256", **extra}, hmac_key=SECRET.encode()))


@pytest.mark.parametrize(
    "extra", [{}, {"typ": "JWT"}, {"typ": "jwt"}, {"typ": "at+jwt"}, {"typ": "application/at+jwt"}]
)
async def test_type_of_an_access_token_or_none_is_taken(extra: dict[str, Any]) -> None:
    assert await caller_of(with_secret(), assembled({"alg": "HS256", **extra}, hmac_key=SECRET.encode()))


async def test_detached_and_unencoded_payloads_are_refused() -> None:
    header = base64url({"alg": "HS256", "b64": False, "crit": ["b64"]})
    await refused(with_secret(), f"{header}..{base64url(b'x' * 32)}")
    await refused(with_secret(), f"{header}.{json.dumps(claims())}.{base64url(b'x' * 32)}")


async def test_token_in_a_token_is_refused() -> None:
    inner = signed("HS256")
    await refused(with_secret(), assembled({"alg": "HS256"}, inner.encode(), hmac_key=SECRET.encode()))
    await refused(with_secret(), assembled({"alg": "HS256"}, json.dumps(inner).encode(), hmac_key=SECRET.encode()))


# --- form and size


@pytest.mark.parametrize(
    "token",
    [
        "",
        ".",
        "..",
        "...",
        "a.b.c",
        "a.b.c.d.e",
        "act_abc_def",
        signed("HS256") + ".",
        "." + signed("HS256"),
        signed("HS256") + "\n",
        signed("HS256") + "=",
        " " + signed("HS256"),
        signed("HS256").replace(".", ".é", 1),
        signed("HS256").replace(".", "=.", 1),
        signed("HS256").replace(".", "\x00.", 1),
        assembled(b"[" * 4_000, hmac_key=SECRET.encode()),
        assembled(b'{"alg":"HS256","a":' + b"[" * 4_000, hmac_key=SECRET.encode()),
        assembled(b'{"alg":"HS256","a":' + b"9" * 5_000 + b"}", hmac_key=SECRET.encode()),
        assembled({"alg": "HS256"}, b"[" * 5_000, hmac_key=SECRET.encode()),
        assembled({"alg": "HS256"}, b'{"exp":' + b"9" * 5_000 + b"}", hmac_key=SECRET.encode()),
        assembled({"alg": "HS256"}, b"\xff\xfe{}", hmac_key=SECRET.encode()),
        assembled({"alg": "HS256"}, b"", hmac_key=SECRET.encode()),
        assembled(["HS256"], hmac_key=SECRET.encode()),
        assembled({"alg": "HS256"}, [claims()], hmac_key=SECRET.encode()),
    ],
    ids=lambda token: repr(token[:12]),
)
async def test_what_is_no_token_is_refused(token: str) -> None:
    await refused(with_secret(), token)


async def test_token_over_eight_kilobytes_is_refused_before_anything_is_read() -> None:
    def padded(characters: int) -> str:
        header = {"alg": "HS256"}
        short = len(assembled(header, claims(padding=""), hmac_key=SECRET.encode()))
        missing = (characters - short) * 3 // 4
        return assembled(header, claims(padding="x" * missing), hmac_key=SECRET.encode())

    at_bound, over = padded(8192), padded(8196)
    assert len(at_bound) in range(8185, 8193)
    assert len(over) in range(8193, 8200)
    assert await caller_of(with_secret(), at_bound)
    await refused(with_secret(), over)


# --- claims


@pytest.mark.parametrize("name", ["exp", "iat", "iss", "aud", "sub", "tenant"])
@pytest.mark.parametrize("value", [..., None, "", [], {}, True, " ", "\u0000"], ids=repr)
async def test_each_required_claim_must_be_there_and_be_something(name: str, value: Any) -> None:
    await refused(with_secret(), signed_raw(**{name: value}))


def signed_raw(**changes: Any) -> str:
    """PyJWT refuses to write some claims."""
    return assembled({"alg": "HS256"}, claims(**changes), hmac_key=SECRET.encode())


@pytest.mark.parametrize("name", ["sub", "tenant"])
@pytest.mark.parametrize(
    "value",
    ["a" * 257, "a\nb", "a\u0000", "a\u202eb", "a\u200b", "\ud800", " a", "a ", "a\u00a0b", 7, 1.5, ["a"], {"a": 1}],
    ids=lambda value: ascii(value)[:12],
)
async def test_names_of_callers_are_bounded_printable_texts(name: str, value: Any) -> None:
    await refused(with_secret(), signed_raw(**{name: value}))


@pytest.mark.parametrize("value", ["a" * 256, "auth0|5f7c8ec7", "Zoë", "日本", "a b", "*", "a:b"])
async def test_names_that_issuers_really_use_are_taken(value: str) -> None:
    caller = await caller_of(with_secret(), signed_raw(sub=value, tenant=value))
    assert (caller.subject, caller.tenant) == (value, value)


@pytest.mark.parametrize(
    "issuer",
    ["https://issuer.test", "https://issuer.test//", "HTTPS://ISSUER.TEST/", "https://evil.test/", [ISSUER], 1],
)
async def test_only_the_configured_issuer_is_taken_letter_by_letter(issuer: Any) -> None:
    await refused(with_secret(), signed_raw(iss=issuer))


@pytest.mark.parametrize("audience", [AUDIENCE, [AUDIENCE], ["other", AUDIENCE]])
async def test_audience_may_be_one_of_several(audience: Any) -> None:
    assert await caller_of(with_secret(), signed("HS256", aud=audience))


@pytest.mark.parametrize(
    "audience",
    [
        "other",
        ["other"],
        AUDIENCE + "/",
        AUDIENCE[:-1],
        AUDIENCE.upper(),
        [AUDIENCE, 1],
        [[AUDIENCE]],
        {AUDIENCE: 1},
        1,
    ],
    ids=repr,
)
async def test_token_for_another_audience_is_refused(audience: Any) -> None:
    await refused(with_secret(), signed("HS256", aud=audience))


@pytest.mark.parametrize(
    ("changes", "good_at", "bad_at"),
    [
        ({"exp": NOW, "iat": NOW - 100}, NOW + 29.9, NOW + 30),
        ({"exp": NOW + 0.5, "iat": NOW - 100}, NOW + 30.4, NOW + 30.5),
        ({"iat": NOW}, NOW - 30, NOW - 30.1),
        ({"iat": NOW, "nbf": NOW + 100}, NOW + 70, NOW + 69.9),
    ],
    ids=["exp", "exp with a fraction", "iat", "nbf"],
)
async def test_times_have_a_leeway_of_30_seconds_and_no_more(
    changes: dict[str, Any], good_at: float, bad_at: float
) -> None:
    token = signed("HS256", **changes)
    assert await caller_of(with_secret(now=lambda: good_at), token)
    await refused(with_secret(now=lambda: bad_at), token)


@pytest.mark.parametrize("name", ["exp", "iat", "nbf"])
@pytest.mark.parametrize(
    "value",
    [str(NOW), f"{NOW}", "tomorrow", True, [NOW], {}, -1, float("nan"), float("inf"), 10**30, 1e300, 253_402_300_800],
    ids=repr,
)
async def test_times_must_be_numbers_of_seconds(name: str, value: Any) -> None:
    await refused(with_secret(now=lambda: NOW), signed_raw(**{name: value}))


async def test_expiry_comes_with_the_caller_and_is_when_the_token_is_refused_first() -> None:
    token = signed("HS256", exp=NOW + 600)
    _, good_until = await with_secret().verify(token)
    assert good_until == NOW + 630
    assert await caller_of(with_secret(now=lambda: good_until - 0.001), token)
    await refused(with_secret(now=lambda: good_until), token)


# --- what is seen of a refusal


async def test_log_says_why_at_debug_and_holds_nothing_of_the_token(caplog: pytest.LogCaptureFixture) -> None:
    token = signed("HS256", exp=NOW - 60, sub="canary-subject", header={"kid": "canary-kid"})
    with caplog.at_level(logging.INFO, "app.access"):
        await refused(with_secret(), token)
    assert caplog.records == []
    with caplog.at_level(logging.DEBUG, "app.access"):
        for bad in (token, "canary." * 2, assembled(b'{"canary', hmac_key=b"x"), signed_raw(tenant="canary\n")):
            await refused(with_secret(), bad)
    lines = [str(vars(record)) for record in caplog.records]
    assert "expired" in lines[0]
    assert len(lines) == 4
    assert not any("canary" in line or token[:20] in line for line in lines)


async def test_while_the_keys_were_never_read_only_what_could_be_good_is_told_so(tmp_path: Path) -> None:
    verifier = JwtVerifier(rules(jwks=str(tmp_path / "missing.json")), clock=lambda: NOW)
    with pytest.raises(DependencyUnavailable) as caught:
        await verifier.verify(signed())
    assert caught.value.retry_after_ms is not None
    assert 0 < caught.value.retry_after_ms <= 10_000
    await refused(verifier, signed("HS256"))
    await refused(verifier, "nonsense")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
HEADERS = st.dictionaries(st.sampled_from(["alg", "kid", "typ", "crit", "b64", "cty", "jku", "jwk"]) | st.text(), JSON)
CLAIMS = st.dictionaries(st.sampled_from(sorted(claims())) | st.sampled_from(["nbf", "jti"]) | st.text(), JSON)
ANY = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@ANY
@given(st.text() | st.from_regex(r"[\w=-]{0,40}\.[\w=-]{0,40}\.[\w=-]{0,40}"))
async def test_any_text_is_refused_and_raises_nothing_else(token: str) -> None:
    await refused(with_secret(), token)


@ANY
@given(HEADERS, st.booleans())
async def test_any_header_is_refused_or_taken_and_raises_nothing_else(header: dict[str, Any], whole: bool) -> None:
    token = assembled({"alg": "HS256", **header} if whole else header, hmac_key=SECRET.encode())
    try:
        assert (await with_secret().verify(token))[0].subject == "alice"
    except Unauthenticated:
        pass


@ANY
@given(CLAIMS)
async def test_any_claims_are_refused_or_taken_and_raise_nothing_else(changes: dict[str, Any]) -> None:
    try:
        caller, good_until = await with_secret().verify(signed_raw(**changes))
    except Unauthenticated:
        return
    assert all(isinstance(text, str) and 0 < len(text) <= 256 for text in (caller.tenant, caller.subject))
    assert good_until > NOW


# --- the whole way


def test_service_takes_the_tokens_of_its_issuer_and_no_others(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "jwks.json").write_bytes(document(jwk(rsa_key())))
    running = serve(
        JWT_ISSUER=ISSUER, JWT_AUDIENCE=AUDIENCE, JWT_ALGORITHMS="RS256", JWT_JWKS=str(tmp_path / "jwks.json")
    )
    now = time.time()

    def answer(token: str) -> Any:
        call = {"jsonrpc": "2.0", "id": 1, "method": "tools.execute"}
        body = {**call, "params": {"tool_id": "echo", "parameters": {"message": "hi"}}}
        headers = {"authorization": f"Bearer {token}"}
        response = running.http.post("/api/v1/jsonrpc", json=body, headers=headers)
        told = response.json()
        return response.status_code, told["error"]["code"] if "error" in told else told["result"]["status"]

    times = {"iat": now, "exp": now + 60}
    assert answer(signed(**times)) == (200, "success")
    assert answer(signed(**times, scope="tools:read")) == (200, -32003)
    assert answer(signed(key=rsa_key("thief"), **times)) == (401, -32002)
    assert answer(signed("HS256", **times)) == (401, -32002)
    assert answer(signed(iat=now - 100, exp=now - 31)) == (401, -32002)
    assert answer(assembled({"alg": "none"}, claims(**times))) == (401, -32002)


# --- settings


def test_without_any_jwt_setting_there_are_no_rules() -> None:
    assert jwt_rules(issuer=None, audience=None, algorithms=(), secret=None, jwks=None, tenant_claim="org") is None


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"issuer": None}, "JWT_ISSUER"),
        ({"issuer": " "}, "JWT_ISSUER"),
        ({"audience": None}, "JWT_AUDIENCE"),
        ({"audience": ""}, "JWT_AUDIENCE"),
        ({"algorithms": ()}, "JWT_ALGORITHMS"),
        ({"algorithms": ("none",)}, "JWT_ALGORITHMS"),
        ({"algorithms": ("HS256", "none")}, "JWT_ALGORITHMS"),
        ({"algorithms": ("HS256", "RS256")}, "JWT_ALGORITHMS"),
        ({"algorithms": ("RS256",)}, "JWT_ALGORITHMS"),
        ({"secret": None}, "JWT_SECRET"),
        ({"jwks": "jwks.json"}, "JWT_SECRET"),
        ({"secret": None, "jwks": "jwks.json"}, "JWT_ALGORITHMS"),
        ({"secret": None, "jwks": "jwks.json", "algorithms": ("RS256", "HS256")}, "JWT_ALGORITHMS"),
        ({"secret": None, "jwks": "ftp://issuer.test/keys", "algorithms": ("RS256",)}, "JWT_JWKS"),
        ({"secret": None, "jwks": "file:///etc/keys", "algorithms": ("RS256",)}, "JWT_JWKS"),
        ({"secret": None, "jwks": "https://", "algorithms": ("RS256",)}, "JWT_JWKS"),
        ({"secret": None, "jwks": "https://[::1", "algorithms": ("RS256",)}, "JWT_JWKS"),
        ({"secret": "x" * 31}, "JWT_SECRET"),
        ({"secret": "x" * 47, "algorithms": ("HS256", "HS384")}, "JWT_SECRET"),
        ({"secret": "x" * 63, "algorithms": ("HS512",)}, "JWT_SECRET"),
        ({"secret": PUBLIC_PEM.decode()}, "JWT_SECRET"),
        ({"secret": PUBLIC_JWK.decode()}, "JWT_SECRET"),
        ({"secret": "x" * 32 + "\udcff"}, "JWT_SECRET"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_by_name(given: dict[str, Any], named: str) -> None:
    good = {"issuer": ISSUER, "audience": AUDIENCE, "algorithms": ("HS256",), "secret": "x" * 32, "jwks": None}
    assert jwt_rules(**good) is not None
    with pytest.raises(ValueError, match=named) as caught:
        jwt_rules(**{**good, **given})
    assert type(caught.value) is ValueError
    assert "x" * 31 not in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {"issuer": ISSUER},
        {"audience": AUDIENCE},
        {"algorithms": ("RS256",)},
        {"secret": SECRET},
        {"jwks": "jwks.json"},
    ],
    ids=str,
)
def test_one_jwt_setting_alone_asks_for_the_others(given: dict[str, Any]) -> None:
    none = {"issuer": None, "audience": None, "algorithms": (), "secret": None, "jwks": None}
    with pytest.raises(ValueError, match="JWT_"):
        jwt_rules(**{**none, **given})


def test_secret_makes_a_fixed_key_and_jwks_a_key_set() -> None:
    assert isinstance(keys_for(rules(algorithms=("HS256",), secret=SECRET)), FixedKey)
    for jwks in ("keys.json", "/run/keys.json", "https://issuer.test/keys"):
        assert isinstance(keys_for(rules(jwks=jwks)), KeySet)


def test_secret_is_not_shown_with_the_rules() -> None:
    assert SECRET not in repr(rules(algorithms=("HS256",), secret=SECRET))
