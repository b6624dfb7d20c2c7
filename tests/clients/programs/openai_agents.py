"""OpenAI Agents: an agent whose model is a script that calls echo and repeats what came back."""

import asyncio
import json
import os
import sys

from agents import Agent, Model, ModelResponse, Runner, Usage, set_tracing_disabled
from agents.mcp import MCPServerStreamableHttp
from openai.types.responses import ResponseFunctionToolCall, ResponseOutputMessage, ResponseOutputText

HEADERS = {"Authorization": f"Bearer {os.environ['KEY']}"} if "KEY" in os.environ else {}

seen = []


class Script(Model):
    async def get_response(self, system_instructions, input, model_settings, tools, *rest, **more):
        seen.append(len(tools))
        if len(seen) == 1:
            arguments = json.dumps({"message": "hi"})
            call = ResponseFunctionToolCall(type="function_call", call_id="1", name="echo", arguments=arguments)
            return ModelResponse([call], Usage(), None)
        told = input[-1]["output"]
        text = told if isinstance(told, str) else told[0]["text"]
        block = ResponseOutputText(type="output_text", text=text, annotations=[])
        message = ResponseOutputMessage(id="2", type="message", role="assistant", status="completed", content=[block])
        return ModelResponse([message], Usage(), None)

    def stream_response(self, *rest, **more):
        raise NotImplementedError


async def main() -> None:
    set_tracing_disabled(True)
    async with MCPServerStreamableHttp({"url": sys.argv[1], "headers": HEADERS}) as server:
        agent = Agent(name="agent", model=Script(), mcp_servers=[server])
        result = await Runner.run(agent, "Say hi")
    print(json.dumps({"tools": seen[0], "echo": json.loads(result.final_output)}))


asyncio.run(main())
