"""llama-index-tools-mcp: functions of LlamaIndex."""

import asyncio
import json
import os
import sys

from llama_index.tools.mcp import BasicMCPClient, McpToolSpec

HEADERS = {"Authorization": f"Bearer {os.environ['KEY']}"} if "KEY" in os.environ else None


async def main() -> None:
    client = BasicMCPClient(sys.argv[1], headers=HEADERS)
    tools = {tool.metadata.name: tool for tool in await McpToolSpec(client).to_tool_list_async()}
    echo = await tools["echo"].acall(message="hi")
    print(json.dumps({"tools": len(tools), "echo": echo.raw_output.structured_content}))


asyncio.run(main())
