"""`make bench`: what a call costs beside a bare uvicorn echo, in interleaved rounds on one core.

The servers are real processes on core 0, the load comes from wrk on core 1 (or from a small client of ours where wrk is
missing; then only the ratios of CPU time mean something). Reads the servers' CPU time from /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import orjson

from load.run import own_service

HERE = Path(__file__).parent
PATH = "/api/v1/jsonrpc"
BODY = orjson.dumps(
    {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "tools.execute",
        "params": {"tool_id": "echo", "parameters": {"message": "hello world"}},
    }
)
HEADERS: dict[str, str] = {}
"""Sent with every request; a credential, where one is needed."""

MCP_CALL = {"name": "echo", "arguments": {"message": "hello world"}}
MCP_META = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientCapabilities": {},
    "io.modelcontextprotocol/clientInfo": {"name": "bench", "version": "1"},
}
MCP_HEADERS = {"Accept": "application/json, text/event-stream", "Content-Type": "application/json"}

SERVER_CORE, CLIENT_CORE = "0", "1"
"""Two cores are what the figures in docs/performance.md were measured on."""


class Round(NamedTuple):
    """One visit to one server."""

    requests_per_s: float
    cpu_us: float
    p50_ms: float
    p99_ms: float


@dataclass
class Server:
    """A process under load and what it showed."""

    name: str
    pid: int
    port: int
    path: str = PATH
    body: bytes = BODY
    headers: dict[str, str] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)

    def median(self, column: int) -> float:
        return statistics.median(one[column] for one in self.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3, help="of one round")
    parser.add_argument("--connections", type=int, default=64)
    options = parser.parse_args()
    wrk = shutil.which("wrk")
    with bare_echo() as (pid, port), own_service("http://127.0.0.1:1") as service:
        service_port = int(service.url.rsplit(":", 1)[1])
        servers = [
            Server("bare uvicorn echo", pid, port),
            Server("tools.execute echo", service.pid, service_port),
            *mcp_servers(service.pid, service_port),
        ]
        for server in servers:
            pin(server.pid, SERVER_CORE)
        for _ in range(options.rounds):
            for server in servers:
                server.rounds.append(visit(server, options.seconds, options.connections, wrk))
    print_table(servers, options.connections, "wrk" if wrk else "the asyncio client of load/echo.py")


def mcp_servers(pid: int, port: int) -> list[Server]:
    """The same call by the other door, in each era, with what its clients send."""
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call"}
    legacy = orjson.dumps({**call, "params": MCP_CALL})
    modern = orjson.dumps({**call, "params": {**MCP_CALL, "_meta": MCP_META}})
    version = "MCP-Protocol-Version"
    routing = {version: "2026-07-28", "Mcp-Method": "tools/call", "Mcp-Name": "echo"}
    return [
        Server("MCP 2025-11-25 echo", pid, port, "/mcp", legacy, {**MCP_HEADERS, version: "2025-11-25"}),
        Server("MCP 2026-07-28 echo", pid, port, "/mcp", modern, {**MCP_HEADERS, **routing}),
    ]


@contextlib.contextmanager
def bare_echo() -> Iterator[tuple[int, int]]:
    """The yardstick: uvicorn with uvloop and httptools, orjson in, orjson out, nothing else."""
    command = [sys.executable, "-m", "load.bare"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=HERE.parent, text=True)
    try:
        assert process.stdout is not None
        yield process.pid, int(process.stdout.readline())
    finally:
        process.terminate()
        process.wait(timeout=30)


def pin(pid: int, core: str) -> None:
    os.sched_setaffinity(pid, {int(core)})
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {int(core)})


def cpu_s(pid: int) -> float:
    """User and system time of a process, seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def visit(server: Server, seconds: int, connections: int, wrk: str | None) -> Round:
    before = cpu_s(server.pid)
    load = wrk_load if wrk else own_load
    requests, requests_per_s, p50_ms, p99_ms = load(server, seconds, connections)
    return Round(requests_per_s, (cpu_s(server.pid) - before) / requests * 1e6, p50_ms, p99_ms)


def wrk_load(server: Server, seconds: int, connections: int) -> tuple[int, float, float, float]:
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(f"wrk.method = 'POST'\nwrk.body = [==[{server.body.decode()}]==]\n")
        script.writelines(
            f"wrk.headers['{name}'] = '{value}'\n" for name, value in {**HEADERS, **server.headers}.items()
        )
        script.flush()
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", script.name]
        text = subprocess.run(
            ["taskset", "-c", CLIENT_CORE, *command, f"http://127.0.0.1:{server.port}{server.path}"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    if "Non-2xx" in text or "Socket errors" in text:
        raise SystemExit(f"the load met errors:\n{text}")
    found = re.search(r"(\d+) requests in", text)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    assert found and rate
    return int(found[1]), float(rate[1]), _percentile(text, "50%"), _percentile(text, "99%")


def _percentile(text: str, name: str) -> float:
    found = re.search(rf"{name}\s+([\d.]+)(us|ms|s)", text)
    assert found
    return float(found[1]) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[found[2]]


def own_load(server: Server, seconds: int, connections: int) -> tuple[int, float, float, float]:
    os.sched_setaffinity(0, {int(CLIENT_CORE)})
    times = asyncio.run(_drive(server, seconds, connections))
    times.sort()
    return len(times), len(times) / seconds, times[len(times) // 2] * 1e3, times[len(times) * 99 // 100] * 1e3


async def _drive(server: Server, seconds: int, connections: int) -> list[float]:
    ends = time.perf_counter() + seconds
    headers = "".join(f"{name}: {value}\r\n" for name, value in {**HEADERS, **server.headers}.items())
    head = f"POST {server.path} HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: {len(server.body)}\r\n\r\n"
    request = head.encode() + server.body
    times: list[float] = []

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        while (began := time.perf_counter()) < ends:
            writer.write(request)
            answered = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", answered)
            assert answered.startswith(b"HTTP/1.1 200 ") and length, answered
            await reader.readexactly(int(length[1]))
            times.append(time.perf_counter() - began)
        writer.close()

    await asyncio.gather(*(client() for _ in range(connections)))
    return times


def print_table(servers: list[Server], connections: int, client: str) -> None:
    bare = servers[0]
    print(f"{time.strftime('%Y-%m-%d')}, Python {platform.python_version()}, {os.cpu_count()} cores,", end=" ")
    print(f"{connections} connections, {client}, medians of {len(bare.rounds)} rounds")
    print(f"{'':22}{'req/s':>9}{'ratio':>8}{'CPU us':>9}{'ratio':>8}{'p50 ms':>9}{'p99 ms':>9}")
    for server in servers:
        rate, cpu, p50, p99 = (server.median(column) for column in range(4))
        ratios = rate / bare.median(0), bare.median(1) / cpu
        print(f"{server.name:22}{rate:9.0f}{ratios[0]:8.2f}{cpu:9.1f}{ratios[1]:8.2f}{p50:9.2f}{p99:9.2f}")


if __name__ == "__main__":
    main()
