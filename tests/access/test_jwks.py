"""The issuer's keys: which are taken, when they are read again, and that a bad issuer cannot harm."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import os
import ssl
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from app.access.jwks import (
    DOCUMENT_BYTES_MAX,
    FILE_INTERVAL_S,
    KEYS_MAX,
    RETRY_INTERVAL_S,
    UNKNOWN_KEY_INTERVAL_S,
    URL_INTERVAL_S,
    WAITING_MAX,
    FileSource,
    FixedKey,
    KeySet,
    UnreadableKeys,
    UrlSource,
    parse_keys,
)
from app.errors import DependencyUnavailable
from tests.access.tokens import document, ec_key, ed448_key, ed_key, jwk, rsa_key
from tests.certificates import make_certificate
from tests.origin import WAIT_S_MAX, Origin, Received, Reply, origin, redirect, response

pytestmark = pytest.mark.anyio

PATH = "/keys"
ONE = response(document(jwk(ec_key(), "one")))
TWO = response(document(jwk(ec_key(), "one"), jwk(ed_key(), "two")))


class Time:
    """A clock that stands until it is moved, and sleepers that wake when it passes their time."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.asked: asyncio.Queue[float] = asyncio.Queue()
        self._wake = asyncio.Event()

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        ends = self.now + seconds
        self.asked.put_nowait(seconds)
        while self.now < ends:
            await self._wake.wait()

    def move(self, seconds: float) -> None:
        self.now += seconds
        self._wake.set()
        self._wake = asyncio.Event()

    async def slept(self) -> float:
        """Waits until somebody sleeps; the seconds that it wants."""
        return await asyncio.wait_for(self.asked.get(), WAIT_S_MAX)


@asynccontextmanager
async def issuer(reply: Reply = ONE, **bounds: float) -> AsyncIterator[tuple[Origin, KeySet, Time]]:
    """A server with a key document, the set that reads it, and the set's clock."""
    async with origin({PATH: reply}) as server:
        time = Time()
        yield server, KeySet(UrlSource(server.url(PATH)), clock=time.clock, sleep=time.sleep, **bounds), time


@asynccontextmanager
async def kept_fresh(keys: KeySet | FixedKey) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.get_running_loop().create_task(keys.keep_fresh())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})


async def knows(keys: KeySet, *names: str | None) -> bool:
    return [await keys.find(name) is not None for name in names] == [True] * len(names)


# --- which keys of a document are taken


@pytest.mark.parametrize(
    ("key", "algorithms"),
    [
        (jwk(rsa_key()), {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}),
        (jwk(rsa_key(), alg="RS512"), {"RS512"}),
        (jwk(rsa_key(), use="sig", key_ops=["verify"], x5c=["MIIB"], x5u="http://127.0.0.1:9/"), None),
        (jwk(ec_key()), {"ES256"}),
        (jwk(ec_key(ec.SECP384R1)), {"ES384"}),
        (jwk(ec_key(ec.SECP521R1)), {"ES512"}),
        (jwk(ed_key()), {"EdDSA"}),
    ],
)
def test_public_keys_verify_what_their_type_or_their_alg_says(key: dict[str, Any], algorithms: set[str] | None) -> None:
    keys, ignored = parse_keys(document(key))
    assert ignored == ()
    assert algorithms is None or keys["k1"].algorithms == algorithms


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (jwk(rsa_key(), use="enc"), "not for signatures"),
        (jwk(rsa_key(), use=None), "not for signatures"),
        (jwk(rsa_key(), key_ops=["encrypt"]), "not for signatures"),
        (jwk(rsa_key(), key_ops="verify"), "not for signatures"),
        ({"kty": "oct", "k": "c2VjcmV0" * 8, "kid": "k1"}, "symmetric"),
        ({"kty": "oct", "k": "c2VjcmV0" * 8, "kid": "k1", "alg": "HS256", "use": "sig"}, "symmetric"),
        (jwk(rsa_key(), kty="LWE"), "not supported"),
        (jwk(rsa_key(), kty=["RSA"]), "not supported"),
        (jwk(rsa_key(), kty=None), "not supported"),
        (jwk(ec_key(), crv="P-192"), "not supported"),
        (jwk(ec_key(), crv=["P-256"]), "not supported"),
        (jwk(ec_key(ec.SECP256K1)), "not supported"),
        (jwk(ed448_key()), "not supported"),
        (jwk(ed_key(), crv="X25519"), "not supported"),
        (jwk(rsa_key("short", 1024)), "under 2048 bits"),
        (jwk(rsa_key(), n="A" * 1_401), "too long"),
        (jwk(rsa_key(), n=7), "missing"),
        (jwk(rsa_key(), e=...), "missing"),
        (jwk(rsa_key(), e=""), "not a key"),
        (jwk(rsa_key(), e="AQ"), "not a key"),
        (jwk(rsa_key(), n="!!!"), ""),
        (jwk(ec_key(), x="AAAA"), "not a key"),
        (jwk(ec_key(), y="A" * 43), "not a key"),
        (jwk(ed_key(), x="AAAA"), "not a key"),
        (jwk(rsa_key(), alg="HS256"), "alg does not fit"),
        (jwk(rsa_key(), alg="ES256"), "alg does not fit"),
        (jwk(rsa_key(), alg="none"), "alg does not fit"),
        (jwk(rsa_key(), alg=None), "alg does not fit"),
        (jwk(ec_key(), alg="ES384"), "alg does not fit"),
        (jwk(ec_key(), d="AAAA"), "private"),
        ({**jwk(rsa_key()), "kid": 7}, "kid"),
        ({**jwk(rsa_key()), "kid": ""}, "kid"),
        ({**jwk(rsa_key()), "kid": None}, "kid"),
        ({**jwk(rsa_key()), "kid": "k" * 257}, "kid"),
        ("k1", "not an object"),
        (None, "not an object"),
    ],
)
def test_key_that_must_not_verify_is_ignored_and_the_others_are_taken(key: Any, reason: str) -> None:
    if isinstance(key, dict):
        key = {name: value for name, value in key.items() if value is not ...}
    keys, ignored = parse_keys(document(key, jwk(ec_key(), "good")))
    assert set(keys) == {"good"}
    assert len(ignored) == 1
    assert reason in ignored[0][1]


