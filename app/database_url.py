"""What DATABASE_URL may say, and what the driver is told of it.

Settings ask whether it can be, `clients` what to connect with. Knows no engine and opens nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, urlencode

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

POSTGRESQL = "postgresql+asyncpg://"
SQLITE = "sqlite+aiosqlite:///"
PORT_MAX = 65_535

_OF_THE_ADDRESS = frozenset({"host", "port", "user", "password", "database"})
"""Words after ? that stand for a part before it: several hosts, for one, fit nowhere else."""

_STATEMENTS = "prepared_statement_cache_size"

_TLS_VERSIONS = ("TLSv1.2", "TLSv1.3")
_OF_LIBPQ: dict[str, tuple[str, ...]] = {
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "sslrootcert": (),
    "sslcert": (),
    "sslkey": (),
    "sslpassword": (),
    "sslcrl": (),
    "sslnegotiation": ("postgres", "direct"),
    "ssl_min_protocol_version": _TLS_VERSIONS,
    "ssl_max_protocol_version": _TLS_VERSIONS,
    "target_session_attrs": ("any", "primary", "standby", "read-write", "read-only", "prefer-standby"),
    "passfile": (),
    "service": (),
    "krbsrvname": (),
    "gsslib": ("gssapi", "sspi"),
}
"""Words that PostgreSQL's own URLs have, with the values of those that have few. asyncpg takes them in a DSN alone."""

_TAKEN = ", ".join(sorted({*_OF_LIBPQ, *_OF_THE_ADDRESS, _STATEMENTS}))


class DatabasePlace(NamedTuple):
    """A URL as SQLAlchemy takes it, and what the driver is told besides."""

    url: URL
    options: dict[str, Any]


def parse_database_url(text: str) -> DatabasePlace:
    """Raises ValueError that says what is wrong, without any part of the URL, which may hold a password."""
    if text.startswith(POSTGRESQL):
        return _postgresql(text)
    if text.startswith(SQLITE):
        return _sqlite(text)
    raise ValueError(f"must start with {POSTGRESQL} or {SQLITE}")


def with_whole_path(url: str) -> str:
    """A SQLite file by its whole path. A URI stays as it is, and a path that would be read as one."""
    file = url.removeprefix(SQLITE)
    if file == url or file == ":memory:" or "?" in (whole := str(Path(file).absolute())):
        return url
    return SQLITE + whole


def _sqlite(text: str) -> DatabasePlace:
    url = make_url(text)
    if not url.database or "\0" in url.database:
        raise ValueError(f"needs the path of a file after {SQLITE}, which has one more / before an absolute path")
    if "?" in text and url.query.get("uri") != "true":
        raise ValueError("after ? may come parameters of a SQLite URI, with uri=true and file: before the path")
    return DatabasePlace(url, {})


def _postgresql(text: str) -> DatabasePlace:
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise ValueError(
            "must be user:password@host:port/database after ://, special characters of a password written as %XX"
        ) from None
    given = _words(text, url)
    own = {name: value for name, value in given.items() if name in _OF_LIBPQ}
    url = url.set(query={name: value for name, value in given.items() if name not in own})
    _check_address(url)
    # Nothing but words: what stands in the URL itself is passed beside it and holds.
    return DatabasePlace(url, {"dsn": f"postgresql://?{urlencode(own, quote_via=quote)}"} if own else {})


def _words(text: str, url: URL) -> dict[str, Any]:
    """What comes after ?; `ssl` is asyncpg's name for `sslmode`."""
    query = text.rpartition("@")[2].partition("?")[2]
    if query:
        try:
            pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True)
        except ValueError:
            pairs = []
        if not pairs or not all(value for _, value in pairs):  # SQLAlchemy leaves out what has no value
            raise ValueError("after ? come name=value pairs with & between them")
    given: dict[str, Any] = {("sslmode" if name == "ssl" else name): value for name, value in url.query.items()}
    if not given.keys() <= {*_OF_LIBPQ, *_OF_THE_ADDRESS, _STATEMENTS}:
        raise ValueError(f"after ? may come {_TAKEN}; take out what else is there")
    for name, value in given.items():
        _check_word(name, value)
    return given


def _check_word(name: str, value: str | tuple[str, ...]) -> None:
    if not isinstance(value, str):
        if name not in ("host", "port"):
            raise ValueError(f"{name} may come once")
    elif (known := _OF_LIBPQ.get(name)) and value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}")
    elif name == _STATEMENTS and not (value.isascii() and value.isdigit()):
        raise ValueError(f"{name} must be a whole number")


def _check_address(url: URL) -> None:
    """Where the driver would fail while it connects, by errors that tell nobody where they come from."""
    try:
        _, found = url.get_dialect()().create_connect_args(url)
    except (ArgumentError, ValueError):
        raise ValueError("several hosts are written ?host=a:5432&host=b:5432, each with its port") from None
    hosts, ports = found.get("host", ""), found.get("port", 0)
    if not all(0 <= port <= PORT_MAX for port in (ports if isinstance(ports, list) else [ports])):
        raise ValueError(f"a port must be a number from 0 to {PORT_MAX}")
    try:
        for host in hosts if isinstance(hosts, list) else [hosts]:
            host.startswith("/") or host.encode("idna")
    except UnicodeError:
        raise ValueError("a host must be a name or an address") from None
