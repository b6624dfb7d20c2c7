"""The tools that there are: one immutable snapshot, replaced whole, so that a reader never sees half a change.

Owns look-up, filters, pages and who may see what. Answers are built once per snapshot, as bytes. Knows no HTTP.
"""

from __future__ import annotations

import base64
import binascii
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import translate
from functools import lru_cache
from typing import Any

import orjson

from app.calls import EVERY_TOOL, Caller
from app.errors import InvalidParams, ToolNotFound
from app.tools.search import SearchIndex
from app.tools.tool import Tool, ToolSpec

LIST_LIMIT_DEFAULT = 100
LIST_LIMIT_MAX = 1_000
SEARCH_LIMIT_DEFAULT = 10
SEARCH_LIMIT_MAX = 100

VIEWS_KEPT_MAX = 64
"""Callers with different scopes and allow-lists see different tools; there are few kinds of them."""

View = tuple[frozenset[str], tuple[str, ...]]
"""What decides which tools a caller sees."""

PAGES_KEPT_MAX = 512
PAGES_BYTES_MAX = 8 * 1024 * 1024
"""Pages differ by filter, cursor, limit and caller; a client that walks all of them must not fill the memory, nor keep
out for ever the pages that others ask for: the oldest goes first. A page of 1,000 tools has about 170 KB."""

CURSOR_CHARACTERS_MAX = 88
"""Of an id of 64. A page is kept under its cursor, which counts for nothing in PAGES_BYTES_MAX."""


ALLOW_LISTS_KEPT_MAX = 4_096
"""Keys with different allow-lists are few beside the calls that they make."""


def may_call(caller: Caller, spec: ToolSpec) -> bool:
    """The one choke point of authorisation: what is refused here is neither listed nor found nor run."""
    if not spec.required_scopes <= caller.scopes:
        return False
    return caller.tools == EVERY_TOOL or any(glob.match(spec.id) for glob in _patterns(caller.tools))


@lru_cache(ALLOW_LISTS_KEPT_MAX)
def _patterns(globs: tuple[str, ...]) -> tuple[re.Pattern[str], ...]:
    """An allow-list: `*` is any text, `?` any character. The empty list lets none pass. The library's translation is
    linear, whatever the number of stars."""
    return tuple(re.compile(translate(glob.replace("[", "[[]"))) for glob in globs)


@dataclass(frozen=True, slots=True)
class ToolFilter:
    """What `tools.list` and `tools.search` narrow by; all given conditions hold, tags by any, capabilities by all."""

    category: str | None = None
    tags: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()


def summary(spec: ToolSpec) -> dict[str, Any]:
    """ToolSummary of the contract."""
    return {
        "tool_id": spec.id,
        "name": spec.name,
        "description": spec.description,
        "version": spec.version,
        "category": spec.category,
        "tags": spec.tags,
        "capabilities": spec.capabilities,
    }


def detail(tool: Tool, timeout_ceiling_s: float) -> dict[str, Any]:
    """ToolDetail of the contract: the summary, the title, both schemas, and what holds for a run."""
    spec = tool.spec
    return {
        **summary(spec),
        "title": spec.title,
        "parameters": tool.parameters.json_schema,
        "result": tool.result.json_schema,
        "timeout_seconds": min(spec.timeout or timeout_ceiling_s, timeout_ceiling_s),
        "limits": {
            "max_concurrent": spec.max_concurrent,
            "rate_limits": spec.rate_limits,
            "quotas": dict(spec.quotas),
            "cost": spec.cost,
        },
        "flags": {
            "read_only": spec.read_only,
            "idempotent": spec.idempotent,
            "destructive": spec.destructive,
            "cancel_on_disconnect": spec.cancel_on_disconnect,
        },
    }


class Snapshot:
    """Every tool at one moment, indexed. Never changed once built."""

    def __init__(self, tools: Iterable[Tool]) -> None:
        self.tools: dict[str, Tool] = {tool.spec.id: tool for tool in tools}
        self.ids = tuple(sorted(self.tools))
        self.summaries = {tool_id: orjson.dumps(summary(self.tools[tool_id].spec)) for tool_id in self.ids}
        self.details: dict[str, bytes] = {}
        self.pages: dict[Any, bytes] = {}
        self._pages_bytes = 0
        self._visible: dict[View, tuple[str, ...]] = {}
        self._by_category = self._indexed(lambda spec: (spec.category,))
        self._by_tag = self._indexed(lambda spec: spec.tags)
        self._by_capability = self._indexed(lambda spec: spec.capabilities)
        self._search = SearchIndex(
            (spec.id, spec.name, spec.description, spec.tags) for spec in (tool.spec for tool in self.tools.values())
        )

    def _indexed(self, keys: Callable[[ToolSpec], Iterable[str]]) -> dict[str, frozenset[str]]:
        index: dict[str, set[str]] = {}
        for tool_id, tool in self.tools.items():
            for key in keys(tool.spec):
                index.setdefault(key, set()).add(tool_id)
        return {key: frozenset(ids) for key, ids in index.items()}

    def matching(self, wanted: ToolFilter) -> frozenset[str] | None:
        """Ids that pass the filter; None when it lets all pass."""
        empty: frozenset[str] = frozenset()
        sets = [self._by_capability.get(capability, empty) for capability in wanted.capabilities]
        if wanted.category is not None:
            sets.append(self._by_category.get(wanted.category, empty))
        if wanted.tags:
            sets.append(empty.union(*(self._by_tag.get(tag, empty) for tag in wanted.tags)))
        return frozenset.intersection(*sets) if sets else None

    def visible_ids(self, wanted: ToolFilter, caller: Caller) -> Sequence[str]:
        """Ids in their stable order that pass the filter and that the caller may call."""
        matching = self.matching(wanted)
        if matching is None:
            return self._visible_to(caller)
        return [tool_id for tool_id in sorted(matching) if may_call(caller, self.tools[tool_id].spec)]

    def _visible_to(self, caller: Caller) -> Sequence[str]:
        """All that the caller may call; kept, for asking of 10,000 tools takes a millisecond."""
        view = (caller.scopes, caller.tools)
        known = self._visible.get(view)
        if known is None:
            known = tuple(tool_id for tool_id in self.ids if may_call(caller, self.tools[tool_id].spec))
            if len(self._visible) < VIEWS_KEPT_MAX:
                self._visible[view] = known
        return known

    def keep_page(self, key: Any, encoded: bytes) -> None:
        """Keep an answer that is not kept yet; the oldest ones make room."""
        if len(encoded) > PAGES_BYTES_MAX:
            return
        self.pages[key] = encoded
        self._pages_bytes += len(encoded)
        while self._pages_bytes > PAGES_BYTES_MAX or len(self.pages) > PAGES_KEPT_MAX:
            self._pages_bytes -= len(self.pages.pop(next(iter(self.pages))))

    def ranked(self, query: str, wanted: ToolFilter, caller: Caller, limit: int) -> list[str]:
        """Ids best first."""
        matching = self.matching(wanted)

        def allowed(tool_id: str) -> bool:
            return (matching is None or tool_id in matching) and may_call(caller, self.tools[tool_id].spec)

        return self._search.search(query, allowed, limit)


