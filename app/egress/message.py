"""What is sent, apart from where to: method, headers and body, and what becomes of them on a redirect."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import httpcore

from app.egress.targets import Target, invalid_request

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

REQUEST_BYTES_MAX = 1024 * 1024
HEADERS_MAX = 64
HEADER_BYTES_MAX = 16 * 1024


_REFUSED_HEADERS = frozenset(
    (
        "host",
        "transfer-encoding",
        "te",
        "trailer",
        "upgrade",
        "expect",
        "proxy-authorization",
        "proxy-connection",
        "http2-settings",
    )
)
"""They would change where the request goes or where it ends; dropping them would change what was asked for."""

_DROPPED_HEADERS = frozenset(("connection", "keep-alive", "content-length", "accept-encoding"))
"""They only repeat what the client says itself."""

_CROSS_ORIGIN_HEADERS = frozenset(
    ("accept", "accept-language", "cache-control", "content-language", "content-type", "range", "user-agent")
)
"""What survives a redirect to another origin. A list of credentials would miss the next vendor's header."""

_CONTENT_HEADERS = frozenset(("content-type", "content-encoding", "content-language", "content-location"))

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e]*")


def checked_message(method: str, headers: Mapping[str, str], body: bytes | None, defaults: dict[str, str]) -> Message:
    """What a tool asked for, refused where it could write more than it seems to. `defaults` are lower-case headers."""
    if method not in METHODS:
        raise invalid_request(f"method must be one of {', '.join(sorted(METHODS))}")
    if len(body or b"") > REQUEST_BYTES_MAX:
        raise invalid_request(f"request body is over {REQUEST_BYTES_MAX} bytes")
    return Message(method, defaults | _checked_headers(headers), body)


def _checked_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Lower-case names with values that cannot end a line (RFC 9110, section 5)."""
    if len(headers) > HEADERS_MAX or sum(map(len, headers)) + sum(map(len, headers.values())) > HEADER_BYTES_MAX:
        raise invalid_request(f"headers are over {HEADERS_MAX} or over {HEADER_BYTES_MAX} bytes")
    checked: dict[str, str] = {}
    for name, value in headers.items():
        if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
            raise invalid_request("header has a name or value with characters that HTTP does not take")
        lower = name.lower()
        if lower in _REFUSED_HEADERS:
            raise invalid_request(f"header {lower} is set by the service; leave it out")
        if lower in checked:
            raise invalid_request("header is given twice in different case")
        if lower not in _DROPPED_HEADERS:
            checked[lower] = value.strip()
    return checked


@dataclass(frozen=True, slots=True)
class Message:
    """What is sent, apart from where to."""

    method: str
    headers: Mapping[str, str]
    body: bytes | None

    def redirected(self, status_code: int, *, same_origin: bool) -> Message:
        """The message that follows a redirect: RFC 9110, sections 15.4.2 to 15.4.9."""
        headers = {name: self.headers[name] for name in self.headers if same_origin or name in _CROSS_ORIGIN_HEADERS}
        becomes_get = self.method == "POST" if status_code in (301, 302) else status_code == 303
        if not becomes_get or self.method in ("GET", "HEAD"):
            return replace(self, headers=headers)
        kept = {name: value for name, value in headers.items() if name not in _CONTENT_HEADERS}
        return Message("GET", kept, None)

    def for_target(self, target: Target) -> httpcore.Request:
        scheme, host, port = target.origin
        headers = {"host": target.authority, **self.headers, "accept-encoding": "gzip"}
        if self.body is not None or self.method in ("POST", "PUT", "PATCH"):
            headers["content-length"] = str(len(self.body or b""))
        return httpcore.Request(
            self.method,
            httpcore.URL(scheme=scheme.encode(), host=host.encode(), port=port, target=target.path.encode()),
            headers=[(name.encode(), value.encode()) for name, value in headers.items()],
            content=self.body or b"",
        )
