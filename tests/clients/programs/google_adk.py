"""Google ADK: its toolset, each call as its agents make it."""

import asyncio
import json
import os
import sys

from google.adk.tools.mcp_tool import McpToolset, StreamableHTTPConnectionParams

HEADERS = {"Authorization": f"Bearer {os.environ['KEY']}"} if "KEY" in os.environ else None

heard = []


async def hear(progress: float, total: float | None, message: str | None) -> None:
    heard.append(progress)


async def main() -> None:
    connection = StreamableHTTPConnectionParams(url=sys.argv[1], headers=HEADERS)
    toolset = McpToolset(connection_params=connection, progress_callback=hear)
    tools = {tool.name: tool for tool in await toolset.get_tools()}
    echo = await tools["echo"].run_async(args={"message": "hi"}, tool_context=None)
    await tools["test_tool_with_progress"].run_async(args={}, tool_context=None)
    print(json.dumps({"tools": len(tools), "echo": echo["structuredContent"], "progress": heard}))
    await toolset.close()


asyncio.run(main())