class Registry:
    """Holds the current snapshot. `replace` swaps it in one assignment."""

    def __init__(self, tools: Iterable[Tool], *, timeout_ceiling_s: float, cache_answers: bool = True) -> None:
        self._timeout_ceiling_s = timeout_ceiling_s
        self._cache_answers = cache_answers
        self.snapshot = Snapshot(tools)

    def replace(self, tools: Iterable[Tool]) -> None:
        self.snapshot = Snapshot(tools)

    def __len__(self) -> int:
        return len(self.snapshot.tools)

    def holds(self, tool: Tool) -> bool:
        """Whether this very tool is still the one of its id."""
        return self.snapshot.tools.get(tool.spec.id) is tool

    def lookup(self, tool_id: str, caller: Caller) -> Tool:
        """The tool, or ToolNotFound when there is none or none that the caller may call."""
        tool = self.snapshot.tools.get(tool_id)
        if tool is None or not may_call(caller, tool.spec):
            raise ToolNotFound
        return tool

    def visible(self, wanted: ToolFilter, caller: Caller) -> list[Tool]:
        """Every tool that passes the filter and that the caller may call, in the order of ids."""
        snapshot = self.snapshot
        return [snapshot.tools[tool_id] for tool_id in snapshot.visible_ids(wanted, caller)]

    def detail(self, tool_id: str, caller: Caller) -> bytes:
        tool = self.lookup(tool_id, caller)
        snapshot = self.snapshot
        if (known := snapshot.details.get(tool_id)) is not None:
            return known
        encoded = orjson.dumps(detail(tool, self._timeout_ceiling_s))
        if self._cache_answers:
            snapshot.details[tool_id] = encoded
        return encoded

    def page(self, wanted: ToolFilter, caller: Caller, limit: int | None, cursor: str | None) -> bytes:
        """`{tools, count, next_cursor}`; a cursor names the last id seen, so pages survive a change of tools."""
        key = (wanted, caller.scopes, caller.tools, limit, cursor)
        snapshot = self.snapshot
        if (known := snapshot.pages.get(key)) is not None:
            return known
        ids = snapshot.visible_ids(wanted, caller)
        start = bisect_right(ids, decode_cursor(cursor)) if cursor else 0
        end = start + (limit or LIST_LIMIT_DEFAULT)
        next_cursor = encode_cursor(ids[end - 1]) if end < len(ids) else None
        encoded = self._answer(ids[start:end], next_cursor=next_cursor)
        if self._cache_answers:
            snapshot.keep_page(key, encoded)
        return encoded

    def search(self, query: str, wanted: ToolFilter, caller: Caller, limit: int | None) -> bytes:
        """`{tools, count, query}`, best first; without a query, in the order of ids."""
        count = limit or SEARCH_LIMIT_DEFAULT
        ids: Sequence[str]
        if query.strip():
            ids = self.snapshot.ranked(query, wanted, caller, count)
        else:
            ids = self.snapshot.visible_ids(wanted, caller)[:count]
        return self._answer(ids, query=query)

    def _answer(self, ids: Sequence[str], **extra: Any) -> bytes:
        return orjson.dumps({"tools": [self._summary(tool_id) for tool_id in ids], "count": len(ids), **extra})

    def _summary(self, tool_id: str) -> Any:
        if self._cache_answers:
            return orjson.Fragment(self.snapshot.summaries[tool_id])
        return summary(self.snapshot.tools[tool_id].spec)


def encode_cursor(tool_id: str) -> str:
    return base64.urlsafe_b64encode(tool_id.encode()).decode().rstrip("=")


def decode_cursor(cursor: str) -> str:
    try:
        if len(cursor) > CURSOR_CHARACTERS_MAX:
            raise ValueError
        return base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode("ascii")
    except (binascii.Error, ValueError):
        raise InvalidParams.at("cursor", "Not a cursor that this service gave") from None
