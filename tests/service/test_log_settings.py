"""Each setting of the log, by what it does to a running service and to its database."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from app.execution_log.partitions import first_id
from load.durability import Service, logged_rows
from tests.conftest import ROOT, Running, Serve, service_environ
from tests.prometheus import RULE_FILES
from tests.servers import PostgresAt, wait_until

TOOLS = "tests.tools_for_tests"


def drained(running: Running) -> None:
    wait_until(lambda: running.metric("execution_log_journal_bytes") == 0, "all are rows")


def rows(running: Running, columns: str) -> list[tuple[Any, ...]]:
    """Of the service's own SQLite file, in the order of the calls."""
    drained(running)
    with contextlib.closing(sqlite3.connect(running.folder / "agentcore.db")) as connection:
        return connection.execute(f"SELECT {columns} FROM tool_executions ORDER BY execution_id").fetchall()


def segments(running: Running) -> list[Path]:
    return list(running.folder.rglob("*.segment"))


def migrate(url: str) -> None:
    command = [sys.executable, "-m", "app", "migrate"]
    environ = service_environ(DATABASE_URL=url)
    subprocess.run(command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL, check=True)


@pytest.fixture(scope="module")
def database(postgres: PostgresAt) -> str:
    """With tables, and rows of whoever comes."""
    url = postgres.create_database()
    migrate(url)
    return url


def test_enable_database_logging_false_writes_no_row_and_no_journal(serve: Serve) -> None:
    running = serve(ENABLE_DATABASE_LOGGING="false")
    execution_id = running.execute("echo", {"message": "a"})["execution_id"]
    assert "log: off" in running.http.get("/readyz").text
    assert running.http.get("/api/v1/executions").json() == {"executions": [], "next_cursor": None}
    assert running.stop() == 0
    assert not (running.folder / "journal").exists()
    assert execution_id and logged_rows(running.folder / "agentcore.db") == []


def test_journal_dir_is_where_records_wait(serve: Serve, tmp_path: Path) -> None:
    running = serve(JOURNAL_DIR=str(tmp_path / "elsewhere"))
    running.execute("echo", {"message": "a"})
    (folder,) = (tmp_path / "elsewhere").iterdir()
    assert [path.suffix for path in folder.iterdir() if path.name.endswith("segment")] == [".segment"]
    assert not (running.folder / "journal").exists()


def test_a_journal_dir_that_cannot_be_used_stops_the_start_and_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "app", "serve", "--port", "0"],
        cwd=ROOT,
        env=service_environ(tmp_path, JOURNAL_DIR=str(tmp_path / "file")),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("agentcore-tools: JOURNAL_DIR /") and line.count("JOURNAL_DIR") == 1
    assert "JOURNAL_MODE=buffered" in line and "[Errno" not in line


@pytest.mark.parametrize("without", [{"JOURNAL_MODE": "buffered"}, {"ENABLE_DATABASE_LOGGING": "false"}])
def test_without_a_journal_its_folder_is_still_needed_for_outcomes(
    serve: Serve, tmp_path: Path, without: dict[str, str]
) -> None:
    (tmp_path / "file").write_text("")
    places = {"JOURNAL_DIR": str(tmp_path / "file"), "TOOL_MODULES": "tests.service.reuse_tools", **without}
    running = serve(**places)
    assert running.execute("pay", {"name": "a"})["status"] == "success"
    assert running.execute("pay", {"name": "a"}, idempotency_key="k")["code"] == -32008
    running.read_log(lambda event: event["message"].startswith("calls with an idempotency key will be refused"))
    done = subprocess.run(
        [sys.executable, "-m", "app", "doctor", "--port", "0"],
        cwd=ROOT,
        env=service_environ(tmp_path, **places),
        capture_output=True,
        text=True,
    )
    (bad,) = [line for line in done.stdout.splitlines() if line.startswith("BAD")]
    assert done.returncode == 1 and "calls with an idempotency key are refused" in bad and "JOURNAL_DIR" in bad


@pytest.mark.parametrize(("mode", "kept"), [("durable", True), ("strict", True), ("buffered", False)])
def test_journal_mode_decides_what_a_kill_may_cost(postgres: PostgresAt, tmp_path: Path, mode: str, kept: bool) -> None:
    """The database takes nothing, so that all there is of the call is what the process kept of it."""
    database = postgres.create_database()
    service = Service(tmp_path, database, JOURNAL_MODE=mode)
    execution_id = service.start().execute("echo", {"message": "a"})["execution_id"]
    service.kill()
    assert bool(list(tmp_path.rglob("*.segment"))) == kept
    migrate(database)
    with service:
        service.drained()
        assert (execution_id in dict(logged_rows(database, postgres))) == kept


