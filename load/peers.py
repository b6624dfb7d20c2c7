"""`python -m load.peers`: one echo call by this service, by others from PyPI and by the origin's design, in one run.

The service has everything on. The peers have no authentication, limits or log: they are one echo tool each, in the
fastest documented way (`load/peer_servers/`), in an environment of their own, `.venv/peers`, which is made when it is
not there. The origin's design (`load/origin_design.py`) has everything that it documents.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import orjson

from load.harness import Asking, Bench, Target, bench, command, measure, print_table, write_json
from load.run import ROOT, CannotRun
from load.wire import MCP_HEADERS, mcp, mcp_body, single

LOCK = ROOT / "requirements" / "peers.txt"
ENVIRONMENT = ROOT / ".venv" / "peers"
INSTALL_S_MAX = 600.0

GOALS = {"the origin's design": "goal: 20 times slower", "fastmcp": "goal: 8 times slower", "mcp SDK": "the same"}


def environment() -> Path:
    """The interpreter of the peers, installed from their lock where that is newer."""
    python, ready = ENVIRONMENT / "bin" / "python", ENVIRONMENT / ".ready"
    if ready.exists() and ready.stat().st_mtime >= LOCK.stat().st_mtime:
        return python
    print("installing the peers into .venv/peers (a minute, once)", file=sys.stderr)
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--require-hashes", "--no-deps"]
    try:
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True, timeout=INSTALL_S_MAX)
        subprocess.run([python, *install, "-r", str(LOCK)], check=True, timeout=INSTALL_S_MAX)
    except (subprocess.SubprocessError, OSError) as error:
        raise CannotRun(f"the peers cannot be installed: {error}") from None
    ready.touch()
    return python


def call(method: str, params: dict[str, str]) -> bytes:
    return orjson.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params})


def peers(bench: Bench) -> list[Target]:
    """One server each; what is right is the message in the answer."""
    python = str(environment())
    message = {"message": "hello world"}
    plain = Asking(body=call("echo", message), right='"hello world"')
    over_mcp = Asking("/mcp", mcp_body(), MCP_HEADERS, right="hello world")
    askings = {
        "jsonrpcserver_starlette": ("jsonrpcserver, starlette", plain),
        "fastapi_jsonrpc": ("fastapi-jsonrpc", plain),
        "mcp_sdk": ("mcp SDK", over_mcp),
        "fastmcp_stateless": ("fastmcp", over_mcp),
    }
    environ = {"FASTMCP_LOG_LEVEL": "ERROR", "FASTMCP_CHECK_FOR_UPDATES": "off"}
    return [
        Target(name, bench.process(name, [python, "-m", f"load.peer_servers.{module}"], environ), asking)
        for module, (name, asking) in askings.items()
    ]


def print_times(targets: list[Target]) -> None:
    """How many times more CPU a call takes than the service's, by the same door."""
    lane, over_mcp = (next(one for one in targets if one.name == f"{name}, lane") for name in ("everything", "MCP"))
    for target in targets:
        if target.name in (*GOALS, "fastapi-jsonrpc", "jsonrpcserver, starlette"):
            own = over_mcp if target.asking.path == "/mcp" else lane
            times, cpu = own.rate_ratio(target), target.cpu_ratio(own)
            print(f"{own.name} serves {times:.1f} times the calls of {target.name}, for 1/{1 / cpu:.1f} of its CPU")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2, help="of one round")
    parser.add_argument("--json", help="a file for all figures")
    options = parser.parse_args()
    with bench() as own:
        others = peers(own)
        service = own.service("everything, lane", own.everything())
        targets = [
            Target("bare uvicorn echo", own.bare()),
            Target("everything, lane", service, single(own)),
            Target("MCP, lane", service, mcp(own)),
            *others,
            Target("the origin's design", own.origin_design(), single(own)),
        ]
        measure(targets, options.rounds, options.seconds)
        print_table("peers, 64 connections", targets, GOALS)
        print_times(targets)
    write_json(options.json, {"peers": [target.as_json() for target in targets]})


if __name__ == "__main__":
    command(main)
