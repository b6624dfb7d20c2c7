"""How Alembic gets at the database: a connection that the caller holds, or one of its own from DATABASE_URL.

Tables are written by hand in `versions/`, so there is no metadata to compare with.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from alembic import context
from sqlalchemy import Connection

from app.clients import close_engine, create_engine
from app.migration import locked
from app.settings import read_settings


def run(connection: Connection) -> None:
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()


async def run_on_own_connection() -> None:
    engine = create_engine(read_settings(os.environ, Path(".env")).database_url, 1, 0)
    try:
        async with locked(engine) as connection:
            await connection.run_sync(run)
    finally:
        await close_engine(engine)


def write_sql() -> None:
    """`alembic upgrade head --sql`: for whoever lets nobody but an administrator change tables."""
    dialect = read_settings(os.environ, Path(".env")).database_url.partition("+")[0]
    context.configure(dialect_name=dialect, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()


if context.is_offline_mode():
    write_sql()
elif (given := context.config.attributes.get("connection")) is not None:
    run(given)
else:
    asyncio.run(run_on_own_connection())
