"""What was answered is a row, once, whatever dies meanwhile; and what was refused is none. Real processes, real faults.

`python -m load.durability` is the same for as long as one likes.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from app.service import HURRIED_S, LOG_DRAIN_S
from load.durability import BATCH_BYTES, OF_DATABASE, Clients, Faults, Service, logged_rows, schedule, verdict
from tests.conftest import ROOT, START_S_MAX, Running, service_environ
from tests.servers import PostgresServer, wait_until

SEED = 4

MEMORY_GROWN_BYTES_MAX = 40_000_000
"""Over what a process takes that has answered a few calls: 4 MB of records, and what Python keeps of freed memory."""


def until(holds: Callable[[], bool], what: str = "it never came to be") -> None:
    wait_until(holds, what)


def migrate(url: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "app", "migrate"],
        cwd=ROOT,
        env=service_environ(DATABASE_URL=url),
        stdout=subprocess.DEVNULL,
        check=True,
    )


class Place:
    """A PostgreSQL of one's own with a migrated database, and services on it."""

    def __init__(self, postgres: PostgresServer, database: str, folder: Path) -> None:
        self.postgres = postgres
        self.folder = folder
        self.database = database

    def service(self, **environ: str) -> Service:
        return Service(self.folder, self.database, **environ)

    def rows(self) -> list[tuple[str, str]]:
        return logged_rows(self.database, self.postgres)

    def dead(self) -> set[str]:
        found = self.postgres.run_sql("SELECT execution_id FROM tool_executions_dead", database=self.database)
        return {str(row[0]) for row in found}


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """Killed and stopped by the tests of this module, each of which leaves it running."""
    with PostgresServer(max_connections="30") as server:
        yield server


@pytest.fixture(scope="module")
def template(server: PostgresServer) -> str:
    """A database with tables, to be copied: a migration takes a second."""
    database = server.create_database()
    migrate(database)
    return database.rsplit("/", 1)[1]


@pytest.fixture
def place(server: PostgresServer, template: str, tmp_path: Path) -> Iterator[Place]:
    server.run_sql(f'CREATE DATABASE "{tmp_path.name}" TEMPLATE "{template}"')
    yield Place(server, server.database_url(tmp_path.name), tmp_path)
    if not server.is_running:
        server.start()


def answered(clients: Clients, count: int) -> None:
    until(lambda: len(clients.ledger.answered) >= count, f"{count} answers")


def call(running: Running, **params: Any) -> dict[str, Any]:
    return running.execute("echo", {"message": "a"}, **params)


