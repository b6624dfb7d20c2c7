"""Replicas that are restarted under load behind a real proxy; two versions side by side on one database and Redis."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from load.rollout import Outcome, Replicas, roll
from tests.conftest import ROOT, Running, Serve, service_environ
from tests.haproxy import needs_haproxy
from tests.servers import PostgresAt, RedisAt, make_folder, remove_folder, wait_until

RATE = 150.0

DRAIN_S = 4.0
"""Twenty looks of the proxy, and it may be held up for many of them."""


@pytest.fixture(scope="module")
def replicas(postgres: PostgresAt, redis: RedisAt) -> Iterator[Replicas]:
    """Three that drain, and one that does not."""
    needs_haproxy()
    folder = make_folder("agentcore-rollout-")
    with Replicas(folder, postgres, redis, [DRAIN_S, DRAIN_S, DRAIN_S, 0.0]) as running:
        yield running
    remove_folder(folder)


def says(outcome: Outcome) -> str:
    return f"{outcome.requests} calls, failed {dict(outcome.failures)}, rows {outcome.rows}, {outcome.restarts}"


def test_nobody_notices_that_three_replicas_are_restarted_one_after_another(replicas: Replicas) -> None:
    outcome = roll(replicas, replicas.services[:3], RATE)
    assert not outcome.failures and outcome.rows.lost == 0 and outcome.rows.duplicates == 0, says(outcome)
    assert outcome.holds and [restart.code for restart in outcome.restarts] == [0, 0, 0], says(outcome)
    assert outcome.rows.answered == outcome.requests > 3 * RATE, says(outcome)


def test_without_a_drain_calls_fail_and_no_row_is_lost(replicas: Replicas) -> None:
    """Of those that come before the proxy looks again, which may be at once: it does not, here."""
    with replicas.proxy.not_looking_at(replicas.services[3].port):
        outcome = roll(replicas, replicas.services[3:], RATE)
    assert outcome.failures and outcome.rows.lost == 0 and outcome.restarts[0].code == 0, says(outcome)
    print(says(outcome))


def test_a_replica_that_is_killed_fails_calls_and_loses_no_row_of_an_answered_one(replicas: Replicas) -> None:
    with replicas.proxy.not_looking_at(replicas.services[0].port):
        outcome = roll(replicas, replicas.services[:1], RATE, "kill")
    assert outcome.failures and outcome.rows.lost == 0 and outcome.rows.duplicates == 0, says(outcome)


# Two versions


LATER = (
    "ALTER TABLE tool_executions ADD COLUMN region text",
    "ALTER TABLE api_keys ADD COLUMN note text",
    "CREATE TABLE of_a_later_version (id bigint PRIMARY KEY, at timestamptz NOT NULL DEFAULT now())",
    "UPDATE alembic_version SET version_num = '9999'",
)
"""What a later version's migration may do: it adds, and nobody must know of it."""

EARLIER = (
    "DROP TABLE tool_executions, tool_executions_dead CASCADE",
    "UPDATE alembic_version SET version_num = '0001'",
)
"""Back to a version with keys and without a log."""


