"""The issuer's public keys: read from a file or a URL, kept by their `kid`, read again in time.

Knows documents and keys, no token and no caller. `jwt.py` looks keys up; the composition root runs `keep_fresh`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jwt
import orjson
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt.algorithms import AllowedPublicKeys

from app.errors import DependencyUnavailable
from app.off_loop import off_loop
from app.telemetry.supervision import ignore_result

logger = logging.getLogger("app.access")

DOCUMENT_BYTES_MAX = 1024 * 1024
"""A key is under 2 KB, with a chain of certificates under 10."""

KEYS_MAX = 100
"""Large issuers publish about ten; past it the rest is ignored."""

KEY_ID_CHARACTERS_MAX = 256
MEMBER_CHARACTERS_MAX = 1_400
"""The modulus of RSA with 8192 bits is 1,366 characters; a longer one would make every verification slow."""

RSA_BITS_MIN = 2048
"""NIST SP 800-131A, RFC 7518 section 3.3."""

CONNECT_S_MAX = 2.0
READ_S_MAX = 3.0
LOAD_S_MAX = 5.0
"""For one reading of the document altogether, however slowly it trickles."""

FIND_WAIT_S_MAX = 3.0
"""What a call with a new `kid` waits for the document; the reading itself goes on."""

WAITING_MAX = 1_000
"""Calls that wait for one reading; a flood of invented `kid`s gets its refusal at once then."""

UNKNOWN_KEY_INTERVAL_S = 10.0
"""Anyone can invent a `kid`, so no more often than this is the issuer asked about one."""

URL_INTERVAL_S = 300.0
FILE_INTERVAL_S = 10.0
"""Reading a local file of 2 KB takes microseconds, and a key that was taken out of it should be gone soon."""

RETRY_INTERVAL_S = 30.0
WARNING_INTERVAL_S = 60.0


class UnreadableKeys(Exception):
    """The document could not be had. The message is a reason for the log and holds nothing of the document."""


class FileSource:
    """A document on this machine, as a mounted secret."""

    interval_s = FILE_INTERVAL_S

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reading: asyncio.Future[bytes] | None = None

    async def read(self) -> bytes:
        # In a thread, for a network file system may hang; one at a time, so that a hung one does not take them all.
        if self._reading is None or self._reading.done():
            self._reading = asyncio.ensure_future(off_loop(self._read))
            self._reading.add_done_callback(ignore_result)
        await asyncio.wait({self._reading})
        return self._reading.result()

    def _read(self) -> bytes:
        try:
            with self._path.open("rb") as file:
                document = file.read(DOCUMENT_BYTES_MAX + 1)
        except OSError as error:
            raise UnreadableKeys(f"file: {error.strerror}") from None
        _check_size(document)
        return document


class UrlSource:
    """A document that the issuer serves. No proxy and no trust store of the environment, no redirect."""

    interval_s = URL_INTERVAL_S

    def __init__(self, url: str) -> None:
        self._url = url
        self._tls = httpx.create_ssl_context(trust_env=False)

    async def read(self) -> bytes:
        # A client for each reading: after five minutes there is no connection left to use again.
        timeout = httpx.Timeout(READ_S_MAX, connect=CONNECT_S_MAX)
        # Not compressed, and not inflated if it is: a megabyte on the wire is a megabyte here.
        headers = {"accept": "application/json", "accept-encoding": "identity", "user-agent": "agentcore-tools"}
        try:
            async with (
                httpx.AsyncClient(verify=self._tls, timeout=timeout, trust_env=False, follow_redirects=False) as client,
                client.stream("GET", self._url, headers=headers) as response,
            ):
                return await _body(response)
        except httpx.HTTPError as error:
            raise UnreadableKeys(type(error).__name__) from None


async def _body(response: httpx.Response) -> bytes:
    if response.status_code != 200:
        raise UnreadableKeys(f"HTTP status {response.status_code}")
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        _check_size(body)
    return bytes(body)


def _check_size(document: bytes | bytearray) -> None:
    if len(document) > DOCUMENT_BYTES_MAX:
        raise UnreadableKeys(f"over {DOCUMENT_BYTES_MAX} bytes")


@dataclass(frozen=True, slots=True)
class VerifyingKey:
    """A key and the algorithms that it may verify: those of its type, or the one that the document names for it."""

    key: AllowedPublicKeys | bytes
    algorithms: frozenset[str]


_RSA = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
_FORMS: Mapping[tuple[Any, Any], tuple[tuple[str, ...], frozenset[str]]] = {
    ("RSA", None): (("n", "e"), _RSA),
    ("EC", "P-256"): (("x", "y"), frozenset({"ES256"})),
    ("EC", "P-384"): (("x", "y"), frozenset({"ES384"})),
    ("EC", "P-521"): (("x", "y"), frozenset({"ES512"})),
    ("OKP", "Ed25519"): (("x",), frozenset({"EdDSA"})),
}
"""By type and curve: the members that are the public key, and what it can verify."""

Keys = Mapping[str | None, VerifyingKey]
"""By `kid`. None is the one key without a `kid`, for tokens without one."""


class _Unusable(ValueError):
    """Why a key of the document is not taken."""


def parse_keys(document: bytes) -> tuple[Keys, tuple[tuple[str, str], ...]]:
    """The keys of a JWK Set (RFC 7517), and `kid` with reason of each that is not taken. Raises UnreadableKeys."""
    try:
        entries = orjson.loads(document)["keys"]
    except (ValueError, TypeError, KeyError):
        raise UnreadableKeys("not a JWK Set") from None
    if not isinstance(entries, list):
        raise UnreadableKeys("not a JWK Set")
    keys: dict[str | None, VerifyingKey] = {}
    ignored = []
    for entry in entries[:KEYS_MAX]:
        try:
            key_id = _key_id(entry)
            if key_id in keys:
                raise _Unusable("kid is there twice")
            keys[key_id] = _verifying_key(entry)
        except _Unusable as error:
            kid = entry.get("kid") if isinstance(entry, dict) else None
            ignored.append((repr(kid)[:KEY_ID_CHARACTERS_MAX], str(error)))
    if len(entries) > KEYS_MAX:
        ignored.append(("", f"more than {KEYS_MAX} keys"))
    return keys, tuple(ignored)


def _key_id(entry: Any) -> str | None:
    if not isinstance(entry, dict):
        raise _Unusable("not an object")
    if "kid" not in entry:
        return None
    key_id = entry["kid"]
    if not isinstance(key_id, str) or not 0 < len(key_id) <= KEY_ID_CHARACTERS_MAX:
        raise _Unusable(f"kid is not a text of 1 to {KEY_ID_CHARACTERS_MAX} characters")
    return key_id


def _verifying_key(entry: Mapping[str, Any]) -> VerifyingKey:
    if entry.get("use", "sig") != "sig" or "verify" not in _list_of(entry.get("key_ops", ["verify"])):
        raise _Unusable("not for signatures")
    form = str(entry.get("kty")), entry.get("crv") if entry.get("kty") != "RSA" else None
    if form[0] == "oct":
        raise _Unusable("symmetric")
    if not isinstance(form[1], str | None) or form not in _FORMS:
        raise _Unusable("type or curve is not supported")
    names, algorithms = _FORMS[form]
    if "d" in entry:
        raise _Unusable("private key, known to all who can read the document: replace it")
    if "alg" in entry:
        algorithms = algorithms.intersection(_list_of([entry["alg"]]))
    if not algorithms:
        raise _Unusable("alg does not fit the type")
    public = {name: entry.get(name) for name in names}
    if not all(isinstance(member, str) and len(member) <= MEMBER_CHARACTERS_MAX for member in public.values()):
        raise _Unusable("members are missing or too long")
    return VerifyingKey(_public_key({**public, "kty": form[0], "crv": form[1]}, min(algorithms)), algorithms)


def _list_of(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _public_key(members: dict[str, Any], algorithm: str) -> AllowedPublicKeys:
    try:
        key: AllowedPublicKeys = jwt.PyJWK(members, algorithm).key
    except (jwt.PyJWTError, ValueError, TypeError, UnsupportedAlgorithm):
        raise _Unusable("not a key") from None
    if isinstance(key, RSAPublicKey) and key.key_size < RSA_BITS_MIN:
        raise _Unusable(f"RSA under {RSA_BITS_MIN} bits")
    return key


class KeySet:
    """The keys as they were read last. One reading at a time, shared by all who need it.

    `generation` changes whenever the keys do: what was verified before may not be good any more.
    `clock` is monotonic seconds.
    """

    def __init__(
        self,
        source: FileSource | UrlSource,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        load_s_max: float = LOAD_S_MAX,
        find_wait_s_max: float = FIND_WAIT_S_MAX,
    ) -> None:
        self.generation = 0
        self.problem: str | None = "not read yet"
        """Why the last reading gave no key; None where it gave some."""
        self._source = source
        self._clock = clock
        self._sleep = sleep
        self._load_s_max = load_s_max
        self._find_wait_s_max = find_wait_s_max
        self._keys: Keys | None = None
        self._ignored: tuple[tuple[str, str], ...] = ()
        self._reading: asyncio.Task[None] | None = None
        self._read_at = -UNKNOWN_KEY_INTERVAL_S
        self._waiting = 0
        self._failing = False
        self._warned_at = -WARNING_INTERVAL_S

    @property
    def usable(self) -> bool:
        """Whether some key is known, from whatever reading."""
        return bool(self._keys)

    async def find(self, key_id: str | None) -> VerifyingKey | None:
        """The key of this `kid`, after a look at the issuer when there is none and the last look is long enough ago.

        Raises DependencyUnavailable when the keys were never read.
        """
        if self._keys is None or key_id not in self._keys:
            await self._look_again()
        if self._keys is None:
            wait_s = max(0.0, self._read_at + UNKNOWN_KEY_INTERVAL_S - self._clock())
            raise DependencyUnavailable("Keys of the token issuer are not available", retry_after_ms=int(wait_s * 1e3))
        return self._keys.get(key_id)

    async def _look_again(self) -> None:
        if self._reading is None and self._clock() - self._read_at < UNKNOWN_KEY_INTERVAL_S:
            return
        if self._waiting >= WAITING_MAX:
            return
        self._waiting += 1
        try:
            await asyncio.wait({self._start()}, timeout=self._find_wait_s_max)
        finally:
            self._waiting -= 1

    async def refresh(self) -> None:
        """Read the document now, or wait for the reading that is under way. A failure is logged, not raised."""
        await asyncio.wait({self._start()})

    async def keep_fresh(self) -> None:
        """Read at once and then again and again, for ever; to be supervised. Its end ends a reading too."""
        try:
            while True:
                await self.refresh()
                interval_s = self._source.interval_s
                await self._sleep(min(interval_s, RETRY_INTERVAL_S) if self._failing else interval_s)
        finally:
            if self._reading is not None:
                self._reading.cancel()

    def _start(self) -> asyncio.Task[None]:
        """The reading under way, or a new one. The set owns it: a caller that goes away does not end it for others."""
        if self._reading is None:
            self._read_at = self._clock()
            self._reading = asyncio.get_running_loop().create_task(self._read(), name="jwks-reading")
        return self._reading

    async def _read(self) -> None:
        try:
            async with asyncio.timeout(self._load_s_max):
                document = await self._source.read()
            self._take(document)
            self._succeeded()
        except Exception as error:  # a supervised loop: the old keys stay good whatever the issuer sends
            self._failed(str(error) if isinstance(error, UnreadableKeys) else type(error).__name__)
        finally:
            self._reading = None

    def _take(self, document: bytes) -> None:
        keys, ignored = parse_keys(document)
        if keys != self._keys:
            self._keys = keys
            self.generation += 1
            logger.info("token keys read", extra={"keys": len(keys), "generation": self.generation})
        if ignored and ignored != self._ignored:
            shown = [f"{kid}: {reason}" for kid, reason in ignored[:10]]
            logger.warning("token keys ignored", extra={"ignored": len(ignored), "first": shown})
        self._ignored = ignored

    def _succeeded(self) -> None:
        if self._failing:
            logger.info("token keys can be read again")
        self._failing = False
        self.problem = None if self._keys else "no key in it can be used"

    def _failed(self, reason: str) -> None:
        self._failing = True
        self.problem = reason
        if self._clock() - self._warned_at >= WARNING_INTERVAL_S:
            self._warned_at = self._clock()
            logger.warning("token keys cannot be read; see JWT_JWKS", extra={"reason": reason})


class FixedKey:
    """JWT_SECRET in the place of a key set: one key for every token, whatever `kid` it names."""

    generation = 0
    usable = True
    problem = None

    def __init__(self, secret: bytes, algorithms: frozenset[str]) -> None:
        self._key = VerifyingKey(secret, algorithms)

    async def find(self, key_id: str | None) -> VerifyingKey:
        return self._key

    async def refresh(self) -> None:
        """There is nothing to read."""

    async def keep_fresh(self) -> None:
        """There is nothing to read; it waits for the end of the service, as a supervised task must."""
        await asyncio.Event().wait()
