"""A small authorization server: what an OAuth client of MCP asks for, and tokens that the service takes.

Metadata (RFC 8414), registration (RFC 7591), codes with PKCE (RFC 7636) for the resource that was asked for (RFC 8707),
and keys. Its user says yes at once. Every request is written down; it refuses what those documents forbid.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import jwt

from tests.access.tokens import document, jwk, rsa_key

TOKEN_S = 600


class AuthorizationServer:
    """Running while the context is open. `asked` has method and path of every request."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.codes: dict[str, dict[str, str]] = {}
        self.scopes: list[str] = []
        self.granted_first: str | None = None
        """Less than what is asked for, the next time."""
        own = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                own.answer(self, b"")

            def do_POST(self) -> None:
                own.answer(self, self.rfile.read(int(self.headers["Content-Length"])))

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> AuthorizationServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def settings(self) -> dict[str, str]:
        """Of a service that takes these tokens, but for its own name."""
        return {"JWT_ISSUER": self.url, "JWT_JWKS": f"{self.url}/keys", "JWT_ALGORITHMS": "RS256"}

    def answer(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        parts = urlsplit(request.path)
        self.asked.append(f"{request.command} {parts.path}")
        status, headers, content = self._answered(parts.path, dict(parse_qsl(parts.query)), body)
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(content)

    def _answered(self, path: str, query: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        if path == "/.well-known/oauth-authorization-server":
            return _json(200, self._metadata())
        if path == "/keys":
            return 200, {"Content-Type": "application/json"}, document(jwk(rsa_key()))
        if path == "/register":
            return _json(201, {**json.loads(body), "client_id": "client-1", "token_endpoint_auth_method": "none"})
        if path == "/authorize":
            return self._authorized(query)
        if path == "/token":
            return self._token(dict(parse_qsl(body.decode())))
        return _json(404, {"error": "not_found"})

    def _metadata(self) -> dict[str, Any]:
        return {
            "issuer": self.url,
            "authorization_endpoint": f"{self.url}/authorize",
            "token_endpoint": f"{self.url}/token",
            "registration_endpoint": f"{self.url}/register",
            "response_types_supported": ["code"],
            "grant_types_supported": ["authorization_code"],
            "code_challenge_methods_supported": ["S256"],
            "token_endpoint_auth_methods_supported": ["none"],
        }

    def _authorized(self, query: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        if query.get("code_challenge_method") != "S256" or "resource" not in query:
            return _json(400, {"error": "invalid_request"})
        code = secrets.token_urlsafe(16)
        self.codes[code] = query
        self.scopes.append(query.get("scope", ""))
        back = urlencode({"code": code, "state": query["state"], "iss": self.url})
        return 302, {"Location": f"{query['redirect_uri']}?{back}"}, b""

    def _token(self, form: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        granted = self.codes.pop(form.get("code", ""), None)
        digest = hashlib.sha256(form.get("code_verifier", "").encode()).digest()
        challenge = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
        if granted is None or granted["code_challenge"] != challenge or granted["resource"] != form.get("resource"):
            return _json(400, {"error": "invalid_grant"})
        scope, self.granted_first = self.granted_first or granted.get("scope", ""), None
        now = int(time.time())
        claims = {"iss": self.url, "aud": form["resource"], "sub": "alice", "tenant": "acme", "scope": scope}
        token = jwt.encode({**claims, "iat": now, "exp": now + TOKEN_S}, rsa_key(), "RS256", headers={"kid": "k1"})
        return _json(200, {"access_token": token, "token_type": "Bearer", "expires_in": TOKEN_S, "scope": scope})


def _json(status: int, value: Any) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()
