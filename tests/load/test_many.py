"""What benchmarks fill their stores with."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from app.clients import create_engine
from app.migration import migrate
from load.many import fill_log
from tests.servers import PostgresAt

pytestmark = pytest.mark.anyio


async def test_a_log_is_filled_in_pieces_with_as_many_rows_as_were_asked_for(postgres: PostgresAt) -> None:
    database = postgres.create_database()
    engine = create_engine(database, 1, 1)
    try:
        await migrate(engine)
        await fill_log(database, 120, at_once=50)
        async with engine.connect() as connection:
            found = await connection.scalar(text("SELECT count(DISTINCT execution_id) FROM tool_executions"))
        assert found == 120
    finally:
        await engine.dispose()
