"""Tools that ask a configured service: wikipedia_search (MediaWiki) and web_search (SearXNG).

Where those services are is given once, to `lookup_tools`. What they do not answer is never made up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import orjson
from pydantic import Field
from typing_extensions import TypedDict

from app.tools.builtin.web import require_success
from app.tools.tool import FunctionTool, ToolContext, ToolError, tool

Query = Annotated[str, Field(min_length=1, max_length=300, description="What to look for")]
"""MediaWiki refuses longer ones."""

TITLE_CHARACTERS_MAX = 300
SNIPPET_CHARACTERS_MAX = 1_000
SUMMARY_CHARACTERS_MAX = 20_000
"""Ten sentences, the most that MediaWiki extracts, are far below."""


class Article(TypedDict):
    title: str
    summary: str
    url: str


class Hit(TypedDict):
    title: str
    url: str
    snippet: str


class Hits(TypedDict):
    results: list[Hit]


def lookup_tools(wikipedia_url: str, searxng_url: str | None) -> list[FunctionTool]:
    """Both tools. `wikipedia_url` is a MediaWiki `api.php`; `searxng_url` the root of a SearXNG, or its /search."""

    @tool(
        category="search",
        tags=["wikipedia", "encyclopedia", "knowledge"],
        capabilities=["search", "network"],
        timeout=15.0,
        read_only=True,
        idempotent=True,
        cache_ttl=3600.0,
        cache_shared=True,
    )
    async def wikipedia_search(
        context: ToolContext,
        query: Query,
        sentences: Annotated[int, Field(ge=1, le=10, description="Length of the summary")] = 3,
    ) -> Article:
        """Find the Wikipedia article that fits best and return its title, a summary and its URL."""
        return _article(await _ask(context, wikipedia_url, _wikipedia_params(query, sentences)))

    @tool(
        category="search",
        tags=["web", "internet"],
        capabilities=["search", "network"],
        timeout=15.0,
        read_only=True,
        idempotent=True,
        cache_ttl=300.0,
        cache_shared=True,
    )
    async def web_search(
        context: ToolContext,
        query: Query,
        limit: Annotated[int, Field(ge=1, le=20, description="Most results to return")] = 5,
    ) -> Hits:
        """Search the web and return titles, URLs and snippets, best first."""
        if searxng_url is None:
            raise ToolError(
                "web_search is not configured: the operator must set SEARXNG_URL to a SearXNG with JSON output",
                code="NOT_CONFIGURED",
            )
        return _hits(await _ask(context, _search_url(searxng_url), {"q": query, "format": "json"}), limit)

    return [wikipedia_search, web_search]


async def _ask(context: ToolContext, url: str, params: Mapping[str, str | int]) -> dict[str, Any]:
    response = await context.http.request(
        "GET", url, params=params, headers={"Accept": "application/json"}, timeout_s=context.remaining_s()
    )
    require_success(response)
    try:
        answer = orjson.loads(response.body)
    except orjson.JSONDecodeError:
        answer = None
    if not isinstance(answer, dict):
        raise _unreadable()
    return answer


def _wikipedia_params(query: str, sentences: int) -> dict[str, str | int]:
    """Search and extract in one request: www.mediawiki.org, API:Search, Extension:TextExtracts."""
    return {
        "action": "query",
        "format": "json",
        "formatversion": 2,
        "generator": "search",
        "gsrsearch": query,
        "gsrlimit": 1,
        "gsrnamespace": 0,
        "prop": "extracts|info",
        "inprop": "url",
        "exintro": 1,
        "explaintext": 1,
        "exsentences": sentences,
        "redirects": 1,
    }


def _article(answer: Mapping[str, Any]) -> Article:
    if "error" in answer:
        raise ToolError("Wikipedia refused the search", code="LOOKUP_FAILED", retryable=True)
    found = answer.get("query")
    pages = found.get("pages") if isinstance(found, dict) else None
    if isinstance(pages, dict):  # formatversion 1 keeps them by id
        pages = list(pages.values())
    if not pages:
        raise ToolError("No article was found; try other words", code="NOT_FOUND")
    page = pages[0] if isinstance(pages, list) else None
    if not isinstance(page, dict) or not _text(page, "title") or not _text(page, "fullurl"):
        raise _unreadable()
    return {
        "title": _text(page, "title")[:TITLE_CHARACTERS_MAX],
        "summary": _text(page, "extract")[:SUMMARY_CHARACTERS_MAX],
        "url": _text(page, "fullurl"),
    }


def _search_url(root: str) -> str:
    root = root.rstrip("/")
    return root if root.endswith("/search") else f"{root}/search"


def _hits(answer: Mapping[str, Any], limit: int) -> Hits:
    found = answer.get("results")
    if not isinstance(found, list):
        raise _unreadable()
    hits = [_hit(item) for item in found if isinstance(item, dict)]
    return {"results": [hit for hit in hits if hit["url"].startswith(("http://", "https://"))][:limit]}


def _hit(item: Mapping[str, Any]) -> Hit:
    return {
        "title": _text(item, "title")[:TITLE_CHARACTERS_MAX],
        "url": _text(item, "url"),
        "snippet": _text(item, "content")[:SNIPPET_CHARACTERS_MAX],
    }


def _text(item: Mapping[str, Any], key: str) -> str:
    value = item.get(key)
    return value.strip() if isinstance(value, str) else ""


def _unreadable() -> ToolError:
    return ToolError("The search service gave an answer that cannot be read", code="LOOKUP_FAILED", retryable=True)
