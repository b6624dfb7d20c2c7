"""agno: its toolkit."""

import asyncio
import json
import os
import sys

from agno.tools.mcp import MCPTools

HEADERS = {"Authorization": f"Bearer {os.environ['KEY']}"} if "KEY" in os.environ else None


async def main() -> None:
    async with MCPTools(url=sys.argv[1], transport="streamable-http", headers=HEADERS) as toolkit:
        tools = toolkit.functions
        echo = await tools["echo"].entrypoint(message="hi")
    print(json.dumps({"tools": len(tools), "echo": json.loads(echo.content)}))


asyncio.run(main())