def batch(running: Running, size: int, calls: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    """A JSON-RPC batch; results and errors in order."""
    requests = [{"jsonrpc": "2.0", "id": n, "method": "tools.execute", "params": calls(n)} for n in range(size)]
    answers = running.http.post("/api/v1/jsonrpc", json=requests).json()
    return [answer.get("result") or answer["error"] for answer in answers]


def echoes(number: int) -> dict[str, Any]:
    return {"tool_id": "echo", "parameters": {"message": f"message {number}"}}


def events(running: Running) -> list[dict[str, Any]]:
    """Lines of the service's log up to now."""
    marker = running.execute("raise_exception")["execution_id"]
    running.read_log(lambda event: event.get("execution_id") == marker)
    return [event for event in running.log if event["message"] != "tool crashed"]


def said(running: Running, message: str) -> int:
    """How often."""
    return sum(event["message"] == message for event in events(running))


def ready(running: Running) -> str:
    """What /readyz says of the log; it is ready whatever that is."""
    response = running.http.get("/readyz")
    assert response.status_code == 200
    (line,) = [line for line in response.text.splitlines() if line.startswith("log: ")]
    return line.removeprefix("log: ")


# What was answered is logged


def test_five_kills_with_faults_of_the_database_between_them_lose_and_double_nothing(place: Place) -> None:
    kills = ("service SIGKILL",) * 5
    faults = schedule(SEED, 7.0, kills, ("database SIGKILL", "database SIGSTOP", "database full"))
    print(f"seed {SEED}", *faults, sep="\n")
    with place.service() as service:
        with Clients(service.port, count=8, pace=40, seed=SEED) as clients:
            answered(clients, 50)
            Faults(service, place.postgres, place.database).play(faults)
            answered(clients, len(clients.ledger.answered) + 50)
        service.drained()
        found = verdict(clients.ledger, place.rows())
        assert clients.ledger.broken and clients.ledger.refused
        assert found.holds, found
        assert place.dead() == set()


def test_a_sigterm_under_load_leaves_every_answered_call_in_the_database(place: Place) -> None:
    service = place.service()
    service.start()
    with Clients(service.port, count=8, pace=40) as clients:
        answered(clients, 300)
        assert service.terminate() == 0
        found = verdict(clients.ledger, place.rows())
    assert found.holds, found
    assert list(service.journal.rglob("*.segment")) == []


@pytest.mark.parametrize("signals", [1, 2])
def test_a_sigterm_while_the_database_stalls_leaves_the_rows_to_the_next_start(place: Place, signals: int) -> None:
    service = place.service()
    running = service.start()
    with Clients(service.port, count=8, pace=40) as clients:
        answered(clients, 100)
        place.postgres.pause()
        try:
            answered(clients, 400)
            for _ in range(signals - 1):
                running.process.send_signal(signal.SIGTERM)
                running.read_log(lambda event: event["message"] == "draining")
            running.process.send_signal(signal.SIGTERM)
            left = running.read_log(lambda event: event["message"] == "rows are left to the next start")
            assert left["journal_bytes"] > 0 and left["waited_s"] == (LOG_DRAIN_S if signals == 1 else HURRIED_S)
            assert running.process.wait(START_S_MAX) == 0
        finally:
            place.postgres.resume()
            service.kill()
    assert verdict(clients.ledger, place.rows()).lost > 0
    with service:
        service.drained()
        found = verdict(clients.ledger, place.rows())
    assert found.holds, found


def test_a_hundred_poison_rows_among_ten_thousand_are_set_aside_and_the_rest_lands(place: Place) -> None:
    """Poison that is known is taken out before; so the table is taught to refuse what nobody could have known."""
    refuse = "ALTER TABLE tool_executions ADD CONSTRAINT taught CHECK (agent_id <> 'poison')"
    place.postgres.run_sql(refuse, database=place.database)
    with place.service(LOG_PAYLOADS="full") as service:
        assert service.running is not None
        poison, healthy = set(), set()
        for _ in range(100):
            results = batch(
                service.running,
                100,
                lambda number: {
                    "tool_id": "echo",
                    "parameters": {"message": "nul \x00 and \\u0000 in it" if number == 7 else "a"},
                    **({"agent_id": "poison"} if number == 42 else {}),
                },
            )
            poison.add(results[42]["execution_id"])
            healthy |= {result["execution_id"] for result in results} - poison
        service.drained()
        assert len(poison) == 100 and len(healthy) == 9_900
        assert dict(place.rows()).keys() == healthy
        assert place.dead() == poison
        rows = {
            outcome: service.running.metric("execution_log_rows_total", outcome=outcome)
            for outcome in ("written", "dead", "duplicate", "dropped")
        }
        assert rows == {"written": 9_900, "dead": 100, "duplicate": 0, "dropped": 0}


def test_two_processes_share_a_journal_and_the_next_one_brings_in_what_a_killed_one_left(place: Place) -> None:
    first, second, third = place.service(), place.service(), place.service()
    with second:
        first.start()
        with Clients(first.port, seed=1) as of_first, Clients(second.port, seed=2) as of_second:
            answered(of_first, 50)
            place.postgres.kill()
            answered(of_first, 150)
            answered(of_second, 150)
            first.kill()
            third.start()
            place.postgres.start()
            answered(of_second, 300)
        second.drained()
        third.drained()
        third.kill()
        rows = place.rows()
        assert verdict(of_first.ledger, rows).holds and verdict(of_second.ledger, rows).holds
        assert len(list(second.journal.iterdir())) == 2, "that of the killed third, and the second's own"


# The database away


def test_while_the_database_is_away_calls_are_served_memory_is_flat_and_afterwards_all_drains(place: Place) -> None:
    with place.service() as service:
        running = the(service)
        with Clients(service.port, count=8, pace=60) as clients:
            answered(clients, 500)
            service.drained(left_bytes=BATCH_BYTES)
            assert ready(running) == "up"
            before_bytes, before_files, before_tasks = service.memory_bytes(), open_files(running), tasks(running)
            place.postgres.kill()
            until(lambda: running.metric("execution_log_lag_seconds") > 1.5)
            answered(clients, len(clients.ledger.answered) + 500)
            assert ready(running).startswith("database away for ")
            assert running.metric("execution_log_journal_bytes") > BATCH_BYTES
            assert running.metric("database_connection_pool_size", state="in_use") <= 1
            assert service.memory_bytes() - before_bytes < MEMORY_GROWN_BYTES_MAX
            assert open_files(running) <= before_files
            assert tasks(running) <= before_tasks + 20, "the writer's waits, a connection, a call of each client"
            assert said(running, "log database away, rows wait") == 1
            lines = len(events(running))
            place.postgres.start()
            answered(clients, len(clients.ledger.answered) + 100)
        service.drained()
        assert ready(running) == "up"
        assert said(running, "log database back") == 1
        assert lines < 20 and not [event for event in events(running) if "exception" in event]
    found = verdict(clients.ledger, place.rows())
    assert found.holds, found


def open_files(running: Running) -> int:
    return len(list(Path(f"/proc/{running.process.pid}/fd").iterdir()))


def tasks(running: Running) -> int:
    """Of the event loop, but for those of calls that are running."""
    found: int = running.execute("count_tasks")["result"]
    return found


@pytest.fixture(scope="module")
def lasting(
    server: PostgresServer, template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Place, Service]]:
    """One service to which the database does everything, and which is as before after each."""
    folder = tmp_path_factory.mktemp("lasting")
    server.run_sql(f'CREATE DATABASE "lasting" TEMPLATE "{template}"')
    place = Place(server, server.database_url("lasting"), folder)
    fill(place)
    with place.service() as service:
        yield place, service


