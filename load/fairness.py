"""Whether one tenant's flood is another's: `python -m load.fairness`.

Two tenants with a key each, on a service that this script starts. One calls at a steady pace, alone at first, then
beside the other at 50 times that pace: on quick calls, where the core is what they share, beside calls of 100 KB, on
calls past the other's rate limit, and on slow calls, where slots are. Prints the p95 of the first, alone and beside,
and their ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from load.echo import CLIENT_CORE, SERVER_CORE, pin
from load.run import own_service

TIMES = 50

LIMITS = """
policies:
  - {name: pace, match: {tool: current_time}, per: [tenant], rate: 60/second}
"""


class Scene(NamedTuple):
    """A tool, how often a second the steady tenant calls it, and what the other calls if that is something else."""

    name: str
    tool_id: str
    parameters: dict[str, Any]
    calls_per_s: int
    flood: tuple[str, dict[str, Any]] | None = None

    def body(self, is_flood: bool) -> str:
        tool_id, parameters = self.flood if is_flood and self.flood else (self.tool_id, self.parameters)
        params = {"tool_id": tool_id, "parameters": parameters}
        return json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools.execute", "params": params})


SCENES = (
    Scene("quick calls", "echo", {"message": "hello"}, 50),
    Scene("beside calls of 100 KB", "echo", {"message": "hello"}, 8, ("reflect", {"message": "x" * 100_000})),
    Scene("past its rate limit", "current_time", {}, 50),
    Scene("slow calls, 20 slots", "pause", {"seconds": 0.05}, 8),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.sched_setaffinity(0, {int(CLIENT_CORE)})
    folder = Path(tempfile.mkdtemp(prefix="agentcore-fairness-"))
    try:
        (folder / "limits.yaml").write_text(LIMITS)
        environ = {
            "DATABASE_URL": f"sqlite+aiosqlite:///{folder}/agentcore.db",
            "JOURNAL_DIR": str(folder / "journal"),
            "LIMITS_FILE": str(folder / "limits.yaml"),
            "MAX_CONCURRENT_EXECUTIONS": "20",
            "TOOL_MODULES": "load.tools",
            "AUTH_MODE": "required",
        }
        keys = [make_key(tenant, environ) for tenant in ("steady", "flood")]
        with own_service("http://127.0.0.1:1", **environ) as service:
            pin(service.pid, SERVER_CORE)
            asyncio.run(compare(service.url, keys, options.rounds, options.seconds))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_key(tenant: str, environ: dict[str, str]) -> str:
    command = [sys.executable, "-m", "app", "keys", "create", "--tenant", tenant, "--subject", "load", "--json"]
    made = subprocess.run(command, env={**os.environ, **environ}, check=True, stdout=subprocess.PIPE)
    return str(json.loads(made.stdout)["key"])


async def compare(url: str, keys: list[str], rounds: int, seconds: float) -> None:
    print(f"{'':24}{'alone p95 ms':>14}{'beside p95 ms':>15}{'ratio':>8}{'flood calls/s':>15}{'refused':>9}")
    for scene in SCENES:
        alone, beside, flooded, refused = [], [], [], []
        for _ in range(rounds):
            alone.append(p95(await calls(url, keys[0], scene, 1, seconds)))
            steady, flood = await asyncio.gather(
                calls(url, keys[0], scene, 1, seconds), calls(url, keys[1], scene, TIMES, seconds)
            )
            beside.append(p95(steady))
            flooded.append(len(flood) / seconds)
            refused.append(sum(not one.succeeded for one in flood) / max(1, len(flood)))
        before, after = statistics.median(alone), statistics.median(beside)
        rate, share = statistics.median(flooded), statistics.median(refused)
        print(f"{scene.name:24}{before:14.2f}{after:15.2f}{after / before:8.2f}{rate:15.0f}{share:9.0%}")


class Call(NamedTuple):
    took_s: float
    succeeded: bool


def p95(done: list[Call]) -> float:
    times = sorted(call.took_s for call in done)
    return times[len(times) * 95 // 100] * 1e3


async def calls(url: str, key: str, scene: Scene, times: int, seconds: float) -> list[Call]:
    """Calls at a steady pace on `times` connections, each waiting for its answer before it sends again."""
    body = scene.body(is_flood=times > 1)
    done: list[Call] = []
    host, port = httpx.URL(url).host, httpx.URL(url).port
    request = (
        f"POST /api/v1/jsonrpc HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    ).encode()
    begin = time.perf_counter()

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection(host, port)
        due = begin + number / times / scene.calls_per_s
        while due < begin + seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            sent = time.perf_counter()
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ", 1)[1].split(b"\r\n", 1)[0])
            answer = await reader.readexactly(length)
            done.append(Call(time.perf_counter() - sent, b'"status":"success"' in answer))
            due += 1 / scene.calls_per_s
        writer.close()

    await asyncio.gather(*(client(number) for number in range(times)))
    return done


if __name__ == "__main__":
    main()
