"""A JSON Web Token becomes a Caller, or is refused without a word about why.

Fixed by configuration: issuer, audience, algorithms, key or key set. Nothing in a token chooses how it is verified but
its `kid`, and that only by looking it up. Knows no HTTP and keeps no token; the authenticator calls it on a miss.
"""

from __future__ import annotations

import base64
import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import jwt
from jwt.algorithms import HMACAlgorithm

from app.access.credential import CredentialRefused
from app.access.jwks import KEY_ID_CHARACTERS_MAX, FileSource, FixedKey, KeySet, UrlSource, VerifyingKey
from app.calls import Caller

logger = logging.getLogger("app.access")

TOKEN_CHARACTERS_MAX = 8 * 1024
"""What servers commonly take as one header line; checked before anything is decoded."""

LEEWAY_S = 30.0

TEXT_CHARACTERS_MAX = 256
SCOPES_MAX = 100

SECRET_BYTES_MIN = {"HS256": 32, "HS384": 48, "HS512": 64}
"""As long as the hash (RFC 7518, section 3.2)."""

SYMMETRIC = frozenset(SECRET_BYTES_MIN)
ASYMMETRIC = frozenset({f"{family}{bits}" for family in ("RS", "PS", "ES") for bits in (256, 384, 512)} | {"EdDSA"})

TYPES = frozenset({"jwt", "at+jwt"})
"""Values of `typ` that are access tokens (RFC 9068); a logout or a DPoP token of the same issuer is none."""

SECONDS_MAX = 253_402_300_799
"""The end of the year 9999."""

_FORM = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
"""RFC 7515, section 7.1: no padding, nothing empty."""

_SCOPE = re.compile(r"[\x21-\x7e]{1,256}")


@dataclass(frozen=True, slots=True)
class JwtRules:
    """What a token must be. Exactly one of `secret` and `jwks` is given; `jwks` is a path or a URL."""

    issuer: str
    audience: str
    algorithms: tuple[str, ...]
    tenant_claim: str = "tenant"
    scope_claim: str = "scope"
    leeway_s: float = LEEWAY_S
    secret: bytes | None = field(default=None, repr=False)
    jwks: str | None = None


def jwt_rules(
    *,
    issuer: str | None,
    audience: str | None,
    algorithms: tuple[str, ...],
    secret: str | None,
    jwks: str | None,
    tenant_claim: str = "tenant",
    scope_claim: str = "scope",
) -> JwtRules | None:
    """The rules of the JWT_* settings; None where none is given. Raises ValueError, which names the variable."""
    if not (issuer or audience or algorithms or secret or jwks):
        return None
    if not issuer or not issuer.strip():
        raise ValueError("JWT_ISSUER: is missing; give the iss of the tokens, or remove the other JWT_* variables")
    if not audience or not audience.strip():
        raise ValueError("JWT_AUDIENCE: is missing; give the aud that names this service in the tokens")
    if bool(secret) == bool(jwks):
        raise ValueError(
            "JWT_JWKS: give either JWT_JWKS (public keys) or JWT_SECRET (HS* tokens), not both, not neither"
        )
    allowed = SYMMETRIC if secret else ASYMMETRIC
    if not algorithms or not allowed.issuperset(algorithms):
        source = "JWT_SECRET" if secret else "JWT_JWKS"
        raise ValueError(f"JWT_ALGORITHMS: with {source} give one or more of {', '.join(sorted(allowed))}")
    if jwks:
        _check_location(jwks)
    key = _checked_secret(secret, algorithms) if secret else None
    return JwtRules(issuer, audience, tuple(algorithms), tenant_claim, scope_claim, secret=key, jwks=jwks or None)


def _checked_secret(secret: str, algorithms: tuple[str, ...]) -> bytes:
    try:
        key = secret.encode()
        HMACAlgorithm(HMACAlgorithm.SHA256).prepare_key(key)
    except UnicodeEncodeError:
        raise ValueError("JWT_SECRET: must be text in UTF-8") from None
    except jwt.InvalidKeyError:
        raise ValueError("JWT_SECRET: is a public key or certificate; give a secret, or the keys by JWT_JWKS") from None
    needed = max(SECRET_BYTES_MIN[algorithm] for algorithm in algorithms)
    if len(key) < needed:
        raise ValueError(f"JWT_SECRET: must be at least {needed} bytes for {', '.join(algorithms)}; make a longer one")
    return key


def _check_location(jwks: str) -> None:
    if "://" not in jwks:
        return
    try:
        url = httpx.URL(jwks)
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError("JWT_JWKS: must be a path, or a URL that starts with http:// or https:// and names a host")


def keys_for(rules: JwtRules) -> KeySet | FixedKey:
    """Where the rules' keys come from. Reads nothing yet."""
    if rules.secret is not None:
        return FixedKey(rules.secret, frozenset(rules.algorithms))
    location = rules.jwks or ""
    return KeySet(UrlSource(location) if "://" in location else FileSource(Path(location)))


