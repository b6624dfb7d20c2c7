"""fastmcp: its client, with what it makes of an address."""

import asyncio
import json
import os
import sys

from fastmcp import Client

heard = []


async def hear(done: float, total: float | None, message: str | None) -> None:
    heard.append(done)


async def main() -> None:
    async with Client(sys.argv[1], auth=os.environ.get("KEY")) as client:
        tools = await client.list_tools()
        echo = await client.call_tool("echo", {"message": "hi"})
        await client.call_tool("test_tool_with_progress", {}, progress_handler=hear)
    print(json.dumps({"tools": len(tools), "echo": echo.structured_content, "progress": heard}))


asyncio.run(main())
