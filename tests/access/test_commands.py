"""`keys`, `migrate` and what `doctor` says of the database, run as an operator runs them."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from app.clients import close_engine, create_engine
from app.execution_log.partitions import Month
from app.migration import versions
from tests.access.keyring import make_key
from tests.certificates import make_certificate
from tests.conftest import ROOT, places_in, service_environ
from tests.servers import POSTGRES_USER, PostgresAt, PostgresServer, ServerFailed, make_folder, remove_folder


def run(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "app", *arguments],
        cwd=ROOT,
        env=service_environ(DATABASE_URL=url),
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def url(database_url: str) -> str:
    """A database that is ready for keys: SQLite becomes so by itself."""
    if database_url.startswith("postgresql"):
        assert run(database_url, "migrate").stdout == f"tables at {versions()[-1]}\n"
    return database_url


@pytest.mark.parametrize("options", ["", "--json"])
def test_a_key_that_could_not_be_shown_is_revoked(url: str, options: str) -> None:
    command = f"keys create --tenant acme --subject planner {options} >/dev/full"
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -m app {command}', sys.executable],
        cwd=ROOT,
        env=service_environ(DATABASE_URL=url),
        capture_output=True,
        text=True,
        timeout=120,
    )
    (listed,) = json.loads(run(url, "keys", "list", "--json").stdout)
    assert listed["revoked_at"] is not None
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.endswith(f"; the key {listed['id']} is revoked")


def test_a_key_is_made_listed_and_revoked(url: str) -> None:
    made = json.loads(run(url, "keys", "create", "--tenant", "acme", "--subject", "planner", "--json").stdout)
    assert made.keys() == {"id", "key"} and made["key"].startswith(f"act_{made['id']}_")
    (listed,) = json.loads(run(url, "keys", "list", "--json").stdout)
    assert listed == {
        "id": made["id"],
        "tenant": "acme",
        "subject": "planner",
        "limit_class": "default",
        "tools": ["*"],
        "scopes": ["executions:read", "tools:execute", "tools:read"],
        "expires_at": None,
        "revoked_at": None,
        "created_at": listed["created_at"],
    }
    assert json.loads(run(url, "keys", "revoke", made["id"], "--json").stdout)["revoked_at"] is not None
    again = run(url, "keys", "revoke", made["id"])
    assert again.returncode == 0 and made["id"] in again.stdout
    text = run(url, "keys", "list").stdout
    assert "revoked" in text and "acme/planner" in text and made["key"].rsplit("_", 1)[1] not in text


def test_database_url_is_where_keys_are(tmp_path: Path) -> None:
    here, there = (f"sqlite+aiosqlite:///{tmp_path / name}" for name in ("here.db", "there.db"))
    make_key(here)
    assert len(json.loads(run(here, "keys", "list", "--json").stdout)) == 1
    assert json.loads(run(there, "keys", "list", "--json").stdout) == []


def test_every_option_of_a_key_is_kept(tmp_path: Path) -> None:
    url = places_in(tmp_path)["DATABASE_URL"]
    created = run(
        url,
        *(
            "keys",
            "create",
            "--tenant",
            "acme",
            "--subject",
            "root",
            "--scope",
            "admin",
            "--scope",
            "tools:read",
            "a:b",
        ),
        *("--tool", "web_*", "--tool", "e?ho", "--class", "free", "--expires-in", "90d"),
    )
    assert created.returncode == 0 and "shown this once" in created.stdout
    (listed,) = json.loads(run(url, "keys", "list", "--json").stdout)
    assert listed["scopes"] == ["a:b", "admin", "tools:read"] and listed["tools"] == ["web_*", "e?ho"]
    assert listed["limit_class"] == "free" and listed["expires_at"] > listed["created_at"]
    assert listed["id"] in created.stdout


def test_what_cannot_be_is_refused_by_the_name_of_its_option(tmp_path: Path) -> None:
    url = places_in(tmp_path)["DATABASE_URL"]
    wrong = {"--tenant": "", "--scope": "Admin", "--tool": "[ab]", "--class": "a b", "--expires-in": "soon"}
    done = run(url, "keys", "create", "--subject", "s", *(word for pair in wrong.items() for word in pair))
    assert done.returncode == 2 and all(option in done.stderr for option in wrong), done.stderr
    assert "Admin" not in done.stderr and not (tmp_path / "agentcore.db").exists()


def test_a_time_that_is_none_is_told_how_one_is_written(tmp_path: Path) -> None:
    url = places_in(tmp_path)["DATABASE_URL"]
    for wrong in ("soon", "90", "36501d"):
        done = run(url, "keys", "create", "--tenant", "t", "--subject", "s", "--expires-in", wrong)
        assert done.returncode == 2 and "--expires-in: must be a whole number with s, m, h or d" in done.stderr


def test_a_key_that_is_none_cannot_be_revoked(tmp_path: Path) -> None:
    done = run(places_in(tmp_path)["DATABASE_URL"], "keys", "revoke", "0" * 20)
    assert done.returncode == 1 and "no such key" in done.stderr and done.stdout == ""


def test_postgresql_without_tables_is_told_to_be_migrated(postgres: PostgresAt) -> None:
    url = postgres.create_database()
    done = run(url, "keys", "list")
    assert done.returncode == 1 and "agentcore-tools migrate" in done.stderr
    findings = {each["what"]: each for each in json.loads(run(url, "doctor", "--port", "0", "--json").stdout)}
    assert not findings["database"]["ok"] and "agentcore-tools migrate" in findings["database"]["says"]


def test_migrate_goes_to_the_revision_that_is_named_and_to_the_newest_without(postgres: PostgresAt) -> None:
    url = postgres.create_database()
    assert run(url, "migrate", "0001").stdout == "tables at 0001\n"
    assert run(url, "migrate").stdout == f"tables at {versions()[-1]}\n"
    done = run(url, "migrate", "no_such")
    assert done.returncode == 1 and "0001" in done.stderr


def test_months_that_cannot_be_made_are_one_plain_line(postgres: PostgresAt) -> None:
    url = postgres.create_database()
    assert run(url, "migrate").returncode == 0

    async def migrate_beside_a_backup() -> subprocess.CompletedProcess[str]:
        engine = create_engine(url, 1, 0)
        async with engine.begin() as backup:
            await backup.execute(text(f"DROP TABLE {Month.of(time.time()).plus(3).table}"))
        async with engine.begin() as backup:
            await backup.execute(text("LOCK TABLE tool_executions IN ACCESS SHARE MODE"))
            done = await asyncio.to_thread(run, url, "migrate")
        await close_engine(engine)
        return done

    done = asyncio.run(migrate_beside_a_backup())
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and "months of the log" in line and "lock timeout" in line
    assert run(url, "migrate").returncode == 0


@pytest.mark.parametrize("command", [["keys", "list"], ["migrate"]], ids=" ".join)
def test_a_database_that_is_away_is_one_plain_line(command: list[str]) -> None:
    done = run("postgresql+asyncpg://nobody:hunter2@127.0.0.1:1/none", *command)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and "DATABASE_URL" in line and "hunter2" not in line


@pytest.fixture(scope="module")
def encrypting() -> Iterator[tuple[PostgresAt, Path]]:
    """A PostgreSQL that speaks TLS, and the authority of its certificate."""
    folder = make_folder("agentcore-tls-", POSTGRES_USER)
    certificate = make_certificate(folder, "127.0.0.1")
    certificate.chmod(0o600)
    if POSTGRES_USER is not None:
        shutil.chown(certificate, POSTGRES_USER)
    files = {"ssl_cert_file": str(certificate), "ssl_key_file": str(certificate)}
    server = PostgresServer(ssl="on", **files)
    try:
        server.start()
    except ServerFailed as error:  # as the wheel's
        server.close()
        remove_folder(folder)
        if "SSL is not supported" not in str(error):
            raise
        pytest.skip("NOT TESTED: this PostgreSQL was built without TLS; install another, such as the system's")
    yield server, certificate
    server.close()
    remove_folder(folder)


@pytest.mark.parametrize("words", ["sslmode=require", "ssl=require", "sslmode=verify-full&sslrootcert={authority}"])
def test_a_database_url_takes_the_words_for_tls_that_services_hand_out(
    encrypting: tuple[PostgresAt, Path], postgres: PostgresAt, words: str
) -> None:
    server, authority = encrypting
    query = words.format(authority=authority)
    done = run(f"{server.create_database()}?{query}", "migrate")
    assert done.stdout == f"tables at {versions()[-1]}\n", done.stderr
    plain = run(f"{postgres.create_database()}?{query}", "migrate")
    assert plain.returncode == 1 and "SSL" in plain.stderr and "Traceback" not in plain.stderr


def test_an_authority_that_did_not_sign_is_not_believed(encrypting: tuple[PostgresAt, Path], tmp_path: Path) -> None:
    other = make_certificate(tmp_path, "127.0.0.1")
    done = run(f"{encrypting[0].url}?sslmode=verify-full&sslrootcert={other}", "migrate")
    assert done.returncode == 1 and "certificate" in done.stderr.lower() and "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["serve --port 0", "keys list", "migrate", "tools list"])
def test_a_database_url_that_cannot_be_is_one_plain_line(command: str) -> None:
    done = run("postgresql+asyncpg://nobody:hunter2@h:notaport/none", *command.split())
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "DATABASE_URL" in line and "hunter2" not in line


def test_doctor_tells_a_database_that_is_ready_from_one_that_is_not(tmp_path: Path) -> None:
    url = places_in(tmp_path)["DATABASE_URL"]
    findings = {each["what"]: each for each in json.loads(run(url, "doctor", "--port", "0", "--json").stdout)}
    assert findings["database"] == {"what": "database", "ok": True, "says": f"sqlite, tables at {versions()[-1]}"}
    away = run(f"sqlite+aiosqlite:///{tmp_path}", "doctor", "--port", "0", "--json")
    findings = {each["what"]: each for each in json.loads(away.stdout)}
    assert away.returncode == 1 and not findings["database"]["ok"] and "DATABASE_URL" in findings["database"]["says"]


def test_doctor_knows_that_a_key_makes_other_addresses_safe(tmp_path: Path) -> None:
    url = places_in(tmp_path)["DATABASE_URL"]
    exposed = ["doctor", "--host", "0.0.0.0", "--port", "0", "--json"]
    findings = {each["what"]: each for each in json.loads(run(url, *exposed).stdout)}
    assert not findings["access"]["ok"] and "keys create" in findings["access"]["says"]
    make_key(url)
    findings = {each["what"]: each for each in json.loads(run(url, *exposed).stdout)}
    assert findings["access"]["ok"]
