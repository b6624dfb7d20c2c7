"""langchain-mcp-adapters: tools of LangChain, made of those that the service lists."""

import asyncio
import json
import os
import sys

from langchain_mcp_adapters.callbacks import Callbacks
from langchain_mcp_adapters.client import MultiServerMCPClient

HEADERS = {"Authorization": f"Bearer {os.environ['KEY']}"} if "KEY" in os.environ else {}

heard = []


async def hear(progress: float, total: float | None, message: str | None, context: object) -> None:
    heard.append(progress)


async def main() -> None:
    service = {"transport": "http", "url": sys.argv[1], "headers": HEADERS}
    client = MultiServerMCPClient({"tools": service}, callbacks=Callbacks(on_progress=hear))
    tools = {tool.name: tool for tool in await client.get_tools()}
    echo = await tools["echo"].ainvoke({"message": "hi"})
    await tools["test_tool_with_progress"].ainvoke({})
    print(json.dumps({"tools": len(tools), "echo": json.loads(echo[0]["text"]), "progress": heard}))


asyncio.run(main())
