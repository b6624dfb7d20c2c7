"""What an API key is: `act_<id>_<secret>`, made once, kept as a digest, read back from what a caller sends.

Owns the form of keys and the rules for what a new one may say. Knows no database, no HTTP and no cache.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import secrets
import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from app.calls import DEFAULT_LIMIT_CLASS, DEFAULT_SCOPES, EVERY_TOOL, Caller, rfc3339

SCOPE_ADMIN = "admin"
"""Never by default, never implied by another."""

SECRET_BYTES = 32
ID_RANDOM_BYTES = 4

_CREDENTIAL = re.compile(rb"act_([0-9a-f]{20})_([0-9a-f]{64})")
_ID = re.compile(r"[0-9a-f]{20}")
KEY_PREFIX = b"act_"

NAME_CHARACTERS_MAX = 256
SCOPES_MAX = 100
GLOBS_MAX = 100
LIFE_S_MAX = 100 * 365 * 86_400

LIFE_RULE = "must be a whole number with s, m, h or d, as 90d, and at most 36500d"

UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class NewSecret(NamedTuple):
    """A key just made. `credential` is shown once and kept nowhere."""

    key_id: str
    secret_sha256: str
    credential: str


def new_secret() -> NewSecret:
    """Ids begin with their milliseconds, so that keys sort by when they were made; the secret has 256 random bits."""
    key_id = f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(ID_RANDOM_BYTES)}"
    secret = secrets.token_hex(SECRET_BYTES)
    return NewSecret(key_id, digest(secret.encode()), f"act_{key_id}_{secret}")


def digest(secret: bytes) -> str:
    """A plain hash is enough: nobody guesses 256 random bits, however fast they can try."""
    return hashlib.sha256(secret).hexdigest()


def is_id(text: str) -> bool:
    return _ID.fullmatch(text) is not None


def split(credential: bytes) -> tuple[str, bytes] | None:
    """Id and secret; None when it is no key at all."""
    found = _CREDENTIAL.fullmatch(credential)
    return (found[1].decode(), found[2]) if found else None


@dataclass(frozen=True, slots=True)
class Key:
    """One row. Times are Unix seconds."""

    id: str
    secret_sha256: str
    caller: Caller
    created_at: float
    expires_at: float | None
    revoked_at: float | None

    @property
    def good_until(self) -> float:
        return math.inf if self.expires_at is None else self.expires_at

    def is_good(self, now: float) -> bool:
        """Neither revoked nor expired at this Unix time."""
        return self.revoked_at is None and now < self.good_until

    def state(self, now: float) -> Literal["active", "expired", "revoked"]:
        if self.revoked_at is not None:
            return "revoked"
        return "active" if self.is_good(now) else "expired"

    def shown(self) -> dict[str, Any]:
        """All but the secret's digest, as JSON has it."""
        return {
            "id": self.id,
            "tenant": self.caller.tenant,
            "subject": self.caller.subject,
            "scopes": sorted(self.caller.scopes),
            "tools": list(self.caller.tools),
            "limit_class": self.caller.limit_class,
            "created_at": rfc3339(self.created_at),
            "expires_at": None if self.expires_at is None else rfc3339(self.expires_at),
            "revoked_at": None if self.revoked_at is None else rfc3339(self.revoked_at),
        }


_NOBODYS_SHA256 = digest(secrets.token_bytes(SECRET_BYTES))


def proven(key: Key | None, secret: bytes) -> Key | None:
    """The key, if this is its secret. Without a key the same work is done: how long it takes tells nobody which."""
    expected = key.secret_sha256 if key is not None else _NOBODYS_SHA256
    same = hmac.compare_digest(digest(secret).encode(), expected.encode())
    return key if same else None


# What a new key may say


def _name(value: str) -> str:
    if not value.isprintable() or value != value.strip():
        raise ValueError("must be printable, without blanks at its ends")
    return value


def life_s(text: str) -> int:
    """Seconds of `90d`, `12h`, `30m`, `45s`. Raises ValueError."""
    found = re.fullmatch(r"([1-9][0-9]{0,9})([smhd])", text, re.ASCII)
    seconds = int(found[1]) * UNIT_S[found[2]] if found else 0
    if not 0 < seconds <= LIFE_S_MAX:
        raise ValueError(LIFE_RULE)
    return seconds


def _life(value: str) -> str:
    life_s(value)
    return value


Name = Annotated[str, Field(min_length=1, max_length=NAME_CHARACTERS_MAX), AfterValidator(_name)]
Scope = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_.:-]{1,64}$")]
Glob = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_*?-]{1,64}$")]
Life = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,9}[smhd]$"), AfterValidator(_life)]


class NewKey(BaseModel):
    """What a new key is to say of its caller. An empty list means none, never all."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True, frozen=True)

    tenant: Name = Field(
        description="Whom the caller belongs to: what others share or must not see is kept by this. Printable, without "
        "blanks at its ends"
    )
    subject: Name = Field(description="Who calls. Printable, without blanks at its ends")
    scopes: Annotated[list[Scope], Field(max_length=SCOPES_MAX)] = Field(
        default=sorted(DEFAULT_SCOPES), description="What it may do; `admin` only when it is named"
    )
    tools: Annotated[list[Glob], Field(max_length=GLOBS_MAX)] = Field(
        default=list(EVERY_TOOL), description="Ids of tools it may call; * stands for anything, ? for one character"
    )
    limit_class: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] = Field(
        default=DEFAULT_LIMIT_CLASS, description="What limit policies match as `class`"
    )
    expires_in: Life | None = Field(default=None, description="As 90d, 12h, 30m, at most 36500d; left out: never")

    def caller(self) -> Caller:
        return Caller(self.tenant, self.subject, frozenset(self.scopes), tuple(self.tools), self.limit_class)

    def expires_at(self, now: float) -> float | None:
        return None if self.expires_in is None else now + life_s(self.expires_in)
