"""wikipedia_search and web_search against servers that answer as MediaWiki and SearXNG do."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, urlsplit

import orjson
import pytest

from app.errors import InvalidParams, ToolError
from app.tools.builtin.lookup import lookup_tools
from app.tools.tool import FunctionTool
from tests.origin import origin, response
from tests.tools.invoking import failure_of, run, tool_context

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def wikipedia(url: str) -> FunctionTool:
    return lookup_tools(url, None)[0]


def web(url: str | None) -> FunctionTool:
    return lookup_tools("http://wikipedia.test/w/api.php", url)[1]


def json(value: Any) -> bytes:
    return response(orjson.dumps(value), content_type="application/json")


PAGE = {"pageid": 1, "index": 1, "title": "Ada", "extract": "First. Second.", "fullurl": "https://w.test/wiki/Ada"}


@pytest.mark.parametrize("pages", [[PAGE], {"1": PAGE}])
async def test_best_article_is_returned_with_summary_and_url(pages: Any) -> None:
    async with origin({"/w/api.php": json({"query": {"pages": pages}})}) as server, tool_context() as context:
        result = await run(wikipedia(server.url("/w/api.php")), context, query="ada & co", sentences=2)
    assert result == {"title": "Ada", "summary": "First. Second.", "url": "https://w.test/wiki/Ada"}
    asked = parse_qs(urlsplit(server.received[0].target).query)
    assert (asked["gsrsearch"], asked["exsentences"], asked["format"]) == (["ada & co"], ["2"], ["json"])
    assert server.received[0].headers["user-agent"].startswith("agentcore-tools")


@pytest.mark.parametrize("answer", [{"batchcomplete": True}, {"query": {"pages": []}}, {"query": {}}])
async def test_search_without_an_article_is_a_failure_and_no_invention(answer: Any) -> None:
    async with origin({"/": json(answer)}) as server, tool_context() as context:
        error = await failure_of(wikipedia(server.url()), context, query="nothing")
    assert (error.code, error.retryable) == ("NOT_FOUND", False)


@pytest.mark.parametrize(
    "reply",
    [
        response(b"<html>maintenance"),
        json([]),
        json({"error": {"code": "maxlag", "info": "secret text of the server"}}),
        json({"query": {"pages": [{"title": "no url"}]}}),
        json({"query": {"pages": ["text"]}}),
        json({"query": {"pages": 1}}),
    ],
)
async def test_answer_that_is_no_article_is_a_failure(reply: bytes) -> None:
    async with origin({"/": reply}) as server, tool_context() as context:
        error = await failure_of(wikipedia(server.url()), context, query="x")
    assert (error.code, error.retryable) == ("LOOKUP_FAILED", True)
    assert "secret" not in str(error)


async def test_search_service_that_is_busy_is_a_failure_to_try_again() -> None:
    async with origin({"/": response(status="429 Slow")}) as server, tool_context() as context:
        error = await failure_of(wikipedia(server.url()), context, query="x")
    assert (error.code, error.retryable) == ("HTTP_STATUS", True)


@pytest.mark.parametrize("root", ["", "/", "/search", "/search/"])
async def test_results_of_the_search_come_in_their_order_and_number(root: str) -> None:
    found = [{"title": f"T{n}", "url": f"https://r.test/{n}", "content": f"S{n}", "engine": "e"} for n in range(9)]
    async with origin({"/search": json({"query": "q", "results": found})}) as server, tool_context() as context:
        result = await run(web(server.url(root)), context, query="ü b", limit=2)
    assert result == {
        "results": [
            {"title": "T0", "url": "https://r.test/0", "snippet": "S0"},
            {"title": "T1", "url": "https://r.test/1", "snippet": "S1"},
        ]
    }
    assert parse_qs(urlsplit(server.received[0].target).query) == {"q": ["ü b"], "format": ["json"]}


async def test_results_without_a_web_address_are_left_out_and_long_ones_cut() -> None:
    found = [
        {"title": "no url"},
        {"title": "x", "url": "javascript:alert(1)"},
        "text",
        {"url": "http://r.test/", "title": None, "content": "s" * 9_000},
    ]
    async with origin({"/search": json({"results": found})}) as server, tool_context() as context:
        result = await run(web(server.url()), context, query="q")
    assert result == {"results": [{"title": "", "url": "http://r.test/", "snippet": "s" * 1_000}]}


async def test_search_that_finds_nothing_returns_nothing() -> None:
    async with origin({"/search": json({"results": []})}) as server, tool_context() as context:
        assert await run(web(server.url()), context, query="q") == {"results": []}


async def test_web_search_without_a_service_says_which_setting_to_set() -> None:
    async with tool_context() as context:
        error = await failure_of(web(None), context, query="q")
    assert (error.code, error.retryable) == ("NOT_CONFIGURED", False)
    assert "SEARXNG_URL" in str(error)


@pytest.mark.parametrize("reply", [json({}), json({"results": {}}), response(b"<html>")])
async def test_answer_that_holds_no_results_is_a_failure(reply: bytes) -> None:
    async with origin({"/search": reply}) as server, tool_context() as context:
        assert (await failure_of(web(server.url()), context, query="q")).code == "LOOKUP_FAILED"


async def test_configured_service_at_a_private_address_needs_an_exception_like_any_other() -> None:
    async with tool_context(allow="") as context:
        with pytest.raises(ToolError, match=r"^egress refused$"):
            await run(web("http://127.0.0.1:8888"), context, query="q")


@pytest.mark.parametrize("parameters", [{"query": ""}, {"query": "q" * 301}, {}, {"query": "q", "other": 1}])
def test_parameters_outside_the_schema_are_refused(parameters: dict[str, Any]) -> None:
    for tool in lookup_tools("http://a.test/", None):
        with pytest.raises(InvalidParams):
            tool.parameters.validate(parameters)


def test_tools_declare_what_they_do() -> None:
    for tool in lookup_tools("http://a.test/", None):
        assert tool.spec.read_only
        assert tool.spec.timeout == 15
        assert all("description" in schema for schema in tool.parameters.json_schema["properties"].values())