class JwtVerifier:
    """`clock` is Unix seconds. `keys.generation` says when what was verified before must be verified again."""

    def __init__(
        self, rules: JwtRules, keys: KeySet | FixedKey | None = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        self.keys = keys or keys_for(rules)
        self._rules = rules
        self._clock = clock
        # Times are checked here: PyJWT takes no clock, and takes "1" and true for times.
        self._jwt = jwt.PyJWT(
            {
                "require": ["exp", "iat", "iss", "aud", "sub"],
                "verify_exp": False,
                "verify_iat": False,
                "verify_nbf": False,
                "enforce_minimum_key_length": True,
            }
        )

    @property
    def generation(self) -> int:
        return self.keys.generation

    async def verify(self, token: str) -> tuple[Caller, float]:
        """The caller, and the Unix second from which the token is refused (`exp` and the leeway).

        Takes 50 to 100 µs of CPU, 380 µs with ES384 (docs/adr/0011): not worth a thread, done once for each token.
        Raises CredentialRefused; DependencyUnavailable while there are no keys.
        """
        algorithm, key_id = self._read_header(token)
        key = await self.keys.find(key_id)
        if key is None or algorithm not in key.algorithms:
            raise _refused("no key for kid and alg")
        claims = self._read_claims(token, key, algorithm)
        good_until = self._check_times(claims)
        tenant = _text_of(claims, self._rules.tenant_claim)
        return Caller(tenant, _text_of(claims, "sub"), _scopes_of(claims.get(self._rules.scope_claim))), good_until

    def _read_header(self, token: str) -> tuple[str, str | None]:
        """`alg` and `kid`. What else the header says about keys (jku, x5u, jwk, x5c) is not looked at."""
        if len(token) > TOKEN_CHARACTERS_MAX or not _FORM.fullmatch(token):
            raise _refused("size or form")
        header = _header_of(token)
        if "crit" in header or "b64" in header or "cty" in header:
            raise _refused("header wants what is not supported")
        kind = header.get("typ", "jwt")
        if not isinstance(kind, str) or kind.lower().removeprefix("application/") not in TYPES:
            raise _refused("typ")
        algorithm, key_id = header.get("alg"), header.get("kid", "")
        if not isinstance(algorithm, str) or algorithm not in self._rules.algorithms:
            raise _refused("alg")
        if not isinstance(key_id, str) or len(key_id) > KEY_ID_CHARACTERS_MAX:
            raise _refused("kid")
        return algorithm, key_id if "kid" in header else None

    def _read_claims(self, token: str, key: VerifyingKey, algorithm: str) -> dict[str, Any]:
        """Claims with a good signature of the right issuer for us."""
        try:
            return self._jwt.decode(
                token,
                key.key,
                algorithms=[algorithm],
                audience=self._rules.audience,
                issuer=self._rules.issuer,
            )
        except (jwt.PyJWTError, ValueError, TypeError) as error:
            raise _refused(type(error).__name__) from None

    def _check_times(self, claims: Mapping[str, Any]) -> float:
        now, leeway = self._clock(), self._rules.leeway_s
        good_until = _seconds_of(claims, "exp") + leeway
        if now >= good_until:
            raise _refused("expired")
        if _seconds_of(claims, "iat") > now + leeway:
            raise _refused("iat in the future")
        if "nbf" in claims and _seconds_of(claims, "nbf") > now + leeway:
            raise _refused("not valid yet")
        return good_until


def _header_of(token: str) -> dict[str, Any]:
    """Read here, since PyJWT reads the payload with it: 200 µs for 8 KB that anyone can send. PyJWT reads it again."""
    segment = token.partition(".")[0]
    try:
        header = json.loads(base64.urlsafe_b64decode(segment + "=" * (-len(segment) % 4)))
    except (ValueError, RecursionError):
        raise _refused("header is no JSON") from None
    if not isinstance(header, dict):
        raise _refused("header is no object")
    return header


def _refused(reason: str) -> CredentialRefused:
    """The same for all. The reason is for who reads the log at DEBUG, and holds nothing of the token."""
    logger.debug("token refused", extra={"reason": reason})
    return CredentialRefused()


def _seconds_of(claims: Mapping[str, Any], name: str) -> float:
    """A NumericDate (RFC 7519, section 2)."""
    value = claims[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= SECONDS_MAX:
        raise _refused(f"{name} is no time")
    return float(value)


def _text_of(claims: Mapping[str, Any], name: str) -> str:
    """A name that goes into logs, rows and counters: bounded, printable, no blanks that nobody sees."""
    value = claims.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= TEXT_CHARACTERS_MAX:
        raise _refused("claim is missing or too long")
    if not value.isprintable() or value != value.strip():
        raise _refused("claim with unprintable characters")
    return value


def _scopes_of(claim: Any) -> frozenset[str]:
    """A list of texts, or words in a text as of RFC 8693, section 4.2. No claim is no scope."""
    scopes = claim.split(" ") if isinstance(claim, str) else claim
    if scopes is None:
        return frozenset()
    if not isinstance(scopes, list) or len(scopes) > SCOPES_MAX:
        raise _refused("scopes are no list or too many")
    scopes = [scope for scope in scopes if scope != ""]
    if not all(isinstance(scope, str) and _SCOPE.fullmatch(scope) for scope in scopes):
        raise _refused("scopes are no words")
    return frozenset(scopes)