def test_second_key_of_a_kid_is_ignored_and_one_key_may_have_none() -> None:
    same = [jwk(ec_key(), "one"), jwk(rsa_key(), "one"), jwk(ed_key(), None), jwk(rsa_key(), None)]
    keys, ignored = parse_keys(document(*same))
    assert {kid: key.algorithms for kid, key in keys.items()} == {"one": {"ES256"}, None: {"EdDSA"}}
    assert [reason for _, reason in ignored] == ["kid is there twice"] * 2


def test_encryption_key_does_not_take_the_kid_of_a_signing_key() -> None:
    keys, _ = parse_keys(document(jwk(rsa_key(), "one", use="enc"), jwk(ec_key(), "one", use="sig")))
    assert keys["one"].algorithms == {"ES256"}


def test_number_of_keys_is_bounded() -> None:
    keys, ignored = parse_keys(document(*[jwk(ed_key(), f"k{number}") for number in range(KEYS_MAX + 50)]))
    assert len(keys) == KEYS_MAX
    assert ignored == (("", f"more than {KEYS_MAX} keys"),)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b"{}", b'{"keys": {}}', b'{"keys": "x"}', b'{"keys": null}', b"\xff", b"[" * 9_000],
    ids=lambda text: repr(text[:14]),
)
def test_what_is_no_key_set_is_unreadable(text: bytes) -> None:
    with pytest.raises(UnreadableKeys, match="not a JWK Set"):
        parse_keys(text)


async def test_ignored_keys_are_logged_once_for_a_document(caplog: pytest.LogCaptureFixture) -> None:
    async with issuer(response(document(jwk(rsa_key(), "bad", use="enc"), jwk(ec_key(), "one")))) as (_, keys, _):
        for _ in range(3):
            await keys.refresh()
        assert await knows(keys, "one")
    lines = [vars(record) for record in caplog.records if record.message == "token keys ignored"]
    assert [line["first"] for line in lines] == [["'bad': not for signatures"]]


# --- when the issuer is asked


async def test_first_calls_share_one_reading() -> None:
    async with issuer() as (server, keys, _):
        server.gate.clear()
        calls = [asyncio.ensure_future(keys.find("one")) for _ in range(100)]
        await server.until(lambda: len(server.received) == 1)
        server.gate.set()
        assert None not in await asyncio.gather(*calls)
        assert len(server.received) == 1
        assert (server.received[0].method, server.received[0].headers["accept-encoding"]) == ("GET", "identity")


async def test_known_keys_ask_the_issuer_no_more() -> None:
    async with issuer() as (server, keys, time):
        for _ in range(10):
            assert await knows(keys, "one")
            time.move(1_000)
        assert len(server.received) == 1


