"""The database's tables: which version it has, and bringing it up to date, once, however many processes try.

Alembic runs the scripts of `migrations/`, which lies beside this package in a checkout, in it in a wheel. It is
imported only when there is something to run. Called at start for SQLite, by `agentcore-tools migrate` for PostgreSQL.
Knows no table but Alembic's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path

from sqlalchemy import Connection, inspect, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app.clients import DATABASE_ERRORS, reason

NEWEST = "head"

LOCK_KEY = 0x61676E74
"""Of PostgreSQL's advisory locks, which all applications of a database share; the letters are `agnt`."""

LOCK_TIMEOUT_S = 60.0
LOCK_RETRY_S = 0.1
"""Tried again and again instead of waited for: a wait inside of the server would end by the command's timeout."""

VERSION_TIMEOUT_S = 5.0


class MigrationError(Exception):
    """The tables cannot be brought to a version: says why, and what to do."""


def folder() -> Path:
    """Where the scripts are. Raises MigrationError when the package was installed without them."""
    package = Path(__file__).parent
    for found in (package / "migrations", package.parent / "migrations"):  # in site-packages, others may be beside it
        if (found / "versions").is_dir():
            return found
    raise MigrationError("the folder `migrations` is neither in the package `app` nor beside it; install it whole")


def versions() -> list[str]:
    """Every version there is, oldest first, told from the names of the scripts: Alembic would import them all."""
    return sorted(script.stem.partition("_")[0] for script in (folder() / "versions").glob("[0-9]*.py"))


async def version(engine: AsyncEngine) -> str | None:
    """What the database has; None before the first migration. Raises MigrationError when it cannot be asked."""
    try:
        async with asyncio.timeout(VERSION_TIMEOUT_S), engine.connect() as connection:
            return await connection.run_sync(_version)
    except DATABASE_ERRORS as error:
        raise MigrationError(f"the database cannot be read ({reason(error)}); {_remedy(error)}") from error


def _remedy(error: Exception) -> str:
    """SQLite needs room to read, too: for the files beside its own that the last process took away when it closed."""
    import sqlite3  # a service on PostgreSQL does without

    code = getattr(getattr(error, "orig", None), "sqlite_errorcode", sqlite3.SQLITE_OK)
    is_disk = code & PRIMARY_CODE in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL)
    return "see whether its disk is full" if is_disk else "check DATABASE_URL"


PRIMARY_CODE = 0xFF
"""What all extended result codes of one kind have in common."""


def _version(connection: Connection) -> str | None:
    found: str | None = None
    has_tables = inspect(connection).has_table("api_keys")  # asked first: another process may make both meanwhile
    if inspect(connection).has_table("alembic_version"):
        found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    if found is None and has_tables:
        raise MigrationError(
            "the database has a table api_keys, but alembic_version does not say which version the tables have; "
            "restore that table, too, or give the service a database of its own"
        )
    if found is not None and not _OURS.fullmatch(found):
        raise MigrationError(
            "another application keeps its version in this database (alembic_version); give the service one of its own"
        )
    return found


_OURS = re.compile(r"\d{4}", re.ASCII)
"""Versions of ours, those to come too. Alembic names its own by hexadecimal digits."""


async def is_current(engine: AsyncEngine) -> bool:
    """Whether the tables are at least what this code needs; a newer version's tables serve an older one."""
    return (await version(engine) or "") >= versions()[-1]


async def migrate(engine: AsyncEngine, revision: str = NEWEST) -> None:
    """Bring the tables up to `revision`, never down. Safe from many processes at once."""
    known = versions()
    if revision not in (NEWEST, *known):
        raise MigrationError(f"no such revision; there are {', '.join(known)}")
    if (await version(engine) or "") >= _target(revision):
        return
    try:
        async with locked(engine) as connection:
            await connection.run_sync(_upgrade, revision)
    except DATABASE_ERRORS as error:
        raise MigrationError(f"the database cannot be migrated ({reason(error)})") from error


def _target(revision: str) -> str:
    return versions()[-1] if revision == NEWEST else revision


def _upgrade(connection: Connection, revision: str) -> None:
    if (_version(connection) or "") >= _target(revision):
        return  # another process did it while this one waited
    logging.getLogger("alembic").setLevel(logging.WARNING)  # a dozen lines of what it is made of
    from alembic import command  # takes 0.1 s to import, and nearly every start has nothing to do with it
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(folder()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


@contextlib.asynccontextmanager
async def locked(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """One transaction that no other migration overlaps; all that was done in it is done, or nothing."""
    if engine.dialect.name == "sqlite":
        async with engine.begin() as connection:
            await _begin_alone(connection)
            yield connection
        return
    async with engine.connect() as connection:
        await _lock(connection)
        yield connection
        await connection.commit()


async def _begin_alone(connection: AsyncConnection) -> None:
    """As the only one who writes to this SQLite file."""
    import sqlite3  # a service on PostgreSQL does without

    ends = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            await connection.exec_driver_sql("BEGIN IMMEDIATE")  # waits as long as clients.SQLITE_BUSY_S
            return
        except OperationalError as error:
            if getattr(error.orig, "sqlite_errorcode", None) != sqlite3.SQLITE_BUSY or time.monotonic() > ends:
                raise


async def _lock(connection: AsyncConnection) -> None:
    """Held until the transaction ends, however it ends, behind a pooler too."""
    try:
        async with asyncio.timeout(LOCK_TIMEOUT_S):
            while not (
                await connection.execute(text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": LOCK_KEY})
            ).scalar():
                await connection.rollback()
                await asyncio.sleep(LOCK_RETRY_S)
    except TimeoutError:
        raise MigrationError(f"another process has been migrating for over {LOCK_TIMEOUT_S:g} s; try again") from None
