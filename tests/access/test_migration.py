"""Migrations on real databases: once, however many processes try; all or nothing; never down."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text
from sqlalchemy.ext.asyncio import AsyncEngine

from app.clients import close_engine, create_engine
from app.migration import MigrationError, folder, is_current, locked, migrate, version, versions
from tests.conftest import ROOT, service_environ

pytestmark = pytest.mark.anyio

PROCESSES = 10

MIGRATE = """
import asyncio, sys
from app.clients import close_engine, create_engine
from app.migration import migrate, version

async def main():
    engine = create_engine(sys.argv[1], 1, 0)
    await migrate(engine)
    print(await version(engine), "alembic" in sys.modules)
    await close_engine(engine)

asyncio.run(main())
"""


@contextlib.asynccontextmanager
async def opened(url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_engine(url, 2, 0)
    try:
        yield engine
    finally:
        await close_engine(engine)


async def tables(engine: AsyncEngine) -> set[str]:
    async with engine.connect() as connection:
        return set(await connection.run_sync(lambda sync: inspect(sync).get_table_names()))


def test_versions_told_from_file_names_are_those_of_alembic() -> None:
    config = Config()
    config.set_main_option("script_location", str(folder()))
    config.set_main_option("path_separator", "os")
    scripts = ScriptDirectory.from_config(config)
    assert versions() == [script.revision for script in scripts.walk_revisions()][::-1]
    assert scripts.get_heads() == [versions()[-1]]


async def test_an_empty_database_gets_its_tables_and_knows_it(database_url: str) -> None:
    async with opened(database_url) as engine:
        assert await version(engine) is None and not await is_current(engine)
        await migrate(engine)
        assert await version(engine) == versions()[-1] and await is_current(engine)
        assert {"api_keys", "tool_executions"} <= await tables(engine)


async def test_a_sqlite_file_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    async with opened(f"sqlite+aiosqlite:///{tmp_path / 'new' / 'agentcore.db'}") as engine:
        assert list((tmp_path / "new").iterdir()) == []  # until it is asked for
        await migrate(engine)
        assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "new").iterdir()} == {0o600}


def test_ten_processes_at_once_migrate_once(database_url: str) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", MIGRATE, database_url],
            env=service_environ(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for _ in range(PROCESSES)
    ]
    said = [process.communicate(timeout=120)[0].decode() for process in started]
    assert [process.returncode for process in started] == [0] * PROCESSES, said
    assert {line.split()[0] for line in said} == {versions()[-1]}


def test_what_is_up_to_date_costs_no_import_of_alembic(database_url: str) -> None:
    command = [sys.executable, "-c", MIGRATE, database_url]
    said = [subprocess.run(command, env=service_environ(), capture_output=True, text=True).stdout for _ in range(2)]
    assert [line.split()[1] for line in said] == ["True", "False"]


async def test_a_migration_that_fails_leaves_nothing_behind(database_url: str) -> None:
    async with opened(database_url) as engine:
        async with engine.begin() as connection:
            await connection.execute(text("CREATE TABLE tool_executions (in_the_way int)"))
        with pytest.raises(MigrationError, match="tool_executions"):
            await migrate(engine)
        assert "api_keys" not in await tables(engine), "the step before it was taken back too"
        assert await version(engine) is None
        async with engine.begin() as connection:
            await connection.execute(text("DROP TABLE tool_executions"))
        await migrate(engine)
        assert await is_current(engine)


async def test_one_step_may_be_asked_for_and_no_step_goes_back(database_url: str) -> None:
    async with opened(database_url) as engine:
        await migrate(engine, "0001")
        assert await version(engine) == "0001" and not await is_current(engine)
        await migrate(engine)
        await migrate(engine, "0001")
        assert await version(engine) == versions()[-1]
        with pytest.raises(MigrationError, match="0001"):
            await migrate(engine, "base")


async def test_tables_of_a_newer_version_serve_an_older_one(database_url: str) -> None:
    async with opened(database_url) as engine:
        await migrate(engine)
        async with engine.begin() as connection:
            await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        assert await is_current(engine)
        await migrate(engine)
        assert await version(engine) == "9999"


def test_a_sqlite_database_that_a_full_disk_keeps_from_being_read_is_not_said_to_have_no_tables(tmp_path: Path) -> None:
    environ = service_environ(tmp_path)
    assert subprocess.run([sys.executable, "-m", "app", "migrate"], env=environ, capture_output=True).returncode == 0
    full = "import os, resource, sys; "
    full += "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); os.execv(sys.argv[1], sys.argv[1:])"
    for command in ("migrate", "doctor"):
        called = [sys.executable, "-c", full, sys.executable, "-m", "app", command]
        done = subprocess.run(called, env=environ, capture_output=True, text=True)
        said = done.stdout + done.stderr
        assert done.returncode in (1, 2) and "cannot be read (disk I/O error); see whether its disk is full" in said
        assert "no tables" not in said


@pytest.mark.parametrize("theirs", ["ae1027a6acf", "0001c2ffa1b3"])
async def test_a_database_of_another_application_is_refused(database_url: str, theirs: str) -> None:
    async with opened(database_url) as engine:
        async with engine.begin() as connection:
            await connection.execute(text("CREATE TABLE alembic_version (version_num varchar(32) NOT NULL)"))
            await connection.execute(text(f"INSERT INTO alembic_version VALUES ('{theirs}')"))
        for ask in (migrate, is_current, version):
            with pytest.raises(MigrationError, match="another application"):
                await ask(engine)
        assert await tables(engine) == {"alembic_version"}
    done = subprocess.run(
        [sys.executable, "-m", "app", "migrate"],
        cwd=ROOT,
        env=service_environ(DATABASE_URL=database_url),
        capture_output=True,
        text=True,
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and "another application" in line and theirs not in line


@pytest.mark.parametrize("lost", ["DROP TABLE alembic_version", "DELETE FROM alembic_version"])
async def test_tables_restored_without_their_version_are_told(database_url: str, lost: str) -> None:
    async with opened(database_url) as engine:
        await migrate(engine)
        async with engine.begin() as connection:
            await connection.execute(text(lost))
        for asked in (migrate, is_current):
            with pytest.raises(MigrationError, match="alembic_version does not say"):
                await asked(engine)


async def test_alembics_own_way_down_is_refused_in_one_line(database_url: str) -> None:
    async with opened(database_url) as engine:
        await migrate(engine)
        before = await tables(engine)
        done = subprocess.run(
            [sys.executable, "-m", "alembic", "downgrade", "-1"],
            cwd=ROOT,
            env=service_environ(DATABASE_URL=database_url),
            capture_output=True,
            text=True,
        )
        said = done.stdout + done.stderr
        assert done.returncode != 0 and "only go up" in said and "Traceback" not in said
        assert await is_current(engine) and await tables(engine) == before


async def test_a_lock_that_another_migration_holds_is_waited_for(database_url: str) -> None:
    async with opened(database_url) as first, opened(database_url) as second:
        async with locked(first):
            waiting = asyncio.create_task(migrate(second))
            done, _ = await asyncio.wait({waiting}, timeout=0.5)
            assert not done
        await waiting
        assert await is_current(first)


def test_without_the_scripts_the_message_says_what_is_missing(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "app", tmp_path / "app", ignore=shutil.ignore_patterns("__pycache__"))
    environ = {**service_environ(tmp_path), "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "app", "migrate"], cwd=tmp_path, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 1 and "`migrations`" in done.stderr and "Traceback" not in done.stderr


def test_a_database_that_cannot_be_reached_is_one_plain_line(tmp_path: Path) -> None:
    for url in ("postgresql+asyncpg://nobody@127.0.0.1:1/none", f"sqlite+aiosqlite:///{tmp_path}"):
        environ = service_environ(tmp_path, DATABASE_URL=url)
        done = subprocess.run(
            [sys.executable, "-m", "app", "migrate"], cwd=ROOT, env=environ, capture_output=True, text=True
        )
        (line,) = done.stderr.splitlines()
        assert done.returncode == 1 and "DATABASE_URL" in line
