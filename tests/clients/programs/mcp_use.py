"""mcp-use: a session of its client."""

import asyncio
import json
import os
import sys

from mcp_use import MCPClient

HEADERS = {"Authorization": f"Bearer {os.environ['KEY']}"} if "KEY" in os.environ else {}


async def main() -> None:
    client = MCPClient({"mcpServers": {"tools": {"url": sys.argv[1], "headers": HEADERS}}})
    session = await client.create_session("tools")
    tools = await session.list_tools()
    echo = await session.call_tool("echo", {"message": "hi"})
    await client.close_all_sessions()
    print(json.dumps({"tools": len(tools), "echo": echo.structuredContent}))


asyncio.run(main())
