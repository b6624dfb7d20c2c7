"""`python -m load.wire`: a call with everything on beside a bare uvicorn echo, and what each part of it costs.

Authentication with 200 keys, a limit and a quota in Redis, journal and PostgreSQL, metrics and 1 % tracing, by the
protocol lane and by ASGI; single calls, batches, REST and MCP; tools that compute, wait, take a thread; few and many
connections; small and large payloads.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from load.harness import (
    OFF,
    Asking,
    Bench,
    Running,
    Target,
    bench,
    call_body,
    command,
    measure,
    print_table,
    write_json,
)

BATCH = 20
CONNECTIONS = (1, 256, 1000)
PAYLOADS = {"1 KB": 1_000, "10 KB": 10_000, "100 KB": 100_000}
PROSE = "The author of https://example.org/a?b=c passed the key to whoever keeps the accounts. "
"""As texts are: with words that secrets have, and no secret."""

ASGI = {"PROTOCOL_LANE": "false"}

GOALS = {"everything, lane": "goal 0.80, after 1.0", "everything, ASGI": "goal 0.50", "batch of 20, lane": "goal 2x"}
"""Calls per second over the bare echo's, at 64 connections; a batch's over those of single calls."""

MCP_VERSION = "2025-11-25"
MCP_HEADERS = (("Accept", "application/json, text/event-stream"), ("MCP-Protocol-Version", MCP_VERSION))


def single(bench: Bench, message: str = "hello world", tool_id: str = "echo") -> Asking:
    return Asking(body=call_body(message, tool_id), right='"status":"success"', credentials=bench.credentials)


def batch(bench: Bench) -> Asking:
    calls = b",".join(call_body(request_id=number) for number in range(BATCH))
    return Asking(body=b"[" + calls + b"]", calls=BATCH, right='"status":"success"', credentials=bench.credentials)


def rest(bench: Bench) -> Asking:
    body = orjson.dumps({"parameters": {"message": "hello world"}})
    return Asking("/api/v1/tools/echo/execute", body, right='"status":"success"', credentials=bench.credentials)


def mcp_body(name: str = "echo") -> bytes:
    params = {"name": name, "arguments": {"message": "hello world"}}
    return orjson.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params})


def mcp(bench: Bench) -> Asking:
    return Asking("/mcp", mcp_body(), MCP_HEADERS, right='"structuredContent"', credentials=bench.credentials)


def rungs(bench: Bench) -> Iterable[tuple[str, dict[str, str], Asking]]:
    """Names and settings, each with all that the one before it has; the last has everything."""
    settings = {**OFF, "DATABASE_URL": bench.database}
    yield "path alone", dict(settings), Asking(right='"status":"success"')
    settings["AUTH_MODE"] = "required"
    yield "+ 200 API keys", dict(settings), single(bench)
    settings["LIMITS_FILE"] = str(bench.limits_file)
    yield "+ limits in process", dict(settings), single(bench)
    settings["REDIS_URL"] = bench.redis.url
    yield "+ limits in Redis", dict(settings), single(bench)
    settings["ENABLE_DATABASE_LOGGING"] = "true"
    yield "+ log in PostgreSQL", dict(settings), single(bench)


def parts(bench: Bench, bare: Running, lane: Running, asgi: Running) -> list[Target]:
    """One table: the ladder, then the other ways to ask."""
    targets = [Target("bare uvicorn echo", bare)]
    targets += [Target(name, bench.service(name, settings), asking) for name, settings, asking in rungs(bench)]
    asked = {"everything": single(bench), f"batch of {BATCH}": batch(bench), "MCP tools/call": mcp(bench)}
    for name, asking in asked.items():
        targets += [Target(f"{name}, lane", lane, asking), Target(f"{name}, ASGI", asgi, asking)]
    return [*targets, Target("REST execute", lane, rest(bench))]


def kinds(bench: Bench, bare: Running, lane: Running) -> list[Target]:
    """A call by what its tool does."""

    def asked(tool_id: str, **parameters: object) -> Asking:
        params = {"tool_id": tool_id, "parameters": parameters}
        body = orjson.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools.execute", "params": params})
        return Asking(body=body, right='"status":"success"', credentials=bench.credentials)

    return [
        Target("bare uvicorn echo", bare),
        Target("computes", lane, single(bench)),
        Target("waits a turn", lane, asked("brew", seconds=0, loops=0)),
        Target("waits 20 ms, 256 conns", lane, asked("brew", seconds=0.02, loops=0), 256),
        Target("in a thread", lane, asked("reflect_in_thread", message="hello world")),
    ]


def beside(
    bench: Bench, servers: Sequence[Running], connections: int = 64, message: str = "hello world", tool_id: str = "echo"
) -> list[Target]:
    """Bare, lane and ASGI with the same message."""
    bare = Asking(body=call_body(message, tool_id))
    askings = [bare] + [single(bench, message, tool_id)] * (len(servers) - 1)
    return [Target(one.name, one, asking, connections) for one, asking in zip(servers, askings, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2, help="of one round")
    parser.add_argument("--only", choices=("parts", "tools", "connections", "payloads"), help="one of the tables")
    parser.add_argument("--json", help="a file for all figures")
    options = parser.parse_args()
    with bench() as own:
        bare = own.bare()
        lane = own.service("everything, lane", own.everything(TOOL_MODULES="load.tools"))
        asgi = own.service("everything, ASGI", own.everything(TOOL_MODULES="load.tools", **ASGI))
        tables: dict[str, list[Target]] = {}
        if options.only in (None, "parts"):
            tables["64 connections"] = parts(own, bare, lane, asgi)
        if options.only in (None, "tools"):
            tables["kinds of tools, everything on"] = kinds(own, bare, lane)
        if options.only in (None, "connections"):
            for number in CONNECTIONS:
                title = f"{number:,} connection{'s' if number > 1 else ''}"
                tables[title] = beside(own, (bare, lane, asgi), number)
        if options.only in (None, "payloads"):
            for name, size in PAYLOADS.items():
                targets = beside(own, (bare, lane, asgi), message=(PROSE * size)[:size], tool_id="reflect")
                tables[f"messages of {name}, 64 connections"] = targets
        shown: dict[str, Any] = {}
        for title, targets in tables.items():
            measure(targets, options.rounds, options.seconds)
            print_table(title, targets, GOALS if len(targets) > 3 else None)
            shown[title] = [target.as_json() for target in targets]
    write_json(options.json, {"wire": shown})


if __name__ == "__main__":
    command(main)
