"""Pools to the outside, each with a name, a bound and a timeout. Knows no table and no key."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

CONNECT_TIMEOUT_S = 5.0
COMMAND_TIMEOUT_S = 10.0
POOL_TIMEOUT_S = 30.0
POOL_RECYCLE_S = 3600
"""Firewalls and poolers drop what is older without a word."""

CLOSE_TIMEOUT_S = 2.0
"""asyncpg's own close waits for ever for a server that is stopped."""

SQLITE_BUSY_S = 5.0


def create_engine(url: str, pool_size: int, max_overflow: int) -> AsyncEngine:
    """The engine of DATABASE_URL. Opens nothing yet. The pool's bounds hold for PostgreSQL; SQLite has one writer."""
    if make_url(url).get_backend_name() == "sqlite":
        return _create_sqlite(url)
    return create_async_engine(
        url,
        pool_size=pool_size,
        max_overflow=max_overflow,
        pool_timeout=POOL_TIMEOUT_S,
        pool_recycle=POOL_RECYCLE_S,
        pool_pre_ping=True,
        connect_args={
            "timeout": CONNECT_TIMEOUT_S,
            "command_timeout": COMMAND_TIMEOUT_S,
            "server_settings": {"application_name": "agentcore-tools"},
        },
    )


def _create_sqlite(url: str) -> AsyncEngine:
    if (file := make_url(url).database) and file != ":memory:":
        with contextlib.suppress(OSError):  # the first statement says what is wrong
            Path(file).parent.mkdir(parents=True, exist_ok=True)
    engine = create_async_engine(url, connect_args={"timeout": SQLITE_BUSY_S})

    @event.listens_for(engine.sync_engine, "connect")
    def prepare(connection: Any, record: Any) -> None:
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    return engine


async def close_engine(engine: AsyncEngine) -> None:
    """Close every connection, bounded."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await engine.dispose()
