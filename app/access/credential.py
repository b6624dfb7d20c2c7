"""What the headers of a request give as its credential. Knows no key and no token: only where they stand, and that
there must be one and no more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from app.errors import Unauthenticated

CREDENTIAL_BYTES_MAX = 8192
"""A JWT with a long list of groups has some kilobytes."""

Headers = Iterable[tuple[bytes, bytes]]
"""As ASGI has them: names in lower case."""

_SENDABLE = re.compile(rb"[!-~]{1,%d}" % CREDENTIAL_BYTES_MAX)


class CredentialMissing(Unauthenticated):
    def __init__(self) -> None:
        super().__init__("Send a credential: Authorization: Bearer ..., or X-API-Key")


class CredentialRefused(Unauthenticated):
    """One was given. Says no more: not which part of it was wrong, nor whether it ever was good."""

    def __init__(self) -> None:
        super().__init__("The credential is not good; send one that is, once, as Authorization: Bearer or X-API-Key")


def credential_in(headers: Headers) -> bytes | None:
    """The credential, not looked at yet; None when there is none. Raises CredentialRefused when there are several
    headers of a kind, two credentials that differ, or another scheme."""
    bearer: bytes | None = None
    api_key: bytes | None = None
    for name, value in headers:
        if name == b"authorization":
            if bearer is not None or value[:7].lower() != b"bearer ":
                raise CredentialRefused
            bearer = value[7:].strip(b" ")
        elif name == b"x-api-key":
            if api_key is not None:
                raise CredentialRefused
            api_key = value.strip(b" ")
    if bearer is None:
        return api_key
    if api_key is not None and api_key != bearer:
        raise CredentialRefused
    return bearer


def is_sendable(credential: bytes) -> bool:
    """Whether it can be one at all: printable ASCII without blanks, neither empty nor too long."""
    return _SENDABLE.fullmatch(credential) is not None


def gives_credential(headers: Headers) -> bool:
    """Whether anything like a credential was sent."""
    return any(name in (b"authorization", b"x-api-key") for name, _ in headers)