@pytest.mark.parametrize("fault", [fault for fault in OF_DATABASE if "SIG" not in fault])
def test_a_database_that_refuses_costs_no_call_and_no_row(lasting: tuple[Place, Service], fault: str) -> None:
    place, service = lasting
    with Faults(service, place.postgres, place.database).happening(fault):
        ids = served(service, 300)
        if fault != "connections cut":
            until(lambda: ready(the(service)).startswith("database away"), f"away: {fault}")
    service.drained()
    assert ids <= dict(place.rows()).keys()
    assert place.dead() == set()
    assert ready(the(service)) == "up"


def test_an_export_ends_without_an_end_where_the_database_goes_away(place: Place) -> None:
    """Nobody takes half of the log for all of it; and the service's own log has a line of it, no traceback."""
    fill(place, 20_000, tenant="local")
    with place.service() as service:
        running = the(service)
        with (
            pytest.raises(httpx.RemoteProtocolError),
            running.http.stream("GET", "/api/v1/executions/export") as export,
        ):
            assert export.status_code == 200  # more than sockets hold is still to be read
            place.postgres.kill()
            assert all(export.iter_raw())
        place.postgres.start()
        cut = running.read_log(lambda event: event["message"] == "export cut off")
        assert cut["reason"] == "The log cannot be read now"
        assert [event for event in events(running) if "exception" in event] == []


def fill(place: Place, count: int = 1200, tenant: str = "else") -> None:
    """Rows of somebody else, over FILE_BYTES_MAX of them: what comes after needs the file to grow."""
    place.postgres.run_sql(
        f"""
        INSERT INTO tool_executions (execution_id, tool_id, tool_version, tenant, subject, status, started_at,
            finished_at, execution_ms, overhead_ms, attempts, cached, client_gone, trace_id, cost, parameters)
        SELECT (lpad(to_hex((extract(epoch FROM now()) * 1000)::bigint), 12, '0')
                || lpad(to_hex(number), 20, '0'))::uuid,
            'echo', '1', '{tenant}', 'else', 'success', now(), now(), 1, 1, 1, false, false, 'x', 1,
            to_jsonb(repeat('x', 1000))
        FROM generate_series(1, {count}) AS number
        """,
        database=place.database,
    )


def the(service: Service) -> Running:
    assert service.running is not None
    return service.running


