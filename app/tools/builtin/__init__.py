"""The tools that come with the service."""

from __future__ import annotations

from app.tools.builtin.basic import calculator, current_time, echo
from app.tools.builtin.lookup import lookup_tools
from app.tools.builtin.web import graphql_query, http_request, web_scrape
from app.tools.tool import Tool


def builtin_tools(wikipedia_url: str, searxng_url: str | None) -> list[Tool]:
    """All of them; the two that look things up need to know where."""
    fixed: list[Tool] = [echo, calculator, current_time, http_request, web_scrape, graphql_query]
    return [*fixed, *lookup_tools(wikipedia_url, searxng_url)]
