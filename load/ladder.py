"""What each part of the path costs: the same service with parts switched on one after the other, beside a bare echo.

`python -m load.ladder` starts PostgreSQL, Redis and every service itself, pins the services to one core and all else to
the other, and visits them in turn. A rung's cost is the CPU of the service's process per call, less that of the rung
before it, as a median of rounds: on a shared machine only what is measured in one run can be compared.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from load import echo
from load.echo import CLIENT_CORE, SERVER_CORE, Server, bare_echo, pin, print_table, visit
from load.run import own_service
from tests.servers import PostgresServer, RedisServer

LIMITS = """
policies:
  - {name: each-caller, per: [tenant, subject], rate: 1000000/second}
  - {name: each-tenant, per: [tenant], quota: {daily: 1000000000}}
"""

OFF = {"ENABLE_DATABASE_LOGGING": "false", "AUTH_MODE": "none", "ENABLE_TRACING": "false"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3, help="of one round")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--only", help="rungs, by the beginning of their names, comma separated")
    options = parser.parse_args()
    os.sched_setaffinity(0, {int(CLIENT_CORE)})
    wrk = shutil.which("wrk")
    with contextlib.ExitStack() as stack:
        servers = [Server("bare uvicorn echo", *stack.enter_context(bare_echo()))]
        for name, environ in rungs(stack):
            if options.only and not name.startswith(tuple(options.only.split(","))):
                continue
            own = stack.enter_context(own_service("http://127.0.0.1:1", **environ))
            servers.append(Server(name, own.pid, int(own.url.rsplit(":", 1)[1])))
        for server in servers:
            pin(server.pid, SERVER_CORE)
        for _ in range(options.rounds):
            for server in servers:
                server.rounds.append(visit(server, options.seconds, options.connections, wrk))
                settle(server)
    print_table(servers, options.connections, "wrk" if wrk else "the asyncio client of load/echo.py")


def rungs(stack: contextlib.ExitStack) -> Iterator[tuple[str, dict[str, str]]]:
    """Names and settings, each with all that the one before it has."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="agentcore-ladder-")))
    limits = folder / "limits.yaml"
    limits.write_text(LIMITS)
    redis = stack.enter_context(RedisServer())
    postgres = stack.enter_context(PostgresServer())
    database = postgres.create_database()
    key = make_key(database)
    echo.HEADERS["Authorization"] = f"Bearer {key}"
    environ = {**OFF, "DATABASE_URL": database}
    yield "path alone", dict(environ)
    environ["AUTH_MODE"] = "required"
    yield "+ API key", dict(environ)
    environ["LIMITS_FILE"] = str(limits)
    yield "+ limits in process", dict(environ)
    environ["REDIS_URL"] = redis.url
    yield "+ limits in Redis", dict(environ)
    environ["ENABLE_DATABASE_LOGGING"] = "true"
    yield "+ log in PostgreSQL", dict(environ)
    environ["ENABLE_TRACING"] = "true"
    yield "+ 1 % tracing", dict(environ)


def make_key(database: str) -> str:
    """A key that may call everything, made as an operator makes it."""
    environ = {**os.environ, "DATABASE_URL": database}
    run = [sys.executable, "-m", "app"]
    subprocess.run([*run, "migrate"], env=environ, check=True, stdout=subprocess.DEVNULL)
    create = [*run, "keys", "create", "--tenant", "bench", "--subject", "bench", "--json"]
    made = subprocess.run(create, env=environ, check=True, stdout=subprocess.PIPE)
    return str(json.loads(made.stdout)["key"])


def settle(server: Server) -> None:
    """Wait, bounded, until it is idle: a backlog of rows would be charged to the next server's core."""
    for _ in range(100):
        before = echo.cpu_s(server.pid)
        time.sleep(0.1)
        if echo.cpu_s(server.pid) - before < 0.02:
            return


if __name__ == "__main__":
    main()
