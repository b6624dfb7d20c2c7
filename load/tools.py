"""Tools that only loads call: the built-in ones neither wait nor take 100 KB."""

from __future__ import annotations

import asyncio
import os
from typing import Annotated

from pydantic import Field

from app.tools.builtin.web import require_success
from app.tools.tool import ToolContext, tool


@tool(read_only=True)
async def reflect(message: str) -> dict[str, str]:
    """Return the message, however long it is."""
    return {"message": message}


@tool
def reflect_in_thread(message: str) -> dict[str, str]:
    """Return the message from a thread, where tools run that are no coroutines."""
    return {"message": message}


@tool(read_only=True)
async def spin(message: str, loops: Annotated[int, Field(ge=0, le=1_000_000)] = 0) -> dict[str, str]:
    """Return the message after as many turns of an empty loop: a slowdown of known size."""
    for _ in range(loops):
        pass
    return {"message": message}


@tool
async def pause(seconds: Annotated[float, Field(ge=0, le=60)]) -> float:
    """Wait for so many seconds, and return them. Not read-only: equal calls at the same time would be one run."""
    await asyncio.sleep(seconds)
    return seconds


@tool
async def brew(
    seconds: Annotated[float, Field(ge=0, le=60)], loops: Annotated[int, Field(ge=0, le=1_000_000)]
) -> float:
    """Wait for so many seconds, then turn an empty loop: a slow tool that needs the core too."""
    await asyncio.sleep(seconds)
    for _ in range(loops):
        pass
    return seconds


@tool
async def stir(
    seconds: Annotated[float, Field(ge=0, le=60)], loops: Annotated[int, Field(ge=0, le=1_000_000)]
) -> float:
    """`brew` by another name: a tool is fast or slow as a whole."""
    return await brew(seconds, loops)  # type: ignore[no-any-return]


@tool
async def ask_upstream(context: ToolContext) -> int:
    """Ask the server that LOAD_UPSTREAM names; the length of what it says."""
    response = await context.http.request("GET", os.environ["LOAD_UPSTREAM"], timeout_s=context.remaining_s())
    require_success(response)
    return len(response.body)