def command(database: str, *arguments: str) -> str:
    environ = service_environ(DATABASE_URL=database)
    done = subprocess.run(
        [sys.executable, "-m", "app", *arguments], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def create_key(database: str) -> str:
    made = command(database, "keys", "create", "--tenant", "t", "--subject", "s", "--json")
    return str(json.loads(made)["key"])


def echo(running: Running, key: str) -> dict[str, object]:
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools.execute", "params": ECHO}
    answer = running.http.post("/api/v1/jsonrpc", json=body, headers={"Authorization": f"Bearer {key}"}).json()
    return answer.get("result") or answer["error"]  # type: ignore[no-any-return]


ECHO = {"tool_id": "echo", "parameters": {"message": "x"}}


def rows(postgres: PostgresAt, database: str) -> set[str]:
    return {str(row[0]) for row in postgres.run_sql("SELECT execution_id FROM tool_executions", database=database)}


def test_this_version_serves_on_beside_a_later_one_that_has_migrated(
    serve: Serve, postgres: PostgresAt, redis_url: str
) -> None:
    database = postgres.create_database()
    command(database, "migrate")
    redis = {"REDIS_URL": redis_url, "LIMITS_TIMEOUT_MS": "10000"}
    shared = {"DATABASE_URL": database, **redis, "LIMITS_RATE": "3/hour", "AUTH_MODE": "required"}
    early, key = serve(**shared), create_key(database)
    answers = [echo(early, key)]
    for statement in LATER:
        postgres.run_sql(statement, database=database)
    # One that ran all the time, one that starts on the later tables as in a rollback, and a key of then.
    late, later_key = serve(**shared), create_key(database)
    answers += [echo(early, key), echo(late, key)]
    assert [answer.get("status") for answer in answers] == ["success"] * 3
    refused = [echo(early, later_key), echo(late, key)]
    assert [answer.get("code") for answer in refused] == [-32001] * 2, "one limit for all replicas"
    ids = {str(answer["execution_id"]) for answer in answers}
    wait_until(lambda: rows(postgres, database) == ids, "every answered call, of either replica, is a row")
    assert "9999" in command(database, "migrate"), "an earlier version's command leaves a later one's tables alone"
    assert late.stop() == early.stop() == 0


def test_this_version_serves_before_its_migration_has_run(serve: Serve, postgres: PostgresAt) -> None:
    database = postgres.create_database()
    command(database, "migrate")
    key = create_key(database)
    for statement in EARLIER:
        postgres.run_sql(statement, database=database)
    running = serve(DATABASE_URL=database, AUTH_MODE="required")
    ids = {str(echo(running, key)["execution_id"]) for _ in range(5)}
    assert running.http.get("/readyz").status_code == 200
    command(database, "migrate")
    wait_until(lambda: rows(postgres, database) == ids, "what waited for the table is in it")


CONTRACTING = re.compile(
    r"\bDROP\s+(?:TABLE|COLUMN|CONSTRAINT|INDEX)|\bRENAME\b|\bSET\s+NOT\s+NULL|\bALTER\s+COLUMN\s+\w+\s+(?:SET\s+DATA\s+)?TYPE"
    r"|\bADD\s+COLUMN\s+[^,;]*\bNOT\s+NULL(?![^,;]*\bDEFAULT\b)"
    r"|\bop\.(?:drop_\w+|rename_\w+|alter_column)\b",
    re.IGNORECASE,
)
"""What takes something away from the version before, or asks something new of its inserts."""


@pytest.mark.parametrize("script", sorted((ROOT / "migrations" / "versions").glob("*.py")), ids=lambda path: path.stem)
def test_a_migration_only_adds_or_says_which_version_stopped_using_what_it_removes(script: Path) -> None:
    text = script.read_text()
    upgrade = text.split("def downgrade")[0]
    assert not CONTRACTING.search(upgrade) or re.search(r"^UNUSED_SINCE = \"\d+\.\d+", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("statement", "contracts"),
    [
        ("ALTER TABLE t ADD COLUMN a text", False),
        ("ALTER TABLE t ADD COLUMN a text NOT NULL DEFAULT ''", False),
        ("CREATE TABLE t (a text NOT NULL)", False),
        ("ALTER TABLE t ADD COLUMN a text NOT NULL", True),
        ("ALTER TABLE t DROP COLUMN a", True),
        ("ALTER TABLE t RENAME COLUMN a TO b", True),
        ("ALTER TABLE t ALTER COLUMN a TYPE bigint", True),
        ("ALTER TABLE t ALTER COLUMN a SET NOT NULL", True),
        ("op.drop_column('t', 'a')", True),
    ],
)
def test_what_contracts_is_told_from_what_expands(statement: str, contracts: bool) -> None:
    assert bool(CONTRACTING.search(statement)) == contracts
