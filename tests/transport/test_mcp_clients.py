"""The official Python SDK against a running service, in each of its modes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from mcp import Client, MCPError
from mcp.client.streamable_http import streamable_http_client

from tests.access.keyring import make_key
from tests.conftest import Running, Serve, places_in

pytestmark = pytest.mark.anyio

MODES = ["auto", "legacy", "2026-07-28"]


@asynccontextmanager
async def opened(service: Running, mode: Any = "auto", **headers: str) -> AsyncIterator[Client]:
    async with httpx2.AsyncClient(headers=headers, trust_env=False, timeout=60) as http:
        transport = streamable_http_client(f"{service.url}/mcp", http_client=http)
        async with Client(transport, mode=mode) as client:
            yield client


@pytest.mark.parametrize("mode", MODES)
async def test_it_lists_and_calls(mcp: Running, mode: str) -> None:
    async with opened(mcp, mode) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert tools["echo"].annotations is not None and tools["echo"].annotations.read_only_hint is True
        result = await client.call_tool("echo", {"message": "hi"})
        assert result.structured_content == {"message": "hi"} and not result.is_error


@pytest.mark.parametrize("mode", MODES)
async def test_it_hears_of_progress(mcp: Running, mode: str) -> None:
    heard: list[tuple[float, float | None, str | None]] = []

    async def hear(done: float, total: float | None, message: str | None) -> None:
        heard.append((done, total, message))

    async with opened(mcp, mode) as client:
        result = await client.call_tool("test_tool_with_progress", {}, progress_callback=hear)
    assert heard == [(0, 100, "0 of 100"), (50, 100, "50 of 100"), (100, 100, "100 of 100")]
    assert result.content[0].text == "Progress was told"  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", MODES)
async def test_it_takes_every_content_type(mcp: Running, mode: str) -> None:
    async with opened(mcp, mode) as client:
        result = await client.call_tool("every_content_type", {})
    assert [block.type for block in result.content] == ["text", "image", "audio", "resource_link", "resource"]


@pytest.mark.parametrize("mode", MODES)
async def test_it_mirrors_parameters_once_it_has_listed_them(mcp: Running, mode: str) -> None:
    arguments = {"region": "Zürich ", "count": -7, "dry": True}
    async with opened(mcp, mode) as client:
        await client.list_tools()
        result = await client.call_tool("mirrored_parameters", arguments)
    assert result.structured_content == arguments


@pytest.mark.parametrize("mode", MODES)
async def test_what_went_wrong_reaches_the_agent(mcp: Running, mode: str) -> None:
    async with opened(mcp, mode) as client:
        wrong = await client.call_tool("echo", {})
        failed = await client.call_tool("fail_clearly", {"message": "No such ticket"})
        with pytest.raises(MCPError) as unknown:
            await client.call_tool("no_such_tool", {})
    assert wrong.is_error and "message: Field required" in wrong.content[0].text  # type: ignore[union-attr]
    assert failed.is_error and "No such ticket" in failed.content[0].text  # type: ignore[union-attr]
    assert unknown.value.error.code == -32602


@pytest.mark.parametrize("mode", MODES)
async def test_a_limit_reaches_the_agent_with_the_time_to_wait(serve: Serve, mode: str) -> None:
    service = serve(LIMITS_RATE="1/hour")
    async with opened(service, mode) as client:
        await client.list_tools()
        await client.call_tool("echo", {"message": "x"})
        refused = await client.call_tool("echo", {"message": "x"})
    assert refused.is_error and refused.structured_content is not None
    assert refused.structured_content["error"]["data"]["retry_after_ms"] > 0


@pytest.mark.parametrize("mode", MODES)
async def test_a_key_opens_the_door(serve: Serve, tmp_path: Path, mode: str) -> None:
    places = places_in(tmp_path)
    _, key = make_key(places["DATABASE_URL"], subject="agent", tools=["echo"])
    service = serve(**places, AUTH_MODE="required")
    async with opened(service, mode, Authorization=f"Bearer {key}") as client:
        assert [tool.name for tool in (await client.list_tools()).tools] == ["echo"]
