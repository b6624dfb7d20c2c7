"""How many calls one process holds at once."""

from __future__ import annotations

import asyncio
import json
import resource
from pathlib import Path

from tests.conftest import Running, Serve

CALLS = 1500
MEMORY_BYTES_MAX = 200 * 1024 * 1024


def memory_bytes(running: Running) -> int:
    """The most that the process ever had in memory."""
    status = Path(f"/proc/{running.process.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


async def call(port: int) -> str:
    body = json.dumps(
        {
            "jsonrpc": "2.0",
            "id": 1,
            "method": "tools.execute",
            "params": {"tool_id": "meet", "parameters": {"count": CALLS}},
        }
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /api/v1/jsonrpc HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
        % len(body)
    )
    writer.write(body)
    answer = await reader.read()
    writer.close()
    status: str = json.loads(answer.split(b"\r\n\r\n", 1)[1])["result"]["status"]
    return status


def test_1500_calls_run_at_the_same_time_and_all_are_answered(serve: Serve) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        running = serve(TOOL_MODULES="tests.tools_for_tests")

        async def all_of_them() -> list[str]:
            return await asyncio.gather(*(call(running.port) for _ in range(CALLS)))

        assert asyncio.run(all_of_them()) == ["success"] * CALLS
        assert memory_bytes(running) < MEMORY_BYTES_MAX
        assert running.metric("tool_execution_concurrency") == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
