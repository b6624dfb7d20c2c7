"""A tool as the executor runs it: through its schemas, with a context of its own."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest

from app.calls import LOCAL_CALLER
from app.egress import EgressClient, parse_egress_allow
from app.errors import ToolError
from app.tools.tool import FunctionTool, ToolContext
from tests.origin import WAIT_S_MAX


@asynccontextmanager
async def tool_context(allow: str = "127.0.0.1", within_s: float = WAIT_S_MAX) -> AsyncIterator[ToolContext]:
    client = EgressClient(parse_egress_allow(allow), 4)
    try:
        yield ToolContext("execution", LOCAL_CALLER, time.perf_counter() + within_s, client)
    finally:
        await client.aclose()


async def run(tool: FunctionTool, context: ToolContext, **parameters: Any) -> Any:
    """What an agent would get: parameters and result go through the tool's schemas."""
    value = await tool.invoke(tool.parameters.validate(parameters), context)
    return orjson.loads(tool.result.encode(value))


async def failure_of(tool: FunctionTool, context: ToolContext, **parameters: Any) -> ToolError:
    with pytest.raises(ToolError) as caught:
        await run(tool, context, **parameters)
    return caught.value
