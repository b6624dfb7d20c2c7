"""Keys, key documents and tokens of an issuer, good ones and bad ones, made with the real libraries."""

from __future__ import annotations

import base64
import functools
import hashlib
import hmac
import json
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa

ISSUER = "https://issuer.test/"
AUDIENCE = "https://tools.test"
SECRET = "0123456789abcdef" * 4
NOW = 1_800_000_000


def rsa_key(name: str = "a", bits: int = 2048) -> rsa.RSAPrivateKey:
    """A private key, made once; another name is another key."""
    return _rsa_key(name, bits)


@functools.cache
def _rsa_key(name: str, bits: int) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, bits)


def ec_key(curve: type[ec.EllipticCurve] = ec.SECP256R1) -> ec.EllipticCurvePrivateKey:
    return _ec_key(curve)


@functools.cache
def _ec_key(curve: type[ec.EllipticCurve]) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(curve())


@functools.cache
def ed_key() -> ed25519.Ed25519PrivateKey:
    return ed25519.Ed25519PrivateKey.generate()


@functools.cache
def ed448_key() -> ed448.Ed448PrivateKey:
    return ed448.Ed448PrivateKey.generate()


def key_of(algorithm: str) -> Any:
    """What signs tokens of this algorithm."""
    if algorithm.startswith("HS"):
        return SECRET
    if algorithm.startswith("ES"):
        return ec_key({"ES256": ec.SECP256R1, "ES384": ec.SECP384R1, "ES512": ec.SECP521R1}[algorithm])
    return ed_key() if algorithm == "EdDSA" else rsa_key()


_FAMILIES = {"RSA": jwt.algorithms.RSAAlgorithm, "EC": jwt.algorithms.ECAlgorithm, "OKP": jwt.algorithms.OKPAlgorithm}


def jwk(private: Any, kid: str | None = "k1", **members: Any) -> dict[str, Any]:
    """The public half as a JWK."""
    family = "RSA" if isinstance(private, rsa.RSAPrivateKey) else "EC"
    family = "OKP" if isinstance(private, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey) else family
    public: dict[str, Any] = _FAMILIES[family].to_jwk(private.public_key(), as_dict=True)
    public.pop("key_ops", None)
    return {**public, **({} if kid is None else {"kid": kid}), **members}


def document(*keys: Any) -> bytes:
    return json.dumps({"keys": list(keys)}).encode()


def claims(**changes: Any) -> dict[str, Any]:
    """Good claims with changes; `...` takes one out."""
    whole = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "alice",
        "tenant": "acme",
        "scope": "tools:execute tools:read",
        "iat": NOW - 60,
        "exp": NOW + 600,
        **changes,
    }
    return {name: value for name, value in whole.items() if value is not ...}


def signed(algorithm: str = "RS256", key: Any = None, header: dict[str, Any] | None = None, **changes: Any) -> str:
    """A token with a good signature; `kid` is k1 unless the header says otherwise."""
    headers = {"kid": "k1", **(header or {})}
    kept = {name: value for name, value in headers.items() if value is not ...}
    return jwt.encode(claims(**changes), key or key_of(algorithm), algorithm, headers=kept)


def base64url(value: Any) -> str:
    encoded = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(encoded).rstrip(b"=").decode()


def assembled(header: Any, payload: Any = None, *, hmac_key: bytes | None = None) -> str:
    """A token as no library would write it: any header, any payload, no signature or one of HMAC-SHA256."""
    start = f"{base64url(header)}.{base64url(claims() if payload is None else payload)}"
    if hmac_key is None:
        return f"{start}."
    return f"{start}.{base64url(hmac.new(hmac_key, start.encode(), hashlib.sha256).digest())}"
