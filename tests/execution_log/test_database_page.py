"""docs/operations/database.md: every block of SQL works when pasted, and every backup can be restored."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from app import migration
from app.clients import create_engine
from tests.conftest import ROOT
from tests.execution_log.database import database, fill, record
from tests.servers import PostgresServer, postgres_binaries

pytestmark = pytest.mark.anyio

PAGE = ROOT / "docs" / "operations" / "database.md"


async def test_every_block_of_sql_on_the_page_works_when_pasted() -> None:
    blocks = re.findall(r"```sql\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) > 10
    with PostgresServer(shared_preload_libraries="pg_stat_statements") as server:
        url = server.create_database()
        engine = create_engine(url, 2, 0)
        try:
            await migration.migrate(engine)
            await fill(engine, [record() for _ in range(10)])
            answers = {block: server.run_sql(block, database=url) for block in blocks}
        finally:
            await engine.dispose()
    empty = [block for block, answer in answers.items() if not answer]
    for block in empty:
        assert (
            "tool_executions_dead" in block
            or "mean_exec_time > 10" in block
            or "CREATE EXTENSION" in block
            or ("state <> 'idle'" in block)
        ), block


def shell_blocks() -> list[str]:
    return re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)


def paste(line: str, folder: Path, **environ: str) -> None:
    subprocess.run(["bash", "-c", line], cwd=folder, env={**os.environ, **environ}, check=True, timeout=120)


async def test_what_the_page_dumps_an_empty_database_takes_back(tmp_path: Path) -> None:
    binaries = next(iter(postgres_binaries().values()))
    if not (binaries / "pg_dump").exists():
        pytest.skip("NOT TESTED: this PostgreSQL came without pg_dump")
    path = f"{binaries}:{os.environ['PATH']}"
    dump, restore, migrate = shell_blocks()[0].splitlines()
    with PostgresServer() as server:
        source, target = server.create_database(), server.create_database()
        async with database(source) as engine:
            await fill(engine, [record() for _ in range(10)])
            paste(dump, tmp_path, PATH=path, PGURL=source.replace("+asyncpg", ""))
        paste(restore, tmp_path, PATH=path, PGURL=target.replace("+asyncpg", ""))
        assert migrate == "agentcore-tools migrate"
        paste(f"{sys.executable} -m app migrate", ROOT, DATABASE_URL=target)
        assert server.run_sql("SELECT count(*) FROM tool_executions", database=target)[0][0] == 10


async def test_the_copy_of_a_sqlite_file_in_use_has_what_the_file_alone_lacks(tmp_path: Path) -> None:
    (tmp_path / "var").mkdir()
    (line,) = shell_blocks()[1].splitlines()
    if shutil.which("sqlite3") is None:
        pytest.skip("NOT TESTED: no sqlite3 here")
    async with database(f"sqlite+aiosqlite:///{tmp_path}/var/agentcore.db") as engine:
        await fill(engine, [record() for _ in range(10)])
        shutil.copy(tmp_path / "var" / "agentcore.db", tmp_path / "alone.db")
        paste(line, tmp_path)
    assert rows_of(tmp_path / "agentcore-backup.db") == 10
    assert rows_of(tmp_path / "alone.db") is None


def rows_of(path: Path) -> int | None:
    """None where there is no table."""
    connection = sqlite3.connect(path)
    try:
        return int(connection.execute("SELECT count(*) FROM tool_executions").fetchone()[0])
    except sqlite3.OperationalError:
        return None
    finally:
        connection.close()
