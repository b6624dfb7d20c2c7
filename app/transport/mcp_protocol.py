"""MCP as messages: which era one belongs to, and every check before a method sees it, in the order of docs/mcp.md.

The specification is https://modelcontextprotocol.io/specification, revisions 2024-11-05 to 2026-07-28. Knows no ASGI,
no method and no tool; the door calls it with the parsed body and the routing headers.
"""

from __future__ import annotations

import binascii
import re
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import orjson

from app.errors import INVALID_PARAMS, INVALID_REQUEST, ErrorKind, InvalidRequest, ToolServiceError
from app.tools.mirrored import Mirrored

MODERN_VERSION = "2026-07-28"
LEGACY_VERSIONS = ("2025-11-25", "2025-06-18", "2025-03-26", "2024-11-05")
SERVED_VERSIONS = (MODERN_VERSION, *LEGACY_VERSIONS)
BEFORE_2025_06_18 = (None, "2025-03-26", "2024-11-05")
"""That revision took batches out and brought links in results; no header means 2025-03-26."""

META_VERSION = "io.modelcontextprotocol/protocolVersion"
META_CAPABILITIES = "io.modelcontextprotocol/clientCapabilities"

VERSION_HEADER, METHOD_HEADER, NAME_HEADER = b"mcp-protocol-version", b"mcp-method", b"mcp-name"
MIRRORED_PREFIX = b"mcp-param-"

CALL, LIST = "tools/call", "tools/list"

_VERSIONS = {version.encode(): version for version in SERVED_VERSIONS}
_BLANKS = b" \t"
_ENCODED_START, _ENCODED_END = "=?base64?", "?="


class HeaderMismatch(ToolServiceError):
    kind = ErrorKind(INVALID_REQUEST.error_type, -32020, 400, False)


class Malformed(ToolServiceError):
    """Params that are not what the method takes. A tool's arguments are not meant: those fail as results."""

    kind = ErrorKind(INVALID_PARAMS.error_type, -32602, 400, False)


class _WithOwnData(ToolServiceError):
    """An error whose `data` the MCP specification lays down whole."""

    def as_data(self) -> dict[str, Any]:
        return self.data


class ClientCapabilityMissing(_WithOwnData):
    kind = ErrorKind(INVALID_REQUEST.error_type, -32021, 400, False)

    def __init__(self, missing: Iterable[str]) -> None:
        super().__init__(
            "The client did not declare a capability that this tool needs",
            requiredCapabilities={capability: {} for capability in missing},
        )


class VersionNotServed(_WithOwnData):
    kind = ErrorKind(INVALID_REQUEST.error_type, -32022, 400, False)

    def __init__(self, requested: str) -> None:
        message = "Unsupported protocol version"
        if requested in LEGACY_VERSIONS:
            message += ": this one opens with initialize and has no version in _meta"
        super().__init__(message, supported=SERVED_VERSIONS, requested=requested)


class Request(NamedTuple):
    """One message that wants an answer. `id` is JSON."""

    id: bytes
    method: str
    params: Mapping[str, Any]
    meta: Mapping[str, Any]
    modern: bool