async def test_flood_of_unknown_kids_asks_the_issuer_at_most_once_in_ten_seconds() -> None:
    async with issuer() as (server, keys, time):
        assert await knows(keys, "one")
        for second in range(30):
            found = await asyncio.gather(*(keys.find(f"invented-{second}-{number}") for number in range(50)))
            assert found == [None] * 50
            assert await knows(keys, "one")
            assert len(server.received) == 1 + second // 10
            time.move(1.0)


async def test_new_key_is_found_by_the_first_token_that_names_it() -> None:
    async with issuer() as (server, keys, time):
        assert await knows(keys, "one")
        server.replies[PATH] = TWO
        assert await keys.find("two") is None
        time.move(UNKNOWN_KEY_INTERVAL_S)
        assert await knows(keys, "two", "one")
        assert len(server.received) == 2


async def test_rotation_drops_the_old_key_and_changes_the_generation() -> None:
    async with issuer(TWO) as (server, keys, _):
        before = keys.generation
        await keys.refresh()
        first = keys.generation
        assert first != before
        server.replies[PATH] = response(document(jwk(ed_key(), "two")))
        await keys.refresh()
        assert keys.generation != first
        assert await keys.find("one") is None
        assert await knows(keys, "two")


async def test_new_key_under_an_old_kid_changes_the_generation() -> None:
    async with issuer(response(document(jwk(rsa_key(), "one")))) as (server, keys, _):
        await keys.refresh()
        first = keys.generation
        for changed in (jwk(rsa_key("new"), "one"), jwk(rsa_key("new"), "one", alg="PS256")):
            server.replies[PATH] = response(document(changed))
            await keys.refresh()
            assert keys.generation == (first := first + 1)


async def test_same_keys_written_otherwise_keep_the_generation() -> None:
    async with issuer(TWO) as (server, keys, _):
        await keys.refresh()
        first = keys.generation
        other = {"issued": 1, "keys": [jwk(ed_key(), "two", use="sig"), jwk(ec_key(), "one", x5t="x")]}
        server.replies[PATH] = response(json.dumps(other, indent=2).encode())
        await keys.refresh()
        assert keys.generation == first
        assert len(server.received) == 2


async def test_set_without_a_usable_key_is_believed() -> None:
    async with issuer() as (server, keys, _):
        assert await knows(keys, "one")
        server.replies[PATH] = response(document())
        await keys.refresh()
        assert await keys.find("one") is None


async def test_keys_are_read_at_once_and_then_every_five_minutes() -> None:
    async with issuer() as (server, keys, time), kept_fresh(keys):
        for readings in range(1, 4):
            assert await time.slept() == URL_INTERVAL_S
            assert len(server.received) == readings
            time.move(URL_INTERVAL_S)


async def test_after_a_failure_the_next_reading_is_sooner() -> None:
    async with issuer(response(status="500 Broken")) as (server, keys, time), kept_fresh(keys):
        assert await time.slept() == RETRY_INTERVAL_S
        server.replies[PATH] = ONE
        time.move(RETRY_INTERVAL_S)
        assert await time.slept() == URL_INTERVAL_S
        assert await knows(keys, "one")


async def test_end_of_the_background_task_ends_its_reading() -> None:
    async with issuer() as (server, keys, _):
        server.gate.clear()
        async with kept_fresh(keys) as task:
            await server.until(lambda: server.open == 1)
        assert task.cancelled()
        await server.until(lambda: server.open == 0)


async def test_call_that_is_cancelled_ends_the_reading_for_nobody() -> None:
    async with issuer() as (server, keys, _):
        server.gate.clear()
        first, second = (asyncio.ensure_future(keys.find("one")) for _ in range(2))
        await server.until(lambda: len(server.received) == 1)
        first.cancel()
        await asyncio.wait({first})
        server.gate.set()
        assert await second is not None
        assert len(server.received) == 1


async def test_calls_that_wait_for_the_issuer_are_bounded_in_number() -> None:
    async with issuer() as (server, keys, time):
        assert await knows(keys, "one")
        time.move(UNKNOWN_KEY_INTERVAL_S)
        server.gate.clear()
        waiting = [asyncio.ensure_future(keys.find(f"invented-{number}")) for number in range(WAITING_MAX)]
        await server.until(lambda: len(server.received) == 2)
        assert await asyncio.wait_for(keys.find("one more"), WAIT_S_MAX) is None
        assert not any(call.done() for call in waiting)
        server.gate.set()
        assert await asyncio.gather(*waiting) == [None] * WAITING_MAX