@pytest.mark.parametrize(("payloads", "sizes", "contents"), [("off", 0, 0), ("metadata", 1, 0), ("full", 1, 1)])
def test_log_payloads_decides_what_rows_say_of_parameters_and_results(
    serve: Serve, payloads: str, sizes: int, contents: int
) -> None:
    running = serve(LOG_PAYLOADS=payloads)
    running.execute("echo", {"message": "hello"})
    ((parameters, parameters_bytes, parameters_sha256, result, result_bytes, result_sha256),) = rows(
        running, "parameters, parameters_bytes, parameters_sha256, result, result_bytes, result_sha256"
    )
    text = b'{"message":"hello"}'
    digest = hashlib.sha256(text).hexdigest()
    assert (parameters_bytes, parameters_sha256) == (result_bytes, result_sha256)
    assert (parameters_bytes, parameters_sha256) == ((len(text), digest) if sizes else (None, None))
    assert (parameters, result) == ((text.decode(), text.decode()) if contents else (None, None))


def test_log_payload_bytes_caps_what_a_row_keeps_and_not_what_it_says_of_the_size(serve: Serve) -> None:
    running = serve(LOG_PAYLOADS="full", LOG_PAYLOAD_BYTES="100")
    for characters in (80, 1_000, 9_000):
        running.execute("echo", {"message": "x" * characters})
    # In the order of their sizes: ids of one millisecond have none.
    kept_rows = sorted(rows(running, "parameters, parameters_bytes, parameters_sha256"), key=lambda row: int(row[1]))
    for characters, (kept, size_bytes, digest) in zip((80, 1_000, 9_000), kept_rows, strict=True):
        whole = json.dumps({"message": "x" * characters}, separators=(",", ":"))
        assert len(kept) <= 100 and size_bytes == len(whole)
        assert digest == hashlib.sha256(whole.encode()).hexdigest()
        assert kept == whole if characters == 80 else json.loads(kept) in whole and len(kept) > 90


def test_a_tools_log_payloads_goes_before_that_of_the_service(serve: Serve) -> None:
    running = serve(TOOL_MODULES=TOOLS, LOG_PAYLOADS="metadata")
    for tool_id in ("log_nothing_of_it", "log_all_of_it", "wait"):
        running.execute(tool_id, {"value": "hello"} | ({"seconds": 0} if tool_id == "wait" else {}))
    assert rows(running, "tool_id, result, result_bytes") == [
        ("log_nothing_of_it", None, None),
        ("log_all_of_it", '"hello"', 7),
        ("wait", None, 7),
    ]


def test_a_tools_log_mode_goes_before_that_of_the_service(postgres: PostgresAt, tmp_path: Path) -> None:
    """One service, killed while the database takes nothing: the tools' own promises hold."""
    database = postgres.create_database()
    service = Service(tmp_path, database)
    running = service.start()
    ids = {tool_id: running.execute(tool_id)["execution_id"] for tool_id in ("log_by_chance", "log_for_sure", "dear")}
    service.kill()
    migrate(database)
    with service:
        service.drained()
        assert dict(logged_rows(database, postgres)).keys() == {ids["log_for_sure"], ids["dear"]}


def test_a_buffered_tool_is_logged_while_its_process_lives(serve: Serve) -> None:
    running = serve(TOOL_MODULES=TOOLS)
    execution_id = running.execute("log_by_chance")["execution_id"]
    assert running.stop() == 0
    assert dict(logged_rows(running.folder / "agentcore.db")) == {execution_id: "success"}


def test_log_retention_days_drops_months_that_are_past_it(postgres: PostgresAt, database: str, serve: Serve) -> None:
    month = "tool_executions_2020_01"
    low, high = first_id(1_577_836_800_000), first_id(1_580_515_200_000)
    postgres.run_sql(
        f"CREATE TABLE {month} PARTITION OF tool_executions FOR VALUES FROM ('{low}') TO ('{high}')", database=database
    )

    def months() -> set[str]:
        sql = "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'tool_executions'::regclass"
        return {row[0] for row in postgres.run_sql(sql, database=database)}

    running = serve(DATABASE_URL=database, LOG_RETENTION_DAYS="36500")
    execution_id = running.execute("echo", {"message": "a"})["execution_id"]
    assert running.stop() == 0 and month in months()
    running = serve(DATABASE_URL=database, LOG_RETENTION_DAYS="30")
    wait_until(lambda: month not in months(), "the month is dropped")
    assert running.stop() == 0
    assert execution_id in dict(logged_rows(database, postgres))


def test_log_retention_days_deletes_rows_of_sqlite_that_are_past_it(serve: Serve, tmp_path: Path) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path / 'log.db'}"
    running = serve(DATABASE_URL=url)
    running.execute("echo", {"message": "a"})
    assert running.stop() == 0
    with contextlib.closing(sqlite3.connect(tmp_path / "log.db")) as connection:
        old = first_id(int((time.time() - 40 * 86_400) * 1000))
        columns = [row[1] for row in connection.execute("PRAGMA table_info(tool_executions)")][1:]
        connection.execute(f"INSERT INTO tool_executions SELECT '{old}', {', '.join(columns)} FROM tool_executions")
        connection.commit()
    for days, left in (("41", 2), ("39", 1)):
        running = serve(DATABASE_URL=url, LOG_RETENTION_DAYS=days)
        wait_until(lambda left=left: len(logged_rows(tmp_path / "log.db")) == left, "what is past it is deleted")
        assert running.stop() == 0


