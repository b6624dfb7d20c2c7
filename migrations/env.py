"""How Alembic gets at the database: a connection that the caller holds, or one of its own from DATABASE_URL.

Tables are written by hand in `versions/`, so there is no metadata to compare with. They only go up: the version before
runs on newer ones.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from alembic import command, context
from alembic.util import CommandError
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


def refuse_downgrade() -> None:
    """Without this Alembic would end in an AttributeError, for no script has a way down."""
    asked = getattr(context.config.cmd_opts, "cmd", (None,))
    if asked[0] is command.downgrade:
        raise CommandError("tables only go up; the version before runs on newer ones, so its image is the way back")


refuse_downgrade()
if context.is_offline_mode():
    write_sql()
elif (given := context.config.attributes.get("connection")) is not None:
    run(given)
else:
    asyncio.run(run_on_own_connection())
