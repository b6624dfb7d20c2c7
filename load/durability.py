"""`python -m load.durability`: clients keep the ids of their answers while processes die; is every one of them a row?

Starts PostgreSQL and the service, offers a steady load, takes the database away, brings it back, then kills, stops and
starves service and database by a schedule that the seed decides and the first lines show. Ends with a table, and exit 1
where an answered call has no row, or a refused one has. `Clients` and `Ledger` are what tests/service uses as well.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import re
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import orjson

from tests.conftest import Running, end, start_service
from tests.servers import PostgresAt, PostgresServer, as_user, free_port

RPC, MCP, REST = "/api/v1/jsonrpc", "/mcp", "/api/v1/tools/echo/execute"

RETRY_S = 0.05
"""Before a client tries again to reach a service that is gone."""

ANSWER_S_MAX = 40.0
"""Longer than any call may take; past it the answer is lost, and its row may or may not be there."""

DRAINED_S_MAX = 120.0

BATCH_BYTES = 100_000
"""What clients like these cause between two batches, with room to spare."""

LIMITS = """
policies:
  - {name: once, match: {tool: current_time}, rate: 1/minute, burst: 1}
"""
"""One call passes, all others are refusals that have an id and must have no row."""

MCP_META = "io.agentcore/execution_id"


@dataclass
class Ledger:
    """What the clients were told."""

    answered: dict[str, str] = field(default_factory=dict)
    """Status by execution id; of MCP, which names none, `success`."""
    refused: set[str] = field(default_factory=set)
    """Ids of calls that did not run, skipped tasks among them."""
    codes: dict[int, int] = field(default_factory=dict)
    requests: int = 0
    """Answered."""
    broken: int = 0
    """Requests without an answer: the service died under them."""
    times: list[tuple[float, float]] = field(default_factory=list)
    """Of single calls that run: when one began (`time.monotonic()`), and seconds until its answer."""

    def note(self, answer: Any) -> None:
        """Whatever is in an answer, however deep."""
        if isinstance(answer, list):
            for item in answer:
                self.note(item)
        if not isinstance(answer, dict):
            return
        if "execution_id" in answer and "status" in answer:
            if answer["attempts"] or answer["cached"]:
                self.answered[answer["execution_id"]] = answer["status"]
            else:
                self.refused.add(answer["execution_id"])
            return
        if "code" in answer and isinstance(answer.get("data"), dict):
            self._note_error(answer)
            return
        if MCP_META in answer.get("_meta", ()) and answer.get("isError") is False:
            self.answered[answer["_meta"][MCP_META]] = "success"
            return
        for value in answer.values():
            self.note(value)

    def _note_error(self, error: dict[str, Any]) -> None:
        self.codes[error["code"]] = self.codes.get(error["code"], 0) + 1
        if error["code"] != -32603 and "execution_id" in error["data"]:
            self.refused.add(error["data"]["execution_id"])

    def p95_ms(self, since: float, until: float) -> float:
        times = [seconds for began, seconds in self.times if since <= began < until]
        return statistics.quantiles(times, n=20)[-1] * 1e3 if len(times) > 1 else float("nan")


class Request(NamedTuple):
    path: str
    body: bytes
    timed: bool
    """Others wait for something else than the path, or are several."""


def _rpc(method: str, params: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}


def _execute(tool_id: str, parameters: dict[str, Any], **params: Any) -> dict[str, Any]:
    return {"tool_id": tool_id, "parameters": parameters, **params}


def _requests(choose: random.Random) -> Iterator[Request]:
    """Every door and every shape of request, half of them plain calls; of the others many are refused or fail."""
    echo = _execute("echo", {"message": "x" * choose.randrange(200)}, agent_id="durability")
    bad = _execute("echo", {"message": 1})
    divided = _execute("calculator", {"operation": "divide", "a": 1, "b": 0})
    unknown = _execute("no_such_tool", {})
    single = _rpc("tools.execute", echo)
    bodies: list[tuple[str, Any]] = [
        (RPC, single),
        (RPC, [single, _rpc("tools.execute", divided), _rpc("tools.execute", bad), single]),
        (RPC, _rpc("tools.execute_batch", {"requests": [echo, bad, divided, unknown, echo]})),
        (
            RPC,
            _rpc(
                "tools.execute_parallel",
                {
                    "tasks": [
                        {"task_id": "a", **echo},
                        {"task_id": "b", **divided},
                        {"task_id": "c", **echo, "dependencies": ["a"]},
                        {"task_id": "skipped", **echo, "dependencies": ["b"]},
                    ]
                },
            ),
        ),
        (RPC, _rpc("tools.execute_with_fallback", {"primary": divided, "fallback": echo})),
        (RPC, _rpc("tools.execute", unknown)),
        (RPC, _rpc("tools.execute", _execute("current_time", {}))),
        (RPC, _rpc("tools.execute", _execute("one_at_a_time", {"seconds": 0.05}, timeout_override=0.02))),
        (REST, {"parameters": {"message": "rest"}}),
        (MCP, _rpc("tools/call", {"name": "echo", "arguments": {"message": "mcp"}})),
    ]
    requests = [
        Request(path, orjson.dumps(body), body is single) for path, body in [*bodies, *bodies[:1] * len(bodies)]
    ]
    choose.shuffle(requests)
    return itertools.cycle(requests)


class Clients:
    """So many clients on connections of their own, in a thread; each sends `pace` requests a second until the end."""

    def __init__(self, port: int, count: int = 8, pace: float = 30.0, seed: int = 1, key: str | None = None) -> None:
        self.ledger = Ledger()
        self._port = port
        self._count = count
        self._period_s = 1 / pace
        self._seed = seed
        self._headers = b"" if key is None else b"Authorization: Bearer %b\r\n" % key.encode()
        self._ended = threading.Event()
        self._failed: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, name="clients")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
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
            for number in range(self._count):
                group.create_task(self._client(random.Random(self._seed * 1_000 + number)))

    async def _client(self, choose: random.Random) -> None:
        requests = _requests(choose)
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        due = time.monotonic() + choose.random() * self._period_s
        while not self._ended.is_set():
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            due = max(due + self._period_s, time.monotonic() - 1)
            request = next(requests)
            try:
                if streams is None:
                    streams = await asyncio.open_connection("127.0.0.1", self._port)
                async with asyncio.timeout(ANSWER_S_MAX):
                    await self._exchange(request, *streams)
            except (OSError, EOFError, TimeoutError):
                if streams is not None:
                    self.ledger.broken += 1
                    streams[1].close()
                    streams = None
                await asyncio.sleep(RETRY_S)
        if streams is not None:
            streams[1].close()

    async def _exchange(self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        began = time.monotonic()
        writer.write(
            b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Accept: application/json, text/event-stream\r\n%bContent-Length: %d\r\n\r\n%b"
            % (request.path.encode(), self._headers, len(request.body), request.body)
        )
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        body = await reader.readexactly(int(length[1])) if length else b""
        self.ledger.requests += 1
        if request.timed:
            self.ledger.times.append((began, time.monotonic() - began))
        if body:
            self.ledger.note(orjson.loads(body))
        if b"connection: close" in head.lower():
            raise EOFError


class Verdict(NamedTuple):
    """What a ledger and the rows come to."""

    answered: int
    logged: int
    duplicates: int
    lost: int
    """Answered calls without a row."""
    refused_logged: int
    """Rows of calls that did not run."""
    unlike: int
    """Rows with another status than the answer had."""

    @property
    def holds(self) -> bool:
        return self.answered > 0 and not (self.duplicates or self.lost or self.refused_logged or self.unlike)


def verdict(ledger: Ledger, rows: list[tuple[str, str]]) -> Verdict:
    logged = dict(rows)
    return Verdict(
        len(ledger.answered),
        len(rows),
        len(rows) - len(logged),
        len(ledger.answered.keys() - logged.keys()),
        len(ledger.refused & logged.keys()),
        sum(logged.get(one, status) != status for one, status in ledger.answered.items()),
    )


ROWS = "SELECT cast(execution_id AS text), status FROM tool_executions"


def logged_rows(database: str | Path, postgres: PostgresAt | None = None) -> list[tuple[str, str]]:
    """Id and status of every row: of a SQLite file, or of a database of that server."""
    if postgres is not None:
        return [(str(row[0]), str(row[1])) for row in postgres.run_sql(ROWS, database=str(database))]
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return connection.execute(ROWS).fetchall()


class Service:
    """The service with one port, one journal and one database, however often it is killed."""

    def __init__(self, folder: Path, database_url: str, *arguments: str, **environ: str) -> None:
        self.port = free_port()
        self.journal = folder / "journal"
        limits = folder / "limits.yaml"
        limits.write_text(LIMITS)
        self._arguments = ("--port", str(self.port), *arguments)
        self._environ = {
            "DATABASE_URL": database_url,
            "JOURNAL_DIR": str(self.journal),
            "LIMITS_FILE": str(limits),
            "TOOL_MODULES": "tests.tools_for_tests",
            "AUTH_MODE": "none",  # auto would let nobody in where the database is away at start
            **environ,
        }
        self.running: Running | None = None

    def start(self) -> Running:
        self.running = start_service(*self._arguments, **self._environ)
        return self.running

    def kill(self) -> None:
        """SIGKILL, and nothing else."""
        if self.running is not None:
            end(self.running)
            self.running = None

    def terminate(self) -> int:
        """SIGTERM; the exit code."""
        assert self.running is not None
        code = self.running.stop()
        self.kill()
        return code

    def memory_bytes(self) -> int:
        assert self.running is not None
        pages = Path(f"/proc/{self.running.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def drained(self, within_s: float = DRAINED_S_MAX, left_bytes: int = 0) -> float:
        """Wait until every record is a row; the seconds it took. Under load there are always some that wait for others
        to share their batch: say how much may be left."""
        assert self.running is not None
        began = time.monotonic()
        while time.monotonic() < began + within_s:
            if self.waiting_bytes() <= left_bytes and self.running.metric("execution_log_lag_seconds") < 1:
                return time.monotonic() - began
            time.sleep(0.02)
        raise TimeoutError(f"rows still wait after {within_s:g} s")

    def waiting_bytes(self) -> float:
        """Of records that are no rows yet."""
        assert self.running is not None
        return self.running.metric("execution_log_journal_bytes")


class Fault(NamedTuple):
    at_s: float
    name: str
    lasts_s: float = 0.0

    def __str__(self) -> str:
        return f"{self.at_s:6.1f} s  {self.name}" + (f", for {self.lasts_s:.1f} s" if self.lasts_s else "")


OF_SERVICE = ("service SIGKILL", "service SIGTERM")
OF_DATABASE = (
    "database SIGKILL",
    "database SIGSTOP",
    "database read-only",
    "database takes no connection",
    "database full",
    "table missing",
    "connections cut",
)


def schedule(
    seed: int,
    seconds: float,
    of_service: Sequence[str] = ("service SIGKILL",) * 5 + ("service SIGTERM",),
    of_database: Sequence[str] = OF_DATABASE,
) -> list[Fault]:
    """Each once, in an order and at moments that the seed decides."""
    choose = random.Random(seed)
    of_service = choose.sample(of_service, len(of_service))
    of_database = choose.sample(of_database, len(of_database))
    faults = [Fault(_moment(choose, number, len(of_service), seconds), name) for number, name in enumerate(of_service)]
    for number, name in enumerate(of_database):
        lasts_s = seconds / len(of_database) * choose.uniform(0.2, 0.6)
        faults.append(Fault(_moment(choose, number, len(of_database), seconds, lasts_s), name, lasts_s))
    return sorted(faults)


def _moment(choose: random.Random, number: int, of: int, seconds: float, lasts_s: float = 0.0) -> float:
    """Somewhere in the so manieth part of the time, so that it is over within it."""
    part_s = seconds / of
    return part_s * number + choose.random() * (part_s - lasts_s)


class Faults:
    """Makes them happen to a service and its database."""

    def __init__(self, service: Service, postgres: PostgresServer, database: str) -> None:
        self._service = service
        self._postgres = postgres
        self._database = database
        self._name = database.rsplit("/", 1)[1]
        self._faults: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "service SIGKILL": (service.kill, service.start),
            "service SIGTERM": (self._restart_in_order, _nothing),
            "database SIGKILL": (postgres.kill, postgres.start),
            "database SIGSTOP": (postgres.pause, postgres.resume),
            "database read-only": (
                lambda: self._set("SET default_transaction_read_only = on"),
                lambda: self._set("RESET default_transaction_read_only"),
            ),
            "database takes no connection": (
                lambda: self._set("ALLOW_CONNECTIONS false"),
                lambda: self._set("ALLOW_CONNECTIONS true"),
            ),
            "database full": (
                lambda: _limit_files(postgres, str(FILE_BYTES_MAX)),
                lambda: _limit_files(postgres, "unlimited"),
            ),
            "table missing": (
                lambda: self._sql("ALTER TABLE tool_executions RENAME TO away", database),
                lambda: self._sql("ALTER TABLE away RENAME TO tool_executions", database),
            ),
            "connections cut": (self._cut, _nothing),
        }

    def play(self, faults: list[Fault], say: Callable[[str], None] = lambda _: None) -> None:
        """The service's in this thread, the database's in another: one may happen during the other."""
        began = time.monotonic()
        failed: list[BaseException] = []

        def run(mine: list[Fault]) -> None:
            try:
                for fault in mine:
                    time.sleep(max(0.0, began + fault.at_s - time.monotonic()))
                    say(f"{time.monotonic() - began:6.1f} s  {fault.name}")
                    with self.happening(fault.name):
                        time.sleep(fault.lasts_s)
            except BaseException as error:
                failed.append(error)

        other = threading.Thread(target=run, args=([one for one in faults if one.name not in OF_SERVICE],))
        other.start()
        run([one for one in faults if one.name in OF_SERVICE])
        other.join()
        if failed:
            raise failed[0]

    @contextlib.contextmanager
    def happening(self, name: str) -> Iterator[None]:
        """From its begin to its end."""
        begin, finish = self._faults[name]
        begin()
        try:
            yield
        finally:
            finish()

    def _restart_in_order(self) -> None:
        code = self._service.terminate()
        self._service.start()
        if code:
            raise RuntimeError(f"SIGTERM ended the service with {code}")

    def _set(self, change: str) -> None:
        """Change what holds for the database, and let everybody come anew to find it so."""
        self._sql(f'ALTER DATABASE "{self._name}" {change}')
        self._cut()

    def _cut(self) -> None:
        """Whoever is connected must come anew, and finds what holds now."""
        self._sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'agentcore-tools'")

    def _sql(self, statement: str, database: str | None = None) -> None:
        self._postgres.run_sql(statement, database=database)


FILE_BYTES_MAX = 1 << 20
"""The size of a WAL segment of the tests' servers: what is larger than that cannot grow."""


