"""Tools for the tests of reuse: each run leaves a line in the file RUNS_FILE and waits as long as its gate is there."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

from app.tools.tool import ToolError, tool

FILE = Path(os.environ.get("RUNS_FILE", os.devnull))


async def run(name: str, gate: str = "", fail: str = "") -> dict[str, Any]:
    """`gate`: a file; the run ends when it is gone."""
    with FILE.open("a") as file:
        file.write(f"{name}\n")
    while gate and Path(gate).exists():
        await asyncio.sleep(0.005)
    if fail:
        raise ToolError("told to fail", code="TOLD", retryable=fail == "retryable")
    return {"name": name, "run": FILE.read_text().splitlines().count(name) if FILE.is_file() else 0}


@tool(category="custom")
async def pay(name: str, gate: str = "", fail: str = "") -> dict[str, Any]:
    """Do what must not be done twice."""
    return await run(name, gate, fail)


@tool(category="custom")
async def pay_and_die(name: str) -> None:
    """Do what must not be done twice, and end the process before anybody hears of it."""
    await run(name)
    os.kill(os.getpid(), signal.SIGKILL)


@tool(category="custom", idempotent=True)
async def put(name: str, gate: str = "", fail: str = "") -> dict[str, Any]:
    """Do what may be done twice."""
    return await run(name, gate, fail)


@tool(category="custom", read_only=True)
async def read(name: str, gate: str = "") -> dict[str, Any]:
    """Look something up."""
    return await run(name, gate)


@tool(category="custom", read_only=True, cache_ttl=600)
async def search(name: str, gate: str = "") -> dict[str, Any]:
    """Look something up that stays."""
    return {**await run(name, gate), "text": "x" * 5_000}


@tool(category="custom", read_only=True, cache_ttl=600, cache_shared=True)
async def search_for_all(name: str) -> dict[str, Any]:
    """Look something up that is the same for everyone."""
    return await run(name)


@tool(category="custom", read_only=True, cache_ttl=6)
async def search_news(name: str) -> dict[str, Any]:
    """Look something up that does not stay."""
    return await run(name)
