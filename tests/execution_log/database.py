"""What the tests of the log's database side share: engines with tables, and records as the journal would hold them."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import AsyncIterator
from typing import Any

import orjson
from sqlalchemy.ext.asyncio import AsyncEngine

from app import migration
from app.calls import new_execution_id
from app.clients import create_engine
from app.execution_log.columns import COLUMNS
from app.execution_log.store import ExecutionStore


@contextlib.asynccontextmanager
async def database(url: str, pool_size: int = 5) -> AsyncIterator[AsyncEngine]:
    """An engine on a migrated database."""
    engine = create_engine(url, pool_size, 0)
    try:
        await migration.migrate(engine)
        yield engine
    finally:
        await engine.dispose()


def id_at(unix_s: float) -> str:
    """A UUIDv7 of that time."""
    made, digits = new_execution_id(), f"{int(unix_s * 1000):012x}"
    return f"{digits[:8]}-{digits[8:]}{made[13:]}"


def record(**values: Any) -> bytes:
    """A record with these columns and ordinary others; `at` is its time."""
    at = values.pop("at", time.time())
    payload = b'{"message":"hello"}'
    ordinary = {
        "execution_id": id_at(at),
        "tool_id": "echo",
        "tool_version": "1.0.0",
        "tenant": "acme",
        "subject": "anna",
        "agent_id": None,
        "status": "success",
        "error_type": None,
        "error_code": None,
        "started_at": round(at, 6),
        "finished_at": round(at + 0.004, 6),
        "execution_ms": 3.25,
        "overhead_ms": 0.5,
        "attempts": 1,
        "cached": False,
        "client_gone": False,
        "trace_id": "0123456789abcdef",
        "cost": 1,
        "parameters": orjson.Fragment(payload),
        "parameters_bytes": len(payload),
        "parameters_sha256": hashlib.sha256(payload).hexdigest(),
        "result": None,
        "result_bytes": None,
        "result_sha256": None,
    }
    assert values.keys() <= ordinary.keys()
    return orjson.dumps([(ordinary | values)[column] for column in COLUMNS])


async def rows(engine: AsyncEngine, sql: str) -> list[tuple[Any, ...]]:
    async with engine.connect() as connection:
        return [tuple(row) for row in await connection.exec_driver_sql(sql)]


async def run(engine: AsyncEngine, *statements: str) -> None:
    async with engine.begin() as connection:
        for statement in statements:
            await connection.exec_driver_sql(statement)


async def logged(engine: AsyncEngine) -> list[str]:
    """Ids of all rows, in order."""
    return [str(row[0]) for row in await rows(engine, "SELECT execution_id FROM tool_executions ORDER BY 1")]


def ids(records: list[bytes]) -> list[str]:
    return sorted(orjson.loads(one)[0] for one in records)


async def fill(engine: AsyncEngine, records: list[bytes]) -> None:
    """All of them, as rows."""
    store = ExecutionStore(engine)
    for start in range(0, len(records), 1_000):
        assert (await store.write(records[start : start + 1_000])).parked == 0
