"""Parameters that MCP clients repeat in HTTP headers (`x-mcp-header`), so that proxies can route without the body.

Found once, when a tool is declared. What may carry the mark is laid down in the MCP specification 2026-07-28, "Custom
Headers from Tool Parameters"; clients drop a tool that breaks it, so it is refused here. Knows no header and no call.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

MARK = "x-mcp-header"

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}")
"""RFC 9110, section 5.6.2; the length is ours."""

_TYPES = frozenset({"string", "integer", "boolean"})


class Mirrored(NamedTuple):
    """One parameter: the name behind `Mcp-Param-`, in lower case, and the way to its value."""

    header: str
    path: tuple[str, ...]
    type: str


def mirrored(schema: dict[str, Any]) -> tuple[Mirrored, ...]:
    """Every marked parameter of a JSON Schema. Raises TypeError where the mark cannot stand."""
    found = tuple(_marked(schema, ()))
    if len({one.header for one in found}) < len(found):
        raise TypeError(f"two parameters have the same {MARK}")
    if _marks(schema) > len(found):
        raise TypeError(f"{MARK} can only stand on a property, reached by properties alone")
    return found


def _marked(schema: dict[str, Any], path: tuple[str, ...]) -> Iterator[Mirrored]:
    for name, part in schema.get("properties", {}).items():
        if not isinstance(part, dict):
            continue
        here = (*path, name)
        if MARK in part:
            yield _read(part, here)
        yield from _marked(part, here)


def _read(part: dict[str, Any], path: tuple[str, ...]) -> Mirrored:
    name, kind = part[MARK], part.get("type")
    if not isinstance(name, str) or not _TOKEN.fullmatch(name):
        raise TypeError(f"parameter {'.'.join(path)!r}: {MARK} must be a token for a header name")
    if kind not in _TYPES:
        raise TypeError(f"parameter {'.'.join(path)!r}: {MARK} needs a string, an integer or a boolean")
    return Mirrored(name.lower(), path, kind)


def _marks(schema: Any) -> int:
    """How often the mark stands anywhere, as a key of a schema; a property of that name is none."""
    if isinstance(schema, list):
        return sum(map(_marks, schema))
    if not isinstance(schema, dict):
        return 0
    named = schema.get("properties")
    inside = [value for key, value in schema.items() if key not in _DATA and not (key == "properties" and named)]
    inside += named.values() if isinstance(named, dict) else ()
    return (MARK in schema) + sum(map(_marks, inside))


_DATA = frozenset({"default", "examples", "const", "enum", MARK})
"""Members that hold values and no schemas."""
