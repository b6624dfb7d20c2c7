"""The official Python SDK 1.x."""

import asyncio
import json
import os
import sys

from mcp import ClientSession
from mcp.client.streamable_http import streamablehttp_client

HEADERS = {"Authorization": f"Bearer {os.environ['KEY']}"} if "KEY" in os.environ else None


async def main() -> None:
    heard = []

    async def hear(done: float, total: float | None, message: str | None) -> None:
        heard.append(done)

    async with (
        streamablehttp_client(sys.argv[1], headers=HEADERS) as (read, write, _),
        ClientSession(read, write) as client,
    ):
        await client.initialize()
        tools = await client.list_tools()
        echo = await client.call_tool("echo", {"message": "hi"})
        await client.call_tool("test_tool_with_progress", {}, progress_callback=hear)
    print(json.dumps({"tools": len(tools.tools), "echo": echo.structuredContent, "progress": heard}))


asyncio.run(main())