class Routing:
    """The `Mcp-*` headers of one HTTP request, blanks stripped: httptools keeps those behind a value."""

    __slots__ = ("_found", "_plain", "_repeated")

    def __init__(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self._found: dict[bytes, bytes] = {}
        self._repeated: set[bytes] = set()
        self._plain: tuple[str | None, ...] | None = None
        for name, value in headers:
            if name[:4] == b"mcp-":
                if name in self._found:
                    self._repeated.add(name)
                self._found[name] = value.strip(_BLANKS)

    @property
    def version(self) -> str | None:
        """What the header says; repeated or not ASCII, it is a version that nobody has."""
        value = self._found.get(VERSION_HEADER)
        if value is None:
            return None
        return "" if VERSION_HEADER in self._repeated else _VERSIONS.get(value) or _text(value) or ""

    def plainly_says(self, version: str, method: str, name: Any) -> bool:
        """Whether nothing is left to check: each header comes once and is, as it stands, what the body says."""
        plain = self._plain
        if plain is None:
            plain = self._plain = self._read_plainly()
        if method != CALL:
            return plain[:2] == (version, method)
        return name is not None and plain == (version, method, name)

    def _read_plainly(self) -> tuple[str | None, ...]:
        """Version, method and name as they stand; nothing where one repeats. A name that may be encoded is None."""
        if self._repeated:
            return ()
        version, method, name = (
            None if value is None else _text(value)
            for value in map(self._found.get, (VERSION_HEADER, METHOD_HEADER, NAME_HEADER))
        )
        return version, method, name if name is not None and _is_plain(name) else None

    def has(self, name: bytes) -> bool:
        return name in self._found

    def plain(self, name: bytes) -> str | None:
        """A header as it stands. None where it is missing or cannot be right; raises HeaderMismatch when repeated."""
        if name in self._repeated:
            raise HeaderMismatch(f"{_shown(name)} header appears more than once")
        value = self._found.get(name)
        return None if value is None else _text(value)

    def decoded(self, name: bytes) -> str | None:
        """A header whose value may be encoded as `=?base64?…?=`."""
        value = self.plain(name)
        if value is None or not (value.startswith(_ENCODED_START) and value.endswith(_ENCODED_END)):
            return value
        return _from_base64(value[len(_ENCODED_START) : -len(_ENCODED_END)])


def _is_plain(name: str) -> bool:
    """Whether it stands in a header as it is; such are all names of tools."""
    return name.isascii() and name.isprintable() and name[:1] != "="


def _text(value: bytes) -> str | None:
    """Visible ASCII, spaces and tabs; anything else must come encoded."""
    text = value.decode("latin-1")
    return text if text.isascii() and (text.isprintable() or text.replace("\t", "").isprintable()) else None


def _from_base64(encoded: str) -> str | None:
    """None for what is not canonical: two spellings of one value let a proxy and us read different things."""
    try:
        decoded = b64decode(encoded, validate=True)
        return decoded.decode() if b64encode(decoded).decode() == encoded else None
    except (binascii.Error, UnicodeDecodeError):
        return None


def is_modern(message: Any, version: str | None) -> bool:
    """The era of a message: what its `_meta` says, else what the header says. `initialize` is legacy by nature."""
    params = message.get("params") if type(message) is dict else None
    meta = params.get("_meta") if type(params) is dict else None
    if type(meta) is dict and META_VERSION in meta:
        return True
    if version is None or version in LEGACY_VERSIONS:
        return False
    opens = type(params) is dict and message.get("method") == "initialize" and "protocolVersion" in params
    return not opens


def readable_id(message: Any) -> bytes:
    """The id, encoded, if it can be one; else null, for the answer to what is wrong."""
    request_id = message.get("id") if type(message) is dict else None
    return orjson.dumps(request_id) if type(request_id) in _ID_TYPES else b"null"


_ID_TYPES = frozenset({str, int})
_NOTHING: dict[str, Any] = {}


def request_of(message: Any, request_id: bytes, *, modern: bool) -> Request | None:
    """A message as a request; None when it wants no answer. Raises InvalidRequest: checks 1 to 3."""
    if type(message) is not dict:
        raise InvalidRequest("Invalid request: the body is one JSON-RPC message")
    if message.get("jsonrpc") != "2.0":
        raise InvalidRequest('Invalid request: jsonrpc must be "2.0"')
    if "method" not in message and ("result" in message or "error" in message):
        if modern:
            raise InvalidRequest("Invalid request: this server sends no requests, so there is no response to send")
        return None
    method, params = message.get("method"), message.get("params", _NOTHING)
    if type(method) is not str:
        raise InvalidRequest("Invalid request: method must be a string")
    if type(params) is not dict:
        raise InvalidRequest("Invalid request: params must be an object")
    if "id" not in message:
        return None
    if request_id == b"null":
        raise InvalidRequest("Invalid request: id must be a string or an integer")
    meta = params.get("_meta")
    return Request(request_id, method, params, meta if type(meta) is dict else _NOTHING, modern)


def check_modern(request: Request, routing: Routing, *, tolerate_mismatch: bool) -> None:
    """Checks 4 to 6. `tolerate_mismatch`: a legacy version in the header is overlooked, and that the other routing
    headers are missing then; what is there must be right all the same."""
    version, capabilities = request.meta.get(META_VERSION), request.meta.get(META_CAPABILITIES)
    if type(version) is not str or type(capabilities) is not dict:
        raise Malformed(f"params._meta needs {META_VERSION}, a string, and {META_CAPABILITIES}, an object")
    if version == MODERN_VERSION and routing.plainly_says(version, request.method, request.params.get("name")):
        return
    given = routing.plain(VERSION_HEADER)
    lax = tolerate_mismatch and given in LEGACY_VERSIONS
    if given != version and not lax:
        raise HeaderMismatch("MCP-Protocol-Version header is missing or not the version in _meta")
    if not _says(routing, METHOD_HEADER, routing.plain(METHOD_HEADER), request.method, lax):
        raise HeaderMismatch("Mcp-Method header is missing or not the method in the body")
    if request.method == CALL and not _says(
        routing, NAME_HEADER, routing.decoded(NAME_HEADER), request.params.get("name"), lax
    ):
        raise HeaderMismatch("Mcp-Name header is missing or not params.name")
    if version != MODERN_VERSION:
        raise VersionNotServed(version)


def _says(routing: Routing, header: bytes, given: str | None, value: Any, may_lack: bool) -> bool:
    """Whether a header, read as `given`, is what the body says; None is for both that there is nothing."""
    if not routing.has(header):
        return may_lack or value is None
    return given is not None and given == value


def check_mirrored(parameters: Iterable[Mirrored], arguments: Any, routing: Routing) -> None:
    """Check 7: a parameter that is mirrored and its header are both there and equal, or both absent."""
    for parameter in parameters:
        header = MIRRORED_PREFIX + parameter.header.encode()
        given, value = routing.decoded(header), _value_at(arguments, parameter.path)
        if given is None and type(value) in _NEVER_MIRRORED and not routing.has(header):
            continue
        if routing.has(header) != (value is not None) or not _equal(given, value, parameter.type):
            raise HeaderMismatch(f"{_shown(header)} header is not the argument {'.'.join(parameter.path)!r}")


_NEVER_MIRRORED = (dict, list)
"""No header can say them; that they are no argument either, the agent hears of the arguments."""


def _value_at(arguments: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        if type(arguments) is not dict:
            return None
        arguments = arguments.get(name)
    return arguments


def _equal(given: str | None, value: Any, kind: str) -> bool:
    if given is None or value is None:
        return given is None and value is None
    if type(value) is bool:
        return given == ("true" if value else "false")
    if kind == "integer" and isinstance(value, int | float):
        return _as_integer(given) == value or (type(value) is float and _as_float(given) == value)
    return given == str(value)


def _as_integer(text: str) -> int | None:
    """`42` and `42.0` are the same (specification: compare numerically); no exponents, no blanks, no underscores."""
    found = _INTEGER.fullmatch(text)
    return None if found is None else int(found[1])


_INTEGER = re.compile(r"(-?[0-9]{1,20})(?:\.0+)?")
"""Integers have 64 bits here."""


def _as_float(text: str) -> float | None:
    """What no integer is goes on to the arguments, which say so to the agent; it is the same all the same."""
    return float(text) if _FLOAT.fullmatch(text) else None


_FLOAT = re.compile(r"-?[0-9]{1,309}(?:\.[0-9]{1,309})?(?:[eE][+-]?[0-9]{1,3})?")


def _shown(header: bytes) -> str:
    return header.decode("latin-1").title()
