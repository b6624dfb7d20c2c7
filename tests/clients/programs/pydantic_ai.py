"""pydantic-ai: an agent whose model is a function that calls echo and repeats what came back."""

import asyncio
import json
import os
import sys

from pydantic_ai import Agent, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.mcp import MCPToolset
from pydantic_ai.models.function import FunctionModel

HEADERS = {"Authorization": f"Bearer {os.environ['KEY']}"} if "KEY" in os.environ else None

tools = []
heard = []


async def hear(progress: float, total: float | None, message: str | None) -> None:
    heard.append(progress)


def script(messages, info):
    if not tools:
        tools.extend(info.function_tools)
        calls = [ToolCallPart("echo", {"message": "hi"}), ToolCallPart("test_tool_with_progress", {})]
        return ModelResponse(calls)
    told = next(part for part in messages[-1].parts if part.tool_name == "echo")
    return ModelResponse([TextPart(json.dumps(told.content))])


async def main() -> None:
    toolset = MCPToolset(sys.argv[1], headers=HEADERS, progress_handler=hear)
    async with Agent(FunctionModel(script), toolsets=[toolset]) as agent:
        result = await agent.run("Say hi")
    print(json.dumps({"tools": len(tools), "echo": json.loads(result.output), "progress": heard}))


asyncio.run(main())