def _nothing() -> None:
    pass


def _limit_files(postgres: PostgresServer, bytes_max: str) -> None:
    """To the server its disk is full, as far as one can make that without a disk of one's own. Done as its own user:
    root may not, where it lacks a capability."""
    children = Path(f"/proc/{postgres.pid}/task/{postgres.pid}/children").read_text().split()
    for pid in (str(postgres.pid), *children):
        command = ["prlimit", "--pid", pid, f"--fsize={bytes_max}:unlimited"]
        done = subprocess.run(command, check=False, capture_output=True, cwd="/", **as_user(postgres.user))
        if done.returncode and Path(f"/proc/{pid}").exists():
            raise RuntimeError(done.stderr.decode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of all phases, without what draining takes")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10_000))
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--pace", type=float, default=30.0, help="requests a second of each client")
    parser.add_argument(
        "--mode", choices=("durable", "strict", "buffered"), default="durable", help="buffered loses rows"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="agentcore-durability-") as folder, PostgresServer() as postgres:
        sys.exit(0 if campaign(options, Path(folder), postgres) else 1)


@dataclass
class Phase:
    name: str
    began: float
    ended: float = 0.0


def campaign(options: argparse.Namespace, folder: Path, postgres: PostgresServer) -> bool:
    """Before, without the database, after, faults; whether everything held."""
    database = postgres.create_database()
    migrated = os.spawnve(
        os.P_WAIT, sys.executable, [sys.executable, "-m", "app", "migrate"], {**os.environ, "DATABASE_URL": database}
    )
    if migrated:
        raise SystemExit("the database could not be migrated")
    faults = schedule(options.seed, options.seconds * 0.5)
    print(
        f"seed {options.seed}; {options.clients} clients, {options.pace:g} requests/s each; faults of the last phase:"
    )
    print(*faults, sep="\n")
    service = Service(folder, database, JOURNAL_MODE=options.mode)
    phases: list[Phase] = []
    memory: dict[str, int] = {}

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        phases.append(Phase(name, time.monotonic()))
        yield
        phases[-1].ended = time.monotonic()
        if service.running is not None:
            memory[name] = service.memory_bytes()

    with service:
        with Clients(service.port, options.clients, options.pace, options.seed) as clients:
            time.sleep(2)  # not measured: everything is called for the first time
            with phase("before"):
                time.sleep(options.seconds * 0.125)
            with phase("database away"):
                postgres.kill()
                time.sleep(options.seconds * 0.25)
            waited_bytes = service.waiting_bytes()
            postgres.start()
            drained_s = service.drained(left_bytes=BATCH_BYTES)
            with phase("after"):
                time.sleep(options.seconds * 0.125)
            with phase("faults"):
                Faults(service, postgres, database).play(faults, print)
        last_s = service.drained()
        found = verdict(clients.ledger, logged_rows(database, postgres))
    _print_table(clients.ledger, phases, memory, found)
    print(f"{waited_bytes / 1e6:.1f} MB waited, drained in {drained_s:.1f} s; after the faults in {last_s:.1f} s")
    return found.holds


def _print_table(ledger: Ledger, phases: list[Phase], memory: dict[str, int], found: Verdict) -> None:
    print(f"\n{'phase':<16}{'timed':>10}{'p95 ms':>9}{'of before':>11}{'MB':>7}")
    before_ms = ledger.p95_ms(phases[0].began, phases[0].ended)
    for phase in phases:
        p95_ms = ledger.p95_ms(phase.began, phase.ended)
        requests = sum(phase.began <= began < phase.ended for began, _ in ledger.times)
        rss_mb = memory.get(phase.name, 0) / 1e6
        print(f"{phase.name:<16}{requests:>10}{p95_ms:>9.2f}{p95_ms / before_ms:>11.2f}{rss_mb:>7.0f}")
    print(
        f"\n{'answered':>10}{'logged':>10}{'duplicates':>12}{'lost':>6}{'refused but logged':>20}{'other status':>14}"
    )
    print(
        f"{found.answered:>10}{found.logged:>10}{found.duplicates:>12}{found.lost:>6}{found.refused_logged:>20}"
        f"{found.unlike:>14}"
    )
    print(f"refusals {len(ledger.refused)} {dict(sorted(ledger.codes.items()))}, {ledger.broken} requests cut off")


if __name__ == "__main__":
    main()