def served(service: Service, count: int) -> set[str]:
    """Ids of so many calls, all of which succeeded."""
    results = [result for _ in range(count // 100) for result in batch(the(service), 100, echoes)]
    assert {result["status"] for result in results} == {"success"}
    return {result["execution_id"] for result in results}


def test_a_server_without_a_connection_to_spare_costs_no_call_and_no_row(place: Place) -> None:
    with taken_connections(place.postgres), place.service() as service:
        ids = served(service, 300)
        until(lambda: ready(the(service)).startswith("database away"))
    with service:
        service.drained()
        assert ids <= dict(place.rows()).keys()


@contextlib.contextmanager
def taken_connections(postgres: PostgresServer) -> Iterator[None]:
    """All that the server has."""
    url = postgres.database_url(scheme="postgresql")
    with asyncio.Runner() as runner:
        taken: list[asyncpg.Connection] = []
        with contextlib.suppress(asyncpg.TooManyConnectionsError):
            while True:
                taken.append(runner.run(asyncpg.connect(url, ssl=False)))
        yield
        for connection in taken:
            runner.run(connection.close())


def test_a_database_that_is_migrated_later_gets_the_rows_of_before(server: PostgresServer, tmp_path: Path) -> None:
    database = server.create_database()
    with Service(tmp_path, database) as service:
        ids = served(service, 300)
        until(lambda: ready(the(service)).startswith("database away"))
        migrate(database)
        service.drained()
        assert dict(logged_rows(database, server)).keys() == ids


# The journal without room


@pytest.mark.parametrize("mode", ["durable", "strict"])
def test_journal_max_bytes_refuses_calls_before_they_run_and_takes_them_again_once_drained(
    place: Place, mode: str
) -> None:
    with place.service(JOURNAL_MODE=mode, JOURNAL_MAX_BYTES="1048576") as service:
        running = the(service)
        place.postgres.kill()
        counted, refused = calls_until_refused(running)
        assert refused["code"] == -32008 and refused["data"]["retryable"] and refused["data"]["retry_after_ms"] > 0
        assert 1_000 < len(counted) < 4_000
        assert ready(running).endswith("journal full, calls are refused")
        assert running.metric("execution_log_journal_bytes") > 0.8 * 1_048_576
        assert running.metric("tool_errors_total", error_type="dependency_unavailable") > 0
        place.postgres.start()
        service.drained()
        until(lambda: ready(running) == "up", "drained segments are removed beside the loop, then there is room")
        assert running.execute("count_calls")["result"] == len(counted) + 1, "a refused call did not run"
        service.drained()
        rows = dict(place.rows())
        assert counted <= rows.keys() and len(rows) == len(counted) + 1


def calls_until_refused(running: Running) -> tuple[set[str], dict[str, Any]]:
    """Ids of the calls that ran, and the refusal of a single one; after it none ran.

    A batch's calls reserve room at once, each for the largest row that it may need, and give most of it back: the last
    batch is refused in part while there is room for a call alone. So the batches get smaller.
    """
    ran: set[str] = set()
    size = 100
    for _ in range(500):
        results = batch(running, size, lambda _: {"tool_id": "count_calls"})
        ran |= {result["execution_id"] for result in results if "status" in result}
        refused = [result for result in results if "code" in result]
        if refused and size == 1:
            again = running.execute("count_calls")
            assert again["code"] == -32008
            return ran, refused[0]
        if refused:
            size //= 2
    raise AssertionError("it never was full")


def test_in_mode_buffered_what_finds_no_room_is_served_dropped_and_counted(place: Place) -> None:
    with place.service(JOURNAL_MODE="buffered", JOURNAL_MAX_BYTES="1048576") as service:
        running = the(service)
        place.postgres.kill()
        ids = served(service, 4_000)
        dropped = running.metric("execution_log_rows_total", outcome="dropped")
        assert 100 < dropped < 3_900
        place.postgres.start()
        service.drained()
        rows = dict(place.rows())
        assert rows.keys() <= ids and len(rows) == 4_000 - dropped
        ids |= served(service, 100)
        service.drained()
        assert len(place.rows()) == 4_100 - dropped


@pytest.mark.parametrize("mode", ["durable", "strict"])
def test_a_disk_that_takes_no_more_is_no_end_of_serving_once_it_does_again(place: Place, mode: str) -> None:
    with place.service(JOURNAL_MODE=mode) as service:
        running = the(service)
        before = served(service, 100)
        service.drained()
        place.postgres.kill()
        limit_files(running, 0)
        first = running.execute("count_calls")
        assert first["status"] == "success", "the tool had run when the write failed"
        event = running.read_log(lambda event: event["message"] == "journal cannot be written")
        assert "execution_id" not in event, "it is said of the disk and not of a call"
        for _ in range(20):
            assert running.execute("count_calls")["code"] == -32008
        assert "journal cannot be written or synced, 1 rows are in memory alone" in ready(running)
        limit_files(running, resource.RLIM_INFINITY)
        until(lambda: "journal" not in ready(running))
        assert running.execute("count_calls")["result"] == 2
        service.kill()
        place.postgres.start()
    with service:
        service.drained()
        rows = dict(place.rows())
        assert first["execution_id"] in rows and len(rows) == len(before) + 2


def limit_files(running: Running, bytes_max: int) -> None:
    """No file of the service may grow past that: its disk is full."""
    resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (bytes_max, resource.RLIM_INFINITY))
