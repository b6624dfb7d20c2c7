"""docs/operations/database.md: every block of SQL works when pasted."""

from __future__ import annotations

import re

import pytest

from app import migration
from app.clients import create_engine
from tests.conftest import ROOT
from tests.execution_log.database import fill, record
from tests.servers import PostgresServer

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