# --- an issuer that is away, slow or bad


async def trickle(request: Received, writer: Any) -> None:
    """A document that never ends and never stops."""
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.01)


async def silent(request: Received, writer: Any) -> None:
    await asyncio.Event().wait()


async def endless(request: Received, writer: Any) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        writer.write(b" " * 65_536)
        await writer.drain()


async def cut_off(request: Received, writer: Any) -> None:
    """Closes in the middle of what it announced."""
    writer.write(response(document(jwk(ed_key(), "two")))[:-3])
    await writer.drain()


BAD: dict[str, Reply] = {
    "error status": response(document(jwk(ed_key(), "two")), status="500 Broken"),
    "not found": response(status="404 Not Found"),
    "partial": response(document(jwk(ed_key(), "two")), status="206 Partial Content"),
    "no content": response(status="204 No Content"),
    "not HTTP": b"SSH-2.0-OpenSSH\r\n\r\n",
    "not JSON": response(b"<html>Sign in</html>", content_type="text/html"),
    "not a set": response(b'{"jwks": []}'),
    "too large by its length": response(document(jwk(ed_key(), "two")) + b" " * DOCUMENT_BYTES_MAX),
    "too large and endless": endless,
    "cut off": cut_off,
    "compressed": response(gzip.compress(document(jwk(ed_key(), "two"))), content_encoding="gzip"),
    "silent": silent,
    "trickling": trickle,
}
SOON = {"load_s_max": 1.0, "find_wait_s_max": 1.5}
"""Bounds that let a test of them end; those of the service are seconds."""


@pytest.mark.parametrize("reply", BAD.values(), ids=BAD)
async def test_bad_answer_keeps_the_old_keys(reply: Reply) -> None:
    bounds = SOON if reply in (silent, trickle) else {}
    async with issuer(**bounds) as (server, keys, time):
        assert await knows(keys, "one")
        generation = keys.generation
        server.replies[PATH] = reply
        time.move(UNKNOWN_KEY_INTERVAL_S)
        assert await keys.find("two") is None
        await server.until(lambda: len(server.received) == 2)
        await keys.refresh()
        assert await knows(keys, "one")
        assert keys.generation == generation
        server.replies[PATH] = TWO
        await keys.refresh()
        assert await knows(keys, "one", "two")


@pytest.mark.parametrize("reply", BAD.values(), ids=BAD)
async def test_without_any_keys_yet_a_bad_answer_is_a_dependency_that_is_away(reply: Reply) -> None:
    bounds = SOON if reply in (silent, trickle) else {}
    async with issuer(reply, **bounds) as (server, keys, time):
        for _ in range(5):
            with pytest.raises(DependencyUnavailable) as caught:
                await keys.find("one")
            assert caught.value.retry_after_ms == 10_000
        await keys.refresh()  # one that was too slow for `find` may still be under way
        asked = len(server.received)
        assert asked <= 2
        server.replies[PATH] = ONE
        time.move(UNKNOWN_KEY_INTERVAL_S)
        assert await knows(keys, "one")


async def test_issuer_that_is_not_there_keeps_the_old_keys() -> None:
    async with issuer() as (_, keys, time):
        assert await knows(keys, "one")
    time.move(UNKNOWN_KEY_INTERVAL_S)
    assert await keys.find("two") is None
    assert await knows(keys, "one")


async def test_slow_issuer_holds_a_call_for_its_bound_and_then_goes_on_for_the_next() -> None:
    async with issuer(find_wait_s_max=0.05) as (server, keys, _):
        server.gate.clear()
        with pytest.raises(DependencyUnavailable):
            await keys.find("one")
        server.gate.set()
        await keys.refresh()
        assert await knows(keys, "one")
        assert len(server.received) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirect_is_not_followed(status: int) -> None:
    async with origin({"/": ONE, "/stolen": ONE}) as elsewhere, issuer() as (server, keys, _):
        for target in (elsewhere.url("/stolen"), "/other", "file:///etc/passwd"):
            server.replies[PATH] = redirect(target, status)
            await keys.refresh()
        assert elsewhere.accepted == 0
        assert {request.target for request in server.received} == {PATH}
        with pytest.raises(DependencyUnavailable):
            await keys.find("one")


async def test_proxies_of_the_environment_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    async with origin({PATH: ONE}) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url())
        async with issuer() as (_, keys, _):
            assert await knows(keys, "one")
        assert proxy.accepted == 0


