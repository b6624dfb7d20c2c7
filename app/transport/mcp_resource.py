"""How a client of MCP learns where to get a token: challenges (RFC 6750) and the metadata document (RFC 9728).

There is a document only where an issuer of tokens is configured; API keys need none. Knows no request but its address.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from app import SERVICE
from app.transport.calling import SCOPE_EXECUTE, SCOPE_READ
from app.transport.door import CHALLENGE

RESOURCE = "/mcp"
WELL_KNOWN = "/.well-known/oauth-protected-resource"
METADATA_PATHS = frozenset({WELL_KNOWN, WELL_KNOWN + RESOURCE})
"""Clients that know no challenge ask under the name of the resource, and then at the root."""

SCOPES = f"{SCOPE_READ} {SCOPE_EXECUTE}"


class ProtectedResource:
    """This service as an OAuth 2.0 protected resource. `public_url` None: under the address that the request names."""

    def __init__(self, issuer: str | None, public_url: str | None) -> None:
        self._issuer = issuer
        self._public_url = public_url

    def document(self, scope: Mapping[str, Any]) -> bytes | None:
        """The metadata; None where nobody issues tokens."""
        if self._issuer is None:
            return None
        return orjson.dumps(
            {
                "resource": self._base(scope) + RESOURCE,
                "authorization_servers": [self._issuer],
                "scopes_supported": SCOPES.split(),
                "bearer_methods_supported": ["header"],
                "resource_name": SERVICE,
            }
        )

    def challenge(self, scope: Mapping[str, Any], *, refused: bool) -> bytes:
        """Of a 401. `refused`: a credential was given and is not good."""
        error = b', error="invalid_token"' if refused else b""
        if self._issuer is None:
            return CHALLENGE + error
        return b"Bearer %b, scope=%b%b" % (self._metadata(scope), orjson.dumps(SCOPES), error)

    def scope_challenge(self, scope: Mapping[str, Any], needed: str) -> bytes:
        """Of a 403: who calls is known and may not."""
        said = b'Bearer error="insufficient_scope", scope=%b' % orjson.dumps(needed)
        return said if self._issuer is None else b"%b, %b" % (said, self._metadata(scope))

    def _metadata(self, scope: Mapping[str, Any]) -> bytes:
        return b"resource_metadata=%b" % orjson.dumps(self._base(scope) + WELL_KNOWN + RESOURCE)

    def _base(self, scope: Mapping[str, Any]) -> str:
        if self._public_url is not None:
            return self._public_url
        host = next((value for name, value in scope["headers"] if name == b"host"), b"localhost")
        return f"{scope['scheme']}://{host.strip().decode('latin-1')}"
