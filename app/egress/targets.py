"""Where a request goes: URLs parsed so strictly that no two parsers can disagree about the host.

Knows no addresses but those written in a URL, and does no I/O. Errors carry no part of the rejected value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from urllib.parse import quote, urlencode, urljoin

from app.errors import ToolError

Address = IPv4Address | IPv6Address
QueryValue = str | int | float | bool

Origin = tuple[str, str, int]
"""Scheme, host and port (RFC 6454, section 4)."""

DEFAULT_PORTS = {"http": 80, "https": 443}

URL_CHARACTERS_MAX = 8_192
"""What common servers take as a request line."""


def invalid_request(reason: str) -> ToolError:
    return ToolError(reason, code="EGRESS_INVALID_REQUEST")


@dataclass(frozen=True, slots=True)
class Target:
    """One strictly parsed http or https URL. `host` is a lower-case name or an address without brackets."""

    scheme: str
    host: str
    port: int
    path: str
    """Path and query, percent-encoded."""
    address: Address | None = None
    """Set when the host is an address; nothing is resolved then."""

    @property
    def origin(self) -> Origin:
        return self.scheme, self.host, self.port

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.authority}{self.path}"

    def joined(self, location: str) -> Target:
        """The target that a Location header names, which may be relative to this one (RFC 3986, section 5)."""
        if _UNFIT.search(location):  # urljoin would quietly take some of them out
            raise invalid_request("location holds a blank, control or backslash character")
        return parse_target(urljoin(self.url, location))


_URL = re.compile(r"(https?)://([^/?#]*)([/?][^#]*)?(?:#.*)?", re.IGNORECASE)
_AUTHORITY = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::([0-9]{1,5}))?")
_UNFIT = re.compile(r"[\x00-\x20\x7f-\xa0\u1680\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3000\ufeff\ud800-\udfff\\]")
"""Control, blank and invisible characters and the backslash: two parsers read a URL with these in two ways."""
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")

_SAFE_IN_QUERY = "!$%&'()*+,/:;=?@[\\]^`{|}"
_SAFE_IN_PATH = "!$%&'()*+,/:;=@[\\]^|"
"""Beside letters, digits and -._~ what the URL Standard (https://url.spec.whatwg.org, section 1.3) leaves as it is. The
percent sign is among them: whoever wrote the URL encoded it as they meant it."""


def parse_target(url: str, params: Mapping[str, QueryValue] | None = None) -> Target:
    """The target of `url` with `params` added to its query. Raises ToolError EGRESS_INVALID_REQUEST.

    Stricter than RFC 3986: no user information, ASCII hosts only, IPv4 only as four decimal numbers.
    """
    if len(url) > URL_CHARACTERS_MAX or _UNFIT.search(url):
        raise invalid_request("URL is too long or holds a blank, control or backslash character")
    match = _URL.fullmatch(url)
    if match is None:
        raise invalid_request("URL must be absolute, with http or https")
    authority = _AUTHORITY.fullmatch(match[2])
    if authority is None:
        raise invalid_request("URL must name an ASCII host and an optional port, without user and password")
    address = _address_of(authority[1], authority[2])
    scheme = match[1].lower()
    port = int(authority[3] or DEFAULT_PORTS[scheme])
    if not 1 <= port <= 65_535:
        raise invalid_request("URL has a port out of range")
    host = authority[2].lower() if address is None else str(address)
    return Target(scheme, host, port, _encoded_path(match[3] or "/", params), address)


def _address_of(bracketed: str | None, name: str | None) -> Address | None:
    """The address that a host is written as, None for a name. Exactly one of the two is given."""
    try:
        if bracketed is not None:
            return IPv6Address(bracketed)
        host = (name or "").lower()
        if ends_in_number(host):
            return IPv4Address(host)
    except ValueError:
        raise invalid_request("URL has a host that is no plain address") from None
    if not is_host_name(host):
        raise invalid_request("URL has a host that is no plain name")
    return None


def is_host_name(text: str) -> bool:
    """Lower-case letters, digits, hyphens and underscores in labels; no trailing dot."""
    return _NAME.fullmatch(text) is not None


def ends_in_number(host: str) -> bool:
    """Whether a resolver may read it as IPv4 in some notation (WHATWG URL, section 3.5)."""
    return _NUMBER.fullmatch(host.rpartition(".")[2]) is not None


def _encoded_path(path: str, params: Mapping[str, QueryValue] | None) -> str:
    path, mark, query = path.partition("?")
    try:
        if params:
            added = urlencode(_query_items(params))
            query, mark = f"{query}&{added}" if mark else added, "?"
        encoded = quote(_without_dots(path), _SAFE_IN_PATH) + mark + quote(query, _SAFE_IN_QUERY)
    except UnicodeError:
        raise invalid_request("URL has a path or query that cannot be encoded") from None
    if len(encoded) > 3 * URL_CHARACTERS_MAX:
        raise invalid_request("URL is too long")
    return encoded


def _without_dots(path: str) -> str:
    """Without the segments `.` and `..`, which clients resolve and never send (RFC 3986, section 5.2.4)."""
    kept: list[str] = []
    for segment in path.split("/"):
        if segment == "..":
            del kept[max(1, len(kept) - 1) :]  # the first is empty: it stands for the root
        elif segment != ".":
            kept.append(segment)
    return "/".join(kept) or "/"


def _query_items(params: Mapping[str, QueryValue]) -> list[tuple[str, str]]:
    # JSON's spelling of booleans, which is what an agent wrote
    return [(name, str(value).lower() if isinstance(value, bool) else str(value)) for name, value in params.items()]