async def test_issuer_without_a_trusted_certificate_is_not_believed(tmp_path: Path) -> None:
    async with origin({PATH: ONE}, tls=self_signed(tmp_path)) as server:
        keys = KeySet(UrlSource(server.url(PATH)))
        with pytest.raises(DependencyUnavailable):
            await keys.find("one")
        assert server.received == []


def self_signed(folder: Path) -> ssl.SSLContext:
    """A server's context with a certificate for 127.0.0.1 that nobody has signed but itself."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(make_certificate(folder, "127.0.0.1"))
    return context


async def test_failures_are_logged_at_most_once_a_minute_without_the_address(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "app.access")
    async with origin({PATH: response(status="500 Broken")}) as server:
        time = Time()
        url = server.url(PATH).replace("//", "//user:canary@") + "?key=canary"
        keys = KeySet(UrlSource(url), clock=time.clock, sleep=time.sleep)
        for _ in range(12):
            await keys.refresh()
            time.move(10.0)
        server.replies[PATH] = ONE
        await keys.refresh()
    lines = [(record.message, vars(record).get("reason")) for record in caplog.records if record.name == "app.access"]
    failed = ("token keys cannot be read; see JWT_JWKS", "HTTP status 500")
    assert lines == [failed, failed, ("token keys read", None), ("token keys can be read again", None)]
    assert not any("canary" in str(vars(record)) for record in caplog.records if record.name == "app.access")


# --- files


async def test_file_is_read_again_when_it_changed(tmp_path: Path) -> None:
    path, time = tmp_path / "keys.json", Time()
    path.write_bytes(document(jwk(ec_key(), "one")))
    keys = KeySet(FileSource(path), clock=time.clock, sleep=time.sleep)
    async with kept_fresh(keys):
        assert await time.slept() == FILE_INTERVAL_S
        assert await knows(keys, "one")
        generation = keys.generation
        time.move(FILE_INTERVAL_S)
        assert await time.slept() == FILE_INTERVAL_S
        assert keys.generation == generation
        replacement = tmp_path / "new"
        replacement.write_bytes(document(jwk(ed_key(), "two")))
        replacement.replace(path)
        time.move(FILE_INTERVAL_S)
        await time.slept()
        assert keys.generation != generation
        assert await knows(keys, "two")
        assert await keys.find("one") is None


def _absent(path: Path) -> None:
    path.unlink()


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _huge(path: Path) -> None:
    path.write_bytes(document(jwk(ed_key(), "two")) + b" " * DOCUMENT_BYTES_MAX)


def _torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize("spoil", [_absent, _folder, _huge, _torn])
async def test_file_that_cannot_be_used_keeps_the_old_keys(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    path, time = tmp_path / "keys.json", Time()
    path.write_bytes(document(jwk(ec_key(), "one")))
    keys = KeySet(FileSource(path), clock=time.clock)
    assert await knows(keys, "one")
    spoil(path)
    await keys.refresh()
    assert await knows(keys, "one")
    never = KeySet(FileSource(path), clock=time.clock)
    with pytest.raises(DependencyUnavailable):
        await never.find("one")


async def test_file_system_that_hangs_holds_one_thread_and_no_call(tmp_path: Path) -> None:
    path, pipe = tmp_path / "keys.json", tmp_path / "pipe"
    os.mkfifo(path)
    before = set(threading.enumerate())
    keys = KeySet(FileSource(path), load_s_max=0.05, find_wait_s_max=0.05)
    try:
        with pytest.raises(DependencyUnavailable):
            await keys.find("one")
        for _ in range(3):
            await keys.refresh()
        assert len(set(threading.enumerate()) - before) <= 1  # one of earlier reads may be free
        path.rename(pipe)
        path.write_bytes(document(jwk(ec_key(), "one")))
    finally:
        os.close(os.open(pipe if pipe.exists() else path, os.O_RDWR))  # whoever waits for a writer goes on
    async with asyncio.timeout(WAIT_S_MAX):
        while keys.generation == 0:
            await keys.refresh()
    assert await knows(keys, "one")


async def test_fixed_key_has_nothing_to_keep_fresh_and_waits_for_its_end() -> None:
    fixed = FixedKey(b"x" * 32, frozenset({"HS256"}))
    async with kept_fresh(fixed) as task:
        assert (await fixed.find(None)).algorithms == {"HS256"}
        assert not task.done()
    assert task.cancelled()
    assert fixed.generation == 0
