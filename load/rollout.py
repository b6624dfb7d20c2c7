"""`python -m load.rollout`: three replicas behind haproxy restart one after another under load; does anybody notice?

Starts PostgreSQL, Redis, the replicas and a haproxy that tries nothing again, sends calls at a steady rate over
connections that are kept, restarts every replica, and compares the ids of all answers with the rows. `--end kill` and
`--drain 0` are what it looks like without a drain; `--before CHECKOUT` begins with that version, migrates under load
and restarts each replica as this one. Exit 1 where a call failed or a row is missing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Self

import orjson

from load.durability import Ledger, Service, Verdict, logged_rows, verdict
from tests.conftest import ROOT
from tests.haproxy import Haproxy, binary
from tests.servers import HOST, PostgresAt, PostgresServer, RedisAt, RedisServer

REPLICAS = 3
CLIENTS = 50
ANSWER_S_MAX = 40.0

WARM_S = 1.0
"""Not counted: everything is called for the first time."""

BETWEEN_S = 0.5
"""In which all replicas serve, after each restart."""

BEHIND_S_MAX = 1.0
"""A client that is later than this skips what it did not send instead of sending it all at once."""

RETRY_S = 0.02
"""Before a client connects again; one call is one attempt, whatever comes of it."""

SLOW_SHARE = 10
"""One call of so many takes SLOW_S, so that some are always under way when a replica is told to end."""
SLOW_S = 0.3

End = Literal["term", "kill"]


@dataclass
class Calls:
    """Clients that keep their connections and send `rate` calls a second together, in a thread of their own."""

    port: int
    rate: float
    clients: int = CLIENTS
    ledger: Ledger = field(default_factory=Ledger)
    failures: Counter[str] = field(default_factory=Counter)
    connections: int = 0
    _slow_sent: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)
    _failed: list[BaseException] = field(default_factory=list)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run, name="calls")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        assert self._thread is not None
        self._thread.join()
        if self._failed:
            raise self._failed[0]

    def _run(self) -> None:
        try:
            asyncio.run(self._all())
        except BaseException as error:
            self._failed.append(error)

    async def _all(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(self.clients):
                group.create_task(self._client(number))

    async def _client(self, number: int) -> None:
        period_s = self.clients / self.rate
        due = time.monotonic() + period_s * number / self.clients
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        sent = 0
        while not self._ended.is_set():
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            due = max(due + period_s, time.monotonic() - BEHIND_S_MAX)
            sent += 1
            slow = (number + sent) % SLOW_SHARE == 0
            try:
                async with asyncio.timeout(ANSWER_S_MAX):
                    if streams is None:
                        streams = await asyncio.open_connection(HOST, self.port)
                        self.connections += 1
                    kept = await self._call(*streams, slow)
            except (OSError, EOFError, TimeoutError) as error:
                self.failures[f"no answer ({type(error).__name__})"] += 1
                kept = False
                await asyncio.sleep(RETRY_S)
            if not kept and streams is not None:
                streams[1].close()
                streams = None
        if streams is not None:
            streams[1].close()

    async def _call(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, slow: bool) -> bool:
        """One call; whether the connection can be used for another."""
        params = self._slow() if slow else ECHO
        body = orjson.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools.execute", "params": params})
        began = time.monotonic()
        writer.write(HEAD % len(body) + body)
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        body = await reader.readexactly(int(length[1])) if length else b""
        self.ledger.requests += 1
        if not slow:
            self.ledger.times.append((began, time.monotonic() - began))
        self._note(int(head.split(b" ", 2)[1]), body)
        return b"connection: close" not in head.lower()

    def _slow(self) -> dict[str, object]:
        """Each with another value: equal ones that run at the same time would be one run."""
        self._slow_sent += 1
        return {"tool_id": "wait", "parameters": {"seconds": SLOW_S, "value": self._slow_sent}}

    def _note(self, status: int, body: bytes) -> None:
        if not body.startswith(b"{"):
            self.failures[f"HTTP {status} of the proxy"] += 1
            return
        answer = orjson.loads(body)
        self.ledger.note(answer)
        if "error" in answer:
            self.failures[f"refused, {answer['error']['code']}"] += 1
        elif answer["result"]["status"] != "success":
            self.failures[f"call {answer['result']['status']}"] += 1


ECHO = {"tool_id": "echo", "parameters": {"message": "x"}}
HEAD = (
    b"POST /api/v1/jsonrpc HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
)


class Restart(NamedTuple):
    """Of one replica: how it ended and how long it was away."""

    code: int
    ended_s: float
    back_s: float


class Outcome(NamedTuple):
    requests: int
    failures: Counter[str]
    rows: Verdict
    restarts: list[Restart]
    times_ms: list[float]
    connections: int

    @property
    def holds(self) -> bool:
        return not self.failures and self.rows.holds and not any(restart.code for restart in self.restarts)


class Replica(Service):
    """One whose code may be that of another checkout."""

    def run_code_of(self, checkout: Path) -> None:
        """From its next start on."""
        self._environ |= code_of(checkout)


def code_of(checkout: Path) -> dict[str, str]:
    """Environment in which Python finds that package `app`, wherever it runs."""
    return {"PYTHONPATH": str(checkout), "PYTHONSAFEPATH": "1"}


class Replicas:
    """Several of the service on one database and one Redis, behind one proxy."""

    def __init__(
        self, folder: Path, postgres: PostgresAt, redis: RedisAt, drains_s: Sequence[float], code: Path = ROOT
    ) -> None:
        """A replica for each of these DRAIN_SECONDS, of the version that this checkout has."""
        self.database = postgres.create_database()
        migrate(self.database, code)
        self.services = [
            Replica(
                made(folder / f"replica-{number}"),
                self.database,
                REDIS_URL=redis.url,
                LIMITS_RATE="1000000/second",  # in Redis, by every call
                DRAIN_SECONDS=str(drain_s),
            )
            for number, drain_s in enumerate(drains_s)
        ]
        for service in self.services:
            service.run_code_of(code)
        self._postgres = postgres
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as opening:
            for service in self.services:
                opening.enter_context(service)
            self.proxy = opening.enter_context(Haproxy([service.port for service in self.services]))
            self.proxy.wait_until_up()
            self._opened = opening.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def restart(self, service: Replica, end: End) -> Restart:
        """End it, start it again at its port, as this version, and wait until the proxy sends it calls."""
        began = time.monotonic()
        if end == "kill":
            service.kill()
            code = 0
        else:
            code = service.terminate()
        ended = time.monotonic()
        service.run_code_of(ROOT)
        service.start()
        self.proxy.wait_until_up(service.port)
        return Restart(code, ended - began, time.monotonic() - ended)

    def rows(self) -> list[tuple[str, str]]:
        """Of all replicas, when none has any left to write."""
        for service in self.services:
            service.drained()
        return logged_rows(self.database, self._postgres)


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def migrate(database: str, code: Path = ROOT) -> None:
    """By the command, as before every rollout."""
    environ = {**os.environ, "DATABASE_URL": database, **code_of(code)}
    subprocess.run([sys.executable, "-m", "app", "migrate"], cwd=code, env=environ, check=True)


def roll(replicas: Replicas, services: Sequence[Replica], rate: float, end: End = "term") -> Outcome:
    """Restart these of the replicas, one after another, while calls come to all."""
    with Calls(replicas.proxy.port, rate) as calls:
        time.sleep(WARM_S)
        began = time.monotonic()
        migrate(replicas.database)
        restarts = []
        for service in services:
            restarts.append(replicas.restart(service, end))
            time.sleep(BETWEEN_S)
    times_ms = [seconds * 1e3 for since, seconds in calls.ledger.times if since >= began]
    rows = verdict(calls.ledger, replicas.rows())
    return Outcome(calls.ledger.requests, calls.failures, rows, restarts, times_ms, calls.connections)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=500.0, help="calls a second")
    parser.add_argument("--drain", type=float, default=5.0, help="DRAIN_SECONDS of the replicas")
    parser.add_argument("--end", choices=("term", "kill"), default="term", help="how a replica is told to end")
    parser.add_argument("--before", type=Path, default=ROOT, metavar="CHECKOUT", help="of the version to begin with")
    options = parser.parse_args()
    if binary() is None:
        sys.exit("no haproxy here: .ci/haproxy fetches it, or: apt install haproxy")
    with (
        tempfile.TemporaryDirectory(prefix="agentcore-rollout-") as folder,
        PostgresServer() as postgres,
        RedisServer() as redis,
        Replicas(Path(folder), postgres, redis, [options.drain] * REPLICAS, options.before.resolve()) as replicas,
    ):
        outcome = roll(replicas, replicas.services, options.rate, options.end)
    _print(outcome, options)
    sys.exit(0 if outcome.holds else 1)


def _print(outcome: Outcome, options: argparse.Namespace) -> None:
    how = "SIGKILL" if options.end == "kill" else f"SIGTERM, DRAIN_SECONDS={options.drain:g}"
    print(f"{REPLICAS} replicas restarted by {how} under {options.rate:g} calls/s on {CLIENTS} connections")
    if options.before != ROOT:
        print(f"from the version in {options.before} to this one")
    for number, restart in enumerate(outcome.restarts):
        print(f"replica {number}: exit {restart.code} after {restart.ended_s:.1f} s, back after {restart.back_s:.1f} s")
    quantiles = statistics.quantiles(outcome.times_ms, n=100)
    print(
        f"{outcome.requests} calls, {sum(outcome.failures.values())} failed {dict(outcome.failures)}; echo "
        f"p50 {quantiles[49]:.1f} ms, p95 {quantiles[94]:.1f} ms, p99 {quantiles[98]:.1f} ms, "
        f"max {max(outcome.times_ms):.0f} ms"
    )
    rows = outcome.rows
    print(
        f"{rows.answered} answered, {rows.logged} rows: {rows.lost} lost, {rows.duplicates} twice, "
        f"{rows.refused_logged} of refused calls; {outcome.connections} connections made"
    )


if __name__ == "__main__":
    main()