def test_database_url_names_where_the_rows_are(
    postgres: PostgresAt, database: str, serve: Serve, tmp_path: Path
) -> None:
    for url in (database, f"sqlite+aiosqlite:///{tmp_path / 'another.db'}"):
        running = serve(DATABASE_URL=url)
        execution_id = running.execute("echo", {"message": "a"})["execution_id"]
        assert running.stop() == 0
        found = logged_rows(database, postgres) if url == database else logged_rows(tmp_path / "another.db")
        assert dict(found)[execution_id] == "success"


def test_no_row_goes_to_a_sqlite_file_that_was_taken_away(serve: Serve, tmp_path: Path) -> None:
    settings = {"DATABASE_URL": f"sqlite+aiosqlite:///{tmp_path / 'log.db'}", "JOURNAL_DIR": str(tmp_path / "journal")}
    running = serve(**settings)
    running.execute("echo", {"message": "a"})
    drained(running)
    for file in tmp_path.glob("log.db*"):
        file.unlink()
    execution_id = running.execute("echo", {"message": "b"})["execution_id"]
    wait_until(lambda: "run agentcore-tools migrate" in running.http.get("/readyz").text, "it is told")
    assert running.metric("execution_log_journal_bytes") > 0
    subprocess.run([sys.executable, "-m", "app", "migrate"], cwd=ROOT, env=service_environ(**settings), check=True)
    drained(running)
    assert running.stop() == 0
    assert dict(logged_rows(tmp_path / "log.db")) == {execution_id: "success"}


# The pool


@contextlib.contextmanager
def locked_table(url: str) -> Iterator[None]:
    """Whoever reads or writes the log waits, and holds a connection meanwhile."""
    with asyncio.Runner() as runner:
        connection = runner.run(asyncpg.connect(url.replace("+asyncpg", ""), ssl=False))
        try:
            runner.run(connection.execute("BEGIN; LOCK TABLE tool_executions IN ACCESS EXCLUSIVE MODE"))
            yield
        finally:
            runner.run(connection.close())


@pytest.mark.parametrize(("size", "overflow"), [(1, 0), (4, 0), (1, 3), (4, 4)])
def test_database_pool_size_and_database_max_overflow_bound_the_connections(
    postgres: PostgresAt, database: str, serve: Serve, size: int, overflow: int
) -> None:
    running = serve(DATABASE_URL=database, DATABASE_POOL_SIZE=str(size), DATABASE_MAX_OVERFLOW=str(overflow))

    def connections() -> int:
        sql = """SELECT count(*) FROM pg_stat_activity WHERE application_name = 'agentcore-tools'
                 AND datname = current_database()"""
        found: int = postgres.run_sql(sql, database=database)[0][0]
        return found

    def in_use() -> float:
        return running.metric("database_connection_pool_size", state="in_use")

    assert running.metric("database_connection_pool_size") == size + overflow
    with ThreadPoolExecutor(12) as threads:
        with locked_table(database):
            assert running.execute("echo", {"message": "a"})["status"] == "success"
            asked = [threads.submit(read_history, running) for _ in range(12)]
            # The writer and its readers; one more is for keys, which are looked at now and then.
            busy = max(1, size + overflow - 1)
            wait_until(lambda: in_use() >= busy and connections() >= busy, f"{busy} connections")
            assert connections() <= size + overflow
        assert all(one.result() in (200, 503) for one in asked)
    drained(running)
    wait_until(lambda: in_use() == 0 and connections() <= size, "what was beyond the size is closed")
    assert connections() >= min(size, busy)


@pytest.mark.parametrize(("size", "overflow"), [(10, 10), (20, 20), (5, 5), (4, 4)])
def test_pages_that_the_database_does_not_answer_hold_what_the_alert_waits_for(
    database: str, serve: Serve, size: int, overflow: int
) -> None:
    part, most = re.findall(r"clamp_max\(([\d.]+) \* .*_pool_size\), (\d+)\)", RULE_FILES[1].read_text())[0]
    threshold = min(float(part) * (size + overflow), int(most))
    running = serve(DATABASE_URL=database, DATABASE_POOL_SIZE=str(size), DATABASE_MAX_OVERFLOW=str(overflow))
    with ThreadPoolExecutor(12) as threads:
        with locked_table(database):
            asked = [threads.submit(read_history, running) for _ in range(12)]
            wait_until(
                lambda: running.metric("database_connection_pool_size", state="in_use") >= threshold,
                f"{threshold:g} connections in use",
            )
        assert all(one.result() in (200, 503) for one in asked)


def read_history(running: Running) -> int:
    return httpx.get(f"{running.url}/api/v1/executions", timeout=60, trust_env=False).status_code
